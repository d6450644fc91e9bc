"""Training state on disk: Orbax, atomic, the last n and the best kept.

    checkpoints/24/params/, opt_state/, ...   arrays, written by who holds them
    checkpoints/24/manifest/                  what they were, see `digests`
    checkpoints/24/rating.json                where it was rated after the save
    checkpoints/21.damaged/                   set aside: it did not fit its own

A save writes to a temporary directory and renames it, so a killed process
leaves the previous checkpoint as the newest. What is read is held against the
digests of what was saved, so a checkpoint that was cut or changed on disk is
found, and the one before it is used. Arrays go to any mesh.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
import tqdm

from dpo_jax import causes
from dpo_jax import digests
from dpo_jax import folders
from dpo_jax import processes

# Step of the checkpoint to read: a number, or one of these.
NEWEST, BEST = 'newest', 'best'
_PAUSE = 1.0  # seconds before what could not be read is read again
_RATING = 'rating.json'
_REMOVED = '.removed'  # ending of the name of a checkpoint being removed


class Found(NamedTuple):
  """A checkpoint that is whole.

  measured: whether what is due at its step was measured before it was saved.
  """

  step: int
  items: dict
  measured: bool


class Unreadable(OSError):
  """A checkpoint cannot be read now; that does not make it a damaged one."""


# --- Read --------------------------------------------------------------------


def steps(directory):
  """Returns the steps of all finished checkpoints, ascending; [] without any.

  All processes get what process 0 sees.
  """
  return processes.agreed(_listed(directory) if processes.first() else [])


def _listed(directory):
  """Returns what `steps` does, as this process sees it."""
  if not os.path.isdir(directory):
    return []
  return sorted(int(name) for name in os.listdir(directory) if name.isdigit())


def restore(directory, like, *, which=NEWEST, set_aside=False) -> Found:
  """Loads the named items of the newest checkpoint that is whole, saying so.

  Args:
    directory: of a run's checkpoints.
    like: {name: pytree of arrays or of jax.ShapeDtypeStruct with a
      sharding}; gives shapes, dtypes and shardings.
    which: `NEWEST`, `BEST` or a step, and nothing but that.
    set_aside: rename damaged ones to STEP.damaged: this run will write their
      steps again.

  Raises:
    Unreadable: one can be read no more than once a second later, but for a
      reason that may pass, so that none before it is used in its place.
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


def can_mean(which):
  """Whether a text can mean a checkpoint of some run, see `restore`."""
  return which in (NEWEST, BEST) or which.isdecimal()


def step_of(directory, which):
  """Returns the step of the checkpoint that `which` means, see `restore`."""
  directory = pathlib.Path(directory).absolute()
  candidates = steps(directory)[::-1]
  if not candidates:
    raise ValueError(f'{str(directory)!r} holds no finished checkpoint')
  if which == NEWEST:
    return candidates[0]
  return _chosen(directory, candidates, which)


def _chosen(directory, candidates, which):
  """Returns the step that `which` means."""
  if which == BEST:
    ratings = {step: _rated(directory, step) for step in candidates}
    for step, (_, reason) in ratings.items():
      if reason:
        raise ValueError(
          f'which checkpoint of {directory} is the best is not known, because'
          f' the rating of {step} cannot be read ({reason}); put it back from a'
          f' backup, or give a step of {sorted(candidates)}'
        )
    values = {step: best[1] for step, (best, _) in ratings.items() if best}
    if not values:
      raise ValueError(
        f'no checkpoint of {directory} was rated; set checkpoint.best when'
        ' training, or give the step'
      )
    return _best(values)
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
    reason = 'its manifest is not one'
  elif manifest.pop('sha256', None) != _sha256(manifest):
    reason = 'its manifest is not what was saved'
  reasons = [text for text in processes.gathered(reason) if text]
  return (None, reasons[0]) if reasons else (manifest, None)


def _rated(directory, step):
  """Returns ([config.checkpoint.best, rating], None).

  The first is None where there was no rating, the second says why it is not
  known whether there was one.
  """
  manifest, reason = _manifest(directory, step)
  if reason or manifest['best']:
    return (None, reason) if reason else (manifest['best'], None)
  found = None, None
  path = directory / str(step) / _RATING
  if processes.first() and path.exists():
    try:
      name, value = json.loads(path.read_text())
      found = [str(name), float(value)], None
    except (OSError, ValueError, TypeError) as error:
      found = None, f'{path.name}: {causes.line(error)}'
  return tuple(processes.agreed(found))


def _sha256(manifest):
  text = json.dumps(manifest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _attempt(folder, args):
  """Reads items: (items, None), or (None, why not) where they are damaged.

  All processes agree on which it is. What may pass is tried twice.
  """
  for pause in (_PAUSE, 0.0):
    items, reason, passing = _attempt_alone(folder, args)
    failures = [f for f in processes.gathered([reason, passing]) if f[0]]
    if not failures:
      return items, None
    reasons = [text for text, passing in failures if passing]
    if not reasons:
      return None, failures[0][0]
    time.sleep(pause)
  raise Unreadable(
    f'{folder} could not be read now ({reasons[0]}); start again. If it stays'
    f' so, move that folder away, and the checkpoint before it is used'
  )


def _attempt_alone(folder, args):
  """Reads items in this process: (items, why not, whether that may pass).

  Each reads for itself; waiting for one that failed, Orbax would wait long.
  """
  own = jax.process_index()
  reader = ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(),
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'{own}'
    ),
  )
  try:
    items = reader.restore(folder, args=ocp.args.Composite(**args))
    return dict(items), None, False
  except Exception as error:  # whatever a library makes of bytes it cannot read
    passing = bool(causes.passing(error))
    while error.__cause__ is not None:
      error = error.__cause__
    return None, f'{type(error).__name__}: {causes.line(error)}', passing
  finally:
    reader.close()


