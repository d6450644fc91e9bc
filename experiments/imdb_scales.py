"""Controlled sentiment: what each scale is, and the config of every run of it.

Nothing here computes. `SCALES` has sizes and settings, and `METHODS` the six
methods of figure 2 of the DPO paper (arXiv:2305.18290, section 6.1, appendix
C.1). A run is called METHOD_VALUE or METHOD_VALUE_seedN: dpo_0.1 is DPO with
beta 0.1, ppo_6_seed1 is PPO on the learned reward with a target KL of 6 nats
and seed 1.

  dpo            loss.dpo.beta
  unlikelihood   loss.unlikelihood.alpha
  preferred_ft   seed: SFT on the chosen responses has no other setting
  ppo            kl.target, the learned reward, normalized
  ppo_gt_ours    kl.target, P(positive) of the classifier, normalized
  ppo_gt_trl     kl.target, its log odds as they are, as TRL's script took them

Keys of configs are written with dots. Sizes of the paper that it does not tell
(tokens of a completion, steps of PPO and its tuned settings) are our choice:
60 tokens is what its rebuttal implies, and 800 steps with an evaluation every
100 are about as many points as its figure shows.
"""

import dataclasses
import pathlib
import re

from configs import common
from configs import ppo as ppo_configs
from dpo_jax import names
from dpo_jax import sentiment
from dpo_jax import settings


class Paths:
  """Where the stages of a workdir write."""

  def __init__(self, workdir):
    # Absolute, because paths stand in the configs of runs.
    self.root = pathlib.Path(workdir).expanduser().absolute()
    self.classifiers = self.root / 'classifier'
    self.classifier = self.classifiers / sentiment.CLASSIFIER
    self.judge = self.classifiers / sentiment.JUDGE
    self.base = self.root / 'base'
    self.sft_rows = self.root / 'sft.jsonl'
    self.train_prompts = self.root / 'prompts.train.jsonl'
    self.test_prompts = self.root / 'prompts.test.jsonl'
    self.temperature_prompts = self.root / 'prompts.temperature.jsonl'
    self.sft = self.root / 'sft'
    self.completions = self.root / 'completions.jsonl'
    self.pairs = self.root / 'pairs.jsonl'
    self.reward_model = self.root / 'reward_model'
    self.runs = self.root / 'runs'
    self.best_of_n = self.root / 'best_of_n.jsonl'
    self.temperature = self.root / 'temperature.json'
    self.times = self.root / 'times.json'
    self.results = self.root / 'results.json'
    self.making = self.root / 'making'  # locks of stages

  @property
  def reward(self):
    """The name of the reward that is measured: P(positive)."""
    return f'sentiment_probability:{self.classifier}'

  @property
  def learned(self):
    """The name of the learned reward."""
    return f'model:{self.reward_model}@best'


