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
  sides = _by_prompt(ours), _by_prompt(theirs)

  def areas(weights_N):
    return [
      area(kl_CN @ weights_N, reward_CN @ weights_N, limit=limit)
      for kl_CN, reward_CN in sides
    ]

  found = _resampled(areas, sides, resamples=resamples, seed=seed)
  whole, differences = found[0], found[1:, 0] - found[1:, 1]
  return {
    'ours': float(whole[0]),
    'theirs': float(whole[1]),
    'difference': float(whole[0] - whole[1]),
  } | _spread(differences)


def lead(ours, checkpoint, *, resamples=10_000, seed=0):
  """Bootstraps how far the envelope of checkpoints is above one of others.

  Args:
    ours: checkpoints.
    checkpoint: another one, of the same prompts.
    resamples, seed: see `compare_areas`.

  Returns:
    {'difference', 'low', 'high', 'p'}: rewards at the KL of `checkpoint`, as in
    `compare_areas`.
  """
  sides = _by_prompt(ours), _by_prompt([checkpoint])

  def gap(weights_N):
    (kls, values), (kl, value) = (
      [column @ weights_N for column in side] for side in sides
    )
    return best_within(kl[0], envelope(kls, values)) - value[0]

  found = _resampled(gap, sides, resamples=resamples, seed=seed)
  return {'difference': float(found[0])} | _spread(found[1:])


def _by_prompt(checkpoints):
  """Returns (KLs, rewards) by checkpoint and prompt, [C, N] each."""
  return tuple(
    np.array([c[name] for c in checkpoints]) for name in ('kl', 'reward')
  )


def _resampled(statistic, sides, *, resamples, seed):
  """Returns a statistic of weights of prompts: of equal ones, of resamples."""
  counts = {side[0].shape[1] for side in sides}
  if len(counts) != 1:
    raise ValueError(
      f'checkpoints of {sorted(counts)} prompts; compare those of the same ones'
    )
  (N,) = counts
  rng, equal = np.random.default_rng(seed), np.full(N, 1.0 / N)
  drawn = (rng.multinomial(N, equal) / N for _ in range(resamples))
  return np.array([statistic(weights_N) for weights_N in (equal, *drawn)])


def _spread(differences):
  low, high = np.percentile(differences, [2.5, 97.5])
  return {
    'low': float(low),
    'high': float(high),
    'p': float((np.sum(differences <= 0.0) + 1) / (len(differences) + 1)),
  }
