"""GPT-2 and GPT-NeoX, the architecture of Pythia."""

from dpo_jax.models import schemas
from dpo_jax.models import tables

_QKV = 'layers/attention/q layers/attention/k layers/attention/v'
_QKV_BIAS = (
  'layers/attention/q_bias layers/attention/k_bias layers/attention/v_bias'
)
GPT2 = tables.Family(
  name='gpt2',
  architecture='GPT2LMHeadModel',
  fixed=dict(
    norm='layer',
    positions='learned',
    mlp='gelu',
    attention_bias=True,
    mlp_bias=True,
  ),
  hf=schemas.Schema(
    fields={
      'vocab_size': 'vocab_size',
      'n_embd': 'd_model',
      'n_layer': 'num_layers',
      'n_head': 'num_heads',
      'n_inner': 'd_ff',
      'layer_norm_epsilon': 'norm_eps',
      'n_positions': 'max_positions',
      'n_ctx': 'max_positions',
      'tie_word_embeddings': 'tied',
    },
    only=schemas.HF_ONLY
    | schemas.NO_WINDOW
    | {
      'activation_function': ('gelu_new', 'gelu_pytorch_tanh'),
      'reorder_and_upcast_attn': (False,),
      'scale_attn_by_inverse_layer_idx': (False,),
      'scale_attn_weights': (True,),
    },
    harmless=schemas.HF_HARMLESS,
    # rope_theta: no rotation, but the field wants a number.
    absent=dict(tied=True, rope_theta=10000.0),
  ),
  # GPT-2's linear layers are stored [in, out], unlike everybody else's.
  keys=(
    tables.Key('embed/tokens', 'transformer.wte.weight', 'VD->VD'),
    tables.Key('embed/positions', 'transformer.wpe.weight', 'PD->PD'),
    tables.Key('layers/norm1/scale', 'transformer.h.{}.ln_1.weight', 'D->D'),
    tables.Key('layers/norm1/bias', 'transformer.h.{}.ln_1.bias', 'D->D'),
    tables.Key(_QKV, 'transformer.h.{}.attn.c_attn.weight', 'D(CNH)->CDNH'),
    tables.Key(_QKV_BIAS, 'transformer.h.{}.attn.c_attn.bias', '(CNH)->CNH'),
    tables.Key(
      'layers/attention/out',
      'transformer.h.{}.attn.c_proj.weight',
      '(NH)D->NHD',
    ),
    tables.Key(
      'layers/attention/out_bias', 'transformer.h.{}.attn.c_proj.bias', 'D->D'
    ),
    tables.Key('layers/norm2/scale', 'transformer.h.{}.ln_2.weight', 'D->D'),
    tables.Key('layers/norm2/bias', 'transformer.h.{}.ln_2.bias', 'D->D'),
    tables.Key('layers/mlp/up', 'transformer.h.{}.mlp.c_fc.weight', 'DF->DF'),
    tables.Key('layers/mlp/up_bias', 'transformer.h.{}.mlp.c_fc.bias', 'F->F'),
    tables.Key(
      'layers/mlp/down', 'transformer.h.{}.mlp.c_proj.weight', 'FD->FD'
    ),
    tables.Key(
      'layers/mlp/down_bias', 'transformer.h.{}.mlp.c_proj.bias', 'D->D'
    ),
    tables.Key('final_norm/scale', 'transformer.ln_f.weight', 'D->D'),
    tables.Key('final_norm/bias', 'transformer.ln_f.bias', 'D->D'),
    tables.Key('unembed', 'lm_head.weight', 'VD->VD', when=tables.no_table),
  ),
  harmless_tensors=r'transformer\.h\.\d+\.attn\.(masked_)?bias',
  hf_prefix='transformer.',
)

