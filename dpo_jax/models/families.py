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
  family.name: family
  for family in (
    gemma_families.GEMMA,
    gemma_families.GEMMA2,
    gemma_families.GEMMA3,
    gpt_families.GPT2,
    gpt_families.GPT_NEOX,
    llama_families.LLAMA,
    llama_families.MISTRAL,
    llama_families.QWEN2,
    llama_families.QWEN3,
  )
}


# --- Configs -----------------------------------------------------------------


def family_of(model_type: str) -> tables.Family:
  """Returns the family a Hugging Face `model_type` names, or refuses it."""
  return names.look_up(FAMILIES, 'model_type', model_type)


def config_from_hf(attributes: Mapping) -> transformer.TransformerConfig:
  """Translates the dict of a Hugging Face config.json, or refuses it."""
  if not isinstance(attributes.get('model_type'), str):
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


# How our decoder computes, which is no part of a config.json.
_COMPUTED = ('dtype', 'remat', 'scan_unroll', 'gather_share')


def config_to_hf(config, *, family: tables.Family) -> dict:
  """Returns a config.json that `config_from_hf` translates to this config.

  `_COMPUTED` is no part of it. A config that this family cannot say is a
  ValueError.
  """
  attributes = {
    'architectures': [family.architecture],
    'model_type': family.name,
    **schemas.untranslate(family.hf, config),
  }
  usual = {name: getattr(type(config), name) for name in _COMPUTED}
  plain = dataclasses.replace(config, **usual)
  if config_from_hf(attributes) != plain:
    raise ValueError(f'a {family.name} config cannot say all of {plain}')
  return attributes


def family_like(config) -> tables.Family:
  """Returns the first family whose config.json can say this config."""
  for family in FAMILIES.values():
    try:
      config_to_hf(config, family=family)
    except ValueError:
      continue
    return family
  raise ValueError(
    f'no family of {", ".join(FAMILIES)} has a config.json for {config}'
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


def hf_tensors(tensors: Mapping, config, *, family: tables.Family) -> dict:
  """Returns those Hugging Face tensors that are parameters of the config.

  All that do not fit are listed in one error. The names are those of the key
  table, whatever prefix the checkpoint leaves out. `tensors` maps names to
  anything with a shape that `np.asarray` reads: a lazy file will do.
  """
  hf_names = {key.paths: key.hf for key in family.keys}
  head, embed = hf_names['unembed'], hf_names['embed/tokens']
  if family.hf_prefix and not any(
    name.startswith(family.hf_prefix) for name in tensors
  ):
    tensors = {
      name if name == head else family.hf_prefix + name: value
      for name, value in tensors.items()
    }
  if config.tied and head in tensors:
    if embed not in tensors or not np.array_equal(
      tensors[head], tensors[embed]
    ):
      raise ValueError(
        'config.json ties the unembedding (tie_word_embeddings) but '
        f'{head} differs from the embedding; set '
        'tie_word_embeddings to false if the checkpoint is right.'
      )
    tensors = {name: value for name, value in tensors.items() if name != head}
  return layouts.check(
    tensors, hf_shapes(config, family=family), harmless=family.harmless_tensors
  )


def gguf_tensors(tensors: Mapping, config, *, family: tables.Family) -> dict:
  """Returns the dequantized, row-major tensors by their Hugging Face names."""
  table = _gguf_table(family, config)
  layers = config.num_layers
  wanted = layouts.tensor_shapes(table, _sizes(config), layers=layers)
  tensors = layouts.check(tensors, wanted, harmless=r'(?!)')
  both = zip(table, _hf_table(family, config), strict=True)
  return {
    hf: tensors[gguf]
    for ours, theirs in both
    for gguf, hf in zip(ours.names(layers), theirs.names(layers), strict=True)
  }


def hf_pieces(tensors: Mapping, config, *, family: tables.Family):
  """Yields the `layouts.Piece`s of what `hf_tensors` returned."""
  table = _hf_table(family, config)
  return layouts.read(tensors, table, _sizes(config), layers=config.num_layers)


def gguf_pieces(tensors: Mapping, config, *, family: tables.Family):
  """Yields the `layouts.Piece`s of what `gguf_tensors` returned."""
  both = zip(_gguf_table(family, config), _hf_table(family, config))
  table = [ours._replace(name=theirs.name) for ours, theirs in both]
  return layouts.read(tensors, table, _sizes(config), layers=config.num_layers)


def hf_shapes(config, *, family: tables.Family) -> dict:
  """Returns {name: shape} of all Hugging Face tensors of a model."""
  return layouts.tensor_shapes(
    _hf_table(family, config), _sizes(config), layers=config.num_layers
  )


def parameter_shapes(config, *, family: tables.Family) -> dict:
  """Returns {path: shape} of all parameters of a model."""
  return layouts.parameter_shapes(
    _hf_table(family, config), _sizes(config), layers=config.num_layers
  )


def from_hf(tensors: Mapping, config, *, family: tables.Family):
  """Builds our parameters, float32 numpy arrays, from Hugging Face tensors."""
  tensors = hf_tensors(tensors, config, family=family)
  return layouts.assemble(
    hf_pieces(tensors, config, family=family),
    parameter_shapes(config, family=family),
    dtype='float32',
  )


def to_hf(params: Mapping, config, *, family: tables.Family):
  """Yields the Hugging Face (name, tensor) of our parameters, one by one."""
  return layouts.write(
    params, _hf_table(family, config), _sizes(config), layers=config.num_layers
  )


def _hf_table(family, config):
  return [
    layouts.Row(key.hf, key.layout, key.paths.split())
    for key in family.keys
    if key.when(config)
  ]


def _gguf_table(family, config):
  """The table of GGUF files, whose rows are those of `_hf_table`."""
  return [
    layouts.Row(
      key.gguf,
      (family.gguf_interleaves and key.gguf_layout) or key.layout,
      key.paths.split(),
    )
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
