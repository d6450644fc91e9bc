"""Kills a run again and again, and compares its end with that of a whole one.

    python experiments/kill_runs.py --kills 30 --seed 1
    python experiments/kill_runs.py --kills 8 --seed 1 --processes 2

A small run (random weights, eight simulated devices) is started, gets a SIGKILL
or a SIGTERM at a random moment, is started again, and so on; after the last
kill it may end. Four of five kills come when it has made a step, the others at
any time before. Of several processes one is hit, or all. The final
checkpoint, read without our code, must then hold the same arrays as that of a
run that nobody killed, to the last bit, and metrics and samples must be the
same. A SIGTERM must end in the exit status of a preemption; in its own only
before the process has said that it has begun. Prints one line a kill and a
summary as JSON.
"""

import argparse
import atexit
import collections
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
PREEMPTED = 75
ENDS = 120  # seconds within which all processes end when one has
WHOLE = 1800  # seconds within which the run that nobody kills ends
# What a clock decides.
TIMED = (
  'step_seconds',
  'pairs_per_second',
  'tokens_per_second',
  'slot_tokens_per_second',
  'mfu',
)
IN_TRAINING = 0.8  # share of the kills
MEASURING = ('held-out groups:', 'samples:', 'KL of samples:')


def write_pairs(path, number=40, seed=0):
  """Writes pairs whose better response has more vowels."""
  draw = random.Random(seed)
  with open(path, 'w') as f:
    for i in range(number):
      good, bad = (
        ''.join(draw.choices(letters, k=draw.randint(3, 11)))
        for letters in ('aeiou ', 'bcdfg ')
      )
      row = {'prompt': f'question {i}: ', 'chosen': good, 'rejected': bad}
      f.write(json.dumps(row) + '\n')


def command(folder, workdir, *, steps, arg):
  """Returns the command line of the run."""
  values = {
    'num_steps': steps,
    'optim.lr': 1e-3,
    'log_every': 2,  # so that some are resumed between two records
    'checkpoint.every': 3,
    'eval.every': 5,
    'data.source': folder / 'pairs.jsonl',
    'data.cache_dir': folder / 'data',
    'data.row_length': 128,
    'peak_tflops': 1,  # not measured at every start
  }
  if 'cached' in arg:
    values['reference.cache_dir'] = folder / 'reference'
  return [
    *(sys.executable, '-m', 'dpo_jax.main', 'train'),
    f'--config=configs/preference.py:data=jsonl,debug,optim=adamw,{arg}',
    *(f'--config.{name}={value}' for name, value in values.items()),
    f'--workdir={workdir}',
  ]


