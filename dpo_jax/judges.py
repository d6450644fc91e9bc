"""Judges: which of two responses is the better; and win rates, honestly told.

A judge is a function `judge(prompts, a, b) -> P(a wins)`, float [N] in [0, 1],
of three lists of texts. Ties are 1/2. A judge may like what comes first, so
every question is asked in both orders (arXiv:2306.05685, section 3.4).
"""

import math

import numpy as np

from dpo_jax import rewards


def by_reward(reward):
  """Returns the judge that prefers the response of the higher reward."""

  def judge(prompts, a, b):
    values_a, values_b = (rewards.score(reward, prompts, x) for x in (a, b))
    return (np.sign(values_a - values_b) + 1.0) / 2.0

  return judge


def noisy(judge, *, rate, seed):
  """Returns a judge that says the opposite of another at random.

  Args:
    judge: the other.
    rate: share of the answers that are turned, in [0, 1].
    seed: of which ones; one call after another turns different ones.
  """
  if not 0.0 <= rate <= 1.0:
    raise ValueError(f'rate is {rate}; use a share in [0, 1]')
  rng = np.random.default_rng(seed)

  def turned(prompts, a, b):
    wins = ask(judge, prompts, a, b)
    return np.where(rng.random(len(wins)) < rate, 1.0 - wins, wins)

  return turned


def ask(judge, prompts, a, b):
  """Returns `judge(prompts, a, b)` after checking its numbers."""
  if not len(prompts) == len(a) == len(b):
    raise ValueError(
      f'{len(prompts)} prompts, {len(a)} and {len(b)} responses; give two'
      ' responses to every prompt'
    )
  wins = np.asarray(judge(prompts, a, b), dtype=float)
  if wins.shape != (len(prompts),):
    raise ValueError(
      f'the judge returned shape {wins.shape} for {len(prompts)} questions; it'
      f' must return {(len(prompts),)}'
    )
  wrong = ~((wins >= 0.0) & (wins <= 1.0))  # NaN is
  if wrong.any():
    n = int(wrong.argmax())
    raise ValueError(
      f'the judge said {wins[n]} of question {n}; it must say a probability for'
      f'\n  prompt: {prompts[n]!r}\n  a:      {a[n]!r}\n  b:      {b[n]!r}'
    )
  return wins


def win_rate(judge, prompts, a, b):
  """Asks in both orders and returns how often `a` wins.

  Returns:
    {'win_rate', 'win_rate_se', 'low', 'high', 'consistent', 'wins'}: the mean
    over questions, its standard error, Wilson's interval of 95 %, the share of
    questions answered alike in both orders, and P(a wins) of each, float [N].
  """
  forth = ask(judge, prompts, a, b)
  back = 1.0 - ask(judge, prompts, b, a)
  wins = (forth + back) / 2.0
  count, mean = len(wins), float(wins.mean())
  low, high = wilson(mean, count)
  return {
    'win_rate': mean,
    'win_rate_se': standard_error(wins),
    'low': low,
    'high': high,
    'consistent': float(np.mean((forth > 0.5) == (back > 0.5))),
    'wins': wins,
  }


def standard_error(values):
  """Returns the standard error of a mean of independent values; 0 of one."""
  if len(values) < 2:
    return 0.0
  return float(np.std(values, ddof=1) / len(values) ** 0.5)


def wilson(share, count, *, z=1.959964):
  """Returns the interval (low, high) of a share of `count` trials.

  Wilson 1927; `z` is the normal quantile, here of 95 %.
  """
  middle = share + z**2 / (2 * count)
  half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
  whole = 1 + z**2 / count
  return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)
