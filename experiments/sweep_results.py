"""What a sweep's runs have logged: a file of rows, a table, plots.

A quantity is NAME, change:NAME or first:NAME, where NAME is one of the logs,
for example heldout/logps/chosen: its value at the end of a run (or where
another is best), that less the first value, of before training, or the latter.
"""

import csv
import glob
import json
import math
import os
import signal
import statistics
import urllib.parse
from typing import NamedTuple

from dpo_jax import judges
from dpo_jax import metrics
from dpo_jax import names
from dpo_jax import processes
from dpo_jax import report
from dpo_jax import workdirs

JOB = 'job.json'  # of a job's folder: values, status and seconds
# Exit statuses of a job that was stopped from outside.
STOPPED = (processes.PREEMPTED, -signal.SIGTERM)
# Shown where no others are asked for, as far as runs have them.
METRICS = (
  'heldout/rewards/accuracy',
  'heldout/loss',
  'samples/reward',
  'samples/kl',
  'samples/length',
  'samples/distinct_2',
)
KINDS = ('change', 'first')
_BEST = {'max': max, 'min': min}


class Quantity(NamedTuple):
  """kind: one of `KINDS`, or '' for the value itself."""

  kind: str
  name: str

  def __str__(self):
    return f'{self.kind}:{self.name}' if self.kind else self.name


class View:
  """What is shown: `quantities`; `at`, `best` where of a run; `over` a name."""

  def __init__(self, *, metrics, at, over):
    self.quantities = [_quantity(text) for text in metrics]
    self.over = over
    self.best, self.by = None, ''
    if at != 'last':
      best, how, name = [*at.split(':', 2), '', ''][:3]
      if best != 'best' or how not in _BEST or not name:
        raise ValueError(
          f'--at={at}: use last, best:max:NAME or best:min:NAME, such as'
          ' best:max:heldout/rewards/accuracy'
        )
      self.best, self.by = _BEST[how], name

  def value(self, records, quantity):
    """Returns a quantity of a run, None where its logs lack it.

    Args:
      records: [(step, {name: number})] in the order of steps.
      quantity: of `self.quantities`.
    """
    seen = {
      s: found[quantity.name] for s, found in records if quantity.name in found
    }
    if not seen:
      return None
    first, at = min(seen), max(seen)
    if quantity.kind == 'first':
      return seen[first]
    if self.best:
      rated = {
        s: found[self.by]
        for s, found in records
        if not math.isnan(found.get(self.by, math.nan))
      }
      at = self.best(rated, key=rated.get) if rated else None
    if at not in seen:
      return None
    return seen[at] - seen[first] if quantity.kind else seen[at]


def _quantity(text):
  kind, _, name = text.partition(':')
  return Quantity(kind, name) if kind in KINDS else Quantity('', text)


class Outcome(NamedTuple):
  """One job: numbers are {str(quantity): value}; hours None if not known."""

  name: str
  values: dict
  status: str
  step: int
  hours: float | None
  numbers: dict


def read_job(folder):
  """Returns what the sweep noted of a job, {} of one that ran elsewhere."""
  path = os.path.join(folder, JOB)
  if not os.path.exists(path):
    return {}
  with open(path) as f:
    return json.load(f)


def read_records(folder):
  """Returns [(step, all that was logged at it)] of a run; of its last round."""
  rounds = glob.glob(os.path.join(glob.escape(folder), 'round_*', 'train'))
  if rounds:
    folder = max(
      rounds,
      key=lambda path: int(path.split(os.sep)[-2].removeprefix('round_')),
    )
  steps = {}
  for record in metrics.read(folder):
    steps.setdefault(record['step'], {}).update(record)
  return sorted(steps.items())


def status_of(folder, noted):
  """Says how far a run is: finished, failed, unfinished, or not begun."""
  if workdirs.finished(folder):
    return 'finished'
  if noted.get('status'):
    return 'failed' if noted['status'] not in STOPPED else 'unfinished'
  return 'unfinished' if os.path.isdir(folder) else 'not begun'


