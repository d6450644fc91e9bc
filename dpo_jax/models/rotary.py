"""Rotary positions: angles that grow with the position, and their scalings.

Dimension key: B rows, T slots, N heads, H head dim.
"""

import jax.numpy as jnp

SCALINGS = {  # and the fields of a `TransformerConfig` that each needs
  'none': (),
  'linear': ('rope_factor',),
  'llama3': (
    'rope_factor',
    'rope_low_freq_factor',
    'rope_high_freq_factor',
    'rope_original_positions',
  ),
}


def frequencies(config, *, local):
  """Returns radians per position, float32 [half of what is rotated].

  `local` are those of windowed layers, which Gemma 3 does not scale.
  """
  cfg = config
  size = cfg.rotated
  own = local and cfg.local_rope_theta is not None
  theta = cfg.local_rope_theta if own else cfg.rope_theta
  frequencies = theta ** (-jnp.arange(0, size, 2) / size)
  if cfg.rope_scaling == 'none' or own:
    return frequencies
  slow = frequencies / cfg.rope_factor
  if cfg.rope_scaling == 'linear':
    return slow
  # Llama 3.1: what turns often within the original context stays, what turns
  # rarely is slowed down, and between the two it is interpolated.
  turns = cfg.rope_original_positions * frequencies / (2 * jnp.pi)
  low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
  kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1 - kept) * slow + kept * frequencies


def tables(positions_BT, frequencies):
  """Returns float32 (cos, sin), each [B, T, 1, frequencies]."""
  angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, cos, sin):
  """Rotary position embedding, half-split form (arXiv:2104.09864).

  The dimensions of a head that the tables do not cover stay as they are.
  """
  size = cos.shape[-1]
  x = x_BTNH.astype(jnp.float32)
  first, second = x[..., :size], x[..., size : 2 * size]
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*rotated, x[..., 2 * size :]], axis=-1).astype(
    x_BTNH.dtype
  )
