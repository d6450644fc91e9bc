"""Tokenizers: text to ids and back, and nothing else.

Every tokenizer has the same attributes:

  encode(text)        list of ids; no BOS or EOS is added, and text that spells
                      a special token ('<|im_end|>') is plain text
                      (a byte the vocabulary has no token for is lost, as with
                      the model's own tokenizer: SmolLM2 lacks the control
                      characters 4, 6, 19, 20, 22, 29 and unassigned planes).
                      `start`: the text begins the sequence, so SentencePiece
                      puts a space before it; without, nothing is put anywhere
  encode_batch(texts) the same for many texts, in parallel where possible
  decode(ids)         text; special tokens appear as their text, bytes that are
                      not UTF-8 as U+FFFD, an id outside the vocabulary is an
                      error: nothing is skipped. `start`: takes the space of
                      SentencePiece away again
  eos_id              ends a response
  eos_ids             all that the model may end with; the first is eos_id
  bos_id              starts a prompt, or None: the model wants none
  vocab_size          one past the largest id
  added_tokens        {text: subwords.Added}; chat templates write them, data
                      never those that are special
  guarded(texts)      the same tokenizer with more of them special
  names               {'eos_token': text, ...}, which chat templates ask for
  prefix              where SentencePiece's space goes, see `subwords.Prefix`
  template            the chat template (see `chat`), or None
  with_template(text) the same tokenizer with another
  save(folder)        writes the files it came from, or equivalent ones

Who adds BOS and EOS, and where, is decided in `examples`, never here.
"""

import copy
import dataclasses
import json
import pathlib
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import tokenizers

from dpo_jax.data import ggufs
from dpo_jax.data import sentencepieces
from dpo_jax.data import subwords

# What a folder may hold of a tokenizer, all of it saved again.
FILES = (
  'tokenizer.json',
  'vocab.json',
  'merges.txt',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
)


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255, and one more id to end a response."""

  eos_id = 256
  eos_ids = (256,)
  bos_id = None
  vocab_size = 257
  template = None
  prefix = subwords.Prefix()

  def __init__(self):
    self.added_tokens = {'<eos>': subwords.Added(256, special=True)}
    self.names = {'eos_token': '<eos>'}

  def encode(self, text: str, *, start: bool = False) -> list[int]:
    del start
    return list(text.encode('utf-8'))

  def encode_batch(
    self, texts: Sequence[str], *, start: bool = False
  ) -> list[list[int]]:
    del start
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[int], *, start: bool = False) -> str:
    del start
    text = bytearray()
    for i in subwords.checked(ids, self.vocab_size):
      text += b'<eos>' if i == self.eos_id else bytes([i])
    return text.decode('utf-8', errors='replace')

  def with_template(self, template: str) -> 'ByteTokenizer':
    other = copy.copy(self)
    other.template = template
    return other

  def guarded(self, texts: Iterable[str]) -> 'ByteTokenizer':
    del texts  # its only one is special
    return self

  def save(self, folder) -> list[str]:
    """Writes a tokenizer.json that encodes the same."""
    backend = subwords.byte_level_bpe(_byte_symbols(), [])
    backend.add_tokens([tokenizers.AddedToken('<eos>', special=True)])
    files = ggufs.files(
      subwords.dump(backend), names=self.names, template=self.template
    )
    for name, content in files.items():
      (pathlib.Path(folder) / name).write_bytes(content)
    return list(files)


def _byte_symbols() -> dict[str, int]:
  """Maps GPT-2's printable stand-in of each byte to the byte."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = [byte for byte in range(256) if byte not in printable]
  symbols = {chr(256 + n): byte for n, byte in enumerate(others)}
  return symbols | {chr(byte): byte for byte in printable}


def from_gguf(metadata: Mapping) -> subwords.SubwordTokenizer:
  """Builds the tokenizer that GGUF metadata (name -> value) describes."""
  return ggufs.load(metadata)


