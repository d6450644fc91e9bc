"""Where numbers go: the screen, JSON Lines files and TensorBoard.

metrics.jsonl has one record {'step': n, 'split/quantity': number, ...} a line;
samples.jsonl has one sampled text a line.
"""

import json
import os

import tensorboardX
import tqdm

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
    self._metrics = _open(workdir, 'metrics.jsonl', after, measured)
    self._samples = _open(workdir, 'samples.jsonl', after, measured)
    self._tensorboard = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'), purge_step=after + 1
    )

  def write(self, step, values, samples=()):
    """Writes one record and its sampled texts; shows the main numbers."""
    if not values:
      return
    values = {name: float(value) for name, value in values.items()}
    self._metrics.write(json.dumps({'step': step, **values}) + '\n')
    self._metrics.flush()
    for sample in samples:
      self._samples.write(json.dumps({'step': step, **sample}) + '\n')
    self._samples.flush()
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step)
    text = '  '.join(f'{name} {value:.4g}' for name, value in values.items())
    tqdm.tqdm.write(f'step {step}: {text}')

  def sync(self):
    """Makes what was written outlive the machine, as a save that claims it."""
    for file in (self._metrics, self._samples):
      os.fsync(file.fileno())

  def close(self):
    self._metrics.close()
    self._samples.close()
    self._tensorboard.close()
