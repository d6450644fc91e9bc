"""Llama and those that differ from it in a few parts: Mistral, Qwen 2 and 3.

Gemma, in `gemma_families`, shares the key table.
"""

from dpo_jax.models import schemas
from dpo_jax.models import tables

KEYS = (
  tables.Key(
    'embed/tokens', 'model.embed_tokens.weight', 'VD->VD', 'token_embd.weight'
  ),
  tables.Key(
    'layers/norm1/scale',
    'model.layers.{}.input_layernorm.weight',
    'D->D',
    'blk.{}.attn_norm.weight',
  ),
  # Llama's GGUF rotates neighbouring rows where we rotate halves: row 2j + i
  # of a query or key head in a GGUF file is our row i * H / 2 + j.
  tables.Key(
    'layers/attention/q',
    'model.layers.{}.self_attn.q_proj.weight',
    '(NH)D->DNH',
    'blk.{}.attn_q.weight',
    '(NJI)D->DN(IJ)',
  ),
  tables.Key(
    'layers/attention/k',
    'model.layers.{}.self_attn.k_proj.weight',
    '(KH)D->DKH',
    'blk.{}.attn_k.weight',
    '(KJI)D->DK(IJ)',
  ),
  tables.Key(
    'layers/attention/v',
    'model.layers.{}.self_attn.v_proj.weight',
    '(KH)D->DKH',
    'blk.{}.attn_v.weight',
  ),
  tables.Key(
    'layers/attention/out',
    'model.layers.{}.self_attn.o_proj.weight',
    'D(NH)->NHD',
    'blk.{}.attn_output.weight',
  ),
  tables.Key(
    'layers/attention/q_bias',
    'model.layers.{}.self_attn.q_proj.bias',
    '(NH)->NH',
    'blk.{}.attn_q.bias',
    '(NJI)->N(IJ)',
    when=lambda config: config.attention_bias,
  ),
  tables.Key(
    'layers/attention/k_bias',
    'model.layers.{}.self_attn.k_proj.bias',
    '(KH)->KH',
    'blk.{}.attn_k.bias',
    '(KJI)->K(IJ)',
    when=lambda config: config.attention_bias,
  ),
  tables.Key(
    'layers/attention/v_bias',
    'model.layers.{}.self_attn.v_proj.bias',
    '(KH)->KH',
    'blk.{}.attn_v.bias',
    when=lambda config: config.attention_bias,
  ),
  tables.Key(
    'layers/attention/out_bias',
    'model.layers.{}.self_attn.o_proj.bias',
    'D->D',
    'blk.{}.attn_output.bias',
    when=lambda config: config.attention_bias and config.out_bias,
  ),
  tables.Key(
    'layers/attention/q_norm/scale',
    'model.layers.{}.self_attn.q_norm.weight',
    'H->H',
    'blk.{}.attn_q_norm.weight',
    when=lambda config: config.qk_norm,
  ),
  tables.Key(
    'layers/attention/k_norm/scale',
    'model.layers.{}.self_attn.k_norm.weight',
    'H->H',
    'blk.{}.attn_k_norm.weight',
    when=lambda config: config.qk_norm,
  ),
  # One name for two things: where there are post-norms it is the first of
  # them, elsewhere the norm before the mlp.
  tables.Key(
    'layers/norm2/scale',
    'model.layers.{}.post_attention_layernorm.weight',
    'D->D',
    'blk.{}.ffn_norm.weight',
    when=lambda config: not config.post_norms,
  ),
  tables.Key(
    'layers/post_norm1/scale',
    'model.layers.{}.post_attention_layernorm.weight',
    'D->D',
    when=lambda config: config.post_norms,
  ),
  tables.Key(
    'layers/norm2/scale',
    'model.layers.{}.pre_feedforward_layernorm.weight',
    'D->D',
    when=lambda config: config.post_norms,
  ),
  tables.Key(
    'layers/post_norm2/scale',
    'model.layers.{}.post_feedforward_layernorm.weight',
    'D->D',
    when=lambda config: config.post_norms,
  ),
  tables.Key(
    'layers/mlp/gate',
    'model.layers.{}.mlp.gate_proj.weight',
    'FD->DF',
    'blk.{}.ffn_gate.weight',
  ),
  tables.Key(
    'layers/mlp/up',
    'model.layers.{}.mlp.up_proj.weight',
    'FD->DF',
    'blk.{}.ffn_up.weight',
  ),
  tables.Key(
    'layers/mlp/down',
    'model.layers.{}.mlp.down_proj.weight',
    'DF->FD',
    'blk.{}.ffn_down.weight',
  ),
  tables.Key(
    'final_norm/scale', 'model.norm.weight', 'D->D', 'output_norm.weight'
  ),
  tables.Key(
    'unembed',
    'lm_head.weight',
    'VD->VD',
    'output.weight',
    when=tables.no_table,
  ),
)
HARMLESS_TENSORS = r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq'
FIELDS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'd_model',
  'num_hidden_layers': 'num_layers',
  'num_attention_heads': 'num_heads',
  'num_key_value_heads': 'num_kv_heads',
  'head_dim': 'head_dim',
  'intermediate_size': 'd_ff',
  'rms_norm_eps': 'norm_eps',
  'max_position_embeddings': 'max_positions',
  'tie_word_embeddings': 'tied',
}
FIXED = dict(norm='rms', positions='rotary', mlp='swiglu', mlp_bias=False)
_SILU = {'hidden_act': ('silu', 'swish')}


