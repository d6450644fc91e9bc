"""Sweeps: literal jobs of grids, what is run again, and numbers by hand."""

import csv
import json
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import matplotlib.figure
import pytest

from dpo_jax import workdirs
from experiments import grids
from experiments import sweep
from experiments import sweep_results
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = 'configs/preference.py:data=hh,debug'


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))


# --- Grids --------------------------------------------------------------------


def test_a_grid_is_its_jobs():
  entries = ['loss=dpo,kto', 'beta=0.05,0.5', 'data.source=a b.jsonl']
  jobs, problems = grids.expand(CONFIG, entries)
  assert problems == []
  assert [(job.name, job.verb, job.arguments) for job in jobs] == [
    (
      f'loss={loss},beta={beta}',
      'train',
      (
        f'--config=configs/preference.py:data=hh,debug,loss={loss}',
        f'--config.loss.{loss}.beta={beta}',
        '--config.data.source=a b.jsonl',
      ),
    )
    for loss in ('dpo', 'kto')
    for beta in ('0.05', '0.5')
  ]
  last = jobs[-1]
  assert last.values == {
    'loss': 'kto',
    'beta': '0.5',
    'data.source': 'a b.jsonl',
  }
  assert last.config['loss']['kto']['beta'] == 0.5
  assert last.config['data']['form'] == 'unpaired'  # what the loss needs
  assert last.config['data']['source'] == 'a b.jsonl'


def test_values_are_read_by_the_type_of_their_key():
  entries = ['optim.lr=1', 'num_steps=3', 'epochs=0']
  entries += ["judges=('vader','rule:digits'),()"]
  entries += ['debug=false,true', 'data=tldr']
  jobs, problems = grids.expand(CONFIG, entries)
  assert problems == []
  assert [job.config['eval']['samples']['judges'] for job in jobs] == [
    *(('vader', 'rule:digits'),) * 2,
    *((),) * 2,
  ]
  lr = jobs[0].config['optim']['lr']
  assert (lr, type(lr)) == (1.0, float)
  # Behind the colon what the grid sets replaces what stands there.
  assert [job.arguments[0].partition(':')[2] for job in jobs[:2]] == [
    'data=tldr',
    'debug,data=tldr',
  ]
  # Only what varies is in the name, in letters that need no quotes.
  judges = '%28%27vader%27%2C%27rule%3Adigits%27%29'
  assert jobs[0].name == f'judges={judges},debug=false'
  assert shlex.quote(jobs[0].name) == jobs[0].name


@pytest.mark.parametrize(
  'text, values',
  [
    ('1,2', ['1', '2']),
    ('(1,(2,3)),4', ['(1,(2,3))', '4']),
    ('((1,2),3),[{4,5},6],', ['((1,2),3)', '[{4,5},6]', '']),
    ('a),b,:(,c', ['a)', 'b', ':(,c']),  # what is never closed goes on
  ],
)
def test_commas_within_brackets_are_kept(text, values):
  problems = []
  assert grids.read([f'x={text}'], problems) == {'x': values}
  assert problems == []


@pytest.mark.parametrize(
  'config, verb',
  [('ppo', 'ppo'), ('quickstart', 'online'), ('sft', 'train')],
)
def test_the_verb_is_that_of_the_config(config, verb):
  (job,), problems = grids.expand(f'configs/{config}.py:debug', ['seed=1'])
  assert (job.verb, job.name, problems) == (verb, 'run', [])


def test_all_problems_are_listed_at_once(tmp_path, capsys):
  entries = ['loss=dpo,sft,ipo_sam', 'beta=0.1,x', 'optim.lrr=1', 'every=2']
  entries += ['seed=0,0', 'seed=1', 'accumulate=3', 'eval=1', 'five']
  status = run(tmp_path, *entries, '--at=beast', '--over=sed', config=CONFIG)
  out = capsys.readouterr()
  assert (status, out.out, os.listdir(tmp_path)) == (2, '', [])
  *lines, last = out.err.splitlines()
  expected = [
    'seed=0 stands twice; duplicate jobs',
    'seed stands twice; give all its values at once',
    "'five' is no NAME=VALUE[,VALUE...]",
    "beta=x: could not convert string to float: 'x' (with loss=dpo)",
    'optim.lrr is no key of the config; did you mean optim.lr',
    'every may be checkpoint.every, eval.every; say which',
    'eval is a section; name one of eval.batch_size, ',
    'beta is no key of the config; did you mean ',
    "unknown loss 'ipo_sam'; did you mean 'ipo_sum'?",
    'batch_size 8 is not divisible by the 1 devices',
    '--over=sed: no job has a value of that name',
    '--at=beast: use last, best:max:NAME or best:min:NAME',
  ]
  assert last == f'sweep: {len(expected)} problems, nothing was run'
  for line in expected:
    assert sum(found.startswith(line) for found in lines) == 1, (line, lines)
  assert len(lines) == len(expected)


