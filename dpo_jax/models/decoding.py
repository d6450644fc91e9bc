"""The decoder taken apart, for one token a row.

`Transformer` loops over stacked layers. XLA copies a layer, or its keys and
values, out of their stack before it computes with them, and on a CPU it packs
(copies) the right side of every product: 64 rows times weights [576, 1536] ran
at 83 GFLOP/s, the same with the weights on the left at 96. So `apart` gives
every layer arrays of its own, once and outside of the loop over tokens, and
weights with their outputs first, for products W x in place of x W. It holds the
layers' weights a second time. On a GPU, where nothing of this was measured, we
decode with `Transformer`. Figures are in experiments/LOG.md.

Dimension key: see `models/transformer`.
"""

import operator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from dpo_jax.models import lora
from dpo_jax.models import transformer

# Where layers apart are faster than the stack: measured on a CPU; on a TPU by
# the compiler's own cycles.
PLATFORMS = ('cpu', 'tpu')


def pays(variables):
  """Returns whether that is so where arrays, or placed shapes, are."""
  leaf = jax.tree.leaves(variables)[0]
  return next(iter(leaf.sharding.device_set)).platform in PLATFORMS


def apart(config, variables):
  """Returns what `Transformer.apply` takes, for every layer alone (a list).

  A weight [L, *ins, *outs] becomes L weights [*outs, *ins] in 'turned'.
  """
  return _apart(config, variables, operator.getitem, jnp.transpose)


def apart_shapes(config, variables):
  """Returns the placed shapes of `apart`, of arrays or of placed shapes.

  A layer is cut among devices as its stack is.
  """

  def placed(x, axes):
    where = x.sharding
    if isinstance(where, NamedSharding):
      spec = [*where.spec, *[None] * (x.ndim - len(where.spec))]
      cut = PartitionSpec(*(spec[axis] for axis in axes))
      where = NamedSharding(where.mesh, cut)
    shape = tuple(x.shape[axis] for axis in axes)
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

  def take(x, number):
    del number
    return placed(x, range(1, x.ndim))

  return _apart(config, variables, take, placed)


def _apart(config, variables, take, turn):
  """Is `apart` by (stack, number) -> a layer's, (weight, axes) -> turned."""
  stacks = {
    name: tree['layers'] for name, tree in variables.items() if 'layers' in tree
  }
  layers = []
  for number in range(config.num_layers):
    layer = jax.tree.map(lambda x, n=number: take(x, n), stacks)
    layer['turned'] = {}
    for name, ins in lora.INPUTS.items():
      group, last = name.split('/')
      if last in layer['params'][group]:
        weight = layer['params'][group].pop(last)
        outs = range(ins, weight.ndim)
        layer['turned'].setdefault(group, {})[last] = turn(
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
