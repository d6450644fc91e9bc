"""What losses converge to, where the answer is known in closed form.

Policies are tables: one logit per response, all responses enumerated, losses
summed over the whole population of pairs. So nothing is left to chance, and
what the losses' minima are is what is tested.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.losses import choices
from dpo_jax.losses import scoring
from dpo_jax.losses import table

pytestmark = pytest.mark.usefixtures('float64')


def sigmoid(z):
  return 1.0 / (1.0 + np.exp(-z))


def kl(logp, logq):
  return float(np.sum(np.exp(logp) * (logp - logq)))


def normalized(logits):
  return logits - np.logaddexp.reduce(logits)


def population(
  loss, ref_logp, groups, weights, *, policy=jax.nn.log_softmax, rewards=None
):
  """Returns parameters -> weighted sum of the losses of groups of responses.

  Args:
    loss: of `table.make`.
    ref_logp: [N] of all responses.
    groups: [..., K] indices of responses, chosen first.
    weights: [...], of the groups.
    policy: parameters -> log-probs of all responses.
    rewards: [N] or None.
  """
  ref_logp = jnp.asarray(ref_logp)
  rewards = None if rewards is None else jnp.asarray(rewards)[groups]

  def total(parameters):
    scores = scoring.Scores(
      policy(parameters)[groups], ref_logp[groups], rewards=rewards
    )
    return jnp.sum(weights * loss(scores))

  return total


def pairs_of(N):
  """All ordered pairs of N different responses: [N (N-1), 2]."""
  return np.array(list(itertools.permutations(range(N), 2)))


def minimum(total, parameters, *, steps, lr):
  """Parameters after Adam, whose rate falls to 0."""
  tx = optax.adam(optax.cosine_decay_schedule(lr, steps))

  def step(carry, _):
    parameters, state = carry
    updates, state = tx.update(jax.grad(total)(parameters), state)
    return (optax.apply_updates(parameters, updates), state), None

  @jax.jit
  def run(parameters):
    start = (parameters, tx.init(parameters))
    return jax.lax.scan(step, start, length=steps)[0][0]

  return np.asarray(run(jnp.asarray(parameters, jnp.float64)))


# --- DPO: arXiv:2305.18290, eq. 4, over all sequences of T letters of 4 ---


def sequences(T):
  """A reference that draws letter by letter, and rewards in (0, 1)."""
  rng = np.random.default_rng(0)
  letters = np.array(list(itertools.product(range(4), repeat=T)))
  before = np.concatenate([np.full((len(letters), 1), 4), letters[:, :-1]], 1)
  transitions = np.log(rng.dirichlet(np.ones(4), size=5))
  taste = rng.standard_normal((5, 4))
  ref_logp = transitions[before, letters].sum(-1)
  taste = taste[before, letters].sum(-1)
  rewards = sigmoid((taste - taste.mean()) / taste.std())
  return ref_logp, rewards


def optimum(ref_logp, rewards, beta):
  """Eq. 4: log pi* = log pi_ref + r / beta - log Z."""
  return normalized(ref_logp + rewards / beta)


def frontier(ref_logp, rewards, budget):
  """The largest expected reward at this KL: that of an eq. 4 policy."""
  low, high = 1e-4, 1e4
  for _ in range(100):
    beta = np.sqrt(low * high)
    policy = optimum(ref_logp, rewards, beta)
    low, high = (beta, high) if kl(policy, ref_logp) > budget else (low, beta)
  return np.exp(policy) @ rewards


def descent(ref_logp, preferred, *, beta, rate):
  """One step down DPO's population loss: logits -> logits.

  Both responses of a pair are drawn from the reference. The gradient is
  divided by the reference's probabilities, or rare responses would take ages.
  """
  N = len(ref_logp)
  ref = np.exp(ref_logp)
  i, j = np.indices((N, N))
  total = population(
    table.make('dpo', beta=beta),
    ref_logp,
    np.stack([i, j], axis=-1),
    ref[:, None] * ref * preferred,
  )
  return jax.jit(lambda logits: logits - rate * jax.grad(total)(logits) / ref)


@pytest.mark.parametrize('beta', [0.05, 0.1, 1.0, 5.0])
def test_dpo_on_bradley_terry_labels_is_the_optimal_policy(beta):
  ref_logp, rewards = sequences(5)
  step = descent(
    ref_logp,
    sigmoid(rewards[:, None] - rewards),
    beta=beta,
    rate=4.0 / beta**2,
  )
  logits = jnp.asarray(ref_logp)
  for _ in range(5):
    logits = step(logits)
  policy = normalized(np.asarray(logits))
  best = optimum(ref_logp, rewards, beta)
  assert abs(kl(policy, best)) < 1e-9
  # The reference is far from it, and so are the optima of other betas.
  for other in (ref_logp, optimum(ref_logp, rewards, 1.2 * beta)):
    assert kl(other, best) > 1e-5
  # The implicit rewards are the rewards (eq. 5).
  implicit = scoring.implicit_rewards(
    scoring.Scores(policy, ref_logp), beta=beta
  )
  np.testing.assert_allclose(
    implicit - np.mean(implicit), rewards - rewards.mean(), atol=1e-6
  )


@pytest.mark.parametrize('beta', [0.05, 0.1, 1.0, 5.0])
def test_dpo_on_deterministic_labels_walks_along_the_frontier(beta):
  """No policy is the minimum: KL grows for ever, whatever beta is."""
  ref_logp, rewards = sequences(4)
  step = descent(
    ref_logp, rewards[:, None] > rewards, beta=beta, rate=1.0 / beta
  )
  logits, kls = jnp.asarray(ref_logp), []
  for i in range(200):
    logits = step(logits)
    if i + 1 in (10, 25, 50, 100, 200):
      policy = normalized(np.asarray(logits))
      kls.append(kl(policy, ref_logp))
      reward = np.exp(policy) @ rewards
      assert 0.0 <= frontier(ref_logp, rewards, kls[-1]) - reward < 0.005
  assert (np.diff(kls) > 0.1).all()
  if beta >= 1.0:  # beyond the KL that beta would allow with noisy labels
    assert kls[0] > 5 * kl(optimum(ref_logp, rewards, beta), ref_logp)


# --- IPO: arXiv:2310.12036, section 5, three actions a, b, c ---

TOTAL_ORDER = np.array([[0, 1], [1, 2], [0, 2]])
NEVER_WINS = np.array([[0, 1], [1, 0], [0, 2]])
TAUS = (0.1, 0.3, 0.5, 1.0)


def bandit(name, pairs, beta):
  """The policy that 18,000 steps of Adam with rate 0.01 find."""
  total = population(
    table.make(name, beta=beta), np.log(np.full(3, 1 / 3)), pairs, 1 / 3
  )
  return normalized(minimum(total, np.zeros(3), steps=18_000, lr=0.01))


@pytest.mark.parametrize('tau', TAUS)
def test_ipo_keeps_the_gaps_of_a_total_order_finite(tau):
  a, b, c = bandit('ipo_sum', TOTAL_ORDER, tau)
  np.testing.assert_allclose([a - b, b - c], 1 / (3 * tau), rtol=0.01)


@pytest.mark.parametrize('tau', TAUS)
def test_ipo_keeps_an_action_that_never_wins(tau):
  a, b, c = bandit('ipo_sum', NEVER_WINS, tau)
  np.testing.assert_allclose(a - c, 1 / (2 * tau), rtol=0.01)
  np.testing.assert_allclose(a - b, 0.0, atol=0.01)


@pytest.mark.parametrize('beta', [0.1, 1.0])
def test_dpo_drives_the_same_bandits_to_certainty(beta):
  assert np.exp(bandit('dpo', TOTAL_ORDER, beta)[0]) > 0.99
  assert np.exp(bandit('dpo', NEVER_WINS, beta)[2]) < 0.01


@pytest.mark.parametrize('tau', [0.1, 1.0])
def test_ipo_of_two_actions_is_a_sigmoid(tau):
  total = population(
    table.make('ipo_sum', beta=tau), np.log([0.5, 0.5]), np.array([[0, 1]]), 1.0
  )
  policy = normalized(minimum(total, np.zeros(2), steps=4000, lr=0.01))
  np.testing.assert_allclose(np.exp(policy[0]), sigmoid(0.5 / tau), rtol=1e-3)


# --- Noisy labels, f-divergences, rankings: five responses ---

UTILITIES = np.array([0.9, 0.1, -0.4, 0.6, -1.2])
REF_LOGP = np.log(np.array([0.1, 0.3, 0.25, 0.2, 0.15]))
ALL_PAIRS = pairs_of(5)
PREFERRED = sigmoid(UTILITIES[ALL_PAIRS] @ [1.0, -1.0])


def solve(name, weights, *, groups=ALL_PAIRS, steps=2000, lr=0.05, **options):
  """The policy that minimizes a loss over these groups: [N] log-probs."""
  total = population(table.make(name, **options), REF_LOGP, groups, weights)
  return normalized(minimum(total, REF_LOGP, steps=steps, lr=lr))


@pytest.mark.parametrize('flips', [0.1, 0.3, 0.4])
def test_robust_dpo_finds_the_clean_optimum_among_flipped_labels(flips):
  noisy = (1 - flips) * PREFERRED + flips * (1 - PREFERRED)
  best = optimum(REF_LOGP, UTILITIES, 0.5)
  robust = solve('robust', noisy, label_smoothing=flips, beta=0.5)
  assert kl(robust, best) < 1e-6
  # Plain and conservative DPO learn the noise.
  plain = kl(solve('dpo', noisy, beta=0.5), best)
  conservative = solve('cdpo', noisy, label_smoothing=flips, beta=0.5)
  assert 1e-3 < plain < kl(conservative, best)


@pytest.mark.parametrize('flips', [0.1, 0.3, 0.4])
def test_robust_dpos_noisy_gradient_is_dpos_clean_one(flips):
  """At any policy, not only at the minimum."""
  noisy = (1 - flips) * PREFERRED + flips * (1 - PREFERRED)
  clean = population(table.make('dpo'), REF_LOGP, ALL_PAIRS, PREFERRED)
  robust = population(
    table.make('robust', label_smoothing=flips), REF_LOGP, ALL_PAIRS, noisy
  )
  for seed in range(3):
    logits = 5.0 * np.random.default_rng(seed).standard_normal(5)
    for one, other in zip(
      jax.value_and_grad(robust)(logits), jax.value_and_grad(clean)(logits)
    ):
      np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


# Inverses of f': from score to u = pi / pi_ref.
INVERSES = {
  'reverse_kl': np.exp,
  'forward_kl': lambda s: 1 / (1 - s),
  'js': lambda s: np.exp(s) / (2 - np.exp(s)),
  'alpha:0.5': lambda s: (1 - 0.5 * s) ** (-1 / 0.5),
}
# Scores are below these.
BOUNDS = {
  'reverse_kl': 50.0,
  'forward_kl': 1.0,
  'js': np.log(2),
  'alpha:0.5': 2.0,
}


def regularized(link, beta):
  """pi_ref (f')^-1((r - lambda) / beta), lambda found by bisection."""
  low = UTILITIES.max() - beta * BOUNDS[link]
  high = UTILITIES.max() + 100.0 * beta
  for _ in range(200):
    shift = (low + high) / 2
    u = INVERSES[link]((UTILITIES - shift) / beta)
    too_much = np.exp(REF_LOGP) @ u > 1.0
    low, high = (shift, high) if too_much else (low, shift)
  return REF_LOGP + np.log(u)


@pytest.mark.parametrize('beta', [0.3, 1.0])
@pytest.mark.parametrize('link', INVERSES)
def test_links_find_the_f_regularized_optimum(link, beta):
  """f-DPO, arXiv:2309.16240, theorem 1."""
  best = regularized(link, beta)
  np.testing.assert_allclose(np.exp(best).sum(), 1.0, rtol=1e-9)
  policy = solve('dpo', PREFERRED, beta=beta, link=link)
  np.testing.assert_allclose(np.exp(policy), np.exp(best), atol=1e-5)
  if link != 'reverse_kl':
    assert abs(kl(best, optimum(REF_LOGP, UTILITIES, beta))) > 1e-4


def test_every_link_has_its_closed_form():
  assert {link.partition(':')[0] for link in INVERSES} == set(choices.LINKS)


@pytest.mark.parametrize('top', [0, 1])
def test_plackett_luce_recovers_the_utilities_of_rankings(top):
  """All rankings of three of five responses, as often as they are drawn."""
  rankings = np.array(list(itertools.permutations(range(5), 3)))
  drawn = UTILITIES[rankings]
  first = np.exp(drawn[:, 0]) / np.exp(drawn).sum(-1)
  second = sigmoid(drawn[:, 1] - drawn[:, 2])
  policy = solve(
    'plackett_luce', first * second, groups=rankings, beta=0.5, top=top
  )
  np.testing.assert_allclose(
    policy, optimum(REF_LOGP, UTILITIES, 0.5), atol=1e-5
  )


# --- EXO seeks a mode, DPO covers all: a policy with one hump, two wanted ---

PLACES = np.linspace(-1.0, 1.0, 21)
UNIFORM = np.full(21, -np.log(21))
TWO_HUMPS = normalized(
  np.logaddexp(-(((PLACES - 0.5) / 0.17) ** 2), -(((PLACES + 0.5) / 0.17) ** 2))
)


def one_hump(parameters):
  """A normal distribution on the places: mean, log standard deviation."""
  mean, log_std = parameters
  return jax.nn.log_softmax(
    -((PLACES - mean) ** 2) / (2 * jnp.exp(2 * log_std))
  )


def fitted(name, groups, weights, **options):
  """The best policy of one hump where exp(reward) has two."""
  total = population(
    table.make(name, beta=1.0, **options),
    UNIFORM,
    groups,
    weights,
    policy=one_hump,
    rewards=TWO_HUMPS,
  )
  # From the middle, and from near a hump: what is better.
  found = [
    minimum(total, [mean, np.log(0.3)], steps=1000, lr=0.05)
    for mean in (0.0, 0.3)
  ]
  return np.asarray(one_hump(min(found, key=total)))


def test_exo_seeks_a_mode_where_dpo_covers_both():
  """arXiv:2402.00856, figure 1: reverse against forward KL to exp(reward)."""
  everything = np.arange(21)[None]
  exo = fitted(
    'exo', everything, 1.0, reward_temperature=1.0, label_smoothing=0.0
  )
  infonca = fitted('infonca', everything, 1.0, reward_temperature=1.0)
  pairs = pairs_of(21)
  dpo = fitted('dpo', pairs, sigmoid(TWO_HUMPS[pairs] @ [1.0, -1.0]))

  right = PLACES > 0.0
  assert np.exp(exo)[right].sum() > 0.99
  # Half of the wanted probability, all of it in one place: KL is ln 2.
  np.testing.assert_allclose(kl(exo, TWO_HUMPS), np.log(2), atol=0.01)
  for forward in (dpo, infonca):
    assert 0.4 < np.exp(forward)[right].sum() < 0.6
    assert kl(exo, TWO_HUMPS) < kl(forward, TWO_HUMPS) - 0.5
    assert kl(TWO_HUMPS, forward) < kl(TWO_HUMPS, exo) - 0.5
  # Of all policies of one hump, InfoNCA's has the least forward KL.
  assert kl(TWO_HUMPS, infonca) < kl(TWO_HUMPS, dpo)
