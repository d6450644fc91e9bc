"""Rewards that are trained models, and rewards by any name."""

from dpo_jax import rewards


def get(name, *, mesh=None):
  """Returns the reward of any name, see `rewards`; the one way to it.

  `mesh` is of the devices that a learned one goes to; None: all, side by side.
  """
  kind, _, workdir = str(name).partition(':')
  if kind == 'model':
    return load(workdir, mesh=mesh)
  return rewards.get(name)


def load(workdir, *, which='newest', mesh=None):
  """Opens the reward model of a run: reward(prompts, responses) -> [N]."""
  raise NotImplementedError
