"""What every loss has in common with another: METHODS' identities."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import scoring
from dpo_jax.losses import table
from tests import cases

SEEDS = [0, 1, 2]


NO_REF = {'ref': 0.0}
DPO = ('dpo', {})

# Two losses that agree, and the fields of Scores for which they do.
IDENTITIES = [
  (('cdpo', {'label_smoothing': 0.0}), DPO, {}),
  (('robust', {'label_smoothing': 0.0}), DPO, {}),
  (('soft', {}), DPO, {'p': 1.0}),
  (('soft', {}), ('cdpo', {'label_smoothing': 0.2}), {'p': 0.8}),
  (('soft', {}), ('dpo', {'labels': 'soft'}), {}),
  (('infonca', {'beta': 0.1}), DPO, {'p': 1.0}),
  (('infonca', {'beta': 0.1}), ('soft', {}), {}),
  (('r_dpo', {'alpha': 0.0}), DPO, {}),
  (('r_dpo', {}), DPO, {'lengths': 7.0 * np.ones((6, 2))}),
  (('dpop', {'penalty': 0.0}), DPO, {}),
  (('rpo', {'beta': 0.1, 'eta': 0.0}), DPO, {}),
  (('tdpo1', {}), DPO, {'kls': np.ones((6, 2))}),
  (('tdpo2', {}), DPO, {'kls': np.zeros((6, 2))}),
  (('tdpo2', {'alpha': 0.0}), DPO, {}),
  (('plackett_luce', {}), DPO, {}),
  (('dpo', {'beta': 5.0, 'reduction': 'mean'}), ('dpo_norm', {}), {}),
  (('dpo', {'link': 'alpha:1'}), ('dpo', {'link': 'forward_kl'}), {}),
  (('cpo', {'alpha': 0.0}), DPO, NO_REF),
  (('slic', {'nll_weight': 0.0}), ('hinge', {'beta': 1.0}), NO_REF),
  (('simpo', {'gamma': 0.0}), ('dpo_norm', {'beta': 2.0}), NO_REF),
  (('unlikelihood', {'alpha': 0.0}), ('sft', {}), {}),
  (('token_unlikelihood', {'alpha': 0.0}), ('sft', {}), {}),
  (('orpo', {'alpha': 0.0}), ('sft', {'reduction': 'mean'}), {}),
  (('bradley_terry', {}), ('dpo', {'beta': 1.0}), NO_REF),
  (
    ('bradley_terry', {'label_smoothing': 0.1}),
    ('cdpo', {'beta': 1.0}),
    NO_REF,
  ),
  (
    ('aot', {'beta': 0.1, 'label_smoothing': 0.1}),
    ('cdpo', {}),
    # One margin for all pairs, in policy and reference.
    {'policy': [[-9.0, -7.0]] * 6, 'ref': [[-3.0, -2.0]] * 6},
  ),
]


def spelled(identity):
  (left, options), (right, others), fields = identity
  return f'{left} {options} is {right} {others} {list(fields)}'


@pytest.mark.parametrize('identity', IDENTITIES, ids=spelled)
@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.usefixtures('float64')
def test_identities_of_value_and_gradient(identity, seed):
  (left, options), (right, others), fields = identity
  scores = cases.draw(seed, dtype=np.float64)
  scores = scores._replace(**{k: jnp.asarray(v) for k, v in fields.items()})
  for one, other in zip(
    cases.measure(left, options, scores), cases.measure(right, others, scores)
  ):
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('link', cases.LINKS)
@pytest.mark.parametrize('size', [1.0, 30.0, 1e4])
def test_plackett_luce_of_two_is_dpo_bit_for_bit(link, size):
  scores = cases.draw(0, B=1000, size=size)
  for one, other in zip(
    cases.measure('plackett_luce', {'link': link}, scores),
    cases.measure('dpo', {'link': link}, scores),
  ):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('size', [1.0, 30.0, 1e4])
@pytest.mark.parametrize('options', [{}, {'centering': 0.1}])
def test_reward_plackett_luce_of_two_is_bradley_terry_bit_for_bit(
  options, size
):
  scores = cases.draw(0, B=1000, size=size)
  for one, other in zip(
    cases.measure('reward_plackett_luce', options, scores),
    cases.measure('bradley_terry', options, scores),
  ):
    np.testing.assert_array_equal(one, other)


def test_plackett_luce_of_two_is_dpo_bit_for_bit_without_jit():
  scores = cases.draw(0, B=50, size=30.0)
  ranked, paired = table.make('plackett_luce'), table.make('dpo')
  np.testing.assert_array_equal(ranked(scores), paired(scores))
  np.testing.assert_array_equal(
    cases.slopes(ranked, scores), cases.slopes(paired, scores)
  )


@pytest.mark.parametrize(
  'name, weighting',
  [(name, w) for name in table.LOSSES for w in table.get(name).weightings[1:]],
)
def test_weights_of_one_change_nothing(name, weighting):
  scores = cases.usual(name, cases.draw(0))
  scores = scores._replace(confidences=jnp.zeros((6, 2)))
  np.testing.assert_array_equal(
    table.make(name, weighting=weighting)(scores), table.make(name)(scores)
  )


@pytest.mark.parametrize('name', cases.SOFT)
def test_soft_labels_are_the_mean_over_both_orders(name):
  scores = cases.usual(name, cases.draw(0))
  hard, soft = table.make(name), table.make(name, labels='soft')
  np.testing.assert_array_equal(
    soft(scores._replace(p=jnp.ones(6))), hard(scores)
  )
  fields = ('policy', 'ref', 'lengths', 'costs', 'kls', 'complements')
  swapped = scores._replace(**{f: getattr(scores, f)[:, ::-1] for f in fields})
  np.testing.assert_allclose(
    soft(scores),
    scores.p * hard(scores) + (1 - scores.p) * hard(swapped),
    rtol=1e-6,
  )


@pytest.mark.parametrize('label_smoothing', [0.1, 0.3, 0.49])
@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.usefixtures('float64')
def test_robust_is_unbiased_under_flips(label_smoothing, seed):
  scores = cases.draw(seed, B=100, size=20.0, dtype=np.float64)
  flipped = scores._replace(
    policy=scores.policy[:, ::-1], ref=scores.ref[:, ::-1]
  )
  robust = table.make('robust', label_smoothing=label_smoothing)
  mean = (1 - label_smoothing) * robust(scores) + label_smoothing * robust(
    flipped
  )
  # Relative to the terms that cancel.
  scale = np.abs(robust(scores)).max()
  np.testing.assert_allclose(
    mean, table.make('dpo')(scores), rtol=0, atol=1e-12 * max(scale, 1.0)
  )


@pytest.mark.usefixtures('float64')
def test_alpha_links_lie_between_forward_and_reverse_kl():
  scores = cases.draw(0, size=1.0, dtype=np.float64)
  values = [
    table.make('dpo', link=link)(scores)
    for link in ('reverse_kl', 'alpha:1e-7', 'alpha:0.5', 'alpha:1')
  ]
  np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
  assert (np.abs(values[2] - values[0]) < np.abs(values[3] - values[0])).all()


@pytest.mark.usefixtures('float64')
def test_simpo_of_equal_lengths_is_cpos_preference():
  scores = cases.draw(0, dtype=np.float64)
  scores = scores._replace(lengths=jnp.full((6, 2), 7.0))
  simpo = table.make('simpo', gamma=0.0, beta=0.1 * 7)
  np.testing.assert_allclose(
    simpo(cases.reduced(scores, 'mean')),
    table.make('cpo', alpha=0.0)(scores),
    rtol=1e-12,
  )


def test_ipo_mean_is_ipo_sum_of_token_means():
  scores = cases.draw(0)
  means = cases.reduced(scores, 'mean')
  mean, by_sum = table.make('ipo_mean'), table.make('ipo_sum')
  np.testing.assert_array_equal(mean(means), by_sum(means))
  ones = scores._replace(lengths=jnp.ones((6, 2)))
  np.testing.assert_array_equal(
    mean(cases.reduced(ones, 'mean')), by_sum(scores)
  )


def test_rpo_is_the_sum_of_dpo_and_sft():
  scores = cases.draw(0)
  terms = table.bind(
    {
      'dpo': table.options('dpo', beta=0.01),
      'sft': table.options('sft', weight=0.005),
    }
  )
  added = sum(term.weight * table.values(term, scores) for term in terms)
  np.testing.assert_allclose(table.make('rpo')(scores), added, rtol=1e-6)


@pytest.mark.usefixtures('float64')
def test_apo_zero_is_the_sum_of_its_unpaired_halves():
  scores = cases.draw(0, dtype=np.float64)
  half = table.make('apo_zero_unpaired')
  rejected = scores._replace(policy=scores.policy[:, 1:], ref=scores.ref[:, 1:])
  np.testing.assert_allclose(
    table.make('apo_zero')(scores),
    half(scores._replace(p=1.0)) + half(rejected._replace(p=0.0)),
    rtol=1e-12,
  )


@pytest.mark.usefixtures('float64')
def test_kto_with_its_kl_clamped_to_0_is_apo_zero_unpaired():
  scores = cases.draw(0, dtype=np.float64)
  below = scores._replace(policy=scores.policy.at[:, 1].set(-99.0))
  np.testing.assert_array_equal(
    table.make('kto')(below), table.make('apo_zero_unpaired')(below)
  )


@pytest.mark.usefixtures('float64')
def test_dr_dpo_is_between_the_best_pair_and_the_mean():
  scores = cases.draw(0, dtype=np.float64)
  each = table.make('dpo')(scores)
  mild, sharp, default = (
    table.make('dr_dpo', beta_prime=beta_prime)(scores)
    for beta_prime in (1e8, 1e-3, 1.0)
  )
  np.testing.assert_allclose(mild, each.mean(), rtol=1e-6)
  np.testing.assert_allclose(sharp, each.min(), atol=2e-3)
  assert each.min() < default[0] < each.mean()


@pytest.mark.parametrize('name', ['dr_dpo', 'aot', 'aot_unpaired'])
def test_batchwise_losses_of_one_pair_are_dpo(name):
  scores = cases.draw(0, B=1)
  np.testing.assert_allclose(
    table.make(name, beta=0.1)(scores), table.make('dpo')(scores), rtol=1e-6
  )


@pytest.mark.parametrize('name', ['aot', 'aot_unpaired'])
def test_optimal_transport_ignores_who_belongs_to_whom(name):
  scores = cases.draw(0)
  # aot keeps each margin's model, aot_unpaired each response's side.
  moved = scores._replace(ref=scores.ref[::-1])
  if name == 'aot_unpaired':
    moved = scores._replace(
      policy=scores.policy.at[:, 1].set(scores.policy[::-1, 1]),
      ref=scores.ref.at[:, 1].set(scores.ref[::-1, 1]),
    )
  function = table.make(name)
  np.testing.assert_allclose(function(moved), function(scores), rtol=1e-6)
  dpo = table.make('dpo')
  assert np.abs(dpo(moved) - dpo(scores)).max() > 0.01


def test_bco_remembers_the_mean_of_all_real_rewards():
  scores = cases.draw(0)._replace(memory=None)
  mask = jnp.array([True, True, False, True, False, False])
  term = table.bind({'bco': table.options('bco', beta=0.1)})[0]
  first = term.remember(scores._replace(mask=mask))
  second = term.remember(scores._replace(mask=~mask, memory=first))
  rewards = 0.1 * scoring.log_ratio(scores)
  assert first['count'] == 6 and second['count'] == 12
  np.testing.assert_allclose(first['mean'], rewards[mask].mean(), rtol=1e-5)
  np.testing.assert_allclose(second['mean'], rewards.mean(), rtol=1e-5)


@pytest.mark.usefixtures('float64')
def test_soft_labels_of_a_half_are_least_at_no_margin():
  scores = cases.draw(0, B=100, dtype=np.float64)._replace(p=0.5)
  loss = table.make('soft')
  none = scores._replace(policy=scores.ref)
  assert (loss(scores) > math.log(2)).all()
  np.testing.assert_allclose(loss(none), math.log(2), rtol=1e-12)
  np.testing.assert_allclose(cases.slopes(loss, none), 0.0, atol=1e-15)


# name: (options, margin, field) where the loss is least, by its `Sign`.
LEAST = [
  ('cdpo', {'label_smoothing': 0.2}, math.log(0.8 / 0.2) / 0.1),
  ('soft', {}, math.log(0.7 / 0.3) / 0.1),
  (
    'exo',
    {'label_smoothing': 0.2},
    math.log((0.8 * 0.7 + 0.2 * 0.3) / 0.38) / 0.1,
  ),
  ('ipo_sum', {'beta': 0.2}, 2.5),
  ('sppo', {'eta': 10.0}, 4.0),
]


@pytest.mark.parametrize('name, options, margin', LEAST)
@pytest.mark.usefixtures('float64')
def test_losses_that_turn_back_do_so_where_they_say(name, options, margin):
  """With p = 0.7."""

  def at(h):
    policy = jnp.array([[h / 2, -h / 2]])
    return scoring.Scores(policy, jnp.zeros((1, 2)), p=jnp.array([0.7]))

  function = table.make(name, **options)
  np.testing.assert_allclose(
    cases.slopes(function, at(margin)), 0.0, atol=1e-12
  )
  for h in (margin - 1.0, margin + 1.0):
    assert function(at(h)) > function(at(margin))
