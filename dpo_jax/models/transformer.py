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
  layers/attention/{q,k}_norm/scale [L,H]               (qk_norm)
  layers/norm2/...            layers/mlp/{gate,up} [L,D,F], down [L,F,D]
  layers/mlp/{up,down}_bias   (mlp_bias)
  layers/post_norm1, post_norm2/...                     (post_norms)
  final_norm/scale [D]        unembed [V,D]             (not tied)
A second variable collection may hold adapters: see `models/lora`; a third one
weights with their outputs first, for decoding on a CPU: see `models/decoding`.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpo_jax import attention
from dpo_jax.models import rotary

NORMS = ('rms', 'layer')
POSITIONS = ('rotary', 'learned')
_gelu_tanh = functools.partial(nn.gelu, approximate=True)
_gelu_exact = functools.partial(nn.gelu, approximate=False)
# The activation of the gate, or of the only matrix up.
GATED_MLPS = {'swiglu': nn.silu, 'geglu': _gelu_tanh}
PLAIN_MLPS = {'gelu': _gelu_tanh, 'gelu_exact': _gelu_exact}
MLPS = (*GATED_MLPS, *PLAIN_MLPS)
DTYPES = ('float32', 'bfloat16', 'float16')
# What the backward pass recomputes, and need not be kept: nothing; all but
# products of matrices (norms, activations, attention); whole layers.
REMATS = {
  'none': None,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and variants; every field is needed by at least one family.

  What is None or False by default is left out where a family has no such part.
  """

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
  # With a gate 'swiglu' (Llama), 'geglu' (Gemma); without one the tanh form
  # 'gelu' (GPT-2) and 'gelu_exact' (Pythia).
  mlp: str
  attention_bias: bool  # of q, k, v and, with out_bias, out
  mlp_bias: bool
  tied: bool  # the unembedding is the token embedding
  out_bias: bool = True  # False: attention_bias leaves out out (Qwen 2)
  norm_offset: bool = False  # norm scales are stored less 1 (Gemma)
  qk_norm: bool = False  # norms of queries and keys (Qwen 3, Gemma 3)
  post_norms: bool = False  # norms after attention and mlp too (Gemma 2, 3)
  parallel: bool = False  # attention and mlp read the same (Pythia)
  embed_scale: bool = False  # embeddings times sqrt(d_model) (Gemma)
  rotary_fraction: float = 1.0  # of head_dim that is rotated (Pythia)
  rope_scaling: str = 'none'  # 'linear' (Gemma 3) or 'llama3' (Llama 3.1)
  rope_factor: float | None = None  # 'linear', 'llama3'
  rope_low_freq_factor: float | None = None  # 'llama3', as the next two
  rope_high_freq_factor: float | None = None
  rope_original_positions: int | None = None
  window: int | None = None  # of windowed layers: last keys seen (Mistral)
  windowed: tuple[bool, ...] = ()  # which layers are (Gemma 2, 3)
  local_rope_theta: float | None = None  # windowed layers, unscaled (Gemma 3)
  query_scalar: float | None = None  # for head_dim in scores (Gemma 2, 3)
  attention_cap: float | None = None  # soft cap of scores (Gemma 2)
  logit_cap: float | None = None  # soft cap of logits, see `logps` (Gemma 2)
  dtype: str = 'float32'  # of the computation; parameters stay float32
  remat: str = 'none'  # what the backward pass recomputes, see REMATS
  scan_unroll: int = 1  # layers per iteration of the layer loop
  gather_share: float = 0.25  # see `evaluators.how_to_sample`

  def __post_init__(self):
    for name, legal in [
      ('norm', NORMS),
      ('positions', POSITIONS),
      ('mlp', MLPS),
      ('remat', tuple(REMATS)),
      ('rope_scaling', tuple(rotary.SCALINGS)),
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
    if not 0 <= self.gather_share <= 1:
      raise ValueError(
        f'gather_share is {self.gather_share}; use a number from 0 to 1'
      )
    if (self.window is None) == any(self.windowed) or len(
      self.windowed
    ) not in (0, self.num_layers):
      raise ValueError(
        f'window is {self.window} and windowed {self.windowed}; a window needs'
        f' a bool for each of the {self.num_layers} layers and one that is True'
      )
    if self.local_rope_theta is not None and self.window is None:
      raise ValueError(
        'local_rope_theta is that of windowed layers; set window'
      )
    if self.positions == 'rotary' and self.rotated % 2:
      raise ValueError(
        f'{self.rotated} of head_dim {self.head_dim} would be rotated; rotary'
        ' needs an even number'
      )
    scaled = [
      f for f in rotary.SCALINGS['llama3'] if getattr(self, f) is not None
    ]
    if set(scaled) != set(rotary.SCALINGS[self.rope_scaling]):
      raise ValueError(
        f'rope_scaling {self.rope_scaling!r} needs'
        f' {", ".join(rotary.SCALINGS[self.rope_scaling]) or "no numbers"}, got'
        f' {", ".join(scaled) or "none"}'
      )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads {self.num_heads} is not a multiple of num_kv_heads'
        f' {self.num_kv_heads}'
      )

  @property
  def rotated(self):
    """Dimensions of a head that rotary positions turn."""
    return int(self.head_dim * self.rotary_fraction)


def _declare(init, module, name, shape, axes):
  """Declares a float32 parameter once: shape, logical axes, initializer."""
  init = nn.with_logical_partitioning(init, axes)
  return module.param(name, init, shape).astype(module.config.dtype)


_weight = functools.partial(_declare, nn.initializers.normal(0.02))
_bias = functools.partial(_declare, nn.initializers.zeros)


def _linear(module, name, x, ins, outs):
  """x [..., *ins] times the weight [*ins, *outs], plus its adapter's product.

  `ins` and `outs` map logical axes to sizes. The adapter, where the module was
  given one, is a pair of `models/lora`. Where it was given the weight as
  [*outs, *ins] in the collection 'turned', that stands on the left of the
  product: `models/decoding` says why.
  """
  if module.has_variable('turned', name):
    last = [list(range(-len(ins), 0))] * 2
    y = jnp.tensordot(module.get_variable('turned', name), x, last)
    y = jnp.moveaxis(y, range(len(outs)), range(-len(outs), 0))
  else:
    shape, axes = (*ins.values(), *outs.values()), (*ins, *outs)
    y = jnp.tensordot(x, _weight(module, name, shape, axes), len(ins))
  if module.has_variable('lora', name):
    pair = module.get_variable('lora', name)
    a, b = (pair[part].astype(module.config.dtype) for part in 'ab')
    y += jnp.tensordot(jnp.tensordot(x, a, len(ins)), b, 1)
  return y


class Norm(nn.Module):
  """RMS norm or layer norm of the last dimension, computed in float32."""

  config: TransformerConfig
  axis: str = 'embed'  # logical name of that dimension

  @nn.compact
  def __call__(self, x):
    cfg, shape = self.config, x.shape[-1:]
    x = x.astype(jnp.float32)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
    ones = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    if cfg.norm_offset:
      scale = 1.0 + self.param('scale', zeros, shape)
    else:
      scale = self.param('scale', ones, shape)
    if cfg.norm == 'rms':
      x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + cfg.norm_eps)
      return (x * scale).astype(cfg.dtype)
    bias = self.param('bias', zeros, shape)
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
      y = _linear(self, name, x_BTD, {'embed': D}, {axis: heads, 'head_dim': H})
      if cfg.attention_bias:
        y += _bias(self, f'{name}_bias', (heads, H), (axis, 'head_dim'))
      return y

    query_BTNH = project('q', N, 'heads')
    key_BTKH = project('k', K, 'kv_heads')
    value_BTKH = project('v', K, 'kv_heads')
    if cfg.qk_norm:
      query_BTNH = Norm(cfg, 'head_dim', name='q_norm')(query_BTNH)
      key_BTKH = Norm(cfg, 'head_dim', name='k_norm')(key_BTKH)
    if rope is not None:
      query_BTNH = rotary.rotate(query_BTNH, *rope)
      key_BTKH = rotary.rotate(key_BTKH, *rope)
    if cache is None:
      keys, values = key_BTKH, value_BTKH
    else:
      cache, (key_BKHS, value_BKSH) = _write(
        cache,
        {
          'key': jnp.moveaxis(key_BTKH, 1, -1),
          'value': jnp.swapaxes(value_BTKH, 1, 2),
        },
        layer,
        {'key': (0, 0, 0, cache_index), 'value': (0, 0, cache_index, 0)},
      )
      keys = jnp.moveaxis(key_BKHS, -1, 1)
      values = jnp.swapaxes(value_BKSH, 1, 2)
    scalar = cfg.head_dim if cfg.query_scalar is None else cfg.query_scalar
    out_BTNH = attention.interval_attention(
      query_BTNH,
      keys,
      values,
      lo_BT,
      hi_BT,
      scale=scalar**-0.5,
      cap=cfg.attention_cap,
    )
    out_BTD = _linear(
      self, 'out', out_BTNH, {'heads': N, 'head_dim': H}, {'embed': D}
    )
    if cfg.attention_bias and cfg.out_bias:
      out_BTD += _bias(self, 'out_bias', (D,), ('embed',))
    return out_BTD, cache


def _write(cache, slots, layer, starts):
  """Returns a cache with new slots, and the keys and values of the layer.

  With layer None the cache is that layer's own, without the axis of layers.
  Such an axis of one would make XLA copy the cache to read what was written.
  """
  write = jax.lax.dynamic_update_slice
  if layer is None:
    cache = {
      name: write(cache[name], slots[name], starts[name]) for name in cache
    }
    return cache, (cache['key'], cache['value'])
  cache = {
    name: write(cache[name], slots[name][None], (layer, *starts[name]))
    for name in cache
  }
  return cache, (cache['key'][layer], cache['value'][layer])


class Mlp(nn.Module):
  """SwiGLU or GEGLU (arXiv:2002.05202), or two layers with a GELU."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x_BTD):
    cfg = self.config
    D, F = cfg.d_model, cfg.d_ff
    up_BTF = _linear(self, 'up', x_BTD, {'embed': D}, {'mlp': F})
    if cfg.mlp_bias:
      up_BTF += _bias(self, 'up_bias', (F,), ('mlp',))
    if cfg.mlp in GATED_MLPS:
      gate_BTF = _linear(self, 'gate', x_BTD, {'embed': D}, {'mlp': F})
      hidden_BTF = GATED_MLPS[cfg.mlp](gate_BTF) * up_BTF
    else:
      hidden_BTF = PLAIN_MLPS[cfg.mlp](up_BTF)
    out_BTD = _linear(self, 'down', hidden_BTF, {'mlp': F}, {'embed': D})
    if cfg.mlp_bias:
      out_BTD += _bias(self, 'down_bias', (D,), ('embed',))
    return out_BTD


class Block(nn.Module):
  """One pre-norm layer, of any kind: `layer` is its number and whether it has
  a window, and of `los` and `ropes` the second is that of windowed layers.

  The cache of all layers is carried, not scanned in and out: a layer then
  writes its new slots in place instead of copying its whole cache.
  """

  config: TransformerConfig

  @nn.compact
  def __call__(self, carry, layer, ropes, los, hi_BT, cache_index):
    cfg = self.config
    x_BTD, cache = carry
    number, windowed = layer

    def of_this_kind(pair):
      if cfg.window is None:
        return pair[0]
      return jax.tree.map(lambda a, b: jnp.where(windowed, b, a), *pair)

    y_BTD, cache = Attention(cfg, name='attention')(
      Norm(cfg, name='norm1')(x_BTD),
      number,
      of_this_kind(ropes),
      of_this_kind(los),
      hi_BT,
      cache,
      cache_index,
    )
    if cfg.post_norms:
      y_BTD = Norm(cfg, name='post_norm1')(y_BTD)
    read_BTD = x_BTD if cfg.parallel else x_BTD + y_BTD
    x_BTD += y_BTD
    y_BTD = Mlp(cfg, name='mlp')(Norm(cfg, name='norm2')(read_BTD))
    if cfg.post_norms:
      y_BTD = Norm(cfg, name='post_norm2')(y_BTD)
    x_BTD += y_BTD
    x_BTD = nn.with_logical_constraint(x_BTD, ('rows', 'time', 'embed'))
    return (x_BTD, cache), None


class Embed(nn.Module):
  """Token embedding, scaled in Gemma, plus the position table of GPT-2."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, tokens_BT, positions_BT):
    cfg = self.config
    V, D, P = cfg.vocab_size, cfg.d_model, cfg.max_positions
    x_BTD = _weight(self, 'tokens', (V, D), ('vocab', 'embed'))[tokens_BT]
    if cfg.embed_scale:
      x_BTD *= jnp.asarray(D**0.5, cfg.dtype)
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
    x_BTD = nn.with_logical_constraint(x_BTD, ('rows', 'time', 'embed'))
    windowed, ropes, los = by_kind(cfg, positions_BT, lo_BT, cache_index)
    block = Block
    if cfg.remat != 'none':
      block = nn.remat(Block, prevent_cse=False, policy=REMATS[cfg.remat])
    layers = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
      length=cfg.num_layers,
      unroll=cfg.scan_unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(cfg, name='layers')
    (x_BTD, new_cache), _ = layers(
      (x_BTD, cache),
      (jnp.arange(cfg.num_layers), windowed),
      ropes,
      los,
      hi_BT,
      cache_index,
    )
    hidden_BTD = Norm(cfg, name='final_norm')(x_BTD)
    if not cfg.tied:  # declared here, used by `unembedding`
      shape = (cfg.vocab_size, cfg.d_model)
      _weight(self, 'unembed', shape, ('vocab', 'embed'))
    return hidden_BTD if cache is None else (hidden_BTD, new_cache)


def by_kind(config, positions_BT, lo_BT, cache_index):
  """Returns which layers have a window, and what the two kinds are given.

  That is a bool a layer, or None where none has one; the tables of rotation,
  and the first slots seen, of layers without a window and of those with one.
  """
  ropes, los = (None, None), (lo_BT, lo_BT)
  if config.positions == 'rotary':
    ropes = [
      rotary.tables(positions_BT, rotary.frequencies(config, local=local))
      for local in (False, True)
    ]
  if config.window is None:
    return None, ropes, los
  slot_T = jnp.arange(positions_BT.shape[1]) + (
    0 if cache_index is None else cache_index
  )
  los = (lo_BT, jnp.maximum(lo_BT, slot_T - config.window + 1))
  return jnp.array(config.windowed), ropes, los


def unembedding(params):
  """Returns the matrix [V, D] that turns hidden states into logits."""
  return params['unembed'] if 'unembed' in params else params['embed']['tokens']


def init_cache(config, *, rows, slots):
  """Returns an empty cache: keys [L, rows, K, H, slots], values with H last.

  So laid out, the products of one query a row read it as it is.
  """
  shape = (config.num_layers, rows, config.num_kv_heads)
  return {
    'key': jnp.zeros((*shape, config.head_dim, slots), config.dtype),
    'value': jnp.zeros((*shape, slots, config.head_dim), config.dtype),
  }


def init_params(config, key):
  """Returns random float32 parameters boxed with their logical axes."""
  slot = jnp.zeros((1, 1), jnp.int32)
  return Transformer(config).init(key, slot, slot, slot, slot + 1)['params']


def cast(variables, dtype):
  """Casts once what the model casts at every use; nothing it computes changes.

  Norms, wherever they are, are computed in float32.
  """

  def one(path, x):
    in_norm = any('norm' in key.key for key in path)
    return x if in_norm else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, variables)
