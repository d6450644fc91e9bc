"""A run's directory: whose it is, and what is in it to go on with."""

import hashlib
import json
import os
import secrets

from dpo_jax import checkpoint
from dpo_jax import processes

_CONFIG, _DATA = 'config.json', 'data.sha256'


def check(workdir, config):
  """Refuses a workdir that belongs to a run with another config."""
  before = read_config(workdir)
  now = json.loads(json.dumps(config.as_dict()))
  if before and before != now:
    raise ValueError(
      f'workdir {workdir!r} belongs to a run with another config'
      f' ({", ".join(differences(before, now))}); use a new workdir'
    )


def claim(workdir, config, data):
  """Makes the workdir this run's, or refuses it if its data changed since.

  `data` is a text that changes whenever the data does.
  """
  check(workdir, config)
  processes.check_same(
    'their configs differ; give all processes the same --config and flags',
    json.dumps(config.as_dict(), sort_keys=True),
  )
  processes.check_same(
    'the data they read differs; put the same files on all machines', data
  )
  data_digest = hashlib.sha256(data.encode()).hexdigest()
  if processes.first():
    _claim(workdir, config, data_digest)
  _check_shared(workdir)


def _check_shared(workdir):
  """Refuses a workdir that is another folder on another machine."""
  if processes.alone():
    return
  token = processes.agreed(secrets.token_hex(8))
  path = os.path.join(workdir, f'.{token}')
  if processes.first():
    write(path, '')
  processes.wait('token')
  found = processes.gathered(os.path.exists(path))
  if processes.first():
    os.remove(path)
  if not all(found):
    raise ValueError(
      f'workdir {workdir!r} is not the same folder on process'
      f' {found.index(False)} as on process 0; put it on a disk that all'
      ' machines share'
    )


def _claim(workdir, config, data_digest):
  os.makedirs(workdir, exist_ok=True)
  path = os.path.join(workdir, _DATA)
  if os.path.exists(path):
    with open(path) as f:
      if f.read() != data_digest:
        raise ValueError(
          f'the training data changed since the run in {workdir!r} began; put'
          ' it back, or use a new workdir'
        )
  write(path, data_digest)
  text = json.dumps(config.as_dict(), indent=2, sort_keys=True)
  write(os.path.join(workdir, _CONFIG), text)


def write(path, text):
  """Writes a file whole: under a temporary name, then moved."""
  with open(path + '.tmp', 'w') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + '.tmp', path)


def read_config(workdir):
  """Returns the saved config of a run as nested dicts, {} without a run."""
  path = os.path.join(workdir, _CONFIG)
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    return json.load(f)


def check_same(workdir, config, sections):
  """Refuses to use a run's weights under other settings of `sections`.

  Args:
    workdir: of the run that made the weights.
    config: `settings.Settings` of now.
    sections: top-level keys that must be equal.
  """
  before = read_config(workdir)
  if not before:
    raise ValueError(f'{workdir!r} has no {_CONFIG}; it is no run of `train`')
  now = json.loads(json.dumps(config.as_dict()))
  found = differences(
    {name: before.get(name) for name in sections},
    {name: now.get(name) for name in sections},
  )
  if found:
    raise ValueError(
      f'the run in {workdir!r} was made with other settings'
      f' ({", ".join(found)}); set them as they were'
    )


def differences(old, new, prefix=''):
  """Lists 'name: old -> new' for the leaves in which two configs differ."""
  out = []
  for name in sorted({*old, *new}):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      out += differences(a, b, f'{prefix}{name}.')
    elif a != b:
      out.append(f'{prefix}{name}: {a!r} -> {b!r}')
  return out


def has_head(workdir, *, which=checkpoint.NEWEST):
  """Whether what a run trained has a head, see `models/heads`."""
  directory = os.path.join(workdir, 'checkpoints')
  leaves = checkpoint.leaves(directory, 'params', which=which)
  return any(name.startswith('head/') for name in leaves)


def restore(workdir, like, *, which=checkpoint.NEWEST):
  """Loads the named items of a checkpoint of a run, see `checkpoint.restore`.

  Returns (step, items).
  """
  directory = os.path.join(workdir, 'checkpoints')
  if not os.path.isdir(directory):
    raise ValueError(f'{workdir!r} has no checkpoints; train there first')
  found = checkpoint.restore(directory, like, which=which)
  return found.step, found.items
