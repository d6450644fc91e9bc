"""Heads: float32, beside the decoder's parameters, cut like them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.models import heads
from dpo_jax.models import transformer
from tests import worlds


def test_a_head_is_a_dot_product_in_float32():
  head = {'kernel': jnp.array([1.0, 2.0, -1.0]), 'bias': jnp.array(0.5)}
  hidden = jnp.array([[1.0, 1.0, 1.0], [0.25, 0.5, 4.0]], jnp.bfloat16)
  scores = heads.apply(head, hidden)
  assert scores.dtype == jnp.float32
  np.testing.assert_allclose(scores, [2.5, -2.25])


def test_a_new_kernel_has_variance_1_over_width_plus_1():
  head = heads.init(jax.random.key(0), 4000, scale=1.0)
  assert head['kernel'].shape == (4000,) and head['bias'].shape == ()
  # The standard error of a standard deviation is 1 / sqrt(2 D) of it: 1.1 %.
  np.testing.assert_allclose(np.std(head['kernel']) * 4001**0.5, 1.0, rtol=0.05)
  assert not np.any(heads.init(jax.random.key(0), 8, scale=0.0)['kernel'])


@pytest.mark.parametrize('config', worlds.FAMILIES.values())
def test_the_decoder_does_not_look_at_a_head(config):
  params = worlds.params_of(config)
  head = heads.init(jax.random.key(1), config.d_model, scale=1.0)
  tokens = jnp.arange(5)[None]
  slots = jnp.arange(5)[None]

  def hidden(params):
    return transformer.Transformer(config).apply(
      {'params': params}, tokens, slots, 0 * slots, slots + 1
    )

  both = params | {'head': head}
  np.testing.assert_array_equal(hidden(both), hidden(params))
  assert heads.without(both).keys() == params.keys()
  assert heads.without(params).keys() == params.keys()


def test_a_head_is_cut_by_the_embed_axis():
  head = heads.init(jax.random.key(1), 16, scale=1.0)
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  shardings = sharding.parameter_shardings(heads.boxed(head), mesh)
  placed = jax.device_put(head, shardings)
  assert placed['kernel'].sharding.shard_shape((16,)) == (4,)
  assert placed['bias'].sharding.is_fully_replicated
  assert jax.tree.structure(placed) == jax.tree.structure(
    nn.unbox(heads.boxed(head))
  )
