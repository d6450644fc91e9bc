"""What was saved is what is read, or it is said not to be."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax import checkpoint
from dpo_jax import digests
from dpo_jax import metrics
from dpo_jax import processes
from dpo_jax import progress
from dpo_jax import sharding
from dpo_jax import train
from experiments import kill_runs
from tests import processes_test
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]


def rows_over(devices):
  """Sharding of leading axes over so many devices."""
  mesh = jax.make_mesh(
    (devices,),
    ('fsdp',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:devices],
  )
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))


def items_of(step, where):
  """A small state that differs from step to step."""
  rng = np.random.default_rng(step)
  return {
    'params': {
      'w': jax.device_put(rng.normal(size=(16, 33)).astype('f4'), where),
      'b': jax.device_put(rng.normal(size=(8, 2)).astype('bfloat16'), where),
    },
    'opt_state': (jax.device_put(rng.integers(0, 9, 8, 'int32'), where),),
  }


def like(items, where):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), items
  )


def write(folder, steps, **options):
  """Saves states of some steps; `options` of `Checkpoints`."""
  checkpoints = checkpoint.Checkpoints(folder, **({'keep': 9} | options))
  for step in steps:
    checkpoints.save(step, items_of(step, rows_over(8)))
  checkpoints.close()


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('devices', [8, 4, 1])
def test_a_checkpoint_goes_to_any_mesh(tmp_path, devices):
  write(tmp_path, [3])
  where = rows_over(devices)
  items = items_of(3, where)
  found = checkpoint.restore(tmp_path, like(items, where))
  assert found.step == 3 and found.measured
  assert_equal(found.items, items)
  for leaf in jax.tree.leaves(found.items):
    assert leaf.sharding == where


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {'flip': flip, 'cut': cut, 'delete': pathlib.Path.unlink}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_checkpoint_is_found_whatever_file_it_is(
  tmp_path, capsys, damage
):
  whole = tmp_path / 'whole'
  write(whole, [3, 6])
  where = rows_over(8)
  files = [p for p in sorted((whole / '6').rglob('*')) if p.stat().st_size]
  files = [p.relative_to(whole) for p in files if p.is_file()]
  assert len(files) > 5
  noticed = set()
  for number, file in enumerate(files):
    folder = tmp_path / str(number)
    shutil.copytree(whole, folder)
    DAMAGES[damage](folder / file)
    found = checkpoint.restore(folder, like(items_of(6, where), where))
    # Not every file is needed; but what is read is what was saved.
    assert_equal(found.items, items_of(found.step, where))
    told = f'checkpoint 6 of {folder} is damaged' in capsys.readouterr().err
    assert told == (found.step == 3), file
    noticed |= {file.parts[1]} if told else set()
  assert noticed >= {'manifest', 'params', 'opt_state'}


@pytest.mark.parametrize(
  'item, pattern', [('params', 'd/*'), ('manifest', 'm*')]
)
def test_a_bit_anywhere_in_the_data_is_noticed(tmp_path, item, pattern):
  write(tmp_path, [6])
  where = rows_over(8)
  files = (tmp_path / '6' / item).rglob(pattern)
  data = max(files, key=lambda p: p.stat().st_size)
  original = data.read_bytes()
  rng = np.random.default_rng(0)
  items, same = items_of(6, where), 0
  for place in rng.integers(0, len(original), 25):
    changed = bytearray(original)
    changed[place] ^= 1 << int(rng.integers(8))
    data.write_bytes(changed)
    try:
      found = checkpoint.restore(tmp_path, like(items, where))
    except ValueError as error:
      assert 'put one back from a backup' in str(error)
    else:  # a byte that says nothing about the numbers
      assert_equal(found.items, items)
      same += 1
  assert same < 5
  data.write_bytes(original)
  assert checkpoint.restore(tmp_path, like(items, where)).step == 6


def test_all_damaged_is_an_error_and_other_parameters_are_another(tmp_path):
  write(tmp_path, [3, 6])
  where = rows_over(8)
  items = items_of(6, where)
  other = items | {'params': {'w': items['params']['w']}}
  with pytest.raises(
    ValueError, match=r'params/b is bfloat16\[8,2\], here not'
  ):
    checkpoint.restore(tmp_path, like(other, where))
  for step in (3, 6):
    shutil.rmtree(tmp_path / str(step) / 'params')
  with pytest.raises(ValueError, match=r'is whole .*put one back'):
    checkpoint.restore(tmp_path, like(items, where))


def test_the_last_n_and_the_best_are_kept(tmp_path):
  ratings = {2: 0.5, 4: 0.3, 6: 0.4, 8: 0.6, 10: 0.7}
  where = rows_over(8)
  for part in ((2, 4, 6), (8, 10)):  # closed and opened between
    checkpoints = checkpoint.Checkpoints(
      tmp_path, keep=2, best='min:heldout/loss'
    )
    for step in part:
      checkpoints.save(
        step, items_of(step, where), values={'heldout/loss': ratings[step]}
      )
    checkpoints.close()
  assert checkpoint.steps(tmp_path) == [4, 8, 10]
  shapes = like(items_of(4, where), where)
  assert checkpoint.restore(tmp_path, shapes, which='best').step == 4
  assert checkpoint.restore(tmp_path, shapes, which='8').step == 8
  assert checkpoint.restore(tmp_path, shapes).step == 10
  with pytest.raises(ValueError, match=r'has no checkpoint .*\[4, 8, 10\]'):
    checkpoint.restore(tmp_path, shapes, which='6')
  flip(next((tmp_path / '4' / 'params').rglob('d/*')))
  with pytest.raises(ValueError, match='is whole'):  # and no other instead
    checkpoint.restore(tmp_path, shapes, which='best')


def test_what_cannot_be_removed_ends_no_run(tmp_path, capsys):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)

  def save(step):
    checkpoints.save(step, items_of(step, rows_over(8)))
    assert checkpoints.latest() == step

  save(1)
  (tmp_path / '1.removed' / 'in use').mkdir(parents=True)
  save(2)
  assert checkpoint.steps(tmp_path) == [1, 2]
  assert 'checkpoint 1 is not removed' in capsys.readouterr().err
  save(3)
  checkpoints.close()
  assert [path.name for path in tmp_path.iterdir()] == ['3']


def test_the_best_of_a_max_ignores_nan_and_what_was_not_rated(tmp_path):
  where = rows_over(8)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best='max:a')
  for step, values in [(1, {'a': 2.0}), (2, {'a': np.nan}), (3, None)]:
    checkpoints.save(step, items_of(step, where), values=values)
  with pytest.raises(ValueError, match="'max:a', but evaluations give b"):
    checkpoints.save(4, items_of(4, where), values={'b': 1.0})
  checkpoints.close()
  assert checkpoint.steps(tmp_path) == [1, 3]


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'best': 'heldout/loss'}, 'write min:NAME or max:NAME'),
    ({'best': 'least:heldout/loss'}, 'write min:NAME or max:NAME'),
    ({'best': 'min:a', 'every': 3}, 'a multiple of eval.every'),
    ({'best': 'min:a', 'eval_every': 0}, 'a multiple of eval.every'),
    ({'keep': 0}, 'keep at least 1'),
  ],
)
def test_settings_that_keep_nothing_name_the_fix(changes, message):
  given = {'keep': 2, 'best': '', 'every': 4, 'eval_every': 2}
  with pytest.raises(ValueError, match=message):
    checkpoint.check(**(given | changes))


FULL = """
import resource, signal, sys
import jax, numpy as np
from dpo_jax import checkpoint
where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
rng = np.random.default_rng(0)
def state(size):
  array = jax.device_put(rng.normal(size=size).astype('f4'), where)
  return {'params': {'w': array}}
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=1)
checkpoints.save(3, state(64))
checkpoints.close()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=1)
try:
  checkpoints.save(6, state(1 << 20))
  checkpoints.close()