def read_outcomes(workdir, known, view):
  """Returns the `Outcome` of each of {name: values}.

  Raises ValueError where no run that has logs has a quantity.
  """
  logs = {name: read_records(os.path.join(workdir, name)) for name in known}
  logged = {key for log in logs.values() for _, found in log for key in found}
  quantities = view.quantities or [
    Quantity('', name) for name in METRICS if name in logged
  ]
  for name in [q.name for q in quantities] + [view.by] * bool(view.best):
    if logged:
      names.look_up(dict.fromkeys(sorted(logged)), 'metric', name)
  out = []
  for name, values in known.items():
    folder = os.path.join(workdir, name)
    noted = read_job(folder)
    numbers = {str(q): view.value(logs[name], q) for q in quantities}
    out.append(
      Outcome(
        name=name,
        values=values,
        status=status_of(folder, noted),
        step=logs[name][-1][0] if logs[name] else 0,
        hours=noted['seconds'] / 3600 if noted else None,
        numbers=numbers,
      )
    )
  return out


def varying(outcomes):
  """Returns the names whose values differ, in the order of the grid."""
  all_names = dict.fromkeys(name for o in outcomes for name in o.values)
  return [
    name
    for name in all_names
    if len({o.values.get(name, '') for o in outcomes}) > 1
  ]


def grouped(outcomes, by):
  """Returns {values of the names `by`: outcomes}, in order."""
  groups = {}
  for o in outcomes:
    key = tuple(o.values.get(name, '') for name in by)
    groups.setdefault(key, []).append(o)
  return groups


def mean_and_error(group, quantity):
  """Returns (mean, standard error or None) over the finished of a group.

  None where there is nothing to average; the error needs two.
  """
  found = [
    o.numbers[quantity]
    for o in group
    if o.status == 'finished' and o.numbers[quantity] is not None
  ]
  if not found:
    return None
  if len(found) == 1:
    return found[0], None
  return statistics.fmean(found), judges.standard_error(found)


def write_csv(outcomes, path):
  """Writes a row a job: what varies, numbers, status, step and hours."""
  keys = varying(outcomes)
  with open(path, 'w', newline='') as f:
    writer = csv.writer(f)
    shown = list(outcomes[0].numbers)
    writer.writerow(['job', *keys, *shown, 'status', 'step', 'hours'])
    for o in outcomes:
      row = [o.name, *(o.values.get(key, '') for key in keys)]
      row += ['' if o.numbers[q] is None else o.numbers[q] for q in shown]
      hours = '' if o.hours is None else round(o.hours, 4)
      writer.writerow([*row, o.status, o.step, hours])


def table(outcomes, over):
  """Returns the means and standard errors over `over`, as Markdown."""
  keys = [key for key in varying(outcomes) if key != over]
  shown = list(outcomes[0].numbers)
  rows = [[*keys, *shown, 'finished']]
  for values, group in grouped(outcomes, keys).items():
    cells = []
    for quantity in shown:
      found = mean_and_error(group, quantity)
      text = '-'
      if found:
        mean, error = found
        text = f'{mean:.4g}' if error is None else f'{mean:.4g} ± {error:.2g}'
      cells.append(text)
    done = sum(o.status == 'finished' for o in group)
    rows.append([*values, *cells, f'{done} of {len(group)}'])
  return report.markdown_table(rows)


def panels(outcomes, key, over):
  """Returns {quantity: {label: [(value of key, mean, error), ...]}}."""
  others = [k for k in varying(outcomes) if k not in (key, over)]
  out = {}
  for quantity in outcomes[0].numbers:
    lines = {}
    for values, group in grouped(outcomes, [*others, key]).items():
      found = mean_and_error(group, quantity)
      if found:
        label = ', '.join(f'{k}={v}' for k, v in zip(others, values))
        lines.setdefault(label, []).append((float(values[-1]), *found))
    if lines:
      out[quantity] = {label: sorted(points) for label, points in lines.items()}
  return out


def _is_number(text):
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False


def collect(workdir, known, view):
  """Writes sweep.csv, table.md and the plots; returns the table.

  Args:
    workdir: of the sweep.
    known: {name of a job: its values}.
    view: `View`.
  """
  if not known:
    raise ValueError(f'{workdir!r} has no jobs; run a grid there first')
  outcomes = read_outcomes(workdir, known, view)
  keys = varying(outcomes)
  os.makedirs(workdir, exist_ok=True)
  write_csv(outcomes, os.path.join(workdir, 'sweep.csv'))
  text = table(outcomes, view.over)
  workdirs.write(os.path.join(workdir, 'table.md'), text)
  for key in keys:
    numeric = all(_is_number(o.values.get(key, '')) for o in outcomes)
    if numeric and key != view.over:
      found = panels(outcomes, key, view.over)
      name = f'by_{urllib.parse.quote(key, safe="")}.png'
      if found:
        report.lines_png(found, os.path.join(workdir, name), xlabel=key)
  return text