class Started:
  """The processes of a run, and what they have said."""

  def __init__(self, arguments, *, number, devices, folder):
    """Starts `number` processes that share `devices`; logs go to `folder`."""
    env = os.environ | {
      'PYTHONPATH': str(ROOT),
      'PYTHONUNBUFFERED': '1',
      'JAX_PLATFORMS': 'cpu',
    }
    each = f'--xla_force_host_platform_device_count={devices // number}'
    env['XLA_FLAGS'] = (
      f'{env.get("XLA_FLAGS", "")} {each}'  # the last one holds
    )
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    self.begun = time.monotonic()
    self.logs = [folder / f'log_{index}' for index in range(number)]
    self.processes = []
    for index, path in enumerate(self.logs):
      more = [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={number}',
        f'--process_id={index}',
        '--start_timeout=90',
      ]
      with open(path, 'w') as log:
        self.processes.append(
          subprocess.Popen(
            [*arguments, *(more if number > 1 else ())],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )

  def seconds(self):
    return time.monotonic() - self.begun

  def has_begun(self, index):
    """Whether a process has said so: from then on it heeds a SIGTERM."""
    first = f'process {index} of' if len(self.logs) > 1 else '{\n'
    return first in self.logs[index].read_text()

  def phase(self, workdir):
    """Says what the run does, as far as can be seen from outside."""
    text = self.logs[0].read_text()
    if not self.has_begun(0):
      return 'imports'
    if len(self.logs) > 1 and f'{len(self.logs)} processes, ' not in text:
      return 'joining'
    if 'compiled for' not in text:
      return 'set-up'
    if list((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*')):
      return 'saving'
    bars = {name: text.rfind(name) for name in ('train:', *MEASURING)}
    newest = max(bars, key=bars.get)
    return 'measuring' if newest in MEASURING else 'training'

  def check_alive(self):
    for process in self.processes:
      if process.poll() is not None:
        raise RuntimeError(f'it ended by itself\n{self.tail()}')

  def check_time(self, limit):
    """Raises `limit` seconds after the start."""
    if self.seconds() > limit:
      self.kill()
      raise RuntimeError(f'it hangs: {limit:.0f} s are over\n{self.tail()}')

  def statuses(self, timeout=ENDS):
    """Waits until all have ended; raises if they do not."""
    until = time.monotonic() + timeout
    try:
      return [
        process.wait(max(0.0, until - time.monotonic()))
        for process in self.processes
      ]
    except subprocess.TimeoutExpired as error:
      text = f'not all have ended after {timeout} s\n{self.tail()}'
      raise RuntimeError(text) from error
    finally:
      self.kill()

  def kill(self):
    for process in self.processes:
      process.kill()

  def tail(self):
    return '\n'.join(path.read_text()[-2000:] for path in self.logs)


def records(workdir, name='metrics.jsonl'):
  """Returns a run's records without what a clock decides."""
  path = workdir / name
  lines = path.read_text().splitlines() if path.exists() else []
  return [
    {k: v for k, v in json.loads(line).items() if k.split('/')[-1] not in TIMED}
    for line in lines
  ]


def last_step(workdir):
  """Returns the newest step in the log, -1 without any."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return json.loads(lines[-1])['step'] if lines else -1


def saved_steps(workdir):
  """Returns the steps of the checkpoints that there are."""
  folder = workdir / 'checkpoints'
  names = os.listdir(folder) if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def arrays(workdir):
  """Returns (step, {name: array}) of the newest checkpoint, by Orbax alone."""
  newest = saved_steps(workdir)[-1]
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  found = {}
  for folder in sorted((workdir / 'checkpoints' / str(newest)).iterdir()):
    if not (folder / '_METADATA').exists():
      continue  # the manifest
    with ocp.PyTreeCheckpointer() as reader:
      tree = reader.metadata(folder).item_metadata.tree
      args = jax.tree.map(lambda _: as_numpy, tree)
      tree = reader.restore(folder, restore_args=args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      found[f'{folder.name}{jax.tree_util.keystr(path)}'] = np.asarray(leaf)
  return newest, found


def check_equal(one, two):
  """Raises unless two runs have left the same, to the last bit."""
  for name in ('metrics.jsonl', 'samples.jsonl'):
    if records(one, name) != records(two, name):
      raise RuntimeError(f'{name} differs from that of the run nobody killed')
  (step, left), (other_step, right) = arrays(one), arrays(two)
  if step != other_step or left.keys() != right.keys() or not left:
    raise RuntimeError('the final checkpoints are not of the same things')
  for name, array in left.items():
    other = right[name]
    same = (array.dtype, array.shape) == (other.dtype, other.shape)
    if not same or array.tobytes() != other.tobytes():
      raise RuntimeError(f'{name} differs from that of the run nobody killed')
  return len(left)


def check_statuses(kind, statuses, hit, *, begun, joined):
  """Raises where a process did not end as it must.

  Args:
    kind: the signal.
    statuses: of all processes.
    hit: numbers of those that got it.
    begun: whether each heeded SIGTERM by then.
    joined: whether they had found each other by then.
  """
  for index, status in enumerate(statuses):
    if index in hit:
      allowed = {-signal.SIGKILL}
      if kind == signal.SIGTERM:
        allowed = {PREEMPTED} if begun[index] else {PREEMPTED, -kind}
    elif kind == signal.SIGTERM and joined and all(begun):
      allowed = {PREEMPTED}
    else:
      allowed = {status} - {0}
    if status not in allowed:
      raise RuntimeError(f'{kind.name} ended process {index} in {status}')


def kill_run(folder, *, kills, seed, steps, devices, number, arg, longest):
  """Runs it whole and with kills; returns the account, or raises.

  Args:
    folder: to work in.
    kills: how often it is hit.
    seed: of the kinds of signals and their moments.
    steps: of the run.
    devices: simulated, of all processes together.
    number: of processes.
    arg: behind the colon of --config.
    longest: seconds after which a run that trains is hit; earlier when it is so
      far that too few steps are left for the next kills.
  """
  draw = random.Random(seed)
  whole, killed = folder / 'whole', folder / 'killed'
  write_pairs(folder / 'pairs.jsonl')

  def start(workdir):
    run = Started(
      command(folder, workdir, steps=steps, arg=arg),
      number=number,
      devices=devices,
      folder=folder,
    )
    atexit.register(run.kill)  # nothing outlives this
    return run

  run = start(whole)
  until_training = None
  while run.processes[0].poll() is None:
    if until_training is None and 'compiled for' in run.logs[0].read_text():
      until_training = run.seconds()
    run.check_time(WHOLE)
    time.sleep(0.05)
  if any(run.statuses()):
    raise RuntimeError(f'the run that nobody kills fails\n{run.tail()}')
  seconds = run.seconds()
  print(
    f'whole: {seconds:.1f} s, {until_training:.1f} s of it until it trained',
    flush=True,
  )

  begun = time.monotonic()
  counts = {
    name: collections.Counter() for name in ('kills', 'statuses', 'phases')
  }
  slowest = 0.0
  for kill in range(1, kills + 1):
    kind = draw.choice((signal.SIGKILL, signal.SIGTERM))
    hit = [draw.randrange(number)] if draw.random() < 0.5 else range(number)
    trains, moment = draw.random() < IN_TRAINING, draw.random()
    before, run = last_step(killed), start(killed)
    if trains:  # not in the evaluation that comes before the first step
      while last_step(killed) <= max(0, before):
        run.check_alive()
        run.check_time(10 * seconds + ENDS)
        time.sleep(0.02)
    wait = moment * (longest if trains else until_training)
    wait += run.seconds() if trains else 0.0
    # So that steps are left for the kills that are to come.
    limit = steps * kill // (kills + 1)
    while run.seconds() < wait and last_step(killed) < limit:
      run.check_alive()
      time.sleep(0.02)
    phase, wait = run.phase(killed), run.seconds()
    joined = number > 1 and phase not in ('imports', 'joining')
    heeds = [run.has_begun(index) for index in range(number)]
    asked = time.monotonic()
    for index in hit:
      run.processes[index].send_signal(kind)
    statuses = run.statuses()
    took = time.monotonic() - asked
    if kind == signal.SIGTERM and all(heeds):
      slowest = max(slowest, took)
    counts['kills'][kind.name] += 1
    counts['phases'][phase] += 1
    counts['statuses'].update(statuses)
    print(
      f'{kill}: {kind.name} to {[*hit]} in {phase}, after {wait:.1f} s; status'
      f' {statuses} in {took:.1f} s; checkpoints {saved_steps(killed)}',
      flush=True,
    )
    try:
      check_statuses(kind, statuses, hit, begun=heeds, joined=joined)
    except RuntimeError as error:
      raise RuntimeError(f'{error}\n{run.tail()}') from error
  run = start(killed)
  if any(run.statuses(timeout=ENDS + 4 * seconds)):
    raise RuntimeError(f'it cannot go on after the last kill\n{run.tail()}')
  return {
    **{name: dict(count) for name, count in counts.items()},
    'seed': seed,
    'steps': steps,
    'processes': number,
    'devices': devices,
    'arg': arg,
    'slowest_sigterm_seconds': round(slowest, 1),
    'whole_run_seconds': round(seconds, 1),
    'killed_run_seconds': round(time.monotonic() - begun, 1),
    'arrays_equal': check_equal(killed, whole),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=30)
  parser.add_argument('--seed', type=int, default=1)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--longest', type=float, default=8.0)
  parser.add_argument('--arg', default='reference=frozen')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    account = kill_run(
      pathlib.Path(folder),
      kills=flags.kills,
      seed=flags.seed,
      steps=flags.steps,
      devices=flags.devices,
      number=flags.processes,
      arg=flags.arg,
      longest=flags.longest,
    )
  print(json.dumps(account))


if __name__ == '__main__':
  main()