except OSError as error:
  print(error)
like = {'params': {'w': jax.ShapeDtypeStruct((64,), 'f4', sharding=where)}}
print(checkpoint.restore(sys.argv[1], like).step)
"""


def test_a_disk_that_takes_no_more_keeps_the_last_good_checkpoint(tmp_path):
  # A limit on the size of files stands for a full disk; the error differs.
  result = subprocess.run(
    [sys.executable, '-c', FULL, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  first, *_, last = result.stdout.splitlines()
  assert 'checkpoint 6 could not be written' in first
  assert 'the last good one is 3' in first and 'free some space' in first
  assert last == '3'
  assert not list(tmp_path.glob('*tmp*'))


def test_a_run_goes_on_before_a_damaged_checkpoint(tmp_path, capsys):
  changes = {'num_steps': 6, 'optim.lr': 1e-3, 'eval.every': 0}
  changes['checkpoint.every'] = 3
  config = worlds.debug_config(tmp_path, 'reference=ema', **changes)
  whole = jax.device_get(train.train(config, tmp_path / 'run'))
  before = metrics.read(tmp_path / 'run')
  for path in (tmp_path / 'run' / 'checkpoints' / '6' / 'ref').rglob('d/*'):
    flip(path)
  config = worlds.settings.Settings(config.as_dict())
  again = jax.device_get(train.train(config, tmp_path / 'run'))
  jax.tree.map(np.testing.assert_array_equal, whole, again)
  assert 'checkpoint 6 of' in capsys.readouterr().err
  names = sorted(p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir())
  assert names == ['3', '6', '6.damaged']
  assert len(metrics.read(tmp_path / 'run')) == len(before)


def refuse(monkeypatch, error, times):
  """Makes so many reads of checkpoints raise; returns a list of them."""
  restore, refused = checkpoint.ocp.Checkpointer.restore, []

  def sometimes(*args, **kwargs):
    if len(refused) < times:
      refused.append(1)
      raise error
    return restore(*args, **kwargs)

  monkeypatch.setattr(checkpoint.ocp.Checkpointer, 'restore', sometimes)
  monkeypatch.setattr(checkpoint, '_PAUSE', 0.0)
  return refused


PASSING = {
  'stale': OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
  'io': OSError(errno.EIO, os.strerror(errno.EIO)),
  'memory': MemoryError(),
  'device': ValueError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.'),
  'tensorstore': ValueError(
    'Error reading "/x/d/1": UNKNOWN [OS error 116: ESTALE Stale file handle]'
  ),
}


@pytest.mark.parametrize('name', PASSING)
def test_what_may_pass_damages_no_checkpoint(tmp_path, monkeypatch, name):
  write(tmp_path, [3, 6])
  where = rows_over(8)
  like_6 = like(items_of(6, where), where)
  refused = refuse(monkeypatch, PASSING[name], times=1)
  assert checkpoint.restore(tmp_path, like_6, set_aside=True).step == 6
  assert len(refused) == 1
  monkeypatch.undo()
  refuse(monkeypatch, PASSING[name], times=99)
  with pytest.raises(OSError, match=r'could not be read now .*start again'):
    checkpoint.restore(tmp_path, like_6, set_aside=True)
  assert checkpoint.steps(tmp_path) == [3, 6]


def test_processes_agree_on_why_a_checkpoint_cannot_be_read(
  tmp_path, monkeypatch
):
  write(tmp_path, [3, 6])
  where = rows_over(8)
  like_6 = like(items_of(6, where), where)
  refuse(monkeypatch, ValueError('DATA_LOSS: checksum'), times=99)
  asked, others = [], ['OSError: Stale file handle', True]

  def gathered(value):  # of this process and one that meets what may pass
    asked.append(value)
    return [value, others]

  monkeypatch.setattr(processes, 'gathered', gathered)
  with pytest.raises(OSError, match=r'Stale file handle.*start again'):
    checkpoint.restore(tmp_path, like_6)
  assert asked == [['ValueError: DATA_LOSS: checksum', False]] * 2
  others[:] = [None, False]
  with pytest.raises(ValueError, match='put one back from a backup'):
    checkpoint.restore(tmp_path, like_6)


def test_the_best_is_not_guessed_where_a_rating_is_damaged(tmp_path):
  where = rows_over(8)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=3, best='min:a')
  for step in (1, 2):
    checkpoints.save(step, items_of(step, where), values={'a': step})
  checkpoints.save(3, items_of(3, where))
  checkpoints.rate(3, {'a': 0.5})
  checkpoints.close()
  shapes = like(items_of(3, where), where)
  assert checkpoint.restore(tmp_path, shapes, which='best').step == 3
  cut(tmp_path / '3' / 'rating.json')
  with pytest.raises(ValueError, match=r'rating of 3 cannot be read .* give a'):
    checkpoint.restore(tmp_path, shapes, which='best')
  (tmp_path / '3' / 'rating.json').unlink()
  cut(tmp_path / '1' / 'manifest' / 'metadata')
  with pytest.raises(ValueError, match=r'rating of 1 cannot be read .* give a'):
    checkpoint.restore(tmp_path, shapes, which='best')
  assert checkpoint.restore(tmp_path, shapes, which='2').step == 2


def test_a_rating_after_the_save_keeps_the_best_and_outlives_the_run(tmp_path):
  where = rows_over(8)
  for step, rating in [(1, 0.1), (2, 0.2), (3, 0.3)]:  # opened each time
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best='min:a')
    checkpoints.save(step, items_of(step, where), measured=False)
    checkpoints.latest()
    checkpoints.rate(step, {'a': rating})
    checkpoints.close()
  assert checkpoint.steps(tmp_path) == [1, 3]
  write(tmp_path, [4], keep=1, best='min:a')
  assert checkpoint.steps(tmp_path) == [1, 4]


def test_a_preempted_evaluation_keeps_the_same_best(tmp_path, monkeypatch):
  changes = {'num_steps': 6, 'optim.lr': 1e-3, 'eval.every': 2}
  changes |= {'checkpoint.every': 2, 'checkpoint.keep': 1}
  changes |= {'checkpoint.best': 'max:heldout/loss'}
  config = worlds.debug_config(tmp_path, **changes)
  whole, cut_off = tmp_path / 'whole', tmp_path / 'cut_off'
  train.train(config, whole)
  check_finite = progress.check_finite

  def preempted(values, step, checkpoints):
    check_finite(values, step, checkpoints)
    if step == 2 and 'heldout/loss' in values:
      raise processes.Preempted('SIGTERM', together=True)

  monkeypatch.setattr(progress, 'check_finite', preempted)
  with pytest.raises(processes.Preempted):
    train.train(config, cut_off)
  monkeypatch.undo()
  train.train(config, cut_off)
  for workdir in (whole, cut_off):
    assert checkpoint.steps(workdir / 'checkpoints') == [2, 6]


# --- Digests -----------------------------------------------------------------

ARRAYS = {
  'float32': np.arange(48, dtype='f4').reshape(8, 6) / 7,
  'bfloat16': np.arange(16).astype('bfloat16').reshape(8, 2),
  'int32': np.arange(-4, 4, dtype='i4'),
  'uint8': np.arange(8, dtype='u1'),
  'bool': np.arange(8) % 3 == 0,
}


@pytest.mark.parametrize('kind', ARRAYS)
def test_a_digest_is_the_same_on_every_mesh(kind):
  array = ARRAYS[kind]
  found = {
    devices: digests.of({'x': jax.device_put(array, rows_over(devices))})['x']
    for devices in (1, 2, 4, 8)
  }
  assert len({*found.values(), digests.of({'x': array})['x']}) == 1
  assert found[1].startswith(digests.described(array))


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int32', 'uint8'])
def test_any_bit_and_any_exchange_changes_a_digest(kind):
  array = ARRAYS[kind]
  seen = {digests.of({'x': array})['x']}
  view = array.copy().reshape(-1).view(np.uint8)
  for place in range(0, view.size, 3):
    for bit in (0, 3, 7):
      changed = view.copy()
      changed[place] ^= 1 << bit
      seen.add(digests.of({'x': changed.view(array.dtype)})['x'].split()[1])
  turned = array.reshape(-1)[::-1].reshape(array.shape)
  seen.add(digests.of({'x': turned})['x'])
  assert len(seen) == 2 + 3 * len(range(0, view.size, 3))


# --- Kills -------------------------------------------------------------------


@pytest.mark.parametrize('number', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_the_same(tmp_path, number):
  account = kill_runs.kill_run(
    tmp_path,
    kills=3,
    seed=10,
    steps=24,
    devices=number,
    number=number,
    arg='reference=frozen',
    longest=3.0,
  )
  assert account['kills'] == {'SIGKILL': 1, 'SIGTERM': 2}
  assert 'imports' not in account['phases']
  assert account['arrays_equal'] > 30


def test_a_run_that_hangs_is_killed_at_its_deadline(tmp_path):
  sleeps = [sys.executable, '-c', 'print("ZZZ", flush=True); input()']
  run = kill_runs.Started(sleeps, number=1, devices=1, folder=tmp_path)
  run.check_time(kill_runs.ENDS)
  with pytest.raises(RuntimeError, match='it hangs: 0 s are over'):
    run.check_time(0.0)
  assert run.statuses() == [-signal.SIGKILL]


def test_a_measurement_cut_off_is_made_again(tmp_path):
  writer = metrics.Writer(tmp_path, after=-1)
  writer.write(2, {'train/loss': 1.0})
  writer.write(2, {'heldout/loss': 2.0}, [{'prompt': 'a'}])
  writer.write(3, {'train/loss': 3.0})
  writer.close()
  metrics.Writer(tmp_path, after=2, measured=False).close()
  assert metrics.read(tmp_path) == [{'step': 2, 'train/loss': 1.0}]
  assert metrics.read(tmp_path, 'samples.jsonl') == []


def test_manifests_are_json_that_a_person_can_read(tmp_path):
  write(tmp_path, [3])
  text = (tmp_path / '3' / 'manifest' / 'metadata').read_text()
  manifest = json.loads(text)
  assert [*manifest] == ['items', 'measured', 'best', 'sha256']
  items = items_of(3, sharding.replicated(rows_over(8).mesh))
  assert manifest['items']['params'] == digests.of(items['params'])
  assert manifest['measured'] is True


def test_asking_often_while_a_save_fails_loses_no_checkpoint(tmp_path):
  # In a process of its own: the limit of file sizes holds for all of it.
  code = f"""
