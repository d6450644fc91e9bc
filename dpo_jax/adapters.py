"""Adapters from elsewhere: a folder of the library PEFT, read and written.

This file knows adapter_config.json and the container; what the tensors are
called and how they are laid out is `models/pefts`. An attribute that is neither
implemented nor known to be harmless is refused by name.

What round trips: a folder of float32 that `load` takes is written again by
`save` with the same tensors, bit for bit. An adapter that `save` writes is
loaded again bit for bit, except weights that are fused elsewhere (q, k and v of
GPT-2 and GPT-NeoX) and differ in a: those come back with one a of the sum of
their ranks, and the same products.
"""

import json
import math
import pathlib
import re

import safetensors.numpy

from dpo_jax import folders
from dpo_jax import weights
from dpo_jax.models import lora
from dpo_jax.models import pefts

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'

HANDLED = frozenset(
  'r lora_alpha rank_pattern alpha_pattern use_rslora target_modules'
  ' exclude_modules'.split()
)
# Initializations that leave the base weights alone. Others (PiSSA, OLoRA,
# CorDA, LoftQ, LoRA-GA) subtract the first product from them: such an adapter
# belongs to weights that are in no folder.
_INITS = (True, False, 'gaussian', 'eva', 'orthogonal')
_OFF = (None, False, [], {})
ONLY = {
  'peft_type': ('LORA',),
  'task_type': ('CAUSAL_LM', None),
  'bias': ('none',),
  'init_lora_weights': _INITS,
} | dict.fromkeys(
  'alora_invocation_tokens arrow_config corda_config ensure_weight_tying'
  ' kasa_config layer_replication layers_pattern layers_to_transform'
  ' loftq_config lora_bias lora_ga_config megatron_config modules_to_save'
  ' monteclora_config target_parameters trainable_token_indices use_bdlora'
  ' use_dora use_qalora velora_config'.split(),
  _OFF,
)
# Training, bookkeeping, options of what is off, and what follows from the base.
HARMLESS = frozenset(
  'auto_mapping base_model_name_or_path eva_config fan_in_fan_out'
  ' inference_mode lora_dropout megatron_core merge_weights peft_version'
  ' qalora_group_size revision'.split()
)


def load(folder, config, *, family):
  """Loads a PEFT folder for a model of `config`.

  Returns (adapter, lora.Lora): a tree of float32 numpy arrays. Ranks of weights
  may differ; each counts `Lora.scale` times.
  """
  folder = pathlib.Path(folder).expanduser()
  attributes = _attributes(folder)
  tensors = weights.read_headers(folder / WEIGHTS)
  try:
    _refuse(attributes)
    linears = pefts.linears(config, family=family)
    ranks, scale = _ranks(attributes, linears, config.num_layers)
    adapter = pefts.from_peft(tensors, ranks, config, family=family)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error
  rank, alpha = attributes['r'], attributes['lora_alpha']
  same = math.isclose(alpha / rank, scale, rel_tol=1e-9)
  return adapter, lora.Lora(
    targets='|'.join(
      name
      for linear in linears
      if linear.module in ranks
      for name in linear.names
    ),
    rank=rank,
    alpha=float(alpha if same else scale * rank),
    init='b_zero',
  )


def save(folder, adapter, kind, config, *, family, base, overwrite=False):
  """Writes a folder that PEFT loads, whole or not at all: {file: bytes}.

  Args:
    folder: must not exist, unless `overwrite` and PEFT's.
    adapter: tree of arrays, without their boxes.
    kind: `lora.Lora`, of which the scale counts; ranks are the adapter's.
    base: name or path of the model under the adapter.
  """
  folder = pathlib.Path(folder).expanduser()
  check_target(folder, overwrite=overwrite)
  tensors, ranks = pefts.to_peft(adapter, config, family=family)
  attributes = _describe(
    ranks, kind, pefts.linears(config, family=family), base
  )
  with folders.whole(folder) as partial:
    safetensors.numpy.save_file(
      tensors, partial / WEIGHTS, metadata={'format': 'pt'}
    )
    (partial / CONFIG).write_text(
      json.dumps(attributes, indent=2) + '\n', encoding='utf-8'
    )
    return {path.name: path.stat().st_size for path in partial.iterdir()}


def check_target(folder, *, overwrite):
  """Refuses to write where something is, unless it is an adapter to replace."""
  folders.check_target(
    folder,
    overwrite=overwrite,
    what='an adapter of PEFT',
    is_ours=lambda path: (path / CONFIG).is_file(),
  )


# --- Reading -----------------------------------------------------------------


def _attributes(folder) -> dict:
  for name, hint in (
    (CONFIG, 'give a folder that PEFT saved'),
    (WEIGHTS, 'pickled weights (.bin) are not read, save it again'),
  ):
    if not (folder / name).is_file():
      raise FileNotFoundError(f'{folder} has no {name}; {hint}.')
  attributes = weights.read_json(folder / CONFIG)
  return attributes


def _refuse(attributes):
  """Raises a ValueError that lists every attribute we do not implement."""
  problems = []
  for name, value in attributes.items():
    if name in ONLY:
      if not any(_identical(value, good) for good in ONLY[name]):
        good = ' or '.join(map(repr, ONLY[name]))
        problems.append(f'{name} = {value!r} (only {good} is implemented)')
    # PEFT grows options with every version; null is its word for off.
    elif name not in HANDLED | HARMLESS and value is not None:
      problems.append(f'{name} = {value!r} (unknown)')
  if 'peft_type' not in attributes:
    problems.append('peft_type is missing')
  for name, fits, what in _TYPES:
    if not fits(attributes.get(name)):
      problems.append(f'{name} = {attributes.get(name)!r} (not {what})')
  if problems:
    raise ValueError(
      f'{CONFIG} cannot be translated faithfully:\n  ' + '\n  '.join(problems)
    )


