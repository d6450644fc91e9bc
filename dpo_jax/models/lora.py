"""LoRA: adapters of low rank as a second variable collection.

Beside 'params' a model may be given the collection 'lora'. It is a tree of the
same paths that has, for every adapted weight W [L, *ins, *outs], a pair

  a [L, *ins, R]    b [L, R, *outs]

and the layer computes x W + scale (x a) b (Hu et al. 2021, arXiv:2106.09685,
section 4.1; their A is our a transposed, their B our b). Without the collection
the model is the one that the adapter was put on, from the same weights.

Dimension key: L layers, R rank, I and O all inputs and outputs of a weight.
"""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax.models import heads
from dpo_jax.models import transformer

# Weights that may have an adapter -> how many of their dimensions are inputs.
INPUTS = {
  'attention/q': 1,
  'attention/k': 1,
  'attention/v': 1,
  'attention/out': 2,
  'mlp/gate': 1,
  'mlp/up': 1,
  'mlp/down': 1,
}
# Which factor is zero before the first step, so that the product is.
INITS = ('a_zero', 'b_zero')


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which weights have an adapter, and of which kind.

  targets: regular expression, matched against whole names of `INPUTS`.
  rank: R.
  alpha: the product counts alpha / rank times.
  init: 'a_zero', the default of configs, draws b and leaves a zero; 'b_zero'
    is the paper's other way round.
  """

  targets: str
  rank: int
  alpha: float
  init: str

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f'adapter.rank is {self.rank}; use 1 or more')
    if not 0 < self.alpha < math.inf:
      raise ValueError(f'adapter.alpha is {self.alpha}; use a positive number')
    if self.init not in INITS:
      raise ValueError(
        f'adapter.init is {self.init!r}; use one of {", ".join(INITS)}'
      )
    try:
      re.compile(self.targets)
    except re.error as error:
      raise ValueError(
        f'adapter.targets {self.targets!r} is no regular expression ({error})'
      ) from error

  @property
  def scale(self):
    return self.alpha / self.rank

  def names(self, layers):
    """Returns the weights of `layers`, a parameter tree, that it adapts."""
    there = [
      name
      for name in INPUTS
      if name.split('/')[1] in layers[name.split('/')[0]]
    ]
    names = [name for name in there if re.fullmatch(self.targets, name)]
    if not names:
      raise ValueError(
        f'adapter.targets {self.targets!r} matches no weight of this model;'
        f' it has {", ".join(there)}'
      )
    return names


def init_adapter(config, lora, key):
  """Returns a float32 adapter whose product is zero.

  What is not zero is normal: b with variance 1 / R, so that a first step of
  Adam moves the outputs about alpha / R times as far as one on the weights
  would; a with variance 1 / (3 I), that of the paper's code.
  """
  weights = _weights(config)
  adapter = {}
  for number, name in enumerate(lora.names(weights)):
    group, last = name.split('/')
    shape, inputs = weights[group][last].value.shape, 1 + INPUTS[name]
    shapes = {
      'a': (*shape[:inputs], lora.rank),
      'b': (shape[0], lora.rank, *shape[inputs:]),
    }
    drawn, variance = 'b', 1 / lora.rank
    if lora.init == 'b_zero':
      drawn, variance = 'a', 1 / (3 * math.prod(shape[1:inputs]))
    pair = {part: jnp.zeros(shape) for part, shape in shapes.items()}
    own = jax.random.fold_in(key, number)
    pair[drawn] = variance**0.5 * jax.random.normal(own, shapes[drawn])
    adapter.setdefault(group, {})[last] = pair
  return {'layers': adapter}


def boxed(config, adapter):
  """Boxes an adapter with the logical axes of the weights it is put on."""
  weights, out = _weights(config), {}
  for group, last, pair in _pairs(adapter):
    axes, inputs = weights[group][last].names, 1 + INPUTS[f'{group}/{last}']
    names = {
      'a': (*axes[:inputs], 'rank'),
      'b': (axes[0], 'rank', *axes[inputs:]),
    }
    out.setdefault(group, {})[last] = {
      part: nn.LogicallyPartitioned(pair[part], names[part]) for part in 'ab'
    }
  return {'layers': out}


def _weights(config):
  """Shapes of the layers' parameters, boxed with their axes."""
  key = jax.random.key(0)
  return jax.eval_shape(lambda: transformer.init_params(config, key))['layers']


def variables(base, trained, scale):
  """Returns what `Transformer.apply` takes, or None of nothing.

  Args:
    base: parameters under an adapter, or None where there is no adapter.
    trained: the adapter on them, perhaps with a head (`heads`), None to switch
      it off; without a base, the parameters themselves.
    scale: of `Lora`; None for shapes, which it does not change.
  """
  if base is None:
    return None if trained is None else {'params': trained}
  if trained is None:
    return {'params': base}
  adapter = heads.without(trained)
  head = {name: trained[name] for name in trained if name not in adapter}
  if scale is not None:
    adapter = _scaled(adapter, scale)
  return {'params': base | head, 'lora': adapter}


def _scaled(adapter, scale):
  """Moves the scale into b, the smaller factor's side of the product."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: scale * x if path[-1].key == 'b' else x, adapter
  )


def _pairs(adapter):
  for group, weights in adapter['layers'].items():
    for last, pair in weights.items():
      yield group, last, pair


def merge(params, adapter, scale):
  """Returns parameters W + scale a b that need no adapter, in W's dtypes."""
  layers = dict(params['layers'])
  for group, last, pair in _pairs(adapter):
    weight = layers[group][last]
    a, b = (jnp.asarray(pair[part], jnp.float32) for part in 'ab')
    L, R = b.shape[:2]
    product = jnp.matmul(
      a.reshape(L, -1, R), b.reshape(L, R, -1), precision='highest'
    )
    merged = weight + scale * product.reshape(weight.shape)
    layers[group] = layers[group] | {last: merged.astype(weight.dtype)}
  return params | {'layers': layers}


def neutral(adapter):
  """Whether every pair has a factor of zeros: the policy is the base model."""
  return all(
    any(not bool(jnp.any(pair[part])) for part in 'ab')
    for _, _, pair in _pairs(adapter)
  )
