"""Gemma 1, 2 and 3 (text)."""

from dpo_jax.models import llama_families
from dpo_jax.models import schemas
from dpo_jax.models import tables

_FIXED = llama_families.FIXED | dict(
  mlp='geglu', norm_offset=True, embed_scale=True
)
_FIELDS = llama_families.FIELDS | {'attention_bias': 'attention_bias'}
_ONLY = (
  schemas.HF_ONLY
  | schemas.ROPE_ONLY
  | {
    'hidden_activation': ('gelu_pytorch_tanh',),
    'hidden_act': ('gelu_pytorch_tanh',),
    'use_bidirectional_attention': (False, None),
  }
)
_HARMLESS = schemas.HF_HARMLESS | {'cache_implementation'}
_WHOLE = frozenset(['query_pre_attn_scalar'])
# Values that the config classes of transformers have for what is not said.
_ABSENT = dict(
  head_dim=256, rope_theta=10000.0, attention_bias=False, tied=True
)

GEMMA = tables.Family(
  name='gemma',
  architecture='GemmaForCausalLM',
  fixed=_FIXED,
  hf=schemas.Schema(
    fields=_FIELDS | schemas.ROPE_FIELDS,
    words=schemas.ROPE_WORDS,
    only=_ONLY
    | schemas.NO_WINDOW
    | {
      # The first files say gelu and mean its tanh form, as transformers knows.
      'hidden_act': ('gelu_pytorch_tanh', 'gelu'),
      'hidden_activation': ('gelu_pytorch_tanh', None),
    },
    harmless=_HARMLESS,
    absent=_ABSENT,
  ),
  keys=llama_families.KEYS,
  harmless_tensors=llama_families.HARMLESS_TENSORS,
)

GEMMA2 = tables.Family(
  name='gemma2',
  architecture='Gemma2ForCausalLM',
  fixed=_FIXED | dict(post_norms=True),
  hf=schemas.Schema(
    fields=_FIELDS
    | schemas.ROPE_FIELDS
    | {
      'query_pre_attn_scalar': 'query_scalar',
      'attn_logit_softcapping': 'attention_cap',
      'final_logit_softcapping': 'logit_cap',
    },
    words=schemas.ROPE_WORDS,
    only=_ONLY,
    harmless=_HARMLESS,
    whole=_WHOLE,
    absent=_ABSENT
    | dict(query_scalar=256.0, attention_cap=50.0, logit_cap=30.0),
    windows=schemas.Windows(
      names=frozenset(['sliding_window', 'layer_types']),
      default=4096,
      has=lambda layer, _: layer % 2 == 0,
    ),
  ),
  keys=llama_families.KEYS,
  harmless_tensors=llama_families.HARMLESS_TENSORS,
)

GEMMA3 = tables.Family(
  name='gemma3_text',
  architecture='Gemma3ForCausalLM',
  fixed=_FIXED | dict(post_norms=True, qk_norm=True),
  hf=schemas.Schema(
    fields=_FIELDS
    | schemas.rope_fields('rope_scaling', 'rope_parameters.full_attention')
    | {
      'rope_local_base_freq': 'local_rope_theta',
      'rope_parameters.sliding_attention.rope_theta': 'local_rope_theta',
      'query_pre_attn_scalar': 'query_scalar',
      'final_logit_softcapping': 'logit_cap',
    },
    words=schemas.rope_words('rope_scaling', 'rope_parameters.full_attention'),
    only=_ONLY
    | {
      # transformers has the attribute and does not use it.
      'attn_logit_softcapping': (None,),
      'rope_parameters.sliding_attention.rope_type': ('default',),
    },
    harmless=_HARMLESS | {'_sliding_window_pattern'},
    whole=_WHOLE,
    absent=_ABSENT
    | dict(rope_theta=1e6, local_rope_theta=1e4, query_scalar=256.0),
    windows=schemas.Windows(
      names=frozenset(
        ['sliding_window', 'sliding_window_pattern', 'layer_types']
      ),
      default=4096,
      has=lambda layer, attributes: (
        (layer + 1) % attributes.get('sliding_window_pattern', 6) != 0
      ),
    ),
  ),
  keys=llama_families.KEYS,
  harmless_tensors=llama_families.HARMLESS_TENSORS,
)
