"""Configs of other libraries, translated attribute by attribute or refused.

A schema refuses every attribute that it neither translates nor knows to be
harmless: a config that asks for something our decoder does not do is an error
and never a silently different model.
"""

import dataclasses
from collections.abc import Mapping

from dpo_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Schema:
  """How one kind of config is read.

  Attributes of nested dicts are addressed with dots, as in
  'rope_parameters.rope_theta'.

  fields: attribute -> TransformerConfig field, or several with one value.
  only: attribute -> the values under which our decoder is the same model.
  harmless: attributes that do not change what the model computes.
  absent: fields no attribute has to give, and the family's value for them.
  """

  fields: Mapping[str, str]
  only: Mapping[str, tuple]
  harmless: frozenset[str]
  absent: Mapping[str, object]


# Attributes every Hugging Face config may have. Dropout is here on purpose:
# preference training runs without it.
HF_HARMLESS = frozenset(
  """
    _attn_implementation _name_or_path architectures attention_dropout
    attn_pdrop bos_token_id dtype embd_pdrop eos_token_id gradient_checkpointing
    id2label initializer_range is_decoder is_llama_config
    keys_to_ignore_at_inference label2id model_type output_attentions
    output_hidden_states pad_token_id resid_pdrop return_dict
    summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params
    tokenizer_class torch_dtype transformers.js_config transformers_version
    unk_token_id use_cache
    """.split()
)
HF_ONLY = {
  'add_cross_attention': (False,),
  'chunk_size_feed_forward': (0,),
  'cross_attention_hidden_size': (None,),
  'is_encoder_decoder': (False,),
  'pruned_heads': (None, {}),
  'pretraining_tp': (1, None),
  'quantization_config': (None,),
  'sliding_window': (None,),
  'use_sliding_window': (False,),
}
ROPE_ONLY = {
  'rope_interleaved': (False, None),
  'rope_parameters': (None,),
  'rope_parameters.rope_type': ('default',),
  'rope_parameters.type': ('default',),
  'rope_scaling': (None,),
  'rope_scaling.rope_type': ('default',),
  'rope_scaling.type': ('default',),
}


def _flat(attributes: Mapping, prefix: str = '') -> dict:
  """Addresses nested attributes with dots; a dict nobody nests stays one."""
  flat = {}
  for name, value in attributes.items():
    if name.startswith('rope_') and isinstance(value, Mapping) and value:
      flat.update(_flat(value, f'{prefix}{name}.'))
    else:
      flat[prefix + name] = value
  return flat


def translate(
  schema: Schema, attributes: Mapping, *, fixed: Mapping, source: str
) -> transformer.TransformerConfig:
  """Translates a config, or raises one error that lists all it cannot.

  fixed: config field -> value, where all configs of a family have the same.
  source: what the error calls the config.
  """
  types = {
    field.name: field.type
    for field in dataclasses.fields(transformer.TransformerConfig)
  }
  values, problems = {}, []
  for name, value in _flat(attributes).items():
    if name in schema.fields:
      field = schema.fields[name]
      if value is None:
        continue
      wrong = _wrong_type(value, types[field])
      if wrong:
        problems.append(f'{name} = {value!r} ({wrong})')
      elif values.setdefault(field, value) != value:
        problems.append(
          f'{name} = {value!r} (another attribute says {values[field]!r})'
        )
    elif name in schema.only:
      if value not in schema.only[name]:
        allowed = ' or '.join(repr(v) for v in schema.only[name])
        problems.append(f'{name} = {value!r} (only {allowed} is implemented)')
    elif name not in schema.harmless:
      problems.append(f'{name} = {value!r} (unknown attribute)')
  values = {**schema.absent, **fixed, **values}
  values = {
    field: value for field, value in values.items() if value is not None
  }
  heads, width = values.get('num_heads'), values.get('d_model')
  if heads and width:
    values.setdefault('num_kv_heads', heads)
    values.setdefault('d_ff', 4 * width)  # Only GPT-2 leaves it out.
    if 'head_dim' not in values and width % heads:
      problems.append(f'width {width} is not divisible by {heads} heads')
    values.setdefault('head_dim', width // heads)
    if heads % values['num_kv_heads']:
      problems.append(
        f'{heads} query heads cannot share '
        f'{values["num_kv_heads"]} key-value heads'
      )
  if values['positions'] == 'rotary' and values.get('head_dim', 0) % 2:
    problems.append(f'rotary needs an even head_dim, not {values["head_dim"]}')
  for field in dataclasses.fields(transformer.TransformerConfig):
    if field.default is dataclasses.MISSING and field.name not in values:
      names = [a for a, f in schema.fields.items() if f == field.name]
      if field.name != 'head_dim':  # Follows from two that are missing too.
        problems.append(f'{" or ".join(names)} is missing')
  if problems:
    raise ValueError(
      f'{source} cannot be translated faithfully:\n  ' + '\n  '.join(problems)
    )
  values['rope_theta'] = float(values['rope_theta'])
  values['norm_eps'] = float(values['norm_eps'])
  return transformer.TransformerConfig(**values)


def _wrong_type(value, kind) -> str | None:
  kind = kind if isinstance(kind, str) else kind.__name__
  if kind == 'int':
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
      return 'not a positive integer'
  elif kind == 'float':
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      return 'not a number'
  elif kind == 'bool' and not isinstance(value, bool):
    return 'not true or false'
  return None
