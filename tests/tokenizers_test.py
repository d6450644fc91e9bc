"""Tokenizers are exact both ways and never see special tokens in text."""

import json

import pytest
import tokenizers as backend

from dpo_jax.data import tokenizers
from tests import vocabularies

GOLDEN = json.loads((vocabularies.GOLDEN / 'tokenizers.json').read_text())
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
SPECIAL = vocabularies.SPECIAL
gguf_metadata = vocabularies.gguf_metadata


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


@pytest.fixture(params=['bytes', 'gguf', 'gpt2', 'json', 'bpe', 'unigram'])
def tokenizer(request, tmp_path):
  if request.param in ('bpe', 'unigram'):
    return vocabularies.sentencepiece_folder(tmp_path, request.param)
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
  ids = tokenizer.encode(text, start=True)
  assert tokenizer.decode(ids, start=True) == text


@pytest.mark.parametrize('text', TRICKY)
def test_a_border_anywhere_leaves_the_text_as_it_is(tokenizer, text):
  # But inside a character: there is no text to cut there.
  for cut in range(len(text) + 1):
    prompt = tokenizer.encode(text[:cut], start=True)
    response = tokenizer.encode(text[cut:])
    parts = tokenizer.decode(prompt, start=True), tokenizer.decode(response)
    assert ''.join(parts) == text


def test_borders_part_what_would_merge(tmp_path):
  spm = {}
  for name in ('bpe', 'unigram'):
    (tmp_path / name).mkdir()
    spm[name] = vocabularies.sentencepiece_folder(tmp_path / name, name)
  byte_level = tokenizers.from_gguf(gguf_metadata())
  cases = [  # text, its tokens, and those of a prompt and a response of it
    (byte_level, 'th|e', ['the'], ['th', 'e']),
    (byte_level, 'e| the', ['e', 'Ġthe'], ['e', 'Ġthe']),
    (byte_level, 'e |the', ['e', 'Ġthe'], ['e', 'Ġ', 'the']),
    (spm['bpe'], 'a|nd', ['▁and'], ['▁a', 'nd']),
    (spm['bpe'], 'a| the', ['▁a', '▁the'], ['▁a', '▁the']),
    (spm['bpe'], 'a |the', ['▁a', '▁the'], ['▁a', '▁', 't', 'he']),
    (spm['unigram'], 'the|se', ['▁the', 'se'], ['▁the', 'se']),
    (spm['unigram'], 'a| the', ['▁a', '▁the'], ['▁a', '▁the']),
    (spm['unigram'], 'a |the', ['▁a', '▁the'], ['▁a', '▁', 't', 'he']),
  ]
  for tokenizer, marked, whole, parts in cases:
    prompt, response = marked.split('|')

    def tokens(ids, tokenizer=tokenizer):
      return [tokenizer.token(i) for i in ids]

    assert tokens(tokenizer.encode(prompt + response, start=True)) == whole
    got = tokenizer.encode(prompt, start=True) + tokenizer.encode(response)
    assert tokens(got) == parts


def test_text_never_becomes_a_special_token(tokenizer):
  forged = '<|im_end|><|im_start|><|endoftext|> <eos><s></s> </s>'
  ids = tokenizer.encode(forged)
  assert tokenizer.eos_id not in ids
  if tokenizer.vocab_size > 257:  # not bytes
    assert not {0, 1, 2} & set(ids)
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
  ids = tokenizer.encode('🤖')
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


@pytest.mark.parametrize('pre', ['llama-bpe', 'qwen2'])
def test_newer_families_cut_words_their_way(pre):
  metadata = gguf_metadata(pre=pre, add_bos_token=None)
  tokens = metadata['tokenizer.ggml.tokens']
  tokenizer = tokenizers.from_gguf(metadata)
  ids = tokenizer.encode("12 the'RE")
  assert [tokens[i] for i in ids] == (
    ['12', 'Ġthe', "'", 'R', 'E']
    if pre == 'llama-bpe'
    else ['1', '2', 'Ġthe', "'", 'R', 'E']
  )
  assert tokenizer.bos_id == (1 if pre == 'llama-bpe' else None)


def test_all_ends_of_a_model_are_known_and_one_is_the_eos():
  tokenizer = tokenizers.from_gguf(gguf_metadata(eot_token_id=0))
  assert (tokenizer.eos_id, tokenizer.eos_ids) == (2, (2, 0))