def _identical(value, good):
  """Equality for which 0 is not False."""
  return type(value) is type(good) and value == good


def _is_rank(value):
  return type(value) is int and value > 0


def _is_alpha(value):
  return type(value) in (int, float) and 0 < value < 1e38


def _is_pattern(is_number):
  return lambda value: (
    value is None
    or (
      isinstance(value, dict)
      and all(_is_regex(key) and is_number(x) for key, x in value.items())
    )
  )


def _is_regex(value):
  try:
    re.compile(value)
    re.compile(rf'(.*\.)?({value})$')  # as `_pattern` does
  except (re.error, TypeError):
    return False
  return True


def _is_selection(value):
  return (
    _is_regex(value)
    if isinstance(value, str)
    else isinstance(value, list) and all(isinstance(x, str) for x in value)
  )


_TYPES = (
  ('r', _is_rank, 'a positive integer'),
  ('lora_alpha', _is_alpha, 'a positive number'),
  (
    'rank_pattern',
    _is_pattern(_is_rank),
    'regular expressions with positive integers',
  ),
  (
    'alpha_pattern',
    _is_pattern(_is_alpha),
    'regular expressions with positive numbers',
  ),
  ('use_rslora', lambda x: x in (None, False, True), 'true or false'),
  ('target_modules', _is_selection, 'names or a regular expression'),
  (
    'exclude_modules',
    lambda x: x is None or _is_selection(x),
    'names or a regular expression',
  ),
)


def _ranks(attributes, linears, layers):
  """Returns ({module: R} of what is adapted, the scale of all), or refuses."""
  ranks, scales, problems = {}, {}, []
  for linear in linears:
    modules = [linear.module.format(layer) for layer in range(layers)]
    adapted = [name for name in modules if _is_adapted(attributes, name)]
    if not adapted:
      continue
    if adapted != modules:
      problems.append(
        f'target_modules = {len(adapted)} of {layers} layers of'
        f' {linear.suffix} (only all of them is implemented)'
      )
    own = {_pattern(attributes, 'rank_pattern', 'r', name) for name in modules}
    if len(own) > 1:
      problems.append(
        f'rank_pattern gives {linear.suffix} the ranks {sorted(own)} (only one'
        ' rank for all layers is implemented)'
      )
    ranks[linear.module] = own.pop()
    scales |= {name: _scale(attributes, name) for name in modules}
  low, high = (
    extreme(scales, key=scales.get, default=None) for extreme in (min, max)
  )
  if not ranks:
    problems.append(
      f'target_modules = {attributes["target_modules"]!r} matches none of'
      f' {", ".join(linear.suffix for linear in linears)}'
    )
  elif not math.isclose(scales[low], scales[high], rel_tol=1e-9):
    problems.append(
      f'alpha / rank is {scales[low]:g} for {low} and {scales[high]:g} for'
      f' {high} (only one for all is implemented)'
    )
  if problems:
    raise ValueError(
      f'{CONFIG} cannot be translated faithfully:\n  ' + '\n  '.join(problems)
    )
  return ranks, scales[low]


def _is_adapted(attributes, module):
  """Whether PEFT adapts it (`check_target_module_exists` there)."""
  excluded = attributes.get('exclude_modules') or []
  return _selects(attributes['target_modules'], module) and not _selects(
    excluded, module
  )


def _selects(selection, module):
  if isinstance(selection, str):
    return selection.lower() == 'all-linear' or bool(
      re.fullmatch(selection, module)
    )
  return any(
    module == name or module.endswith(f'.{name}') for name in selection
  )


def _pattern(attributes, patterns, default, module):
  """Returns what PEFT finds for a module (`get_pattern_key` there)."""
  for key, value in (attributes.get(patterns) or {}).items():
    if re.match(rf'(.*\.)?({key})$', module):
      return value
  return attributes[default]


def _scale(attributes, module):
  rank = _pattern(attributes, 'rank_pattern', 'r', module)
  alpha = _pattern(attributes, 'alpha_pattern', 'lora_alpha', module)
  # arXiv:2312.03732: the scale of a rank-stabilized adapter.
  return alpha / (math.sqrt(rank) if attributes.get('use_rslora') else rank)


# --- Writing -----------------------------------------------------------------


def _describe(ranks, kind, linears, base) -> dict:
  adapted = [linear for linear in linears if linear.module in ranks]
  others = [linear for linear in linears if linear.module not in ranks]
  targets = []
  for linear in adapted:
    # As short as PEFT's own, where that means no other weight: c_proj of
    # GPT-2 is in the attention and in the mlp.
    last = linear.suffix.rsplit('.', 1)[-1]
    is_clear = not any(x.suffix.endswith(f'.{last}') for x in others)
    targets.append(last if is_clear else linear.suffix)
  unusual = {
    linear.suffix: ranks[linear.module]
    for linear in adapted
    if ranks[linear.module] != kind.rank
  }
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'inference_mode': True,
    'r': kind.rank,
    'lora_alpha': _short(kind.alpha),
    'rank_pattern': unusual,
    'alpha_pattern': {
      suffix: _short(kind.alpha * rank / kind.rank)
      for suffix, rank in unusual.items()
    },
    'target_modules': sorted(set(targets)),
    'fan_in_fan_out': any(linear.inputs_first for linear in adapted),
    'bias': 'none',
    'lora_dropout': 0.0,
  }


def _short(value):
  return int(value) if value == int(value) else value
