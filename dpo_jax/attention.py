"""Interval attention: the one attention primitive of the project.

Every query attends to one contiguous interval of keys, `lo <= key < hi`.
Causal, packed, prefix-shared rows (README, "Rows") and cached decoding are all
special cases, so nothing above this file knows about masks.

There are three forms, of the same values: `dense` for few slots, XLA loops
over blocks (`attention_blocks`), and Pallas kernels for TPU (`attention_tpu`).
Both of the latter skip blocks outside the intervals, and differentiate by
recomputing scores from log-normalizers: rematerializing them again buys little.

Dimension key: B rows, T query slots, S key slots, N query heads, K key/value
heads, G = N / K, H head dim.
"""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import attention_blocks
from dpo_jax import attention_tpu

soft_cap = attention_blocks.soft_cap

# With fewer queries or keys the dense form is as fast (experiments/LOG.md).
FEW_QUERIES, FEW_KEYS = 64, 128
# Blocks of the XLA form, measured on CPU (experiments/LOG.md).
CPU_BLOCKS = dict(block_q=64, block_k=64)
# A device that is slow to start small programs: all rows side by side, which
# skips nothing but never holds [T, S] either. Not measured.
WIDE_BLOCKS = dict(block_q=256, block_k=None)


def interval_attention(
  query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT, *, scale, cap
):
  """Attends from every query to the keys `lo <= s < hi`.

  The softmax is float32 whatever the input dtype. An interval must not be
  empty: padding slots attend to themselves.

  On a mesh of several devices the rows and heads must be laid out by the
  logical axes `rows`, `heads` and `kv_heads`; each device does its own.

  Args:
    query_BTNH: queries; query heads are grouped by the key head they use.
    key_BSKH: keys; K divides N.
    value_BSKH: values.
    lo_BT: int32, first key a query may see.
    hi_BT: int32, one past the last key a query may see; lo < hi.
    scale: of the scores, mostly H ** -0.5.
    cap: soft cap of the scaled scores, or None.

  Returns:
    [B, T, N, H] in the dtype of `value_BSKH`.
  """
  args = query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT
  if query_BTNH.shape[1] < FEW_QUERIES or key_BSKH.shape[1] < FEW_KEYS:
    return dense(*args, scale=scale, cap=cap)
  attend = functools.partial(blocked, scale, cap)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return attend(*args)
  specs = _specs(mesh, args)
  if specs is None:
    return dense(*args, scale=scale, cap=cap)
  # Neither a kernel nor a loop over rows is partitioned by the compiler.
  return jax.shard_map(
    attend, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
  )(*args)


def _specs(mesh, args):
  """Returns the partition of each argument, or None where one is uneven."""
  axes = [
    ('rows', 'time', heads, 'head_dim')
    for heads in ('heads', 'kv_heads', 'kv_heads')
  ] + [('rows', 'time')] * 2
  specs = tuple(nn.logical_to_mesh_axes(names) for names in axes)
  for x, spec in zip(args, specs):
    for size, names in zip(x.shape, spec):
      names = (names,) if isinstance(names, str) else names or ()
      shards = int(np.prod([mesh.shape[name] for name in names]))
      if size % shards:
        _say_once(
          f'attention of {x.shape} is not evenly laid out as {spec} on'
          f' {dict(mesh.shape)}: the dense form runs'
        )
        return None
  return specs


@functools.cache
def _say_once(message):
  logging.getLogger(__name__).warning(message)


def dense(query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT, *, scale, cap):
  """The plain form, with all scores at once."""
  B, T, N, H = query_BTNH.shape
  S, K = key_BSKH.shape[1:3]
  query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = attention_blocks.product(
    'BTKGH,BSKH->BKGTS', query_BTKGH, key_BSKH
  )
  scores_BKGTS = soft_cap(scores_BKGTS * scale, cap)
  slot_S = jnp.arange(S)
  visible_BTS = (slot_S >= lo_BT[..., None]) & (slot_S < hi_BT[..., None])
  scores_BKGTS = jnp.where(
    visible_BTS[:, None, None], scores_BKGTS, attention_blocks.MASKED
  )
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(value_BSKH.dtype)
  out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS, value_BSKH)
  return out_BTKGH.reshape(B, T, N, H)


def _on_this_platform(name, args, *, scale, cap):
  """Calls `forward` or `backward` of the form of the platform compiled for."""

  def form(module, **blocks):
    return functools.partial(
      getattr(module, name), scale=scale, cap=cap, **blocks
    )

  forms = {
    'cpu': form(attention_blocks, **CPU_BLOCKS),
    'default': form(attention_blocks, **WIDE_BLOCKS),
  }
  if attention_tpu.fits(*args[:2]):
    forms['tpu'] = form(attention_tpu)
  if jax.default_backend() not in forms:
    _say_once(
      f'no fast attention on {jax.default_backend()} for queries'
      f' {args[0].shape} and keys {args[1].shape} of {args[0].dtype}: the XLA'
      ' form runs, which skips nothing'
    )
  return jax.lax.platform_dependent(*args, **forms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blocked(scale, cap, query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT):
  """The form of the platform that the program is compiled for."""
  args = query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT
  return _forward(scale, cap, *args)[0]


def _forward(scale, cap, *args):
  out_BTNH, lse_BTN1 = _on_this_platform('forward', args, scale=scale, cap=cap)
  return out_BTNH, (args, out_BTNH, lse_BTN1)


def _backward(scale, cap, saved, dout_BTNH):
  args, out_BTNH, lse_BTN1 = saved
  delta_BTN1 = jnp.sum(
    out_BTNH.astype(jnp.float32) * dout_BTNH, axis=-1, keepdims=True
  )
  gradients = _on_this_platform(
    'backward',
    (*args, lse_BTN1, delta_BTN1, dout_BTNH),
    scale=scale,
    cap=cap,
  )
  return *gradients, None, None


blocked.defvjp(_forward, _backward)