def _gguf(name: str) -> schemas.Schema:
  """The metadata of a GGUF file of this `general.architecture`."""
  fields = {
    'vocab_size': 'vocab_size',
    'embedding_length': 'd_model',
    'block_count': 'num_layers',
    'attention.head_count': 'num_heads',
    'attention.head_count_kv': 'num_kv_heads',
    'attention.key_length': 'head_dim',
    'attention.value_length': 'head_dim',
    'rope.dimension_count': 'head_dim',
    'feed_forward_length': 'd_ff',
    'attention.layer_norm_rms_epsilon': 'norm_eps',
    'context_length': 'max_positions',
    'rope.freq_base': 'rope_theta',
  }
  only = {
    'rope.scaling.type': ('none',),
    'expert_count': (0,),
    'expert_used_count': (0,),
    'use_parallel_residual': (False,),
  }
  return schemas.Schema(
    fields={f'{name}.{key}': field for key, field in fields.items()},
    only={f'{name}.{key}': values for key, values in only.items()}
    | {'split.count': (0, 1)},
    harmless=frozenset(['split.no', 'split.tensors.count']),
    absent=dict(rope_theta=10000.0),
  )


LLAMA = tables.Family(
  name='llama',
  architecture='LlamaForCausalLM',
  fixed=FIXED,
  hf=schemas.Schema(
    fields=FIELDS | schemas.ROPE_FIELDS | {'attention_bias': 'attention_bias'},
    words=schemas.ROPE_WORDS,
    only=schemas.HF_ONLY
    | schemas.ROPE_ONLY
    | schemas.NO_WINDOW
    | _SILU
    | {'mlp_bias': (False,)},
    harmless=schemas.HF_HARMLESS,
    # The values LlamaConfig had before it wrote them down.
    absent=dict(rope_theta=10000.0, attention_bias=False, tied=False),
  ),
  gguf=_gguf('llama'),
  gguf_interleaves=True,
  keys=KEYS,
  harmless_tensors=HARMLESS_TENSORS,
)

MISTRAL = tables.Family(
  name='mistral',
  architecture='MistralForCausalLM',
  fixed=FIXED | dict(attention_bias=False),
  hf=schemas.Schema(
    fields=FIELDS | schemas.ROPE_FIELDS,
    words=schemas.ROPE_WORDS,
    only=schemas.HF_ONLY | schemas.ROPE_ONLY | _SILU,
    harmless=schemas.HF_HARMLESS,
    absent=dict(rope_theta=10000.0, tied=False),
    windows=schemas.Windows(
      names=frozenset(['sliding_window']),
      default=4096,
      has=lambda _, attributes: attributes['sliding_window'] is not None,
    ),
  ),
  keys=KEYS,
  harmless_tensors=HARMLESS_TENSORS,
)

_QWEN_WINDOWS = schemas.Windows(
  names=frozenset(
    ['sliding_window', 'use_sliding_window', 'max_window_layers', 'layer_types']
  ),
  default=4096,
  has=lambda layer, attributes: (
    attributes.get('use_sliding_window', False)
    and attributes['sliding_window'] is not None
    and layer >= attributes.get('max_window_layers', 28)
  ),
)
QWEN2 = tables.Family(
  name='qwen2',
  architecture='Qwen2ForCausalLM',
  fixed=FIXED | dict(attention_bias=True, out_bias=False),
  hf=schemas.Schema(
    fields=FIELDS | schemas.ROPE_FIELDS,
    words=schemas.ROPE_WORDS,
    only=schemas.HF_ONLY | schemas.ROPE_ONLY | _SILU | {'use_mrope': (False,)},
    harmless=schemas.HF_HARMLESS,
    absent=dict(rope_theta=10000.0, tied=False),
    windows=_QWEN_WINDOWS,
  ),
  gguf=_gguf('qwen2'),
  keys=KEYS,
  harmless_tensors=HARMLESS_TENSORS,
)
QWEN3 = tables.Family(
  name='qwen3',
  architecture='Qwen3ForCausalLM',
  fixed=FIXED | dict(qk_norm=True),
  hf=schemas.Schema(
    fields=FIELDS | schemas.ROPE_FIELDS | {'attention_bias': 'attention_bias'},
    words=schemas.ROPE_WORDS,
    only=schemas.HF_ONLY | schemas.ROPE_ONLY | _SILU,
    harmless=schemas.HF_HARMLESS,
    absent=dict(
      head_dim=128, rope_theta=10000.0, attention_bias=False, tied=False
    ),
    windows=_QWEN_WINDOWS,
  ),
  gguf=_gguf('qwen3'),
  keys=KEYS,
  harmless_tensors=HARMLESS_TENSORS,
)
