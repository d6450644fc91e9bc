"""Texts and tiny vocabularies that tests of tokenizers and templates share."""

import json
import pathlib

import tokenizers as backend

from dpo_jax.data import sentencepieces
from dpo_jax.data import tokenizers

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CORPUS = (
  'The assistant answers the user. The user asks the assistant again.',
  'In the year 1984 there were 12 months, and in 2024 there were 12 again.',
  'def answer(question):\n    return "yes" if question else "no"',
  '        eight spaces, then    four, and a tab\there.',
  'hello hello world, this is a test of the tokenizer and its pieces',
  'étude in é minor; naïve café, 你好 world, 你好',
  'Preferences are pairs: a chosen response and a rejected response.',
  'system user assistant model <s> </s> [INST] [/INST] start end turn',
  'aa aaa aaaa aaaaa aaaaaa the then there these those thesis',
)
TEXTS = (
  '',
  ' ',
  '  ',
  '   ',
  'plain words, and more.',
  ' The assistant',
  'The assistant ',
  "  it's 1984\n\n\ttabs  ",
  'étude 你好 مرحبا',
  '🤖 👩\u200d🔬 ❤️ 🇫🇷',
  '<|im_end|> <|endoftext|> </s> <eos>',
  '<start_of_turn>user\nhi<end_of_turn>\n',
  'ﬁne Ａ\u3000B',
  'a    b\n\n\nc',
  'aaaaaaa aaaaaaaaa',
)
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' +"
  " message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_symbols():
  return sorted(backend.pre_tokenizers.ByteLevel.alphabet())


def gguf_metadata(**changes):
  """GGUF metadata of a tiny byte-level BPE; None takes an entry away."""
  tokens = [*SPECIAL, *byte_symbols(), '<note>', 'th', 'the', 'Ġthe', '12']
  types = [3] * 3 + [1] * 256 + [4] + [1] * 4
  metadata = {
    'model': 'gpt2',
    'pre': 'smollm',
    'tokens': tokens,
    'token_type': types,
    'merges': ['t h', 'th e', 'Ġ the', '1 2'],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'add_bos_token': False,
    'add_space_prefix': False,
  }
  metadata.update(changes)
  metadata = {
    f'tokenizer.ggml.{name}': value
    for name, value in metadata.items()
    if value is not None
  }
  metadata['tokenizer.chat_template'] = CHATML
  return metadata


def pieces_metadata(name='bpe', **changes):
  """GGUF metadata of a SentencePiece model of the golden files."""
  data = (GOLDEN / 'tokenizers' / f'{name}.model').read_bytes()
  model = sentencepieces.parse(data)
  metadata = {
    'model': 'llama',
    'tokens': list(model.pieces),
    'scores': list(model.scores),
    'token_type': list(model.types),
    'bos_token_id': 1,
    'eos_token_id': 2,
    'unknown_token_id': 0,
    'add_space_prefix': model.prefix,
    **changes,
  }
  return {f'tokenizer.ggml.{k}': v for k, v in metadata.items()}


def ggufs():
  """{name: metadata} of every kind of GGUF tokenizer."""
  byte_level = {
    pre: gguf_metadata(pre=pre)
    for pre in ('gpt-2', 'smollm', 'llama-bpe', 'qwen2')
  }
  byte_level['llama-bpe'] = gguf_metadata(pre='llama-bpe', add_bos_token=None)
  return byte_level | {
    name: pieces_metadata(name) for name in ('bpe', 'bpe_bare')
  }


def sentencepiece_folder(folder, name, **settings):
  """Writes what Llama 2 ships: tokenizer.model and tokenizer_config.json."""
  data = (GOLDEN / 'tokenizers' / f'{name}.model').read_bytes()
  (folder / 'tokenizer.model').write_bytes(data)
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return tokenizers.from_folder(folder)


def chat_tokenizers():
  """{name: a tokenizer like that family's, with its kind of template}."""
  plain = gguf_metadata()
  tokens = plain['tokenizer.ggml.tokens']
  marks = ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>']
  tokens = [*tokens, *marks, '<|eot_id|>']
  llama3 = gguf_metadata(
    pre='llama-bpe',
    tokens=tokens,
    token_type=[*plain['tokenizer.ggml.token_type'], 3, 3, 3, 3],
    bos_token_id=tokens.index('<|begin_of_text|>'),
    eos_token_id=tokens.index('<|eot_id|>'),
    add_bos_token=None,
  )
  metadata = {
    'chatml': plain,
    'llama3': llama3,
    'mistral': pieces_metadata('bpe'),
    'gemma': pieces_metadata('bpe_bare'),
  }
  return {
    name: tokenizers.from_gguf(values).with_template(
      (GOLDEN / 'templates' / f'{name}.jinja').read_text()
    )
    for name, values in metadata.items()
  }
