"""What a run waits for, and what outlives it."""

import jax
import pytest

from dpo_jax import checkpoint
from dpo_jax import evaluators
from dpo_jax import fetch
from dpo_jax import metrics
from dpo_jax import progress
from dpo_jax import train
from tests import worlds


def test_metrics_are_fetched_at_log_points_after_the_next_step_began(
  tmp_path, monkeypatch
):
  seen = []
  put_batch, check_finite = evaluators.put_batch, progress.check_finite
  sync, save = metrics.Writer.sync, checkpoint.Checkpoints.save

  def spy_sync(writer):
    sync(writer)
    seen.append('metrics on disk')

  def spy_save(checkpoints, step, *args, **keywords):
    seen.append(f'save {step}')
    save(checkpoints, step, *args, **keywords)

  def spy_batch(plan, step, *args, **keywords):
    if plan.num_steps == 10:
      seen.append(f'step {step + 1}')
    return put_batch(plan, step, *args, **keywords)

  def spy_check(values, step, checkpoints):
    if 'grad_norm' in values:
      seen.append(step)
    return check_finite(values, step, checkpoints)

  monkeypatch.setattr(evaluators, 'put_batch', spy_batch)
  monkeypatch.setattr(progress, 'check_finite', spy_check)
  monkeypatch.setattr(metrics.Writer, 'sync', spy_sync)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', spy_save)
  config = worlds.debug_config(
    tmp_path, **{'num_steps': 10, 'log_every': 4, 'eval.every': 0}
  )
  train.train(config, tmp_path / 'run')
  steps = [f'step {n}' for n in range(11)]
  assert (
    seen
    == [
      steps[1],  # to compile for its shape
      *steps[1:6],
      *(1, 2, 3, 4),
      *steps[6:10],
      *(5, 6, 7, 8),
      steps[10],
      *(9, 10),
      *('metrics on disk', 'save 10'),
    ]
  )
  records = metrics.read(tmp_path / 'run')
  assert [r['step'] for r in records if 'train/loss' in r] == [4, 8, 10]


@pytest.fixture
def no_cache():
  """JAX as one finds it, without a folder for what it compiles."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  jax.config.update('jax_compilation_cache_dir', before)


@pytest.mark.usefixtures('no_cache')
def test_compiled_programs_are_kept_unless_turned_off(tmp_path):
  progress.keep_compiled('')
  assert jax.config.jax_compilation_cache_dir is None
  progress.keep_compiled('auto')
  own = str(fetch.cache_folder() / 'compiled')
  assert jax.config.jax_compilation_cache_dir == own
  progress.keep_compiled(str(tmp_path))  # what was set stays
  assert jax.config.jax_compilation_cache_dir == own


def test_the_tests_leave_the_cache_of_the_user_alone():
  before = jax.config.jax_compilation_cache_dir
  progress.keep_compiled('auto')
  assert before and jax.config.jax_compilation_cache_dir == before
