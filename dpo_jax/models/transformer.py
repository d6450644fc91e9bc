"""One decoder for every family; a family is a `TransformerConfig`.

The model never hears of prompts, pairs or masks. It takes `tokens`,
`positions` and the attention interval `lo`, `hi` of every slot and returns
hidden states; `logps` turns those into log-probabilities, so the vocabulary
is only ever met at scored positions.

Dimension key: B rows, T slots, S cache slots, D model, N query heads, K
key/value heads, H head dim, F mlp, L layers, V vocabulary.

Parameters (nested dict, layers stacked on a leading L axis):
  embed/tokens [V,D]          embed/positions [P,D]     (learned positions)
  layers/norm1/scale [L,D]    layers/norm1/bias         (layer norm)
  layers/attention/q [L,D,N,H], k, v [L,D,K,H], out [L,N,H,D]
  layers/attention/{q,k,v,out}_bias                     (attention_bias)
  layers/norm2/...            layers/mlp/{gate,up} [L,D,F], down [L,F,D]
  layers/mlp/{up,down}_bias   (mlp_bias)
  final_norm/scale [D]        unembed [V,D]             (not tied)
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax import attention

NORMS = ('rms', 'layer')
POSITIONS = ('rotary', 'learned')
MLPS = ('swiglu', 'gelu')
DTYPES = ('float32', 'bfloat16', 'float16')
REMATS = ('none', 'attention', 'full')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and variants; every field is needed by at least one family."""

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  norm: str  # 'rms' (Llama) or 'layer' (GPT-2)
  norm_eps: float
  positions: str  # 'rotary' (Llama) or 'learned' (GPT-2)
  max_positions: int  # rows of the learned table; rotary: trained length
  rope_theta: float  # rotary only
  mlp: str  # 'swiglu' (Llama) or 'gelu' (tanh form, GPT-2)
  attention_bias: bool
  mlp_bias: bool
  tied: bool  # the unembedding is the token embedding
  dtype: str = 'float32'  # of the computation; parameters stay float32
  remat: str = 'none'  # what the backward pass recomputes
  scan_unroll: int = 1  # layers per iteration of the layer loop

  def __post_init__(self):
    for name, legal in [
      ('norm', NORMS),
      ('positions', POSITIONS),
      ('mlp', MLPS),
      ('remat', REMATS),
    ]:
      if getattr(self, name) not in legal:
        raise ValueError(
          f'model.{name} is {getattr(self, name)!r}; use one of {legal}'
        )
    if self.dtype not in DTYPES:
      raise ValueError(
        f'model.dtype is {self.dtype!r}; use one of {DTYPES}, or auto'
      )
    if self.scan_unroll < 1:
      raise ValueError(f'scan_unroll is {self.scan_unroll}; use 1 or more')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads {self.num_heads} is not a multiple of num_kv_heads'
        f' {self.num_kv_heads}'
      )


def _declare(init, module, name, shape, axes):
  """Declares a float32 parameter once: shape, logical axes, initializer."""
  init = nn.with_logical_partitioning(init, axes)
  return module.param(name, init, shape).astype(module.config.dtype)


_weight = functools.partial(_declare, nn.initializers.normal(0.02))
_bias = functools.partial(_declare, nn.initializers.zeros)


def rotary_tables(positions_BT, *, head_dim, theta):
  """Returns float32 (cos, sin), each [B, T, 1, head_dim / 2]."""
  frequencies = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, cos, sin):
  """Rotary position embedding, half-split form (arXiv:2104.09864)."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNH.dtype)


class Norm(nn.Module):
  """RMS norm or layer norm, computed in float32."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BTD):
    cfg = self.config
    x = x_BTD.astype(jnp.float32)
    ones = nn.with_logical_partitioning(nn.initializers.ones, ('embed',))
    scale = self.param('scale', ones, (cfg.d_model,))
    if cfg.norm == 'rms':
      x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + cfg.norm_eps)
      return (x * scale).astype(cfg.dtype)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
    bias = self.param('bias', zeros, (cfg.d_model,))
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + cfg.norm_eps)
    return (x * scale + bias).astype(cfg.dtype)


