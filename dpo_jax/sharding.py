"""Which device holds what: one mesh, one table from logical to mesh axes."""

import contextlib

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


def make_mesh(*, data, fsdp, tensor):
  """Returns a mesh over all devices; one size may be -1 for "the rest"."""
  sizes = [data, fsdp, tensor]
  count = jax.device_count()
  known = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f'mesh {dict(zip(AXES, sizes))}: sizes are positive, one may be -1'
    )
  sizes = [count // known if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != count:
    raise ValueError(
      f'mesh {dict(zip(AXES, sizes))} has {int(np.prod(sizes))} places for'
      f' {count} devices; set one axis to -1'
    )
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def parameter_shardings(boxed_params, mesh):
  """Maps parameters boxed with logical axes to NamedShardings (unboxed)."""
  specs = nn.get_partition_spec(boxed_params)
  return nn.logical_to_mesh_sharding(specs, mesh, RULES)


def replicated(mesh):
  """Sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def _rows(mesh):
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def own_rows(count, mesh):
  """Returns which of `count` rows the devices of this process hold: ascending.

  Processes share rows where a tensor axis goes across them.
  """
  spans = _rows(mesh).addressable_devices_indices_map((count,)).values()
  return sorted({row for (span,) in spans for row in range(count)[span]})


def put_rows(batch, mesh, *, count):
  """Joins what each process has of `count` rows, its `own_rows`, into arrays.

  They are global and sharded by row.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      _rows(mesh), x, (count, *x.shape[1:])
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
