"""Tables and pictures of the studies of `imdb_variants`.

verdict.json           what the gates of `imdb_verdicts` say
results.md             the same, and the last measurements of all runs
curves.png             what was measured over the steps
sweep.csv, table.md    of `sweep_results`
"""

import json
import math

from dpo_jax import metrics
from dpo_jax import report
from dpo_jax import workdirs
from experiments import imdb_changes
from experiments import imdb_lengths
from experiments import imdb_results
from experiments import imdb_verdicts
from experiments import sweep
from experiments import sweep_results

_LAST = 5  # lines of a log
# What table.md shows, as far as runs have it.
METRICS = (
  'samples/reward',
  'samples/kl',
  'samples/length',
  'samples/distinct_2',
  'samples/entropy',
  'samples/judge',
  'heldout/rewards/accuracy',
  'change:heldout/logps/chosen',
)


def read(folder):
  """Returns the `imdb_verdicts.Variant` of every job begun in a folder."""
  out = []
  for name, values in sweep.stored(str(folder)).items():
    job = folder / name
    samples = {}
    for row in metrics.read(str(job), 'samples.jsonl'):
      samples.setdefault(row['step'], {})[row['prompt']] = row
    status = sweep_results.status_of(str(job), sweep_results.read_job(str(job)))
    if status == 'failed' and diverged(job):
      status = 'diverged'
    records = sweep_results.read_records(str(job))
    changes = imdb_changes.read(job)
    out.append(imdb_verdicts.Variant(values, status, records, samples, changes))
  return out


def diverged(job):
  """Whether a job's output ends with a loss or parameters that are not finite.

  What else a job may fail of says nothing about its method.
  """
  last = (job / 'log.txt').read_text().splitlines()[-_LAST:]
  return any('the last good checkpoint is' in line for line in last)


def judge(study, variants, *, lr, expected, baseline, account):
  """Returns {gate: what it says} of a study.

  Args:
    study: its name.
    variants: of `read`.
    lr: the learning rate that methods are compared at, one for each.
    expected: [(method, lr, strength)] of all its runs.
    baseline: see `imdb_verdicts.gate_a13`.
    account: of its pairs, see `imdb_lengths`.
  """
  if study == 'bakeoff':
    return {'A11': imdb_verdicts.gate_a11(variants, expected)}
  done = {float(lr): {}, float(lr) / 10: {}}
  for v in imdb_verdicts.finished(variants):
    for rate, found in done.items():
      if math.isclose(float(v.values['lr']), rate):
        found[v.method] = v
  runs, slow = done.values()
  if study != 'displacement':
    return {'A13': imdb_verdicts.gate_a13(runs, baseline, account['bonus'])}
  accuracy = (math.nan, math.nan)
  if 'dpo' in runs:
    name = 'heldout/rewards/accuracy'
    accuracy = tuple(runs['dpo'].number(n) for n in (name, f'{name}_se'))
  return {
    'A12': imdb_verdicts.gate_a12(
      *({m: v.changes for m, v in x.items()} for x in (runs, slow)),
      accuracy=accuracy,
    )
  }


_SHOWN = ('reward', 'judge', 'kl', 'length', 'ended', 'entropy')


def arms(variants):
  """Returns the last measurements of all runs, with errors, as Markdown."""
  titles = ['method', 'lr', 'strength', *_SHOWN, 'distinct-2', 'accuracy']
  rows = [[*titles, 'change of log pi(y_w)']]
  for v in variants:
    cells = [v.values[name] for name in ('method', 'lr', 'strength')]
    for name in _SHOWN:
      cells.append(
        _cell(v.number(f'samples/{name}'), v.number(f'samples/{name}_se'))
      )
    cells.append(_cell(v.number('samples/distinct_2')))
    cells.append(
      _cell(*(v.number(f'heldout/rewards/accuracy{x}') for x in ('', '_se')))
    )
    if v.changes is not None:
      cells.append(_cell(*imdb_verdicts.mean_and_error(v.changes)))
    else:
      name = 'heldout/logps/chosen'
      cells.append(_cell(v.number(name) - v.number(name, last=False)))
    if v.status != 'finished':
      cells[0] += f' ({v.status})'
    rows.append(cells)
  return report.markdown_table(rows)


def _cell(value, error=math.nan):
  """Writes a number with its error, as far as there are any."""
  if math.isnan(value):
    return '-'
  text = f'{value:.3f}'
  return text if math.isnan(error) else f'{text} ± {error:.3f}'


def curves(variants):
  """Returns the panels of `report.lines_png`: what is logged over the steps."""
  out = {}
  for title, name in [
    ('change of log pi(y_w)', 'heldout/logps/chosen'),
    ('change of log pi(y_l)', 'heldout/logps/rejected'),
    ('reward', 'samples/reward'),
    ('KL, nats', 'samples/kl'),
    ('length, tokens', 'samples/length'),
  ]:
    lines = {}
    for v in variants:
      off = v.number(name, last=False) if 'change' in title else 0.0
      points = [
        (step, found[name] - off, found.get(f'{name}_se'))
        for step, found in v.records
        if name in found
      ]
      if points:
        label = f'{v.method}, lr {v.values["lr"]}, {v.values["strength"]}'
        lines[label] = points
    if lines:
      out[title] = lines
  return out


def write(study, folder, known, *, lr, expected, paths):
  """Writes all files of a study; returns the text of results.md.

  Args:
    study: its name.
    folder: of its jobs.
    known: {name of a job: its values}, of jobs that may not be begun.
    lr, expected: see `judge`.
    paths: of its data.
  """
  known = sweep.stored(str(folder)) | known
  if study == 'displacement':
    jobs = [folder / name for name in known]
    imdb_changes.write([job for job in jobs if workdirs.finished(str(job))])
  methods = list(dict.fromkeys(run[0] for run in expected))
  variants = sorted(read(folder), key=lambda v: methods.index(v.method))
  baseline, account, lines = {}, {}, []
  if study.startswith('length'):
    rows = imdb_results.read_lines(paths.baseline)
    baseline = {row['prompt']: row for row in rows}
    account = json.loads(imdb_lengths.account_path(paths).read_text())
    lines = [', '.join(f'{name} {x:g}' for name, x in account.items()), '']
  said = judge(
    study,
    variants,
    lr=lr,
    expected=expected,
    baseline=baseline,
    account=account,
  )
  workdirs.write(str(folder / 'verdict.json'), json.dumps(said, indent=1))
  if panels := curves(variants):
    report.lines_png(panels, str(folder / 'curves.png'), xlabel='steps')
  lines.append(imdb_results.gates_markdown(said))
  view = sweep_results.View(metrics=_logged(variants), at='last', over='seed')
  sweep_results.collect(str(folder), known, view)
  text = '\n'.join([*lines, arms(variants)])
  workdirs.write(str(folder / 'results.md'), text)
  return text


def _logged(variants):
  """Returns those of `METRICS` that a run has."""
  logged = {name for v in variants for _, found in v.records for name in found}
  return [name for name in METRICS if name.rpartition(':')[2] in logged]
