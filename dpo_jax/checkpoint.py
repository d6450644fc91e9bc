"""Training state on disk: Orbax, atomic, the last n and the best kept.

    checkpoints/24/params/, opt_state/, ...   arrays, written by who holds them
    checkpoints/24/manifest/                  what they were, see `digests`
    checkpoints/21.damaged/                   set aside: it did not fit its own

A save writes to a temporary directory and renames it, so a killed process
leaves the previous checkpoint as the newest. What is read is held against the
digests of what was saved, so a checkpoint that was cut or changed on disk is
found, and the one before it is used. Arrays go to any mesh.
"""

import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
from typing import Any
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
import tqdm

from dpo_jax import digests
from dpo_jax import processes

# Step of the checkpoint to read: a number, or one of these.
NEWEST, BEST = 'newest', 'best'
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Found(NamedTuple):
  """A checkpoint that is whole.

  measured: whether what is due at its step was measured before it was saved.
  """

  step: int
  items: dict
  measured: bool


# --- Read --------------------------------------------------------------------


def steps(directory):
  """Returns the steps of all finished checkpoints, ascending; [] without any.

  All processes get what process 0 sees.
  """
  found = []
  if processes.first() and os.path.isdir(directory):
    found = sorted(
      int(name) for name in os.listdir(directory) if name.isdigit()
    )
  return processes.agreed(found)


def restore(directory, like, *, which=NEWEST, set_aside=False) -> Found:
  """Loads the named items of the newest checkpoint that is whole, saying so.

  Args:
    directory: of a run's checkpoints.
    like: {name: pytree of arrays or of jax.ShapeDtypeStruct with a
      sharding}; gives shapes, dtypes and shardings.
    which: `NEWEST`, `BEST` or a step, and nothing but that.
    set_aside: rename damaged ones to STEP.damaged: this run will write their
      steps again.
  """
  directory = pathlib.Path(directory).absolute()
  candidates = steps(directory)[::-1]
  if not candidates:
    raise ValueError(f'{str(directory)!r} holds no finished checkpoint')
  if which != NEWEST:
    candidates = [_chosen(directory, candidates, which)]
  damaged = {}
  for step in candidates:
    found, reason = _read(directory, step, like)
    if found:
      if damaged and set_aside and processes.first():
        for other in damaged:
          _set_aside(directory / str(other))
      processes.wait('set aside')
      return found
    damaged[step] = reason
    _tell(f'checkpoint {step} of {directory} is damaged: {reason}')
  reasons = '; '.join(f'{step}: {text}' for step, text in damaged.items())
  raise ValueError(
    f'no checkpoint that {directory} has and that was asked for is whole'
    f' ({reasons}); put one back from a backup, or train in a new workdir'
  )


def leaves(directory, item, *, which=NEWEST):
  """Names the arrays of an item, as the newest manifest that is whole does.

  All checkpoints of a run have the same; () where no manifest can be read.
  """
  directory = pathlib.Path(directory).absolute()
  candidates = steps(directory)[::-1]
  if candidates and which != NEWEST:
    candidates = [_chosen(directory, candidates, which)]
  for step in candidates:
    manifest, reason = _manifest(directory, step)
    if not reason:
      return tuple(manifest['items'].get(item, ()))
  return ()


def _chosen(directory, candidates, which):
  """Returns the step that `which` means."""
  if which == BEST:
    manifests = {step: _manifest(directory, step)[0] for step in candidates}
    values = {s: m['best'] for s, m in manifests.items() if m and m['best']}
    if not values:
      raise ValueError(
        f'no checkpoint of {directory} was rated; set checkpoint.best when'
        ' training, or give the step'
      )
    return _best({step: value for step, (_, value) in values.items()})
  if not str(which).isdecimal() or int(which) not in candidates:
    raise ValueError(
      f'{directory} has no checkpoint {which!r}; it has {NEWEST}'
      f' ({candidates[0]}), {BEST} or a step of {sorted(candidates)}'
    )
  return int(which)


