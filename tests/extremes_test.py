"""Losses in float32 where it is hard: huge scores, padding, many devices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.losses import scoring
from dpo_jax.losses import table
from tests import cases

EVERY = [(name, {}) for name in table.LOSSES]
OPTIONS = (
  EVERY
  + [
    (name, {'link': link})
    for name in cases.LINKED
    for link in cases.LINKS
    if link != 'reverse_kl'
  ]
  + [(name, {'labels': 'soft'}) for name in cases.SOFT]
  + [
    ('dpo', {'weighting': 'wpo'}),
    ('dpo', {'weighting': 'wpo_clamped'}),
    ('bco', {'shift': 'none'}),
    ('cpo', {'nll': 'sum'}),
    ('rpo', {'nll': 'mean'}),
    ('infonca', {'reward_temperature': 0.5}),
    ('nca', {'reward_temperature': 0.5}),
    ('exo', {'reward_temperature': 0.5}),
    ('exo', {'reward_temperature': 0.5, 'label_smoothing': 0.0}),
    ('aot', {'label_smoothing': 0.1}),
    ('aot_unpaired', {'label_smoothing': 0.1}),
    ('bradley_terry', {'margin_scale': 1.0, 'centering': 0.1}),
    ('bradley_terry', {'label_smoothing': 0.2}),
    # What a sum of log-probs is to a loss that usually has means.
    ('simpo', {'reduction': 'sum'}),
  ]
)


def each(options):
  return pytest.mark.parametrize(
    'name, options',
    options,
    ids=[
      ' '.join([n, *(f'{k}={v}' for k, v in o.items())]) for n, o in options
    ],
  )


def extreme():
  """64 groups of one-token responses with every corner of all fields."""
  corners = [-1e4, -1.0, 0.0, 1e4]
  policy = np.array(list(itertools.product(corners, corners)))
  ref = np.array([[0.0, 0.0], [-1e4, -1e4], [-1e4, 1e4], [1e4, -1e4]])
  sign = np.where(np.arange(64) % 2, 1.0, -1.0)[:, None]
  fields = {
    'policy': np.repeat(policy, 4, axis=0),
    'ref': np.tile(ref, (16, 1)),
    'lengths': np.ones((64, 2)),
    'p': np.tile([0.0, 0.5, 1.0, 1.0], 16),
    'rewards': 1e4 * sign * [1.0, -1.0],
    'costs': np.tile([[0.0, 1.0], [1.0, 0.0]], (32, 1)),
    'kls': np.tile([[0.0, 1e4], [1e4, 0.0]], (32, 1)),
    'complements': np.tile([[0.0, -1e4], [-1e4, 0.0]], (32, 1)),
    # At most the log of the vocabulary's size.
    'confidences': np.tile([[-1e4, 12.0], [12.0, 12.0]], (32, 1)),
  }
  return scoring.Scores(
    **{k: jnp.asarray(v, jnp.float32) for k, v in fields.items()},
    mask=jnp.ones(64, bool),
    memory={'mean': jnp.float32(0.0), 'count': jnp.float32(0.0)},
  )


@each(OPTIONS)
def test_extreme_scores_stay_finite(name, options):
  values, grad = cases.measure(name, options, extreme())
  assert values.dtype == grad.dtype == jnp.float32
  advice = 'use scoring.exp or expm1, or work with logarithms'
  assert np.isfinite(values).all() and np.isfinite(np.sum(values)), advice
  assert np.isfinite(grad).all(), advice


def padded(seed=0):
  """64 groups, of which every third is padding; sums of log-probs."""
  scores = cases.draw(seed, B=64)
  return scores._replace(mask=jnp.arange(64) % 3 != 1)


def fill(scores, value):
  """Puts `value` in every field of padding groups."""

  def put(x):
    mask = scores.mask.reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(mask, x, value)

  fields = {
    field: put(x)
    for field, x in scores._asdict().items()
    if field not in ('mask', 'memory')
  }
  return scores._replace(**fields)


@each(OPTIONS)
def test_padding_changes_no_real_group(name, options):
  scores = cases.usual(name, padded())
  mask = np.asarray(scores.mask)
  values, grad = cases.measure(name, options, scores)
  for garbage in (0.0, 1.0, 1e4, 1e30, -1e30):
    others, slopes = cases.measure(name, options, fill(scores, garbage))
    np.testing.assert_array_equal(others[mask], values[mask])
    np.testing.assert_array_equal(slopes[mask], grad[mask])
  np.testing.assert_array_equal(grad[~mask], 0.0)


@each(EVERY)
def test_a_group_among_padding_alone_is_a_batch_of_one(name, options):
  scores = cases.usual(name, padded())
  only = scores._replace(mask=jnp.arange(64) == 5)
  alone = jax.tree.map(lambda x: x[5:6] if x.ndim else x, scores)
  values, grad = cases.measure(name, options, fill(only, -7.0))
  expected = table.make(name)(alone._replace(mask=True))
  np.testing.assert_allclose(values[5], expected[0], rtol=1e-5)
  assert np.isfinite(grad).all()


@each(EVERY)
def test_a_batch_of_padding_has_no_loss(name, options):
  scores = cases.usual(name, padded())
  scores = fill(scores._replace(mask=jnp.zeros(64, bool)), 0.0)
  # As the rows lay padding out, responses of no token have length 1.
  scores = scores._replace(lengths=jnp.ones((64, 2)))
  values, grad = cases.measure(name, options, scores)
  assert np.isfinite(values).all()
  np.testing.assert_array_equal(grad, 0.0)


@each(EVERY)
def test_vmap_over_batches_equals_a_loop(name, options):
  batches = [cases.usual(name, padded(seed)) for seed in range(3)]
  stack = jax.tree.map(lambda *x: jnp.stack(x), *batches)
  vmapped = jax.jit(jax.vmap(lambda s: cases.measure(name, options, s)))(stack)
  for i, batch in enumerate(batches):
    for one, other in zip(vmapped, cases.measure(name, options, batch)):
      np.testing.assert_allclose(
        one[i][batch.mask], other[batch.mask], rtol=1e-6, atol=1e-9
      )


@each(EVERY)
def test_eight_devices_equal_one(name, options):
  scores = cases.usual(name, padded())
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  by_groups = jax.NamedSharding(mesh, jax.P('data'))
  everywhere = jax.NamedSharding(mesh, jax.P())
  sharded = jax.tree.map(
    lambda x: jax.device_put(x, by_groups if x.ndim else everywhere), scores
  )
  assert len(sharded.policy.sharding.device_set) == 8
  for one, other in zip(
    cases.measure(name, options, sharded), cases.measure(name, options, scores)
  ):
    one, other = (np.asarray(x)[scores.mask] for x in (one, other))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.sum(one), np.sum(other), rtol=1e-6)
