"""Rewards that are trained models, and rewards by any name."""

import pathlib

from dpo_jax import evaluators
from dpo_jax import rewards


def get(name, *, mesh=None):
  """Returns the reward of any name, see `rewards`; the one way to it.

  `mesh` is of the devices that a learned one goes to; None: all, side by side.
  """
  kind, _, workdir = str(name).partition(':')
  if kind == 'model':
    return load(workdir, mesh=mesh)
  return rewards.get(name)


def get_judges(names_of, *, mesh=None):
  """Returns {title: reward} of the names of several rewards.

  A title is what an evaluation calls the judge's column: the name, or what its
  file, folder or function is called.
  """
  judges = {}
  for name in names_of:
    kind, _, rest = str(name).partition(':')
    path = pathlib.PurePath(rest or kind)
    title = path.suffix[1:] if kind == 'python' else path.stem
    if title in judges or title in evaluators.COLUMNS:
      raise ValueError(
        f'judge {name!r} would be called {title!r}, as another column of samples'
        ' is; give it another file name'
      )
    judges[title] = get(name, mesh=mesh)
  return judges


def load(workdir, *, which='newest', mesh=None):
  """Opens the reward model of a run: reward(prompts, responses) -> [N]."""
  raise NotImplementedError