import resource, signal, sys
import numpy as np, jax
from dpo_jax import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rng = np.random.default_rng(0)
numbers = rng.random(400_000, np.float32)
items = {{'params': {{'x': jax.numpy.asarray(numbers)}}}}
saves = checkpoint.Checkpoints({str(tmp_path)!r}, keep=1)
saves.save(3, items)
assert saves.latest() == 3
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  saves.save(6, items)
  while True:
    saves.check()
except OSError as e:
  print('failed:', e)
"""
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, timeout=120
  )
  assert 'failed:' in result.stdout, result.stderr[-2000:]
  assert checkpoint.steps(tmp_path) == [3]


def test_a_checkpoint_whose_rating_cannot_be_read_is_kept(
  tmp_path, monkeypatch
):
  items = {'params': {'x': jax.numpy.arange(4.0)}}

  def save(saves, step, value):
    saves.save(step, items, values={'loss': value})
    saves.latest()

  saves = checkpoint.Checkpoints(tmp_path, keep=1, best='min:loss')
  save(saves, 1, 0.1)
  save(saves, 2, 0.5)
  saves.close()
  monkeypatch.setattr(
    checkpoint, '_manifest', lambda *_: (None, 'OSError: Stale file handle')
  )
  saves = checkpoint.Checkpoints(tmp_path, keep=1, best='min:loss')
  monkeypatch.undo()
  save(saves, 3, 0.4)
  saves.close()
  assert 1 in checkpoint.steps(tmp_path)


def test_a_name_that_nothing_rates_is_refused_before_the_first_step(tmp_path):
  config = worlds.debug_config(
    tmp_path,
    **{
      'checkpoint.best': 'min:heldout/los',
      'checkpoint.every': 2,
      'eval.every': 2,
    },
  )
  with pytest.raises(ValueError, match='heldout/los'):
    train.train(config, tmp_path / 'run')
  assert not metrics.read(tmp_path / 'run')


ONE_FULL = """
import resource, signal
  import numpy as np
  from absl import logging
  from dpo_jax import checkpoint, sharding
  logging.set_verbosity(logging.FATAL)  # as main does
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1)
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
  numbers = np.random.default_rng(0).random((2, 200_000), np.float32)
  x = jax.make_array_from_callback(numbers.shape, where, lambda i: numbers[i])
  saves = checkpoint.Checkpoints({folder!r}, keep=1)
  saves.save(3, {{'params': {{'x': x}}}})
  assert saves.latest() == 3
  if index == {victim}:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
  saves.save(6, {{'params': {{'x': x}}}})
  saves.close()
"""


@pytest.mark.parametrize('victim', [0, 1])
def test_a_disk_of_one_process_that_is_full_ends_all_with_its_reason(
  tmp_path, victim
):
  body = ONE_FULL.format(folder=str(tmp_path), victim=victim)
  codes, _, errors, seconds = processes_test.together(body.strip())
  assert codes == [1, 1], errors
  reason = 'checkpoint 6 could not be written (File too large); the last good'
  assert all(reason in error for error in errors), errors
  other = 1 - victim
  assert f'process {other} ends, as process {victim} did' in errors[other]
  assert 'Traceback' not in ''.join(errors)
  assert seconds < processes_test.ENDS
  assert checkpoint.steps(tmp_path) == [3]
  # Not taken away from the other one, which would have failed of that.
  assert list(tmp_path.glob('6.orbax-checkpoint-tmp*'))
  checkpoint.Checkpoints(tmp_path, keep=1).close()
  assert [path.name for path in tmp_path.iterdir()] == ['3']
