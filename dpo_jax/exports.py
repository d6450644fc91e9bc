"""Models as Hugging Face folders, for transformers and all that reads them.

    config.json                   the source's own, or made from our config
    model.safetensors             or shards of it and an index
    tokenizer.json, ...           what the tokenizer came from
    generation_config.json        what ends a response

Import reversed: the same key table names and lays out the tensors, each in the
type its source stored it in, so what was imported is exported bit for bit. A
folder is written under a temporary name and moved when it is complete; under
its final name there is never half of one.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from dpo_jax import folders
from dpo_jax import weights
from dpo_jax.models import families

# --dtype: what numbers are stored as; auto is the source's type of each tensor.
DTYPES = ('auto', 'float32', 'bfloat16', 'float16')
_STORED = {dtype.name: name for name, dtype in weights.DTYPES.items()}
_UNITS = {'': 1, 'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12}


@dataclasses.dataclass(frozen=True)
class Model:
  """Parameters in memory and all that a folder needs besides.

  checkpoint: what they are a model of; gives config, family, tokenizer and the
  attributes of config.json. params: nested dict of numpy arrays.
  dtypes: {Hugging Face name: numpy dtype}, in which each tensor is written.
  stored: how many tensors the source stores as which type.
  """

  checkpoint: weights.Checkpoint
  params: Any
  dtypes: Mapping[str, np.dtype]
  stored: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Written:
  """Account of a folder: {file: bytes}, and how often a type was stored."""

  files: dict[str, int]
  dtypes: dict[str, int]


def with_parameters(checkpoint, params) -> Model:
  """Returns a model with parameters of ours, to be written as float32."""
  kind, names = weights.dtype_named('float32'), list(tensor_shapes(checkpoint))
  return Model(
    checkpoint, params, dict.fromkeys(names, kind), {kind.name: len(names)}
  )


def tensor_shapes(checkpoint):
  """{Hugging Face name: shape} of all tensors of a model."""
  family = families.family_of(checkpoint.family)
  return families.hf_shapes(checkpoint.config, family=family)


def write(
  model: Model, folder, *, shard_size: int, overwrite: bool = False
) -> Written:
  """Writes the Hugging Face folder of a model, whole or not at all."""
  folder = pathlib.Path(folder).expanduser().absolute()
  check_target(folder, overwrite=overwrite)
  with folders.whole(folder) as partial:
    _write_tensors(model, partial, shard_size)
    if model.checkpoint.tokenizer is not None:
      model.checkpoint.tokenizer.save(partial)
    for name, content in (
      ('generation_config.json', _generation(model)),
      ('config.json', _attributes(model)),
    ):
      (partial / name).write_text(json.dumps(content, indent=2) + '\n')
    sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
  return Written(
    files=dict(sorted(sizes.items())),
    dtypes=collections.Counter(kind.name for kind in model.dtypes.values()),
  )


def check_target(folder, *, overwrite: bool) -> None:
  """Refuses to write where something is, unless it is a model to replace."""
  folders.check_target(
    folder, overwrite=overwrite, what='a Hugging Face model', is_ours=_is_model
  )


def _is_model(folder: pathlib.Path) -> bool:
  try:
    return 'model_type' in json.loads((folder / 'config.json').read_text())
  except (OSError, ValueError):
    return False


def parse_size(text: str) -> int:
  """Returns the bytes of '5GB', '500MB' or a plain number."""
  match = re.fullmatch(r'([\d.]+)\s*([KMGT]?B?)', str(text).strip().upper())
  unit = match and _UNITS.get(match[2] if match[2] != 'B' else '')
  try:
    size = int(float(match[1]) * unit)
  except (TypeError, ValueError):
    size = 0
  if size < 1:
    raise ValueError(f'shard_size is {text!r}; write it as in 5GB or 500MB')
  return size


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
  """Returns {file: tensors}: in order, as many in a file as `limit` holds."""
  shards, room = [], 0
  for name, size in sizes.items():
    if not shards or size > room:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= size
  if len(shards) == 1:
    return {'model.safetensors': shards[0]}
  return {
    f'model-{i:05}-of-{len(shards):05}.safetensors': names
    for i, names in enumerate(shards, start=1)
  }


def _write_tensors(model, folder, shard_size) -> None:
  """Writes one tensor after the other, as safetensors lays them out.

  The library would hold a whole file in memory, twice.
  """
  config = model.checkpoint.config
  family = families.family_of(model.checkpoint.family)
  shapes, dtypes = tensor_shapes(model.checkpoint), model.dtypes
  sizes = {
    name: int(np.prod(shape)) * dtypes[name].itemsize
    for name, shape in shapes.items()
  }
  shards = plan_shards(sizes, shard_size)
  places = {name: file for file, names in shards.items() for name in names}
  offsets = {}
  for file, names in shards.items():
    header, at = {'__metadata__': {'format': 'pt'}}, 0
    # Large types first: then every tensor begins at a multiple of its own.
    for name in sorted(names, key=lambda n: (-dtypes[n].itemsize, n)):
      header[name] = {
        'dtype': _STORED[dtypes[name].name],
        'shape': shapes[name],
        'data_offsets': [at, at + sizes[name]],
      }
      offsets[name] = at
      at += sizes[name]
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(folder / file, 'wb') as out:
      out.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      offsets[name] += 8 + len(text)
  tensors = families.to_hf(model.params, config, family=family)
  for name, array in tqdm.tqdm(
    tensors, total=len(shapes), desc='writing', unit=' tensors'
  ):
    array = np.ascontiguousarray(array.astype(dtypes[name], copy=False))
    with open(folder / places[name], 'r+b') as out:
      out.seek(offsets[name])
      out.write(array.reshape(-1).view(np.uint8))
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': dict(sorted(places.items())),
    }
    (folder / weights.INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _attributes(model) -> dict:
  """Returns config.json: the source's own where it had one."""
  checkpoint = model.checkpoint
  attributes = dict(checkpoint.attributes)
  if not attributes:
    family = families.family_of(checkpoint.family)
    attributes = families.config_to_hf(checkpoint.config, family=family)
    attributes |= _ids(checkpoint.tokenizer)
  # Most numbers are of this type; transformers loads all of them as it.
  sizes = collections.Counter()
  for name, shape in tensor_shapes(checkpoint).items():
    sizes[model.dtypes[name].name] += int(np.prod(shape))
  ((largest, _),) = sizes.most_common(1)
  # The first is what it was called until transformers 4.56.
  said = [name for name in ('torch_dtype', 'dtype') if name in attributes]
  return attributes | dict.fromkeys(said or ('torch_dtype', 'dtype'), largest)


def _generation(model) -> dict:
  """Returns generation_config.json: the source's own where it had one."""
  checkpoint = model.checkpoint
  return dict(checkpoint.generation) or _ids(checkpoint.tokenizer)


def _ids(tokenizer) -> dict:
  if tokenizer is None:
    return {}
  ends = list(tokenizer.eos_ids)
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': ends if len(ends) > 1 else ends[0],
  }