# --- Scales -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one scale; what has to do with tokens is of its tokenizer.

  The fields of `DATA` decide what runs learn from: a workdir keeps to them.
  """

  # A name of `common.MODELS`; '': random weights of `shape`, and a tokenizer of
  # `vocabulary` byte-level BPE tokens that is trained on the reviews.
  model: str
  vocabulary: int
  shape: dict
  sft_tokens: int  # of the rest of a review
  prefixes: int  # prompts whose completions are compared, at most
  test_prompts: int
  runs: tuple  # those without --all
  settings: dict  # of FAMILIES or a method, which goes last -> {key: value}
  best_of_prompts: int  # of the test prompts
  temperature_prompts: int  # others, by which no checkpoint was chosen
  prompt_tokens: tuple = (2, 8)
  new_tokens: int = 60  # of a completion
  completions: int = 4  # of a prefix: six pairs
  best_of: tuple = (1, 4, 16, 64, 128)  # the last one is what is sampled
  tilted: int = 64  # samples that the curve of Eq. 4 is made of
  temperatures: tuple = (0.0, 0.25, 0.5, 0.75, 1.0)
  sample_batch: int = 64  # sampled at once
  seed: int = 0

  @property
  def source(self):
    """`model.source` of the base model, '' where it is made here."""
    return common.MODELS[self.model]['source'] if self.model else ''

  def as_data(self):
    """The fields that a workdir keeps to, as JSON has them."""
    return {name: getattr(self, name) for name in DATA}


# What settings are for: everything, SFT, the learned reward, the methods that
# learn from pairs, and those that learn from their own samples.
FAMILIES = ('all', 'sft', 'reward_model', 'offline', 'ppo_all')

DATA = (
  'model',
  'vocabulary',
  'shape',
  'sft_tokens',
  'prefixes',
  'test_prompts',
  'prompt_tokens',
  'new_tokens',
  'completions',
  'seed',
)

# 22 runs, as the paper counts them (section 6.1).
TARGETS = (3, 6, 9, 12)
FULL = (
  *(f'dpo_{beta}' for beta in (0.05, 0.1, 1, 5)),
  *(f'ppo_{target}' for target in TARGETS),
  *(f'ppo_gt_ours_{target}' for target in TARGETS),
  *(f'ppo_gt_trl_{target}' for target in TARGETS),
  *(f'unlikelihood_{alpha}' for alpha in (0.05, 0.1, 0.5, 1)),
  *(f'preferred_ft_{seed}' for seed in (0, 1)),
)
# Every method, three seeds of the two that are compared.
SUBSET = (
  'dpo_0.1',
  'ppo_6',
  'unlikelihood_0.1',
  'preferred_ft_0',
  'ppo_gt_ours_6',
  'ppo_gt_trl_6',
  *(f'{name}_seed{seed}' for seed in (1, 2) for name in ('dpo_0.1', 'ppo_6')),
)


def _every(steps):
  """Evaluates and saves every so many steps."""
  return {'eval.every': steps, 'checkpoint.every': steps}


def _warm(lr, steps):
  return {
    'optim.lr': lr,
    'optim.warmup_steps': steps,
    'optim.warmup_init': 1 / (steps + 1),
  }


_TINY_PPO = {
  'num_steps': 2,
  'rollout.size': 16,
  'batch_size': 8,
  'ppo.epochs': 1,
  'optim.lr': 1e-3,
  **_every(1),
}
_TINY = {
  'num_steps': 2,
  'epochs': 0.0,
  'batch_size': 16,
  'optim.lr': 1e-3,
  'optim.warmup_steps': 0,
  'optim.warmup_init': 0.0,
  **_every(1),
}
_S_PPO = {
  'num_steps': 100,
  'rollout.size': 128,
  'batch_size': 32,
  'optim.lr': 1e-4,
  'kl.horizon': 2000.0,
  **_every(10),
}
_S = {'batch_size': 64, 'epochs': 3.0, **_warm(1e-4, 20), **_every(25)}
_M_PPO = {
  'num_steps': 200,
  'rollout.size': 512,
  'batch_size': 128,
  'optim.lr': 1e-5,
  **_every(25),
}
_M = {'batch_size': 64, 'epochs': 1.0, **_warm(5e-6, 50), **_every(100)}
_PAPER_PPO = {'num_steps': 800, 'rollout.batch_size': 256, **_every(100)}
_PAPER = {'batch_size': 64, 'epochs': 1.0, **_warm(1e-6, 150), **_every(100)}

SCALES = {
  # Seconds, for the tests: nothing is learned.
  'smoke': Scale(
    model='',
    vocabulary=300,
    shape=dict(d_model=16, num_layers=1, num_heads=2, d_ff=32),
    sft_tokens=24,
    prefixes=24,
    test_prompts=8,
    new_tokens=6,
    best_of_prompts=4,
    best_of=(1, 2, 4),
    tilted=4,
    temperature_prompts=4,
    temperatures=(0.0, 1.0),
    sample_batch=32,
    runs=('dpo_0.1', 'ppo_6', 'unlikelihood_0.1'),
    settings={
      'all': {'peak_tflops': 1.0, 'log_every': 1},
      'sft': _TINY,
      'reward_model': _TINY,
      'offline': _TINY,
      'ppo_all': _TINY_PPO,
    },
  ),
  # Hours on two CPU cores: a small decoder that has read nothing but reviews.
  's': Scale(
    model='',
    vocabulary=4096,
    shape=dict(d_model=192, num_layers=4, num_heads=6, d_ff=512),
    sft_tokens=88,
    prefixes=1200,
    test_prompts=512,
    new_tokens=36,
    best_of_prompts=512,
    tilted=128,
    temperature_prompts=512,
    runs=SUBSET,
    settings={
      'all': {},
      'sft': {
        'batch_size': 64,
        'epochs': 2.0,
        'optim.schedule': 'cosine',
        **_warm(2e-3, 50),
        **_every(200),
      },
      'reward_model': _S | _warm(3e-4, 20),
      'offline': _S,
      'ppo_all': _S_PPO,
      # An update of one sample would take most of the hours.
      'ppo_gt_trl': {'batch_size': 8},
    },
  ),
  # SmolLM2-135M on one GPU.
  'm': Scale(
    model='smollm2-135m',
    vocabulary=0,
    shape={},
    sft_tokens=128,
    prefixes=10_000,
    test_prompts=512,
    best_of_prompts=256,
    temperature_prompts=512,
    sample_batch=512,
    runs=SUBSET,
    settings={
      'all': {},
      'sft': {'batch_size': 64, **_warm(2e-5, 50), **_every(100)},
      'reward_model': _M | {'epochs': 3.0},
      'offline': _M,
      'ppo_all': _M_PPO,
      'ppo_gt_trl': {'rollout.size': 256, 'batch_size': 16},
    },
  ),
  # The paper's, on the eight chips of a v5e-8; docs/scaling.md has its step.
  'paper': Scale(
    model='gpt2-large',
    vocabulary=0,
    shape={},
    sft_tokens=248,
    prefixes=25_000,
    test_prompts=512,
    best_of_prompts=512,
    temperature_prompts=512,
    sample_batch=512,
    runs=FULL,
    settings={
      'all': {'mesh.data': 4, 'mesh.fsdp': 2, 'model.remat': 'dots'},
      'sft': {'batch_size': 64, **_warm(1e-5, 50), **_every(100)},
      'reward_model': _PAPER | {'epochs': 3.0},
      'offline': _PAPER,
      'ppo_all': _PAPER_PPO,
      # TRL's minibatch of one sample, on each chip.
      'ppo_gt_trl': {'batch_size': 8},
    },
  ),
}


# --- Runs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
  """key: what a run's value sets. loss, or preset of configs/ppo.py.

  reward: of PPO, a function of `Paths`; what is trained on.
  """

  key: str
  loss: str = ''
  preset: str = ''
  reward: object = None


METHODS = {
  'dpo': Method('loss.dpo.beta', loss='dpo'),
  'unlikelihood': Method('loss.unlikelihood.alpha', loss='unlikelihood'),
  'preferred_ft': Method('seed', loss='sft'),
  'ppo': Method(
    'kl.target', preset='learned', reward=lambda paths: paths.learned
  ),
  'ppo_gt_ours': Method(
    'kl.target', preset='gt_ours', reward=lambda paths: paths.reward
  ),
  'ppo_gt_trl': Method(
    'kl.target',
    preset='gt_trl',
    reward=lambda paths: f'sentiment:{paths.classifier}',
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """A run by its name."""

  name: str
  method: str
  value: float
  seed: int


def parse(name):
  """Reads a run's name, see above; a wrong one shows what is like it."""
  match = re.fullmatch(r'(\w+?)_(\d+(?:\.\d+)?)(?:_seed(\d+))?', name)
  method = match[1] if match else name
  names.look_up(
    METHODS, 'method (of METHOD_VALUE or METHOD_VALUE_seedN)', method
  )
  if not match:
    raise ValueError(
      f'run {name!r} has no setting; write METHOD_VALUE, such as {name}_1'
    )
  value, seed = float(match[2]), int(match[3] or 0)
  if METHODS[method].key == 'seed':
    if match[3] or value != int(value):
      raise ValueError(f'run {name!r}: write the seed alone, as {method}_0')
    seed = int(value)
  plain = f'{method}_{value:g}'
  if seed and METHODS[method].key != 'seed':
    plain += f'_seed{seed}'
  if name != plain:  # two names of one run would count as two seeds
    raise ValueError(f'run {name!r}: write it as {plain}')
  return Run(name, method, value, seed)


