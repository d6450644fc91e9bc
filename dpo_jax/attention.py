"""Interval attention: the one attention primitive of the project.

Every query attends to one contiguous interval of keys, `lo <= key < hi`.
Causal, packed, prefix-shared rows (README, "Rows") and cached decoding are all
special cases, so nothing above this file knows about masks.

Dimension key: B rows, T query slots, S key slots, N query heads, K key/value
heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp


def soft_cap(x, cap):
  """Squashes to (-cap, cap), smoothly (Gemma 2, arXiv:2408.00118); None: x."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def interval_attention(
  query_BTNH, key_BSKH, value_BSKH, lo_BT, hi_BT, *, scale, cap
):
  """Attends from every query to the keys `lo <= s < hi`.

  The softmax is float32 whatever the input dtype. An interval must not be
  empty: padding slots attend to themselves.

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
  B, T, N, H = query_BTNH.shape
  S, K = key_BSKH.shape[1:3]
  query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
  scores_BKGTS = (
    jnp.einsum(
      'BTKGH,BSKH->BKGTS',
      query_BTKGH,
      key_BSKH,
      preferred_element_type=jnp.float32,
    )
    * scale
  )
  scores_BKGTS = soft_cap(scores_BKGTS, cap)
  slot_S = jnp.arange(S)
  visible_BTS = (slot_S >= lo_BT[..., None]) & (slot_S < hi_BT[..., None])
  scores_BKGTS = jnp.where(
    visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min
  )
  weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(value_BSKH.dtype)
  out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS, value_BSKH)
  return out_BTKGH.reshape(B, T, N, H)