@pytest.mark.parametrize(
  'config, entries, message',
  [
    (CONFIG, ['beta=0.1,0.10'], 'beta=0.10 is the same run as beta=0.1'),
    (CONFIG, ['beta=1', 'dpo.beta=1'], 'dpo.beta sets loss.dpo.beta, which'),
    (CONFIG, ['beta=-1'], 'beta'),
    (CONFIG, ['debug=maybe'], 'debug=maybe: use true or false'),
    (CONFIG, [f'data.source={"a" * 200},b'], 'names too long for a folder'),
    ('configs/nowhere.py', ['seed=1'], "'configs/nowhere.py' is no config"),
    ('configs/common.py', ['seed=1'], "'configs/common.py' is no config"),
    ('configs/ppo.py:debug', ['ppo.epochs=0'], 'ppo.epochs is 0'),
    ('configs/quickstart.py:debug', ['dpo.link=x'], "unknown link 'x'"),
  ],
)
def test_what_cannot_run_is_refused(config, entries, message):
  _, (problem,) = grids.expand(config, entries)
  assert message in problem


OPENINGS = 'configs/quickstart.py:debug'
ON_POLICY = 'configs/ppo.py:debug'


@pytest.mark.parametrize(
  'config, entry, message',
  [
    (CONFIG, 'optim.name=adam', "did you mean 'adamw'"),
    (CONFIG, 'optim.schedule=step', "optim.schedule is 'step'"),
    (CONFIG, 'model.dtype=float33', 'model.dtype'),
    (CONFIG, 'model.remat=all', 'model.remat'),
    (CONFIG, 'data.task=hhh', "did you mean 'hh'"),
    (CONFIG, "data.subsets=('harmless',)", "did you mean 'harmless-base'"),
    (CONFIG, 'data=jsonl', 'jsonl has no official files'),
    (CONFIG, 'data.form=rankings', 'the losses learn from pairs'),
    (CONFIG, 'data.held_out=1.0', 'held_out 1.0 must lie in'),
    (CONFIG, 'checkpoint.keep=0', 'keep at least 1'),
    (CONFIG, 'checkpoint.best=loss', 'write min:NAME or max:NAME'),
    (CONFIG, 'epochs=1.0', 'set one of num_steps and epochs'),
    (CONFIG, 'logps_chunk=0', 'use 1 or more'),
    (CONFIG, 'samples.reward=vadr', "did you mean 'vader'"),
    (CONFIG, "judges=('vadr',)", "did you mean 'vader'"),
    (CONFIG, 'ranker=length', 'samples_per_prompt is 1'),
    (CONFIG, 'samples.cost=digts', "did you mean 'digits'"),
    (CONFIG, 'adapter.kind=lora', 'behind the colon'),
    (ON_POLICY, 'reward.name=vadr', "did you mean 'vader'"),
    (ON_POLICY, 'reward.name=python:nodot', 'write python:MODULE.FUNCTION'),
    (ON_POLICY, 'reward.name=model:X@nonsense', 'is no checkpoint'),
    (ON_POLICY, 'reward.normalize=x', 'unknown reward.normalize'),
    (ON_POLICY, 'kl.estimator=k2', 'unknown kl.estimator'),
    (ON_POLICY, 'kl.coef=-1', 'kl.coef is -1.0; use 0 or more'),
    (ON_POLICY, 'ppo.clip=-1', 'ppo.clip is -1.0'),
    (ON_POLICY, 'ppo.lam=7', 'ppo.lam is 7.0'),
    (ON_POLICY, 'rollout.batch_size=0', 'rollout.batch_size is 0'),
    (ON_POLICY, 'optim.name=adam', "did you mean 'adamw'"),
    (ON_POLICY, 'data.task=prompt', "did you mean 'prompts'"),
    (OPENINGS, 'rounds=0', 'rounds is 0'),
    (OPENINGS, 'reward=vadr', "did you mean 'vader'"),
    (OPENINGS, 'optim.name=adam', "did you mean 'adamw'"),
    (OPENINGS, 'constraint.name=digits', 'use configs/constrained.py'),
  ],
)
def test_what_needs_no_data_is_refused_before_anything_runs(
  config, entry, message
):
  _, (problem,) = grids.expand(config, [entry])
  assert message in problem


