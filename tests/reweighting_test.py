"""Best-of-N and tilting against enumeration and closed forms."""

import itertools

import numpy as np
import pytest

from dpo_jax import reweighting

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
  scores = np.array([0.3, 2.0, 0.3, -1.0, 0.7])  # two are equal
  expected = np.zeros(5)
  subsets = list(itertools.combinations(range(5), n))
  for subset in subsets:
    expected[max(subset, key=lambda i: (scores[i], -i))] += 1 / len(subsets)
  weights = reweighting.best_of(n, scores[None])[0]
  np.testing.assert_allclose(weights, expected, atol=1e-12)


def test_best_of_more_than_there_is_is_refused():
  with pytest.raises(ValueError, match='the best of 6 of 5 samples'):
    reweighting.best_of(6, np.zeros((1, 5)))


@pytest.mark.parametrize('n', [1, 4, 16, 64, 128])
def test_the_kl_of_best_of_n_is_below_its_bound(n):
  bound = reweighting.best_of_kl_bound(n)
  different = RNG.standard_normal((3, 4000))
  kls = reweighting.best_of_kl(n, different)
  assert (kls <= bound + 1e-12).all()
  assert kls == pytest.approx(bound, abs=0.02)  # reached as S grows
  coarse = np.round(different)  # equals are one: less is told apart
  assert n == 1 or (reweighting.best_of_kl(n, coarse) < kls - 0.01).all()


def test_published_bounds():
  # log N - (N - 1) / N, rounded to three digits.
  found = [reweighting.best_of_kl_bound(n) for n in (4, 16, 64, 128, 256)]
  assert found == pytest.approx([0.636, 1.835, 3.175, 3.860, 4.549], abs=5e-4)


def test_no_weights_of_equal_kl_have_more_reward_than_tilted_ones():
  rewards = RNG.standard_normal((1, 40))
  for beta in (0.3, 1.0, 3.0):
    best = reweighting.tilted(rewards, beta)
    assert best.sum() == pytest.approx(1.0)
    goal = (best * rewards).sum() - beta * reweighting.kl(best)[0]
    for _ in range(200):
      other = RNG.dirichlet(np.full(40, 0.5))[None]
      mixed = 0.9 * best + 0.1 * other  # near it too
      for weights in (other, mixed):
        value = (weights * rewards).sum() - beta * reweighting.kl(weights)[0]
        assert value < goal


def test_the_tilted_kl_grows_from_0_to_the_log_of_the_samples():
  rewards = RNG.standard_normal((2, 64))
  kls = [
    reweighting.kl(reweighting.tilted(rewards, beta)).mean()
    for beta in (1e6, 3.0, 1.0, 0.3, 1e-6)
  ]
  assert kls[0] == pytest.approx(0.0, abs=1e-9)
  assert kls[-1] == pytest.approx(np.log(64))
  assert np.all(np.diff(kls) > 0)
