"""Several processes of one machine, joined by gloo, are one run."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest

from dpo_jax import checkpoint
from dpo_jax import metrics
from dpo_jax import policies
from dpo_jax import processes
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import workdirs
from dpo_jax.models import presets
from tests import train_test
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]
ENDS = 60  # seconds within which a run ends whose processes do not all live


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def environment(devices):
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  count = '--xla_force_host_platform_device_count='
  env['XLA_FLAGS'] = env['XLA_FLAGS'].replace(f'{count}8', f'{count}{devices}')
  return env


def launch(
  number, arguments, *, devices=4, own=lambda _: (), run=('-m', 'dpo_jax.main')
):
  """Starts `number` processes of a command; their output goes to PIPEs."""
  coordinator = f'127.0.0.1:{free_port()}'
  return [
    subprocess.Popen(
      [
        *(sys.executable, *run, *map(str, arguments)),
        f'--coordinator={coordinator}',
        f'--num_processes={number}',
        f'--process_id={index}',
        '--start_timeout=120',
        *own(index),
      ],
      env=environment(devices),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(number)
  ]


def outcome(started, timeout=900):
  """Waits; returns (exit statuses, outputs, errors) of all processes."""
  try:
    texts = [process.communicate(timeout=timeout) for process in started]
  finally:
    for process in started:
      process.kill()
  codes = [process.returncode for process in started]
  return codes, [out for out, _ in texts], [err for _, err in texts]


def options(tmp_path, workdir, changes, arg=''):
  """The flags of `worlds.debug_config` with the same changes."""
  worlds.debug_config(tmp_path)  # writes the data
  given = {
    'data.source': tmp_path / 'pairs.jsonl',
    'data.cache_dir': tmp_path / 'data',
    'data.row_length': 128,
    'eval.samples.num_prompts': 0,
    **changes,
  }
  if 'cached' in arg:
    given['reference.cache_dir'] = tmp_path / 'reference'
  return [
    f'--config=configs/preference.py:data=jsonl,debug,{arg}',
    *(f'--config.{name}={value}' for name, value in given.items()),
    f'--workdir={workdir}',
  ]


def numbers_of(workdir):
  """Metrics by step and name, without what a clock decides."""
  return {
    (record['step'], name): value
    for record in metrics.read(workdir)
    for name, value in record.items()
    if name.split('/')[-1] not in train_test.TIMED
  }


def wait_for(workdir, count, started):
  """Waits until a run has logged so many records."""
  while len(metrics.read(workdir)) < count:
    assert all(process.poll() is None for process in started), outcome(started)
    time.sleep(0.02)


def assert_equal_runs(config, one, two, *, but=()):
  """Metrics to 1e-6 and final parameters to 1e-6, restored on 8 devices."""
  a, b = numbers_of(one), numbers_of(two)
  assert a.keys() == b.keys()
  for name, value in a.items():
    if name[1] in but:
      continue
    assert abs(value - b[name]) <= 1e-6 * max(1, abs(value)), name
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  params = policies.open_policy(config, mesh).trained
  ends = [workdirs.restore(w, {'params': params}) for w in (one, two)]
  assert ends[0][0] == ends[1][0]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *ends)


# The learning rate makes rounding that differs stay below the bound.
CHANGES = {
  'num_steps': 6,
  'optim.lr': 1e-3,
  'eval.every': 3,
  'checkpoint.every': 4,
}


def test_two_processes_equal_one_through_a_preemption(tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  config = worlds.debug_config(tmp_path, **CHANGES)
  train.train(config, one)

  arguments = ['train', *options(tmp_path, two, CHANGES)]
  started = launch(2, arguments)
  wait_for(two, 2, started)  # of step 0 and of step 1
  started[1].send_signal(signal.SIGTERM)
  codes, outs, errors = outcome(started)
  assert codes == [processes.PREEMPTED] * 2, errors
  assert 'SIGTERM after step' in errors[0] and 'which is saved' in errors[0]
  assert '2 processes, 8 devices' in outs[0]
  assert 'Traceback' not in ''.join(errors)
  assert 'train' not in outs[1]  # only process 0 writes logs

  before = len(metrics.read(two))
  codes, _, errors = outcome(launch(2, arguments))
  assert codes == [0, 0], errors
  assert before < len(metrics.read(two))
  assert_equal_runs(config, one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
  'arg, changes',
  [
    ('reference=cached', {'eval.samples.num_prompts': 2}),
    ('reference=ema', {'reference.every': 2, 'mesh.fsdp': 4}),
    ('adapter=lora', {'mesh.data': 1, 'mesh.fsdp': 8}),
    ('loss=kto', {'mesh.data': 2, 'mesh.fsdp': 4}),
  ],
)
@pytest.mark.parametrize('number, devices', [(2, 4), (4, 2)])
def test_processes_equal_one_whatever_is_trained(
  tmp_path, arg, changes, number, devices
):
  one, many = tmp_path / 'one', tmp_path / 'many'
  config = worlds.debug_config(tmp_path, arg, **CHANGES, **changes)
  train.train(config, one)
  shutil.rmtree(tmp_path / 'reference', ignore_errors=True)  # computed again
  changes = CHANGES | changes
  codes, _, errors = outcome(
    launch(
      number,
      ['train', *options(tmp_path, many, changes, arg)],
      devices=devices,
    )
  )
  assert codes == [0] * number, errors
  assert_equal_runs(config, one, many)

  # `eval` of the one's run by many gives what training measured last.
  codes, outs, errors = outcome(
    launch(
      number, ['eval', *options(tmp_path, one, changes, arg)], devices=devices
    )
  )
  assert codes == [0] * number, errors
  values = json.loads(outs[0][outs[0].index('{') : outs[0].rindex('}') + 1])
  last = metrics.read(one)[-1]
  assert values.keys() == last.keys()
  for name, value in last.items():
    assert abs(value - values[name]) <= 1e-6 * max(1, abs(value)), name


# The bytes and their end are 257 tokens, which two devices cannot share.
EVEN = """
import dataclasses
from dpo_jax import main
from dpo_jax.models import presets

