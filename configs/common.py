"""Presets that config files share, and their `name=value` argument.

A config file's `get_config(arg)` gets what stands behind the colon:
`--config=configs/preference.py:data=hh,loss=ipo_sum,model=smollm2-135m`.
"""

import ml_collections

from dpo_jax import names
from dpo_jax import optim
from dpo_jax.losses import table
from dpo_jax.models import presets

# Published models, and tiny ones: two layers, random weights, byte tokenizer,
# seconds on a CPU.
MODELS = {
  name: dict(source=source) for name, source in presets.SOURCES.items()
} | {name: dict(source=name) for name in presets.DEBUG}

# task: a builder of dpo_jax.data.builders. subsets: of HH, or file names
# without suffix; () is all. prompt_words: words of an IMDb review that are
# the prompt of its rest.
DATA = {
  'hh': dict(
    task='hh', subsets=('harmless-base', 'helpful-base'), prompt_words=0
  ),
  'tldr': dict(task='tldr', subsets=(), prompt_words=0),
  'imdb': dict(task='imdb', subsets=(), prompt_words=4),
  'jsonl': dict(task='jsonl', subsets=(), prompt_words=0),
}

OPTIM = {
  # The DPO paper's (appendix B) and its authors' code: RMSprop, 1e-6 after
  # 150 steps of linear warm-up, clipped at norm 10.
  'rmsprop': dict(
    lr=1e-6, warmup_steps=150, warmup_init=1 / 151, clip_norm=10.0
  ),
  'adamw': dict(lr=5e-6, warmup_steps=20, warmup_init=1 / 21, clip_norm=1.0),
}


REFERENCE = {
  'frozen': dict(mode='frozen'),  # a second copy of the weights
  # Log-probs computed once, in a folder; '' is the user's cache.
  'cached': dict(mode='cached', cache_dir=''),
  # TR-DPO: every so many steps the reference becomes alpha policy + (1 -
  # alpha) reference; alpha 1 is its hard update.
  'ema': dict(mode='ema', alpha=0.6, every=512),
  'adapter_off': dict(mode='adapter_off'),  # an adapter's model without it
  'none': dict(mode='none'),
}

ADAPTERS = {
  'none': dict(kind='none'),  # all weights are trained
  'lora': dict(
    kind='lora',
    targets='.*',  # regular expression of names of models/lora.INPUTS
    rank=16,
    alpha=32.0,  # the adapter counts alpha / rank times
    init='a_zero',  # the factor that is zero at first: a_zero | b_zero
  ),
  'peft': dict(kind='peft', source=''),  # one to go on with: PEFT's folder
}


def pick(options, kind, name):
  """Returns a copy of `options[name]`; a wrong name shows the nearest one."""
  return dict(names.look_up(options, kind, name))


def parse(arg, **defaults):
  """Reads 'data=hh,debug' into {'data': 'hh', 'debug': True, ...}."""
  values = dict(defaults)
  for part in filter(None, arg.split(',')):
    name, equals, value = part.partition('=')
    names.look_up(defaults, 'config argument', name)
    values[name] = value if equals else True
  return values


def optim_section(name):
  """`config.optim`: schedule, clipping and the optimizer's own keywords."""
  return dict(
    name=name,
    schedule='constant',  # after warm-up: constant | linear | cosine to 0
    keywords=pick(optim.OPTIMIZERS, 'optimizer', name),
    **pick(OPTIM, 'optimizer', name),
  )


