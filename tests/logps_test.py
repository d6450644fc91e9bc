import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from dpo_jax import attention
from dpo_jax import logps
from dpo_jax import sharding

R, S, D, V = 3, 10, 8, 60
# Logits have a standard deviation of 3.
CAPS = pytest.mark.parametrize('cap', [None, 4.0], ids=['plain', 'capped'])


def arrays(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  hidden = jax.random.normal(keys[0], (R, S, D))
  unembed = jax.random.normal(keys[1], (V, D))
  target = jax.random.randint(keys[2], (R, S), 0, V)
  return hidden, unembed, target, jax.random.normal(keys[3], (R, S))


def logits_of(hidden, unembed, cap=None):
  logits = jnp.einsum('RSD,VD->RSV', hidden, unembed)
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def naive(hidden, unembed, target, cap=None):
  logits = logits_of(hidden, unembed, cap)
  picked = jnp.take_along_axis(
    jax.nn.log_softmax(logits), target[..., None], -1
  )
  return picked[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def values_and_grads(function, hidden, unembed, target, weight):
  def total(hidden, unembed):
    values = function(hidden, unembed, target)
    return jnp.sum(weight * values), values

  grads, values = jax.grad(total, (0, 1), has_aux=True)(hidden, unembed)
  return values, *grads


@CAPS
@pytest.mark.parametrize('chunk', [1, 7, 12, 16, 30, 200])
def test_chunked_equals_naive_in_value_and_gradient(chunk, cap):
  hidden, unembed, target, weight = arrays()
  for ours, expected in zip(
    values_and_grads(
      functools.partial(logps.token_logps, chunk=chunk, cap=cap),
      hidden,
      unembed,
      target,
      weight,
    ),
    values_and_grads(
      functools.partial(naive, cap=cap), hidden, unembed, target, weight
    ),
    strict=True,
  ):
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize('block', [7, 9, 20, 59])
def test_blocks_of_the_vocabulary_change_nothing(block, monkeypatch):
  monkeypatch.setattr(logps, '_BLOCK', block)
  hidden, unembed, target, weight = arrays()
  ours = functools.partial(logps.token_logps, chunk=8, cap=4.0)
  expected = functools.partial(naive, cap=4.0)
  for found, other in zip(
    values_and_grads(ours, hidden, unembed, target, weight),
    values_and_grads(expected, hidden, unembed, target, weight),
    strict=True,
  ):
    np.testing.assert_allclose(found, other, atol=1e-5)


@pytest.mark.parametrize('sizes', [(4, 2, 1), (2, 2, 2), (1, 2, 4), (1, 8, 1)])
def test_devices_make_lists_of_their_own(sizes, monkeypatch):
  monkeypatch.setattr(logps, '_BLOCK', 20)
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes)))
  keys = jax.random.split(jax.random.key(1), 4)
  hidden = jax.random.normal(keys[0], (16, S, D))
  unembed = jax.random.normal(keys[1], (V, D))
  target = jax.random.randint(keys[2], (16, S), -V // 2, V)
  weight = jax.random.normal(keys[3], (16, S))
  real = target >= 0
  assert len(set(np.asarray(real.reshape(2, -1).sum(1)))) == 2  # uneven lists

  def function(hidden, unembed, target):
    ours = logps.token_logps(hidden, unembed, target, 12, cap=None)
    return jnp.where(target < 0, 0.0, ours)

  def expected(hidden, unembed, target):
    return jnp.where(real, naive(hidden, unembed, target), 0.0)

  apart = values_and_grads(expected, hidden, unembed, target, weight)
  with sharding.use(mesh):
    rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    words = NamedSharding(mesh, PartitionSpec('tensor', 'fsdp'))
    hidden, target, weight = jax.device_put((hidden, target, weight), rows)
    unembed = jax.device_put(unembed, words)
    ours = values_and_grads(function, hidden, unembed, target, weight)
  for found, other in zip(ours, apart, strict=True):
    np.testing.assert_allclose(found, other, atol=1e-5)


def test_extreme_logits_stay_finite():
  hidden, unembed, target, _ = arrays()

  def function(hidden):
    return jnp.sum(logps.token_logps(hidden, unembed, target, 4, cap=None))

  value, grad = jax.jit(jax.value_and_grad(function))(1e4 * hidden)
  assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize('cap', [None, 4.0])
def test_a_frozen_unembedding_leaves_the_gradient_as_it_is(cap):
  hidden, unembed, target, _ = arrays()

  def weighted(function):
    def total(hidden, unembed):
      return jnp.sum(
        jnp.arange(1.0, 1 + target.size).reshape(target.shape)
        * function(hidden, unembed)
      )

    return total

  ours = weighted(lambda h, u: logps.token_logps(h, u, target, 4, cap=cap))

  def plain(h, u):
    logits = attention.soft_cap(h @ u.T, cap)
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, target[..., None], -1)[..., 0]

  alone = jax.jit(jax.grad(ours))(hidden, unembed)
  both, _ = jax.jit(jax.grad(ours, (0, 1)))(hidden, unembed)
  expected = jax.grad(weighted(plain))(hidden, unembed)
  assert np.abs(expected).max() > 1.0
  np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_states_give_float32_log_probs():
  hidden, unembed, target, _ = arrays()
  low = hidden.astype(jnp.bfloat16)
  out = jax.jit(functools.partial(logps.token_logps, chunk=4, cap=None))(
    low, unembed, target
  )
  assert out.dtype == jnp.float32
  rounded = unembed.astype(jnp.bfloat16).astype(jnp.float32)
  expected = naive(low.astype(jnp.float32), rounded, target)
  np.testing.assert_allclose(out, expected, atol=1e-4)


