"""The DPO paper's controlled-sentiment task in miniature.

    dpo-jax online --config=configs/quickstart.py --workdir=runs/quickstart

SmolLM2-135M continues openings of movie reviews, VADER scores the texts, the
best and the worst continuation of each opening become a pair, and DPO trains
on the pairs. Held-out openings are continued before, during and after.
Argument `debug`: a tiny random model, seconds; `adapter=lora` trains an
adapter.
"""

import ml_collections

from configs import common


def get_config(arg=''):
  arg = common.parse(arg, debug=False, adapter='none')
  config = ml_collections.ConfigDict()
  config.seed = 0  # of all randomness
  config.rounds = 1  # each starts from, and refers to, the last one's policy
  config.prompts = 'openings'  # or a JSON file {'train': [...], 'test': [...]}
  config.reward = 'vader'  # a name, see rewards.py; ranks the completions
  config.constraint = dict(name='none')  # see configs/constrained.py
  config.sampling = dict(
    samples_per_prompt=8,
    pairs_per_prompt=3,  # best with worst, second best with second worst...
    max_new_tokens=32,
    temperature=1.0,
    top_p=1.0,
    batch_size=64,
  )
  # One round's offline run, a config of `dpo-jax train`.
  config.train = common.training(
    dict(
      data='jsonl',
      loss='dpo',
      model='smollm2-135m',
      adapter=arg['adapter'],
      reference='frozen',  # the KL in the report is to it
      optim='adamw',
      debug=arg['debug'],
    )
  )
  train = config.train
  train.data.held_out = 0.0  # held-out openings are sampled instead
  train.data.max_prompt_tokens = 16
  train.data.max_response_tokens = 33
  train.data.row_length = 304  # four pairs
  # Set by the loop: the round's pairs, the held-out prompts, and so on.
  train.seed = -1
  train.data.source = ''
  samples = train.eval.samples
  samples.prompts = samples.reward = samples.cost = ''
  if arg['debug']:
    config.reward = 'length'
    train.data.row_length = 1024
    config.sampling.samples_per_prompt = 2
    config.sampling.pairs_per_prompt = 1
    config.sampling.max_new_tokens = 4
    train.data.max_prompt_tokens = 64
    return config.lock()
  train.batch_size = 16
  train.epochs = 1.0
  train.log_every = 1
  train.optim.lr = 1e-4
  train.optim.warmup_steps = 2
  train.optim.warmup_init = 1 / 3
  train.checkpoint.every = 0  # only the last
  train.eval.every = 3
  samples.num_prompts = 32
  samples.samples_per_prompt = 2
  samples.max_new_tokens = 32
  samples.batch_size = 64
  return config.lock()