GPT_NEOX = tables.Family(
  name='gpt_neox',
  architecture='GPTNeoXForCausalLM',
  fixed=dict(norm='layer', positions='rotary', mlp='gelu_exact', mlp_bias=True),
  hf=schemas.Schema(
    fields=schemas.ROPE_FIELDS
    | {
      'vocab_size': 'vocab_size',
      'hidden_size': 'd_model',
      'num_hidden_layers': 'num_layers',
      'num_attention_heads': 'num_heads',
      'intermediate_size': 'd_ff',
      'layer_norm_eps': 'norm_eps',
      'max_position_embeddings': 'max_positions',
      'rotary_emb_base': 'rope_theta',
      'rotary_pct': 'rotary_fraction',
      'partial_rotary_factor': 'rotary_fraction',
      'rope_parameters.partial_rotary_factor': 'rotary_fraction',
      'use_parallel_residual': 'parallel',
      'attention_bias': 'attention_bias',
      'tie_word_embeddings': 'tied',
    },
    words=schemas.ROPE_WORDS,
    only=schemas.HF_ONLY
    | schemas.ROPE_ONLY
    | schemas.NO_WINDOW
    | {'hidden_act': ('gelu',)},
    harmless=schemas.HF_HARMLESS | {'hidden_dropout', 'classifier_dropout'},
    absent=dict(
      rope_theta=10000.0,
      rotary_fraction=0.25,
      parallel=True,
      attention_bias=True,
      tied=False,
    ),
  ),
  # Queries, keys and values are fused head by head.
  keys=(
    tables.Key('embed/tokens', 'gpt_neox.embed_in.weight', 'VD->VD'),
    tables.Key(
      'layers/norm1/scale',
      'gpt_neox.layers.{}.input_layernorm.weight',
      'D->D',
    ),
    tables.Key(
      'layers/norm1/bias', 'gpt_neox.layers.{}.input_layernorm.bias', 'D->D'
    ),
    tables.Key(
      _QKV,
      'gpt_neox.layers.{}.attention.query_key_value.weight',
      '(NCH)D->CDNH',
    ),
    tables.Key(
      _QKV_BIAS,
      'gpt_neox.layers.{}.attention.query_key_value.bias',
      '(NCH)->CNH',
      when=lambda config: config.attention_bias,
    ),
    tables.Key(
      'layers/attention/out',
      'gpt_neox.layers.{}.attention.dense.weight',
      'D(NH)->NHD',
    ),
    tables.Key(
      'layers/attention/out_bias',
      'gpt_neox.layers.{}.attention.dense.bias',
      'D->D',
      when=lambda config: config.attention_bias,
    ),
    tables.Key(
      'layers/norm2/scale',
      'gpt_neox.layers.{}.post_attention_layernorm.weight',
      'D->D',
    ),
    tables.Key(
      'layers/norm2/bias',
      'gpt_neox.layers.{}.post_attention_layernorm.bias',
      'D->D',
    ),
    tables.Key(
      'layers/mlp/up', 'gpt_neox.layers.{}.mlp.dense_h_to_4h.weight', 'FD->DF'
    ),
    tables.Key(
      'layers/mlp/up_bias', 'gpt_neox.layers.{}.mlp.dense_h_to_4h.bias', 'F->F'
    ),
    tables.Key(
      'layers/mlp/down', 'gpt_neox.layers.{}.mlp.dense_4h_to_h.weight', 'DF->FD'
    ),
    tables.Key(
      'layers/mlp/down_bias',
      'gpt_neox.layers.{}.mlp.dense_4h_to_h.bias',
      'D->D',
    ),
    tables.Key('final_norm/scale', 'gpt_neox.final_layer_norm.weight', 'D->D'),
    tables.Key('final_norm/bias', 'gpt_neox.final_layer_norm.bias', 'D->D'),
    tables.Key('unembed', 'embed_out.weight', 'VD->VD', when=tables.no_table),
  ),
  harmless_tensors=r'gpt_neox\.layers\.\d+\.attention\.'
  r'((masked_)?bias|rotary_emb\.inv_freq)',
  hf_prefix='gpt_neox.',
)
