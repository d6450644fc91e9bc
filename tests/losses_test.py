"""Numbers, gradients and identities of METHODS: every loss, every row."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import losses

# Three pairs whose losses were worked out by hand in float64.
POLICY = np.array([[-12.0, -15.0], [-20.0, -18.0], [-30.0, -45.0]])
REF = np.array([[-13.0, -14.5], [-19.0, -18.5], [-40.0, -35.0]])
LENGTHS = np.array([[6.0, 8.0], [10.0, 9.0], [12.0, 20.0]])
MARGINS = np.array([1.5, -1.5, 20.0])

CASES = [
  ('dpo', {'beta': 0.1}, [0.620957, 0.770957, 0.126928]),
  (
    'cdpo',
    {'beta': 0.1, 'label_smoothing': 0.1},
    [0.635957, 0.755957, 0.326928],
  ),
  ('soft', {'beta': 0.1}, [0.650957, 0.740957, 0.526928]),
  ('ipo_sum', {'beta': 0.1}, [12.25, 42.25, 225.0]),
  ('ipo_mean', {'beta': 0.1}, [22.760851, 26.579753, 13.444444]),
  ('sft', {'reduction': 'sum'}, [12.0, 20.0, 30.0]),
  ('sft', {'reduction': 'mean'}, [2.0, 2.0, 2.5]),
]


def scores(policy=POLICY, *, p=0.8):
  policy = jnp.asarray(policy, jnp.float32)
  return losses.Scores(
    policy,
    jnp.asarray(REF, jnp.float32),
    jnp.asarray(LENGTHS, jnp.float32),
    jnp.full(policy.shape[:-1], p),
  )


def test_every_loss_has_a_case():
  assert {name for name, _, _ in CASES} == set(losses.LOSSES)


@pytest.mark.parametrize('name, keywords, expected', CASES)
def test_golden_values(name, keywords, expected):
  _, function = losses.bind(name, keywords)
  np.testing.assert_allclose(function(scores()), expected, rtol=3e-6)


@pytest.mark.parametrize('name, keywords, expected', CASES)
def test_gradient_equals_finite_differences(name, keywords, expected):
  del expected
  _, function = losses.bind(name, keywords)
  with jax.enable_x64(True):
    inputs = losses.Scores(
      jnp.asarray(POLICY),
      jnp.asarray(REF),
      jnp.asarray(LENGTHS),
      jnp.full(3, 0.8),
    )

    @jax.jit
    def total(policy):
      return jnp.sum(function(inputs._replace(policy=policy)))

    grad = np.asarray(jax.grad(total)(inputs.policy))
    step = 1e-5
    for i in np.ndindex(POLICY.shape):
      up, down = POLICY.copy(), POLICY.copy()
      up[i] += step
      down[i] -= step
      slope = (total(jnp.asarray(up)) - total(jnp.asarray(down))) / (2 * step)
      np.testing.assert_allclose(grad[i], slope, atol=1e-6)


@pytest.mark.parametrize('name, keywords, expected', CASES)
def test_a_better_chosen_response_never_costs_more(name, keywords, expected):
  del expected
  _, function = losses.bind(name, keywords)
  grad = jax.grad(lambda p: jnp.sum(function(scores(p, p=1.0))))(
    jnp.asarray(REF, jnp.float32)
  )
  assert (np.asarray(grad[:, 0]) < 0).all()
  assert (np.asarray(grad[:, 1]) >= 0).all()


@pytest.mark.parametrize('name, keywords, expected', CASES)
@pytest.mark.parametrize('size', [1e4, -1e4])
def test_extreme_scores_stay_finite(name, keywords, expected, size):
  del expected
  _, function = losses.bind(name, keywords)
  policy = POLICY + size * np.array([1.0, -1.0])
  value, grad = jax.jit(
    jax.value_and_grad(lambda p: jnp.sum(function(scores(p))))
  )(jnp.asarray(policy, jnp.float32))
  assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize('name', ['dpo', 'cdpo', 'soft'])
def test_loss_is_ln_2_where_policy_is_reference(name):
  loss, function = losses.bind(name, losses.get(name).defaults)
  assert loss.reference
  np.testing.assert_allclose(
    function(scores(REF, p=0.3)), math.log(2), atol=1e-7
  )


def test_gradient_weight_is_that_of_the_paper():
  beta = 0.1
  _, function = losses.bind('dpo', {'beta': beta})
  grad = jax.grad(lambda p: jnp.sum(function(scores(p))))(
    jnp.asarray(POLICY, jnp.float32)
  )
  weight = [0.462570, 0.537430, 0.119203]  # sigmoid(r_rejected - r_chosen)
  np.testing.assert_allclose(grad[:, 0], -beta * np.array(weight), rtol=1e-5)
  np.testing.assert_allclose(grad[:, 1], beta * np.array(weight), rtol=1e-5)


def test_cdpo_identities():
  dpo = losses.dpo(scores(), beta=0.1)
  plain = losses.cdpo(scores(), beta=0.1, label_smoothing=0.0)
  np.testing.assert_array_equal(plain, dpo)
  smoothed = losses.cdpo(scores(), beta=0.1, label_smoothing=0.3)
  soft = losses.soft(scores(p=0.7), beta=0.1)
  np.testing.assert_allclose(soft, smoothed, rtol=1e-6)
  np.testing.assert_allclose(losses.soft(scores(p=1.0), beta=0.1), dpo)


@pytest.mark.parametrize('name', ['dpo', 'cdpo', 'soft', 'ipo_sum'])
def test_shifting_both_log_probs_of_a_pair_changes_nothing(name):
  _, function = losses.bind(name, losses.get(name).defaults)
  moved = POLICY + np.array([[3.0], [-7.0], [0.5]])
  np.testing.assert_allclose(
    function(scores(moved)), function(scores()), rtol=1e-5
  )


def test_ipo_mean_is_ipo_sum_of_per_token_means():
  mean = losses.Scores(
    scores().policy / LENGTHS, scores().ref / LENGTHS, None, None
  )
  np.testing.assert_allclose(
    losses.ipo_mean(scores(), beta=0.3),
    losses.ipo_sum(mean, beta=0.3),
    rtol=1e-5,
  )


def test_the_papers_own_signature():
  # Completions 0, 2 are preferred to 1, 3; completion 4 is in no pair.
  pi = jnp.array([-12.0, -15.0, -20.0, -18.0, -1.0])
  ref = jnp.array([-13.0, -14.5, -19.0, -18.5, -3.0])
  values, rewards = losses.dpo_loss(
    pi, ref, jnp.array([0, 2]), jnp.array([1, 3]), 0.1
  )
  np.testing.assert_allclose(values, [0.620957, 0.770957], rtol=3e-6)
  np.testing.assert_allclose(rewards, [0.1, -0.05, -0.1, 0.05, 0.2], rtol=1e-5)
  slope = jax.grad(
    lambda pi: losses.dpo_loss(pi, ref, jnp.array([0]), jnp.array([1]), 0.1)[
      1
    ].sum()
  )(pi)
  np.testing.assert_array_equal(slope, 0.0)


def test_unknown_loss_names_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'ipo_sum'"):
    losses.get('ipo_sun')


@pytest.mark.parametrize('keywords', [{}, {'beta': 0.1, 'alpha': 1.0}])
def test_keywords_must_fit(keywords):
  with pytest.raises(ValueError, match="loss 'dpo' takes"):
    losses.bind('dpo', keywords)


def test_sft_reduction_is_checked():
  with pytest.raises(ValueError, match="use 'sum' or 'mean'"):
    losses.sft(scores(), reduction='median')
