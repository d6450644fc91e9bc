"""PPO's equations against NumPy in float64, and a bandit with an optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import rl

N, M = 5, 6


@pytest.fixture
def episodes():
  """Random arrays [N, M] and a mask of ragged samples, one of one token."""
  rng = np.random.default_rng(0)
  lengths = np.array([6, 1, 3, 5, 2])
  arrays = {
    name: rng.normal(size=(N, M))
    for name in ('logps', 'ref', 'values', 'rewards')
  }
  return arrays | {
    'scores': rng.normal(size=N),
    'lengths': lengths,
    'mask': np.arange(M) < lengths[:, None],
  }


# --- Rewards and advantages ---------------------------------------------------


def test_advantages_of_a_hand_example():
  advantages, returns = rl.generalized_advantages(
    jnp.array([[0.1, -0.2, 1.0, 9.0]]),
    jnp.array([[0.5, 0.4, 0.3, 9.0]]),
    jnp.array([[True, True, True, False]]),
    gamma=1.0,
    lam=0.95,
  )
  np.testing.assert_allclose(advantages, [[0.34675, 0.365, 0.7, 0]], rtol=1e-6)
  np.testing.assert_allclose(returns, [[0.84675, 0.765, 1.0, 0]], rtol=1e-6)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('gamma, lam', [(1.0, 0.95), (0.9, 0.5), (0.8, 1.0)])
def test_advantages_are_discounted_sums_of_errors(episodes, gamma, lam):
  rewards, values = episodes['rewards'], episodes['values']
  found, returns = rl.generalized_advantages(
    jnp.array(rewards),
    jnp.array(values),
    jnp.array(episodes['mask']),
    gamma=gamma,
    lam=lam,
  )
  for n, length in enumerate(episodes['lengths']):
    after = np.append(values[n, 1:length], 0.0)
    errors = rewards[n, :length] + gamma * after - values[n, :length]
    for t in range(length):
      powers = (gamma * lam) ** np.arange(length - t)
      np.testing.assert_allclose(found[n, t], powers @ errors[t:])
      if lam == 1.0:  # then a return is what really followed
        powers = gamma ** np.arange(length - t)
        np.testing.assert_allclose(returns[n, t], powers @ rewards[n, t:length])
    assert not np.any(found[n, length:]) and not np.any(returns[n, length:])


@pytest.mark.usefixtures('float64')
def test_token_rewards_sum_to_the_objective(episodes):
  mask = episodes['mask']
  rewards = np.asarray(
    rl.token_rewards(
      *(jnp.array(episodes[x]) for x in ('logps', 'ref', 'scores', 'mask')),
      kl_coef=0.3,
      kl='k1',
    )
  )
  log_ratios = episodes['logps'] - episodes['ref']
  kl = np.where(mask, log_ratios, 0.0).sum(1)
  np.testing.assert_allclose(rewards.sum(1), episodes['scores'] - 0.3 * kl)
  # The score is on the last token alone.
  for n, length in enumerate(episodes['lengths']):
    np.testing.assert_allclose(
      rewards[n, : length - 1], -0.3 * log_ratios[n, : length - 1]
    )
    assert not np.any(rewards[n, length:])


@pytest.mark.usefixtures('float64')
def test_both_estimators_have_the_kl_as_their_mean():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(7), 2)
  kl = np.sum(p * np.log(p / q))
  k1, k3 = (
    rl.KL_ESTIMATORS[name](jnp.log(p) - jnp.log(q)) for name in ('k1', 'k3')
  )
  np.testing.assert_allclose([p @ k1, p @ k3], kl)
  assert k1.min() < 0.0 <= k3.min()


def test_what_stands_after_the_end_has_no_influence(episodes):
  arrays = {name: jnp.float32(x) for name, x in episodes.items()}
  mask = jnp.array(episodes['mask'])

  def outputs(filling):
    logps, ref, values = (
      jnp.where(mask, arrays[name], filling)
      for name in ('logps', 'ref', 'values')
    )
    rewards = rl.token_rewards(
      logps, 2 * ref, arrays['scores'], mask, kl_coef=0.3, kl='k3'
    )
    whitened = rl.whiten(rewards, mask, keep_mean=True)
    found, returns = rl.generalized_advantages(
      whitened, values, mask, gamma=0.9, lam=0.9
    )
    return (
      rewards,
      whitened,
      found,
      returns,
      rl.whiten(found, mask, keep_mean=False),
      rl.explained_variance(values, returns, mask),
    )

  jax.tree.map(np.testing.assert_array_equal, outputs(0.0), outputs(-7.5))


@pytest.mark.usefixtures('float64')
def test_whitening_is_over_real_tokens(episodes):
  x, mask = jnp.array(episodes['values']), jnp.array(episodes['mask'])
  for keep_mean in (False, True):
    white = np.asarray(rl.whiten(x, mask, keep_mean=keep_mean))[mask]
    np.testing.assert_allclose(white.std(), 1.0, rtol=1e-6)
    mean = episodes['values'][episodes['mask']].mean() if keep_mean else 0.0
    np.testing.assert_allclose(white.mean(), mean, atol=1e-12)


@pytest.mark.usefixtures('float64')
def test_moments_join_and_normalize():
  rng = np.random.default_rng(0)
  parts = [rng.normal(3.0 * n, 1.0 + n, 4 + n) for n in range(3)]
  joined = functools.reduce(rl.joined, map(rl.moments, map(jnp.array, parts)))
  whole = np.concatenate(parts)
  np.testing.assert_allclose(joined['mean'], whole.mean(), rtol=1e-6)
  np.testing.assert_allclose(joined['variance'], whole.var(), rtol=1e-6)
  assert joined['count'] == len(whole)
  scores = rl.normalized(jnp.array(whole), joined)
  np.testing.assert_allclose(scores.mean(), 0.0, atol=1e-6)
  np.testing.assert_allclose(scores.std(), 1.0, rtol=1e-6)
  # Those of no rewards yet take the first ones' over.
  nothing = {'mean': 0.0, 'variance': 1.0, 'count': 0.0}
  first = rl.moments(jnp.array(parts[0]))
  jax.tree.map(np.testing.assert_allclose, rl.joined(nothing, first), first)
  np.testing.assert_array_equal(rl.normalized(parts[0], nothing), parts[0])


# --- Losses and control -------------------------------------------------------

RATIOS = np.array([0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 3.0])


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('advantage', [2.0, -2.0])
def test_policy_loss_and_its_gradient(advantage):
  logps, old = np.log(RATIOS) - 1.0, np.full(7, -1.0)

  def loss(logps):
    return rl.policy_losses(logps, old, advantage, clip=0.2)[0]

  expected = np.maximum(
    -advantage * RATIOS, -advantage * np.clip(RATIOS, 0.8, 1.2)
  )
  np.testing.assert_allclose(loss(logps), expected)
  slopes = jax.grad(lambda x: loss(x).sum())(jnp.array(logps))
  differences = (loss(logps + 1e-6) - loss(logps - 1e-6)) / 2e-6
  np.testing.assert_allclose(slopes, differences, rtol=1e-6, atol=1e-9)
  # Beyond the clip nothing pushes a ratio further the way it went.
  beyond = RATIOS > 1.2 if advantage > 0 else RATIOS < 0.8
  np.testing.assert_array_equal(np.asarray(slopes) == 0.0, beyond)
  clipped = rl.policy_losses(logps, old, advantage, clip=0.2)[1]
  np.testing.assert_array_equal(clipped, beyond)


@pytest.mark.usefixtures('float64')
def test_value_loss_and_its_gradient():
  values = np.array([-0.5, 0.05, 0.3, 0.3, 0.9])
  old = np.zeros(5)
  returns = np.array([-1.0, 1.0, 1.0, -0.5, 0.6])

  def loss(values):
    return rl.value_losses(values, old, returns, clip=0.2)[0]

  near = np.clip(values, -0.2, 0.2)
  expected = np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
  np.testing.assert_allclose(loss(values), expected)
  slopes = jax.grad(lambda x: loss(x).sum())(jnp.array(values))
  differences = (loss(values + 1e-6) - loss(values - 1e-6)) / 2e-6
  np.testing.assert_allclose(slopes, differences, rtol=1e-6, atol=1e-9)
  clipped = rl.value_losses(values, old, returns, clip=0.2)[1]
  assert clipped.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
  'kl, factor',
  [(9.0, 1.00512), (6.0, 1.0), (6.6, 1.00256), (0.0, 0.99488), (-3.0, 0.99488)],
)
def test_the_kl_coefficient_follows_its_target(kl, factor):
  found = rl.adapted(0.2, kl, target=6.0, horizon=1e4, samples=256)
  np.testing.assert_allclose(found, 0.2 * factor, rtol=1e-6)


def test_explained_variance(episodes):
  returns, mask = jnp.float32(episodes['rewards']), jnp.array(episodes['mask'])
  explained = functools.partial(rl.explained_variance, mask_NM=mask)
  np.testing.assert_allclose(explained(returns + 3.0, returns), 1.0, rtol=1e-6)
  np.testing.assert_allclose(explained(0 * returns, returns), 0.0, atol=1e-6)
  assert explained(-returns, returns) < -1.0
  assert explained(returns, jnp.ones_like(returns)) == 0.0


# --- A bandit of four actions -------------------------------------------------

REFERENCE = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS = np.array([0.0, 0.3, 0.6, 1.0])


def tilted(beta):
  """The optimum of DPO's equation 4: pi_ref exp(r / beta) / Z."""
  policy = REFERENCE * np.exp((REWARDS - 1.0) / beta)
  return policy / policy.sum()