def test_all_that_is_wrong_with_a_job_is_listed():
  entries = ['kl.coef=-1,0.1', 'ppo.lam=7', 'optim.name=adam']
  _, problems = grids.expand(ON_POLICY, entries)
  assert problems == [
    "unknown optimizer 'adam'; did you mean 'adamw'? There are adamw, rmsprop"
    ' (with kl.coef=-1 and 1 more)',
    'kl.coef is -1.0; use 0 or more (with kl.coef=-1)',
    'ppo.lam is 7.0; use a number from 0 to 1 (with kl.coef=-1 and 1 more)',
  ]


def test_planning_starts_no_device():
  code = (
    'from experiments import grids; print(len(grids.expand("configs/ppo.py",'
    ' ["kl.target=3,6"])[0]), grids.expand("configs/sft.py", [])[1])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'JAX_PLATFORMS': 'nowhere'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout == '2 []\n'


# --- Running ------------------------------------------------------------------

# A job that takes no time: logs what depends on its arguments, and does what
# the file `orders` beside the workdirs says for its seed.
FAKE = """
import json, os, pathlib, signal, sys, time
arguments = dict(a.split('=', 1) for a in sys.argv[2:])
workdir = pathlib.Path(arguments['--workdir'])
orders = json.loads((workdir.parent / 'orders').read_text())
order = orders.get(arguments['--config.seed'], '')
with open(workdir.parent / 'ran', 'a') as f:
  f.write(workdir.name + chr(10))
if order == 'wait':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  os.kill(os.getppid(), signal.SIGTERM)
  time.sleep(60)
if order == 'fail':
  sys.exit('dpo-jax: the loss is nan')
beta = float(arguments['--config.loss.dpo.beta'])
with open(workdir / 'metrics.jsonl', 'w') as f:
  for step in (0, 4):
    loss = 2.0 - step * beta + int(arguments['--config.seed'])
    f.write(json.dumps({'step': step, 'heldout/loss': loss}) + chr(10))
(workdir / 'finished').touch()
"""
GRID = ('loss=dpo', 'beta=0.25,0.5', 'seed=0,1')


@pytest.fixture
def orders(tmp_path, monkeypatch):
  """Makes jobs fakes; called with {seed: order}, returns which have run."""
  (tmp_path / 'fake.py').write_text(FAKE)
  (tmp_path / 'sweep').mkdir()
  program = (sys.executable, str(tmp_path / 'fake.py'))
  monkeypatch.setattr(sweep, 'PROGRAM', program)

  def give(**values):
    ran = tmp_path / 'sweep' / 'ran'
    names = ran.read_text().split() if ran.exists() else []
    ran.write_text('')
    seeds = {name.removeprefix('seed'): x for name, x in values.items()}
    (tmp_path / 'sweep' / 'orders').write_text(json.dumps(seeds))
    return names

  return give


def run(folder, *more, config=CONFIG):
  return sweep.main([f'--config={config}', f'--workdir={folder}', *more])


def name(beta, seed):
  return f'beta={beta},seed={seed}'


ALL = [name(beta, seed) for beta in (0.25, 0.5) for seed in (0, 1)]


def test_failures_are_noted_and_tried_again_and_the_finished_skipped(
  tmp_path, orders, capsys
):
  orders(seed1='fail')
  folder = tmp_path / 'sweep'
  assert run(folder, *GRID) == 1
  out = capsys.readouterr().out
  assert orders() == ALL  # the rest went on
  assert f'job 2 of 4: {ALL[1]}: FAILED (1)' in out
  assert '  dpo-jax: the loss is nan\n' in out and '2 of 4 jobs failed' in out
  assert status_column(folder) == ['finished', 'failed', 'finished', 'failed']

  assert run(folder, *GRID) == 0
  out = capsys.readouterr().out
  assert orders() == [ALL[1], ALL[3]]
  assert f'job 1 of 4: {ALL[0]}: is finished\n' in out
  assert f'job 4 of 4: {ALL[3]}: finished in 0:00; about 0:00 left' in out
  assert status_column(folder) == ['finished'] * 4
  assert run(folder, *GRID) == 0
  assert orders() == []

  # More seeds later: the new ones run, and the table has all.
  assert run(folder, 'loss=dpo', 'beta=0.25,0.5', 'seed=2,3') == 0
  assert len(orders()) == 4
  assert status_column(folder) == ['finished'] * 8


def status_column(folder):
  with open(folder / 'sweep.csv') as f:
    return [row['status'] for row in csv.DictReader(f)]


def test_a_sigterm_stops_the_job_and_the_sweep_which_goes_on(
  tmp_path, orders, capsys
):
  orders(seed1='wait')  # its job sends the sweep a SIGTERM
  folder = tmp_path / 'sweep'
  before = signal.getsignal(signal.SIGTERM)
  assert run(folder, *GRID) == 75
  assert signal.getsignal(signal.SIGTERM) is before
  assert 'start it again to go on' in capsys.readouterr().out
  assert orders() == ALL[:2] and not (folder / 'sweep.csv').exists()
  assert run(folder, *GRID, '--collect') == 0
  expected = ['finished', 'unfinished', 'not begun', 'not begun']
  assert status_column(folder) == expected
  assert run(folder, *GRID) == 0
  assert orders() == ALL[1:]


def test_a_folder_with_another_config_is_a_problem(tmp_path, capsys):
  (job,), _ = grids.expand(CONFIG, ['seed=1'])
  (tmp_path / 'run').mkdir()
  config = json.dumps(job.config)
  (tmp_path / 'run' / 'config.json').write_text(config)
  assert run(tmp_path, 'seed=1', '--print') == 0
  assert run(tmp_path, 'seed=2', '--print') == 2
  assert 'another config (seed: 1 -> 2)' in capsys.readouterr().err


def test_two_sweeps_do_not_share_a_workdir(tmp_path, orders, capsys):
  orders()
  folder = str(tmp_path / 'sweep')
  with workdirs.held(folder):
    assert run(folder, *GRID) == 1
  assert 'is in use by another run' in capsys.readouterr().err
  assert orders() == []


def test_printed_commands_parse_back(tmp_path, capsys):
  folder = tmp_path / "it's here"
  entries = ['beta=0.25,0.5', "data.source=a b's.jsonl"]
  assert run(folder, *entries, '--print') == 0
  lines = capsys.readouterr().out.splitlines()
  jobs, _ = grids.expand(CONFIG, entries)
  assert [shlex.split(line) for line in lines] == [
    ['dpo-jax', 'train', *job.arguments, f'--workdir={folder}/{job.name}']
    for job in jobs
  ]
  assert not folder.exists()
  finished = folder / jobs[0].name
  finished.mkdir(parents=True)
  workdirs.finish(str(finished))
  assert run(folder, *entries, '--print') == 0
  assert capsys.readouterr().out.splitlines() == lines[1:]


# --- Collecting ---------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
  """The figures saved during a test: {file name: figure}."""
  saved = {}
  monkeypatch.setattr(
    matplotlib.figure.Figure,
    'savefig',
    lambda figure, path: saved.update({pathlib.Path(path).name: figure}),
  )
  return saved


def fabricate(folder, values, records, *, finished=True):
  """Writes a run as a sweep leaves it, which took 36 s."""
  run = folder / ','.join(f'{k}={v}' for k, v in values.items())
  run.mkdir(parents=True)
  noted = {'values': values, 'seconds': 36.0, 'status': 0}
  (run / 'job.json').write_text(json.dumps(noted))
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  (run / 'metrics.jsonl').write_text(lines)
  if finished:
    workdirs.finish(str(run))


def log(*losses, chosen=(-40.0, -46.0)):
  """Records at steps 0, 5, ...: held-out losses, and what else is measured."""
  out = []
  for number, loss in enumerate(losses):
    step = 5 * number
    out.append({'step': step, 'train/loss': 9.0})
    out.append({'step': step, 'heldout/loss': loss})
    out[-1]['heldout/logps/chosen'] = chosen[0 if not number else 1]
  return out


def collected(folder, *more):
  """Collects; returns (rows of sweep.csv, cells of the table)."""
  assert sweep.main([f'--workdir={folder}', '--collect', *more]) == 0
  with open(folder / 'sweep.csv') as f:
    rows = list(csv.reader(f))
  lines = (folder / 'table.md').read_text().splitlines()
  cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines]
  return rows, [row for row in cells if not row[0].startswith('-')]