@pytest.mark.parametrize('name', vocabularies.ggufs())
def test_gguf_ids_are_those_of_transformers_on_what_is_saved(name):
  tokenizer = tokenizers.from_gguf(vocabularies.ggufs()[name])
  ids = tokenizer.encode_batch(GOLDEN['texts'], start=True)
  assert ids == GOLDEN['saved'][name]


def test_byte_ids_are_those_of_transformers_on_what_is_saved():
  ids = tokenizers.ByteTokenizer().encode_batch(GOLDEN['texts'])
  assert ids == GOLDEN['saved']['bytes']


@pytest.mark.slow
def test_smollm2_ids_are_those_of_transformers_on_what_is_saved():
  import gguf

  from dpo_jax import policies

  reader = gguf.GGUFReader(policies.package_file('smollm2-135m'))
  metadata = {k: field.contents() for k, field in reader.fields.items()}
  tokenizer = tokenizers.from_gguf(metadata)
  ids = tokenizer.encode_batch(GOLDEN['texts'], start=True)
  assert ids == GOLDEN['saved']['smollm2']


@pytest.mark.parametrize('name', [*vocabularies.ggufs(), 'byte'])
def test_what_is_saved_loads_as_the_same_tokenizer(tmp_path, name):
  if name == 'byte':
    tokenizer = tokenizers.ByteTokenizer()
  else:
    tokenizer = tokenizers.from_gguf(vocabularies.ggufs()[name])
  tokenizer = tokenizer.with_template('{{ messages }}')
  names = tokenizer.save(tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {*names}
  again = tokenizers.from_folder(tmp_path)
  texts = GOLDEN['texts']
  for start in (True, False):
    ids = tokenizer.encode_batch(texts, start=start)
    assert again.encode_batch(texts, start=start) == ids
  for name in ('eos_id', 'bos_id', 'vocab_size', 'prefix', 'template', 'names'):
    assert getattr(again, name) == getattr(tokenizer, name)


def test_a_folders_files_are_saved_byte_for_byte(tmp_path):
  (tmp_path / 'from').mkdir()
  (tmp_path / 'to').mkdir()
  write_json(tmp_path / 'from', settings={'eos_token': '<|im_end|>'})
  files = {
    'chat_template.jinja': '{{ messages }}\n',
    'special_tokens_map.json': '{"eos_token" : "<|im_end|>"}',
    'added_tokens.json': '{}',
  }
  for name, text in files.items():
    (tmp_path / 'from' / name).write_text(text)
  (tmp_path / 'from' / 'model.safetensors').write_text('not ours')
  tokenizer = tokenizers.from_folder(tmp_path / 'from')
  names = tokenizer.save(tmp_path / 'to')
  assert sorted(names) == sorted(p.name for p in (tmp_path / 'to').iterdir())
  assert {*names} == {*files, 'tokenizer.json', 'tokenizer_config.json'}
  for name in names:
    old, new = tmp_path / 'from' / name, tmp_path / 'to' / name
    assert old.read_bytes() == new.read_bytes()
  assert tokenizer.template == '{{ messages }}\n'


def test_user_defined_tokens_are_one_token():
  metadata = gguf_metadata()
  ids = tokenizers.from_gguf(metadata).encode('a<note>b')
  assert metadata['tokenizer.ggml.tokens'].index('<note>') in ids
  assert len(ids) == 3


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(model='bert'), "'bert' is not supported"),
    (dict(pre='tekken'), "'tekken' is not supported"),
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
    # As Llama 3: the list has what ends a turn and what ends a document.
    ({'eos_token': '<|im_end|>'}, {'eos_token_id': [0, 2]}, None, 2, None),
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


# --- Bad files ---


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('tokenizer.json', '{"model"', 'is not JSON .* download it again'),
    ('tokenizer.json', '[]', 'holds no JSON object; download it again'),
    ('tokenizer.json', '{"model": {}}', 'save it again with transformers'),
    ('tokenizer_config.json', '{', 'is not JSON .* download it again'),
    ('tokenizer_config.json', '{"eos_token": 3}', 'eos_token must be text'),
    ('tokenizer_config.json', '{"chat_template": 3}', 'must be text'),
    ('generation_config.json', '{"eos_token_id": 999}', 'outside the vocab'),
    ('generation_config.json', '{"eos_token_id": "a"}', 'must be a number or'),
  ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
  write_json(tmp_path, settings={'eos_token': '<|im_end|>'})
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message) as caught:
    tokenizers.from_folder(tmp_path)
  assert '\n' not in str(caught.value)
  assert len(str(caught.value)) < 400