class Attention(nn.Module):
  """Multi-head attention with grouped keys, over the row or over a cache."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BTD, layer, rope, lo_BT, hi_BT, cache, cache_index):
    cfg = self.config
    D, H = cfg.d_model, cfg.head_dim
    N, K = cfg.num_heads, cfg.num_kv_heads

    def project(name, heads, axis):
      w = _weight(self, name, (D, heads, H), ('embed', axis, 'head_dim'))
      y = jnp.einsum('BTD,DNH->BTNH', x_BTD, w)
      if cfg.attention_bias:
        y += _bias(self, f'{name}_bias', (heads, H), (axis, 'head_dim'))
      return y

    query_BTNH = project('q', N, 'heads')
    key_BTKH = project('k', K, 'kv_heads')
    value_BTKH = project('v', K, 'kv_heads')
    if rope is not None:
      query_BTNH = rotate(query_BTNH, *rope)
      key_BTKH = rotate(key_BTKH, *rope)
    if cache is None:
      keys, values = key_BTKH, value_BTKH
    else:
      start = (layer, 0, cache_index, 0, 0)
      insert = jax.lax.dynamic_update_slice
      cache = {
        'key': insert(cache['key'], key_BTKH[None], start),
        'value': insert(cache['value'], value_BTKH[None], start),
      }
      keys, values = cache['key'][layer], cache['value'][layer]
    attend = attention.interval_attention
    if cfg.remat == 'attention':
      attend = jax.checkpoint(attend, prevent_cse=False)
    out_BTNH = attend(query_BTNH, keys, values, lo_BT, hi_BT)
    w = _weight(self, 'out', (N, H, D), ('heads', 'head_dim', 'embed'))
    out_BTD = jnp.einsum('BTNH,NHD->BTD', out_BTNH, w)
    if cfg.attention_bias:
      out_BTD += _bias(self, 'out_bias', (D,), ('embed',))
    return out_BTD, cache


class Mlp(nn.Module):
  """SwiGLU (arXiv:2002.05202) or GPT-2's two-layer tanh-GELU."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BTD):
    cfg = self.config
    D, F = cfg.d_model, cfg.d_ff
    up_BTF = x_BTD @ _weight(self, 'up', (D, F), ('embed', 'mlp'))
    if cfg.mlp_bias:
      up_BTF += _bias(self, 'up_bias', (F,), ('mlp',))
    if cfg.mlp == 'swiglu':
      gate_BTF = x_BTD @ _weight(self, 'gate', (D, F), ('embed', 'mlp'))
      hidden_BTF = nn.silu(gate_BTF) * up_BTF
    else:
      hidden_BTF = nn.gelu(up_BTF, approximate=True)
    out_BTD = hidden_BTF @ _weight(self, 'down', (F, D), ('mlp', 'embed'))
    if cfg.mlp_bias:
      out_BTD += _bias(self, 'down_bias', (D,), ('embed',))
    return out_BTD


class Block(nn.Module):
  """One pre-norm layer.

  The cache of all layers is carried, not scanned in and out: a layer then
  writes its new slots in place instead of copying its whole cache.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, carry, layer, rope, lo_BT, hi_BT, cache_index):
    cfg = self.config
    x_BTD, cache = carry
    y_BTD, cache = Attention(cfg, name='attention')(
      Norm(cfg, name='norm1')(x_BTD),
      layer,
      rope,
      lo_BT,
      hi_BT,
      cache,
      cache_index,
    )
    x_BTD += y_BTD
    x_BTD += Mlp(cfg, name='mlp')(Norm(cfg, name='norm2')(x_BTD))
    x_BTD = nn.with_logical_constraint(x_BTD, ('rows', 'time', 'embed'))
    return (x_BTD, cache), None


class Embed(nn.Module):
  """Token embedding, plus the position table of GPT-2."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens_BT, positions_BT):
    cfg = self.config
    V, D, P = cfg.vocab_size, cfg.d_model, cfg.max_positions
    x_BTD = _weight(self, 'tokens', (V, D), ('vocab', 'embed'))[tokens_BT]
    if cfg.positions == 'learned':
      table_PD = _weight(self, 'positions', (P, D), ('position', 'embed'))
      x_BTD += table_PD[positions_BT]
    return x_BTD


class Transformer(nn.Module):
  """Decoder from tokens to hidden states."""

  config: TransformerConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT,
    positions_BT,
    lo_BT,
    hi_BT,
    *,
    cache=None,
    cache_index=None,
  ):
    """Returns hidden states [B, T, D] after the final norm.

    With a `cache` (see `init_cache`) the T new slots are written at slot
    `cache_index`, `lo` and `hi` count cache slots, and the result is
    `(hidden, cache)`.
    """
    cfg = self.config
    x_BTD = Embed(cfg, name='embed')(tokens_BT, positions_BT)
    rope = None
    if cfg.positions == 'rotary':
      rope = rotary_tables(
        positions_BT, head_dim=cfg.head_dim, theta=cfg.rope_theta
      )
    block = Block
    if cfg.remat == 'full':
      block = nn.remat(Block, prevent_cse=False)
    layers = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      length=cfg.num_layers,
      unroll=cfg.scan_unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(cfg, name='layers')
    (x_BTD, new_cache), _ = layers(
      (x_BTD, cache),
      jnp.arange(cfg.num_layers),
      rope,
      lo_BT,
      hi_BT,
      cache_index,
    )
    hidden_BTD = Norm(cfg, name='final_norm')(x_BTD)
    if not cfg.tied:  # declared here, used by `unembedding`
      shape = (cfg.vocab_size, cfg.d_model)
      _weight(self, 'unembed', shape, ('vocab', 'embed'))
    return hidden_BTD if cache is None else (hidden_BTD, new_cache)


def unembedding(params):
  """Returns the matrix [V, D] that turns hidden states into logits."""
  return params['unembed'] if 'unembed' in params else params['embed']['tokens']


def init_cache(config, *, rows, slots):
  """Returns an empty key/value cache of [L, rows, slots, K, H] arrays."""
  shape = (
    config.num_layers,
    rows,
    slots,
    config.num_kv_heads,
    config.head_dim,
  )
  return {
    'key': jnp.zeros(shape, config.dtype),
    'value': jnp.zeros(shape, config.dtype),
  }


def init_params(config, key):
  """Returns random float32 parameters boxed with their logical axes."""
  slot = jnp.zeros((1, 1), jnp.int32)
  return Transformer(config).init(key, slot, slot, slot, slot + 1)['params']