def test_means_and_errors_are_those_by_hand(tmp_path, figures, capsys):
  for loss, beta, seed, last in [
    ('dpo', '0.1', '0', 1.0),
    ('dpo', '0.1', '1', 2.0),
    ('dpo', '0.1', '2', 6.0),
    ('dpo', '1', '0', 0.5),
    ('kto', '0.1', '0', 4.0),
  ]:
    values = {'loss': loss, 'beta': beta, 'seed': seed}
    fabricate(tmp_path, values, log(3.0, last))
  values = {'loss': 'kto', 'beta': '0.1', 'seed': '1'}
  fabricate(tmp_path, values, log(3.0, 100.0), finished=False)

  rows, cells = collected(tmp_path)
  assert rows[0] == (
    ['job', 'loss', 'beta', 'seed', 'heldout/loss', 'status', 'step', 'hours']
  )
  assert rows[1] == (
    ['loss=dpo,beta=0.1,seed=0', 'dpo', '0.1', '0', '1.0', 'finished', '5']
    + ['0.01']
  )
  assert rows[-1][-4:-1] == ['100.0', 'unfinished', '5']
  # (1 + 2 + 6) / 3; deviations -2, -1, 3: sqrt(14 / 2 / 3).
  assert math.isclose(math.sqrt(7 / 3), 1.5275, abs_tol=1e-4)
  assert cells == [
    ['loss', 'beta', 'heldout/loss', 'finished'],
    ['dpo', '0.1', '3 ± 1.5', '3 of 3'],
    ['dpo', '1', '0.5', '1 of 1'],
    ['kto', '0.1', '4', '1 of 2'],  # what is unfinished is not averaged
  ]
  assert capsys.readouterr().out.startswith('| loss | beta | heldout/loss')

  assert list(figures) == ['by_beta.png']  # seeds are what errors are over
  (axis,) = figures['by_beta.png'].axes
  assert axis.get_title(loc='left') == 'heldout/loss'
  dpo, kto = axis.containers
  assert (dpo.get_label(), kto.get_label()) == ('loss=dpo', 'loss=kto')
  assert dpo.lines[0].get_xydata().tolist() == [[0.1, 3.0], [1.0, 0.5]]
  assert kto.lines[0].get_xydata().tolist() == [[0.1, 4.0]]
  (low, high), none = [s[:, 1] for s in dpo.lines[2][0].get_segments()]
  bar = 2 * math.sqrt(7 / 3)
  assert (low, high) == pytest.approx((3 - bar, 3 + bar))
  assert none.tolist() == [0.5, 0.5]
  assert axis.get_xscale() == 'log'  # 0.1 to 1