model = presets.DEBUG['debug-llama']
presets.DEBUG['debug-llama'] = dataclasses.replace(model, vocab_size=258)
main.run()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  'devices, sizes', [(4, (2, 2, 2)), (1, (1, 1, 2))], ids=['within', 'across']
)
def test_a_tensor_axis_within_or_across_two_processes_equals_one(
  tmp_path, monkeypatch, devices, sizes
):
  changes = CHANGES | {f'mesh.{a}': n for a, n in zip(sharding.AXES, sizes)}
  config = worlds.debug_config(tmp_path, **changes)
  one, two = tmp_path / 'one', tmp_path / 'two'
  for number, workdir in [(1, one), (2, two)]:
    arguments = ['train', *options(tmp_path, workdir, changes)]
    each = 2 * devices // number
    codes, _, errors = outcome(
      launch(number, arguments, devices=each, run=('-c', EVEN))
    )
    assert codes == [0] * number, errors
  model = presets.DEBUG['debug-llama']
  even = dataclasses.replace(model, vocab_size=258)
  monkeypatch.setitem(presets.DEBUG, 'debug-llama', even)
  assert_equal_runs(config, one, two)


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_four_to_one(tmp_path):
  one, moved = tmp_path / 'one', tmp_path / 'moved'
  changes = CHANGES | {'checkpoint.every': 2, 'checkpoint.keep': 9}
  config = worlds.debug_config(tmp_path, **changes)
  train.train(config, one)
  shutil.copytree(one, moved)
  for devices, later in [(4, ('4', '6')), (1, ('6',))]:
    for step in later:  # as if the run had ended before
      shutil.rmtree(moved / 'checkpoints' / step)
    arguments = ['train', *options(tmp_path, moved, changes)]
    codes, _, errors = outcome(launch(1, arguments, devices=devices))
    assert codes == [0], errors
  # How rows are filled depends on how many there are, a loss does not.
  assert_equal_runs(config, one, moved, but=('train/row_fill',))
  losses = [v for (_, n), v in numbers_of(moved).items() if n == 'train/loss']
  assert len(losses) == 6


