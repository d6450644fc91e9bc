"""Checkpoints from elsewhere: a Hugging Face folder or a GGUF file.

This file knows the containers (safetensors, shards, quantized blocks); what
the tensors are called and how they are laid out is `models/families`. Tensors
are read one at a time into the stacked arrays, so loading needs little more
memory than the parameters.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import gguf
import safetensors

from dpo_jax.data import tokenizers
from dpo_jax.models import families
from dpo_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model as it comes from disk.

  params: nested dict of float32 numpy arrays (see `transformer`).
  tokenizer: see `data/tokenizers`, or None where the checkpoint has none.
  """

  config: transformer.TransformerConfig
  params: dict[str, Any]
  tokenizer: Any


class _LazyTensor:
  """What `families` needs of a tensor: a shape, and its numbers on demand."""

  def __init__(self, shape, read):
    self.shape = tuple(int(size) for size in shape)
    self._read = read

  def __array__(self, dtype=None, copy=None):
    array = self._read()
    return array if dtype is None else array.astype(dtype)


def load(source) -> Loaded:
  """Loads a Hugging Face folder or a .gguf file."""
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    loaded = _load_folder(path)
  elif path.is_file() and path.suffix == '.gguf':
    loaded = _load_gguf(path)
  elif path.exists():
    raise ValueError(
      f'{path} is neither a folder nor a .gguf file; give a '
      'Hugging Face folder (config.json and model.safetensors) '
      'or a .gguf file.'
    )
  else:
    raise FileNotFoundError(
      f'{path} does not exist; give a Hugging Face folder or a .gguf file.'
    )
  size = loaded.config.vocab_size
  if loaded.tokenizer is not None and loaded.tokenizer.vocab_size > size:
    raise ValueError(
      f'The tokenizer of {path} has {loaded.tokenizer.vocab_size} tokens but '
      f'the embedding only {size} rows; they are not of the same model.'
    )
  return loaded


# --- Hugging Face folders ----------------------------------------------------


def _load_folder(folder: pathlib.Path) -> Loaded:
  attributes = read_json(folder / 'config.json')
  config = families.config_from_hf(attributes)
  family = families.family_of(attributes['model_type'])
  tensors = {}
  for path in _safetensors_files(folder):
    tensors.update(lazy_safetensors(path))
  try:
    params = families.from_hf(tensors, config, family=family)
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error
  return Loaded(
    config=config,
    params=params,
    tokenizer=tokenizers.from_folder(folder),
  )


def _safetensors_files(folder: pathlib.Path) -> list[pathlib.Path]:
  index = folder / 'model.safetensors.index.json'
  if (folder / 'model.safetensors').exists():
    return [folder / 'model.safetensors']
  if not index.exists():
    raise FileNotFoundError(
      f'{folder} has neither model.safetensors nor '
      'model.safetensors.index.json; pickled weights (.bin) are not read, '
      'save them with safe_serialization=True.'
    )
  files = [
    folder / name
    for name in sorted(set(read_json(index)['weight_map'].values()))
  ]
  missing = [path.name for path in files if not path.exists()]
  if missing:
    raise FileNotFoundError(
      f'{folder} lacks {len(missing)} of {len(files)} shards: '
      f'{", ".join(missing)}; download them too.'
    )
  return files


def lazy_safetensors(path: pathlib.Path) -> dict[str, _LazyTensor]:
  """Returns what `families` needs of a file's tensors; reads only a header."""
  try:
    file = safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is truncated or no safetensors file ({error}); '
      'download it again.'
    ) from error
  tensors = {}

  def read(name):
    dtype = file.get_slice(name).get_dtype()
    if dtype not in ('F64', 'F32', 'F16', 'BF16'):
      raise ValueError(
        f'{path.name}: {name} is stored as {dtype}; quantized weights are '
        'not supported, use the original checkpoint.'
      )
    return file.get_tensor(name)

  for name in file.keys():
    tensors[name] = _LazyTensor(
      file.get_slice(name).get_shape(), functools.partial(read, name)
    )
  return tensors


def read_json(path: pathlib.Path) -> dict:
  """Reads a file of a Hugging Face folder."""
  if not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist; a Hugging Face folder '
      'has config.json and model.safetensors.'
    )
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
      f'{path} is not JSON ({error}); download it again.'
    ) from error


# --- GGUF --------------------------------------------------------------------


def _load_gguf(path: pathlib.Path) -> Loaded:
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError, OverflowError) as error:
    raise ValueError(
      f'{path} is truncated, no GGUF file, or uses a quantization that the '
      f'gguf package does not know ({error}); download it again.'
    ) from error
  metadata = {name: field.contents() for name, field in reader.fields.items()}
  tensors = {tensor.name: _lazy_gguf(tensor) for tensor in reader.tensors}
  try:
    family = families.gguf_family(metadata)
    config = families.config_from_gguf(
      metadata, {name: tensor.shape for name, tensor in tensors.items()}
    )
    tokenizer = tokenizers.from_gguf(metadata)
    params = families.from_gguf(tensors, config, family=family)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return Loaded(config=config, params=params, tokenizer=tokenizer)


def _lazy_gguf(tensor) -> _LazyTensor:

  def read():
    try:
      return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise ValueError(
        f'{tensor.name} is quantized as {tensor.tensor_type.name}, which '
        'cannot be read; use an F16, Q8_0 or Q4 file.'
      ) from error

  # GGUF names the fastest dimension first.
  return _LazyTensor(tensor.shape[::-1], read)
