"""Parameters between checkpoints: names, shapes and orders of dimensions.

A layout is written 'theirs->ours', one letter a dimension, with parentheses
around dimensions that are merged into one: '(NH)D->DNH' takes a query matrix
stored as [N * H, D] to our [D, N, H]. Read from right to left it is the way
back, so every layout is its own inverse and a round trip is bit-exact.

C counts the parts of a fused tensor, of which each goes to its own path:
'D(CNH)->CDNH' with three paths splits GPT-2's c_attn. Layers, '{}' in a name,
are stacked on our side on a leading axis that layouts leave out. Without a C
every path has the whole tensor, and the first path is written.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
  """One tensor of a checkpoint and its paths in our parameter tree."""

  name: str
  layout: str
  paths: list[str]
  rank: int = 0  # R in the layout, of adapters

  def names(self, layers: int) -> list[str]:
    """Return the tensor's name in every layer, or its only name."""
    return [self.name.format(i) for i in range(layers if self.stacked else 1)]

  def sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
    """Add the letters that mean something else in every row."""
    return {**sizes, 'C': len(self.paths), 'R': self.rank}

  @property
  def stacked(self) -> bool:
    return '{}' in self.name


def read(tensors: Mapping, table, sizes, *, layers: int, harmless: str, dtype):
  """Build the parameter tree of all `tensors`; list all that do not fit.

  `tensors` maps names to anything with a shape that `np.asarray` reads.
  Tensors that match the regular expression `harmless` may be left over.
  """
  wanted, problems = {}, []
  for row in table:
    shape = _shape(row.layout.split('->')[0], row.sizes(sizes))
    wanted.update((name, shape) for name in row.names(layers))
  for name, shape in wanted.items():
    if name not in tensors:
      problems.append(f'missing: {name} {shape}')
    elif tuple(tensors[name].shape) != shape:
      problems.append(
        f'misshapen: {name} is {tuple(tensors[name].shape)}, '
        f'the config says {shape}'
      )
  problems += [
    f'extra: {name} {tuple(tensors[name].shape)}'
    for name in tensors
    if name not in wanted and not re.fullmatch(harmless, name)
  ]
  if problems:
    raise ValueError(
      f'{len(problems)} tensors do not fit the config: the '
      "checkpoint is incomplete or another model's.\n  " + '\n  '.join(problems)
    )
  params = {}
  for row in table:
    theirs, ours = row.layout.split('->')
    local = row.sizes(sizes)
    shape = (layers,) * row.stacked + _shape(ours.removeprefix('C'), local)
    parts = [np.empty(shape, dtype) for _ in row.paths]
    for layer, name in enumerate(row.names(layers)):
      array = _arrange(np.asarray(tensors[name]), theirs, ours, local)
      for i, part in enumerate(parts):
        part[layer if row.stacked else ...] = (
          array[i] if ours.startswith('C') else array
        )
    for path, part in zip(row.paths, parts, strict=True):
      _put(params, path, part)
  return params


def write(params: Mapping, table, sizes, *, layers: int) -> dict:
  """Return the tensors that `read` with this table takes to `params`."""
  tensors = {}
  for row in table:
    theirs, ours = row.layout.split('->')
    local = row.sizes(sizes)
    parts = [np.asarray(_at(params, path)) for path in row.paths]
    for layer, name in enumerate(row.names(layers)):
      arrays = [part[layer] if row.stacked else part for part in parts]
      whole = np.stack(arrays) if ours.startswith('C') else arrays[0]
      tensors[name] = np.ascontiguousarray(_arrange(whole, ours, theirs, local))
  return tensors


def _shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """Return the shape of '(NH)D': one number a group."""
  groups = re.findall(r'\(\w+\)|\w', layout)
  return tuple(math.prod(sizes[d] for d in g.strip('()')) for g in groups)


def _arrange(array, source: str, target: str, sizes):
  """Split the groups of `source`, transpose, merge the groups of `target`."""
  split, merged = re.sub(r'[()]', '', source), re.sub(r'[()]', '', target)
  array = array.reshape(_shape(split, sizes))
  array = array.transpose([split.index(d) for d in merged])
  return array.reshape(_shape(target, sizes))


def _at(params, path: str):
  for name in path.split('/'):
    params = params[name]
  return params


def _put(params, path: str, value):
  *parents, last = path.split('/')
  for name in parents:
    params = params.setdefault(name, {})
  params[last] = value
