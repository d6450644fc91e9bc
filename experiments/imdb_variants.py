"""Losses side by side on controlled sentiment, as studies.

  python -m experiments.imdb_variants --imdb=runs/imdb --workdir=runs/variants \
      --study=displacement

All runs of a study begin at the SFT model that `imdb_frontier` made in --imdb,
learn from its pairs and are measured as its runs are; nothing is written there.

  displacement    what becomes of log pi(y_w) on held-out pairs
  length          labels by P(positive) + 0.002 x length in tokens, from a model
                  whose responses end (`imdb_lengths`)
  length_strong   the same with 0.02 x length
  length_none     the same labels without it: what length does by itself
  bakeoff         every method with two learning rates and two strengths

The jobs are those of `sweep`: a process each, what is finished is skipped, the
same command goes on. WORKDIR/STUDY has a folder for each, and the gates, tables
and pictures of `imdb_tables`. --only=dpo,nca runs some of the methods,
--lr=1e-4,3e-4 other learning rates (methods are compared at the first one),
--print shows a command a job and runs none, but makes what they learn from;
--collect makes the tables again.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys

from dpo_jax import names
from dpo_jax import processes
from dpo_jax import workdirs
from experiments import grids
from experiments import imdb_lengths
from experiments import imdb_results
from experiments import imdb_scales
from experiments import imdb_tables
from experiments import sweep

CONFIG = str(pathlib.Path(__file__).parents[1] / 'configs' / 'preference.py')
MISTAKES = (ValueError, FloatingPointError, OSError)


@dataclasses.dataclass(frozen=True)
class Method:
  """A loss with its options.

  loss: behind the colon of the config. key: its strength. strengths: values;
  studies with one run a method take the first. keys: of the config, besides.
  arguments: behind the colon, besides.
  """

  loss: str
  key: str
  strengths: tuple
  keys: dict = dataclasses.field(default_factory=dict)
  arguments: str = ''


_BETAS = (0.1, 0.05)


def _of_dpo(**options):
  """DPO with other options."""
  keys = {f'loss.dpo.{name}': value for name, value in options.items()}
  return Method('dpo', 'beta', _BETAS, keys)


# beta 0.1 wherever a loss has the scale of DPO's, as METHODS are compared at
# one strength; what is of per-token means has its paper's.
METHODS = {
  'dpo': _of_dpo(),
  'ipo': Method('ipo_sum', 'beta', _BETAS),
  # An example is one response, so that twice as many are a batch of pairs.
  'kto': Method('kto', 'beta', _BETAS, {'batch_size': 2}),
  'simpo': Method('simpo', 'beta', (2.0, 5.0)),
  'orpo': Method('orpo', 'alpha', (0.1, 1.0)),
  'cpo': Method('cpo', 'beta', _BETAS),
  'slic': Method('slic', 'delta', (1.0, 5.0)),
  'exo': Method('exo', 'beta', _BETAS),
  'nca': Method('nca', 'beta', _BETAS),
  'bco': Method('bco', 'beta', _BETAS),
  'apo_zero': Method('apo_zero', 'beta', _BETAS),
  'apo_down': Method('apo_down', 'beta', _BETAS),
  'aot': Method('aot', 'beta', _BETAS),
  'discopop': Method('discopop', 'beta', _BETAS),
  'f_dpo': _of_dpo(link='forward_kl'),
  # The upper end of its paper's range.
  'r_dpo': Method('r_dpo', 'beta', _BETAS, {'loss.r_dpo.alpha': 0.05}),
  'ld_dpo': _of_dpo(reduction='ld:0.5'),
  'dpo_norm': Method('dpo_norm', 'beta', (5.0, 2.0)),
  'wpo': _of_dpo(weighting='wpo'),
  # eta is beta / 2, as in the paper.
  'rpo': Method('rpo', 'beta', _BETAS, {'loss.rpo.eta': 0.05}),
  'tdpo2': Method('tdpo2', 'beta', _BETAS),
  # DPO itself, but the forward KL of TDPO is measured.
  'dpo_kls': Method('tdpo2', 'beta', _BETAS, {'loss.tdpo2.alpha': 0.0}),
  'tr_dpo': Method(
    'dpo', 'beta', _BETAS, {'reference.alpha': 0.6}, 'reference=ema'
  ),
}


@dataclasses.dataclass(frozen=True)
class Study:
  """methods: names; slow: those that run at a tenth of the rate too.

  whole: two learning rates and two strengths each. bonus: of the labels, for a
  token; None: the pairs are the frontier's.
  """

  methods: tuple
  slow: tuple = ()
  whole: bool = False
  bonus: float | None = None


_LENGTH = ('dpo', 'r_dpo', 'ld_dpo', 'simpo', 'dpo_norm')
STUDIES = {
  'displacement': Study(
    ('dpo', 'nca', 'apo_zero', 'apo_down', 'rpo', 'orpo', 'cpo'),
    slow=('nca', 'apo_zero'),
  ),
  'length': Study(_LENGTH, bonus=0.002),
  'length_strong': Study(_LENGTH, bonus=0.02),
  'length_none': Study(_LENGTH, bonus=0.0),
  'bakeoff': Study(tuple(m for m in METHODS if m != 'dpo_norm'), whole=True),
}


@dataclasses.dataclass(frozen=True)
class Size:
  """What a scale of `imdb_scales` is here; our choice.

  steps: of a run, in batches of `batch_size` pairs; it is measured before the
  first, `every` so many and after the last. lr: of studies with one. rates: of
  the bake-off. moves: steps between moves of TR-DPO's reference. short: of the
  short SFT model's training.
  """

  steps: int
  every: int
  batch_size: int
  lr: float
  rates: tuple
  moves: int
  short: dict


SIZES = {
  'smoke': Size(
    steps=2,
    every=1,
    batch_size=8,
    lr=1e-3,
    rates=(1e-3, 1e-4),
    moves=1,
    short={'num_steps': 2, 'batch_size': 16, 'optim.lr': 1e-3},
  ),
  's': Size(
    steps=112,
    every=38,
    batch_size=64,
    lr=1e-4,
    rates=(1e-4, 3e-5),
    moves=16,
    short={'num_steps': 150, 'batch_size': 64, 'optim.lr': 5e-4},
  ),
}


# --- Jobs ---------------------------------------------------------------------


def read_scale(paths):
  """Returns (name, scale) of a workdir of `imdb_frontier`."""
  path = paths.root / 'scale.json'
  how = (
    'make it with python -m experiments.imdb_frontier --scale=s'
    f' --workdir={paths.root} --only=pairs'
  )
  if not path.exists():
    raise ValueError(f'{paths.root} is no workdir of imdb_frontier; {how}')
  made = json.loads(path.read_text())
  for name in SIZES:
    scale = imdb_scales.SCALES[name]
    if json.loads(json.dumps(scale.as_data())).items() <= made.items():
      break
  else:
    raise ValueError(f'{path} is of none of the scales {", ".join(SIZES)}')
  needed = [paths.sft / imdb_results.FINISHED, paths.test_prompts]
  needed += [paths.judge, paths.pairs]
  for found in needed:
    if not found.exists():
      raise ValueError(f'{found} is not there; {how}')
  return name, scale


def make_jobs(study, scale, size, paths, *, only=(), rates=()):
  """Returns the jobs of a study.

  Args:
    study: of `STUDIES`.
    scale: of `imdb_scales`.
    size: of `SIZES`.
    paths: `imdb_scales.Paths`.
    only: methods; (): all of the study.
    rates: learning rates; (): those of the size.
  """
  table = {name: METHODS[name] for name in study.methods}
  for name in only:
    names.look_up(table, 'method of this study', name)
  rates = rates or (size.rates if study.whole else (size.lr,))
  jobs = []
  for name, method in table.items():
    if only and name not in only:
      continue
    of_method = rates
    if name in study.slow:
      of_method = (*rates, *(rate / 10 for rate in rates))
    strengths = method.strengths if study.whole else method.strengths[:1]
    jobs += _jobs_of(
      name,
      method,
      imdb_scales.offline_keys(scale, paths, seed=scale.seed)
      | _training(size.steps, size.batch_size, every=size.every),
      rates=of_method,
      strengths=strengths,
      moves=size.moves,
    )
  return jobs


def short_sft_job(scale, size, paths, start):
  """Returns the job of the short SFT model; `start` is the SFT model."""
  keys = imdb_scales.sft_keys(scale, paths) | {'init': str(start)}
  own = dict(size.short)
  keys |= _training(own.pop('num_steps'), own.pop('batch_size'), every=0)
  keys |= own | {'optim.schedule': 'cosine'} | scale.settings['all']
  (job,) = _expand('loss=sft,optim=adamw', _entries(keys))
  return job._replace(name=paths.sft.name, values={'method': paths.sft.name})


def _training(steps, batch_size, *, every):
  """Keys of training and of when it is measured; every 0: at both ends."""
  warm = max(1, steps // 10)
  return {
    'num_steps': steps,
    'epochs': 0.0,
    'batch_size': batch_size,
    'optim.warmup_steps': warm,
    'optim.warmup_init': 1 / (warm + 1),
    'eval.every': every or steps,
    'checkpoint.every': steps,
    'checkpoint.best': '',
  }


def _jobs_of(name, method, keys, *, rates, strengths, moves):
  """Returns a job of a method for each learning rate and strength."""
  own = dict(method.keys)
  keys = dict(keys)
  keys['batch_size'] *= own.pop('batch_size', 1)
  if 'ema' in method.arguments:
    own['reference.every'] = moves
  strength = f'loss.{method.loss}.{method.key}'
  arguments = [f'loss={method.loss}', method.arguments]
  entries = _entries(keys | own)
  entries.append(f'optim.lr={",".join(f"{rate:g}" for rate in rates)}')
  entries.append(f'{strength}={",".join(map(str, strengths))}')
  out = []
  for job in _expand(','.join(filter(None, arguments)), entries):
    values = {
      'method': name,
      'lr': job.values['optim.lr'],
      'strength': job.values[strength],
    }
    folder = grids.job_name(values, values)
    out.append(job._replace(name=folder, values=values))
  return out


def _entries(keys):
  """Returns NAME=VALUE of {key: value}."""
  for name, value in keys.items():
    if isinstance(value, str) and ',' in value:
      raise ValueError(f'{name} is {value!r}; use a path without a comma')
  return [f'{name}={value}' for name, value in keys.items()]


def _expand(arguments, entries):
  """Returns the jobs of a grid, or raises with all that is wrong with it."""
  config = f'{CONFIG}:data=jsonl,model=debug-llama,{arguments}'
  jobs, problems = grids.expand(config, entries, verb='train')
  if problems:
    raise ValueError('; '.join(problems))
  return jobs


# --- Running ------------------------------------------------------------------


def prepare(study, scale, size, paths, folder):
  """Makes what a study learns from: (scale, paths, exit status) of its runs."""
  if study.bonus is None:
    return scale, paths, 0
  scale = imdb_lengths.short_scale(scale)
  short = imdb_lengths.short_paths(paths, folder, study.bonus)
  job = short_sft_job(scale, size, short, paths.sft)
  _refuse_strangers([job], folder)

  def train():
    if workdirs.finished(short.sft):
      return 0
    return sweep.run([job], str(folder))

  status = imdb_lengths.make(
    scale,
    short,
    paths.sft_rows,
    bonus=study.bonus,
    rows=int(1.1 * size.short['num_steps'] * size.short['batch_size']),
    train=train,
  )
  return scale, short, status


def _refuse_strangers(jobs, folder):
  if problems := grids.strangers(jobs, str(folder)):
    raise ValueError('; '.join(problems))


def run(options):
  """Runs a study; returns the exit status."""
  study = names.look_up(STUDIES, 'study', options.study)
  paths = imdb_scales.Paths(options.imdb)
  root = pathlib.Path(options.workdir).expanduser().absolute()
  folder = root / options.study
  name, scale = read_scale(paths)
  size = SIZES[name]
  asked = {
    'only': tuple(filter(None, options.only.split(','))),
    'rates': tuple(float(x) for x in options.lr.split(',') if x),
  }
  make_jobs(study, scale, size, paths, **asked)  # what is wrong shows at once
  scale, paths, status = prepare(study, scale, size, paths, root / 'short')
  if status:
    return status
  jobs = make_jobs(study, scale, size, paths, **asked)
  _refuse_strangers(jobs, folder)
  if options.print:
    for job in jobs:
      if not workdirs.finished(folder / job.name):
        print(shlex.join(sweep.command(job, folder, program=sweep.PRINTED)))
    return 0
  status = 0 if options.collect else sweep.run(jobs, str(folder))
  if status != processes.PREEMPTED:
    known = {job.name: job.values for job in jobs}
    lr = (*asked['rates'], size.lr)[0]
    whole = make_jobs(study, scale, size, paths)
    print(
      imdb_tables.write(
        options.study,
        folder,
        known,
        lr=lr,
        expected=[tuple(job.values.values()) for job in whole],
        paths=paths,
      )
    )
  return status


def main(arguments=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--imdb', required=True, help='workdir of imdb_frontier')
  add('--workdir', required=True)
  add('--study', required=True, help=', '.join(STUDIES))
  add('--only', default='', help='methods, with commas between')
  add('--lr', default='', help='learning rates, with commas between')
  add('--print', action='store_true', help='a command a job; run none')
  add('--collect', action='store_true', help='gates and tables; run nothing')
  add('--traceback', action='store_true', help='show where an error arose')
  options = parser.parse_args(arguments)
  try:
    return run(options)
  except MISTAKES as error:
    if options.traceback:
      raise
    return f'imdb_variants: {error}  (--traceback shows where)'


if __name__ == '__main__':
  sys.exit(main())
