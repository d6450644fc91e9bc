"""A workdir is one run's: one config, one writer, nothing of it lost."""

import errno
import fcntl
import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import preference
from dpo_jax import metrics
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import workdirs
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]

# --- Configs -----------------------------------------------------------------


def of(**changes):
  """A small config with dotted keys."""
  config = preference.get_config('data=jsonl,debug,reference=cached')
  config.update_from_flattened_dict(changes)
  return settings.Settings(config.to_dict())


def test_what_changes_no_number_may_change_and_nothing_is_forgotten(
  tmp_path, capsys
):
  workdir = str(tmp_path)
  first, second, third = of(), of(log_every=7), of(**{'mesh.fsdp': 2})
  for config in (first, second, second, third):
    workdirs.claim(workdir, config, 'data')
  said = capsys.readouterr().out
  assert said.count('config of') == 2 and 'log_every: 1 -> 7' in said
  for config, name in zip((first, second, third), ('1.json', '2.json', 'json')):
    kept = json.loads((tmp_path / f'config.{name}').read_text())
    assert kept == json.loads(json.dumps(config.as_dict()))
  workdirs.check_same(workdir, of(**{'data.cache_dir': 'x'}), ('data',))


@pytest.mark.parametrize(
  'name, value, old',
  [('optim.lr', 2e-6, '1e-06'), ('checkpoint.best', 'min:a', "''")],
)
def test_what_changes_results_is_refused_by_name(tmp_path, name, value, old):
  workdirs.claim(str(tmp_path), of(), 'data')
  with pytest.raises(ValueError, match='use a new workdir') as caught:
    workdirs.check(str(tmp_path), of(**{name: value, 'log_every': 9}))
  assert f'{name}: {old} -> {value!r}' in str(caught.value)
  assert 'log_every' not in str(caught.value)


def test_keys_that_may_change_are_keys():
  for name in workdirs.FREE:
    settings.at(of().as_dict(), name)


def test_four_devices_go_on_where_eight_were_with_the_same_losses(
  tmp_path, monkeypatch
):
  changes = {
    'num_steps': 4,
    'optim.lr': 1e-3,
    'eval.every': 0,
    'checkpoint.every': 2,
  }
  whole, moved = tmp_path / 'whole', tmp_path / 'moved'
  train.train(worlds.debug_config(tmp_path, **changes), whole)
  shutil.copytree(whole, moved)
  shutil.rmtree(moved / 'checkpoints' / '4')  # as if it had been stopped
  four = functools.partial(sharding.make_mesh, devices=jax.devices()[:4])
  monkeypatch.setattr(sharding, 'make_mesh', four)
  changes |= {'mesh.data': 2, 'mesh.fsdp': 2}
  params = train.train(worlds.debug_config(tmp_path, **changes), moved)
  assert len(jax.tree.leaves(params)[0].sharding.device_set) == 4

  def column(name):
    one, other = (
      {r['step']: r[name] for r in metrics.read(w) if name in r}
      for w in (whole, moved)
    )
    assert one.keys() == other.keys()
    return np.array([*one.values()]), np.array([*other.values()])

  for name, count in (('train/loss', 4), ('heldout/loss', 2)):
    one, other = column(name)
    assert len(one) == count
    np.testing.assert_allclose(other, one, rtol=1e-6)
  one, other = column('train/step_seconds')
  assert ((one == other) == [True, True, False, False]).all()  # computed anew


# --- One run at a time -------------------------------------------------------

HOLD = """
import sys, time
from dpo_jax import workdirs
with workdirs.held(sys.argv[1]):
  print('held', flush=True)
  time.sleep(600)
"""


def test_two_runs_do_not_share_a_workdir_and_a_killed_one_frees_it(tmp_path):
  workdir = str(tmp_path / 'run')
  other = subprocess.Popen(
    [sys.executable, '-c', HOLD, workdir],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert other.stdout.readline() == 'held\n'
    with pytest.raises(ValueError, match='use a new workdir') as caught:
      with workdirs.held(workdir):
        raise AssertionError('never here')
    assert f'another run (process {other.pid} on' in str(caught.value)
    with pytest.raises(ValueError, match='in use by another run'):
      train.train(worlds.debug_config(tmp_path), workdir)
  finally:
    other.send_signal(signal.SIGKILL)
    other.wait()
  with workdirs.held(workdir):
    pass


def test_a_run_leaves_no_lock_and_a_refused_one_no_folder(tmp_path):
  workdir = tmp_path / 'run'
  with pytest.raises(KeyError):
    with workdirs.held(str(workdir)):
      raise KeyError
  assert not workdir.exists()
  with workdirs.held(str(workdir)):
    (workdir / 'config.json').write_text('{}')
  assert [path.name for path in workdir.iterdir()] == ['config.json']


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with workdirs.held(str(tmp_path)):
    entered = True
  assert entered and 'No locks available' in capsys.readouterr().out


def test_a_run_that_is_begun_again_is_not_finished(tmp_path):
  workdirs.finish(tmp_path)
  assert workdirs.finished(tmp_path)
  with workdirs.held(tmp_path):
    assert not workdirs.finished(tmp_path)
  assert not workdirs.finished(tmp_path)
