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
from collections.abc import Iterable
from collections.abc import Iterator
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


class Piece(NamedTuple):
  """A parameter, or its part in one layer, as it comes from a checkpoint."""

  path: str
  layer: int | None  # None: the whole parameter
  array: np.ndarray


def tensor_shapes(table, sizes, *, layers: int) -> dict[str, tuple[int, ...]]:
  """Return the shape of every tensor of a table, by its name elsewhere."""
  shapes = {}
  for row in table:
    shape = _shape(row.layout.split('->')[0], row.sizes(sizes))
    shapes.update((name, shape) for name in row.names(layers))
  return shapes


def parameter_shapes(table, sizes, *, layers: int) -> dict:
  """Return the shape of every parameter of a table, by its path."""
  shapes = {}
  for row in table:
    ours = row.layout.split('->')[1].removeprefix('C')
    shape = (layers,) * row.stacked + _shape(ours, row.sizes(sizes))
    shapes.update((path, shape) for path in row.paths)
  return shapes


def check(tensors: Mapping, wanted: Mapping, *, harmless: str) -> dict:
  """Return the wanted of `tensors`, or list all that do not fit.

  `tensors` maps names to anything with a shape, `wanted` to the shapes of the
  config. What matches the regular expression `harmless` may be left over.
  """
  problems = []
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
  return {name: tensors[name] for name in wanted}


def read(tensors: Mapping, table, sizes, *, layers: int) -> Iterator[Piece]:
  """Yield our parameters, one tensor of `tensors` after the other.

  The layers of a parameter come in order and nothing else between them, but
  for the other parts of a fused tensor. `np.asarray` reads a tensor, in the
  type it is stored in.
  """
  for row in table:
    for layer, name in enumerate(row.names(layers)):
      yield from _pieces(tensors[name], row, layer, sizes)


def _pieces(tensor, row: Row, layer: int, sizes) -> Iterator[Piece]:
  # A generator of its own: nothing keeps a tensor while the next is read.
  theirs, ours = row.layout.split('->')
  local = row.sizes(sizes)
  array = _arrange(np.asarray(tensor), theirs, ours, local)
  parts = array if ours.startswith('C') else [array] * len(row.paths)
  for path, part in zip(row.paths, parts, strict=True):
    yield Piece(path, layer if row.stacked else None, part)


def assemble(pieces: Iterable[Piece], shapes: Mapping, *, dtype=None) -> dict:
  """Build the parameter tree of numpy arrays.

  `shapes` are those of all parameters. `dtype` None keeps each as it is
  stored; one whose layers are stored differently gets what holds them all.
  """
  found = {}
  for path, layer, array in pieces:
    have, kind = found.get(path), array.dtype if dtype is None else dtype
    if have is None:
      found[path] = have = np.empty(shapes[path], kind)
    elif dtype is None and have.dtype != kind:
      kind = 'float64' if 8 in (have.itemsize, kind.itemsize) else 'float32'
      found[path] = have = have.astype(kind)
    have[... if layer is None else layer] = array
    del array  # before the next is read
  return tree(found)


def write(
  params: Mapping, table, sizes, *, layers: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yield the (name, tensor) that `read` with this table takes to `params`."""
  for row in table:
    theirs, ours = row.layout.split('->')
    local = row.sizes(sizes)
    parts = [np.asarray(at(params, path)) for path in row.paths]
    for layer, name in enumerate(row.names(layers)):
      arrays = [part[layer] if row.stacked else part for part in parts]
      whole = np.stack(arrays) if ours.startswith('C') else arrays[0]
      yield name, np.ascontiguousarray(_arrange(whole, ours, theirs, local))


def at(params: Mapping, path: str):
  """Return what is at 'a/b/c' of nested dicts."""
  for name in path.split('/'):
    params = params[name]
  return params


def tree(values: Mapping) -> dict:
  """Return the nested dicts of {'a/b/c': value}."""
  params = {}
  for path, value in values.items():
    put(params, path, value)
  return params


def put(params: dict, path: str, value) -> None:
  """Set what is at 'a/b/c' of nested dicts."""
  *parents, last = path.split('/')
  for name in parents:
    params = params.setdefault(name, {})
  params[last] = value


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
