"""Interval attention as Pallas kernels for TPU.

The maths of a tile of queries and a block of keys is that of
`attention_blocks`; here is which blocks meet. A grid step is one tile and one
block. The block that a step fetches comes from scalars that are known before
the kernel starts (scalar prefetch): step j of a tile fetches key block
`first + j`. The number of steps is that of the tile which needs most; where a
tile needs fewer, its last block stays where it is and nothing is computed.
For the gradients of keys and values the roles are swapped: step j of a block
of keys fetches query tile `first + j`.

Dimension key: as in `attention_blocks`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dpo_jax import attention_blocks as blocks

LARGEST_GROUP = 32  # G; with more a tile would be few queries
LARGEST_HEAD = 256
DTYPES = ('float32', 'bfloat16')


def fits(query_BTNH, key_BSKH):
  """Whether the kernels take such arrays."""
  N, H = query_BTNH.shape[2:]
  return (
    N // key_BSKH.shape[2] <= LARGEST_GROUP
    and H <= LARGEST_HEAD
    and H % 8 == 0
    and query_BTNH.dtype == key_BSKH.dtype
    and query_BTNH.dtype.name in DTYPES
  )


def block_sizes(group):
  """Returns block_q and block_k: tiles near R = 512, never above 1024.

  Scores of a step are then at most 1 MiB, and the largest heads in float32 fit
  into the 16 MiB that a kernel may use on a v5e. Not measured for speed.
  """
  for largest, block_q in ((2, 256), (8, 128), (16, 64), (LARGEST_GROUP, 32)):
    if group <= largest:
      return block_q, 256


def tile_ranges(first_BI, count_BI, num_blocks):
  """Returns the first tile that sees a key block and how many, int32 [B, J].

  Tiles between the first and the last may not see it; its scores are masked.
  """
  block_J1 = jnp.arange(num_blocks)[:, None]
  first_B1I, count_B1I = first_BI[:, None], count_BI[:, None]
  sees_BJI = (block_J1 >= first_B1I) & (block_J1 < first_B1I + count_B1I)
  last_BJ = sees_BJI.shape[-1] - jnp.argmax(sees_BJI[..., ::-1], -1)
  first_BJ = jnp.argmax(sees_BJI, -1)
  count_BJ = jnp.where(sees_BJI.any(-1), last_BJ - first_BJ, 0)
  return first_BJ.astype(jnp.int32), count_BJ.astype(jnp.int32)


# Name of a kernel -> products of matrices for a tile and a block that meet, and
# whether it goes through the tiles of a block of keys.
PRODUCTS = {
  'interval_attention': (2, False),
  'interval_attention_dquery': (3, False),
  'interval_attention_dkey': (4, True),
}


def meetings(lo_BT, hi_BT, *, group):
  """Returns how many pairs of tile and block the kernels compute, of a head.

  First with tiles outside, then with blocks outside, as integers.
  """
  block_q, block_k = block_sizes(group)
  lo_BIR, hi_BIR = (
    blocks.bounds(jnp.asarray(x), group, block_q) for x in (lo_BT, hi_BT)
  )
  first_BI, count_BI = blocks.key_ranges(lo_BIR, hi_BIR, block_k)
  by_key = tile_ranges(first_BI, count_BI, -(-lo_BT.shape[1] // block_k))
  return int(count_BI.sum()), int(by_key[1].sum())


def _step(first, count):
  """Returns (number of the block that this step fetches, whether it counts).

  The grid is (row, key head, tile or key block, step).
  """
  place = pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)
  step = pl.program_id(3)
  return first[place] + step, step < count[place]


def _fetched(outer):
  """Returns the number of the block to fetch as a function of grid indices."""

  def fetched(b, i, j, first, count):
    place = b * outer + i
    return first[place] + jnp.clip(j, 0, jnp.maximum(count[place] - 1, 0))

  return fetched


def _forward_kernel(
  first,
  count,
  query,
  lo,
  hi,
  key,
  value,
  out,
  lse,
  *carry,
  scale,
  cap,
  block_k,
):
  number, counts = _step(first, count)

  @pl.when(pl.program_id(3) == 0)
  def _():
    for ref, start in zip(carry, blocks.nothing_yet(query.shape)):
      ref[...] = start

  @pl.when(counts)
  def _():
    _, scores_SR = blocks.scores(
      query[...],
      key[...],
      lo[...],
      hi[...],
      number * block_k,
      scale=scale,
      cap=cap,
    )
    added = blocks.accumulate([x[...] for x in carry], scores_SR, value[...])
    for ref, x in zip(carry, added):
      ref[...] = x

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _():
    top_1R, total_1R, out_HR = (x[...] for x in carry)
    out[...] = (out_HR / total_1R).astype(out.dtype)
    lse[...] = top_1R + jnp.log(total_1R)


def _query_kernel(
  first,
  count,
  query,
  dout,
  lse,
  delta,
  lo,
  hi,
  key,
  key_HS,
  value,
  dquery,
  total,
  *,
  scale,
  cap,
  block_k,
):
  number, counts = _step(first, count)

  @pl.when(pl.program_id(3) == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  @pl.when(counts)
  def _():
    tile = [x[...] for x in (query, dout, lse, delta, lo, hi)]
    _, dscores_SR = blocks.score_gradients(
      tile, key[...], value[...], number * block_k, scale=scale, cap=cap
    )
    total[...] += blocks.query_gradient(dscores_SR, key_HS[...])

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _():
    dquery[...] = total[...].astype(dquery.dtype)


def _key_kernel(
  first,
  count,
  query,
  dout,
  lse,
  delta,
  lo,
  hi,
  key,
  value,
  dkey,
  dvalue,
  *totals,
  scale,
  cap,
  block_k,
):
  _, counts = _step(first, count)
  start = pl.program_id(2) * block_k

  @pl.when(pl.program_id(3) == 0)
  def _():
    for total in totals:
      total[...] = jnp.zeros_like(total)

  @pl.when(counts)
  def _():
    tile = [x[...] for x in (query, dout, lse, delta, lo, hi)]
    weights_SR, dscores_SR = blocks.score_gradients(
      tile, key[...], value[...], start, scale=scale, cap=cap
    )
    added = blocks.key_gradients(tile, weights_SR, dscores_SR)
    for total, x in zip(totals, added):
      total[...] += x

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _():
    for gradient, total in zip((dkey, dvalue), totals):
      gradient[...] = total[...].astype(gradient.dtype)


def _call(kernel, ranges, inputs, outputs, carry, *, heads, name, interpret):
  """Runs a kernel over (row, key head, place, step).

  Args:
    kernel: function of the refs of ranges, inputs, outputs and carry.
    ranges: first and count, int32 [B, places].
    inputs: (array, block shape, index map) triples.
    outputs: (shape and dtype, block shape, index map) triples.
    carry: shapes of the float32 scratch that lasts over a place's steps.
    heads: K.
    name: of the kernel in profiles.
    interpret: run as XLA operations, on any device.
  """
  first, count = ranges
  specs = [
    [pl.BlockSpec(shape, index) for _, shape, index in part]
    for part in (inputs, outputs)
  ]
  # One step at least: it writes zeros where a block of keys is never seen.
  steps = jnp.maximum(count.max(), 1)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(first.shape[0], heads, first.shape[1], steps),
      in_specs=specs[0],
      out_specs=specs[1],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in carry],
    ),
    out_shape=[shape for shape, _, _ in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    name=name,
    interpret=interpret,
  )(first.reshape(-1), count.reshape(-1), *(x for x, _, _ in inputs))


def _tile_spec(x_BIKHR, at):
  """One head's tile; `at` maps (row, place, step, ranges) to its number."""

  def index(b, k, i, j, first, count):
    head = k if x_BIKHR.shape[2] > 1 else 0  # lo and hi are those of all heads
    return b, at(b, i, j, first, count), head, 0, 0

  return x_BIKHR, (None, None, None, *x_BIKHR.shape[3:]), index


