"""Controlled sentiment: from what was measured to tables, gates and pictures.

  points.csv        every evaluation of every run: a point of the figure
  runs.csv          a line a run: its best point and its last one
  frontier.png      reward against KL, with Eq. 4 on samples as the curve that
                    no policy of the same KL is above
  curves.png        over the steps
  best_of_n.png     reward of the best of N by the learned reward
  temperature.png   win rates over temperatures
  results.json, results.md    the gates, with their numbers

The gates are those of figure 2 and figure 4 of arXiv:2305.18290, as criteria
that can fail:

  A1   80 % of PPO's checkpoints after the first (learned reward) have less
       reward at more KL than some checkpoint of DPO; DPO's area under reward
       against KL, 0 to 12 nats, is larger with p < .05, by resampling prompts;
       no unlikelihood or Preferred-FT is above DPO at its KL. Void where PPO
       does not rise by .2 above the SFT model
  A2   the best of N rises up to N = 64; from 64 to 128 it gains less than a
       quarter of what it gains from 1 to 4; its KL is within the bound
  A3   the best DPO wins at least as often as the best PPO, and loses less from
       its best temperature to temperature 1
  A15  the learned reward ranks 90 % of held-out pairs as the classifier does

Whatever comes out is reported as it is; a run that is not there is no part.
"""

import csv
import dataclasses
import io
import itertools
import json
import math

import numpy as np

from dpo_jax import frontiers
from dpo_jax import judges
from dpo_jax import metrics
from dpo_jax import reweighting
from dpo_jax import workdirs
from experiments import imdb_pictures
from experiments import imdb_scales

FINISHED = 'finished.json'  # in a run's folder, when it is
LIMIT = 12.0  # nats, of the areas
CURVE = 3.0  # nats up to which self-normalized weights are drawn
COMPETENT = 0.2  # least rise of PPO's reward over the SFT model's
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
  {'kl': [N], 'reward': [N]} by prompt, as `frontiers` wants them. Where numbers
  are not finite there is no point. stopped: why it ended before its time.
  """

  run: imdb_scales.Run
  points: list
  checkpoints: list
  stopped: str


def read_runs(folder):
  """Returns {name: Evaluated} of the finished runs of a folder."""
  out = {}
  for path in sorted(folder.glob(f'*/{FINISHED}')):
    run = imdb_scales.parse(path.parent.name)
    points, checkpoints = evaluations(
      metrics.read(path.parent), metrics.read(path.parent, 'samples.jsonl')
    )
    stopped = json.loads(path.read_text())['stopped']
    out[run.name] = Evaluated(run, points, checkpoints, stopped)
  return out


def evaluations(records, samples):
  """Joins a run's metrics and samples: (points, checkpoints) of `Evaluated`."""
  texts = {}
  for row in samples:
    texts.setdefault(row['step'], {}).setdefault(row['prompt'], []).append(row)
  points, checkpoints = [], []
  for record in records:
    if 'samples/kl' not in record:
      continue
    point = {'step': record['step']} | {
      name: record[f'samples/{name}']
      for name in _MEASURED
      if f'samples/{name}' in record
    }
    if not (math.isfinite(point['kl']) and math.isfinite(point['reward'])):
      continue
    by_prompt = texts[record['step']]
    points.append(point)
    checkpoints.append(
      {
        name: np.array(
          [np.mean([r[name] for r in rows]) for rows in by_prompt.values()]
        )
        for name in ('kl', 'reward')
      }
    )
  return points, checkpoints


def of_method(runs, method):
  """Returns the finished runs of a method."""
  return [x for x in runs.values() if x.run.method == method and x.points]


def best_run(runs, method):
  """Returns the name of the run that has a method's highest mean reward.

  Points before the first step are no checkpoints.
  """
  found = {
    x.run.name: max(p['reward'] for p in x.points if p['step'])
    for x in of_method(runs, method)
    if x.points[-1]['step']
  }
  if not found:
    raise ValueError(f'no run of {method} is finished, so none is the best')
  return max(found, key=found.get)


# --- Gates --------------------------------------------------------------------


