"""Which device holds what: one mesh, one table from logical to mesh axes."""

import contextlib
import functools
import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

AXES = ('data', 'fsdp', 'tensor')

# Logical axis (see models/transformer.py) -> mesh axis.
RULES = (
  ('rows', ('data', 'fsdp')),
  ('time', None),
  ('layers', None),
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('embed_cut', 'fsdp'),  # D of a gradient, which lies as its parameter does
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('head_dim', None),
  ('mlp', 'tensor'),
  ('position', None),
  ('rank', None),
)
# Activations keep D whole: 'embed' names a parameter dimension only.
ACTIVATION_RULES = tuple(
  (name, None if name == 'embed' else axis) for name, axis in RULES
)


def make_mesh(*, data, fsdp, tensor, devices=None):
  """Returns a mesh over `devices`, or all; one size may be -1, the rest."""
  sizes = [data, fsdp, tensor]
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  known = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f'mesh {dict(zip(AXES, sizes))}: sizes are positive, one may be -1'
    )
  if -1 in sizes and count % known:
    raise ValueError(
      f'mesh {dict(zip(AXES, sizes))}: its sizes make {known}, which does not'
      f' divide the {count} devices'
    )
  sizes = [count // known if size == -1 else size for size in sizes]
  named = dict(zip(AXES, sizes))
  if math.prod(sizes) != count:
    raise ValueError(
      f'mesh {named} has {math.prod(sizes)} places for {count} devices; set one'
      ' axis to -1'
    )
  try:
    return jax.make_mesh(
      sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )
  except NotImplementedError as error:  # axes must be products of the torus'
    raise ValueError(
      f'mesh {named} cannot be laid along the axes of this torus; choose sizes'
      ' that are products of its sides, such as one axis of all devices'
    ) from error


@contextlib.contextmanager
def use(mesh):
  """Within, compiled functions lay activations out on `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
    yield


def row_shards(mesh):
  """Number of devices that share the rows of a batch."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def check_batch_size(name, batch_size, mesh, *, parts=1):
  """Every shard of the rows must be able to hold the same number of groups.

  `parts` are micro-batches of which the same holds.
  """
  shards = row_shards(mesh) * parts
  if batch_size < 1 or batch_size % shards:
    below = batch_size // shards * shards
    sizes = [str(size) for size in (below, below + shards) if size > 0]
    micro = f' times {parts} micro-batches' if parts > 1 else ''
    raise ValueError(
      f'{name} {batch_size} is not divisible by the {row_shards(mesh)} devices'
      f' of mesh axes data x fsdp{micro}; use {" or ".join(sizes)}'
    )


# --- Parameters ---------------------------------------------------------------


def parameter_shardings(boxed_params, mesh):
  """Maps parameters boxed with logical axes to NamedShardings (unboxed).

  Every axis of every parameter must be in the table, and every mesh axis must
  divide what it cuts. Padding instead would be one more length of the heads or
  of the vocabulary for whoever reads a parameter to know; and what pads a
  vocabulary must be kept out of every normalizer.
  """
  boxes = jax.tree_util.tree_leaves_with_path(
    boxed_params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
  )
  known = dict(RULES)
  sizes = {}  # mesh axis -> {(logical axis, size): a parameter}
  for path, box in boxes:
    name = _name(path)
    if not isinstance(box, nn.LogicallyPartitioned):
      raise ValueError(
        f'parameter {name} has no logical axes; declare it with'
        ' nn.with_logical_partitioning'
      )
    for axis, size in zip(box.names, box.value.shape):
      if axis not in known:
        raise ValueError(
          f'axis {axis!r} of parameter {name} is not in sharding.RULES; add it'
          ' there, with the mesh axis that cuts it or None'
        )
      if known[axis]:
        sizes.setdefault(known[axis], {})[axis, size] = name
  for mesh_axis, found in sizes.items():
    _check_divides(mesh_axis, mesh.shape[mesh_axis], found)
  specs = nn.get_partition_spec(boxed_params)
  return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def _check_divides(mesh_axis, shards, found):
  uneven = {pair: name for pair, name in found.items() if pair[1] % shards}
  if not uneven:
    return
  (axis, size), name = next(iter(uneven.items()))
  common = functools.reduce(math.gcd, (size for _, size in found))
  fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
  if len(fitting) > 12:
    fitting = [*fitting[:11], '...', fitting[-1]]
  fix = f'sizes that fit this model: {", ".join(fitting)}'
  if common == 1:
    fix = f'this model takes mesh.{mesh_axis}=1 only'
  raise ValueError(
    f'mesh.{mesh_axis} {shards} does not divide the {size} of axis {axis!r} of'
    f' {name}; {fix}'
  )


def abstract(tree, shardings):
  """Returns the shapes of `tree`, placed: what stands for arrays not there."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    tree,
    shardings,
  )


def replicated(mesh):
  """Sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def of_rows(mesh):
  """Sharding of the arrays of a batch, by row."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def own_rows(count, mesh):
  """Returns which of `count` rows the devices of this process hold: ascending.

  Processes share rows where a tensor axis goes across them.
  """
  spans = of_rows(mesh).addressable_devices_indices_map((count,)).values()
  return sorted({row for (span,) in spans for row in range(count)[span]})


def put_rows(batch, mesh, *, count):
  """Joins what each process has of `count` rows, its `own_rows`, into arrays.

  They are global and sharded by row.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      of_rows(mesh), x, (count, *x.shape[1:])
    ),
    batch,
  )


