"""Reference log-probabilities on disk, computed once per reference and data.

One float32 per scored token, in the order of the data set, independent of how
groups are packed, ordered or scored: runs that differ in learning rate, beta,
loss, batch size or seed share a file. The key covers what changes the
numbers: the weights, the architecture, the compute dtype, the kind of device,
the version of this code and the tokens.
"""

import dataclasses
import hashlib
import json
import os

import jax
import numpy as np
import tqdm

from dpo_jax import sharding
from dpo_jax.data import batches

# Raise when a change of the model's code changes its numbers.
VERSION = 1
# Fields of TransformerConfig that change speed or memory, not values: the
# position table, where there is one, is part of the weights.
_NEUTRAL = ('remat', 'scan_unroll', 'max_positions')


def weights_digest(variables):
  """sha256 over names, shapes, dtypes and bytes of all arrays."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    array = np.ascontiguousarray(leaf)
    name = f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'
    digest.update(name.encode())
    digest.update(array.view(np.uint8).data)
  return digest.hexdigest()


def groups_digest(groups):
  """sha256 over prompts and responses, in order."""
  digest = hashlib.sha256()
  for group in groups:
    for tokens in (group.prompt, *group.responses):
      digest.update(len(tokens).to_bytes(4, 'little'))
      digest.update(np.ascontiguousarray(tokens, np.int32).data)
  return digest.hexdigest()


def data_digest(groups):
  """sha256 over all that a run learns from: tokens, weights and labels."""
  labels = [(g.weight, g.p, g.rewards, g.costs) for g in groups]
  text = f'{groups_digest(groups)} {labels}'
  return hashlib.sha256(text.encode()).hexdigest()


def key(variables, model_config, groups):
  """Returns the cache key and the dict of what it was made of."""
  config = dataclasses.asdict(model_config)
  for name in _NEUTRAL:
    del config[name]
  made_of = {
    'version': VERSION,
    'backend': jax.default_backend(),
    'weights': weights_digest(variables),
    'model': config,
    'tokens': groups_digest(groups),
  }
  text = json.dumps(made_of, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:24], made_of


def compute(token_logps, variables, plan, mesh, values, *, name):
  """Runs the reference over the groups of `plan` whose values are missing.

  Args:
    token_logps: of `objectives.make_token_logps`.
    variables: reference weights.
    plan: an evaluation plan over the whole data set.
    mesh: devices.
    values: float32 [scored tokens]; NaN, where one is missing, is replaced.
    name: shown by the progress bar.
  """
  forward = jax.jit(token_logps, out_shardings=sharding.replicated(mesh))
  starts = plan.starts
  missing = [
    step
    for step in range(plan.num_steps)
    if any(
      np.isnan(values[starts[g] : starts[g + 1]]).any()
      for g in plan.steps[step]
    )
  ]
  title = f'reference log-probs, {name}'
  if len(missing) < plan.num_steps:
    tqdm.tqdm.write(
      f'{title}: {plan.num_steps - len(missing)} of {plan.num_steps} batches'
      ' are there from before'
    )
  for step in tqdm.tqdm(missing, desc=title):
    batch = plan.batch(step)
    laid_out = forward(variables, sharding.put_rows(batch, mesh))
    batches.collect(np.asarray(laid_out), starts, batch, values)


def load_or_compute(
  directory, token_logps, variables, model_config, plan, mesh, *, name
):
  """Returns per-token reference log-probs of `plan.groups`, from disk if there.

  They are written as they are computed to a file with the ending .partial,
  which gets its name when it is complete: a killed run leaves no broken cache,
  and the next one goes on. The .json beside it is for people.
  """
  digest, made_of = key(variables, model_config, plan.groups)
  path = os.path.join(directory, f'{digest}.npy')
  if os.path.exists(path):
    return np.load(path)
  os.makedirs(directory, exist_ok=True)
  with open(os.path.join(directory, f'{digest}.json'), 'w') as f:
    json.dump(made_of, f, indent=2)
  partial = f'{path}.partial'
  if not os.path.exists(partial):
    temporary = f'{path}.{os.getpid()}.tmp'
    with open(temporary, 'wb') as f:
      np.save(f, np.full(plan.starts[-1], np.nan, np.float32))
    os.replace(temporary, partial)
  values = np.load(partial, mmap_mode='r+')
  compute(token_logps, variables, plan, mesh, values, name=name)
  values.flush()
  try:
    os.replace(partial, path)
  except FileNotFoundError:
    np.load(path, mmap_mode='r')  # another run has filled the same file
  return np.array(values)