def from_folder(folder) -> subwords.SubwordTokenizer | None:
  """Loads what a Hugging Face folder has, or None if it has no tokenizer."""
  folder = pathlib.Path(folder)
  if (folder / 'tokenizer.json').exists():
    return from_tokenizer_json(folder / 'tokenizer.json')
  if (folder / 'vocab.json').exists() and (folder / 'merges.txt').exists():
    return from_gpt2_files(folder / 'vocab.json', folder / 'merges.txt')
  if (folder / 'tokenizer.model').exists():
    return from_sentencepiece(folder / 'tokenizer.model')
  partial = [
    name for name in ('vocab.json', 'merges.txt') if (folder / name).exists()
  ]
  if partial:
    raise ValueError(
      f'{folder} has {", ".join(partial)} but neither tokenizer.json, '
      'tokenizer.model nor vocab.json with merges.txt; save the tokenizer with '
      'a recent transformers, which writes tokenizer.json.'
    )
  return None


def from_tokenizer_json(path) -> subwords.SubwordTokenizer:
  """Loads a Hugging Face tokenizer.json and the files beside it.

  The model wants BOS if `add_bos_token` says so, or, where that is not said, if
  the post-processor puts it in front.
  """
  path = pathlib.Path(path)
  beside = _beside(path.parent)
  content = _json(path)
  try:
    backend = subwords.load_backend(content)
  except ValueError as error:
    raise ValueError(f'{path} is {error}.') from error
  starts = backend.encode('', add_special_tokens=True).ids[:1]
  vocab = backend.get_vocab()
  bos = [i for i in _ids('bos', beside, vocab, path) if [i] == starts]
  return _build(path, content, beside, vocab, wants_bos=bool(bos))


def from_gpt2_files(vocab, merges) -> subwords.SubwordTokenizer:
  """Loads GPT-2's vocab.json and merges.txt, and the files beside them."""
  path = pathlib.Path(vocab)
  beside = _beside(path.parent)
  eos = beside.names.setdefault('eos_token', '<|endoftext|>')
  table = _json(path)
  if eos not in table and eos not in beside.added:
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
  backend = subwords.byte_level_bpe(table, pairs)
  if eos in table:
    backend.add_tokens([tokenizers.AddedToken(eos, special=True)])
  content = _add(path, backend, beside)
  return _build(path, content, beside, backend.get_vocab(), wants_bos=False)


def from_sentencepiece(path) -> subwords.SubwordTokenizer:
  """Loads a tokenizer.model, and the files beside it.

  Its BOS is wanted unless `add_bos_token` says no, as of Llama, Mistral, Gemma.
  """
  path = pathlib.Path(path)
  beside = _beside(path.parent)
  try:
    model = sentencepieces.parse(path.read_bytes())
    content = sentencepieces.convert(model, segments=beside.legacy)
  except ValueError as error:
    raise ValueError(f'{path}: {error}.') from error
  for name in ('unk', 'bos', 'eos', 'pad'):
    i = getattr(model, f'{name}_id')
    if 0 <= i < len(model.pieces):
      beside.names.setdefault(f'{name}_token', model.pieces[i])
  content = _add(path, subwords.load_backend(content), beside)
  vocab = subwords.load_backend(content).get_vocab()
  wants_bos = 'bos_token' in beside.names
  return _build(path, content, beside, vocab, wants_bos=wants_bos)


# --- The files beside a tokenizer ---


@dataclasses.dataclass
class _Beside:
  """What a folder says of its tokenizer outside of it.

  names: {'eos_token': text}. ids: {'eos': all ids}. adds_bos: None: not said.
  added: {text: (id, special)}. template: the chat template. legacy: see
  `sentencepieces.convert`.
  """

  names: dict[str, str]
  ids: dict[str, list[int]]
  adds_bos: bool | None
  added: dict[str, tuple[int, bool]]
  template: str | None
  legacy: bool
  files: dict[str, bytes]


