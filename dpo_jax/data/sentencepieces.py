"""SentencePiece models as the content of a tokenizer.json.

They are converted, not run by the `sentencepiece` package: a GGUF file has the
pieces but no model file, one library then does everything (added tokens,
batches, export), and the space before a text stays in our hands. What the
conversion gives is held against the package by golden files.

A model file is a protocol buffer; of its few fields (sentencepiece_model.proto)
those that decide an encoding are read, and what we would do wrong is refused.
"""

import base64
import dataclasses
import struct
from collections.abc import Iterator
from collections.abc import Sequence

import tokenizers

from dpo_jax.data import subwords

# Types of pieces, here and in GGUF's `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = '▁'


@dataclasses.dataclass(frozen=True)
class Model:
  """What decides how a SentencePiece model encodes.

  kind: 'bpe' or 'unigram'. prefix: it puts a space before a text. collapsed:
  several spaces become one. charsmap: a compiled normalizer, or b''.
  """

  pieces: Sequence[str]
  scores: Sequence[float]
  types: Sequence[int]
  kind: str
  prefix: bool = True
  collapsed: bool = False
  charsmap: bytes = b''
  unk_id: int = 0
  bos_id: int = -1
  eos_id: int = -1
  pad_id: int = -1


# --- The file ---


def parse(data: bytes) -> Model:
  """Reads the bytes of a tokenizer.model."""
  try:
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
      if number == 1:
        piece = dict(_fields(value))
        score = struct.unpack('<f', piece.get(2, b'\0\0\0\0'))[0]
        pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
      elif number == 2:
        trainer = dict(_fields(value))
      elif number == 3:
        normalizer = dict(_fields(value))
  except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
    raise ValueError(
      f'truncated or no SentencePiece model ({error or "ends early"}); '
      'download it again'
    ) from error
  if not (pieces and trainer and normalizer):
    raise ValueError('truncated SentencePiece model; download it again')
  # Defaults are those of the .proto; absent fields have them.
  kind = {1: 'unigram', 2: 'bpe'}.get(trainer.get(3, 1))
  if kind is None:
    raise ValueError(
      'a SentencePiece model of words or characters is not supported, only '
      'bpe and unigram; save the tokenizer with transformers, which writes '
      'tokenizer.json'
    )
  for fields, number, usual, what in (
    (trainer, 24, 0, 'treat_whitespace_as_suffix'),
    (normalizer, 5, 1, 'escape_whitespaces'),
  ):
    if fields.get(number, usual) != usual:
      raise ValueError(
        f'a SentencePiece model with {what} other than usual is not supported; '
        'save the tokenizer with transformers, which writes tokenizer.json'
      )
  texts, scores, types = zip(*pieces)
  return Model(
    texts,
    scores,
    types,
    kind=kind,
    prefix=bool(normalizer.get(3, 1)),
    collapsed=bool(normalizer.get(4, 1)),
    charsmap=normalizer.get(2, b''),
    unk_id=_signed(trainer.get(40, 0)),
    bos_id=_signed(trainer.get(41, 1)),
    eos_id=_signed(trainer.get(42, 2)),
    pad_id=_signed(trainer.get(43, -1)),
  )


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
  """Yields (number, value) of the fields of a protocol buffer."""
  at = 0

  def varint():
    nonlocal at
    value = shift = 0
    while True:
      byte = data[at]
      at += 1
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  def take(size):
    nonlocal at
    if at + size > len(data):
      raise ValueError('ends early')
    at += size
    return data[at - size : at]

  while at < len(data):
    key = varint()
    kind = key & 7
    if kind not in (0, 1, 2, 5):
      raise ValueError(f'wire type {kind}')
    if kind == 0:
      value = varint()
    else:
      value = take({1: 8, 5: 4}.get(kind) or varint())
    yield key >> 3, value


def _signed(value: int) -> int:
  """Undoes the 64-bit two's complement that -1 is stored as."""
  return value - (1 << 64) if value >> 63 else value


# --- The conversion ---


def convert(model: Model, *, segments: bool = True) -> dict:
  """Returns the content of an equivalent tokenizer.json.

  `segments`: the space also goes before what follows a special token, as
  `transformers` calls legacy and the models' own code does.
  """
  vocab = {piece: i for i, piece in enumerate(model.pieces)}
  if not len(vocab) == len(model.pieces) == len(model.types):
    raise ValueError(
      f'the tokenizer has {len(model.pieces)} tokens, {len(vocab)} of them '
      f'different, and {len(model.types)} token types; the numbers must be '
      'equal'
    )
  if len(model.scores) != len(vocab):
    raise ValueError(
      f'the tokenizer has {len(vocab)} tokens but {len(model.scores)} scores'
    )
  if not 0 <= model.unk_id < len(vocab):
    raise ValueError(f'the tokenizer has no token {model.unk_id} for unknowns')
  bytes_known = sum(kind == BYTE for kind in model.types)
  if bytes_known not in (0, 256):
    raise ValueError(f'the tokenizer has {bytes_known} of the 256 byte tokens')
  if model.kind == 'bpe':
    backend = tokenizers.Tokenizer(
      tokenizers.models.BPE(
        vocab,
        _merges(model),
        unk_token=model.pieces[model.unk_id],
        fuse_unk=True,
        byte_fallback=bool(bytes_known),
      )
    )
  else:
    backend = tokenizers.Tokenizer(
      tokenizers.models.Unigram(
        list(zip(model.pieces, model.scores)),
        unk_id=model.unk_id,
        byte_fallback=bool(bytes_known),
      )
    )
  backend.add_tokens(
    [
      tokenizers.AddedToken(
        piece,
        special=kind in (CONTROL, UNKNOWN),
        # A piece with ▁ can only be met where spaces have become that.
        normalized=_SPACE in piece,
      )
      for piece, kind in zip(model.pieces, model.types)
      if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
  )
  content = subwords.dump(backend)
  content['normalizer'] = _normalizer(model, segments)
  if not segments and model.prefix:
    content['pre_tokenizer'] = {
      'type': 'Metaspace',
      'replacement': _SPACE,
      'prepend_scheme': 'first',
      'split': False,
    }
  decoders = [
    {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
  ]
  if model.prefix:
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  content['decoder'] = {'type': 'Sequence', 'decoders': decoders}
  return content


def _normalizer(model: Model, segments: bool) -> dict | None:
  steps = []
  if model.charsmap:
    steps.append(
      {
        'type': 'Precompiled',
        'precompiled_charsmap': base64.b64encode(model.charsmap).decode(),
      }
    )
  if model.collapsed:
    # Spaces at the end stay: a response may go on from them.
    steps += [
      {'type': 'Strip', 'strip_left': True, 'strip_right': False},
      {'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': ' '},
    ]
  if model.prefix and segments:
    steps.append({'type': 'Prepend', 'prepend': _SPACE})
  space = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE}
  return {'type': 'Sequence', 'normalizers': [*steps, space]}


def _merges(model: Model) -> list[tuple[str, str]]:
  """Lists all pairs of pieces that make a piece, best first.

  SentencePiece joins the neighbours whose whole has the highest score. The
  library joins those whose pair is the first of a list.
  """
  known = {
    piece: score
    for piece, score, kind in zip(model.pieces, model.scores, model.types)
    if kind == NORMAL
  }
  pairs = []
  for piece, score in known.items():
    for cut in range(1, len(piece)):
      left, right = piece[:cut], piece[cut:]
      if left in known and right in known:
        pairs.append((score, len(left), len(right), left, right))
  pairs.sort(key=lambda pair: pair[:3], reverse=True)
  return [pair[3:] for pair in pairs]
