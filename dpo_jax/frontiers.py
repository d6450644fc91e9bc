"""Reward against KL: which of two sets of checkpoints is the better frontier.

A checkpoint is what evaluation measured of it, by prompt: {'kl': [N],
'reward': [N]}, means over the prompt's samples. All checkpoints that are
compared have the same prompts in the same order, which are resampled together:
a bootstrap over prompts, paired (METHODS of arXiv:2305.18290 have neither).

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


def area(kls, rewards, *, limit):
  """Returns the mean, over KLs in [0, limit], of the best reward within a KL.

  At a KL below that of all points it is the reward of the point with the least,
  which the start of training, of KL 0, makes no assumption. A step function:
  nothing is drawn between points.
  """
  order = np.argsort(kls, kind='stable')
  kls, best = np.asarray(kls)[order], np.asarray(rewards)[order]
  best = np.maximum.accumulate(best)
  inside = kls < limit
  if not inside.any():
    return float(best[0])
  edges = np.concatenate([[0.0], kls[inside][1:], [limit]])
  return float(np.sum(np.diff(edges) * best[inside]) / limit)


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
    a one-sided p-value; it is at least 1 / (resamples + 1).
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
