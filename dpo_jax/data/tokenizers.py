"""Tokenizers: text to ids and back, and nothing else.

Every tokenizer has the same attributes:

  encode(text)        list of ids; no BOS or EOS is added, and text that spells
                      a special token ('<|im_end|>') is plain text
                      (a byte the vocabulary has no token for is lost, as with
                      the model's own tokenizer: SmolLM2 lacks the control
                      characters 4, 6, 19, 20, 22, 29 and unassigned planes)
  encode_batch(texts) the same for many texts, in parallel where possible
  decode(ids)         text; special tokens appear as their text, bytes that are
                      not UTF-8 as U+FFFD, an id outside the vocabulary is an
                      error: nothing is skipped
  eos_id              ends a response
  bos_id              starts a prompt, or None: the model wants none
  vocab_size          one past the largest id

Who adds BOS and EOS, and where, is decided in `examples`, never here.
"""

import json
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import tokenizers


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255, and one more id to end a response."""

  eos_id = 256
  bos_id = None
  vocab_size = 257

  def encode(self, text: str) -> list[int]:
    return list(text.encode('utf-8'))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int]) -> str:
    text = bytearray()
    for i in _checked(ids, self.vocab_size):
      text += b'<eos>' if i == self.eos_id else bytes([i])
    return text.decode('utf-8', errors='replace')


class SubwordTokenizer:
  """A tokenizer of the `tokenizers` library behind our interface."""

  def __init__(self, backend, *, eos_id: int, bos_id: int | None):
    self._backend = backend
    # A tokenizer.json may carry these from training; ours never cuts or pads.
    backend.no_truncation()
    backend.no_padding()
    # Without this, data that spells '<|im_end|>' would end the response.
    backend.encode_special_tokens = True
    self.vocab_size = max(backend.get_vocab().values()) + 1
    self.eos_id = eos_id
    self.bos_id = bos_id
    for name, i in [('EOS', eos_id), ('BOS', bos_id)]:
      if i is None:
        continue
      if not 0 <= i < self.vocab_size:
        raise ValueError(
          f'The {name} id {i} is outside the vocabulary of '
          f'{self.vocab_size}; correct the tokenizer files.'
        )

  def encode(self, text: str) -> list[int]:
    return self._backend.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = self._backend.encode_batch(
      list(texts), add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    ids = _checked(ids, self.vocab_size)
    return self._backend.decode(ids, skip_special_tokens=False)


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
  """Refuses ids the vocabulary lacks, which the library drops silently."""
  ids = [int(i) for i in ids]
  wrong = [i for i in ids if not 0 <= i < vocab_size]
  if wrong:
    raise ValueError(
      f'ids {wrong[:5]} are outside the vocabulary of '
      f'{vocab_size}; is this the tokenizer of the model?'
    )
  return ids


def _byte_level():
  # use_regex: GPT-2's own split into words, contractions, digits and spaces.
  return tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=True
  )


# GGUF `tokenizer.ggml.pre` -> how text is cut before merges.
_PRE_TOKENIZERS = {
  'gpt-2': _byte_level,
  'smollm': lambda: tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      _byte_level(),
    ]
  ),
}

# GGUF `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


def _bpe(vocab, merges, pre_tokenizer, added):
  """Builds a byte-level BPE; `added` tokens are in `vocab` already."""
  try:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  except Exception as error:  # The library raises nothing narrower.
    raise ValueError(
      f'The vocabulary and the merges do not fit: {error}; they '
      'are not of the same tokenizer.'
    ) from error
  backend.pre_tokenizer = pre_tokenizer
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_tokens(added)
  return backend


def from_gguf(metadata: Mapping) -> SubwordTokenizer:
  """Builds the tokenizer that GGUF metadata (name -> value) describes."""

  def required(name):
    if name not in metadata:
      raise ValueError(
        f'The GGUF file has no {name}; convert it again with its tokenizer.'
      )
    return metadata[name]

  model = required('tokenizer.ggml.model')
  if model != 'gpt2':
    raise ValueError(
      f'tokenizer.ggml.model {model!r} is not supported (only '
      "'gpt2', byte-level BPE); load the Hugging Face folder."
    )
  pre = required('tokenizer.ggml.pre')
  if pre not in _PRE_TOKENIZERS:
    raise ValueError(
      f'tokenizer.ggml.pre {pre!r} is not supported (only '
      f'{", ".join(_PRE_TOKENIZERS)}); load the Hugging Face folder.'
    )
  if metadata.get('tokenizer.ggml.add_space_prefix'):
    raise ValueError(
      'tokenizer.ggml.add_space_prefix is not supported; load '
      'the Hugging Face folder.'
    )
  tokens = required('tokenizer.ggml.tokens')
  types = required('tokenizer.ggml.token_type')
  merges = [
    tuple(merge.split(' ')) for merge in required('tokenizer.ggml.merges')
  ]
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens) or len(types) != len(tokens):
    raise ValueError(
      f'The GGUF file has {len(tokens)} tokens, {len(vocab)} of them '
      f'different, and {len(types)} token types; the numbers must be equal.'
    )
  added = [
    tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
    for token, kind in zip(tokens, types, strict=True)
    if kind in (_CONTROL, _USER_DEFINED)
  ]
  backend = _bpe(vocab, merges, _PRE_TOKENIZERS[pre](), added)
  wants_bos = metadata.get('tokenizer.ggml.add_bos_token', False)
  bos_id = required('tokenizer.ggml.bos_token_id') if wants_bos else None
  eos_id = required('tokenizer.ggml.eos_token_id')
  tokenizer = SubwordTokenizer(backend, eos_id=eos_id, bos_id=bos_id)
  if eos_id in tokenizer.encode(tokens[eos_id]):
    raise ValueError(
      f'Plain text {tokens[eos_id]!r} encodes to the EOS id {eos_id}: data '
      'could forge it. The token must be of type control in the file.'
    )
  return tokenizer


def from_gpt2_files(
  vocab, merges, *, eos: str = '<|endoftext|>'
) -> SubwordTokenizer:
  """Builds GPT-2's tokenizer from vocab.json and merges.txt."""
  table = json.loads(pathlib.Path(vocab).read_text(encoding='utf-8'))
  if eos not in table:
    raise ValueError(
      f'{vocab} has no {eos!r}; name the EOS token it has in '
      'tokenizer_config.json (eos_token).'
    )
  lines = pathlib.Path(merges).read_text(encoding='utf-8').split('\n')
  pairs = []
  for number, line in enumerate(lines, start=1):
    if line.strip() and not (number == 1 and line.startswith('#version')):
      pair = tuple(line.rstrip('\r').split(' '))
      if len(pair) != 2:
        raise ValueError(
          f'{merges}, line {number}: {line!r} is not two tokens '
          'separated by a space.'
        )
      pairs.append(pair)
  added = [tokenizers.AddedToken(eos, special=True, normalized=False)]
  backend = _bpe(table, pairs, _byte_level(), added)
  return SubwordTokenizer(backend, eos_id=table[eos], bos_id=None)