def _read(directory, step, like):
  """Returns (Found, None) or (None, why the checkpoint is damaged)."""
  manifest, reason = _manifest(directory, step)
  if reason:
    return None, reason
  for name, tree in like.items():
    saved = manifest['items'].get(name)
    if saved is None or digests.shapes(tree) != {
      leaf: text.split()[0] for leaf, text in saved.items()
    }:
      raise ValueError(
        f'checkpoint {step} of {directory} holds other parameters or another'
        f' optimizer than this config ({_difference(name, tree, saved)})'
      )
  abstract = {
    name: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree,
    )
    for name, tree in like.items()
  }
  args = {name: ocp.args.StandardRestore(x) for name, x in abstract.items()}
  items, reason = _attempt(directory / str(step), args)
  if reason:
    return None, reason
  for name, tree in items.items():
    saved = manifest['items'][name]
    for leaf, text in digests.of(tree).items():
      if saved[leaf] != text:
        return None, f'{name}/{leaf} is not what was saved'
  return Found(step, items, manifest['measured']), None


def _difference(name, tree, saved):
  if saved is None:
    return f'it has no {name}'
  now = digests.shapes(tree)
  before = {leaf: text.split()[0] for leaf, text in saved.items()}
  leaf = min(n for n in {*now, *before} if now.get(n) != before.get(n))
  return (
    f'{name}/{leaf} is {before.get(leaf, "not there")}, here'
    f' {now.get(leaf, "not there")}'
  )


def _manifest(directory, step):
  """Returns (manifest, None) or (None, why it cannot be read)."""
  args = {'manifest': ocp.args.JsonRestore()}
  items, reason = _attempt(directory / str(step), args)
  if reason:
    return None, reason
  manifest = items['manifest']
  if not isinstance(manifest, dict):
    return None, 'its manifest is not one'
  if manifest.pop('sha256', None) != _sha256(manifest):
    return None, 'its manifest is not what was saved'
  return manifest, None


def _sha256(manifest):
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _attempt(folder, args):
  """Reads items: (items, None), or (None, why not) where one process cannot.

  Each reads for itself; waiting for one that failed, Orbax would wait long.
  """
  own = jax.process_index()
  reader = ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(),
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'{own}'
    ),
  )
  items, reason = None, None
  try:
    items = dict(reader.restore(folder, args=ocp.args.Composite(**args)))
  except Exception as error:  # whatever a library makes of bytes it cannot read
    while error.__cause__ is not None:
      error = error.__cause__
    reason = f'{type(error).__name__}: {_first_line(error)}'
  finally:
    reader.close()
  reasons = [text for text in processes.gathered(reason) if text]
  return (None, reasons[0]) if reasons else (items, None)


def _set_aside(folder):
  aside, number = folder.with_name(f'{folder.name}.damaged'), 1
  while aside.exists():  # nothing is removed
    number += 1
    aside = folder.with_name(f'{folder.name}.damaged{number}')
  folder.rename(aside)
  _tell(f'set it aside as {aside.name}')


def _tell(text):
  tqdm.tqdm.write(text, file=sys.stderr)  # stdout may be JSON


def _first_line(error):
  lines = str(error).strip().splitlines()
  return lines[0][:300] if lines else type(error).__name__


# --- Write -------------------------------------------------------------------


def check(*, keep, best, every, eval_every):
  """Refuses settings under which nothing is kept, or nothing can be best."""
  if keep < 1:
    raise ValueError(
      f'checkpoint.keep is {keep}; keep at least 1, or the run is lost'
    )
  if best:
    mode, _, name = best.partition(':')
    if mode not in ('min', 'max') or not name:
      raise ValueError(
        f'checkpoint.best is {best!r}; write min:NAME or max:NAME of a number'
        ' that evaluations give, such as min:heldout/loss'
      )
    if not eval_every or not every or every % eval_every:
      raise ValueError(
        f'checkpoint.best needs an evaluation at every save: make'
        f' checkpoint.every ({every}) a multiple of eval.every ({eval_every})'
      )


def _best(values):
  """Returns the step of the least value; of equals the last."""
  return min(values, key=lambda step: (values[step], -step))


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """The last n, the best of those that were rated, and any of unknown rating.

  `values` and `unknown` may grow.
  """

  def __init__(self, keep, values, unknown):
    self._keep = keep
    self._values = values
    self._unknown = unknown

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self._keep :], *self._unknown}
    rated = {s: value for s, value in self._values.items() if s in steps}
    if rated:
      kept.add(_best(rated))
    return [step in kept for step in steps]


