"""A tokenizer of the `tokenizers` library behind the interface of `tokenizers`.

The content of a tokenizer.json describes every kind we read; what is not one
(vocabulary and merges, SentencePiece, GGUF) is made into one first. Two things
are taken out of it and done here, because they depend on where a text stands:
the space that SentencePiece puts before a text, and stripping at its ends. So

    encode('Hi', start=True)   ▁Hi     the text begins the sequence
    encode('Hi')               Hi      it goes on from tokens before it
    encode(' Hi')              ▁Hi

and two texts decode to the same text encoded apart or together, as long as the
normalizer changes nothing.
"""

import copy
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import tokenizers


@dataclasses.dataclass(frozen=True)
class Prefix:
  """The space that a tokenizer puts before a text.

  where: 'nowhere', 'first' (only what begins a sequence) or 'segments' (also
  what follows a special token). doubled: also before a text that begins with a
  space. stripped: spaces at the beginning go first.
  """

  where: str = 'nowhere'
  doubled: bool = False
  stripped: bool = False


@dataclasses.dataclass(frozen=True)
class Added:
  """A token that is no piece of text; lstrip, rstrip: it takes blanks."""

  id: int
  special: bool
  lstrip: bool = False
  rstrip: bool = False


class SubwordTokenizer:
  """See the module, and `tokenizers` for what all tokenizers have.

  Args:
    content: of a tokenizer.json, parsed.
    eos_id: ends a response.
    bos_id: starts a prompt, or None.
    other_eos_ids: what else ends a response of the model.
    names: special tokens that chat templates ask for, {'eos_token': '</s>'}.
    template: the chat template, or None.
    files: what `save` writes, {name: bytes}.
  """

  def __init__(
    self,
    content: dict,
    *,
    eos_id: int,
    bos_id: int | None,
    other_eos_ids: Iterable[int] = (),
    names: Mapping[str, str] | None = None,
    template: str | None = None,
    files: Mapping[str, bytes] | None = None,
  ):
    content = copy.deepcopy(content)
    self.eos_ids = tuple(dict.fromkeys([eos_id, *other_eos_ids]))
    self.eos_id, self.bos_id = eos_id, bos_id
    self.template, self.names = template, dict(names or {})
    self._files = dict(files or {})
    for token in content.get('added_tokens') or ():
      if token['id'] in (*self.eos_ids, bos_id):
        token['special'] = True  # Else text could spell it.
    self.prefix = take_prefix(content)
    self._backend = backend = load_backend(content)
    # A tokenizer.json may carry these from training; ours never cuts or pads.
    backend.no_truncation()
    backend.no_padding()
    # Without this, data that spells '<|im_end|>' would end the response.
    backend.encode_special_tokens = True
    self.vocab_size = max(backend.get_vocab().values()) + 1
    added = content.get('added_tokens') or ()
    self.added_tokens = {
      token['content']: Added(
        token['id'], token['special'], token['lstrip'], token['rstrip']
      )
      for token in added
    }
    self._forbidden = {t['id']: t['content'] for t in added if t['special']}
    unknown = content['model'].get('unk_id')
    unk_token = content['model'].get('unk_token')
    self._forbidden.pop(backend.token_to_id(unk_token or ''), None)
    self._forbidden.pop(unknown, None)  # That one text may become.
    for name, i in [*(('EOS', i) for i in self.eos_ids), ('BOS', bos_id)]:
      if i is not None and not 0 <= i < self.vocab_size:
        raise ValueError(
          f'The {name} id {i} is outside the vocabulary of '
          f'{self.vocab_size}; correct the tokenizer files.'
        )

  def encode(self, text: str, *, start: bool = False) -> list[int]:
    text = self._placed(text, start)
    return self._checked(
      text, self._backend.encode(text, add_special_tokens=False).ids
    )

  def encode_batch(
    self, texts: Sequence[str], *, start: bool = False
  ) -> list[list[int]]:
    texts = [self._placed(text, start) for text in texts]
    encodings = self._backend.encode_batch(texts, add_special_tokens=False)
    return [
      self._checked(text, encoding.ids)
      for text, encoding in zip(texts, encodings)
    ]

  def decode(self, ids: Iterable[int], *, start: bool = False) -> str:
    ids = checked(ids, self.vocab_size)
    text = self._backend.decode(ids, skip_special_tokens=False)
    if start and self.prefix.where != 'nowhere':
      return text.removeprefix(' ')
    return text

  def token(self, i: int) -> str:
    """Returns how the vocabulary writes an id."""
    return self._backend.id_to_token(i)

  def with_template(self, template: str) -> 'SubwordTokenizer':
    """Returns this tokenizer with another chat template."""
    other = copy.copy(self)
    other.template = template
    other._files = self._files | {'chat_template.jinja': template.encode()}
    return other

  def guarded(self, texts: Iterable[str]) -> 'SubwordTokenizer':
    """Returns a tokenizer for which added tokens are special, too."""
    texts = [t for t in texts if not self.added_tokens[t].special]
    if not texts:
      return self
    other = copy.copy(self)
    other._backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
    other._backend.encode_special_tokens = True
    other._backend.add_special_tokens(
      [tokenizers.AddedToken(text, normalized=False) for text in texts]
    )
    other.added_tokens = self.added_tokens | {
      text: dataclasses.replace(self.added_tokens[text], special=True)
      for text in texts
    }
    other._forbidden = self._forbidden | {
      self.added_tokens[text].id: text for text in texts
    }
    return other

  def save(self, folder) -> list[str]:
    """Writes the files it came from, byte for byte; returns their names."""
    if not self._files:
      raise ValueError(
        'this tokenizer came from no files; load it with from_folder'
      )
    folder = pathlib.Path(folder)
    for name, content in self._files.items():
      (folder / name).write_bytes(content)
    return list(self._files)

  def _checked(self, text: str, ids: list[int]) -> list[int]:
    """Returns ids, others if text became a special token.

    `encode_special_tokens` keeps text from it before the model; but the model
    may have the token among its pieces, as Unigram does, and finds it.
    """
    if self._forbidden.keys().isdisjoint(ids):
      return ids
    normalizer = self._backend.normalizer
    if normalizer is not None:  # It can make '</s>' of wide letters.
      text = normalizer.normalize_str(text)
    tokens = sorted(self._forbidden.values(), key=len, reverse=True)
    # A border after the first letter of each: no piece goes across.
    inside = '|'.join(
      f'(?<={re.escape(t[0])})(?={re.escape(t[1:])})' for t in tokens if t[1:]
    )
    parts = re.split(inside, text) if inside else [text]
    ids = [
      i
      for part in parts
      for i in self._backend.encode(part, add_special_tokens=False).ids
    ]
    found = self._forbidden.keys() & set(ids)
    if found:
      raise ValueError(
        f'plain text becomes the special token {self._forbidden[min(found)]!r}'
        ': data could forge it; correct the tokenizer files'
      )
    return ids

  def _placed(self, text: str, start: bool) -> str:
    prefix = self.prefix
    if not start or prefix.where == 'nowhere':
      return text
    if prefix.stripped:
      text = text.lstrip(' ')
    if not text or (text[0] in ' ▁' and not prefix.doubled):
      return text
    return ' ' + text


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
  """Refuses ids the vocabulary lacks, which the library drops silently."""
  ids = [int(i) for i in ids]
  wrong = [i for i in ids if not 0 <= i < vocab_size]
  if wrong:
    raise ValueError(
      f'ids {wrong[:5]} are outside the vocabulary of '
      f'{vocab_size}; is this the tokenizer of the model?'
    )
  return ids


