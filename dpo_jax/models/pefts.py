"""LoRA adapters as the library PEFT stores them: names, layouts, fused weights.

PEFT has for every adapted module, whichever way round its weight is stored,

  base_model.model.MODULE.lora_A.weight [R, inputs]
  base_model.model.MODULE.lora_B.weight [outputs, R]

Both follow from the weight's row in the family's key table: one of the two
groups of its layout has the weight's inputs, the other the outputs.
'(NH)D->DNH' gives 'RD->DR' for A and '(NH)R->RNH' for B, R as in `layouts`.

A fused weight (GPT-2's c_attn) has one A where our q, k and v have three.
Coming from PEFT all three get it. Going there, `tie` gives them a common one
first, which changes no bit of other weights, nor of what came from PEFT.
"""

import re
from typing import NamedTuple

import numpy as np

from dpo_jax.models import families
from dpo_jax.models import layouts
from dpo_jax.models import lora


class Linear(NamedTuple):
  """A module elsewhere that may have an adapter.

  module: its name, with '{}' for the layer.
  names: our weights in it, as in `lora.INPUTS`.
  a, b: layouts.
  inputs_first: whether its weight is stored [inputs, outputs].
  """

  module: str
  names: list[str]
  a: str
  b: str
  inputs_first: bool

  @property
  def suffix(self) -> str:
    """The name inside a layer."""
    return self.module.split('{}.')[1]

  def rows(self, rank: int) -> list[layouts.Row]:
    return [
      layouts.Row(
        f'base_model.model.{self.module}.lora_{part.upper()}.weight',
        layout,
        [f'layers/{name}/{part}' for name in self.names],
        rank,
      )
      for part, layout in (('a', self.a), ('b', self.b))
    ]


def linears(config, *, family) -> list[Linear]:
  """Returns the modules of the family's key table that may have adapters."""
  rows, _ = families.adapted_rows(config, family=family)
  return [_linear(row) for row in rows]


def _linear(row) -> Linear:
  names = [path.removeprefix('layers/') for path in row.paths]
  theirs, ours = row.layout.split('->')
  fused = 'C' * ours.startswith('C')
  letters = ours.removeprefix('C')
  count = lora.INPUTS[names[0]]
  inputs, outputs = letters[:count], letters[count:]
  groups = re.findall(r'\(\w+\)|\w', theirs)
  first = [set(group.strip('()')) == set(inputs) for group in groups]
  its_inputs, its_outputs = groups[:: 1 if first[0] else -1]
  return Linear(
    module=row.name.removesuffix('.weight'),
    names=names,
    a=f'R{its_inputs}->{inputs}R',
    b=f'{its_outputs}R->{fused}R{outputs}',
    inputs_first=first[0],
  )


def from_peft(tensors, ranks, config, *, family):
  """Builds our adapter, in float32, of PEFT's tensors, or lists what is wrong.

  Args:
    tensors: names to anything with a shape that `np.asarray` reads.
    ranks: {module of `linears`: R}; all of these and no others must be there.
  """
  _, sizes = families.adapted_rows(config, family=family)
  table = [
    row
    for linear in linears(config, family=family)
    if linear.module in ranks
    for row in linear.rows(ranks[linear.module])
  ]
  layers = config.num_layers
  wanted = layouts.tensor_shapes(table, sizes, layers=layers)
  return layouts.assemble(
    layouts.read(
      layouts.check(tensors, wanted, harmless=r'(?!)'),
      table,
      sizes,
      layers=layers,
    ),
    layouts.parameter_shapes(table, sizes, layers=layers),
    dtype='float32',
  )


def to_peft(adapter, config, *, family):
  """Returns (PEFT's tensors in float32, {module of `linears`: R}).

  `from_peft` takes them to `tie` of the adapter, bit for bit.
  """
  adapter = tie(adapter, config, family=family)
  _, sizes = families.adapted_rows(config, family=family)
  tensors, ranks = {}, {}
  for linear in linears(config, family=family):
    pair = _pair(adapter, linear.names[0])
    if pair is None:
      continue
    ranks[linear.module] = pair['a'].shape[-1]
    tensors |= dict(
      layouts.write(
        adapter,
        linear.rows(ranks[linear.module]),
        sizes,
        layers=config.num_layers,
      )
    )
  return tensors, ranks


def tie(adapter, config, *, family):
  """Returns an adapter of the same products that gives fused weights one a.

  Where the weights fused elsewhere have the same bits in a, they keep it and
  their rank. Otherwise they get all their a side by side, and every b has
  zeros where the a of another meets it: the rank is the sum of theirs. A weight
  without an adapter among such with one gets a b of zeros. Weights that are
  fused nowhere are untouched. All in float32, as numpy arrays.
  """
  tied = {}
  known = linears(config, family=family)
  names = {name for linear in known for name in linear.names}
  unknown = [
    f'{group}/{last}'
    for group, weights in adapter['layers'].items()
    for last in weights
    if f'{group}/{last}' not in names
  ]
  if unknown:
    raise ValueError(
      f'the adapter has {", ".join(unknown)}, which this family has no module'
      ' for; use the family of the model it was made for'
    )
  for linear in known:
    found = {
      name: {part: np.asarray(pair[part], np.float32) for part in 'ab'}
      for name in linear.names
      if (pair := _pair(adapter, name)) is not None
    }
    if not found:
      continue
    for name, (a, b) in zip(linear.names, _common(found, linear.names)):
      group, last = name.split('/')
      tied.setdefault(group, {})[last] = {'a': a, 'b': b}
  return {'layers': tied}


def _common(found, names):
  """Yields (a, b) of every name, with the same a."""
  first = next(iter(found.values()))
  whole = [pair['a'] for pair in found.values()]
  same = all(
    a.shape == whole[0].shape and a.tobytes() == whole[0].tobytes()
    for a in whole
  )
  a = whole[0] if same else np.concatenate(whole, axis=-1)
  L, R = a.shape[0], a.shape[-1]
  start = 0
  for name in names:
    b = np.zeros((L, R, *first['b'].shape[2:]), np.float32)
    if name in found:
      rows = found[name]['b'].shape[1]
      b[:, start : start + rows] = found[name]['b']
      start += 0 if same else rows
    yield a, b


def _pair(adapter, name):
  group, last = name.split('/')
  return adapter['layers'].get(group, {}).get(last)
