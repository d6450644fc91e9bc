"""What a config of rounds says, and what can be wrong with it.

`online` runs the rounds; each is a run of `train`, whose config is made here.
"""

import copy
import functools
import operator

from dpo_jax import checks
from dpo_jax import constraints
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import runs
from dpo_jax import settings
from dpo_jax import train
from dpo_jax.losses import table

# Keys of `config.train` that the loop sets, and what they are before.
SET_HERE = {
  'seed': -1,
  'init': '',
  'data.source': '',
  'eval.samples.prompts': '',
  'eval.samples.reward': '',
  'eval.samples.cost': '',
}
# Other keys of config.constraint, where there is one.
_DUAL = ('budget', 'lr', 'multiplier', 'start')
# Numbers besides those of `train`.
_NUMBERS = {
  'seed': '0 or more',
  'rounds': '1 or more',
  'sampling.samples_per_prompt': '2 or more',
  'sampling.pairs_per_prompt': '1 or more',
  'sampling.max_new_tokens': '1 or more',
  'sampling.temperature': '0 or more',
  'sampling.top_p': 'a number above 0, at most 1',
  'sampling.batch_size': '1 or more',
}


def check(config, mesh):
  """Refuses what is wrong with a config whatever its prompts and its model are.

  All of it, a line each; that of its `train` as of its first round, but for
  what is not for rounds. `mesh` may be an abstract one.
  """
  config = settings.Settings(config.as_dict())  # to check is not to use
  train_config, samples = config.train.as_dict(), config.sampling
  checks.call(
    [
      checks.numbers(config, _NUMBERS),
      lambda: reward_models.check(config.reward),
      lambda: check_rounds(config),
      lambda: check_train_config(
        train_config, max_new_tokens=samples.max_new_tokens
      ),
      lambda: check_losses(config.train),
      lambda: train.check(
        settings.Settings(
          round_config(
            train_config,
            {
              'seed': max(0, config.seed),
              'eval.samples.reward': config.reward,
              'eval.samples.cost': 'none',
            },
          )
        ),
        mesh,
      ),
    ]
  )


def check_rounds(config):
  """Refuses a constraint or a reference that do not fit the rounds."""
  _, _, dual = read_constraint(config.constraint, rounds=config.rounds)
  if config.train.reference.mode == 'adapter_off' and (
    config.rounds > 1 and dual['start'] == 'last'
  ):
    raise ValueError(
      'train.reference.mode is adapter_off, but later rounds begin with the'
      " last one's adapter; choose another reference, or set rounds to 1"
    )


def round_config(config, values):
  """Returns a config of `train` with what a round sets: {dotted name: value}.

  Args:
    config: nested dicts.
    values: of keys of `SET_HERE`.
  """
  out = copy.deepcopy(config)
  for name, value in values.items():
    *sections, key = name.split('.')
    functools.reduce(operator.getitem, sections, out)[key] = value
  return out


def read_constraint(section, *, rounds):
  """Returns (name, cost function, other keys) of config.constraint.

  Without a constraint there is no cost function, and what follows from it.
  """
  dual = dict(section)
  name = dual.pop('name')
  if name == 'none':
    if dual:
      raise ValueError(
        f"constraint.name is 'none', so constraint.{min(dual)} would do"
        f' nothing; name one of {", ".join(rewards.CONSTRAINTS)}, or use'
        ' configs/quickstart.py'
      )
    return name, None, {'multiplier': 0.0, 'start': 'last'}
  cost = rewards.get_constraint(name)
  if set(dual) != set(_DUAL):
    raise ValueError(
      f'constraint {name!r} takes {", ".join(_DUAL)}, got {sorted(dual)}; use'
      ' configs/constrained.py, which has them'
    )
  constraints.check(**{key: dual[key] for key in _DUAL if key != 'start'})
  if dual['start'] not in ('first', 'last'):
    raise ValueError(
      f"constraint.start is {dual['start']!r}; use 'first' or 'last', whose"
      ' policy a round starts from'
    )
  if rounds < 2:
    raise ValueError(
      f'the multiplier of constraint {name!r} moves after a round, and rounds'
      f' is {rounds}; set rounds to 2 or more'
    )
  return name, cost, dual


def check_train_config(config, *, max_new_tokens):
  """Refuses what would fail, or be silently replaced, hours later."""
  for name, value in SET_HERE.items():
    if settings.at(config, name) != value:
      raise ValueError(
        f'config.train.{name} is set by the loop; leave it as it is'
      )
  samples = config['eval']['samples']
  if (
    not samples['num_prompts']
    or (samples['temperature'] != 1.0 or samples['top_p'] != 1.0)
    or config['reference']['mode'] == 'cached'
  ):
    raise ValueError(
      'the report needs reward and KL of held-out samples: set'
      ' train.eval.samples.num_prompts, temperature 1 and top_p 1, and choose'
      ' another reference than cached, which keeps no weights'
    )
  if max_new_tokens >= config['data']['max_response_tokens']:
    raise ValueError(
      f'sampling.max_new_tokens is {max_new_tokens}, which'
      f' train.data.max_response_tokens'
      f' {config["data"]["max_response_tokens"]} would cut; raise that above it'
    )


def check_losses(config):
  """Refuses losses that the pairs of a round, which have no labels, lack."""
  terms = runs.bind_losses(config)
  if table.of_head(config.loss):
    raise ValueError(
      'rounds train a policy, not a reward model; choose a loss of log-probs'
    )
  if config.data.form != 'pairs':
    raise ValueError(
      f'train.data.form is {config.data.form!r}, but rounds write pairs; choose'
      ' a loss of pairs'
    )
  runs.check_data([], terms, config.data.form)
  runs.constraint(config.data.constraint, terms)