def loss(hidden, unembed, target, cap=None):
  return jnp.sum(logps.token_logps(hidden, unembed, target, 32, cap=cap))


capped_loss = functools.partial(loss, cap=4.0)


def kl(hidden, unembed, target):
  del target
  return logps.token_kls(hidden, unembed, hidden, unembed, chunk=32, cap=None)


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize(
  'function, arrays_held',
  [
    (loss, 1),
    (jax.value_and_grad(loss, (0, 1)), 3),
    (jax.value_and_grad(capped_loss, (0, 1)), 4),
    (kl, 2),
  ],
  ids=['value', 'gradient', 'capped', 'kl'],
)
def test_a_chunk_bounds_the_logits_of_all_rows(function, arrays_held, rows):
  tokens, vocab, chunk = 512, 4096, 32
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in [
      ((rows, tokens, D), jnp.float32),
      ((vocab, D), jnp.float32),
      ((rows, tokens), jnp.int32),
    ]
  ]
  compiled = jax.jit(function).lower(*shapes).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  # Half an array more is for everything without a vocabulary axis; a chunk of
  # each row would be four times as much.
  assert temporary < (arrays_held + 0.5) * chunk * vocab * 4


def kl_by_hand(hidden, unembed, other, other_unembed, *, cap):
  p = jax.nn.log_softmax(logits_of(hidden, unembed, cap))
  q = jax.nn.log_softmax(logits_of(other, other_unembed, cap))
  return jnp.sum(jnp.exp(p) * (p - q), -1)


@CAPS
def test_kl_equals_full_vocabulary_sum(cap):
  first, second = arrays(0)[:2], arrays(1)[:2]
  kls = logps.token_kls(*first, *second, chunk=4, cap=cap)
  expected = kl_by_hand(*first, *second, cap=cap)
  np.testing.assert_allclose(kls, expected, rtol=1e-5)
  same = logps.token_kls(*first, *first, chunk=4, cap=cap)
  np.testing.assert_allclose(same, 0.0, atol=1e-6)


@CAPS
def test_kl_has_the_gradient_of_the_sum(cap):
  first, second = arrays(0)[:2], arrays(1)[:2]
  ours = functools.partial(logps.token_kls, chunk=4, cap=cap)
  by_hand = functools.partial(kl_by_hand, cap=cap)

  def total(function):
    return jax.jit(jax.grad(lambda *x: jnp.sum(function(*x) ** 2), range(4)))

  found = total(ours)(*first, *second)
  for grad, expected in zip(found, total(by_hand)(*first, *second)):
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-3)