def _slots_spec(x, axis, block_k, at):
  """One head's block of keys; `axis` of its array has the slots."""

  def index(b, k, i, j, first, count):
    number = at(b, i, j, first, count)
    return (b, k, number, 0) if axis == 2 else (b, k, 0, number)

  shape = [None, None, *x.shape[2:]]
  shape[axis] = block_k
  return x, tuple(shape), index


def _place(b, i, j, first, count):
  del b, j, first, count
  return i


def _arranged(tiled, keyed, lo_BT, hi_BT, kv_heads):
  """Returns tiles with lo and hi added, keys [B, K, S, H], ranges, blocks."""
  group = tiled[0].shape[2] // kv_heads
  block_q, block_k = block_sizes(group)
  lo_BIR, hi_BIR = (blocks.bounds(x, group, block_q) for x in (lo_BT, hi_BT))
  tiled = [blocks.tiles(x, kv_heads, block_q) for x in tiled]
  tiled += [lo_BIR[:, :, None, None], hi_BIR[:, :, None, None]]
  keyed = [blocks.pad_slots(x, block_k).transpose(0, 2, 1, 3) for x in keyed]
  ranges = blocks.key_ranges(lo_BIR, hi_BIR, block_k)
  return tiled, keyed, ranges, block_q, block_k