def test_quantities_are_of_the_asked_steps(tmp_path, figures):
  folder = tmp_path
  fabricate(folder, {'seed': '0'}, log(3.0, 1.0, 2.0))
  fabricate(folder, {'seed': '1'}, log(3.0, 2.5, 2.0, chosen=(-40.0, -42.0)))
  quantities = 'heldout/loss,first:heldout/loss,change:heldout/logps/chosen'
  rows, cells = collected(folder, f'--metrics={quantities}')
  assert rows[0][2:5] == quantities.split(',')
  assert [row[2:5] for row in rows[1:]] == [
    ['2.0', '3.0', '-6.0'],
    ['2.0', '3.0', '-2.0'],
  ]
  assert cells[1] == ['2 ± 0', '3 ± 0', '-4 ± 2', '2 of 2']
  best = '--at=best:min:heldout/loss'
  rows, _ = collected(folder, f'--metrics={quantities}', best)
  assert [row[2] for row in rows[1:]] == ['1.0', '2.0']
  assert rows[1][6] == '10'  # the last step, whatever is shown
  assert not figures
  # Over nothing that varies: a row a job.
  _, cells = collected(folder, '--over=seed')
  assert len(cells) == 2
  fabricate(folder / 'other', {'lr': '1', 'seed': '0'}, log(1.0))
  fabricate(folder / 'other', {'lr': '2', 'seed': '1'}, log(1.0, 5.0))
  _, cells = collected(folder / 'other', '--over=lr')
  assert cells[1:] == [['0', '1', '1 of 1'], ['1', '5', '1 of 1']]
  assert list(figures) == ['by_seed.png']


