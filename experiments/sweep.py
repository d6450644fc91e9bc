"""Any config over a grid of overrides: all runs, their table and their plots.

    python -m experiments.sweep --config=configs/preference.py:data=jsonl \
        --workdir=runs/sweep data.source=pairs.jsonl \
        loss=dpo,ipo_sum,kto beta=0.05,0.1,0.5 seed=0,1,2

NAME=VALUE,VALUE,... is a dimension of the grid, NAME=VALUE a constant; a comma
within brackets is part of a value. NAME is an argument behind the colon of
--config (loss), a config's key (optim.lr), or the end of just one of its keys:
beta is loss.dpo.beta where the loss is dpo. All that is wrong and needs no
data, no model and no file to be seen is listed before anything runs.

    WORKDIR/loss=dpo,beta=0.05,seed=0/    a run, of the values that vary
        log.txt, job.json                 what it said; its values and seconds
    WORKDIR/sweep.csv                     a line a job
    WORKDIR/table.md                      means and standard errors over seeds
    WORKDIR/by_beta.png                   the same against a number that varies

Jobs run one after the other, each in a process of its own: that gives all its
memory back, may crash without the others, and runs the very command that
--print shows for a scheduler elsewhere. What is finished is skipped, what was
interrupted goes on, what failed is tried again by the next call. Exit status:
0, 1 if a job failed, 2 if the grid is wrong, 75 after a SIGTERM.
"""

import argparse
import contextlib
import glob
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import types

from dpo_jax import processes
from dpo_jax import workdirs
from experiments import grids
from experiments import sweep_results

# In front of a verb: of the jobs here, and of those that are printed.
PROGRAM = (sys.executable, '-m', 'dpo_jax.main')
PRINTED = ('dpo-jax',)


def command(job, workdir, *, program):
  """Returns the command line of a job as a list."""
  folder = os.path.join(workdir, job.name)
  return [*program, job.verb, *job.arguments, f'--workdir={folder}']


def run(jobs, workdir):
  """Runs what is not finished, in order; returns the exit status."""
  todo = []
  for number, job in enumerate(jobs, start=1):
    if workdirs.finished(os.path.join(workdir, job.name)):
      print(f'job {number} of {len(jobs)}: {job.name}: is finished')
    else:
      todo.append((number, job))
  failed, spent = [], []
  with workdirs.held(workdir), _heeding() as state:
    for place, (number, job) in enumerate(todo):
      head = f'job {number} of {len(jobs)}: {job.name}:'
      if not state.stopped:
        print(head, 'runs', flush=True)
        status, seconds = _run_job(job, workdir, state)
      if state.stopped:
        print('sweep: stopped by a SIGTERM; start it again to go on')
        return processes.PREEMPTED
      spent.append(seconds)
      left = sum(spent) / len(spent) * (len(todo) - place - 1)
      text = 'finished' if status == 0 else f'FAILED ({status})'
      text += f' in {_clock(seconds)}; about {_clock(left)} left'
      if status != 0:
        failed.append(job)
        text += f'\n  {_last_line(workdir, job)}'
      print(head, text, flush=True)
  if failed:
    print(f'sweep: {len(failed)} of {len(jobs)} jobs failed; see their log.txt')
  return 1 if failed else 0


def _run_job(job, workdir, state):
  """Runs one; returns (exit status, seconds). Sets `state.stopped`."""
  folder = os.path.join(workdir, job.name)
  os.makedirs(folder, exist_ok=True)
  noted = {'seconds': 0.0} | sweep_results.read_job(folder)
  noted |= {'values': job.values, 'status': None}  # it runs
  path = os.path.join(folder, sweep_results.JOB)
  workdirs.write(path, json.dumps(noted))
  begun = time.monotonic()
  with open(os.path.join(folder, 'log.txt'), 'a') as log:
    state.child = subprocess.Popen(
      command(job, workdir, program=PROGRAM), stdout=log, stderr=log
    )
    if state.stopped:  # while it was started
      state.child.terminate()
    try:
      status = state.child.wait()
    finally:  # Ctrl-C reaches it too
      state.child.wait()
      state.child = None
  # Whoever stops a job from outside means the sweep.
  if status in sweep_results.STOPPED:
    state.stopped = True
  elif status == 0 and not workdirs.finished(folder):
    status = 1
  seconds = time.monotonic() - begun
  noted |= {'seconds': noted['seconds'] + seconds, 'status': status}
  workdirs.write(path, json.dumps(noted))
  return status, seconds


