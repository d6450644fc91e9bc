"""How far a loop is, and what of it is on disk: what `train` and `ppo` share.

    with progress.begun(config, workdir) as mesh:
      here = progress.Progress(config, workdir, data=..., resumed=...)
      ... make the state, of `here.restore` unless `here.fresh`
      with here.open(num_steps, evaluate=..., saved=...):
        for number in here.steps('train'):
          ... the step
          here.did(number)
          here.settle(number)

A step is done, then measured and saved where that is due. Whatever ends the
loop, saves under way are finished, and a SIGTERM saves the last step.
"""

import contextlib
import os

import jax
import numpy as np
import tqdm

from dpo_jax import checkpoint
from dpo_jax import fetch
from dpo_jax import metrics
from dpo_jax import processes
from dpo_jax import sharding
from dpo_jax import workdirs


@contextlib.contextmanager
def begun(config, workdir):
  """Within, a loop has its devices, as a mesh, and its workdir to itself."""
  workdirs.check(workdir, config)
  keep_compiled(config.compilation_cache)
  mesh = sharding.make_mesh(**config.mesh)
  with (
    processes.heed_sigterm(),
    workdirs.held(workdir),
    sharding.use(mesh),
  ):
    yield mesh


def keep_compiled(folder):
  """Makes compiled programs outlive the process, in `folder`.

  'auto' is the user's cache, '' turns it off. What JAX was told otherwise, for
  example by $JAX_COMPILATION_CACHE_DIR, stays.
  """
  if folder and not jax.config.jax_compilation_cache_dir:
    if folder == 'auto':
      folder = fetch.cache_folder() / 'compiled'
    jax.config.update('jax_compilation_cache_dir', os.fspath(folder))


def check_finite(values, step, checkpoints):
  """Raises where a loss, a gradient or the updated parameters are not finite.

  Called on every step's metrics and on every evaluation before a checkpoint
  is written, so a checkpoint never holds what it finds.
  """
  for name, value in values.items():
    if name.split('/')[-1] in ('loss', 'grad_norm', 'param_norm'):
      if not np.isfinite(value):
        kept = checkpoints.latest()
        raise FloatingPointError(
          f'{name} is {value} at step {step}; the last good checkpoint is'
          f' {"none" if kept is None else f"that of step {kept}"}. Go on from'
          ' it in a new workdir, with config.resume set to this one and a'
          ' smaller optim.lr or a smaller optim.clip_norm'
        )


class Progress:
  """The steps of one loop, its log and its checkpoints.

  first: the step that it begins or goes on at.
  """

  def __init__(self, config, workdir, *, data, resumed):
    """Reads when to log, evaluate and save; makes the workdir this run's.

    Every other key of `config` must have been read by now.

    Args:
      config: `settings.Settings`.
      workdir: of the run.
      data: a text that changes whenever what is learned from does.
      resumed: what a run must share with one whose state it goes on with, see
        `workdirs.check_same`.
    """
    self.log_every = config.log_every
    self._every = {
      'log': self.log_every,
      'evaluate': config.eval.every,
      'save': config.checkpoint.every,
    }
    self._keep, self._best = config.checkpoint.keep, config.checkpoint.best
    self._workdir, self._resume = workdir, config.resume
    if self._resume:
      workdirs.check_same(self._resume, config, resumed)
    config.check_all_read()
    workdirs.claim(workdir, config, data)
    self._directory = os.path.join(workdir, 'checkpoints')
    self._own = checkpoint.steps(self._directory)  # made by this run
    self.first = 0
    self._measured = False  # what is due at the step that was done last

  # ------------------------------------------------------------- restore ----
  # 1 this workdir, 2 config.resume, 3 config.init, 4 model.source; the last
  # two are in what a policy was opened with.

  @property
  def fresh(self):
    """Whether there is no state to go on with."""
    return not self._own and not self._resume

  def restore(self, like):
    """Returns the items of the state to go on with; see `steps.saved`."""
    if self._own:
      self.first, items, self._measured = checkpoint.restore(
        self._directory, like, set_aside=True
      )
    else:
      self.first, items = workdirs.restore(self._resume, like)
      self._measured = True
    return items

  # --------------------------------------------------------------- steps ----

  @contextlib.contextmanager
  def open(self, num_steps, *, evaluate, saved):
    """Opens log and checkpoints; measures what is due before the first step.

    Args:
      num_steps: of the loop.
      evaluate: () -> (values, sample records) of the state that there is.
      saved: () -> the items of that state, when the steps under way are done.
    """
    self._num_steps, self._evaluate, self._saved = num_steps, evaluate, saved
    self._checkpoints = checkpoint.Checkpoints(
      self._directory, keep=self._keep, best=self._best
    )
    # Those beyond were set aside.
    self._own = [step for step in self._own if step <= self.first]
    self._writer = metrics.Nowhere()
    if processes.first():
      self._writer = metrics.Writer(
        self._workdir,
        after=self.first if self.first else -1,
        measured=self._measured,
      )
    self._done = self.first  # the step that made the state
    processes.heed_by_poll()
    try:
      if not self._measured:
        ratings = self._measure(self.first)
        if self.first in self._own and self.due('save', self.first):
          self._checkpoints.rate(self.first, ratings)
      yield
    except processes.Preempted as stop:
      self._save_last()
      stop.what = f'SIGTERM after step {self._done} of {num_steps}'
      if self._done in (self._checkpoints.newest, *self._own):
        stop.what += ', which is saved'
      raise
    finally:  # whatever happens, saves under way are finished
      try:
        with processes.saving():
          self._checkpoints.close()
      finally:
        self._writer.close()

  def steps(self, title):
    """Counts the steps that are left on a bar; where all agree, it stops."""
    for number in tqdm.trange(
      self.first + 1,
      self._num_steps + 1,
      initial=self.first,
      total=self._num_steps,
      desc=title,
    ):
      processes.poll()
      yield number

  def due(self, what, number):
    """Whether to 'log', 'evaluate' or 'save' at a step; all at the last one."""
    every = self._every[what]
    return number == self._num_steps or (every and number % every == 0)

  def did(self, number):
    """Notes that the state is now that of a step, which may be under way."""
    self._done, self._measured = number, not self.due('evaluate', number)

  def check_saves(self):
    """Raises where a save has failed; waits for none."""
    self._checkpoints.check()

  def check_finite(self, values, number):
    """Raises where the metrics of a step are not finite, see above."""
    check_finite(values, number, self._checkpoints)

  def log(self, number, values):
    """Writes the metrics of a step."""
    self._writer.write(
      number, {f'train/{name}': value for name, value in values.items()}
    )

  def settle(self, number):
    """Measures and saves what is due at a step; none may be under way."""
    ratings = None if self._measured else self._measure(number)
    if self.due('save', number):
      self._writer.sync()
      self._checkpoints.save(number, self._saved(), values=ratings)

  def _measure(self, number):
    values, samples = self._evaluate()
    self.check_finite(values, number)
    self._checkpoints.check_rating(values)
    self._writer.write(number, values, samples)
    self._measured = True
    return values

  def _save_last(self):
    items = self._saved()
    newest = max(self._own, default=0)
    if self._done > newest and self._done != self._checkpoints.newest:
      self._writer.sync()
      self._checkpoints.save(self._done, items, measured=self._measured)
