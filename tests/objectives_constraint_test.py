"""What a constraint term must have: a gradient.

The cost of a text is a number that no parameter changes. Added to a loss it
shows in the loss and moves nothing: the negative control. The likelihood
penalty weighs the probability of the text with it, and moves that.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import scoring
from dpo_jax.losses import table

THRESHOLD = 0.5
# Four prompts, two answers of three tokens each over five words; word 4 is the
# forbidden one, and the cost is the share of it.
TOKENS = np.array(
  [
    [[0, 1, 4], [2, 3, 1]],
    [[4, 4, 4], [0, 2, 2]],
    [[1, 1, 0], [4, 3, 4]],
    [[4, 0, 4], [4, 4, 2]],
  ]
)
COSTS = np.mean(TOKENS == 4, axis=-1)
LOGITS = np.random.default_rng(0).normal(size=(4, 5))
REF_LOGITS = np.random.default_rng(1).normal(size=(4, 5))


def scores_of(logits, reduce):
  """Scores of a policy with one word distribution a prompt."""

  def logps(x):
    table_PV = jax.nn.log_softmax(jnp.asarray(x))
    return reduce(table_PV[np.arange(4)[:, None, None], TOKENS], axis=-1)

  return scoring.Scores(
    policy=logps(logits),
    ref=logps(REF_LOGITS),
    lengths=3.0,
    p=1.0,
    mask=True,
    costs=jnp.asarray(COSTS, jnp.float32),
  )


def dpo(logits):
  return jnp.mean(table.make('dpo')(scores_of(logits, jnp.sum)))


def naive(logits):
  """DPO plus relu(cost - threshold), as a constraint is often written down."""
  excess = jax.nn.relu(scores_of(logits, jnp.sum).costs - THRESHOLD)
  return dpo(logits) + jnp.mean(jnp.sum(excess, axis=-1))


def penalized(logits):
  penalty = table.make('likelihood_penalty', threshold=THRESHOLD)
  return dpo(logits) + jnp.mean(penalty(scores_of(logits, jnp.mean)))


def weighted(logits):
  return dpo(logits) + 10.0 * (penalized(logits) - dpo(logits))


def test_a_constant_penalty_shows_in_the_loss_and_has_dpos_gradient():
  assert naive(LOGITS) > dpo(LOGITS) + 0.1
  plain, constant = jax.grad(dpo)(LOGITS), jax.grad(naive)(LOGITS)
  assert np.abs(plain).max() > 1e-3
  np.testing.assert_array_equal(constant, plain)


def test_the_likelihood_penalty_has_a_gradient_of_its_own():
  extra = np.asarray(jax.grad(penalized)(LOGITS) - jax.grad(dpo)(LOGITS))
  over = (COSTS > THRESHOLD).any(axis=-1)
  assert over.tolist() == [False, True, True, True]
  # Where no answer is above the threshold, nothing changes.
  np.testing.assert_allclose(extra[0], 0.0, atol=1e-7)
  # Elsewhere a step down the gradient makes the forbidden word less likely.
  assert (extra[over, 4] > 1e-3).all()
  # The weight is the excess times the answer's own mean likelihood.
  expected = jax.grad(
    lambda x: jnp.mean(
      jnp.maximum(COSTS - 0.5, 0)
      * jnp.prod(
        jax.nn.softmax(x)[np.arange(4)[:, None, None], TOKENS], axis=-1
      )
      ** (1 / 3)
    )
  )(jnp.asarray(LOGITS))
  np.testing.assert_allclose(extra, expected, atol=1e-6)


def test_only_the_likelihood_penalty_lowers_the_cost_of_the_trained_policy():
  def forbidden(objective):
    gradient = jax.jit(jax.grad(objective))
    logits = jnp.asarray(LOGITS, jnp.float32)
    for _ in range(100):
      logits -= gradient(logits)
    return np.asarray(jax.nn.softmax(logits))[:, 4]

  plain = forbidden(dpo)
  np.testing.assert_array_equal(forbidden(naive), plain)
  assert forbidden(weighted)[1:].mean() < 0.5 * plain[1:].mean()


def test_the_sum_of_two_terms_is_what_a_config_binds():
  section = table.section('dpo+likelihood_penalty')
  section['likelihood_penalty']['weight'] = 10.0
  section['likelihood_penalty']['threshold'] = THRESHOLD
  terms = table.bind(section)
  assert [t.reduction for t in terms] == ['sum', 'mean']
  reduce = {'sum': jnp.sum, 'mean': jnp.mean}
  total = sum(
    t.weight * jnp.mean(table.values(t, scores_of(LOGITS, reduce[t.reduction])))
    for t in terms
  )
  np.testing.assert_allclose(total, weighted(LOGITS), rtol=1e-6)