def put(array, sharding):
  """Places a host's array of which every process has the whole.

  `jax.device_put` would have the processes compare it first.
  """
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def gathered(tree):
  """Returns the shardings of a tree that is to be whole along fsdp.

  Args:
    tree: arrays or placed shapes. What `tensor` cuts stays cut; what lies on
      one device stays there.
  """

  def whole(x):
    where = x.sharding
    if not isinstance(where, NamedSharding) or where.mesh.shape['fsdp'] == 1:
      return where
    axes = [None if axis == 'fsdp' else axis for axis in where.spec]
    return NamedSharding(where.mesh, PartitionSpec(*axes))

  return jax.tree.map(whole, tree)


# --- What lies where ----------------------------------------------------------


def bytes_per_device(tree):
  """Bytes of a tree on each device, without the padding of tiles."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


# Of a tree, parameters of less than this share of it are told together.
_SMALL = 0.02


def table(trees):
  """Returns lines that say what lies where: {'trained': tree, ...}.

  The largest parameters of the first tree one by one, then a line a tree.
  """
  first = jax.tree_util.tree_leaves_with_path(next(iter(trees.values())))
  whole = sum(bytes_per_device(x) for _, x in first)
  rows, small = [], []
  for path, x in first:
    if bytes_per_device(x) < _SMALL * whole:
      small.append(x)
      continue
    shape = 'x'.join(map(str, x.shape))
    rows.append((_name(path), shape, x.dtype.name, _spec(x), x))
  if small:
    rows.append(('the other', str(len(small)), '', '', small))
  for name, tree in trees.items():
    leaves = jax.tree.leaves(tree)
    if leaves:
      types = ', '.join(
        sorted({x.dtype.name for x in leaves if x.ndim or len(leaves) == 1})
      )
      rows.append((name, f'{len(leaves)} arrays', types, '', tree))
  cells = [
    (*texts, f'{bytes_per_device(x) / 2**20:,.2f} MiB')
    for *texts, x in [*rows, ('all', '', '', '', trees)]
  ]
  widths = [max(map(len, column)) for column in zip(*cells)]
  mesh = jax.tree.leaves(trees)[0].sharding.mesh
  sizes = ' x '.join(f'{name} {size}' for name, size in mesh.shape.items())
  lines = [f'On each of {mesh.size} devices ({sizes}):']
  for *texts, size in cells:
    line = '  '.join(text.ljust(n) for text, n in zip(texts, widths))
    lines.append(f'  {line}  {size.rjust(widths[-1])}')
  return '\n'.join(lines)


def _name(path):
  return '/'.join(str(getattr(key, 'key', key)) for key in path)


def _spec(x):
  """'- fsdp tensor': the mesh axis that cuts each dimension."""
  spec = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
  return ' '.join(
    '-' if axes is None else axes if isinstance(axes, str) else '+'.join(axes)
    for axes in spec
  )
