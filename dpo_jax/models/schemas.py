"""Configs of other libraries, translated attribute by attribute or refused.

A schema refuses every attribute that it neither translates nor knows to be
harmless: a config that asks for something our decoder does not do is an error
and never a silently different model.
"""

import dataclasses
import typing
from collections.abc import Callable
from collections.abc import Mapping

from dpo_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Windows:
  """How a kind of config says which layers have a sliding window.

  names: all attributes that have to do with it.
  default: the window where `sliding_window` is absent.
  has: (layer, attributes) -> bool, where `layer_types` is absent;
    `attributes['sliding_window']` is always there.
  """

  names: frozenset[str]
  default: int
  has: Callable[[int, Mapping], bool]

  def read(self, attributes: Mapping) -> dict:
    """Returns the fields `window` and `windowed`, or raises ValueError."""
    attributes = {'sliding_window': self.default, **attributes}
    for name, least in [
      ('sliding_window', 1),
      ('sliding_window_pattern', 1),
      ('max_window_layers', 0),
    ]:
      value = attributes.get(name)
      if value is None and name != 'sliding_window':
        attributes.pop(name, None)
      elif value is not None and (type(value) is not int or value < least):
        raise ValueError(f'{name} = {value!r} (not an integer >= {least})')
    window, layers = (
      attributes.get(name) for name in ('sliding_window', 'num_hidden_layers')
    )
    if type(layers) is not int:
      return {}  # Refused elsewhere.
    kinds = attributes.get('layer_types')
    if kinds is None:
      windowed = [bool(self.has(i, attributes)) for i in range(layers)]
    else:
      known = ('full_attention', 'sliding_attention')
      if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in known for kind in kinds)
      ):
        raise ValueError(
          f'layer_types = {kinds!r} (only {" or ".join(map(repr, known))} for'
          f' each of the {layers} layers is implemented)'
        )
      windowed = [kind == 'sliding_attention' for kind in kinds]
    if not any(windowed):
      return {}
    switch = 'use_sliding_window'
    if window is None or not attributes.get(switch, switch not in self.names):
      raise ValueError(
        f'layers have windows, but sliding_window = {window!r} and {switch} ='
        f' {attributes.get(switch)!r}'
      )
    return {'window': window, 'windowed': tuple(windowed)}

  def write(self, config) -> dict:
    """Returns the attributes that `read` takes to the config's fields."""
    windowed = config.windowed or (False,) * config.num_layers
    says = {
      'sliding_window': config.window,
      'use_sliding_window': any(windowed),
      'layer_types': [
        'sliding_attention' if has else 'full_attention' for has in windowed
      ],
    }
    return {name: value for name, value in says.items() if name in self.names}


@dataclasses.dataclass(frozen=True)
class Schema:
  """How one kind of config is read.

  Attributes of nested dicts are addressed with dots, as in
  'rope_parameters.rope_theta'.

  fields: attribute -> TransformerConfig field, or several with one value.
  words: attribute of `fields` -> {its value: the field's value}.
  only: attribute -> the values under which our decoder is the same model.
  harmless: attributes that do not change what the model computes.
  absent: fields no attribute has to give, and the family's value for them.
  whole: attributes that other readers want as integers, not as 256.0.
  windows: which layers have a sliding window, None: no family's has.
  """

  fields: Mapping[str, str]
  only: Mapping[str, tuple]
  harmless: frozenset[str]
  absent: Mapping[str, object]
  words: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
  whole: frozenset[str] = frozenset()
  windows: Windows | None = None


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
}
NO_WINDOW = {'sliding_window': (None,), 'use_sliding_window': (False,)}
ROPE_ONLY = {
  'rope_interleaved': (False, None),
  'rope_parameters': (None,),
  'rope_scaling': (None,),
}


def rope_fields(*places: str) -> dict[str, str]:
  """Returns the `fields` of rotary embeddings described in these dicts."""
  fields = {'rope_theta': 'rope_theta'}
  for place in places:
    fields |= {
      f'{place}.rope_theta': 'rope_theta',
      f'{place}.rope_type': 'rope_scaling',
      f'{place}.type': 'rope_scaling',
      f'{place}.factor': 'rope_factor',
      f'{place}.low_freq_factor': 'rope_low_freq_factor',
      f'{place}.high_freq_factor': 'rope_high_freq_factor',
      f'{place}.original_max_position_embeddings': 'rope_original_positions',
    }
  return fields


