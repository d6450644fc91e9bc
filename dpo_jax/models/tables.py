"""The record that describes a model family: two schemas and one key table.

A key table says for every parameter what it is called elsewhere and how its
dimensions are laid out there. A layout such as '(NH)D->DNH' is explained in
`layouts`. Its letters are those of the project: V vocab, D model, N query
heads, K kv heads, H head dim, F mlp; and P positions, C parts of a fused
tensor, I = 2 halves of J = H / 2 rotary frequencies in a head.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping

from dpo_jax.models import schemas
from dpo_jax.models import transformer


@dataclasses.dataclass(frozen=True)
class Key:
  """One tensor elsewhere ('{}' is the layer) and its path or paths here."""

  paths: str
  hf: str
  layout: str
  gguf: str | None = None
  gguf_layout: str | None = None  # where a family `gguf_interleaves`
  when: Callable[[transformer.TransformerConfig], bool] = lambda _: True


@dataclasses.dataclass(frozen=True)
class Family:
  """What a family's checkpoints look like.

  name: its `model_type`.
  fixed: config field -> value that all models of the family have.
  keys: the key table.
  architecture: the class of transformers, which a config.json names.
  harmless_tensors: regular expression of tensors without learned numbers,
    which old checkpoints carry.
  hf_prefix: checkpoints of the bare decoder leave it out.
  gguf_interleaves: its rows of a head are in the order of `gguf_layout`.
  """

  name: str
  fixed: Mapping[str, object]
  hf: schemas.Schema
  keys: tuple[Key, ...]
  architecture: str
  harmless_tensors: str = r'(?!)'
  hf_prefix: str = ''
  gguf: schemas.Schema | None = None
  gguf_interleaves: bool = False


def no_table(config) -> bool:
  """Whether the unembedding is a tensor of its own."""
  return not config.tied
