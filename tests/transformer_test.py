import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
  [{'remat': 'attention'}, {'remat': 'full'}, {'scan_unroll': 3}],
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
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
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


@pytest.mark.parametrize('field', ['norm', 'positions', 'mlp', 'remat'])
def test_unknown_variant_is_refused(field):
  with pytest.raises(ValueError, match=f"model.{field} is 'nonsense'"):
    dataclasses.replace(worlds.LLAMA, **{field: 'nonsense'})


def test_heads_must_share_keys_evenly():
  with pytest.raises(ValueError, match='not a multiple of num_kv_heads 3'):
    dataclasses.replace(worlds.LLAMA, num_kv_heads=3)