def _set_aside(folder):
  aside, number = folder.with_name(f'{folder.name}.damaged'), 1
  while aside.exists():  # nothing is removed
    number += 1
    aside = folder.with_name(f'{folder.name}.damaged{number}')
  folder.rename(aside)
  _tell(f'set it aside as {aside.name}')


def _tell(text):
  tqdm.tqdm.write(text, file=sys.stderr)  # stdout may be JSON


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


class Checkpoints:
  """Writes the checkpoints of one run, one per step, while it goes on.

  Kept are the last n, the best of those that were rated, and any of which that
  is not known.
  """

  def __init__(self, directory, *, keep, best=''):
    """Opens a directory; `best` is config.checkpoint.best."""
    self._directory = pathlib.Path(directory).absolute()
    self._keep = keep
    self._best = best
    self.newest = None  # the last step saved here
    self._values = {}  # step: rating
    self._unknown = set()  # steps whose rating cannot be read, perhaps just now
    if processes.first():
      self._directory.mkdir(parents=True, exist_ok=True)
      self._remove_parts()
    for step in steps(self._directory) if best else ():
      try:
        rating, reason = _rated(self._directory, step)
      except Unreadable as error:
        reason = str(error)
      if reason:
        self._unknown.add(step)
      elif rating and rating[0] == best:
        self._values[step] = rating[1]
    processes.wait('checkpoints')
    self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._follower = None  # the thread that waits for the save under way
    self._error = None  # of the last save

  def latest(self):
    """Waits for saves under way; returns the newest step there is, or None."""
    self._finish()
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
    self._finish()
    if self._best and values is not None:
      manifest['best'] = [self._best, self._rating(values)]
      self._values[step] = manifest['best'][1]
    saves = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    saves['manifest'] = ocp.args.JsonSave(
      manifest | {'sha256': _sha256(manifest)}
    )
    try:
      self._saver.save(
        self._directory / str(step), args=ocp.args.Composite(**saves)
      )
    except Exception as error:
      raise self._failed(error, step) from error
    self.newest = step
    self._follower = threading.Thread(
      target=self._follow, args=(step,), daemon=True
    )
    self._follower.start()

  def rate(self, step, values):
    """Records the evaluation of a checkpoint that was saved before it."""
    self._finish()
    if self._best:
      self._values[step] = self._rating(values)
      text = json.dumps([self._best, self._values[step]])
      if processes.first():
        path = self._directory / str(step) / _RATING
        folders.remove_stale(path)
        folders.write_file(path, lambda part: part.write_text(text))

  def check(self):
    """Raises where a save has failed; waits for none."""
    if self._follower and not self._follower.is_alive():
      self._finish()

  def close(self):
    """Waits for the saves under way."""
    try:
      self._finish()
    finally:
      self._saver.close()

  def _finish(self):
    """Waits for the save under way; raises where it, or the last, failed."""
    if self._follower:
      self._follower.join()
    error, self._error = self._error, None
    if error:
      raise error

  def _follow(self, step):
    """Waits for a save in a thread of its own; then removes older ones.

    Of several processes, one that fails must end the others: they wait for it,
    for twenty minutes, in Orbax.
    """
    try:
      self._saver.wait_until_finished()
      if processes.first():
        self._remove_old()
    except Exception as error:
      failed = self._failed(error, step)
      processes.fail(str(failed))  # of several, none gets beyond this
      failed.__cause__ = error
      self._error = failed

  def _remove_old(self):
    there = _listed(self._directory)
    kept = {*there[-self._keep :], *self._unknown}
    rated = {s: value for s, value in self._values.items() if s in there}
    if rated:
      kept.add(_best(rated))
    for step in there:
      if step not in kept:  # renamed, or a kill would leave a damaged one
        folder = self._directory / str(step)
        try:
          folder.rename(folder.with_name(f'{step}{_REMOVED}'))
        except OSError as error:  # no reason to end a run
          _tell(f'checkpoint {step} is not removed: {causes.line(error)}')
    self._remove_parts()

  def _remove_parts(self):
    """Removes what is neither a checkpoint nor was set aside."""
    for pattern in ('*.orbax-checkpoint-tmp*', f'*{_REMOVED}'):
      for left in self._directory.glob(pattern):
        shutil.rmtree(left, ignore_errors=True)

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

  def _failed(self, error, step):
    """Returns an error that says what to do.

    What failed takes no space; of several processes the others may be writing
    it still, and would fail of that, so the next start removes it.
    """
    if processes.alone():
      self._remove_parts()
    kept = _listed(self._directory)
    reason, fix = causes.line(error), 'see why, and start the run again'
    if full := causes.full(error):
      reason, fix = (
        full,
        'free some space (checkpoint.keep says how many are kept), and start'
        ' the run again',
      )
    return OSError(
      f'checkpoint {step} could not be written ({reason}); the'
      f' last good one is {kept[-1] if kept else "none"}; {fix}'
    )