def forward(
  query_BTNH,
  key_BSKH,
  value_BSKH,
  lo_BT,
  hi_BT,
  *,
  scale,
  cap,
  interpret=False,
):
  """As `attention_blocks.forward`."""
  T, K = query_BTNH.shape[1], key_BSKH.shape[2]
  tiled, keyed, ranges, block_q, block_k = _arranged(
    [query_BTNH], [key_BSKH, value_BSKH], lo_BT, hi_BT, K
  )
  B, I, _, H, R = tiled[0].shape
  key_BKSH, value_BKSH = keyed
  fetched = _fetched(I)
  out = jax.ShapeDtypeStruct((B, I, K, H, R), value_BSKH.dtype)
  lse = jax.ShapeDtypeStruct((B, I, K, 1, R), jnp.float32)
  out, lse = _call(
    functools.partial(_forward_kernel, scale=scale, cap=cap, block_k=block_k),
    ranges,
    [_tile_spec(x, _place) for x in tiled]
    + [
      _slots_spec(key_BKSH, 2, block_k, fetched),
      _slots_spec(value_BKSH.swapaxes(2, 3), 3, block_k, fetched),
    ],
    [_tile_spec(x, _place) for x in (out, lse)],
    [(1, R), (1, R), (H, R)],
    heads=K,
    name='interval_attention',
    interpret=interpret,
  )
  return blocks.untiled(out, T, block_q), blocks.untiled(lse, T, block_q)


def backward(
  query_BTNH,
  key_BSKH,
  value_BSKH,
  lo_BT,
  hi_BT,
  lse_BTN1,
  delta_BTN1,
  dout_BTNH,
  *,
  scale,
  cap,
  interpret=False,
):
  """As `attention_blocks.backward`."""
  T = query_BTNH.shape[1]
  S, K = key_BSKH.shape[1:3]
  tiled, keyed, ranges, block_q, block_k = _arranged(
    [query_BTNH, dout_BTNH, lse_BTN1, delta_BTN1],
    [key_BSKH, value_BSKH],
    lo_BT,
    hi_BT,
    K,
  )
  I, _, H, R = tiled[0].shape[1:]
  key_BKSH, value_BKSH = keyed
  fetched = _fetched(I)
  dquery = jax.ShapeDtypeStruct(tiled[0].shape, query_BTNH.dtype)
  (dquery,) = _call(
    functools.partial(_query_kernel, scale=scale, cap=cap, block_k=block_k),
    ranges,
    [_tile_spec(x, _place) for x in tiled]
    + [
      _slots_spec(key_BKSH, 2, block_k, fetched),
      _slots_spec(key_BKSH.swapaxes(2, 3), 3, block_k, fetched),
      _slots_spec(value_BKSH, 2, block_k, fetched),
    ],
    [_tile_spec(dquery, _place)],
    [(H, R)],
    heads=K,
    name='interval_attention_dquery',
    interpret=interpret,
  )
  J = key_BKSH.shape[2] // block_k
  fetched = _fetched(J)
  dkeys = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in keyed]
  dkeys = _call(
    functools.partial(_key_kernel, scale=scale, cap=cap, block_k=block_k),
    tile_ranges(*ranges, J),
    [_tile_spec(x, fetched) for x in tiled]
    + [_slots_spec(x, 2, block_k, _place) for x in keyed],
    [_slots_spec(x, 2, block_k, _place) for x in dkeys],
    [(block_k, H)] * 2,
    heads=K,
    name='interval_attention_dkey',
    interpret=interpret,
  )
  dkey, dvalue = (x[:, :, :S].transpose(0, 2, 1, 3) for x in dkeys)
  return blocks.untiled(dquery, T, block_q), dkey, dvalue