def training(arg):
  """The config of one training run.

  Args:
    arg: dict of `parse` with data, loss, reference, model, adapter, optim and
      debug.
  """
  loss = table.section(arg['loss'])
  reference = arg['reference']
  if reference == 'auto':
    needed = any(table.get(name).reference for name in loss)
    new = arg['adapter'] == 'lora'  # then the policy is the model without it
    own = 'adapter_off' if new else 'frozen'
    reference = own if needed else 'none'
  config = ml_collections.ConfigDict()
  config.seed = 0  # of the data order and of sampling
  config.num_steps = 0  # updates; 0: as many as `epochs` needs
  config.epochs = 1.0  # passes over the training groups; 0: use num_steps
  config.batch_size = 64  # groups (pairs, or prompts with one response) a step
  config.accumulate = 1  # micro-batches of a step: less memory, same numbers
  config.log_every = 10  # steps between log records
  config.init = ''  # workdir of another run whose parameters to start from
  config.resume = ''  # workdir of another run whose whole state to go on with
  config.peak_tflops = 0.0  # of all devices, for train/mfu; 0: measured
  config.logps_chunk = 256  # scored tokens a device has logits of at one time

  # Folder of compiled programs; auto: in the user's cache, '': none are kept.
  config.compilation_cache = 'auto'

  config.mesh = dict(data=-1, fsdp=1, tensor=1)  # devices; -1: the rest

  config.model = pick(MODELS, 'model', arg['model'])
  # config.model.source may also be a Hugging Face folder, a .gguf file,
  # hf:OWNER/NAME[@REVISION], or random:NAME: a name above, untrained
  config.model.dtype = 'auto'  # auto: float32 on CPU, bfloat16 elsewhere
  # What the backward pass recomputes: none; dots: all but products of matrices,
  # much less memory for little work; full: whole layers, the least memory.
  config.model.remat = 'none'
  config.model.scan_unroll = 1  # layers per iteration of the layer loop
  # Of a device's memory, for copies of the weights to sample with. Where they
  # take no more they are gathered from the fsdp axis once, not for every token.
  config.model.gather_share = 0.25

  config.adapter = pick(ADAPTERS, 'adapter', arg['adapter'])

  config.data = pick(DATA, 'data set', arg['data'])
  config.data.source = 'official'  # or a local folder or file
  config.data.chat_template = ''  # file for messages; '': the model's own
  config.data.form = table.common_forms(loss)[0]  # pairs, rankings, ...
  config.data.constraint = 'none'  # or a name of rewards.CONSTRAINTS: costs
  config.data.cache_dir = ''  # of prepared data; '' is the user's cache
  config.data.held_out = 0.1  # share of prompts kept out, if there is no test
  config.data.max_prompt_tokens = 256  # a longer prompt keeps its tail
  config.data.max_response_tokens = 256  # a longer response keeps its head
  config.data.row_length = 1024  # most token slots of a row (T)

  config.loss = loss  # {name: its options}, summed
  config.reference = pick(REFERENCE, 'reference', reference)
  config.optim = optim_section(arg['optim'])
  config.checkpoint = dict(
    every=200,  # steps; also after the last
    keep=2,  # newest ones kept
    best='',  # min:heldout/loss, max:heldout/rewards/accuracy: keep that too
  )
  config.eval = dict(
    every=200,  # steps; also before the first and after the last
    batch_size=64,  # groups
    max_groups=0,  # held-out groups to use; 0: all
  )
  config.eval.samples = dict(
    prompts='',  # JSON Lines with a `prompt` each; '': of held-out groups
    # Of them, at most, to sample from; 0: none, as of a reward model.
    num_prompts=0 if table.of_head(loss) else 4,
    samples_per_prompt=1,
    max_new_tokens=64,
    temperature=1.0,  # 1 without truncation: needed for an honest KL
    top_p=1.0,
    batch_size=32,  # sampled at once
    reward='none',  # a name, see dpo_jax/rewards.py
    ranker='none',  # a reward: what the best of a prompt's samples by it has
    cost='none',  # a name of rewards.CONSTRAINTS
    judges=(),  # names of rewards that are measured besides
  )
  if arg['debug']:
    shrink(config)
    if reference == 'ema':
      config.reference.every = 1
  return config.lock()  # a key that is not here cannot be set


def shrink(config):
  """Turns a config into its `debug` variant: two steps, seconds on a CPU."""
  config.model.source = 'debug-llama'
  config.num_steps, config.epochs = 2, 0.0
  config.batch_size = config.eval.batch_size = 8
  config.log_every = 1
  config.peak_tflops = 1.0
  config.data.max_prompt_tokens = config.data.max_response_tokens = 64
  config.data.row_length = 256
  config.eval.max_groups = 16
  config.eval.samples.max_new_tokens = 8
  config.eval.samples.num_prompts = min(2, config.eval.samples.num_prompts)
