"""Frontiers against areas and orders worked out by hand."""

import numpy as np
import pytest

from dpo_jax import frontiers


def test_one_dominates_another_with_more_reward_and_less_kl():
  ours = np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.3, 0.5, 0.8, 0.9])
  theirs = np.array([1.5, 5.0]), np.array([0.6, 1.0])
  # (1, .3): 1.5 is not less KL; (2, .8): .6 is not more; (5, .9): 5 is not less
  assert frontiers.dominated(ours, theirs).tolist() == [
    False,
    True,
    False,
    False,
  ]


def test_the_area_is_that_under_the_steps():
  # best reward: .2 up to KL 1, .6 up to 3 (.5 at 2 is no better), .8 up to 4
  kls, rewards = [3.0, 0.0, 1.0, 2.0], [0.8, 0.2, 0.6, 0.5]
  expected = (1 * 0.2 + 2 * 0.6 + 1 * 0.8) / 4
  assert frontiers.area(kls, rewards, limit=4.0) == pytest.approx(expected)
  # What lies beyond the limit does not count.
  assert frontiers.area(kls, rewards, limit=2.0) == pytest.approx(
    (1 * 0.2 + 1 * 0.6) / 2
  )
  # Points of more KL and less reward change nothing.
  assert frontiers.area(
    kls + [3.5], rewards + [0.1], limit=4.0
  ) == pytest.approx(expected)


PROMPTS = np.random.default_rng(0).standard_normal(200)


def checkpoints(gain, *, seed, noise=0.01):
  """Reward gain * KL; the prompts differ by far more than the arms."""
  rng = np.random.default_rng(seed)
  return [
    {
      'kl': kl + 0.1 * rng.standard_normal(PROMPTS.size),
      'reward': gain * kl + PROMPTS + noise * rng.standard_normal(PROMPTS.size),
    }
    for kl in (0.0, 2.0, 4.0, 8.0)
  ]


def test_areas_are_compared_prompt_by_prompt():
  better, worse = checkpoints(0.11, seed=1), checkpoints(0.1, seed=2)
  found = frontiers.compare_areas(better, worse, limit=12.0, resamples=500)
  assert found['difference'] == found['ours'] - found['theirs']
  assert 0 < found['low'] < found['difference'] < found['high']
  assert found['p'] == pytest.approx(1 / 501)
  # Unpaired, the error of one mean alone would hide it.
  assert found['difference'] < PROMPTS.std() / PROMPTS.size**0.5
  turned = frontiers.compare_areas(worse, better, limit=12.0, resamples=500)
  assert turned['p'] == 1.0
  assert turned['difference'] == pytest.approx(-found['difference'])


def test_two_equal_sides_have_no_small_p():
  a, b = (checkpoints(0.1, seed=seed, noise=1.0) for seed in (1, 2))
  found = frontiers.compare_areas(a, b, limit=12.0, resamples=500)
  assert 0.01 < found['p'] < 0.99
  assert found['low'] < 0 < found['high']


def test_other_prompts_are_refused():
  fewer = [
    {name: x[:20] for name, x in c.items()} for c in checkpoints(1, seed=1)
  ]
  with pytest.raises(ValueError, match=r'checkpoints of \[20, 200\] prompts'):
    frontiers.compare_areas(fewer, checkpoints(1, seed=1), limit=12.0)
