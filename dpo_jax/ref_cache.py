"""Reference log-probabilities on disk, computed once per reference and data.

One float32 per scored token, in the order of the data set, independent of how
groups are packed, ordered or scored: runs that differ in learning rate, beta,
loss, batch size or seed share a file. The key covers what changes the
numbers: the weights, the architecture, the compute dtype, the kind of device,
the precision of matmuls, the versions of JAX and of this code, and the tokens.
"""

import dataclasses
import glob
import hashlib
import json
import os

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from dpo_jax import digests
from dpo_jax import evaluators
from dpo_jax import processes
from dpo_jax import sharding
from dpo_jax.data import batches

# Raise when a change of the model's code changes its numbers.
VERSION = 2
# Fields of TransformerConfig that change speed or memory, not values: the
# position table, where there is one, is part of the weights.
_NEUTRAL = ('remat', 'scan_unroll', 'gather_share', 'max_positions')


def groups_digest(groups):
  """sha256 over prompts and responses, in order."""
  digest = hashlib.sha256()
  for group in groups:
    digest.update(len(group.responses).to_bytes(4, 'little'))
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
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'precision': str(jax.config.jax_default_matmul_precision),
    'weights': digests.of(variables),
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
  under_way = None  # a batch is collected while the next one is computed
  for step in [*tqdm.tqdm(missing, desc=title), None]:
    before, under_way = under_way, None
    if step is not None:
      batch = evaluators.put_batch(plan, step, mesh)
      under_way = step, forward(variables, batch)
    if before:
      at, laid_out = before
      batches.collect(np.asarray(laid_out), starts, plan.batch(at), values)


def load_or_compute(
  directory, token_logps, variables, model_config, plan, mesh, *, name
):
  """Returns per-token reference log-probs of `plan.groups`, from disk if there.

  They are written as they are computed to a file with the ending .partial,
  which gets its name when it is complete: a killed run leaves no broken cache,
  and the next one goes on. The .json beside it is for people. All processes
  compute, and only process 0 reads and writes: no disk need be shared.
  """
  digest, made_of = key(variables, model_config, plan.groups)
  path = os.path.join(directory, f'{digest}.npy')
  size = plan.starts[-1]
  values, complete = np.zeros(size, np.float32), False
  if processes.first():
    values = _read(path, size)
    complete = values is not None
    if not complete:
      tqdm.tqdm.write(_reason(directory, made_of, name))
      values = _open_partial(path, size, made_of)
  complete = processes.agreed(complete)
  if not processes.alone():
    known = multihost_utils.broadcast_one_to_all(np.array(values))
    if not processes.first():
      values = np.array(known)
  if complete:
    return values
  compute(token_logps, variables, plan, mesh, values, name=name)
  broken = int(np.sum(~np.isfinite(values)))
  if broken:
    raise FloatingPointError(
      f'the reference gives {broken} of {size} tokens of {name} no finite'
      ' log-probability: its weights are broken, or model.dtype is too narrow'
      ' for them'
    )
  if processes.first():
    values.flush()
    try:
      os.replace(f'{path}.partial', path)
    except FileNotFoundError:
      os.stat(path)  # another run has filled the same file
  return np.array(values)


def _read(path, size, *, partial=False):
  """Returns the values of a cache file, None without a sound one.

  One that is not sound is removed. `partial`: values may be missing, and are
  left on disk.
  """
  if not os.path.exists(path):
    return None
  try:
    values = np.load(path, mmap_mode='r' if partial else None)
    if values.shape == (size,) and values.dtype == np.float32:
      if partial or np.isfinite(values).all():
        return values
  except (ValueError, EOFError):
    pass
  tqdm.tqdm.write(f'{path} is damaged: it is computed again')
  os.remove(path)
  return None


def _open_partial(path, size, made_of):
  """Opens what is there of a file to fill, or a new one full of NaN.

  Runs that begin at the same time fill the same file with the same numbers.
  """
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(os.path.splitext(path)[0] + '.json', 'w') as f:
    json.dump(made_of, f, indent=2)
  partial, temporary = f'{path}.partial', f'{path}.{os.getpid()}.tmp'
  _read(partial, size, partial=True)  # one that was cut short goes
  with open(temporary, 'wb') as f:
    np.save(f, np.full(size, np.nan, np.float32))
    f.flush()
    os.fsync(f.fileno())
  try:
    os.link(temporary, partial)  # fails where it is there
  except FileExistsError:
    pass
  except OSError:  # a file system without links
    if not os.path.exists(partial):
      os.replace(temporary, partial)
  if os.path.exists(temporary):
    os.remove(temporary)
  return np.load(partial, mmap_mode='r+')


def _reason(directory, made_of, name):
  """Says why log-probs are computed: what differs from those that are there."""
  title = f'reference log-probs, {name}: computed'
  nearest = None
  names = glob.glob(os.path.join(glob.escape(str(directory)), '*.json'))
  for path in sorted(names):
    try:
      with open(path) as f:
        other = json.load(f)
      found = _differences(other, json.loads(json.dumps(made_of)))
    except (ValueError, AttributeError):
      continue
    if found and (nearest is None or len(found) < len(nearest)):
      nearest = found
  if not nearest:
    return f'{title}, there are none in {directory}'
  return f'{title}, those in {directory} have other {", ".join(nearest)}'


def _differences(old, new):
  """Lists the keys in which two `made_of` differ; of the model, with values."""
  out = []
  for name in sorted({*old, *new}):
    before, now = old.get(name), new.get(name)
    if before == now:
      continue
    if name == 'model':
      out += [
        f'model.{field} ({before.get(field)!r}, now {value!r})'
        for field, value in now.items()
        if before.get(field) != value
      ]
    elif name in ('weights', 'tokens'):
      out.append(name)
    else:
      out.append(f'{name} ({before!r}, now {now!r})')
  return out