class Checkpoints:
  """Writes the checkpoints of one run, one per step, while it goes on."""

  def __init__(self, directory, *, keep, best=''):
    """Opens a directory; `best` is config.checkpoint.best."""
    self._directory = pathlib.Path(directory).absolute()
    self._best = best
    self.newest = None  # the last step saved here
    self._values = {}
    unknown = set()  # steps whose manifest cannot be read, perhaps just now
    if best:
      for step in steps(self._directory):
        manifest, reason = _manifest(self._directory, step)
        if reason:
          unknown.add(step)
        elif manifest['best'] and manifest['best'][0] == best:
          self._values[step] = manifest['best'][1]
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(keep, self._values, unknown),
        create=True,
        cleanup_tmp_directories=True,
      ),
    )

  def latest(self):
    """Waits for saves under way; returns the newest step there is, or None."""
    self._tried(self._manager.wait_until_finished)
    return next(iter(steps(self._directory)[::-1]), None)

  def save(self, step, items, *, values=None, measured=True):
    """Starts saving {name: pytree of arrays}; they may be donated after.

    Args:
      step: number of the checkpoint.
      items: what it holds.
      values: of the evaluation at this step, if there was one.
      measured: see `Found`.
    """
    manifest = {
      'items': {name: digests.of(tree) for name, tree in items.items()},
      'measured': measured,
      'best': None,
    }
    if self._best and values is not None:
      manifest['best'] = [self._best, self._rating(values)]
      self._values[step] = manifest['best'][1]
    saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    saves['manifest'] = ocp.args.JsonSave(
      manifest | {'sha256': _sha256(manifest)}
    )
    self._tried(
      lambda: self._manager.save(
        step, args=ocp.args.Composite(**saves), force=True
      ),
      step,
    )
    self.newest = step

  def check(self):
    """Raises where a save has failed.

    Only of one that has ended: asked earlier, Orbax would give its error to us
    and not to its own thread, which would then remove older checkpoints.
    """
    if not self._manager.is_saving_in_progress():
      self._tried(self._manager.wait_until_finished)

  def close(self):
    """Waits for the saves under way."""
    try:
      self._tried(self._manager.wait_until_finished)
    finally:
      self._manager.close()

  def check_rating(self, values):
    """Refuses evaluations that do not give what is to be best."""
    if self._best:
      self._rating(values)

  def _rating(self, values):
    """Returns a number of which less is better."""
    mode, _, name = self._best.partition(':')
    if name not in values:
      raise ValueError(
        f'checkpoint.best is {self._best!r}, but evaluations give'
        f' {", ".join(sorted(values))}'
      )
    value = float(values[name]) * (1 if mode == 'min' else -1)
    return math.inf if math.isnan(value) else value

  def _tried(self, function, step=None):
    """Calls; an error of writing says what to do, and takes no more space."""
    try:
      return function()
    except Exception as error:
      step = self.newest if step is None else step
      if processes.first():
        for left in self._directory.glob('*.orbax-checkpoint-tmp*'):
          shutil.rmtree(left, ignore_errors=True)
      kept = [
        int(path.name)
        for path in self._directory.glob('[0-9]*')
        if path.name.isdigit()
      ]
      reason, fix = _first_line(error), 'see why, and start the run again'
      if full := _why_full(error):
        reason, fix = (
          full,
          'free some space (checkpoint.keep says how many are kept), and start'
          ' the run again',
        )
      raise OSError(
        f'checkpoint {step} could not be written ({reason}); the'
        f' last good one is {max(kept) if kept else "none"}; {fix}'
      ) from error


def _why_full(error: Any) -> str:
  """Says of which full disk an error, or one that it came from, is; else ''."""
  while error is not None:
    for number in _FULL:
      why = os.strerror(number)
      if getattr(error, 'errno', None) == number or why in str(error):
        return why
    error = error.__cause__ or error.__context__
  return ''
