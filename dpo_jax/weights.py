"""Checkpoints from elsewhere: a Hugging Face folder or a GGUF file.

This file knows the containers (safetensors, shards, quantized blocks); what
the tensors are called and how they are laid out is `models/families`. Opening
a checkpoint reads headers and nothing else. Then one tensor after the other is
read, not mapped (mapped pages count as memory), and goes to its place:
`assemble` makes numpy arrays, `place` puts each on its devices. So importing
takes the memory of the parameters and of one tensor.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from dpo_jax import folders
from dpo_jax import sharding
from dpo_jax.data import tokenizers
from dpo_jax.models import families
from dpo_jax.models import layouts
from dpo_jax.models import transformer

# What safetensors files call the types that are read.
DTYPES = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
INDEX = 'model.safetensors.index.json'
# What XLA on CPU takes without a copy of its own.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file: `np.asarray` reads it, every time again.

  stored: what the file calls its type. dtype: the type that holds its numbers
  exactly, or None where they cannot be read.
  """

  shape: tuple[int, ...]
  stored: str
  dtype: np.dtype | None
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None):
    array = self.read()
    return array if dtype is None else array.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """An opened checkpoint: all but its numbers.

  source: where it is. family: a key of `families.FAMILIES`.
  tokenizer: see `data/tokenizers`, or None where the checkpoint has none.
  attributes, generation: its config.json and generation_config.json, {} where
  there are none. tensors: {Hugging Face name: Tensor}, all that the config
  needs and no others; None: the parameters are random.
  read: returns the `layouts.Piece`s of the tensors.
  """

  source: str
  family: str
  config: transformer.TransformerConfig
  tokenizer: Any
  attributes: Mapping = dataclasses.field(default_factory=dict)
  generation: Mapping = dataclasses.field(default_factory=dict)
  tensors: Mapping[str, Tensor] | None = None
  read: Callable[[], Iterator[layouts.Piece]] | None = None

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """{path: shape} of all parameters."""
    family = families.family_of(self.family)
    return families.parameter_shapes(self.config, family=family)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model in memory: params is a nested dict of float32 numpy arrays."""

  config: transformer.TransformerConfig
  params: dict[str, Any]
  tokenizer: Any


def load(source) -> Loaded:
  """Loads a Hugging Face folder or a .gguf file into numpy arrays."""
  checkpoint = open_checkpoint(source)
  params = assemble(checkpoint, dtype='float32')
  return Loaded(checkpoint.config, params, checkpoint.tokenizer)


def open_checkpoint(source) -> Checkpoint:
  """Opens a Hugging Face folder or a .gguf file, and refuses what is wrong."""
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    checkpoint = _open_folder(path)
  elif path.is_file() and path.suffix == '.gguf':
    checkpoint = _open_gguf(path)
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
  _refuse_unreadable(path, checkpoint.tensors)
  size, tokenizer = checkpoint.config.vocab_size, checkpoint.tokenizer
  if tokenizer is not None and tokenizer.vocab_size > size:
    raise ValueError(
      f'The tokenizer of {path} has {tokenizer.vocab_size} tokens but '
      f'the embedding only {size} rows; they are not of the same model.'
    )
  return checkpoint


def _refuse_unreadable(path, tensors) -> None:
  unreadable = {}
  for name, tensor in tensors.items():
    if tensor.dtype is None:
      unreadable.setdefault(tensor.stored, []).append(name)
  if unreadable:
    lists = [f'{kind} ({_first(names)})' for kind, names in unreadable.items()]
    raise ValueError(
      f'{path} has tensors stored as {", ".join(lists)}, which cannot be read;'
      ' use the original checkpoint, or a GGUF file of an F16, Q8_0 or Q4 type.'
    )


def _first(names) -> str:
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def random(config, *, source, tokenizer) -> Checkpoint:
  """Returns a checkpoint of random parameters, the same every time."""
  family = families.family_like(config)
  return Checkpoint(
    source=source, family=family.name, config=config, tokenizer=tokenizer
  )


# --- Parameters --------------------------------------------------------------


def assemble(checkpoint: Checkpoint, *, dtype=None, progress=iter) -> dict:
  """Returns the parameters as a nested dict of numpy arrays.

  Args:
    checkpoint: opened.
    dtype: of all of them; None: as they are stored.
    progress: wraps the iterator of their pieces, such as `tqdm.tqdm`.
  """
  if checkpoint.tensors is None:
    make = jax.jit(
      lambda: _cast(_initial(checkpoint.config), lambda _: dtype or 'float32')
    )
    return jax.device_get(make())
  pieces = progress(checkpoint.read())
  return layouts.assemble(pieces, checkpoint.shapes, dtype=dtype)


def place(checkpoint: Checkpoint, shardings, *, dtype_of) -> dict:
  """Puts the parameters on devices as they are read.

  Args:
    checkpoint: opened.
    shardings: tree of NamedShardings, see `sharding.parameter_shardings`.
    dtype_of: function of a path such as 'layers/mlp/up'.

  Returns:
    The parameter tree. Its arrays own their memory: they may be donated.
  """
  if checkpoint.tensors is None:
    return jax.jit(
      lambda: _cast(_initial(checkpoint.config), dtype_of),
      out_shardings=shardings,
    )()
  found, shapes = {}, checkpoint.shapes
  for path, layer, array in checkpoint.read():
    where, dtype = layouts.at(shardings, path), dtype_of(path)
    if array.dtype == np.float64:  # unknown to JAX as it is set up
      array = array.astype(np.float32)
    if layer is None:
      value = _copied(sharding.put(array, where), dtype, where)
    else:
      if path not in found:
        found[path] = _zeros(shapes[path], dtype, where)
      inner = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
      value = _with_layer(found[path], sharding.put(array, inner), layer, where)
    # Else what is read runs ahead of what is placed, all of it in memory.
    found[path] = jax.block_until_ready(value)
    del array  # before the next is read
  return layouts.tree(found)


def dtype_named(name: str) -> np.dtype:
  """Returns 'bfloat16' as the type that numpy alone does not know."""
  return next(dtype for dtype in DTYPES.values() if dtype.name == name)


def _initial(config):
  return nn.unbox(transformer.init_params(config, jax.random.key(0)))


def _cast(params, dtype_of):
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(dtype_of('/'.join(key.key for key in path))),
    params,
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _copied(array, dtype, where):
  # What was put may alias host memory on CPU, and the training step will donate
  # these buffers: a jitted copy owns its own.
  copy = jnp.copy(array).astype(dtype)
  return jax.lax.with_sharding_constraint(copy, where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, where):
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _with_layer(stack, array, layer, where):
  """Writes one layer, in place because the stack is donated."""
  stack = jax.lax.dynamic_update_index_in_dim(
    stack, array.astype(stack.dtype), layer, 0
  )
  return jax.lax.with_sharding_constraint(stack, where)


def _read_bytes(path, offset: int, size: int) -> np.ndarray:
  """Reads a part of a file into memory that starts where XLA wants it."""
  room = np.empty(size + _ALIGNMENT, np.uint8)
  start = -room.ctypes.data % _ALIGNMENT
  data = room[start : start + size]
  with open(path, 'rb') as file:
    file.seek(offset)
    if file.readinto(data) != size:
      raise ValueError(f'{path} ends early; it changed while it was read.')
  return data


# --- Hugging Face folders ----------------------------------------------------


def _open_folder(folder: pathlib.Path) -> Checkpoint:
  if folders.is_part(folder):
    raise ValueError(
      f'{folder} is what an export that was killed left behind; remove it and '
      'export again.'
    )
  attributes = read_json(folder / 'config.json')
  config = families.config_from_hf(attributes)
  family = families.family_of(attributes['model_type'])
  try:
    tensors = families.hf_tensors(
      _folder_tensors(folder), config, family=family
    )
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from error
  generation = folder / 'generation_config.json'
  return Checkpoint(
    source=str(folder),
    family=family.name,
    config=config,
    tokenizer=tokenizers.from_folder(folder),
    attributes=attributes,
    generation=read_json(generation) if generation.exists() else {},
    tensors=tensors,
    read=lambda: families.hf_pieces(tensors, config, family=family),
  )


def _folder_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  if (folder / 'model.safetensors').exists():
    return read_headers(folder / 'model.safetensors')
  if not (folder / INDEX).exists():
    found = sorted(path.name for path in folder.glob('*.safetensors'))
    what = f'; it has {", ".join(found)}, but no index' if found else ''
    raise FileNotFoundError(
      f'{folder} has neither model.safetensors nor {INDEX}{what}. Download '
      'what is missing; pickled weights (.bin) are not read, save them with '
      'safe_serialization=True.'
    )
  places = read_json(folder / INDEX).get('weight_map')
  if not isinstance(places, dict) or not all(
    isinstance(file, str) and pathlib.Path(file).name == file
    for file in places.values()
  ):
    raise ValueError(
      f'{folder / INDEX} has no weight_map from tensors to files beside it; '
      'download it again.'
    )
  files = [folder / name for name in sorted(set(places.values()))]
  missing = [path.name for path in files if not path.exists()]
  if missing:
    raise FileNotFoundError(
      f'{folder} lacks {len(missing)} of {len(files)} shards: '
      f'{", ".join(missing)}; download them too.'
    )
  shards = _files_tensors(files)
  wrong = [
    f'{name} is not in {file}'
    for name, file in places.items()
    if name not in shards[file]
  ]
  wrong += [
    f'{name} is in {file}, which the index does not say'
    for file, tensors in shards.items()
    for name in tensors
    if places.get(name) != file
  ]
  if wrong:
    raise ValueError(
      f'the index and its shards do not fit: {"; ".join(wrong)}. Download '
      'them again, all of the same revision.'
    )
  return {name: shards[file][name] for name, file in places.items()}


def read_headers(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a safetensors file, without their numbers."""
  tensors = _files_tensors([path])[path.name]
  _refuse_unreadable(path, tensors)
  return tensors


