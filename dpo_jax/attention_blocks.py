"""Interval attention, block by block (FlashAttention-2, arXiv:2307.08691).

Nothing of size T x S is ever held: scores of one tile of queries and one block
of keys are made, used and dropped, and the backward pass makes them again from
the log-normalizers. Blocks of keys that no query of a tile sees are skipped.

A tile is `block_q` queries of all G heads that share a key head: R = G *
block_q queries side by side. Scores are kept with keys first, [S, R], so that
their maximum and sum run along the slow axis, which is what vectorizes on a
CPU and what a TPU does without crossing lanes.

`scores`, `accumulate` and `score_gradients` are the maths of one tile and one
block; `attention_tpu` calls them too.

Dimension key: B rows, T query slots, S key slots (of a block, or all), N query
heads, K key/value heads, G = N / K, H head dim, I query tiles, J key blocks,
R queries of a tile. Leading axes (...) are K here, or B and K, or none.
"""

import jax
import jax.numpy as jnp

# Of masked scores: finite, so that no difference of two is NaN.
MASKED = -1e30


def soft_cap(x, cap):
  """Squashes to (-cap, cap), smoothly (Gemma 2, arXiv:2408.00118); None: x."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def product(spec, a, b):
  """Einsum in the inputs' dtype with a float32 result."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


# The maths of one tile and one block of keys.


def scores(query_HR, key_SH, lo_1R, hi_1R, start, *, scale, cap):
  """Returns scores [..., S, R] before and after masking, float32.

  `start` is the slot of the block's first key.
  """
  capped_SR = soft_cap(
    product('...sh,...hr->...sr', key_SH, query_HR) * scale, cap
  )
  slot_SR = start + jax.lax.broadcasted_iota(
    jnp.int32, capped_SR.shape, capped_SR.ndim - 2
  )
  visible_SR = (slot_SR >= lo_1R) & (slot_SR < hi_1R)
  return capped_SR, jnp.where(visible_SR, capped_SR, MASKED)


def nothing_yet(shape_HR):
  """Returns what `accumulate` starts from."""
  shape_1R = (*shape_HR[:-2], 1, shape_HR[-1])
  return (
    jnp.full(shape_1R, MASKED, jnp.float32),
    jnp.zeros(shape_1R, jnp.float32),
    jnp.zeros(shape_HR, jnp.float32),
  )


def accumulate(carry, scores_SR, value_HS):
  """Adds a block of keys to (maximum, sum, weighted values) so far.

  Where a query sees no key of the first blocks, its weights are of size 1;
  the first key that it sees multiplies them by exp(MASKED) = 0.
  """
  top_1R, total_1R, out_HR = carry
  new_top_1R = jnp.maximum(top_1R, scores_SR.max(-2, keepdims=True))
  weights_SR = jnp.exp(scores_SR - new_top_1R)
  old_1R = jnp.exp(top_1R - new_top_1R)
  total_1R = total_1R * old_1R + weights_SR.sum(-2, keepdims=True)
  out_HR = out_HR * old_1R + product(
    '...hs,...sr->...hr', value_HS, weights_SR.astype(value_HS.dtype)
  )
  return new_top_1R, total_1R, out_HR


def score_gradients(tile, key_SH, value_SH, start, *, scale, cap):
  """Returns weights and the gradients of unscaled scores, [..., S, R] float32.

  `tile` is query, output gradient [..., H, R], log-normalizer, sum over H of
  output times its gradient, lo and hi [..., 1, R].
  """
  query_HR, dout_HR, lse_1R, delta_1R, lo_1R, hi_1R = tile
  capped_SR, scores_SR = scores(
    query_HR, key_SH, lo_1R, hi_1R, start, scale=scale, cap=cap
  )
  weights_SR = jnp.exp(scores_SR - lse_1R)
  dweights_SR = product('...sh,...hr->...sr', value_SH, dout_HR)
  dscores_SR = weights_SR * (dweights_SR - delta_1R) * scale
  if cap is not None:
    dscores_SR *= 1 - (capped_SR / cap) ** 2
  return weights_SR, dscores_SR


def query_gradient(dscores_SR, key_HS):
  """Returns what a block of keys adds to the gradient of a tile's queries."""
  return product('...hs,...sr->...hr', key_HS, dscores_SR.astype(key_HS.dtype))


