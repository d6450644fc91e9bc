import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import attention
from dpo_jax.models import transformer
from tests import worlds

TOKENS = jax.random.randint(jax.random.key(3), (2, 9), 0, 50)
POSITIONS = jnp.tile(jnp.arange(9), (2, 1))
CAUSAL = (jnp.zeros_like(POSITIONS), POSITIONS + 1)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params):
  return transformer.Transformer(config).apply(
    {'params': params}, TOKENS, POSITIONS, *CAUSAL
  )


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(config, params):
  def loss(params):
    return jnp.sum(jnp.sin(hidden_states(config, params)))

  return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize('family', worlds.FAMILIES)
@pytest.mark.parametrize(
  'change',
  [{'remat': 'full'}, {'remat': 'dots'}, {'scan_unroll': 3}],
  ids=str,
)
def test_remat_and_unrolling_change_nothing(family, change):
  config = worlds.FAMILIES[family]
  params = worlds.params_of(config)
  value, grads = loss_and_grads(config, params)
  changed = dataclasses.replace(config, **change)
  other, other_grads = loss_and_grads(changed, params)
  np.testing.assert_allclose(other, value, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-7 + 1e-5 * np.abs(b).max()
    ),
    other_grads,
    grads,
  )


@pytest.mark.parametrize('family', worlds.FAMILIES)
def test_cached_decoding_equals_full_forward(family):
  config = worlds.FAMILIES[family]
  params = worlds.params_of(config)
  model = transformer.Transformer(config)
  cache = transformer.init_cache(config, rows=2, slots=12)
  apply = jax.jit(model.apply)
  parts, start = [], 0
  for size in (4, 1, 3, 1):
    span = slice(start, start + size)
    hidden, cache = apply(
      {'params': params},
      TOKENS[:, span],
      POSITIONS[:, span],
      CAUSAL[0][:, span],
      CAUSAL[1][:, span],
      cache=cache,
      cache_index=start,
    )
    parts.append(hidden)
    start += size
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), hidden_states(config, params), atol=2e-5
  )


@pytest.mark.parametrize('family', worlds.FAMILIES)
def test_every_parameter_matters(family):
  config = worlds.FAMILIES[family]

  def loss(params):
    logits = hidden_states(config, params) @ transformer.unembedding(params).T
    logits = attention.soft_cap(logits, config.logit_cap)
    return jnp.sum(jax.nn.log_softmax(logits)[..., 7])

  grads = jax.jit(jax.grad(loss))(worlds.params_of(config))
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    if 'k_bias' in name:  # a shift of all keys leaves the softmax alone
      assert np.abs(grad).max() < 1e-4, name
    else:
      assert np.abs(grad).max() > 1e-4, name


def test_compute_dtype_leaves_parameters_alone():
  config = dataclasses.replace(worlds.LLAMA, dtype='bfloat16')
  params = worlds.params_of(config)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  assert hidden_states(config, params).dtype == jnp.bfloat16


def test_a_window_sees_the_last_keys_only():
  """By gradients with respect to the embedding of each position."""
  config = dataclasses.replace(
    worlds.LLAMA, num_layers=1, window=4, windowed=(True,)
  )
  params = worlds.params_of(config)
  tokens = jnp.arange(9)[None]

  def last(table):
    hidden = transformer.Transformer(config).apply(
      {'params': params | {'embed': {'tokens': table}}},
      tokens,
      *(x[:1] for x in (POSITIONS, *CAUSAL)),
    )
    return jnp.sum(jnp.sin(hidden[0, -1]))

  grad = np.abs(jax.jit(jax.grad(last))(params['embed']['tokens'])).sum(-1)
  np.testing.assert_array_equal(grad[:9] > 0, np.arange(9) >= 5)


@pytest.mark.parametrize(
  'changes, error',
  [
    (dict(window=4), 'a bool for each of the 3 layers'),
    (dict(window=4, windowed=(True, False)), 'each of the 3 layers'),
    (dict(window=4, windowed=(False,) * 3), 'one that is True'),
    (dict(windowed=(True,) * 3), 'window is None'),
    (dict(rope_factor=2.0), "'none' needs no numbers, got rope_factor"),
    (dict(rope_scaling='llama3', rope_factor=2.0), 'needs .*rope_low_freq'),
    (dict(local_rope_theta=100.0), 'set window'),
    (dict(rotary_fraction=0.25), '1 of head_dim 4 would be rotated'),
    (dict(rope_scaling='yarn'), "model.rope_scaling is 'yarn'"),
  ],
)
def test_half_a_window_or_scaling_is_refused(changes, error):
  with pytest.raises(ValueError, match=error):
    dataclasses.replace(worlds.LLAMA, **changes)


@pytest.mark.parametrize('field', ['norm', 'positions', 'mlp', 'remat'])
def test_unknown_variant_is_refused(field):
  with pytest.raises(ValueError, match=f"model.{field} is 'nonsense'"):
    dataclasses.replace(worlds.LLAMA, **{field: 'nonsense'})


def test_heads_must_share_keys_evenly():
  with pytest.raises(ValueError, match='not a multiple of num_kv_heads 3'):
    dataclasses.replace(worlds.LLAMA, num_kv_heads=3)


@pytest.mark.parametrize('config', worlds.FAMILIES.values())
def test_casting_weights_once_changes_no_bit(config):
  config = dataclasses.replace(config, dtype='bfloat16')
  params = worlds.params_of(config)
  cast = transformer.cast(params, 'bfloat16')
  assert cast['layers']['mlp']['up'].dtype == 'bfloat16'
  assert cast['layers']['norm1']['scale'].dtype == 'float32'
  found = [
    jax.jit(transformer.Transformer(config).apply)(
      {'params': p}, TOKENS, POSITIONS, *CAUSAL
    )
    for p in (params, cast)
  ]
  np.testing.assert_array_equal(*found)
