"""Reward against KL: which of two sets of checkpoints is the better frontier.

A checkpoint is what evaluation measured of it, by prompt: {'kl': [N],
'reward': [N]}, means over the prompt's samples. All checkpoints that are
compared have the same prompts in the same order, which are resampled together:
a bootstrap over prompts, paired.

Between points a frontier is their least concave envelope, which can be reached:
whoever draws one of two policies at random gets the mean of their rewards, and
the KL of that mixture is at most the mean of theirs, because KL is convex. So
it matters little how often a run was measured, which decides the area under
steps: the first point after the start alone is worth its KL times its reward.

Dimension key: C checkpoints, N prompts.
"""

import numpy as np


def points(checkpoints):
  """Returns the means (kls, rewards) of checkpoints, [C] each."""
  return tuple(
    np.array([np.mean(c[name]) for c in checkpoints])
    for name in ('kl', 'reward')
  )


def dominated(ours, theirs):
  """Returns which of `ours` some of `theirs` beats: bool [C].

  Args:
    ours: (kls, rewards).
    theirs: (kls, rewards); one beats another with more reward and less KL.
  """
  kls, rewards = (np.asarray(x)[:, None] for x in ours)
  other_kls, other_rewards = (np.asarray(x)[None] for x in theirs)
  return ((other_rewards > rewards) & (other_kls < kls)).any(1)


def envelope(kls, rewards):
  """Returns the corners (kls, rewards) of the least concave, rising envelope.

  It begins at KL 0, with the reward of the point of least KL, and stays at the
  highest reward after the last corner.
  """
  order = np.lexsort((-np.asarray(rewards), kls))
  points = [(float(kls[n]), float(rewards[n])) for n in order]
  corners = [(0.0, points[0][1])]
  for kl, reward in points:
    if reward <= corners[-1][1]:
      continue
    while len(corners) > 1:
      (kl_a, a), (kl_b, b) = corners[-2:]
      if (b - a) * (kl - kl_b) > (reward - b) * (kl_b - kl_a):
        break  # the slope falls here
      corners.pop()
    corners.append((kl, reward))
  return tuple(np.array(column) for column in zip(*corners))


def best_within(kl, corners):
  """Returns the reward of an `envelope` at a KL, or at many."""
  return np.interp(kl, *corners)


def area(kls, rewards, *, limit):
  """Returns the mean, over KLs in [0, limit], of the envelope of points."""
  corner_kls, corner_rewards = envelope(kls, rewards)
  inside = corner_kls < limit
  edges = np.append(corner_kls[inside], limit)
  heights = np.append(
    corner_rewards[inside], best_within(limit, (corner_kls, corner_rewards))
  )
  return float(np.trapezoid(heights, edges) / limit)


def compare_areas(ours, theirs, *, limit, resamples=10_000, seed=0):
  """Bootstraps the difference of the areas of two sets of checkpoints.

  Args:
    ours: checkpoints.
    theirs: checkpoints of the same prompts.
    limit: of the KL, nats.
    resamples: of the prompts.
    seed: of them.

  Returns:
    {'ours', 'theirs', 'difference', 'low', 'high', 'p'}: areas, an interval of
    95 % (percentiles), and the share of resamples in which ours is not larger,
    a one-sided p-value; it is at least 1 / (resamples + 1). Prompts alone are
    resampled: seeds and the noise of a best point of many are not in it, so
    both sides should have about as many checkpoints.
  """
  sides = [
    {name: np.array([c[name] for c in side]) for name in ('kl', 'reward')}
    for side in (ours, theirs)
  ]
  counts = {side['kl'].shape[1] for side in sides}
  if len(counts) != 1:
    raise ValueError(
      f'checkpoints of {sorted(counts)} prompts; compare those of the same ones'
    )
  (N,) = counts
  rng = np.random.default_rng(seed)

  def areas(weights_N):
    return [
      area(side['kl'] @ weights_N, side['reward'] @ weights_N, limit=limit)
      for side in sides
    ]

  whole = areas(np.full(N, 1.0 / N))
  drawn = np.array(
    [
      areas(rng.multinomial(N, np.full(N, 1.0 / N)) / N)
      for _ in range(resamples)
    ]
  )
  differences = drawn[:, 0] - drawn[:, 1]
  low, high = np.percentile(differences, [2.5, 97.5])
  return {
    'ours': whole[0],
    'theirs': whole[1],
    'difference': whole[0] - whole[1],
    'low': float(low),
    'high': float(high),
    'p': float((np.sum(differences <= 0.0) + 1) / (resamples + 1)),
  }
