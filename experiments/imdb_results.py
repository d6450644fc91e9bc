"""Controlled sentiment: from what was measured to tables and pictures.

  points.csv        every evaluation of every run: a point of the figure
  runs.csv          a line a run: its best point and its last one
  frontier.png      reward against KL, with an estimate of Eq. 4, the most that
                    a policy of that KL can have, from below
  curves.png        over the steps
  best_of_n.png     reward of the best of N by the learned reward
  temperature.png   win rates over temperatures
  results.json, results.md    the gates of `imdb_gates`, with their numbers

Whatever comes out is reported as it is; a run that is not there is no part. The
best point of a run is chosen and told on the same prompts; temperatures are
asked on others.
"""

import csv
import dataclasses
import io
import json
import math

import numpy as np

from dpo_jax import checkpoint
from dpo_jax import judges
from dpo_jax import metrics
from dpo_jax import report
from dpo_jax import workdirs
from experiments import imdb_gates
from experiments import imdb_pictures
from experiments import imdb_scales

FINISHED = 'finished.json'  # in a run's folder, when it is
# Columns of points.csv after run, method, value, seed and step.
_MEASURED = (
  'kl',
  'kl_se',
  'reward',
  'reward_se',
  'kl_sampled',
  'judge',
  'vader',
  'entropy',
  'length',
  'ended',
  'distinct_2',
)


def read_lines(path):
  """Returns the records of a JSON Lines file."""
  with open(path, encoding='utf-8') as f:
    return [json.loads(line) for line in f]


# --- Runs ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """A finished run: its evaluations, first to last.

  points: dicts of 'step' and `_MEASURED`. checkpoints: of the same evaluations,
  {'kl': [N], 'reward': [N]} by prompt, as `frontiers` wants them, or [] where
  texts were not read. Where numbers are not finite there is no point. stopped:
  why it ended before its time.
  """

  run: imdb_scales.Run
  points: list
  checkpoints: list
  stopped: str


def read_runs(folder, *, texts=True):
  """Returns {name: Evaluated} of the finished runs of a folder."""
  out = {}
  for path in sorted(folder.glob(f'*/{FINISHED}')):
    run = imdb_scales.parse(path.parent.name)
    points = read_points(metrics.read(path.parent))
    checkpoints = []
    if texts:
      samples = metrics.read(path.parent, 'samples.jsonl')
      checkpoints = by_prompt(points, samples)
    stopped = json.loads(path.read_text())['stopped']
    out[run.name] = Evaluated(run, points, checkpoints, stopped)
  return out


def read_reward_model(folder):
  """Returns (metrics of its training, step that is used), None before it is."""
  if not (folder / FINISHED).exists():
    return None
  step = checkpoint.step_of(folder / 'checkpoints', checkpoint.BEST)
  return metrics.read(folder), step


def read_points(records):
  """Returns the points of `Evaluated` of a run's metrics."""
  points = [
    {'step': record['step']}
    | {
      name: record[f'samples/{name}']
      for name in _MEASURED
      if f'samples/{name}' in record
    }
    for record in records
    if 'samples/kl' in record
  ]
  return [
    point
    for point in points
    if math.isfinite(point['kl']) and math.isfinite(point['reward'])
  ]


def by_prompt(points, samples):
  """Returns the checkpoints of `Evaluated`, from a run's samples."""
  texts = {}
  for row in samples:
    texts.setdefault(row['step'], {}).setdefault(row['prompt'], []).append(row)
  return [
    {
      name: np.array(
        [
          np.mean([row[name] for row in rows])
          for rows in texts[point['step']].values()
        ]
      )
      for name in ('kl', 'reward')
    }
    for point in points
  ]


def of_method(runs, method):
  """Returns the finished runs of a method."""
  return [x for x in runs.values() if x.run.method == method and x.points]


def best_run(runs, method):
  """Returns the name of the run that has a method's highest mean reward.

  Points before the first step are no checkpoints. None where no run is
  finished.
  """
  found = {
    x.run.name: max(p['reward'] for p in x.points if p['step'])
    for x in of_method(runs, method)
    if x.points[-1]['step']
  }
  return max(found, key=found.get) if found else None


def compared(runs):
  """Returns {'dpo': its best run, 'ppo': its best}; None: there is none."""
  return {method: best_run(runs, method) for method in ('dpo', 'ppo')}


def sft_point(runs):
  """Returns the means over seeds of points before the first step, {} of none.

  There every run is the SFT model, and runs of one seed have the same samples.
  """
  by_seed = {x.run.seed: x.points[0] for x in runs.values() if x.points}
  points = [point for point in by_seed.values() if not point['step']]
  return {
    name: float(np.mean([point[name] for point in points]))
    for name in _MEASURED
    if points and all(name in point for point in points)
  }


def gates(runs, best_of, temperature, reward_model):
  """Returns {gate: what it says} of all that is there.

  reward_model: (metrics of its training, step of what is used) or None.
  """
  out = {}
  found = {m: of_method(runs, m) for m in imdb_scales.METHODS}
  if found['dpo'] and imdb_gates.checkpoints(found['ppo'], first=False):
    out['A1'] = imdb_gates.a1(found, sft=sft_point(runs)['reward'])
  if best_of:
    out['A2'] = imdb_gates.a2(best_of)
  if temperature:
    out['A3'] = imdb_gates.a3(temperature)
  if reward_model:
    out['A15'] = imdb_gates.a15(*reward_model)
  return out


# --- Files --------------------------------------------------------------------