def gate_a1(dpo, ppo, later, others, *, sft, resamples=10_000):
  """Compares DPO's frontier with that of PPO on the learned reward.

  Args:
    dpo: checkpoints of all its runs, see `Evaluated`.
    ppo: those of PPO on the learned reward.
    later: those of them after the first of each run.
    others: {method: checkpoints} that are to stay below DPO.
    sft: mean reward of the SFT model, where all begin.
    resamples: of the prompts.
  """
  kls, values = frontiers.points(dpo)
  beaten = frontiers.dominated(frontiers.points(later), (kls, values))
  areas = frontiers.compare_areas(dpo, ppo, limit=LIMIT, resamples=resamples)
  rise = float(frontiers.points(ppo)[1].max() - sft)
  below = {}
  for method, checkpoints in others.items():
    at, rewards = (x.tolist() for x in frontiers.points(checkpoints))
    best = int(np.argmax(rewards))
    within = values[kls <= at[best]]
    below[method] = {
      'kl': at[best],
      'reward': rewards[best],
      'dpo': float(within.max()) if within.size else None,
    }
  parts = {
    'dominated': float(beaten.mean()) >= 0.8,
    'area': areas['difference'] >= 0.0 and areas['p'] < 0.05,
    'others': all(
      x['dpo'] is not None and x['reward'] < x['dpo'] for x in below.values()
    ),
  }
  verdict = 'met' if all(parts.values()) else 'not met'
  if rise < COMPETENT:
    verdict = 'void'
  text = (
    f'{int(beaten.sum())} of {len(beaten)} PPO checkpoints'
    f' ({100 * beaten.mean():.0f} %) are dominated; area DPO'
    f' {areas["ours"]:.3f}, PPO {areas["theirs"]:.3f}, difference'
    f' {areas["difference"]:+.3f} [{areas["low"]:+.3f}, {areas["high"]:+.3f}],'
    f' p = {areas["p"]:.4f}; PPO rises {rise:+.3f} over SFT (competent from'
    f' {COMPETENT:+.1f})'
  )
  for method, x in below.items():
    dpo_there = 'has no point' if x['dpo'] is None else f'{x["dpo"]:.3f}'
    text += (
      f'; {method} at best {x["reward"]:.3f} at {x["kl"]:.2f} nats, DPO within'
      f' that {dpo_there}'
    )
  return {
    'verdict': verdict,
    'text': text,
    'parts': parts,
    'dominated': float(beaten.mean()),
    'areas': areas,
    'rise': rise,
    'others': below,
  }


def best_of_curve(learned_NS, rewards_NS, numbers):
  """Returns [{'n', 'reward', 'reward_se', 'kl', 'bound'}] of the best of n."""
  rewards_NS = np.asarray(rewards_NS, float)
  out = []
  for n in numbers:
    by_prompt = (reweighting.best_of(n, learned_NS) * rewards_NS).sum(1)
    out.append(
      {
        'n': n,
        'reward': float(by_prompt.mean()),
        'reward_se': judges.standard_error(by_prompt),
        'kl': float(reweighting.best_of_kl(n, learned_NS).mean()),
        'bound': reweighting.best_of_kl_bound(n),
      }
    )
  return out


def gate_a2(curve):
  """Asks whether best of N rises, and then hardly any more.

  `curve` is of `best_of_curve`. Scales without 1, 4, 64 and 128 have no answer.
  """
  values = {x['n']: x['reward'] for x in curve}
  bounded = all(x['kl'] <= x['bound'] + 1e-9 for x in curve)
  told = ', '.join(f'{n}: {x:.3f}' for n, x in values.items())
  if not {1, 4, 64, 128} <= values.keys():
    return {'verdict': 'not asked', 'text': f'reward of the best of N {told}'}
  upto = [values[n] for n in sorted(values) if n <= 64]
  late, early = values[128] - values[64], values[4] - values[1]
  parts = {
    'rises': all(a < b for a, b in itertools.pairwise(upto)),
    'plateau': late < 0.25 * early,
    'bound': bounded,
  }
  return {
    'verdict': 'met' if all(parts.values()) else 'not met',
    'text': f'reward of the best of N {told}; from 64 to 128 {late:+.4f}, from'
    f' 1 to 4 {early:+.4f}; KL {"within" if bounded else "beyond"} the bound',
    'parts': parts,
  }


def gate_a3(rows):
  """Compares win rates over temperatures; `rows` are of temperature.json."""
  rates = {
    policy: {
      row['temperature']: row['win_rate']
      for row in rows
      if row['policy'] == policy
    }
    for policy in ('dpo', 'ppo')
  }
  best = {policy: max(x.values()) for policy, x in rates.items()}
  drop = {policy: best[policy] - rates[policy][1.0] for policy in rates}
  parts = {
    'wins': best['dpo'] >= best['ppo'],
    'robust': drop['dpo'] < drop['ppo'],
  }
  repeated = ', '.join(
    f'{row["policy"]} {row["distinct_2"]:.3f}'
    for row in rows
    if row['temperature'] == 0.0
  )
  return {
    'verdict': 'met' if all(parts.values()) else 'not met',
    'text': f'best win rate DPO {best["dpo"]:.3f}, PPO {best["ppo"]:.3f}; lost'
    f' from there to temperature 1: DPO {drop["dpo"]:.3f}, PPO'
    f' {drop["ppo"]:.3f}; distinct-2 at temperature 0: {repeated}',
    'parts': parts,
  }


def gate_a15(records):
  """Asks how many held-out pairs the learned reward ranks rightly, at best."""
  name = 'heldout/rewards/accuracy'
  best = max((r for r in records if name in r), key=lambda r: r[name])
  return {
    'verdict': 'met' if best[name] >= 0.9 else 'not met',
    'text': f'accuracy {best[name]:.3f} ± {best[f"{name}_se"]:.3f} on'
    f' {best["heldout/groups"]:.0f} held-out pairs, at step {best["step"]}',
  }