def _files_tensors(paths) -> dict[str, dict[str, Tensor]]:
  """Reads the headers: {name of a file: {name: Tensor}}."""
  found, wrong = {}, []
  for path in paths:
    try:
      # It checks that header and length fit; the rest is read without it.
      with safetensors.safe_open(path, framework='numpy'):
        pass
    except safetensors.SafetensorError as error:
      wrong.append(f'{path.name} is truncated or no safetensors file ({error})')
    else:
      found[path.name] = _safetensors(path)
  if wrong:
    raise ValueError(f'{"; ".join(wrong)}; download it again.')
  return found


def _safetensors(path: pathlib.Path) -> dict[str, Tensor]:
  with open(path, 'rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(length))
  header.pop('__metadata__', None)
  tensors = {}
  for name, entry in header.items():
    begin, end = entry['data_offsets']
    dtype, shape = DTYPES.get(entry['dtype']), tuple(entry['shape'])

    def read(begin=begin, end=end, dtype=dtype, shape=shape):
      data = _read_bytes(path, 8 + length + begin, end - begin)
      return data.view(dtype).reshape(shape)

    tensors[name] = Tensor(shape, entry['dtype'], dtype, read)
  return tensors


def read_json(path: pathlib.Path) -> dict:
  """Reads a file of a Hugging Face folder."""
  if not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist; a Hugging Face folder '
      'has config.json and model.safetensors.'
    )
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
      f'{path} is not JSON ({error}); download it again.'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} is not a JSON object; download it again.')
  return value