def sft_config(scale, paths):
  """Returns the config of SFT: the base model, on the rest of reviews."""
  config = _offline('sft', 'adamw')
  return _set(config, scale, ('sft',), sft_keys(scale, paths))


def reward_model_config(scale, paths):
  """Returns the config of the learned reward, which begins at the SFT model."""
  config = _offline('bradley_terry', 'adamw')
  return _set(
    config,
    scale,
    ('reward_model',),
    _model(scale, paths)
    | _pairs(scale, paths)
    | {
      'seed': scale.seed,
      'init': str(paths.sft),
      'checkpoint.keep': 1,
      'checkpoint.best': 'max:heldout/rewards/accuracy',
    },
  )


def run_config(run, scale, paths):
  """Returns the config of a run: of `ppo.run`, or of `train.train`."""
  method = METHODS[run.method]
  measured = _measured(scale, paths, seed=run.seed)
  if method.preset:
    config = ppo_configs.get_config(
      f'preset={method.preset},model=debug-llama,data=prompts,kl=adaptive'
    )
    measured |= {
      'data.source': str(paths.train_prompts),
      'data.max_prompt_tokens': scale.prompt_tokens[1] + 1,
      'data.max_response_tokens': scale.new_tokens,
      'reward.name': method.reward(paths),
    }
  else:
    config = _offline(method.loss, 'rmsprop')
    measured |= _pairs(scale, paths)
  value = run.seed if method.key == 'seed' else run.value
  measured[method.key] = value
  return _set(config, scale, _families(run), measured)