def made_of(paths):
  """Returns {what results are made of: when it was made}, of what is there."""
  files = [paths.best_of_n, paths.temperature, paths.reward_model / FINISHED]
  files += paths.runs.glob(f'*/{FINISHED}')
  return {
    str(path.relative_to(paths.root)): path.stat().st_mtime_ns
    for path in sorted(files)
    if path.exists()
  }


def is_current(paths):
  """Whether the results are those of all that is there."""
  if not paths.results.exists():
    return False
  return json.loads(paths.results.read_text())['made_of'] == made_of(paths)


def write(scale, paths):
  """Writes all files; returns the text of results.md."""
  ingredients = made_of(paths)
  runs = read_runs(paths.runs)
  best_of, curve, temperature = [], ([], []), []
  if paths.best_of_n.exists():
    rows = read_lines(paths.best_of_n)
    learned_NS, rewards_NS = (
      np.array([row[name] for row in rows]) for name in ('learned', 'reward')
    )
    best_of = imdb_gates.best_of_curve(learned_NS, rewards_NS, scale.best_of)
    curve = imdb_gates.tilted_curve(rewards_NS[:, : scale.tilted])
    imdb_pictures.best_of_png(best_of, paths.root / 'best_of_n.png')
  if paths.temperature.exists():
    temperature = json.loads(paths.temperature.read_text())
    imdb_pictures.temperature_png(temperature, paths.root / 'temperature.png')
  said = gates(
    runs, best_of, temperature, read_reward_model(paths.reward_model)
  )
  by_method = {m: of_method(runs, m) for m in imdb_scales.METHODS}
  if any(by_method.values()):
    imdb_pictures.frontier_png(by_method, curve, paths.root / 'frontier.png')
    imdb_pictures.curves_png(by_method, paths.root / 'curves.png')
  workdirs.write(str(paths.root / 'points.csv'), as_csv(points_table(runs)))
  workdirs.write(str(paths.root / 'runs.csv'), as_csv(runs_table(runs)))
  text = '\n'.join(
    [
      gates_markdown(said),
      runs_markdown(sft_point(runs), runs_table(runs)),
      seeds_markdown(runs),
    ]
  )
  workdirs.write(str(paths.root / 'results.md'), text)
  numbers = {
    'made_of': ingredients,
    'gates': said,
    'best_of_n': best_of,
    'tilted': {'kl': curve[0], 'reward': curve[1]},
    'sft': sft_point(runs),
    'runs': runs_table(runs),
  }
  workdirs.write(
    str(paths.results), json.dumps(numbers, indent=1)
  )  # the last one
  return text


def _named(run):
  return {
    'run': run.name,
    'method': run.method,
    'value': run.value,
    'seed': run.seed,
  }


def points_table(runs):
  """Returns the rows of points.csv."""
  return [
    _named(x.run)
    | {'step': point['step']}
    | {name: point.get(name, '') for name in _MEASURED}
    for x in runs.values()
    for point in x.points
  ]


def runs_table(runs):
  """Returns the rows of runs.csv."""
  out = []
  for x in runs.values():
    row = _named(x.run) | {'points': len(x.points), 'stopped': x.stopped}
    if x.points:
      best = max(x.points, key=lambda p: p['reward'])
      for title, point in (('best', best), ('last', x.points[-1])):
        row |= {
          f'{title}_{name}': point.get(name, '')
          for name in (
            'step',
            'kl',
            'reward',
            'reward_se',
            'judge',
            'length',
            'distinct_2',
          )
        }
    out.append(row)
  return out


def as_csv(rows):
  """Returns rows, dicts, as a table with the columns of the longest."""
  if not rows:
    return ''
  out = io.StringIO()
  writer = csv.DictWriter(
    out, max(rows, key=len), restval='', lineterminator='\n'
  )
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def gates_markdown(said):
  """Returns the gates as a table."""
  rows = [['gate', 'verdict', 'numbers']]
  rows += [[name, x['verdict'], x['text']] for name, x in said.items()]
  return report.markdown_table(rows, aligned=False)


def runs_markdown(sft, rows):
  """Returns the SFT model and the rows of `runs_table` as a table."""
  titles = ['run', 'best reward at KL', 'last reward at KL', 'second judge']
  table = [[*titles, 'length', 'distinct-2']]
  shown = ('judge', 'length', 'distinct_2')
  if sft:
    cells = [_number(sft.get(name)) for name in shown]
    table.append(['SFT', *[f'{sft["reward"]:.3f}'] * 2, *cells])
  for row in rows:
    if row['points']:
      told = [
        f'{row[f"{at}_reward"]:.3f} ± {_number(row[f"{at}_reward_se"])} at'
        f' {row[f"{at}_kl"]:.2f}'
        for at in ('best', 'last')
      ]
      cells = [_number(row[f'last_{name}']) for name in shown]
      table.append([row['run'], *told, *cells])
    if row['stopped']:
      table.append([f'{row["run"]} ended', row['stopped'], '', '', '', ''])
  return report.markdown_table(table, aligned=False)


def seeds_markdown(runs):
  """Returns the last points of runs that differ by their seeds alone."""
  ends = {}
  for x in runs.values():
    if x.points:
      ends.setdefault((x.run.method, x.run.value), []).append(x.points[-1])
  lines = []
  for (method, value), points in ends.items():
    if len(points) > 1 and method != 'preferred_ft':
      told = ', '.join(
        f'{name} {np.mean(column):.3f} ± {judges.standard_error(column):.3f}'
        for name in ('reward', 'kl', 'judge')
        if (column := [p[name] for p in points if name in p])
      )
      lines.append(f'- {method} {value:g}, {len(points)} seeds, last: {told}')
  return '\n'.join(lines) + '\n' if lines else ''


def _number(value):
  return f'{value:.3f}' if isinstance(value, float) else ''