def _beside(folder: pathlib.Path) -> _Beside:
  settings = _json(folder / 'tokenizer_config.json')
  names = {}
  for source in (settings, _json(folder / 'special_tokens_map.json')):
    for name in ('bos_token', 'eos_token', 'unk_token', 'pad_token'):
      token = source.get(name)
      token = token.get('content') if isinstance(token, dict) else token
      if token is not None:
        _check(isinstance(token, str), folder, f'{name} must be text')
        names.setdefault(name, token)
  ids = {'bos': [], 'eos': []}
  for file in ('generation_config.json', 'config.json'):
    config = _json(folder / file)
    for name, found in ids.items():
      i = config.get(f'{name}_token_id')
      i = i if isinstance(i, list) else [] if i is None else [i]
      what = f'{name}_token_id in {file} must be a number or a list of them'
      _check(all(type(n) is int for n in i), folder, what)
      found += i
  added = {
    token['content']: (int(i), bool(token.get('special')))
    for i, token in (settings.get('added_tokens_decoder') or {}).items()
  }
  for token, i in _json(folder / 'added_tokens.json').items():
    added.setdefault(token, (i, False))
  return _Beside(
    names=names,
    ids=ids,
    adds_bos=settings.get('add_bos_token'),
    added=added,
    template=_template(folder, settings),
    legacy=settings.get('legacy') is not False,
    files={
      name: (folder / name).read_bytes()
      for name in FILES
      if (folder / name).exists()
    },
  )


def _template(folder: pathlib.Path, settings: dict) -> str | None:
  """Finds the chat template: its own file goes before tokenizer_config.json."""
  if (folder / 'chat_template.jinja').exists():
    return (folder / 'chat_template.jinja').read_text(encoding='utf-8')
  template = settings.get('chat_template')
  if isinstance(template, list):  # of several, each with a name
    template = {t['name']: t['template'] for t in template}.get('default')
  right = template is None or isinstance(template, str)
  _check(right, folder, 'chat_template in tokenizer_config.json must be text')
  return template


def _check(right: bool, folder: pathlib.Path, what: str) -> None:
  if not right:
    raise ValueError(f'{folder}: {what}; correct the tokenizer files.')


def _add(path, backend: tokenizers.Tokenizer, beside: _Beside) -> dict:
  """Adds the tokens that the files beside name; returns the content."""
  vocab = backend.get_vocab()
  for token, (i, special) in sorted(beside.added.items(), key=lambda t: t[1]):
    if vocab.get(token, backend.get_vocab_size()) != i:
      raise ValueError(
        f'{path.parent}: the added token {token!r} cannot have the id {i}, '
        f'{path.name} has {len(vocab)} tokens; correct added_tokens_decoder in '
        'tokenizer_config.json (and added_tokens.json).'
      )
    if token not in vocab:
      backend.add_tokens(
        [tokenizers.AddedToken(token, special=special, normalized=False)]
      )
  return subwords.dump(backend)


def _ids(name: str, beside: _Beside, vocab: dict, path) -> list[int]:
  """Returns the ids of EOS or BOS, the one that the tokenizer names first.

  A list of ids, as Llama 3 has for EOS, names the alternatives of a sampler.
  Without a token of its own the first is the tokenizer's.
  """
  token = beside.names.get(f'{name}_token')
  if token is None:
    return beside.ids[name]
  if token not in vocab:
    raise ValueError(
      f'{path.parent}: tokenizer_config.json says '
      f'{name}_token is {token!r}, which {path.name} lacks.'
    )
  return [vocab[token], *beside.ids[name]]


def _build(path, content, beside, vocab, *, wants_bos):
  eos, bos = (_ids(name, beside, vocab, path) for name in ('eos', 'bos'))
  if not eos:
    raise ValueError(
      f'No EOS token is known for {path}; put a '
      'tokenizer_config.json with eos_token beside it.'
    )
  if beside.adds_bos is not None:
    wants_bos = beside.adds_bos
  if wants_bos and not bos:
    raise ValueError(
      f'{path.parent}: add_bos_token is set but no bos_token is '
      'named in tokenizer_config.json.'
    )
  # Where only ids are known, templates get their text.
  texts = {i: token for token, i in vocab.items()}
  names = dict(beside.names)
  for name, ids in (('eos_token', eos), ('bos_token', bos)):
    if ids and ids[0] in texts:
      names.setdefault(name, texts[ids[0]])
  return subwords.SubwordTokenizer(
    content,
    eos_id=eos[0],
    bos_id=bos[0] if wants_bos else None,
    other_eos_ids=eos[1:],
    names=names,
    template=beside.template,
    files=beside.files,
  )


def _json(path: pathlib.Path) -> dict:
  """Reads a JSON object; a file that is not there is an empty one."""
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
      f'{path} is not JSON ({error}); download it again.'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds no JSON object; download it again.')
  return value
