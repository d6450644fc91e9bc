"""Where numbers go: the screen, JSON Lines files and TensorBoard.

metrics.jsonl has one record {'step': n, 'split/quantity': number, ...} a line;
samples.jsonl has one sampled text a line.
"""

import contextlib
import json
import os
import time

import tqdm
from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2

from dpo_jax import causes
from dpo_jax import workdirs


def read(workdir, name='metrics.jsonl'):
  """Returns the records of a run's JSON Lines file, [] where there is none."""
  path = os.path.join(workdir, name)
  if not os.path.exists(path):
    return []
  with open(path) as f:
    # A kill may cut the last line short; its step will be repeated.
    return [json.loads(line) for line in f if line.endswith('\n')]


def _open(workdir, name, after, measured):
  """Opens a file to append to, without what came after step `after`."""
  records = [
    r
    for r in read(workdir, name)
    if r['step'] < after
    or (r['step'] == after and (measured or 'train/loss' in r))
  ]
  path = os.path.join(workdir, name)
  workdirs.write(path, ''.join(json.dumps(r) + '\n' for r in records))
  return open(path, 'a')


class _Events:
  """A file of TensorBoard's, written by whoever calls.

  tensorboardX's own SummaryWriter leaves it to a thread behind a queue: of a
  full disk that thread dies, and the next to write waits for ever.
  """

  def __init__(self, folder, *, first):
    """What earlier files have of step `first` and later ones is hidden."""
    os.makedirs(folder, exist_ok=True)
    # Its name has the second of its making and, with a suffix, the process.
    self._file = event_file_writer.EventsWriter(
      os.path.join(folder, 'events'), filename_suffix=f'.{os.getpid()}'
    )
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=first, file_version='brain.Event:2')
    self._write(step=first, session_log=start)

  def _write(self, **content):
    self._file.write_event(event_pb2.Event(wall_time=time.time(), **content))

  def write(self, step, values):
    """Writes {name: float} of one step."""
    for name, value in values.items():
      self._write(step=step, summary=summary.scalar(name, value))
    self._file.flush()

  def close(self):
    self._file.close()


class Nowhere:
  """The `Writer` of processes that do not write."""

  def write(self, step, values, samples=()):
    """Writes nothing."""

  def sync(self):
    """Has nothing to write."""

  def close(self):
    """Closes nothing."""


class Writer:
  """Writes records of one run.

  What an earlier, killed process wrote after step `after` is removed, so that
  a resumed run's files equal an uninterrupted one's; what it measured at that
  step too, where it will be `measured` again.
  """

  def __init__(self, workdir, *, after, measured=True):
    self._workdir = workdir
    self._failed = False
    with self._explained():
      self._metrics = _open(workdir, 'metrics.jsonl', after, measured)
      self._samples = _open(workdir, 'samples.jsonl', after, measured)
      folder = os.path.join(workdir, 'tensorboard')
      self._events = _Events(folder, first=after + 1)

  @contextlib.contextmanager
  def _explained(self):
    """Says what to do where there is no space."""
    try:
      yield
    except OSError as error:
      self._failed = True
      if why := causes.full(error):
        raise OSError(
          f'the log in {os.fspath(self._workdir)!r} could not be written'
          f' ({why}); free some space and start again: the run goes on from its'
          ' last checkpoint'
        ) from error
      raise

  def write(self, step, values, samples=()):
    """Writes one record and its sampled texts; shows the main numbers."""
    if not values:
      return
    values = {name: float(value) for name, value in values.items()}
    with self._explained():
      self._metrics.write(json.dumps({'step': step, **values}) + '\n')
      self._metrics.flush()
      for sample in samples:
        self._samples.write(json.dumps({'step': step, **sample}) + '\n')
      self._samples.flush()
      self._events.write(step, values)
    text = '  '.join(f'{name} {value:.4g}' for name, value in values.items())
    tqdm.tqdm.write(f'step {step}: {text}')

  def sync(self):
    """Makes what was written outlive the machine, as a save that claims it."""
    with self._explained():
      for file in (self._metrics, self._samples):
        os.fsync(file.fileno())

  def close(self):
    """Closes the files; of what could not be written has been told."""
    for file in (self._metrics, self._samples, self._events):
      with contextlib.suppress(*[OSError] * self._failed):
        file.close()
