"""Model families as data: what foreign checkpoints call our parameters.

A `Family` holds two schemas (see `schemas`), which translate the attributes of
a Hugging Face config.json and of GGUF metadata into a `TransformerConfig`, and
ONE key table, which says for every parameter what it is called elsewhere and
how its dimensions are laid out there. The table is read in both directions, so
`to_hf` is `from_hf` reversed and the round trip is bit-exact.

A layout such as '(NH)D->DNH' is explained in `layouts`. Its letters are those
of the project: V vocab, D model, N query heads, K kv heads, H head dim, F mlp;
and P positions, I = 2 halves of J = H / 2 rotary frequencies in a head.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping

import numpy as np

from dpo_jax import names
from dpo_jax.models import layouts
from dpo_jax.models import schemas
from dpo_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Key:
  """One tensor elsewhere ('{}' is the layer) and its path or paths here."""

  paths: str
  hf: str
  layout: str
  gguf: str | None = None
  gguf_layout: str | None = None  # None: as in Hugging Face.
  when: Callable[[transformer.TransformerConfig], bool] = lambda _: True


@dataclasses.dataclass(frozen=True)
class Family:
  fixed: Mapping[str, object]
  hf: schemas.Schema
  keys: tuple[Key, ...]
  # Tensors without learned numbers, which old checkpoints carry.
  harmless_tensors: str = r'(?!)'
  # Checkpoints of the bare decoder leave this prefix out.
  hf_prefix: str = ''
  gguf: schemas.Schema | None = None


LLAMA = Family(
  fixed=dict(norm='rms', positions='rotary', mlp='swiglu', mlp_bias=False),
  hf=schemas.Schema(
    fields={
      'vocab_size': 'vocab_size',
      'hidden_size': 'd_model',
      'num_hidden_layers': 'num_layers',
      'num_attention_heads': 'num_heads',
      'num_key_value_heads': 'num_kv_heads',
      'head_dim': 'head_dim',
      'intermediate_size': 'd_ff',
      'rms_norm_eps': 'norm_eps',
      'max_position_embeddings': 'max_positions',
      'rope_theta': 'rope_theta',
      'rope_parameters.rope_theta': 'rope_theta',
      'rope_scaling.rope_theta': 'rope_theta',
      'attention_bias': 'attention_bias',
      'tie_word_embeddings': 'tied',
    },
    only=schemas.HF_ONLY
    | schemas.ROPE_ONLY
    | {
      'hidden_act': ('silu', 'swish'),
      'mlp_bias': (False,),
    },
    harmless=schemas.HF_HARMLESS,
    # The values LlamaConfig had before it wrote them down.
    absent=dict(rope_theta=10000.0, attention_bias=False, tied=False),
  ),
  gguf=schemas.Schema(
    fields={
      'llama.vocab_size': 'vocab_size',
      'llama.embedding_length': 'd_model',
      'llama.block_count': 'num_layers',
      'llama.attention.head_count': 'num_heads',
      'llama.attention.head_count_kv': 'num_kv_heads',
      'llama.attention.key_length': 'head_dim',
      'llama.attention.value_length': 'head_dim',
      'llama.rope.dimension_count': 'head_dim',
      'llama.feed_forward_length': 'd_ff',
      'llama.attention.layer_norm_rms_epsilon': 'norm_eps',
      'llama.context_length': 'max_positions',
      'llama.rope.freq_base': 'rope_theta',
    },
    only={
      'llama.rope.scaling.type': ('none',),
      'llama.expert_count': (0,),
      'llama.expert_used_count': (0,),
      'llama.use_parallel_residual': (False,),
      'split.count': (0, 1),
    },
    harmless=frozenset(['split.no', 'split.tensors.count']),
    absent=dict(rope_theta=10000.0),
  ),
  keys=(
    Key(
      'embed/tokens', 'model.embed_tokens.weight', 'VD->VD', 'token_embd.weight'
    ),
    Key(
      'layers/norm1/scale',
      'model.layers.{}.input_layernorm.weight',
      'D->D',
      'blk.{}.attn_norm.weight',
    ),
    # GGUF rotates neighbouring rows where we rotate halves: row 2j + i of
    # a query or key head in a GGUF file is our row i * H / 2 + j.
    Key(
      'layers/attention/q',
      'model.layers.{}.self_attn.q_proj.weight',
      '(NH)D->DNH',
      'blk.{}.attn_q.weight',
      '(NJI)D->DN(IJ)',
    ),
    Key(
      'layers/attention/k',
      'model.layers.{}.self_attn.k_proj.weight',
      '(KH)D->DKH',
      'blk.{}.attn_k.weight',
      '(KJI)D->DK(IJ)',
    ),
    Key(
      'layers/attention/v',
      'model.layers.{}.self_attn.v_proj.weight',
      '(KH)D->DKH',
      'blk.{}.attn_v.weight',
    ),
    Key(
      'layers/attention/out',
      'model.layers.{}.self_attn.o_proj.weight',
      'D(NH)->NHD',
      'blk.{}.attn_output.weight',
    ),
    Key(
      'layers/attention/q_bias',
      'model.layers.{}.self_attn.q_proj.bias',
      '(NH)->NH',
      'blk.{}.attn_q.bias',
      '(NJI)->N(IJ)',
      when=lambda config: config.attention_bias,
    ),
    Key(
      'layers/attention/k_bias',
      'model.layers.{}.self_attn.k_proj.bias',
      '(KH)->KH',
      'blk.{}.attn_k.bias',
      '(KJI)->K(IJ)',
      when=lambda config: config.attention_bias,
    ),
    Key(
      'layers/attention/v_bias',
      'model.layers.{}.self_attn.v_proj.bias',
      '(KH)->KH',
      'blk.{}.attn_v.bias',
      when=lambda config: config.attention_bias,
    ),
    Key(
      'layers/attention/out_bias',
      'model.layers.{}.self_attn.o_proj.bias',
      'D->D',
      'blk.{}.attn_output.bias',
      when=lambda config: config.attention_bias,
    ),
    Key(
      'layers/norm2/scale',
      'model.layers.{}.post_attention_layernorm.weight',
      'D->D',
      'blk.{}.ffn_norm.weight',
    ),
    Key(
      'layers/mlp/gate',
      'model.layers.{}.mlp.gate_proj.weight',
      'FD->DF',
      'blk.{}.ffn_gate.weight',
    ),
    Key(
      'layers/mlp/up',
      'model.layers.{}.mlp.up_proj.weight',
      'FD->DF',
      'blk.{}.ffn_up.weight',
    ),
    Key(
      'layers/mlp/down',
      'model.layers.{}.mlp.down_proj.weight',
      'DF->FD',
      'blk.{}.ffn_down.weight',
    ),
    Key('final_norm/scale', 'model.norm.weight', 'D->D', 'output_norm.weight'),
    Key(
      'unembed',
      'lm_head.weight',
      'VD->VD',
      'output.weight',
      when=lambda config: not config.tied,
    ),
  ),
  harmless_tensors=r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq',
)

_QKV = 'layers/attention/q layers/attention/k layers/attention/v'
_QKV_BIAS = (
  'layers/attention/q_bias layers/attention/k_bias layers/attention/v_bias'
)
GPT2 = Family(
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
    Key('embed/tokens', 'transformer.wte.weight', 'VD->VD'),
    Key('embed/positions', 'transformer.wpe.weight', 'PD->PD'),
    Key('layers/norm1/scale', 'transformer.h.{}.ln_1.weight', 'D->D'),
    Key('layers/norm1/bias', 'transformer.h.{}.ln_1.bias', 'D->D'),
    Key(_QKV, 'transformer.h.{}.attn.c_attn.weight', 'D(CNH)->CDNH'),
    Key(_QKV_BIAS, 'transformer.h.{}.attn.c_attn.bias', '(CNH)->CNH'),
    Key(
      'layers/attention/out',
      'transformer.h.{}.attn.c_proj.weight',
      '(NH)D->NHD',
    ),
    Key(
      'layers/attention/out_bias', 'transformer.h.{}.attn.c_proj.bias', 'D->D'
    ),
    Key('layers/norm2/scale', 'transformer.h.{}.ln_2.weight', 'D->D'),
    Key('layers/norm2/bias', 'transformer.h.{}.ln_2.bias', 'D->D'),
    Key('layers/mlp/up', 'transformer.h.{}.mlp.c_fc.weight', 'DF->DF'),
    Key('layers/mlp/up_bias', 'transformer.h.{}.mlp.c_fc.bias', 'F->F'),
    Key('layers/mlp/down', 'transformer.h.{}.mlp.c_proj.weight', 'FD->FD'),
    Key('layers/mlp/down_bias', 'transformer.h.{}.mlp.c_proj.bias', 'D->D'),
    Key('final_norm/scale', 'transformer.ln_f.weight', 'D->D'),
    Key('final_norm/bias', 'transformer.ln_f.bias', 'D->D'),
    Key(
      'unembed', 'lm_head.weight', 'VD->VD', when=lambda config: not config.tied
    ),
  ),
  harmless_tensors=r'transformer\.h\.\d+\.attn\.(masked_)?bias',
  hf_prefix='transformer.',
)

FAMILIES = {'llama': LLAMA, 'gpt2': GPT2}


# --- Configs -----------------------------------------------------------------


def family_of(model_type: str) -> Family:
  """Returns the family a Hugging Face `model_type` names, or refuses it."""
  return names.look_up(FAMILIES, 'model_type', model_type)


def config_from_hf(attributes: Mapping) -> transformer.TransformerConfig:
  """Translates the dict of a Hugging Face config.json, or refuses it."""
  if 'model_type' not in attributes:
    raise ValueError(
      'config.json has no model_type; add '
      f'one of {", ".join(sorted(FAMILIES))}.'
    )
  family = family_of(attributes['model_type'])
  return schemas.translate(
    family.hf,
    attributes,
    fixed=family.fixed,
    source=f'{attributes["model_type"]} config',
  )


def config_from_gguf(
  metadata: Mapping, shapes: Mapping
) -> transformer.TransformerConfig:
  """Translates GGUF metadata, given the shapes of the tensors in the file."""
  family = gguf_family(metadata)
  # What the metadata does not say, the tensors do.
  said = {
    'vocab_size': shapes.get('token_embd.weight', (None,))[0],
    'tied': 'output.weight' not in shapes,
    'attention_bias': 'blk.0.attn_q.bias' in shapes,
  }
  # Floats are stored in 32 bits: 9.999999747378752e-06 was 1e-05.
  attributes = {
    name: float(str(np.float32(value))) if isinstance(value, float) else value
    for name, value in metadata.items()
    if not name.startswith(('general.', 'tokenizer.', 'GGUF.', 'quantize.'))
  }
  schema = dataclasses.replace(
    family.gguf, absent={**family.gguf.absent, **said}
  )
  return schemas.translate(
    schema, attributes, fixed=family.fixed, source='GGUF metadata'
  )


def gguf_family(metadata: Mapping) -> Family:
  """Returns the family that `general.architecture` names, or refuses it."""
  known = [name for name, family in FAMILIES.items() if family.gguf]
  architecture = metadata.get('general.architecture')
  if architecture not in known:
    raise ValueError(
      f'GGUF general.architecture {architecture!r} is not supported (only '
      f'{", ".join(known)}); load the Hugging Face folder instead.'
    )
  return FAMILIES[architecture]


# --- Tensors -----------------------------------------------------------------


def from_hf(tensors: Mapping, config, *, family: Family):
  """Builds our parameters, in float32, from Hugging Face tensors.

  `tensors` maps names to anything with a shape that `np.asarray` reads, so a
  lazy file is never in memory as a whole.
  """
  if family.hf_prefix and not any(
    name.startswith(family.hf_prefix) for name in tensors
  ):
    tensors = {
      name if name.startswith('lm_head.') else family.hf_prefix + name: value
      for name, value in tensors.items()
    }
  if config.tied and 'lm_head.weight' in tensors:
    embed = next(key.hf for key in family.keys if key.paths == 'embed/tokens')
    if embed in tensors and np.array_equal(
      tensors['lm_head.weight'], tensors[embed]
    ):
      tensors = {
        name: value
        for name, value in tensors.items()
        if name != 'lm_head.weight'
      }
    else:
      raise ValueError(
        'config.json ties the unembedding (tie_word_embeddings) but '
        'lm_head.weight differs from the embedding; set '
        'tie_word_embeddings to false if the checkpoint is right.'
      )
  return layouts.read(
    tensors,
    _hf_table(family, config),
    _sizes(config),
    layers=config.num_layers,
    harmless=family.harmless_tensors,
    dtype='float32',
  )


def from_gguf(tensors: Mapping, config, *, family: Family):
  """Builds our parameters, in float32, from dequantized, row-major tensors."""
  table = [
    layouts.Row(key.gguf, key.gguf_layout or key.layout, key.paths.split())
    for key in family.keys
    if key.when(config)
  ]
  return layouts.read(
    tensors,
    table,
    _sizes(config),
    layers=config.num_layers,
    harmless=r'(?!)',
    dtype='float32',
  )


def to_hf(params: Mapping, config, *, family: Family) -> dict:
  """Returns the Hugging Face tensors of our parameters: `from_hf` reversed."""
  return layouts.write(
    params, _hf_table(family, config), _sizes(config), layers=config.num_layers
  )


def _hf_table(family, config):
  return [
    layouts.Row(key.hf, key.layout, key.paths.split())
    for key in family.keys
    if key.when(config)
  ]


def _sizes(config) -> dict[str, int]:
  return {
    'V': config.vocab_size,
    'D': config.d_model,
    'N': config.num_heads,
    'K': config.num_kv_heads,
    'H': config.head_dim,
    'F': config.d_ff,
    'P': config.max_positions,
    'I': 2,
    'J': config.head_dim // 2,
  }
