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


def test_the_envelope_is_concave_and_rises():
  # (2, .5) is below the line from (1, .6) to (3, .8); (3.5, .1) is below all.
  kls, rewards = [3.0, 0.0, 1.0, 2.0, 3.5], [0.8, 0.2, 0.6, 0.5, 0.1]
  corners = frontiers.envelope(kls, rewards)
  np.testing.assert_array_equal(corners, [[0.0, 1.0, 3.0], [0.2, 0.6, 0.8]])
  # A later, higher point takes corners away; what is right of all stays level.
  corners = frontiers.envelope([*kls, 4.0], [*rewards, 1.9])
  np.testing.assert_array_equal(corners, [[0.0, 4.0], [0.2, 1.9]])
  assert frontiers.best_within([2.0, 9.0], corners).tolist() == [1.05, 1.9]
  # Of two points of one KL the better counts, and nothing is known before it.
  corners = frontiers.envelope([2.0, 2.0], [0.3, 0.4])
  np.testing.assert_array_equal(corners, [[0.0], [0.4]])


def test_the_area_is_that_under_the_envelope():
  kls, rewards = [3.0, 0.0, 1.0, 2.0], [0.8, 0.2, 0.6, 0.5]
  expected = (1 * 0.4 + 2 * 0.7 + 1 * 0.8) / 4
  assert frontiers.area(kls, rewards, limit=4.0) == pytest.approx(expected)
  # What lies beyond the limit counts by the line that leads there.
  assert frontiers.area(kls, rewards, limit=2.0) == pytest.approx(
    (1 * 0.4 + 1 * 0.65) / 2
  )


def test_an_area_hardly_depends_on_how_often_a_run_was_measured():
  areas, steps = [], []
  for number in (6, 26):
    kls = np.linspace(0.0, 11.0, number)
    rewards = 1 - np.exp(-kls / 4)
    areas.append(frontiers.area(kls, rewards, limit=12.0))
    steps.append((np.diff(kls, append=12.0) * rewards).sum() / 12)
  assert steps[1] - steps[0] > 0.06  # as much as methods differ by
  assert 0.0 < areas[1] - areas[0] < 0.01
  fine = np.linspace(0.0, 12.0, 10_001)
  assert np.mean(1 - np.exp(-fine / 4)) - areas[1] < 0.001


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


def test_one_checkpoint_is_held_against_an_envelope():
  ours, other = checkpoints(0.11, seed=1), checkpoints(0.1, seed=2)[1]
  found = frontiers.lead(ours, other, resamples=500)
  # At 2 nats .22 against .2, of the same prompts.
  assert found['difference'] == pytest.approx(0.02, abs=0.005)
  assert 0 < found['low'] < found['difference'] < found['high']
  assert found['p'] == pytest.approx(1 / 501)
  corner = frontiers.lead(ours, ours[-1], resamples=500)
  assert corner['difference'] == pytest.approx(0.0, abs=1e-12)


def test_other_prompts_are_refused():
  fewer = [
    {name: x[:20] for name, x in c.items()} for c in checkpoints(1, seed=1)
  ]
  with pytest.raises(ValueError, match=r'checkpoints of \[20, 200\] prompts'):
    frontiers.compare_areas(fewer, checkpoints(1, seed=1), limit=12.0)
