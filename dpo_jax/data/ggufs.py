"""The tokenizer inside a GGUF file, made into that of a Hugging Face folder."""

import json
from collections.abc import Mapping

import tokenizers

from dpo_jax.data import sentencepieces
from dpo_jax.data import subwords

# Llama 3's and Qwen 2's way of cutting text; they differ in runs of digits.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
  r' ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _words(digits: str):
  return tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(_WORDS.format(digits=digits)), 'isolated'
      ),
      subwords.byte_level(use_regex=False),
    ]
  )


# `tokenizer.ggml.pre` -> how text is cut before merges.
_PRE_TOKENIZERS = {
  'gpt-2': subwords.byte_level,
  'smollm': lambda: tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      subwords.byte_level(),
    ]
  ),
  'llama-bpe': lambda: _words(r'\p{N}{1,3}'),
  'qwen2': lambda: _words(r'\p{N}'),
}
# Metadata that name what else ends a response.
_ENDS = ('eot_token_id', 'eom_token_id')
_NAMES = {
  'bos_token': 'bos_token_id',
  'eos_token': 'eos_token_id',
  'unk_token': 'unknown_token_id',
  'pad_token': 'padding_token_id',
}


def load(metadata: Mapping) -> subwords.SubwordTokenizer:
  """Builds the tokenizer that GGUF metadata (name -> value) describes."""
  values = {
    name.removeprefix('tokenizer.ggml.'): value
    for name, value in metadata.items()
    if name.startswith('tokenizer.ggml.')
  }
  model = _required(values, 'model')
  if model not in _CONTENTS:
    raise ValueError(
      f'tokenizer.ggml.model {model!r} is not supported (only '
      f'{", ".join(_CONTENTS)}); load the Hugging Face folder.'
    )
  tokens = _required(values, 'tokens')
  content, wants_bos = _CONTENTS[model](values)
  wants_bos = values.get('add_bos_token', wants_bos)
  bos_id = _required(values, 'bos_token_id') if wants_bos else None
  eos_id = _required(values, 'eos_token_id')
  others = [values[name] for name in _ENDS if name in values]
  names = {
    name: tokens[values[key]]
    for name, key in _NAMES.items()
    if 0 <= values.get(key, -1) < len(tokens)
  }
  template = metadata.get('tokenizer.chat_template')
  if bos_id is not None and bos_id < len(tokens):
    content['post_processor'] = _bos_first(tokens[bos_id], bos_id)
  tokenizer = subwords.SubwordTokenizer(
    content,
    eos_id=eos_id,
    bos_id=bos_id,
    other_eos_ids=others,
    names=names,
    template=template,
    files=files(content, names=names, template=template),
  )
  for i in tokenizer.eos_ids:
    if i in tokenizer.encode(tokens[i]):
      raise ValueError(
        f'Plain text {tokens[i]!r} encodes to the EOS id {i}: data '
        'could forge it. The token must be of type control in the file.'
      )
  return tokenizer


def files(
  content: dict, *, names: Mapping[str, str], template: str | None
) -> dict[str, bytes]:
  """Returns the files of a Hugging Face folder of a tokenizer."""
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'add_bos_token': bool(content.get('post_processor')),
    **names,
  }
  written = {
    'tokenizer.json': json.dumps(content, ensure_ascii=False, indent=1),
    'tokenizer_config.json': json.dumps(settings, ensure_ascii=False, indent=1),
  }
  if template is not None:
    written['chat_template.jinja'] = template
  return {name: text.encode() for name, text in written.items()}


def _required(values, name):
  if name not in values:
    raise ValueError(
      f'The GGUF file has no tokenizer.ggml.{name}; convert it again with its '
      'tokenizer.'
    )
  return values[name]


def _bos_first(token: str, i: int) -> dict:
  return {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': token, 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [
      {'Sequence': {'id': 'A', 'type_id': 0}},
      {'Sequence': {'id': 'B', 'type_id': 1}},
    ],
    'special_tokens': {token: {'id': token, 'ids': [i], 'tokens': [token]}},
  }


def _byte_level(values) -> tuple[dict, bool]:
  """GGUF's 'gpt2': (content, is BOS wanted where the file does not say)."""
  pre = _required(values, 'pre')
  if pre not in _PRE_TOKENIZERS:
    raise ValueError(
      f'tokenizer.ggml.pre {pre!r} is not supported (only '
      f'{", ".join(_PRE_TOKENIZERS)}); load the Hugging Face folder.'
    )
  if values.get('add_space_prefix'):
    raise ValueError(
      'tokenizer.ggml.add_space_prefix is not supported for gpt2; load '
      'the Hugging Face folder.'
    )
  tokens, types = _required(values, 'tokens'), _required(values, 'token_type')
  merges = [tuple(merge.split(' ')) for merge in _required(values, 'merges')]
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens) or len(types) != len(tokens):
    raise ValueError(
      f'The GGUF file has {len(tokens)} tokens, {len(vocab)} of them '
      f'different, and {len(types)} token types; the numbers must be equal.'
    )
  backend = subwords.byte_level_bpe(
    vocab,
    merges,
    pre_tokenizer=_PRE_TOKENIZERS[pre](),
    ignore_merges=pre == 'llama-bpe',
  )
  if pre == 'qwen2':
    backend.normalizer = tokenizers.normalizers.NFC()
  backend.add_tokens(
    [
      tokenizers.AddedToken(
        token, special=kind == sentencepieces.CONTROL, normalized=False
      )
      for token, kind in zip(tokens, types, strict=True)
      if kind in (sentencepieces.CONTROL, sentencepieces.USER_DEFINED)
    ]
  )
  return subwords.dump(backend), pre == 'llama-bpe'


def _pieces(values) -> tuple[dict, bool]:
  """GGUF's 'llama', SentencePiece BPE."""
  model = sentencepieces.Model(
    _required(values, 'tokens'),
    _required(values, 'scores'),
    _required(values, 'token_type'),
    kind='bpe',
    prefix=values.get('add_space_prefix', True),
    unk_id=values.get('unknown_token_id', 0),
  )
  return sentencepieces.convert(model), True


_CONTENTS = {'gpt2': _byte_level, 'llama': _pieces}