# --- GGUF --------------------------------------------------------------------


def _open_gguf(path: pathlib.Path) -> Checkpoint:
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError, OverflowError) as error:
    raise ValueError(
      f'{path} is truncated, no GGUF file, or uses a quantization that the '
      f'gguf package does not know ({error}); download it again.'
    ) from error
  metadata = {name: field.contents() for name, field in reader.fields.items()}
  tensors = {
    tensor.name: _gguf_tensor(path, tensor) for tensor in reader.tensors
  }
  try:
    family = families.gguf_family(metadata)
    config = families.config_from_gguf(
      metadata, {name: tensor.shape for name, tensor in tensors.items()}
    )
    tokenizer = tokenizers.from_gguf(metadata)
    tensors = families.gguf_tensors(tensors, config, family=family)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  return Checkpoint(
    source=str(path),
    family=family.name,
    config=config,
    tokenizer=tokenizer,
    tensors=tensors,
    read=lambda: families.gguf_pieces(tensors, config, family=family),
  )


def _gguf_tensor(path, tensor) -> Tensor:
  """Describes a tensor without keeping the file mapped."""
  kind, stored = tensor.tensor_type, tensor.data.dtype
  raw_shape, offset = tensor.data.shape, int(tensor.data_offset)
  # GGUF names the fastest dimension first.
  shape = tuple(int(size) for size in tensor.shape[::-1])
  dtype = DTYPES.get(kind.name)
  if dtype is None and _dequantizes(kind):
    dtype = np.dtype('float32')

  def read():
    size = int(np.prod(raw_shape)) * stored.itemsize
    data = _read_bytes(path, offset, size).view(stored).reshape(raw_shape)
    if kind.name in DTYPES:
      return data.view(dtype).reshape(shape)
    return gguf.quants.dequantize(data, kind)

  return Tensor(shape, kind.name, dtype, read)


@functools.cache
def _dequantizes(kind) -> bool:
  """Whether the gguf package can read a type: it tries one block of zeros."""
  _, size = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
  except NotImplementedError:
    return False
  return True