def from_tokenizer_json(path) -> SubwordTokenizer:
  """Loads a Hugging Face tokenizer.json.

  EOS and BOS come from tokenizer_config.json beside it, or else from
  config.json. The model wants BOS if `add_bos_token` says so, or, where that
  is not said, if the post-processor puts it in front.
  """
  path = pathlib.Path(path)
  content = _json(path)
  settings = _json(path.parent / 'tokenizer_config.json')
  config = _json(path.parent / 'config.json')
  vocab = _backend(path, content).get_vocab()
  ids = {}
  for name in ('eos', 'bos'):
    token = settings.get(f'{name}_token')
    token = token['content'] if isinstance(token, dict) else token
    if token is not None:
      if token not in vocab:
        raise ValueError(
          f'{path.parent}: tokenizer_config.json says '
          f'{name}_token is {token!r}, which {path.name} lacks.'
        )
      ids[name] = vocab[token]
    else:
      # A list names the alternatives of a sampler; the first is the model's.
      i = config.get(f'{name}_token_id')
      ids[name] = i[0] if isinstance(i, list) else i
  if ids['eos'] is None:
    raise ValueError(
      f'No EOS token is known for {path}; put a '
      'tokenizer_config.json with eos_token beside it.'
    )
  for token in content.get('added_tokens', ()):
    if token['id'] in ids.values():
      token['special'] = True  # Else text could spell it.
  backend = _backend(path, content)
  starts = backend.encode('', add_special_tokens=True).ids[:1]
  wants_bos = settings.get('add_bos_token')
  if wants_bos is None:
    wants_bos = ids['bos'] is not None and starts == [ids['bos']]
  if wants_bos and ids['bos'] is None:
    raise ValueError(
      f'{path.parent}: add_bos_token is set but no bos_token is '
      'named in tokenizer_config.json.'
    )
  return SubwordTokenizer(
    backend, eos_id=ids['eos'], bos_id=ids['bos'] if wants_bos else None
  )


def _backend(path, content: dict) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # The library raises nothing narrower.
    raise ValueError(
      f'{path} is no tokenizer of the tokenizers library '
      f'({error}); save it again with transformers.'
    ) from error


def from_folder(folder) -> SubwordTokenizer | None:
  """Loads what a Hugging Face folder has, or None if it has no tokenizer."""
  folder = pathlib.Path(folder)
  if (folder / 'tokenizer.json').exists():
    return from_tokenizer_json(folder / 'tokenizer.json')
  vocab, merges = folder / 'vocab.json', folder / 'merges.txt'
  if vocab.exists() and merges.exists():
    eos = _json(folder / 'tokenizer_config.json').get('eos_token')
    eos = eos['content'] if isinstance(eos, dict) else eos
    return from_gpt2_files(vocab, merges, eos=eos or '<|endoftext|>')
  partial = [
    name
    for name in ('vocab.json', 'merges.txt', 'tokenizer.model')
    if (folder / name).exists()
  ]
  if partial:
    raise ValueError(
      f'{folder} has {", ".join(partial)} but neither tokenizer.json nor '
      'vocab.json with merges.txt; save the tokenizer with a recent '
      'transformers, which writes tokenizer.json.'
    )
  return None


def _json(path: pathlib.Path) -> dict:
  """Reads a JSON object; a file that is not there is an empty one."""
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
      f'{path} is not JSON ({error}); download it again.'
    ) from error
