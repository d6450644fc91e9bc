"""Model families as data: what foreign checkpoints call our parameters.

A `tables.Family` holds two schemas (see `schemas`), which translate the
attributes of a Hugging Face config.json and of GGUF metadata into a
`TransformerConfig`, and ONE key table. The table is read in both directions, so
`to_hf` is `from_hf` reversed and the round trip is bit-exact.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dpo_jax import names
from dpo_jax.models import gemma_families
from dpo_jax.models import gpt_families
from dpo_jax.models import layouts
from dpo_jax.models import llama_families
from dpo_jax.models import lora
from dpo_jax.models import schemas
from dpo_jax.models import tables
from dpo_jax.models import transformer

FAMILIES = {
  'gemma': gemma_families.GEMMA,
  'gemma2': gemma_families.GEMMA2,
  'gemma3_text': gemma_families.GEMMA3,
  'gpt2': gpt_families.GPT2,
  'gpt_neox': gpt_families.GPT_NEOX,
  'llama': llama_families.LLAMA,
  'mistral': llama_families.MISTRAL,
  'qwen2': llama_families.QWEN2,
  'qwen3': llama_families.QWEN3,
}


# --- Configs -----------------------------------------------------------------


def family_of(model_type: str) -> tables.Family:
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


def gguf_family(metadata: Mapping) -> tables.Family:
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


def from_hf(tensors: Mapping, config, *, family: tables.Family):
  """Builds our parameters, in float32, from Hugging Face tensors.

  `tensors` maps names to anything with a shape that `np.asarray` reads, so a
  lazy file is never in memory as a whole.
  """
  hf_names = {key.paths: key.hf for key in family.keys}
  head = hf_names['unembed']
  if family.hf_prefix and not any(
    name.startswith(family.hf_prefix) for name in tensors
  ):
    tensors = {
      name if name == head else family.hf_prefix + name: value
      for name, value in tensors.items()
    }
  if config.tied and head in tensors:
    embed = hf_names['embed/tokens']
    if embed in tensors and np.array_equal(tensors[head], tensors[embed]):
      tensors = {name: value for name, value in tensors.items() if name != head}
    else:
      raise ValueError(
        'config.json ties the unembedding (tie_word_embeddings) but '
        f'{head} differs from the embedding; set '
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


def from_gguf(tensors: Mapping, config, *, family: tables.Family):
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


def to_hf(params: Mapping, config, *, family: tables.Family) -> dict:
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


# --- Adapters ----------------------------------------------------------------


def adapted_rows(config, *, family: tables.Family):
  """Returns (rows of weights that may have an adapter, sizes of letters)."""
  adaptable = {f'layers/{name}' for name in lora.INPUTS}
  rows = [
    row for row in _hf_table(family, config) if adaptable.issuperset(row.paths)
  ]
  return rows, _sizes(config)
