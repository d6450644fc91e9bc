import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import attention
from dpo_jax import sharding

SCALE = 0.3
attend = functools.partial(attention.interval_attention, scale=SCALE, cap=None)


def by_hand(query, key, value, lo, hi, softmax_dtype=np.float64, cap=None):
  """Loops over rows, heads and queries in float64, or with a worse softmax."""
  B, T, N, _ = query.shape
  G = N // key.shape[2]
  out = np.zeros(query.shape)
  for b, t, n in np.ndindex(B, T, N):
    keys = key[b, lo[b, t] : hi[b, t], n // G].astype(np.float64)
    scores = keys @ query[b, t, n].astype(np.float64) * SCALE
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    scores = scores.astype(softmax_dtype)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    out[b, t, n] = weights @ value[b, lo[b, t] : hi[b, t], n // G]
  return out


def inputs(*, heads, kv_heads, slots=11, queries=11, seed=0):
  rng = np.random.default_rng(seed)
  shape = (2, queries, heads, 4)
  query = rng.normal(size=shape).astype(np.float32)
  key, value = rng.normal(size=(2, 2, slots, kv_heads, 4)).astype(np.float32)
  lo = rng.integers(0, slots, (2, queries)).astype(np.int32)
  hi = (lo + 1 + rng.integers(0, slots - lo)).astype(np.int32)
  return query, key, value, lo, hi


@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize('queries', [11, 1])
def test_attention_equals_loops(heads, kv_heads, queries):
  args = inputs(heads=heads, kv_heads=kv_heads, queries=queries)
  out = jax.jit(attend)(*args)
  np.testing.assert_allclose(out, by_hand(*args), atol=2e-6)


@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize('cap', [None, 0.4])
def test_one_query_in_a_product_of_all_heads_equals_loops(heads, kv_heads, cap):
  args = inputs(heads=heads, kv_heads=kv_heads, queries=1)
  one_query = functools.partial(attention.one_query, scale=SCALE, cap=cap)
  out = jax.jit(one_query)(*args)
  np.testing.assert_allclose(out, by_hand(*args, cap=cap), atol=2e-6)


def test_one_query_is_for_a_tpu_that_has_all_heads():
  args = inputs(heads=4, kv_heads=2, queries=1)

  def form(platform, tensor):
    mesh = sharding.make_mesh(data=1, fsdp=8 // tensor, tensor=tensor)
    with sharding.use(mesh):
      traced = jax.jit(attend).trace(*args)
      text = traced.lower(lowering_platforms=(platform,)).as_text()
    return '4x11xf32' in text  # scores as [rows, heads, slots]

  assert form('tpu', 1)
  assert not form('tpu', 2) and not form('cpu', 1)


def test_capped_attention_equals_loops():
  args = inputs(heads=4, kv_heads=2)
  out = jax.jit(functools.partial(attend, cap=0.4))(*args)
  np.testing.assert_allclose(out, by_hand(*args, cap=0.4), atol=2e-6)
  assert np.abs(out - by_hand(*args)).max() > 0.01


def test_keys_outside_the_interval_have_no_gradient():
  query, key, value, lo, hi = inputs(heads=2, kv_heads=1)

  def one_query(key, value):
    out = attend(query, key, value, lo, hi)
    return jnp.sum(out[0, 3])

  for grad in jax.jit(jax.grad(one_query, argnums=(0, 1)))(key, value):
    touched = np.abs(np.asarray(grad[0])).sum((-1, -2)) > 0
    expected = np.zeros(11, bool)
    expected[lo[0, 3] : hi[0, 3]] = True
    np.testing.assert_array_equal(touched & ~expected, False)
    assert touched.any() or hi[0, 3] - lo[0, 3] == 1


def test_softmax_is_float32_in_bfloat16():
  query, key, value, lo, hi = inputs(heads=2, kv_heads=2)
  # Scores near 19, where bfloat16 has steps of 1/8 and what tells keys apart
  # is lost.
  query[..., 0] = key[..., 0] = 8
  low = [x.astype(jnp.bfloat16) for x in (query, key, value)]
  out = jax.jit(attend)(*low, lo, hi)
  assert out.dtype == jnp.bfloat16
  query, key, value = (np.asarray(x, np.float32) for x in low)
  expected = by_hand(query, key, value, lo, hi)
  # Only the weights and the output are rounded, each to half a unit in the
  # last of 8 bits.
  total = by_hand(query, key, np.abs(value), lo, hi)
  bound = 2**-8 * (np.abs(expected) + total)
  assert (np.abs(np.asarray(out, np.float32) - expected) <= bound).all()
  wrong = by_hand(query, key, value, lo, hi, softmax_dtype=jnp.bfloat16)
  missed = np.abs(wrong - expected) > bound
  assert missed.mean() > 0.5
