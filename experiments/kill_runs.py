"""Kills a run again and again, and compares its end with that of a whole one.

    python experiments/kill_runs.py --kills 30 --seed 0

A small run (random weights, eight simulated devices) is started, gets a SIGKILL
or a SIGTERM after a random time, is started again, and so on; after the last
kill it may end. Its final parameters, optimizer state and metrics must then be
those of a run that nobody killed, to the last bit. A SIGTERM must end in the
exit status of a preemption, or, before Python has begun, in its own. Prints one
line a start and a summary as JSON.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
# What a clock decides.
TIMED = (
  'step_seconds',
  'pairs_per_second',
  'tokens_per_second',
  'slot_tokens_per_second',
  'mfu',
)


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
    'checkpoint.every': 3,
    'eval.every': 5,
    'data.source': folder / 'pairs.jsonl',
    'data.cache_dir': folder / 'data',
    'data.row_length': 128,
  }
  if 'cached' in arg:
    values['reference.cache_dir'] = folder / 'reference'
  return [
    *(sys.executable, '-m', 'dpo_jax.main', 'train'),
    f'--config=configs/preference.py:data=jsonl,debug,optim=adamw,{arg}',
    *(f'--config.{name}={value}' for name, value in values.items()),
    f'--workdir={workdir}',
  ]


def start(arguments, devices, log):
  """Starts the run in a process of its own."""
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  env['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    arguments, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
  )


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
  """Returns the digests of all arrays of the newest checkpoint."""
  newest = saved_steps(workdir)[-1]
  path = workdir / 'checkpoints' / str(newest) / 'manifest' / 'metadata'
  return newest, json.loads(path.read_text())['items']


def kill_run(folder, *, kills, seed, steps, devices, arg, longest, log=None):
  """Runs it whole and with kills; returns the account, or raises.

  Args:
    folder: to work in.
    kills: signals sent to living processes.
    seed: of the kinds of signals and their moments.
    steps: of the run.
    devices: simulated.
    arg: behind the colon of --config.
    longest: seconds a process may live before its signal, which also comes
      when it is so far that too few steps are left for the next ones.
    log: file that the processes write to.
  """
  draw, log = random.Random(seed), log or subprocess.DEVNULL
  whole, killed = folder / 'whole', folder / 'killed'
  write_pairs(folder / 'pairs.jsonl')
  begun = time.monotonic()
  arguments = command(folder, whole, steps=steps, arg=arg)
  if start(arguments, devices, log).wait():
    raise RuntimeError('the run that nobody kills fails')
  seconds = time.monotonic() - begun

  arguments = command(folder, killed, steps=steps, arg=arg)
  sent, ends = collections.Counter(), collections.Counter()
  slowest = 0.0
  while sum(sent.values()) < kills:
    kind = draw.choice((signal.SIGKILL, signal.SIGTERM))
    # From the first instruction on: set-up is killed too.
    process, wait = start(arguments, devices, log), draw.uniform(0, longest)
    # So that steps are left for the kills that are to come.
    limit = steps * (1 + sum(sent.values())) // (kills + 1)
    asked = time.monotonic()
    while time.monotonic() < asked + wait and last_step(killed) < limit:
      if process.poll() is not None:
        raise RuntimeError(f'it ended by itself, status {process.returncode}')
      time.sleep(0.05)
    wait, asked = time.monotonic() - asked, time.monotonic()
    process.send_signal(kind)
    status = process.wait()
    took = time.monotonic() - asked
    sent[kind.name] += 1
    ends[status] += 1
    slowest = max(slowest, took)
    print(
      f'{sum(sent.values())}: {kind.name} after {wait:.1f} s, status {status}'
      f' in {took:.1f} s, checkpoints {saved_steps(killed)}',
      flush=True,
    )
    # -15: Python was not yet so far that it heeds a SIGTERM.
    allowed = (75, -15) if kind == signal.SIGTERM else (-9,)
    if status not in allowed:
      raise RuntimeError(f'{kind.name} ended in status {status}')
  if start(arguments, devices, log).wait():
    raise RuntimeError('the run cannot go on after the last kill')

  for name in ('metrics.jsonl', 'samples.jsonl'):
    if records(killed, name) != records(whole, name):
      raise RuntimeError(f'{name} differs from that of the run nobody killed')
  if arrays(killed) != arrays(whole):
    raise RuntimeError('the final state differs from that of the whole run')
  return {
    'kills': dict(sent),
    'statuses': dict(ends),
    'seed': seed,
    'steps': steps,
    'devices': devices,
    'arg': arg,
    'slowest_end_seconds': round(slowest, 2),
    'whole_run_seconds': round(seconds, 1),
    'seconds': round(time.monotonic() - begun, 1),
    'equal': True,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--longest', type=float, default=40.0)
  parser.add_argument('--arg', default='reference=frozen')
  parser.add_argument('--log', help='file for what the runs print')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    log = open(flags.log, 'w') if flags.log else None
    account = kill_run(
      pathlib.Path(folder),
      kills=flags.kills,
      seed=flags.seed,
      steps=flags.steps,
      devices=flags.devices,
      arg=flags.arg,
      longest=flags.longest,
      log=log,
    )
  print(json.dumps(account))


if __name__ == '__main__':
  main()