def gates(runs, best_of, temperature, reward_model, *, sft):
  """Returns {gate: what it says} of all that is there."""
  out = {}
  dpo, ppo = (of_method(runs, method) for method in ('dpo', 'ppo'))
  later = [c for x in ppo for c in after_first(x)]
  if dpo and later:
    others = {
      method: [c for x in found for c in x.checkpoints]
      for method in ('unlikelihood', 'preferred_ft')
      if (found := of_method(runs, method))
    }
    ours = [c for x in dpo for c in x.checkpoints]
    theirs = [c for x in ppo for c in x.checkpoints]
    out['A1'] = gate_a1(ours, theirs, later, others, sft=sft)
  if best_of:
    out['A2'] = gate_a2(best_of)
  if temperature:
    out['A3'] = gate_a3(temperature)
  if reward_model:
    out['A15'] = gate_a15(reward_model)
  return out


def after_first(evaluated):
  """Returns the checkpoints of a run but for that before its first step."""
  return [
    checkpoint
    for point, checkpoint in zip(evaluated.points, evaluated.checkpoints)
    if point['step']
  ]


# --- Eq. 4 --------------------------------------------------------------------


def tilted_curve(rewards_NS):
  """Returns (KLs, rewards) of Eq. 4's policies, made of samples by weights.

  Up to `CURVE` nats: beyond, a few of a prompt's samples have all the weight.
  """
  kls, values = [], []
  for beta in np.geomspace(100.0, 0.001, 200):
    weights_NS = reweighting.tilted(rewards_NS, beta)
    kl = reweighting.kl(weights_NS).mean()
    if kl > CURVE:
      break
    kls.append(float(kl))
    values.append(float((weights_NS * rewards_NS).sum(1).mean()))
  return kls, values


# --- Files --------------------------------------------------------------------


def made_of(paths):
  """Names what results are made of, of what there is now."""
  files = [paths.best_of_n, paths.temperature, paths.reward_model / FINISHED]
  files += paths.runs.glob(f'*/{FINISHED}')
  return sorted(
    str(path.relative_to(paths.root)) for path in files if path.exists()
  )


def is_current(paths):
  """Whether the results are those of all that is there."""
  if not paths.results.exists():
    return False
  return json.loads(paths.results.read_text())['made_of'] == made_of(paths)


def write(scale, paths):
  """Writes all files; returns the text of results.md."""
  ingredients = made_of(paths)
  runs = read_runs(paths.runs)
  best_of, curve, temperature, reward_model = [], ([], []), [], []
  if paths.best_of_n.exists():
    rows = read_lines(paths.best_of_n)
    learned_NS, rewards_NS = (
      np.array([row[name] for row in rows]) for name in ('learned', 'reward')
    )
    best_of = best_of_curve(learned_NS, rewards_NS, scale.best_of)
    curve = tilted_curve(rewards_NS[:, : scale.tilted])
    imdb_pictures.best_of_png(best_of, paths.root / 'best_of_n.png')
  if paths.temperature.exists():
    temperature = json.loads(paths.temperature.read_text())
    imdb_pictures.temperature_png(temperature, paths.root / 'temperature.png')
  if (paths.reward_model / FINISHED).exists():
    reward_model = metrics.read(paths.reward_model)
  # All runs begin at the SFT model, each with samples of its own.
  starts = [p['reward'] for x in runs.values() for p in x.points[:1]]
  sft = float(np.mean(starts)) if starts else math.nan
  said = gates(runs, best_of, temperature, reward_model, sft=sft)
  by_method = {m: of_method(runs, m) for m in imdb_scales.METHODS}
  if any(by_method.values()):
    imdb_pictures.frontier_png(by_method, curve, paths.root / 'frontier.png')
    imdb_pictures.curves_png(by_method, paths.root / 'curves.png')
  workdirs.write(str(paths.root / 'points.csv'), as_csv(points_table(runs)))
  workdirs.write(str(paths.root / 'runs.csv'), as_csv(runs_table(runs)))
  text = as_markdown(said, runs_table(runs))
  workdirs.write(str(paths.root / 'results.md'), text)
  numbers = {
    'made_of': ingredients,
    'gates': said,
    'best_of_n': best_of,
    'tilted': {'kl': curve[0], 'reward': curve[1]},
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
          for name in ('step', 'kl', 'reward', 'judge', 'length', 'distinct_2')
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


def as_markdown(said, rows):
  """Returns gates and runs as two tables."""
  lines = ['| gate | verdict | numbers |', '|---|---|---|']
  lines += [f'| {n} | {x["verdict"]} | {x["text"]} |' for n, x in said.items()]
  lines += [
    '',
    '| run | best reward at KL | last reward at KL | second judge |',
  ]
  lines += ['|---|---|---|---|']
  for row in rows:
    if row['points']:
      lines.append(
        f'| {row["run"]} | {row["best_reward"]:.3f} at {row["best_kl"]:.2f} |'
        f' {row["last_reward"]:.3f} at {row["last_kl"]:.2f} |'
        f' {row["last_judge"]:.3f} |'
      )
    if row['stopped']:
      lines.append(f'| {row["run"]} ended | {row["stopped"]} | | |')
  return '\n'.join(lines) + '\n'