# Processes that do nothing but what the argument says.
TOGETHER = """
import os, sys, time
import jax
from dpo_jax import launches, main, processes

def verb():
  index = int(sys.argv[2])
  launches.start(
    launches.find('127.0.0.1:' + sys.argv[1], 2, index, os.environ),
    timeout=60,
  )
  print('joined', flush=True)
  {body}
  processes.finish()

main.ends_all(verb)
"""


def together(body, more=lambda _: {}):
  """Runs a few lines in two processes: (statuses, outputs, errors, seconds).

  `more` (which process) -> of its environment.
  """
  port, begun = str(free_port()), time.monotonic()
  started = [
    subprocess.Popen(
      [sys.executable, '-c', TOGETHER.format(body=body), port, str(index)],
      env=environment(1) | more(index),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  return *outcome(started), time.monotonic() - begun


def test_what_one_says_all_hear():
  codes, outs, errors, _ = together(
    'said = processes.agreed(["process", index])\n'
    '  all = processes.gathered(index)\n'
    '  order = []\n'
    '  with processes.one_first():\n'
    '    order.append(time.time())\n'
    '  times = processes.gathered(order[0])\n'
    '  assert said == ["process", 0] and all == [0, 1], (said, all)\n'
    '  assert times[0] < times[1] and processes.first() == (index == 0)\n'
  )
  assert codes == [0, 0], errors
  assert 'joined' in outs[0] and 'joined' not in outs[1]


def test_processes_have_their_own_rows_or_share_them():
  # Three rows, which both hold where the tensor axis goes across them.
  codes, _, errors, _ = together(
    'import numpy as np\n'
    '  from dpo_jax import sharding\n'
    '  rows = np.arange(8.0).reshape(4, 2)\n'
    '  for sizes, count in [((1, 1, 2), 3), ((2, 1, 1), 4), ((1, 2, 1), 4)]:\n'
    '    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes)))\n'
    '    own = sharding.own_rows(count, mesh)\n'
    '    halves = [[0, 1], [2, 3]]\n'
    '    assert own == ([0, 1, 2] if count == 3 else halves[index]), own\n'
    '    x = sharding.put_rows({"x": rows[own]}, mesh, count=count)["x"]\n'
    '    total = jax.jit(lambda x: (x * x).sum(), '
    'out_shardings=sharding.replicated(mesh))(x)\n'
    '    assert total == (rows[:count] ** 2).sum(), total\n'
  )
  assert codes == [0, 0], errors


@pytest.mark.parametrize('index', [0, 1])
def test_an_error_in_one_process_ends_the_others_with_its_reason(index):
  codes, _, errors, seconds = together(
    f'if index == {index}: raise ValueError("the disk is gone")\n'
    '  processes.wait("for ever")\n'
  )
  assert codes == [1, 1]
  other = 1 - index
  assert f'process {other} ends, as process {index} did' in errors[other]
  assert all('the disk is gone' in error for error in errors)
  assert seconds < ENDS


def test_processes_that_differ_refuse_to_go_on():
  codes, _, errors, _ = together(
    'processes.check_same("their configs differ", str(index))\n'
  )
  assert codes == [1, 1]
  assert 'process 1 and process 0: their configs differ' in errors[0]


def test_a_process_whose_devices_fail_ends_the_others_with_the_reason():
  codes, _, errors, seconds = together(
    'processes.wait("for ever")\n',
    lambda index: {'JAX_PLATFORMS': 'nowhere'} if index else {},
  )
  assert codes == [1, 1], errors
  assert "'nowhere' is not in the list" in errors[1]
  assert 'process 0 ends, as process 1 did' in errors[0]
  assert "'nowhere' is not in the list" in errors[0]
  assert seconds < ENDS


# --- SIGTERM -----------------------------------------------------------------


class Store(dict):
  """The key-value store of the service, in one process."""

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self
    self[key] = value

  def key_value_dir_get(self, folder):
    return [(k, v) for k, v in self.items() if k.startswith(folder)]


@pytest.mark.parametrize('seed', range(20))
def test_all_stop_at_the_same_call_whoever_hears_of_it_first(monkeypatch, seed):
  monkeypatch.setattr(processes, '_group', lambda: True)
  draw, store = random.Random(seed), Store()
  stops = [processes._Stop() for _ in range(3)]
  ends = {}

  def polls(index):
    calls = 1
    while not stops[index].reached():
      calls += 1
      time.sleep(1e-4)
    ends[index] = calls

  mains = [
    threading.Thread(target=polls, args=(i,), daemon=True) for i in range(3)
  ]
  for main in mains:
    main.start()
    time.sleep(draw.random() / 1e3)
  until = time.monotonic() + ENDS
  while any(main.is_alive() for main in mains):
    assert time.monotonic() < until, ends
    index = draw.randrange(3)
    group = types.SimpleNamespace(client=store, index=index, count=3)
    stops[index].settle(group, known=True)
    time.sleep(draw.random() / 1e3)
  assert len({*ends.values()}) == 1, ends


# What the main thread does in C++: for ever, or until the others come.
COMPILED = (
  'forever = jax.jit(lambda x: jax.lax.while_loop('
  'lambda x: x >= 0, lambda x: x + 1e-9, x)).lower(1.0).compile()'
)
IN_C = {
  'a computation': 'jax.block_until_ready(forever(1.0))',
  'a wait': 'processes.wait("for ever")',
}
SIGNALLED = """
import os, signal, threading, time
import jax
from dpo_jax import main, processes

def verb():
  with processes.heed_sigterm(grace=3.0):
    {begin}
    {compiled}
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    {body}

main.ends_all(verb)
"""


@pytest.mark.parametrize('begin', ['pass', 'processes.heed_by_poll()'])
def test_a_sigterm_ends_a_process_that_does_not_come_back(begin):
  begun = time.monotonic()
  result = subprocess.run(
    [
      *(sys.executable, '-c'),
      SIGNALLED.format(
        begin=begin, compiled=COMPILED, body=IN_C['a computation']
      ),
    ],
    env=environment(1),
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=ENDS,
  )
  assert result.returncode == processes.PREEMPTED, result.stderr
  assert 'SIGTERM, and 3 s later still' in result.stderr
  assert time.monotonic() - begun < ENDS


@pytest.mark.parametrize(
  'begin, body, message',
  [
    ('pass', 'a wait', 'SIGTERM, with nothing to save'),
    ('processes.heed_by_poll()', 'a computation', '3 s later still'),
  ],
)
def test_a_sigterm_in_cpp_ends_all_processes(begin, body, message):
  codes, _, errors, seconds = together(
    'with processes.heed_sigterm(grace=3.0):\n'
    f'    {begin}\n'
    f'    {COMPILED}\n'
    '    if index == 0: processes.agreed(1); time.sleep(100)\n'
    '    processes.agreed(1)\n'
    '    import signal, threading\n'
    '    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n'
    f'    {IN_C[body]}\n'
  )
  assert codes == [processes.PREEMPTED] * 2, errors
  assert message in errors[0] and message in errors[1]
  assert seconds < ENDS


def test_the_others_stop_at_once_whatever_the_one_with_the_sigterm_computes():
  codes, outs, errors, _ = together(
    'with processes.heed_sigterm(grace=8.0):\n'
    '    processes.heed_by_poll()\n'
    f'    {COMPILED}\n'
    '    processes.wait("both")\n'
    '    import signal, threading\n'
    '    if index:\n'
    '      threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n'
    f'      {IN_C["a computation"]}\n'
    '    for number in range(10_000):\n'
    '      processes.poll(); print(number, flush=True); time.sleep(0.1)\n'
  )
  assert codes == [processes.PREEMPTED] * 2, errors
  # Of the 9 s until the end it went on for some of the first 5.
  assert 5 < int(outs[0].split()[-1]) < 85


@pytest.mark.parametrize('what, left', [('save', []), ('step', [75])])
def test_a_last_save_may_take_longer_than_the_grace(
  tmp_path, monkeypatch, what, left
):
  seen = []
  monkeypatch.setattr(processes, '_STOP', processes._Stop())
  monkeypatch.setattr(processes, '_leave', seen.append)
  monkeypatch.setattr(
    checkpoint.Checkpoints, '_finish', lambda _: time.sleep(0.8)
  )
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  with processes.heed_sigterm(grace=0.2):
    processes.heed_by_poll()
    os.kill(os.getpid(), signal.SIGTERM)
    if what == 'save':
      with processes.saving():
        checkpoints.close()
      assert not processes._STOP.back.is_set()  # for what comes after it
    else:
      checkpoints.latest()
      checkpoints.close()
  assert seen == left


@pytest.mark.parametrize(
  'error, message',
  [
    (jax.errors.JaxRuntimeError('UNAVAILABLE: gone\nmore'), 'lost the others'),
    (TypeError('no text'), "cannot watch the others (TypeError('no text'))"),
  ],
)
def test_a_process_that_cannot_watch_the_others_says_so_and_ends(
  monkeypatch, error, message
):
  seen = []
  monkeypatch.setattr(processes, '_leave', seen.append)
  monkeypatch.setattr(processes, 'say', seen.append)

  def broken(*_, **__):
    raise error

  client = types.SimpleNamespace(key_value_set=broken)
  group = types.SimpleNamespace(client=client, index=1, count=2)
  processes._Watch(group)._run()
  assert f'process 1 {message}' in seen[0] and seen[1:] == [1]


@pytest.mark.slow  # a minute of waiting
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_those_that_wait_within_a_minute(victim):
  codes, _, errors, seconds = together(
    'time.sleep(3)\n'
    f'  if index == {victim}: os.kill(os.getpid(), 9)\n'
    '  processes.wait("for ever")\n'
  )
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
  assert seconds < ENDS
  if victim:
    assert 'process 1 gave no sign of life for 30 s' in errors[0]
  else:  # the store died with it
    assert 'lost' in errors[1] or 'coordination service' in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_process_killed_in_training_ends_the_others(tmp_path, victim):
  workdir = tmp_path / 'run'
  changes = CHANGES | {'num_steps': 10_000, 'eval.every': 0}
  started = launch(2, ['train', *options(tmp_path, workdir, changes)])
  wait_for(workdir, 3, started)
  started[victim].kill()
  begun = time.monotonic()
  codes, _, errors = outcome(started)
  assert time.monotonic() - begun < ENDS
  assert codes[1 - victim] not in (0, None)
  assert 'dpo-jax:' in errors[1 - victim] or 'died' in errors[1 - victim]


@pytest.mark.parametrize(
  'verb, more, message',
  [
    ('prepare', (), 'prepare runs as one process'),
    ('train', ('--start_timeout=3',), 'waited 3 s for process 0 and gave up'),
  ],
)
def test_one_of_two_alone_ends_in_one_clear_line(tmp_path, verb, more, message):
  worlds.debug_config(tmp_path)
  result = subprocess.run(
    [
      *(sys.executable, '-m', 'dpo_jax.main', verb),
      *options(tmp_path, tmp_path / 'run', {}),
      f'--coordinator=127.0.0.1:{free_port()}',
      *('--num_processes=2', '--process_id=1', *more),
    ],
    env=environment(1),
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert message in result.stderr and 'Traceback' not in result.stderr