@CAPS
@pytest.mark.parametrize('chunk', [7, 200])
def test_collisions_come_from_the_same_pass_without_a_gradient(chunk, cap):
  hidden, unembed, target, weight = arrays()
  values, collisions = logps.token_logps_and_collisions(
    hidden, unembed, target, chunk, cap=cap
  )
  probs = jax.nn.softmax(logits_of(hidden, unembed, cap))
  expected = np.log((np.asarray(probs, np.float64) ** 2).sum(-1))
  np.testing.assert_allclose(collisions, expected, atol=1e-5)

  def first_alone(*inputs):
    return logps.token_logps(*inputs, chunk, cap=cap)

  def weighted_by_the_second(*inputs):
    values, collisions = logps.token_logps_and_collisions(
      *inputs, chunk, cap=cap
    )
    return values + 7.0 * collisions

  plain = values_and_grads(first_alone, hidden, unembed, target, weight)
  both = values_and_grads(
    weighted_by_the_second, hidden, unembed, target, weight
  )
  np.testing.assert_allclose(values, plain[0], atol=1e-6)
  for ours, expected in zip(both[1:], plain[1:]):
    np.testing.assert_array_equal(ours, expected)


def test_index_in_slot_counts_within_responses():
  slots = jnp.array([[0, 0, 2, 0, 2, -1]])
  np.testing.assert_array_equal(
    logps.index_in_slot(slots, num_slots=3), [[0, 1, 0, 2, 1, 0]]
  )


def test_sums_leave_out_padding():
  values = jnp.array([[1.0, 2.0, 4.0, jnp.inf]])
  slots = jnp.array([[0, 2, 0, -1]])
  np.testing.assert_array_equal(
    logps.sum_by_slot(values, slots, num_slots=3), [[5.0, 0.0, 2.0]]
  )


def test_gather_picks_source_slots():
  hidden = jnp.arange(2 * 4 * 3).reshape(2, 4, 3)
  source = jnp.array([[3, 0], [1, 1]])
  np.testing.assert_array_equal(
    logps.gather_scored(hidden, source),
    [[[9, 10, 11], [0, 1, 2]], [[15, 16, 17], [15, 16, 17]]],
  )


def padded(hidden, unembed, target, chunk):
  """Log-probs with the last targets of each row but the first two missing."""
  ends = jnp.array([[7], [0], [5]])
  target = jnp.where(jnp.arange(S) < ends, target, -1)
  values, collisions = logps.token_logps_and_collisions(
    hidden, unembed, target, chunk, cap=None
  )
  return values, collisions, target


@pytest.mark.parametrize('chunk', [3, 7, 200])
def test_padding_changes_nothing_else_and_has_no_gradient(chunk):
  hidden, unembed, target, weight = arrays()
  values, collisions, marked = padded(hidden, unembed, target, chunk)
  real = np.asarray(marked) >= 0
  whole = naive(hidden, unembed, target)
  np.testing.assert_allclose(values[real], whole[real], atol=1e-5)
  assert np.isfinite(values).all() and np.isfinite(collisions).all()

  def marked_values(hidden, unembed, target):
    return padded(hidden, unembed, target, chunk)[0]

  ours = values_and_grads(marked_values, hidden, unembed, target, weight)
  expected = values_and_grads(naive, hidden, unembed, target, weight * real)
  for grad, other in zip(ours[1:], expected[1:]):
    np.testing.assert_allclose(grad, other, atol=1e-5)
  assert not np.asarray(ours[1])[~real].any()


def test_chunks_of_padding_are_not_computed():
  hidden, unembed, target, _ = arrays()
  poisoned = hidden.at[:, 7:].set(jnp.nan)

  def total(hidden, unembed):
    return jnp.sum(padded(hidden, unembed, target, 3)[0])

  value, grads = jax.value_and_grad(total, (0, 1))(poisoned, unembed)
  assert np.isfinite(value)
  for grad in grads:
    assert np.isfinite(grad).all()
