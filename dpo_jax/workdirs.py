"""A run's directory: whose it is, and what is in it to go on with.

    config.json      the run's config as it is now
    config.1.json    what it was until keys of `FREE` changed for the first time
    data.sha256      digest of what the run learns from
    lock             while a run writes here; held by the process that it names
    finished         an empty file, when the verb that runs here has done it all

A run goes on in its directory with the config that it began with. Only the
keys of `FREE` may change from start to start: where and how fast it computes,
what is logged and kept. They change no number but by rounding.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets

import tqdm

from dpo_jax import checkpoint
from dpo_jax import processes

_CONFIG, _DATA, _LOCK = 'config.json', 'data.sha256', 'lock'
_FINISHED = 'finished'
# Keys, or sections, of a config of `train` that a workdir lets change.
FREE = (
  'accumulate',
  'checkpoint.every',
  'checkpoint.keep',
  'compilation_cache',
  'data.cache_dir',
  'log_every',
  'logps_chunk',
  'mesh',
  'model.gather_share',
  'model.remat',
  'model.scan_unroll',
  'peak_tflops',
  'reference.cache_dir',
)
_TAKEN = {errno.EAGAIN, errno.EACCES}  # what `flock` says of another's lock


@contextlib.contextmanager
def held(workdir):
  """Within, no other run may enter the same workdir, which is made.

  The kernel lets go of the lock when the process that holds it ends, however it
  ends. Process 0 holds it for all.
  """
  lock, problem = None, None
  if processes.first():
    lock, problem = _lock(workdir)
    if lock:  # what is begun again is not finished
      with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(workdir, _FINISHED))
  problem = processes.agreed(problem)
  if problem:
    raise ValueError(problem)
  try:
    yield
  finally:
    if lock:
      # A run that was refused leaves nothing behind.
      with contextlib.suppress(OSError):
        os.remove(lock.name)
        os.rmdir(workdir)
      lock.close()


def _lock(workdir):
  """Returns (the locked file, None) or (None, why another run has it)."""
  path = os.path.join(workdir, _LOCK)
  while True:
    os.makedirs(workdir, exist_ok=True)
    try:
      file = open(path, 'a+')
    except FileNotFoundError:  # who was here before has just removed it all
      continue
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        break
    except FileNotFoundError:
      pass
    except OSError as error:
      if error.errno not in _TAKEN:
        tqdm.tqdm.write(
          f'{workdir} cannot be locked on this disk ({error.strerror}): see to'
          ' it that no other run writes there'
        )
        break
      file.seek(0)
      owner = file.read() or 'unknown'
      file.close()
      return None, (
        f'workdir {workdir!r} is in use by another run ({owner}); wait for its'
        ' end, stop it, or use a new workdir'
      )
    file.close()  # of a file that its last owner removed
  file.truncate(0)
  file.write(f'process {os.getpid()} on {platform.node()}')
  file.flush()
  return file, None


def check(workdir, config):
  """Refuses a workdir that belongs to a run with another config."""
  before = read_config(workdir)
  found = _differences(before, _plain(config)) if before else []
  refused = [text for name, text in found if not _free(name)]
  if refused:
    raise ValueError(
      f'workdir {workdir!r} belongs to a run with another config'
      f' ({", ".join(refused)}); use a new workdir'
    )


def _plain(config):
  """Returns a config as JSON gives it back."""
  return json.loads(json.dumps(config.as_dict()))


def _free(name):
  """Whether a workdir lets a key change; in rounds those of their training."""
  name = name.removeprefix('train.')
  return any(name == key or name.startswith(f'{key}.') for key in FREE)


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
  _write_config(workdir, config)


def _write_config(workdir, config):
  """Writes config.json; one that was another stays beside it, with a number."""
  before = read_config(workdir)
  found = _differences(before, _plain(config)) if before else []
  changed = [text for _, text in found]
  if changed:
    number = 1
    while os.path.exists(old := os.path.join(workdir, f'config.{number}.json')):
      number += 1
    write(old, _text(before))
    tqdm.tqdm.write(
      f'the config of {workdir} changed ({", ".join(changed)}); the old one is'
      f' in {old}'
    )
  if changed or not before:
    write(os.path.join(workdir, _CONFIG), _text(_plain(config)))


def _text(config):
  return json.dumps(config, indent=2, sort_keys=True)


def write(path, text):
  """Writes a file whole: under a temporary name, then moved."""
  with open(path + '.tmp', 'w') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(path + '.tmp', path)


def finish(workdir):
  """Notes that nothing is left to do for the run of a workdir."""
  if processes.first():
    write(os.path.join(workdir, _FINISHED), '')


def finished(workdir):
  """Whether `finish` was called for the run that is there."""
  return os.path.exists(os.path.join(workdir, _FINISHED))


def read_config(workdir):
  """Returns the saved config of a run as nested dicts, {} without a run."""
  path = os.path.join(workdir, _CONFIG)
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    return json.load(f)


def check_same(workdir, config, sections):
  """Refuses to use a run's weights under other settings of `sections`.

  Keys of `FREE` may differ.

  Args:
    workdir: of the run that made the weights.
    config: `settings.Settings` of now.
    sections: top-level keys that must be equal.
  """
  before = read_config(workdir)
  if not before:
    raise ValueError(f'{workdir!r} has no {_CONFIG}; it is no run of `train`')
  now = _plain(config)
  found = _differences(
    {name: before.get(name) for name in sections},
    {name: now.get(name) for name in sections},
  )
  refused = [text for name, text in found if not _free(name)]
  if refused:
    raise ValueError(
      f'the run in {workdir!r} was made with other settings'
      f' ({", ".join(refused)}); set them as they were'
    )


def _differences(old, new, prefix=''):
  """Lists (name, 'name: old -> new') where the leaves of two configs differ."""
  out = []
  for name in sorted({*old, *new}):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      out += _differences(a, b, f'{prefix}{name}.')
    elif a != b:
      out.append((f'{prefix}{name}', f'{prefix}{name}: {a!r} -> {b!r}'))
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
