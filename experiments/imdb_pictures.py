"""Controlled sentiment: the pictures of `imdb_results`.

`runs` are {method: its runs that have points}, see `imdb_results.Evaluated`.
"""

import numpy as np

from dpo_jax import report

COLOURS = {
  'dpo': '#2f6db3',
  'ppo': '#c0392b',
  'ppo_gt_ours': '#e08a1e',
  'ppo_gt_trl': '#b8a000',
  'unlikelihood': '#7d4fa3',
  'preferred_ft': '#3a9a5b',
  'sft': '#666666',
}


def frontier_png(runs, curve, path):
  """Draws all points with bars of two standard errors, and Eq. 4's curve.

  runs: see above. curve: (KLs, rewards) of `imdb_gates.tilted_curve`.
  """
  figure, (axis,) = report.axes_of(7, 5)
  for method, colour in COLOURS.items():
    points = [p for x in runs.get(method, []) for p in x.points]
    if points:
      report.draw_frontier(
        axis,
        points,
        color=colour,
        ecolor=colour,
        elinewidth=0.5,
        markersize=3.5,
        alpha=0.75,
        label=method,
      )
  if curve[0]:
    axis.plot(*curve, color='black', linewidth=1, label='Eq. 4, from below')
  furthest = max(
    p['kl'] for own in runs.values() for x in own for p in x.points
  )
  axis.set_xlim(-0.3, max(20.0, 1.03 * furthest))
  axis.set_xlabel('sequence KL to the SFT model (nats)')
  axis.set_ylabel('P(positive)')
  axis.set_title('bars: two standard errors', loc='right', fontsize=8)
  axis.legend(fontsize=8, loc='lower right')
  figure.savefig(path)


def curves_png(runs, path):
  """Draws reward, KL, length and distinct-2 over the steps."""
  shown = ('reward', 'kl', 'length', 'distinct_2')
  figure, axes = report.axes_of(15, 3.6, columns=len(shown))
  for axis, name in zip(axes, shown):
    for method, colour in COLOURS.items():
      for n, x in enumerate(runs.get(method, [])):
        axis.plot(
          [p['step'] for p in x.points],
          [p[name] for p in x.points],
          color=colour,
          linewidth=1,
          label='_' * bool(n) + method,
        )
    axis.set_title(name, loc='left', fontsize=10)
    axis.set_xlabel('step')
  axes[0].legend(fontsize=7)
  figure.savefig(path)


def best_of_png(curve, path):
  """Draws reward over N, and the KL with its bound."""
  figure, axes = report.axes_of(8, 3.6, columns=2)
  numbers = [x['n'] for x in curve]
  axes[0].errorbar(
    numbers,
    [x['reward'] for x in curve],
    yerr=[2 * x['reward_se'] for x in curve],
    fmt='.-',
    color=COLOURS['sft'],
  )
  axes[0].set_ylabel('P(positive)')
  axes[1].plot(numbers, [x['kl'] for x in curve], '.-', label='KL')
  axes[1].plot(numbers, [x['bound'] for x in curve], ':', label='bound')
  axes[1].set_ylabel('nats')
  axes[1].legend(fontsize=8)
  for axis in axes:
    axis.set_xscale('log', base=2)
    axis.set_xlabel('N, chosen by the learned reward')
  figure.savefig(path)


def temperature_png(rows, path):
  """Draws win rates against the reviews' continuations, with intervals."""
  figure, (axis,) = report.axes_of(5.5, 3.8)
  for policy in dict.fromkeys(row['policy'] for row in rows):
    own = [row for row in rows if row['policy'] == policy]
    rates = np.array([row['win_rate'] for row in own])
    axis.errorbar(
      [row['temperature'] for row in own],
      rates,
      yerr=[
        np.maximum(rates - [row['low'] for row in own], 0.0),
        np.maximum([row['high'] for row in own] - rates, 0.0),
      ],
      fmt='o-',
      color=COLOURS[policy],
      capsize=2,
      label=policy,
    )
  axis.set_xlabel('temperature')
  axis.set_ylabel('wins against the review')
  axis.set_title('bars: 95 %', loc='right', fontsize=8)
  axis.legend(fontsize=8)
  figure.savefig(path)
