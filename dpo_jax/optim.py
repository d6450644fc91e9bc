"""Optimizers and learning-rate schedules."""

import optax

from dpo_jax import names

SCHEDULES = ('constant', 'linear', 'cosine')

# Keyword arguments of each optimizer; configs copy them. AdamW's are
# PyTorch's. RMSprop's are PyTorch's too (decay .99, eps outside the root), as
# in the DPO paper's runs; optax's own defaults differ.
OPTIMIZERS = {
  'adamw': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8, 'weight_decay': 0.0},
  'rmsprop': {'decay': 0.99, 'eps': 1e-8},
}


def learning_rate(*, lr, schedule, warmup_steps, warmup_init, num_steps):
  """Returns the schedule step -> learning rate.

  Args:
    lr: peak.
    schedule: after warm-up 'constant', or 'linear' or 'cosine' down to 0 at
      `num_steps`.
    warmup_steps: linear warm-up.
    warmup_init: fraction of `lr` at step 0; the DPO authors' warm-up starts
      at 1 / (warmup_steps + 1), PyTorch's usual one at 0.
    num_steps: length of the run.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f'optim.schedule is {schedule!r}; use one of {SCHEDULES}')
  rest = max(num_steps - warmup_steps, 1)
  if schedule == 'constant':
    after = optax.constant_schedule(lr)
  elif schedule == 'linear':
    after = optax.linear_schedule(lr, 0.0, rest)
  else:
    after = optax.cosine_decay_schedule(lr, rest)
  if not warmup_steps:
    return after
  warmup = optax.linear_schedule(lr * warmup_init, lr, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def make(name, schedule, *, clip_norm, keywords):
  """Returns the gradient transformation.

  Args:
    name: a key of `OPTIMIZERS`.
    schedule: of `learning_rate`.
    clip_norm: global gradient norm to clip at; 0 does not clip.
    keywords: exactly the keys of `OPTIMIZERS[name]`. `weight_decay` applies
      to every parameter, as torch.optim.AdamW's does.
  """
  known = names.look_up(OPTIMIZERS, 'optimizer', name)
  if set(keywords) != set(known):
    raise ValueError(
      f'optimizer {name!r} takes {sorted(known)}, got {sorted(keywords)}'
    )
  if name == 'adamw':
    tx = optax.adamw(schedule, **keywords)
  else:
    tx = optax.rmsprop(schedule, eps_in_sqrt=False, **keywords)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  return optax.chain(clip, tx)
