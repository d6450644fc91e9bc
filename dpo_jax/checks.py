"""What can be wrong with a config, whatever its data and its model are.

`train.check`, `ppo.check` and `online.check` refuse it before anything is read
or written, and a sweep before any of its jobs runs. No name is listed here:
what uses a value says whether it will do.
"""

import functools

from dpo_jax import checkpoint
from dpo_jax import policies
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import runs
from dpo_jax import settings
from dpo_jax import updates

# Numbers that all loops have, and what they may be.
_NUMBERS = {
  'seed': '0 or more',
  'log_every': '0 or more',
  'data.max_prompt_tokens': '1 or more',
  'data.max_response_tokens': '1 or more',
  'optim.lr': '0 or more',
  'optim.warmup_steps': '0 or more',
  'optim.warmup_init': '0 or more',
  'optim.clip_norm': '0 or more',
  'checkpoint.every': '0 or more',
  'eval.every': '0 or more',
  'eval.samples.num_prompts': '0 or more',
  'eval.samples.samples_per_prompt': '1 or more',
  'eval.samples.max_new_tokens': '1 or more',
  'eval.samples.temperature': '0 or more',
  'eval.samples.top_p': 'a number above 0, at most 1',
  'eval.samples.batch_size': '1 or more',
}


def call(checks):
  """Calls functions that raise; raises once, a line for all that is wrong."""
  problems = {}
  for check in checks:
    try:
      check()
    except ValueError as error:
      problems |= dict.fromkeys(str(error).split('\n'))
  if problems:
    raise ValueError('\n'.join(problems))


def numbers(config, ranges):
  """Returns the check of `settings.check_numbers`."""
  return functools.partial(settings.check_numbers, config, ranges)


def of_training(config, mesh, *, reward=''):
  """Returns the checks of what `train` and `ppo` share, for `call`.

  Args:
    config: `settings.Settings`; what is read here counts as read, so give a
      copy.
    mesh: devices, or an abstract one.
    reward: what eval.samples.reward is where it is ''.
  """
  kept, how = config.checkpoint, config.eval.samples
  return [
    numbers(config, _NUMBERS),
    lambda: runs.head_chunk(config),
    lambda: updates.check_micro_batches(config, mesh),
    lambda: updates.make_optimizer(config, num_steps=1),
    lambda: policies.check_model(config.model),
    lambda: policies.check_adapter(config.adapter, config.reference),
    lambda: checkpoint.check(
      keep=kept.keep,
      best=kept.best,
      every=kept.every,
      eval_every=config.eval.every,
    ),
    lambda: _samples(how, reward),
  ]


def _samples(how, reward):
  for name in runs.measured(how, reward).values():
    if name:  # '' is that of PPO, which says that it is needed
      reward_models.check(name)
  if how.cost != 'none':
    rewards.get_constraint(how.cost)