def load_backend(content: dict) -> tokenizers.Tokenizer:
  """Raises ValueError where the library cannot read a tokenizer.json."""
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(content))
  except Exception as error:  # The library raises nothing narrower.
    raise ValueError(
      f'no tokenizer of the tokenizers library ({error}); save it again with '
      'transformers'
    ) from error


def dump(backend: tokenizers.Tokenizer) -> dict:
  """Returns the content of the tokenizer.json of a library's tokenizer."""
  return json.loads(backend.to_str())


def byte_level_bpe(vocab, merges, *, pre_tokenizer=None, **options):
  """Builds a byte-level BPE; GPT-2's own split into words by default."""
  try:
    backend = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab, merges, **options)
    )
  except Exception as error:  # The library raises nothing narrower.
    raise ValueError(
      f'The vocabulary and the merges do not fit: {error}; they '
      'are not of the same tokenizer.'
    ) from error
  backend.pre_tokenizer = pre_tokenizer or byte_level()
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def byte_level(*, use_regex: bool = True):
  """Bytes as symbols, cut as GPT-2 does where `use_regex`."""
  return tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=use_regex
  )


# --- The prefix in a tokenizer.json ---


def _steps(part: dict | None, name: str) -> list[dict]:
  """Lists what a normalizer (or other part) does, be it one or several."""
  if part is None:
    return []
  if part['type'] != 'Sequence':
    return [part]
  return [step for inner in part[name] for step in _steps(inner, name)]


def _sequence(steps: list[dict], name: str) -> dict | None:
  return {'type': 'Sequence', name: steps} if steps else None


def take_prefix(content: dict) -> Prefix:
  """Takes prefix and stripping out of `content`, in place, and returns it."""
  prefix = Prefix()
  normal = []
  for step in _steps(content.get('normalizer'), 'normalizers'):
    if step['type'] == 'Prepend' and step['prepend'] in (' ', '▁'):
      prefix = dataclasses.replace(prefix, where='segments', doubled=True)
    elif step['type'] == 'Strip':
      prefix = dataclasses.replace(prefix, stripped=step['strip_left'])
    else:
      normal.append(step)
  content['normalizer'] = _sequence(normal, 'normalizers')
  cuts = _steps(content.get('pre_tokenizer'), 'pretokenizers')
  for step in cuts:
    if step['type'] == 'Metaspace':
      usual = 'always' if step.get('add_prefix_space', True) else 'never'
      scheme = step.get('prepend_scheme', usual)
      step['prepend_scheme'] = 'never'
      step.pop('add_prefix_space', None)
      if scheme != 'never':
        where = 'first' if scheme == 'first' else 'segments'
        prefix = dataclasses.replace(prefix, where=where)
    elif step['type'] == 'ByteLevel' and step['add_prefix_space']:
      step['add_prefix_space'] = False
      prefix = dataclasses.replace(prefix, where='segments')
  content['pre_tokenizer'] = _sequence(cuts, 'pretokenizers')
  written = _steps(content.get('decoder'), 'decoders')
  written = [step for step in written if step['type'] != 'Strip']
  for step in written:
    if step['type'] == 'Metaspace':
      step['prepend_scheme'] = 'never'
      step.pop('add_prefix_space', None)
  content['decoder'] = _sequence(written, 'decoders')
  return prefix