def test_rounds_are_collected_by_their_last(tmp_path):
  for number, loss in [(2, 1.0), (10, 0.25)]:
    train = tmp_path / f'round_{number}' / 'train'
    train.mkdir(parents=True)
    record = {'step': 3, 'heldout/loss': loss}
    (train / 'metrics.jsonl').write_text(json.dumps(record) + '\n')
  assert sweep_results.read_records(str(tmp_path))[0][1]['heldout/loss'] == 0.25


@pytest.mark.parametrize(
  'option, message',
  [
    (
      '--metrics=heldout/los',
      "unknown metric 'heldout/los'; did you mean 'held",
    ),
    ('--at=best:max:accuracy', "unknown metric 'accuracy'; did you mean"),
  ],
)
def test_a_metric_that_no_run_has_is_refused(tmp_path, capsys, option, message):
  fabricate(tmp_path, {'seed': '0'}, log(1.0))
  assert sweep.main([f'--workdir={tmp_path}', '--collect', option]) == 1
  assert message in capsys.readouterr().err


def test_a_workdir_without_jobs_has_nothing_to_collect(tmp_path, capsys):
  assert sweep.main([f'--workdir={tmp_path}', '--collect']) == 1
  assert 'has no jobs' in capsys.readouterr().err
  assert sweep.main([f'--workdir={tmp_path}', 'seed=1', '--collect']) == 2
  assert 'give a --config' in capsys.readouterr().err


# --- All of it ----------------------------------------------------------------


def test_a_sweep_trains_and_shows_what_was_logged(
  tmp_path, monkeypatch, capsys
):
  flags = os.environ['XLA_FLAGS'].replace('_count=8', '_count=1')
  monkeypatch.setenv('XLA_FLAGS', flags)
  source = worlds.write_pairs(tmp_path)
  entries = ['data=jsonl', 'loss=ipo_sum', f'data.source={source}']
  entries += ['num_prompts=0']
  entries += [f'data.cache_dir={tmp_path / "data"}', 'optim.lr=1e-3']
  metric = '--metrics=heldout/loss,change:heldout/logps/chosen'
  folder = tmp_path / 'sweep'
  assert run(folder, *entries, metric) == 0, capsys.readouterr().out
  assert workdirs.finished(folder / 'run')
  assert workdirs.read_config(folder / 'run')['optim']['lr'] == 1e-3
  (zero, first), *_, (two, last) = sweep_results.read_records(folder / 'run')
  assert (zero, two) == (0, 2)
  # The paper's loss where policy and reference are one: (1 / (2 beta))^2.
  assert first['heldout/loss'] == pytest.approx(25.0, rel=1e-4)
  with open(folder / 'sweep.csv') as f:
    (row,) = csv.DictReader(f)
  moved = last['heldout/logps/chosen'] - first['heldout/logps/chosen']
  assert float(row['heldout/loss']) == last['heldout/loss']
  assert float(row['change:heldout/logps/chosen']) == moved != 0
  assert (row['status'], row['step']) == ('finished', '2')
  assert run(folder, *entries) == 0
  assert 'job 1 of 1: run: is finished' in capsys.readouterr().out