def key_gradients(tile, weights_SR, dscores_SR):
  """Returns what a tile adds to the gradients of a block's keys and values."""
  query_HR, dout_HR = tile[:2]
  return tuple(
    product('...sr,...hr->...sh', x_SR.astype(y_HR.dtype), y_HR)
    for x_SR, y_HR in [(dscores_SR, query_HR), (weights_SR, dout_HR)]
  )


# Layout.


def pad_slots(x, multiple, mode='constant'):
  """Pads axis 1 to a multiple."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, -x.shape[1] % multiple)
  return jnp.pad(x, widths, mode=mode)


def tiles(x_BTNH, kv_heads, block_q):
  """Returns [B, I, K, H, R]; padding queries are zeros."""
  x_BTNH = pad_slots(x_BTNH, block_q)
  B, T, N, H = x_BTNH.shape
  I, K, G = T // block_q, kv_heads, N // kv_heads
  x_BIqKGH = x_BTNH.reshape(B, I, block_q, K, G, H)
  x_BIKHGq = x_BIqKGH.transpose(0, 1, 3, 5, 4, 2)
  return x_BIKHGq.reshape(B, I, K, H, G * block_q)


def untiled(x_BIKHR, queries, block_q):
  """Returns [B, T, N, H] for T `queries`: `tiles` reversed."""
  B, I, K, H, R = x_BIKHR.shape
  G = R // block_q
  x_BIKHGq = x_BIKHR.reshape(B, I, K, H, G, block_q)
  x_BIqKGH = x_BIKHGq.transpose(0, 1, 5, 2, 4, 3)
  return x_BIqKGH.reshape(B, I * block_q, K * G, H)[:, :queries]


def bounds(x_BT, group, block_q):
  """Returns lo or hi of the queries of each tile, [B, I, R].

  Padding queries see what the last query sees: nothing more is computed, and
  no interval is empty.
  """
  x_BT = pad_slots(x_BT, block_q, mode='edge')
  x_BIq = x_BT.reshape(x_BT.shape[0], -1, block_q)
  return jnp.tile(x_BIq, (1, 1, group))


def key_ranges(lo_BIR, hi_BIR, block_k):
  """Returns the first key block that a tile sees and how many, int32 [B, I]."""
  first_BI = lo_BIR.min(-1) // block_k
  return first_BI, -(-hi_BIR.max(-1) // block_k) - first_BI


# The XLA form.


def _arranged(tiled, keyed, lo_BT, hi_BT, *, group, block_q, block_k):
  """Returns what one row after the other works on, leading axis rows.

  Args:
    tiled: [B, I, K, H, R] or [B, I, K, 1, R] arrays.
    keyed: [B, S, K, H] arrays.
    lo_BT, hi_BT: the intervals.
    group: G.
    block_q: queries of a tile.
    block_k: keys of a block; None takes all keys at once and all rows side by
      side as one row of B * K heads, with nothing skipped.

  Returns:
    Tiles with lo and hi added, keys as [B, K, S, H], first blocks and counts.
  """
  lo_BIR, hi_BIR = (bounds(x, group, block_q) for x in (lo_BT, hi_BT))
  tiled = [*tiled, lo_BIR[:, :, None, None], hi_BIR[:, :, None, None]]
  if block_k is None:
    B, I, K = tiled[0].shape[:3]
    heads = [jnp.broadcast_to(x, (B, I, K, *x.shape[3:])) for x in tiled]
    heads = [jnp.swapaxes(x, 0, 1) for x in heads]
    tiled = [x.reshape(1, I, B * K, *x.shape[3:]) for x in heads]
    keyed = [x.transpose(0, 2, 1, 3) for x in keyed]
    keyed = [x.reshape(1, B * K, *x.shape[2:]) for x in keyed]
    first_BI = jnp.zeros((1, I), jnp.int32)
    return tiled, keyed, first_BI, first_BI + 1
  keyed = [pad_slots(x, block_k).transpose(0, 2, 1, 3) for x in keyed]
  return tiled, keyed, *key_ranges(lo_BIR, hi_BIR, block_k)


def _slots(x, j, block_k, axis=-2):
  """Returns block j of the keys' slots."""
  return jax.lax.dynamic_slice_in_dim(x, j * block_k, block_k, x.ndim + axis)


