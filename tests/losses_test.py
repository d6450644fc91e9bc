"""Every loss against numbers, gradients, identities and its own docstring."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import levels
from dpo_jax.losses import margins
from dpo_jax.losses import scoring
from dpo_jax.losses import table
from tests import cases

SEEDS = [0, 1, 2]
every_loss = pytest.mark.parametrize('name', table.LOSSES)


# --- Numbers ---


def test_every_loss_has_a_case():
  missing = set(table.LOSSES) ^ {case.name for case in cases.ALL}
  assert not missing, 'give it a case in GOLDEN or FORMULAS of tests/cases.py'


@every_loss
def test_a_loss_has_a_reference_if_it_looks_at_one(name):
  scores, function = cases.draw(0), table.make(name)
  moved = scores._replace(ref=scores.ref + jnp.array([0.7, -1.3]))
  looks = np.abs(function(moved) - function(scores)).max() > 0.0
  assert looks == table.get(name).reference, f'set reference={looks} in its row'


@pytest.mark.parametrize('case', cases.GOLDEN, ids=str)
@pytest.mark.usefixtures('float64')
def test_losses_are_the_golden_numbers(case):
  actual, _ = cases.measure(case.name, case.options, cases.scores(case))
  # The numbers are printed with six digits.
  np.testing.assert_allclose(actual, case.expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('case', cases.FORMULAS, ids=str)
@pytest.mark.usefixtures('float64')
def test_losses_are_the_papers_formulas(case):
  actual, _ = cases.measure(case.name, case.options, cases.scores(case))
  np.testing.assert_allclose(actual, case.expected, rtol=1e-12)


def test_gradient_weight_of_dpo_is_the_papers():
  weight = np.array([0.462570, 0.537430, 0.119203])  # sigmoid(r_l - r_w)
  grad = cases.slopes(table.make('dpo', beta=0.1), scoring.example())
  np.testing.assert_allclose(grad[:, 0], -0.1 * weight, rtol=1e-5)
  np.testing.assert_allclose(grad[:, 1], 0.1 * weight, rtol=1e-5)


# --- Gradients ---

# Responses whose gradient a method stops, though its value moves with them.
STOPPED = {('kto', 'policy'): 1, ('tdpo2', 'kls'): 0}


def check_gradient(name, options, scores, field, step=1e-5):
  x = np.asarray(getattr(scores, field))
  expected = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    move = np.zeros_like(x)
    move[i] = step
    up, down = (
      cases.measure(name, options, scores._replace(**{field: y}), field)[0]
      for y in (x + move, x - move)
    )
    expected[i] = np.sum(np.asarray(up) - np.asarray(down)) / (2 * step)
  if (name, field) in STOPPED:
    expected[..., STOPPED[name, field]] = 0.0
  _, grad = cases.measure(name, options, scores, field)
  # A difference keeps the rounding of the sizes that it is taken of.
  size = np.abs(cases.measure(name, options, scores, field)[0]).max()
  atol = 1e-8 + 4 * np.finfo(np.float64).eps * size / step
  np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=atol)
  assert np.abs(grad).max() > 0


def shifts(name, options):
  """BCO's shift moves with the policy; `test_bco_...` has its gradient."""
  return table.options(name, **options).get('shift') == 'running'


@pytest.mark.parametrize(
  'case', [c for c in cases.ALL if not shifts(c.name, c.options)], ids=str
)
@pytest.mark.usefixtures('float64')
def test_gradient_equals_finite_differences(case):
  for field in ('policy', 'kls', 'complements'):
    if field == 'policy' or field in table.get(case.name).needs:
      check_gradient(case.name, case.options, cases.scores(case), field)


@pytest.mark.parametrize('name', cases.SOFT)
@pytest.mark.usefixtures('float64')
def test_gradient_of_soft_labels_equals_finite_differences(name):
  options = {'labels': 'soft'} | ({'shift': 'none'} if name == 'bco' else {})
  scores = cases.usual(name, cases.draw(0, B=2, dtype=np.float64))
  check_gradient(name, options, scores, 'policy')