def rope_words(*places: str) -> dict[str, dict[str, str]]:
  """Returns the `words` that go with `rope_fields`."""
  words = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3'}
  return {
    f'{p}.{name}': words for p in places for name in ('rope_type', 'type')
  }


ROPE_FIELDS = rope_fields('rope_parameters', 'rope_scaling')
ROPE_WORDS = rope_words('rope_parameters', 'rope_scaling')


def _flat(attributes: Mapping, prefix: str = '') -> dict:
  """Addresses nested attributes with dots; a dict nobody nests stays one."""
  flat = {}
  for name, value in attributes.items():
    inside = prefix or name.startswith('rope_')
    if inside and isinstance(value, Mapping) and value:
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
    field.name: typing.get_args(field.type) or (field.type,)
    for field in dataclasses.fields(transformer.TransformerConfig)
  }
  attributes = _flat(attributes)
  values, problems = {}, []
  for name, value in attributes.items():
    if name in schema.fields:
      field = schema.fields[name]
      if value is None and type(None) not in types[field]:
        continue
      if name in schema.words:
        words = schema.words[name]
        if value not in list(words):
          problems.append(_refusal(name, value, words))
          continue
        value = words[value]
      wrong = _wrong_type(value, types[field])
      if wrong:
        problems.append(f'{name} = {value!r} ({wrong})')
      elif values.setdefault(field, value) != value:
        problems.append(
          f'{name} = {value!r} (another attribute says {values[field]!r})'
        )
    elif name in schema.only:
      if value not in schema.only[name]:
        problems.append(_refusal(name, value, schema.only[name]))
    elif schema.windows and name in schema.windows.names:
      pass  # read together below
    elif name not in schema.harmless:
      problems.append(f'{name} = {value!r} (unknown attribute)')
  if schema.windows:
    try:
      known = {
        name: value
        for name, value in attributes.items()
        if name in schema.windows.names or name == 'num_hidden_layers'
      }
      values |= schema.windows.read(known)
    except ValueError as error:
      problems.append(str(error))
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
  if not problems:
    for field, value in values.items():
      values[field] = float(value) if float in types[field] else value
    try:
      return transformer.TransformerConfig(**values)
    except ValueError as error:
      problems.append(str(error))
  raise ValueError(
    f'{source} cannot be translated faithfully:\n  ' + '\n  '.join(problems)
  )


def untranslate(schema: Schema, config) -> dict:
  """Returns attributes that `translate` takes to this config.

  Every name of an attribute is written, for readers of all years, but nothing
  in `rope_parameters`, which old ones skip: new ones know the others, too.
  """
  defaults = {f.name: f.default for f in dataclasses.fields(config)}
  attributes = {}
  for name, field in schema.fields.items():
    value, default = getattr(config, field), defaults[field]
    place, _, inner = name.rpartition('.')
    if place.startswith('rope_parameters') or (
      place and (value == default or default is dataclasses.MISSING)
    ):
      continue
    if name in schema.words:
      words = schema.words[name].items()
      value = next(word for word, meant in words if meant == value)
    if name in schema.whole and value is not None and value == int(value):
      value = int(value)
    if place:
      attributes.setdefault(place, {})[inner] = value
    else:
      attributes[name] = value
  # Which function the mlp has is a word that others look for.
  for name, values in schema.only.items():
    if isinstance(values[0], str) and '.' not in name:
      attributes[name] = values[0]
  if schema.windows:
    attributes |= schema.windows.write(config)
  return attributes


def _refusal(name, value, allowed) -> str:
  allowed = ' or '.join(repr(v) for v in allowed)
  return f'{name} = {value!r} (only {allowed} is implemented)'


def _wrong_type(value, kinds) -> str | None:
  """Says what is wrong with a value that shall be of one of these types."""
  if value is None and type(None) in kinds:
    return None
  if int in kinds:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
      return 'not a positive integer'
  elif float in kinds:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      return 'not a number'
  elif bool in kinds and not isinstance(value, bool):
    return 'not true or false'
  return None
