"""The decoder taken apart, for one token a row on a CPU.

`Transformer` loops over stacked layers. XLA on a CPU copies a layer out of its
stack before it computes with it, and it packs (copies) the right side of every
product: 64 rows times weights [576, 1536] ran at 83 GFLOP/s, the same with the
weights on the left at 96 (experiments/LOG.md). So `apart` gives every layer
arrays of its own, once and outside of the loop over tokens, and weights with
their outputs first, for products W x in place of x W. It holds the layers'
weights a second time. Elsewhere, where nothing of this was measured, we decode
with `Transformer`.

Dimension key: see `models/transformer`.
"""

import operator

import jax
import jax.numpy as jnp

from dpo_jax.models import lora
from dpo_jax.models import transformer


def pays():
  """Returns whether layers apart are faster than the stack where we run."""
  return jax.default_backend() == 'cpu'


def apart(config, variables):
  """Returns what `Transformer.apply` takes, for every layer alone (a list).

  A weight [L, *ins, *outs] becomes L weights [*outs, *ins] in 'turned'.
  """
  stacks = {
    name: tree['layers'] for name, tree in variables.items() if 'layers' in tree
  }
  layers = []
  for number in range(config.num_layers):
    layer = jax.tree.map(operator.itemgetter(number), stacks)
    layer['turned'] = {}
    for name, ins in lora.INPUTS.items():
      group, last = name.split('/')
      if last in layer['params'][group]:
        weight = layer['params'][group].pop(last)
        outs = range(ins, weight.ndim)
        layer['turned'].setdefault(group, {})[last] = jnp.transpose(
          weight, (*outs, *range(ins))
        )
    layers.append(layer)
  return layers


def cache_apart(cache):
  """Returns what a cache has for each layer, without the axis of layers."""
  return [
    jax.tree.map(operator.itemgetter(number), cache)
    for number in range(len(cache['key']))
  ]


def apply(
  config,
  params,
  layers,
  tokens_BT,
  positions_BT,
  lo_BT,
  hi_BT,
  *,
  caches,
  cache_index,
):
  """Is `Transformer.apply` with a cache, of layers and caches taken apart.

  Of `params` only what is not in the layers is read.
  """
  x_BTD = transformer.Embed(config).apply(
    {'params': params['embed']}, tokens_BT, positions_BT
  )
  windowed, ropes, los = transformer.by_kind(
    config, positions_BT, lo_BT, cache_index
  )
  block, written = transformer.Block(config), []
  for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
    kind = None if windowed is None else windowed[number]
    (x_BTD, cache), _ = block.apply(
      layer, (x_BTD, cache), (None, kind), ropes, los, hi_BT, cache_index
    )
    written.append(cache)
  norm = transformer.Norm(config)
  return norm.apply({'params': params['final_norm']}, x_BTD), written