def kl_to_reference(policy):
  return float(np.sum(policy * np.log(policy / REFERENCE)))


def best_reward(kl):
  """The most reward there is at this KL, by bisection over beta."""
  low, high = 1e-2, 1e3
  for _ in range(200):
    beta = np.sqrt(low * high)
    low, high = (
      (beta, high) if kl_to_reference(tilted(beta)) > kl else (low, beta)
    )
  return float(tilted(beta) @ REWARDS)


def ppo_on_the_bandit(*, coef, target=None, steps=300, samples=256):
  """Returns (policy, KL coefficient) after PPO; a sample has one token."""
  tx = optax.adam(optax.cosine_decay_schedule(0.03, 4 * steps))
  mask = jnp.ones((samples, 1), bool)
  params = {'logits': jnp.log(REFERENCE), 'value': jnp.zeros(())}

  def loss(params, batch):
    logps = jax.nn.log_softmax(params['logits'])[batch['action']]
    policy, _ = rl.policy_losses(
      logps, batch['logps'], batch['advantages'], clip=0.2
    )
    value, _ = rl.value_losses(
      params['value'], batch['values'], batch['returns'], clip=0.2
    )
    return jnp.mean(policy + 0.1 * value)

  def step(carry, key):
    params, opt_state, coef = carry
    logp = jax.nn.log_softmax(params['logits'])
    action = jax.random.categorical(key, logp, shape=(samples, 1))
    logps, ref = logp[action], jnp.log(REFERENCE)[action]
    values = jnp.full((samples, 1), params['value'])
    rewards = rl.token_rewards(
      logps, ref, jnp.array(REWARDS)[action[:, 0]], mask, kl_coef=coef, kl='k1'
    )
    advantages, returns = rl.generalized_advantages(
      rewards, values, mask, gamma=1.0, lam=0.95
    )
    batch = {
      'action': action,
      'logps': logps,
      'values': values,
      'advantages': rl.whiten(advantages, mask, keep_mean=False),
      'returns': returns,
    }
    for _ in range(4):
      updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state)
      params = optax.apply_updates(params, updates)
    if target:
      kl = jnp.mean(jnp.sum(logps - ref, axis=1))
      coef = rl.adapted(coef, kl, target=target, horizon=2e3, samples=samples)
    return (params, opt_state, coef), None

  keys = jax.random.split(jax.random.key(0), steps)
  carry = (params, tx.init(params), jnp.float32(coef))
  (params, _, coef), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(carry)
  policy = np.asarray(jax.nn.softmax(params['logits']), np.float64)
  return policy / policy.sum(), float(coef)


@pytest.mark.parametrize('coef', [0.1, 0.3, 1.0])
def test_ppo_reaches_the_frontier_of_the_bandit(coef):
  policy, _ = ppo_on_the_bandit(coef=coef)
  kl, start = kl_to_reference(policy), REFERENCE @ REWARDS
  # A share of what can be gained at this KL, not of the whole reward.
  assert policy @ REWARDS - start >= 0.98 * (best_reward(kl) - start)
  best = tilted(coef)
  assert np.sum(policy * np.log(policy / best)) < 0.01
  assert abs(kl - kl_to_reference(best)) < 0.15 * kl_to_reference(best)


def test_the_controller_brings_the_bandit_to_its_target():
  policy, coef = ppo_on_the_bandit(coef=0.02, target=0.5, steps=400)
  assert abs(kl_to_reference(policy) - 0.5) < 0.1
  assert coef > 0.1  # it began far too low
