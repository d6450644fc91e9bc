"""The update of a config: what `train` runs and `compilations` compiles.

There is one way from a config to the compiled step, so that what is proven of a
step ahead of time is true of the one that trains.
"""

from typing import Any
from typing import NamedTuple

import jax

from dpo_jax import optim
from dpo_jax import sharding
from dpo_jax import steps


class Update(NamedTuple):
  """What changes the state, and how.

  shapes: of `steps.state_shapes`. step: of `steps.make_step`, jitted.
  """

  tx: Any
  shapes: steps.State
  step: Any

  def table(self, frozen):
    """Says what lies where, with the step's `frozen` argument."""
    state = self.shapes
    return sharding.table(
      {
        'trained': state.params,
        'optimizer': state.opt_state,
        'reference': (frozen['ref'], state.ref),
        'base': frozen['base'],
      }
    )


def check_micro_batches(config, mesh):
  """Refuses an `accumulate` that does not cut the batch into equal parts."""
  if config.accumulate < 1:
    raise ValueError(f'accumulate is {config.accumulate}; use 1 or more')
  sharding.check_batch_size(
    'batch_size', config.batch_size, mesh, parts=config.accumulate
  )


def make_optimizer(config, *, num_steps):
  """Returns (schedule, transformation) of a config, of `optim`."""
  schedule = optim.learning_rate(
    lr=config.optim.lr,
    schedule=config.optim.schedule,
    warmup_steps=config.optim.warmup_steps,
    warmup_init=config.optim.warmup_init,
    num_steps=num_steps,
  )
  tx = optim.make(
    config.optim.name,
    schedule,
    clip_norm=config.optim.clip_norm,
    keywords=dict(config.optim.keywords),
  )
  return schedule, tx


def make(config, policy, sums, first_memory, mesh, *, num_steps):
  """Returns the Update of a config, which nothing has been computed for yet.

  `policy` may be abstract; the rest is as of `runs.Run`.
  """
  schedule, tx = make_optimizer(config, num_steps=num_steps)
  ema = moving_reference(config)
  shapes = steps.state_shapes(
    policy.trained, tx, ema=bool(ema), memory=first_memory
  )
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  step = jax.jit(
    steps.make_step(
      sums,
      tx,
      schedule,
      batch_size=config.batch_size,
      accumulate=config.accumulate,
      scale=policy.scale,
      ema=ema,
    ),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  return Update(tx, shapes, step)


def moving_reference(config):
  """Returns `steps.make_step`'s ema of a config: a dict, or None."""
  if config.reference.mode != 'ema':
    return None
  return {'alpha': config.reference.alpha, 'every': config.reference.every}