def test_no_gradient_passes_through_the_mismatched_responses_of_kto():
  scores = cases.draw(0)._replace(ref=cases.draw(0).policy - 1.0)  # z is 1
  moved = scores._replace(policy=scores.policy.at[:, 1].add(1.0))
  function = table.make('kto')
  assert np.abs(function(moved) - function(scores)).min() > 1e-3
  np.testing.assert_array_equal(cases.slopes(function, scores)[:, 1], 0.0)


def test_no_gradient_passes_through_the_chosen_kl_of_tdpo2():
  scores, function = cases.draw(0), table.make('tdpo2')
  np.testing.assert_array_equal(
    cases.slopes(function, scores, 'kls')[:, 0], 0.0
  )
  assert (cases.slopes(function, scores, 'kls')[:, 1] > 0.0).all()
  assert (cases.slopes(table.make('tdpo1'), scores, 'kls')[:, 0] < 0.0).all()


@pytest.mark.usefixtures('float64')
def test_bco_learns_as_if_its_shift_were_a_constant():
  scores = cases.draw(0, dtype=np.float64)
  shift = levels.bco_memory(scores, beta=0.1, shift='running')['mean']
  fixed = scores._replace(ref=scores.ref + shift / 0.1)
  running = table.make('bco', beta=0.1)
  constant = table.make('bco', beta=0.1, shift='none')
  assert abs(shift) > 0.01
  np.testing.assert_allclose(running(scores), constant(fixed), rtol=1e-12)
  np.testing.assert_allclose(
    cases.slopes(running, scores), cases.slopes(constant, fixed), rtol=1e-12
  )


@pytest.mark.parametrize('weighting', ['wpo', 'wpo_clamped'])
def test_weightings_learn_as_if_the_weight_were_a_constant(weighting):
  plain = table.make('dpo')
  weighted = table.make('dpo', weighting=weighting)
  scores = cases.draw(0)
  confidences = 0.01 * scores.policy

  def with_confidences(s):
    return weighted(s._replace(confidences=0.01 * s.policy))

  weight = np.exp(np.asarray(confidences).sum(-1))
  np.testing.assert_allclose(
    cases.slopes(with_confidences, scores),
    weight[:, None] * cases.slopes(plain, scores),
    rtol=1e-5,
  )


def test_implicit_rewards_have_no_gradient():
  rewards = lambda s: scoring.implicit_rewards(s, beta=0.1)  # noqa: E731
  scores = cases.draw(0)
  np.testing.assert_allclose(rewards(scores), 0.1 * scoring.log_ratio(scores))
  np.testing.assert_array_equal(cases.slopes(rewards, scores), 0.0)


def test_the_papers_own_signature():
  # Completions 0, 2 are preferred to 1, 3; completion 4 is in no pair.
  pi = jnp.array([-12.0, -15.0, -20.0, -18.0, -1.0])
  ref = jnp.array([-13.0, -14.5, -19.0, -18.5, -3.0])
  pairs = jnp.array([0, 2]), jnp.array([1, 3])
  values, rewards = margins.dpo_loss(pi, ref, *pairs, 0.1)
  np.testing.assert_allclose(values, [0.620957, 0.770957], rtol=3e-6)
  np.testing.assert_allclose(rewards, [0.1, -0.05, -0.1, 0.05, 0.2], rtol=1e-5)
  grad = jax.grad(lambda x: margins.dpo_loss(x, ref, *pairs, 0.1)[0].sum())(pi)
  expected = 0.1 * np.array([-0.462570, 0.462570, -0.537430, 0.537430, 0.0])
  np.testing.assert_allclose(grad, expected, rtol=1e-5)
  grad = jax.grad(lambda x: margins.dpo_loss(x, ref, *pairs, 0.1)[1].sum())(pi)
  np.testing.assert_array_equal(grad, 0.0)


# --- Levels and signs ---

# Losses of which only differences of the log-probs of a prompt count.
INVARIANT = {
  'dpo',
  'cdpo',
  'soft',
  'robust',
  'dr_dpo',
  'ipo_sum',
  'hinge',
  'exo',
  'infonca',
  'discopop',
  'plackett_luce',
  'r_dpo',
  'tdpo1',
  'tdpo2',
  'aot',
  'bradley_terry',
  'reward_plackett_luce',
}


