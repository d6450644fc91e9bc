"""Interval attention: the one attention primitive of the project.

Every query attends to one contiguous interval of keys, `lo <= key < hi`.
Causal, packed, prefix-shared rows (README, "Rows") and cached decoding are all
special cases, so nothing above this file knows about masks.

There are four forms, of the same values: `dense` for few slots, `one_query` for
one query a row on a TPU, XLA loops over blocks (`attention_blocks`), and Pallas
kernels for TPU (`attention_tpu`). Both of the latter skip blocks outside the
intervals, and keep the output and one log-normalizer a query and head for the
backward pass.

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

# With fewer queries or keys the dense form is as fast (experiments/LOG.md); a
# step of cached decoding has one query.
FEW_SLOTS = 128
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
  mesh = jax.sharding.get_abstract_mesh()
  if query_BTNH.shape[1] == 1 and not _cuts_heads(mesh):
    return jax.lax.platform_dependent(
      *args,
      tpu=functools.partial(one_query, scale=scale, cap=cap),
      default=functools.partial(dense, scale=scale, cap=cap),
    )
  if min(query_BTNH.shape[1], key_BSKH.shape[1]) < FEW_SLOTS:
    return dense(*args, scale=scale, cap=cap)
  attend = blocked(
    functools.partial(
      _by_platform, attention_blocks.forward, attention_tpu.forward
    ),
    functools.partial(
      _by_platform, attention_blocks.backward, attention_tpu.backward
    ),
    scale=scale,
    cap=cap,
  )
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


def _cuts_heads(mesh):
  """Whether devices have some of the heads each."""
  (axis,) = nn.logical_to_mesh_axes(('kv_heads',)) or (None,)
  return not mesh.empty and mesh.shape.get(axis, 1) > 1


@functools.cache
def _say_once(message):
  logging.getLogger(__name__).warning(message)


def dense(query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT, *, scale, cap):
  """The plain form, with all scores at once."""
  B, T, N, H = query_BTNH.shape
  K = key_BSKH.shape[2]
  query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = attention_blocks.product(
    'BTKGH,BSKH->BKGTS', query_BTKGH, key_BSKH
  )
  weights_BKGTS = _weights(scores_BKGTS, lo_BT, hi_BT, scale=scale, cap=cap)
  out_BTKGH = jnp.einsum(
    'BKGTS,BSKH->BTKGH', weights_BKGTS.astype(value_BSKH.dtype), value_BSKH
  )
  return out_BTKGH.reshape(B, T, N, H)


def _weights(scores, lo_BT, hi_BT, *, scale, cap):
  """Returns the softmax of products [B, heads..., T, S] over the intervals."""
  scores = soft_cap(scores * scale, cap)
  slot_S = jnp.arange(scores.shape[-1])
  visible_BTS = (slot_S >= lo_BT[..., None]) & (slot_S < hi_BT[..., None])
  visible = jnp.expand_dims(visible_BTS, range(1, scores.ndim - 2))
  scores = jnp.where(visible, scores, attention_blocks.MASKED)
  return jax.nn.softmax(scores, axis=-1)


def one_query(query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT, *, scale, cap):
  """The plain form of T = 1 for a matrix unit, with all heads in one product.

  A product of one query a head is next to no work for it, and heads of 64 leave
  half of its lanes empty. So every query head has a column with zeros at the
  other key heads: K times the work, which is still less than reading the keys.
  """
  N, K = query_BTNH.shape[2], key_BSKH.shape[2]
  own_KN = jnp.repeat(jnp.eye(K, dtype=bool), N // K, axis=1)
  query_BKHN = jnp.where(
    own_KN[:, None], jnp.moveaxis(query_BTNH[:, 0], 1, -1)[:, None], 0
  )
  scores_BNS = attention_blocks.product('BKHN,BSKH->BNS', query_BKHN, key_BSKH)
  weights_BN1S = _weights(
    scores_BNS[:, :, None], lo_BT, hi_BT, scale=scale, cap=cap
  )
  out_BNKH = jnp.einsum(
    'BNS,BSKH->BNKH', weights_BN1S[:, :, 0].astype(value_BSKH.dtype), value_BSKH
  )
  own_NK1 = own_KN.T[..., None]
  return jnp.sum(jnp.where(own_NK1, out_BNKH, 0), axis=2)[:, None]


def _by_platform(blocks, kernel, *args, scale, cap):
  """Calls the form of the platform that the program is compiled for."""
  forms = {
    'cpu': functools.partial(blocks, **CPU_BLOCKS),
    'default': functools.partial(blocks, **WIDE_BLOCKS),
  }
  if attention_tpu.fits(*args[:2]):
    forms['tpu'] = kernel
  if jax.default_backend() not in forms:
    _say_once(
      f'no fast attention on {jax.default_backend()} for queries'
      f' {args[0].shape} and keys {args[1].shape} of {args[0].dtype}: an XLA'
      ' form runs, which skips nothing'
    )
  return jax.lax.platform_dependent(
    *args,
    **{
      platform: functools.partial(form, scale=scale, cap=cap)
      for platform, form in forms.items()
    },
  )


def blocked(forward, backward, **options):
  """Returns a function of (query, key, value, lo, hi) with gradients.

  Args:
    forward: as `attention_blocks.forward`.
    backward: as `attention_blocks.backward`, of the same form.
    **options: keywords of both, scale and cap among them.
  """
  forward = functools.partial(forward, **options)
  backward = functools.partial(backward, **options)

  @jax.custom_vjp
  def attend(*args):
    return forward(*args)[0]

  def attend_forward(*args):
    out_BTNH, lse_BTN1 = forward(*args)
    return out_BTNH, (args, out_BTNH, lse_BTN1)

  def attend_backward(saved, dout_BTNH):
    args, out_BTNH, lse_BTN1 = saved
    products = out_BTNH.astype(jnp.float32) * dout_BTNH
    delta_BTN1 = products.sum(-1, keepdims=True)
    # Intervals have no gradients.
    return *backward(*args, lse_BTN1, delta_BTN1, dout_BTNH), None, None

  attend.defvjp(attend_forward, attend_backward)
  return attend
