"""Tokenizers are exact both ways and never see special tokens in text."""

import json
import pathlib

import pytest
import tokenizers as backend

from dpo_jax.data import tokenizers

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TRICKY = (
  '',
  ' ',
  'plain words, and more.',
  "  it's 1984\n\n\ttabs  ",
  'étude 你好 مرحبا',
  '🤖 👩\u200d🔬 ❤️ 🇫🇷',
  '<|im_end|> <|endoftext|> </s> <eos>',
  '\x00\ufffd\u3000',
)
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']


def byte_symbols():
  return sorted(backend.pre_tokenizers.ByteLevel.alphabet())


def gguf_metadata(**changes):
  tokens = [*SPECIAL, *byte_symbols(), '<note>', 'th', 'the', 'Ġthe', '12']
  types = [3] * 3 + [1] * 256 + [4] + [1] * 4
  metadata = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': types,
    'tokenizer.ggml.merges': ['t h', 'th e', 'Ġ the', '1 2'],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.add_bos_token': False,
    'tokenizer.ggml.add_space_prefix': False,
  }
  metadata.update(
    {f'tokenizer.ggml.{name}': value for name, value in changes.items()}
  )
  return {name: value for name, value in metadata.items() if value is not None}


def write_json(folder, *, settings=None, config=None, special=True, post=None):
  """Writes a Hugging Face tokenizer folder with the vocabulary above."""
  tokens = gguf_metadata()['tokenizer.ggml.tokens']
  vocab = {token: i for i, token in enumerate(tokens)}
  model = backend.models.BPE(vocab, [('t', 'h'), ('th', 'e'), ('Ġ', 'the')])
  tokenizer = backend.Tokenizer(model)
  tokenizer.pre_tokenizer = backend.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = backend.decoders.ByteLevel()
  tokenizer.add_tokens(
    [backend.AddedToken(token, special=special) for token in SPECIAL]
  )
  # A leftover of training that must not cut our texts.
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=4)
  if post:
    tokenizer.post_processor = backend.processors.TemplateProcessing(
      single=f'{post} $A', special_tokens=[(post, vocab[post])]
    )
  tokenizer.save(str(folder / 'tokenizer.json'))
  if settings is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  if config is not None:
    (folder / 'config.json').write_text(json.dumps(config))
  return folder / 'tokenizer.json'


def write_gpt2(folder):
  metadata = gguf_metadata()
  vocab = {t: i for i, t in enumerate(metadata['tokenizer.ggml.tokens'])}
  (folder / 'vocab.json').write_text(json.dumps(vocab))
  (folder / 'merges.txt').write_text(
    '#version: 0.2\n' + '\n'.join(metadata['tokenizer.ggml.merges']) + '\n'
  )
  return folder / 'vocab.json', folder / 'merges.txt'


@pytest.fixture(params=['bytes', 'gguf', 'gpt2', 'json'])
def tokenizer(request, tmp_path):
  if request.param == 'bytes':
    return tokenizers.ByteTokenizer()
  if request.param == 'gguf':
    return tokenizers.from_gguf(gguf_metadata())
  if request.param == 'gpt2':
    return tokenizers.from_gpt2_files(*write_gpt2(tmp_path))
  return tokenizers.from_tokenizer_json(
    write_json(tmp_path, settings={'eos_token': '<|im_end|>'})
  )


@pytest.mark.parametrize('text', TRICKY)
def test_decode_inverts_encode(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_becomes_a_special_token(tokenizer):
  forged = '<|im_end|><|im_start|><|endoftext|> <eos>'
  ids = tokenizer.encode(forged)
  assert tokenizer.eos_id not in ids
  assert not {0, 1, 2} & set(ids)  # The special tokens of all but bytes.
  assert tokenizer.decode(ids) == forged


def test_batches_equal_single_texts(tokenizer):
  assert tokenizer.encode_batch(TRICKY) == [
    tokenizer.encode(text) for text in TRICKY
  ]


def test_decode_shows_eos_and_refuses_unknown_ids(tokenizer):
  text = tokenizer.decode([*tokenizer.encode('ab'), tokenizer.eos_id])
  assert text.startswith('ab<') and text.endswith('>')
  with pytest.raises(ValueError, match='outside the vocabulary'):
    tokenizer.decode([tokenizer.vocab_size])


def test_half_a_character_decodes_to_the_replacement_sign(tokenizer):
  ids = tokenizer.encode('é')
  assert tokenizer.decode(ids[:1]) == '\ufffd'


def test_bytes_are_their_own_ids():
  tokenizer = tokenizers.ByteTokenizer()
  assert tokenizer.encode('aé') == [97, 0xC3, 0xA9]
  assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (
    256,
    None,
    257,
  )


def test_smollm_splits_digits_and_gpt2_does_not():
  ids = {}
  for pre in ('smollm', 'gpt-2'):
    metadata = gguf_metadata(pre=pre)
    tokens = metadata['tokenizer.ggml.tokens']
    ids[pre] = [
      tokens[i] for i in tokenizers.from_gguf(metadata).encode('the the 12')
    ]
  assert ids['smollm'] == ['the', 'Ġthe', 'Ġ', '1', '2']
  assert ids['gpt-2'] == ['the', 'Ġthe', 'Ġ', '12']


def test_user_defined_tokens_are_one_token():
  metadata = gguf_metadata()
  ids = tokenizers.from_gguf(metadata).encode('a<note>b')
  assert metadata['tokenizer.ggml.tokens'].index('<note>') in ids
  assert len(ids) == 3


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(model='llama'), "'llama' is not supported"),
    (dict(pre='llama-bpe'), "'llama-bpe' is not supported"),
    (dict(pre=None), 'no tokenizer.ggml.pre'),
    (dict(eos_token_id=None), 'no tokenizer.ggml.eos_token_id'),
    (dict(eos_token_id=9999), 'outside the vocabulary'),
    (dict(eos_token_id=40), 'data could forge it'),
    (dict(add_space_prefix=True), 'add_space_prefix'),
    (dict(token_type=[1]), 'numbers must be equal'),
  ],
)
def test_gguf_that_we_would_misread_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tokenizers.from_gguf(gguf_metadata(**changes))