def forward(
  query_BTNH,
  key_BSKH,
  value_BSKH,
  lo_BT,
  hi_BT,
  *,
  scale,
  cap,
  block_q,
  block_k,
):
  """Returns the output [B, T, N, H] and float32 log-normalizers [B, T, N, 1].

  See `_arranged` for the blocks, `attention.interval_attention` for the rest.
  """
  B, T, N = query_BTNH.shape[:3]
  K = key_BSKH.shape[2]
  arranged = _arranged(
    [tiles(query_BTNH, K, block_q)],
    [key_BSKH, value_BSKH],
    lo_BT,
    hi_BT,
    group=N // K,
    block_q=block_q,
    block_k=block_k,
  )
  size = block_k or key_BSKH.shape[1]

  def row(arranged):
    tiled, (key_KSH, value_KSH), first_I, count_I = arranged
    value_KHS = jnp.swapaxes(value_KSH, -1, -2)

    def tile(arranged):
      (query_KHR, lo_K1R, hi_K1R), first, count = arranged

      def block(j, carry):
        _, scores_KSR = scores(
          query_KHR,
          _slots(key_KSH, j, size),
          lo_K1R,
          hi_K1R,
          j * size,
          scale=scale,
          cap=cap,
        )
        return accumulate(carry, scores_KSR, _slots(value_KHS, j, size, -1))

      top, total, out_KHR = jax.lax.fori_loop(
        first, first + count, block, nothing_yet(query_KHR.shape)
      )
      return (out_KHR / total).astype(value_BSKH.dtype), top + jnp.log(total)

    return jax.lax.map(tile, (tiled, first_I, count_I))

  out, lse = jax.lax.map(row, arranged)
  if block_k is None:
    out, lse = (
      jnp.swapaxes(x.reshape(-1, B, K, *x.shape[3:]), 0, 1) for x in (out, lse)
    )
  return untiled(out, T, block_q), untiled(lse, T, block_q)


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
  block_q,
  block_k,
):
  """Returns the gradients of query, key and value.

  `lse_BTN1` is from `forward`, `delta_BTN1` the sum over H of output times
  its gradient.
  """
  B, T, N = query_BTNH.shape[:3]
  S, K = key_BSKH.shape[1:3]
  arranged = _arranged(
    [
      tiles(x, K, block_q)
      for x in (query_BTNH, dout_BTNH, lse_BTN1, delta_BTN1)
    ],
    [key_BSKH, value_BSKH],
    lo_BT,
    hi_BT,
    group=N // K,
    block_q=block_q,
    block_k=block_k,
  )
  size = block_k or S

  def row(arranged):
    tiled, (key_KSH, value_KSH), first_I, count_I = arranged
    key_KHS = jnp.swapaxes(key_KSH, -1, -2)

    def tile(dkeys, arranged):
      of_tile, first, count = arranged

      def block(j, carry):
        dquery_KHR, dkey_KSH, dvalue_KSH = carry
        weights_KSR, dscores_KSR = score_gradients(
          of_tile,
          _slots(key_KSH, j, size),
          _slots(value_KSH, j, size),
          j * size,
          scale=scale,
          cap=cap,
        )
        dkey, dvalue = key_gradients(of_tile, weights_KSR, dscores_KSR)
        key_block_KHS = _slots(key_KHS, j, size, -1)
        return (
          dquery_KHR + query_gradient(dscores_KSR, key_block_KHS),
          _add_slots(dkey_KSH, dkey, j, size),
          _add_slots(dvalue_KSH, dvalue, j, size),
        )

      dquery_KHR = jnp.zeros(of_tile[0].shape, jnp.float32)
      dquery_KHR, *dkeys = jax.lax.fori_loop(
        first, first + count, block, (dquery_KHR, *dkeys)
      )
      return tuple(dkeys), dquery_KHR.astype(query_BTNH.dtype)

    dkeys = (jnp.zeros(key_KSH.shape, jnp.float32),) * 2
    return jax.lax.scan(tile, dkeys, (tiled, first_I, count_I))

  dkeys, dquery = jax.lax.map(row, arranged)
  if block_k is None:
    dquery = dquery.reshape(-1, B, K, *dquery.shape[3:])
    dquery = jnp.swapaxes(dquery, 0, 1)
    dkeys = (x.reshape(B, K, *x.shape[2:]) for x in dkeys)
  dkey, dvalue = (x[:, :, :S].transpose(0, 2, 1, 3) for x in dkeys)
  return (
    untiled(dquery, T, block_q),
    dkey.astype(key_BSKH.dtype),
    dvalue.astype(value_BSKH.dtype),
  )


def _add_slots(x, addend, j, block_k):
  total = _slots(x, j, block_k) + addend
  return jax.lax.dynamic_update_slice_in_dim(x, total, j * block_k, x.ndim - 2)
