"""Adapters against the weights they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.models import lora
from dpo_jax.models import transformer
from tests import worlds

FAMILIES = pytest.mark.parametrize('config', worlds.FAMILIES.values())
TOKENS = jnp.array(np.random.default_rng(0).integers(0, 50, (2, 9)))


def make_lora(**changes):
  values = dict(targets='.*', rank=4, alpha=8.0, init='a_zero')
  return lora.Lora(**(values | changes))


def make_adapter(config, kind=None):
  kind = kind or make_lora()
  return lora.init_adapter(config, kind, jax.random.key(1))


def random_adapter(config, kind=None, size=0.1):
  """An adapter in which no factor is zero."""
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda x: jnp.array(rng.normal(0, size, x.shape), jnp.float32),
    make_adapter(config, kind),
  )


def hidden(config, variables):
  positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
  return transformer.Transformer(config).apply(
    variables, TOKENS, positions, 0 * positions, positions + 1
  )


@FAMILIES
@pytest.mark.parametrize('init', lora.INITS)
def test_a_new_adapter_changes_nothing(config, init):
  params = worlds.params_of(config)
  adapter = make_adapter(config, make_lora(init=init))
  assert lora.neutral(adapter)
  random = {'a_zero': 'b', 'b_zero': 'a'}[init]
  for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
    assert bool(jnp.any(leaf)) == (path[-1].key == random)
  np.testing.assert_allclose(
    hidden(config, lora.variables(params, adapter, 2.0)),
    hidden(config, {'params': params}),
    atol=1e-6,
  )


@FAMILIES
def test_merged_weights_equal_the_adapter(config):
  params, adapter = worlds.params_of(config), random_adapter(config)
  assert not lora.neutral(adapter)
  adapted = hidden(config, lora.variables(params, adapter, 2.0))
  merged = hidden(config, {'params': lora.merge(params, adapter, 2.0)})
  np.testing.assert_allclose(adapted, merged, atol=1e-5)
  assert np.abs(adapted - hidden(config, {'params': params})).max() > 0.1


def test_every_adapted_weight_matters():
  config = worlds.LLAMA
  params = worlds.params_of(config)
  base = hidden(config, {'params': params})
  for name in lora.INPUTS:
    adapter = random_adapter(config, make_lora(targets=name))
    assert len(jax.tree.leaves(adapter)) == 2
    adapted = hidden(config, lora.variables(params, adapter, 1.0))
    assert np.abs(adapted - base).max() > 1e-3, name


def test_targets_are_matched_as_a_whole():
  kind = make_lora(targets='attention/(q|v)', rank=3)
  adapter = make_adapter(worlds.GPT2, kind)
  shapes = jax.tree.map(jnp.shape, adapter)
  assert shapes == {
    'layers': {
      'attention': {
        'q': {'a': (3, 16, 3), 'b': (3, 3, 4, 4)},
        'v': {'a': (3, 16, 3), 'b': (3, 3, 4, 4)},
      }
    }
  }
  with pytest.raises(ValueError, match='matches no weight'):
    make_adapter(worlds.GPT2, make_lora(targets='mlp/gate'))


def test_axes_are_those_of_the_weight_and_the_rank():
  boxed = lora.boxed(worlds.LLAMA, make_adapter(worlds.LLAMA))
  out = boxed['layers']['attention']['out']
  assert out['a'].names == ('layers', 'heads', 'head_dim', 'rank')
  assert out['b'].names == ('layers', 'rank', 'embed')


def test_initial_variances():
  config = worlds.LLAMA
  for init, part, variance in [
    ('a_zero', 'b', 1 / 64),
    ('b_zero', 'a', 1 / 48),
  ]:
    pair = make_adapter(config, make_lora(rank=64, init=init))
    values = pair['layers']['attention']['q'][part]
    np.testing.assert_allclose(np.var(values), variance, rtol=0.1)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'rank': 0}, 'adapter.rank is 0; use 1 or more'),
    ({'alpha': 0.0}, 'adapter.alpha is 0.0; use a positive number'),
    ({'init': 'zero'}, "'zero'; use one of a_zero, b_zero"),
    ({'targets': '('}, 'is no regular expression'),
  ],
)
def test_bad_options_name_the_fix(changes, message):
  with pytest.raises(ValueError, match=message):
    make_lora(**changes)


def test_variables_of_the_four_cases():
  assert lora.variables(None, None, 1.0) is None
  assert lora.variables(None, 'p', 1.0) == {'params': 'p'}
  assert lora.variables('p', None, 1.0) == {'params': 'p'}
  pair = {'layers': {'mlp': {'up': {'a': 1.0, 'b': 1.0}}}}
  both = lora.variables({'layers': 'p'}, pair, 2.0)
  assert both['params'] == {'layers': 'p'}
  assert both['lora']['layers']['mlp']['up'] == {'a': 1.0, 'b': 2.0}