def settings_of(run, scale):
  """Returns what a scale says of a run: {key with dots: value}."""
  return _said(scale, ('all', *_families(run)))


def _families(run):
  return 'ppo_all' if is_ppo(run) else 'offline', run.method


def offline_keys(scale, paths, *, seed):
  """Returns what all offline runs on the pairs have: {key with dots: value}.

  They begin at the SFT model, and their samples are measured as those of the
  runs here. Steps and learning rate are not among the keys.
  """
  return (
    _measured(scale, paths, seed=seed)
    | _pairs(scale, paths)
    | scale.settings['all']
  )


def sft_keys(scale, paths):
  """Returns what SFT on rows of `sft_rows` has: {key with dots: value}."""
  most_prompt = scale.prompt_tokens[1] + 1  # with a BOS
  return _model(scale, paths) | {
    'seed': scale.seed,
    'data.source': str(paths.sft_rows),
    'data.held_out': 0.02,
    'data.max_response_tokens': scale.sft_tokens,
    'data.max_prompt_tokens': most_prompt,
    'data.row_length': _row_length(most_prompt + scale.sft_tokens),
    'eval.max_groups': 256,
    'checkpoint.keep': 1,
    'eval.samples.num_prompts': 0,
  }


def is_ppo(run):
  """Whether `ppo.run` is the loop of a run."""
  return bool(METHODS[run.method].preset)


def _offline(loss, optim):
  return common.training(
    dict(
      data='jsonl',
      loss=loss,
      reference='auto',
      model='debug-llama',  # its section has one key, which is set below
      adapter='none',
      optim=optim,
      debug=False,
    )
  )


def _model(scale, paths):
  return {'model.source': scale.source or str(paths.base)}


def _measured(scale, paths, *, seed):
  """Keys of a run that begins at the SFT model: how samples are measured."""
  return _model(scale, paths) | {
    'init': str(paths.sft),
    'seed': seed,
    'checkpoint.keep': 1,
    'checkpoint.best': 'max:samples/reward',
    'eval.samples.prompts': str(paths.test_prompts),
    'eval.samples.num_prompts': scale.test_prompts,
    'eval.samples.samples_per_prompt': 1,
    'eval.samples.max_new_tokens': scale.new_tokens,
    'eval.samples.batch_size': scale.sample_batch,
    'eval.samples.reward': paths.reward,
    'eval.samples.judges': (f'sentiment_probability:{paths.judge}', 'vader'),
  }


def _pairs(scale, paths):
  most_prompt = scale.prompt_tokens[1] + 1
  # Room for texts that encode into more tokens than they were sampled as.
  most_response = scale.new_tokens + 12
  return {
    'data.source': str(paths.pairs),
    'data.max_prompt_tokens': most_prompt,
    'data.max_response_tokens': most_response,
    'data.row_length': _row_length(most_prompt + 2 * most_response),
  }


def _row_length(longest):
  """Rows of about four of the longest groups."""
  return 4 * longest


def _set(config, scale, families, values):
  """Sets keys by their dotted names; what the scale says goes last."""
  everywhere = dict(scale.settings['all'])
  if 'ppo' in config:
    everywhere.pop('peak_tflops', None)  # it has none
  values = values | everywhere | _said(scale, families)
  for name in values:
    settings.at(config, name)  # or an unknown one would be added
  config.update_from_flattened_dict(values)
  return config


def _said(scale, families):
  out = {}
  for name in families:
    out |= scale.settings.get(name, {})
  return out