def shifted_and_not(name, **options):
  """Losses before and after adding c(x) to both log-probs of every pair."""
  scores = cases.draw(0)
  # Multiples of 1/8, and beta a power of 2: all differences are exact.
  scores = scores._replace(
    policy=jnp.round(scores.policy * 8) / 8, ref=jnp.round(scores.ref * 8) / 8
  )
  c = jnp.array([1.0, -2.0, 3.0, 1.0, -1.0, 2.0])[:, None]
  if 'beta' in table.options(name):
    options['beta'] = 0.125
  function = table.make(name, **options)
  return (
    np.asarray(function(cases.usual(name, s)))
    for s in (scores, scores._replace(policy=scores.policy + c))
  )


@every_loss
def test_which_losses_ignore_the_level_of_the_log_probs(name):
  before, after = shifted_and_not(name)
  if name in INVARIANT:
    np.testing.assert_array_equal(after, before)
  else:
    assert np.abs(after - before).max() > 1e-4, 'is it one of INVARIANT?'


@pytest.mark.parametrize('link', [x for x in cases.LINKS if x != 'reverse_kl'])
@pytest.mark.parametrize('name', cases.LINKED)
def test_links_look_at_the_level_of_the_log_probs(name, link):
  before, after = shifted_and_not(name, link=link)
  assert np.abs(after - before).max() > 1e-4


@pytest.mark.parametrize(
  'name, options',
  [('slic', {'nll_weight': 0.0}), ('cpo', {'alpha': 0.0})],
)
def test_without_their_likelihood_losses_ignore_the_level(name, options):
  before, after = shifted_and_not(name, **options)
  np.testing.assert_allclose(after, before, rtol=1e-6)


@pytest.mark.parametrize(
  'name',
  'dpo cdpo soft robust dpo_norm dpop tdpo1 tdpo2 plackett_luce infonca dr_dpo'
  ' aot aot_unpaired'.split(),
)
def test_loss_is_ln_2_where_policy_is_reference(name):
  scores = cases.draw(0)
  scores = scores._replace(policy=scores.ref, kls=jnp.zeros((6, 2)))
  np.testing.assert_allclose(
    table.make(name)(cases.usual(name, scores)), math.log(2), atol=1e-7
  )


# Losses that may punish a better chosen, or a worse rejected response.
EXCEPTIONS = {
  'cdpo': 'turns back where sigmoid(beta h) is the label',
  'exo': 'turns back where q is the target',
  'ipo_sum': 'turns back at its margin',
  'ipo_mean': 'turns back at its margin',
  'sppo': 'turns back at its levels',
  'nca': 'holds the chosen response back where its reward is positive',
  'discopop': 'has a bump',
  'apo_down': 'lowers the chosen response once it leads',
  'likelihood_penalty': 'lowers every response by its own cost',
}


@every_loss
def test_a_better_chosen_response_never_costs_more(name):
  wrong = 0
  for size in (1.0, 5.0, 50.0, 1000.0):
    scores = cases.usual(name, cases.draw(0, B=50, size=size))
    scores = scores._replace(p=jnp.ones(50))
    grad = np.asarray(cases.measure(name, {}, scores)[1])
    wrong += np.sum(grad[:, 0] > 0) + np.sum(grad[:, 1] < 0)
  assert (wrong > 0) == (name in EXCEPTIONS), 'is it one of EXCEPTIONS?'


@pytest.mark.parametrize(
  'name',
  sorted(set(table.LOSSES) - {'discopop', 'apo_down', 'likelihood_penalty'}),
)
def test_the_first_step_raises_the_chosen_response(name):
  scores = cases.draw(0, B=50)
  scores = scores._replace(policy=scores.ref, p=jnp.ones(50))
  _, grad = cases.measure(name, {}, cases.usual(name, scores))
  assert (grad[:, 0] < 0).all() and (grad[:, 1] >= 0).all()