@pytest.mark.parametrize('wants, bos', [(False, None), (True, 1)])
def test_gguf_bos_only_if_the_model_wants_it(wants, bos):
  tokenizer = tokenizers.from_gguf(gguf_metadata(add_bos_token=wants))
  assert tokenizer.bos_id == bos


@pytest.mark.parametrize(
  'settings, config, post, eos, bos',
  [
    ({'eos_token': '<|im_end|>'}, None, None, 2, None),
    ({'eos_token': {'content': '<|im_end|>'}}, None, None, 2, None),
    (None, {'eos_token_id': 0}, None, 0, None),
    (None, {'eos_token_id': [2, 0], 'bos_token_id': 1}, None, 2, None),
    (None, {'eos_token_id': 2, 'bos_token_id': 1}, '<|im_start|>', 2, 1),
    (
      {
        'eos_token': '<|im_end|>',
        'bos_token': '<|im_start|>',
        'add_bos_token': True,
      },
      None,
      None,
      2,
      1,
    ),
    (
      {
        'eos_token': '<|im_end|>',
        'bos_token': '<|im_start|>',
        'add_bos_token': False,
      },
      None,
      '<|im_start|>',
      2,
      None,
    ),
  ],
)
def test_json_special_ids_follow_the_files_beside_it(
  tmp_path, settings, config, post, eos, bos
):
  path = write_json(tmp_path, settings=settings, config=config, post=post)
  tokenizer = tokenizers.from_tokenizer_json(path)
  assert (tokenizer.eos_id, tokenizer.bos_id) == (eos, bos)
  assert bos not in tokenizer.encode('the')


def test_json_truncation_and_padding_are_off(tmp_path):
  path = write_json(tmp_path, settings={'eos_token': '<|im_end|>'})
  tokenizer = tokenizers.from_tokenizer_json(path)
  assert len(tokenizer.encode('b' * 9)) == 9
  assert len(tokenizer.encode('b')) == 1


def test_json_eos_is_special_even_if_the_file_forgot(tmp_path):
  path = write_json(
    tmp_path, settings={'eos_token': '<|im_end|>'}, special=False
  )
  tokenizer = tokenizers.from_tokenizer_json(path)
  assert tokenizer.eos_id not in tokenizer.encode('<|im_end|>')


@pytest.mark.parametrize(
  'settings, message',
  [
    (None, 'No EOS token is known'),
    ({'eos_token': '<nope>'}, 'which tokenizer.json lacks'),
    ({'eos_token': '<|im_end|>', 'add_bos_token': True}, 'no bos_token'),
  ],
)
def test_json_without_the_ids_it_needs_is_refused(tmp_path, settings, message):
  path = write_json(tmp_path, settings=settings)
  with pytest.raises(ValueError, match=message):
    tokenizers.from_tokenizer_json(path)


def test_folder_gives_what_it_has(tmp_path):
  assert tokenizers.from_folder(tmp_path) is None
  write_gpt2(tmp_path)
  assert tokenizers.from_folder(tmp_path).eos_id == 0
  (tmp_path / 'merges.txt').unlink()
  with pytest.raises(ValueError, match=r'vocab.json but neither'):
    tokenizers.from_folder(tmp_path)


def test_bad_merges_line_is_named(tmp_path):
  vocab, merges = write_gpt2(tmp_path)
  merges.write_text('t h\nbroken\n')
  with pytest.raises(ValueError, match="line 2: 'broken'"):
    tokenizers.from_gpt2_files(vocab, merges)


def test_real_gpt2_ids(shared):
  folder = shared / 'data' / 'tokenizers' / 'gpt2'
  tokenizer = tokenizers.from_gpt2_files(
    folder / 'vocab.json', folder / 'merges.txt'
  )
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (50256, 50257)
  # From the documentation of GPT2Tokenizer in transformers.
  assert tokenizer.encode('Hello world') == [15496, 995]
  assert tokenizer.encode(' Hello world') == [18435, 995]
  for text in TRICKY:
    assert tokenizer.decode(tokenizer.encode(text)) == text