@contextlib.contextmanager
def _heeding():
  """Within, a SIGTERM goes to the job that runs, and is noted."""
  state = types.SimpleNamespace(child=None, stopped=False)

  def heed(*_):
    state.stopped = True
    if state.child:
      state.child.terminate()

  before = signal.signal(signal.SIGTERM, heed)
  try:
    yield state
  finally:
    signal.signal(signal.SIGTERM, before)


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02} min' if hours else f'{minutes}:{seconds:02}'


def _last_line(workdir, job):
  path = pathlib.Path(workdir, job.name, 'log.txt')
  lines = path.read_text(errors='replace').split('\n')
  return next((line for line in reversed(lines) if line.strip()), '(no log)')


def stored(workdir):
  """Returns {name: values} of the jobs that were begun in a workdir."""
  pattern = os.path.join(glob.escape(workdir), '*', sweep_results.JOB)
  folders = sorted(map(os.path.dirname, glob.glob(pattern)))
  return {
    os.path.basename(folder): sweep_results.read_job(folder)['values']
    for folder in folders
  }


def parse(argv):
  """Returns the options of the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('grid', nargs='*', metavar='NAME=VALUE[,VALUE...]')
  add('--config', default='', help='file, with arguments behind a colon')
  add('--workdir', required=True, help='folder of all runs')
  add('--verb', choices=grids.VERBS, help='default: the one of the config')
  add('--print', action='store_true', help='a command a job; run nothing')
  add('--collect', action='store_true', help='table and plots; run nothing')
  add('--over', default='seed', help='what means and errors are over')
  add(
    '--metrics',
    default='',
    help='NAME, change:NAME (since the first measurement) or first:NAME,'
    ' separated by commas',
  )
  add('--at', default='last', help='last, best:max:NAME or best:min:NAME')
  return parser.parse_intermixed_args(argv)


def main(argv=None):
  """Runs the command line; returns the exit status."""
  options = parse(argv)
  jobs, problems = [], []
  if options.config:
    jobs, problems = grids.expand(
      options.config, options.grid, verb=options.verb
    )
    problems += grids.strangers(jobs, options.workdir)
  elif options.grid or not options.collect:
    problems.append('give a --config; only --collect does without, and no grid')
  known = stored(options.workdir) | {job.name: job.values for job in jobs}
  if options.over != 'seed' and all(
    options.over not in v for v in known.values()
  ):
    problems.append(f'--over={options.over}: no job has a value of that name')
  view = None
  try:
    view = sweep_results.View(
      metrics=[m for m in options.metrics.split(',') if m],
      at=options.at,
      over=options.over,
    )
  except ValueError as error:
    problems.append(str(error))
  if problems:
    print('\n'.join(problems), file=sys.stderr)
    print(f'sweep: {len(problems)} problems, nothing was run', file=sys.stderr)
    return 2
  if options.print:
    for job in jobs:
      if not workdirs.finished(os.path.join(options.workdir, job.name)):
        print(shlex.join(command(job, options.workdir, program=PRINTED)))
    return 0
  status = 0
  try:
    if not options.collect:
      status = run(jobs, options.workdir)
    if status != processes.PREEMPTED:
      print(sweep_results.collect(options.workdir, known, view))
  except ValueError as error:
    print(f'sweep: {error}', file=sys.stderr)
    return 1
  return status


if __name__ == '__main__':
  sys.exit(main())
