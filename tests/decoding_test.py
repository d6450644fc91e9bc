"""The decoder taken apart against the stack of layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import decoding
from dpo_jax.models import lora
from dpo_jax.models import transformer
from tests import worlds

ROWS, PROMPT, SLOTS = 2, 4, 6
TOKENS = jax.random.randint(jax.random.key(3), (ROWS, PROMPT + 1), 0, 50)
POSITIONS = jnp.tile(jnp.arange(PROMPT + 1), (ROWS, 1))
SEEN = TOKENS, POSITIONS, jnp.zeros_like(POSITIONS), POSITIONS + 1


def random_adapter(config):
  """An adapter of every weight, none of whose factors is zero."""
  settings = lora.Lora(targets='.*', rank=2, alpha=4.0, init='a_zero')
  adapter = lora.init_adapter(config, settings, jax.random.key(1))
  return jax.tree.map(lambda x: x + 0.1, adapter)


def test_shapes_of_layers_apart_are_theirs_and_cut_as_the_stack_is():
  config = worlds.LLAMA
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  boxed = jax.eval_shape(
    lambda: transformer.init_params(config, jax.random.key(0))
  )
  places = sharding.parameter_shardings(boxed, mesh)
  params = jax.device_put(worlds.params_of(config), places)
  adapter = jax.device_put(random_adapter(config), sharding.replicated(mesh))
  variables = {'params': params, 'lora': adapter}
  shapes = decoding.apart_shapes(config, variables)
  layers = jax.jit(
    functools.partial(decoding.apart, config),
    out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
  )(variables)
  assert jax.tree.structure(layers) == jax.tree.structure(shapes)
  for layer, shape in zip(jax.tree.leaves(layers), jax.tree.leaves(shapes)):
    assert (layer.shape, layer.dtype) == (shape.shape, shape.dtype)
  up = layers[1]['turned']['mlp']['up']
  assert up.sharding.spec == jax.sharding.PartitionSpec('tensor', 'fsdp')
  np.testing.assert_array_equal(up, params['layers']['mlp']['up'][1].T)


@pytest.mark.parametrize('family', worlds.FAMILIES)
def test_layers_apart_compute_what_the_stack_computes(family):
  config = worlds.FAMILIES[family]
  variables = {
    'params': worlds.params_of(config, size=0.3),
    'lora': random_adapter(config),
  }
  prompt = [x[:, :PROMPT] for x in SEEN]
  token = [x[:, PROMPT:] for x in SEEN]

  @jax.jit
  def both(variables):
    stack = transformer.Transformer(config).apply
    cache = transformer.init_cache(config, rows=ROWS, slots=SLOTS)
    _, cache = stack(variables, *prompt, cache=cache, cache_index=0)
    return stack(
      variables, *token, cache=cache, cache_index=PROMPT
    ), decoding.apply(
      config,
      variables['params'],
      decoding.apart(config, variables),
      *token,
      caches=decoding.cache_apart(cache),
      cache_index=PROMPT,
    )

  (hidden, cache), (other, caches) = both(variables)
  np.testing.assert_allclose(other, hidden, atol=2e-5)
  for name, written in cache.items():
    layers = jnp.stack([one[name] for one in caches])
    np.testing.assert_allclose(layers, written, atol=2e-5)
