"""SentencePiece models encode as the sentencepiece package does."""

import json

import pytest

from dpo_jax.data import sentencepieces
from dpo_jax.data import tokenizers
from tests import vocabularies

GOLDEN = json.loads((vocabularies.GOLDEN / 'tokenizers.json').read_text())


def file(name):
  return (vocabularies.GOLDEN / 'tokenizers' / f'{name}.model').read_bytes()


def pieces(tokenizer, text, **keywords):
  return [tokenizer.token(i) for i in tokenizer.encode(text, **keywords)]


@pytest.mark.parametrize('name', GOLDEN['sentencepiece'])
def test_ids_are_those_of_sentencepiece(tmp_path, name):
  tokenizer = vocabularies.sentencepiece_folder(tmp_path, name)
  texts = GOLDEN['texts']
  if name == 'unigram_lossy':
    # On purpose not as there: a prompt keeps the spaces at its end.
    assert pieces(tokenizer, 'the  ', start=True) == ['▁the', '▁']
    texts = [text.rstrip(' \u3000') for text in texts]
  ids = tokenizer.encode_batch(texts, start=True)
  assert ids == GOLDEN['sentencepiece'][name]
  assert len({tuple(i) for i in ids}) > 80


def test_a_file_and_a_gguf_of_it_are_the_same_tokenizer(tmp_path):
  for name in ('bpe', 'bpe_bare'):
    one = vocabularies.sentencepiece_folder(tmp_path, name)
    two = tokenizers.from_gguf(vocabularies.pieces_metadata(name))
    assert one.encode_batch(GOLDEN['texts']) == two.encode_batch(
      GOLDEN['texts']
    )
    assert (one.eos_id, one.bos_id, one.prefix, one.vocab_size) == (
      two.eos_id,
      two.bos_id,
      two.prefix,
      two.vocab_size,
    )


def test_the_space_goes_before_what_begins_and_nothing_else(tmp_path):
  tokenizer = vocabularies.sentencepiece_folder(tmp_path, 'bpe')
  assert pieces(tokenizer, 'the', start=True) == ['▁the']
  assert pieces(tokenizer, 'the') == ['t', 'he']
  assert pieces(tokenizer, ' the', start=True) == ['▁', '▁the']
  assert pieces(tokenizer, '', start=True) == []
  ids = tokenizer.encode('the', start=True)
  assert tokenizer.decode(ids) == ' the'
  assert tokenizer.decode(ids, start=True) == 'the'
  bare = vocabularies.sentencepiece_folder(tmp_path, 'bpe_bare')
  assert pieces(bare, 'he', start=True) == pieces(bare, 'he') == ['he']


def test_settings_beside_the_file_count(tmp_path):
  def load(**settings):
    return vocabularies.sentencepiece_folder(tmp_path, 'bpe', **settings)

  assert (load().eos_id, load().bos_id) == (2, 1)
  assert load().names == {
    'unk_token': '<unk>',
    'bos_token': '<s>',
    'eos_token': '</s>',
  }
  assert load(add_bos_token=False).bos_id is None
  assert load().prefix.where == 'segments'
  assert load(legacy=False).prefix.where == 'first'
  size = load().vocab_size
  added = {
    str(size): {'content': '<|im_start|>', 'special': True},
    str(size + 1): {'content': '<|im_end|>', 'special': True},
  }
  tokenizer = load(added_tokens_decoder=added, eos_token='<|im_end|>')
  assert tokenizer.eos_id == size + 1
  assert tokenizer.vocab_size == size + 2
  assert tokenizer.eos_id not in tokenizer.encode('<|im_end|>')
  with pytest.raises(ValueError, match=r'correct added_tokens_decoder'):
    load(added_tokens_decoder={'9999': {'content': 'x', 'special': True}})


def test_text_that_normalizes_to_a_special_token_stays_text(tmp_path):
  tokenizer = vocabularies.sentencepiece_folder(tmp_path, 'unigram_lossy')
  # The normalizer makes '</s>' of it, which is among the model's pieces.
  for text in ('\uff1c/s>', 'a </s>', '</s>\uff1c/s></s>'):
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert len(ids) >= 4


@pytest.mark.parametrize('name', GOLDEN['sentencepiece'])
def test_every_truncation_is_refused(tmp_path, name):
  path = tmp_path / 'tokenizer.model'
  data = file(name)
  for size in [0, 1, 2, 5, len(data) // 2, len(data) - 7, len(data) - 1]:
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match='download it again') as caught:
      tokenizers.from_folder(tmp_path)
    assert str(path) in str(caught.value)


def test_what_is_no_model_is_refused():
  for data in (b'not a model', b'{"a": 1}', bytes(range(256))):
    with pytest.raises(ValueError, match='download it again'):
      sentencepieces.parse(data)
  # trainer_spec { model_type: WORD }
  with pytest.raises(ValueError, match='only bpe and unigram'):
    sentencepieces.parse(file('bpe') + b'\x12\x02\x18\x03')


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(scores=[0.0]), '460 tokens but 1 scores'),
    (dict(token_type=[1]), '1 token types; the numbers must be equal'),
    (dict(unknown_token_id=999), 'no token 999 for unknowns'),
    (dict(eos_token_id=999), 'EOS id 999 is outside'),
  ],
)
def test_gguf_pieces_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tokenizers.from_gguf(vocabularies.pieces_metadata(**changes))
