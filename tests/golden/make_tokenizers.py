"""Write the tiny SentencePiece models and the ids that tokenizers are held to.

Needs transformers and sentencepiece, which nothing else here does:
  pip install 'transformers==5.*' 'sentencepiece==0.2.*'
  PYTHONPATH=. python tests/golden/make_tokenizers.py [SmolLM2.gguf]
`tokenizers/KIND.model` are trained anew on the texts below. `tokenizers.json`
has the ids of `sentencepiece` for them, and the ids of `transformers` for what
`save` writes of our GGUF tokenizers; with a SmolLM2 file also the latter's.
"""

import contextlib
import json
import pathlib
import random
import sys
import tempfile

import sentencepiece
import tokenizers as backend
import transformers

from dpo_jax.data import tokenizers
from tests import vocabularies

HERE = pathlib.Path(__file__).parent
SHARED = dict(
  vocab_size=460,
  hard_vocab_limit=False,
  character_coverage=0.98,
  num_threads=1,
  minloglevel=2,
)
# A ligature, a wide A, a wide space and a wide < to their plain forms.
RULES = 'FB01\t66 69\nFF21\t41\n3000\t20\nFF1C\t3C\n'
KINDS = {
  'bpe': dict(  # as Llama 2 and Mistral v0.1
    model_type='bpe',
    byte_fallback=True,
    split_digits=True,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    allow_whitespace_only_pieces=True,
  ),
  'bpe_bare': dict(  # as Gemma: no space before a text, pieces of the user
    model_type='bpe',
    byte_fallback=True,
    split_digits=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
    allow_whitespace_only_pieces=True,
    user_defined_symbols=['<start_of_turn>', '<end_of_turn>', '\n\n', '▁▁▁'],
  ),
  'unigram': dict(
    model_type='unigram',
    byte_fallback=True,
    remove_extra_whitespaces=False,
    normalization_rule_name='identity',
  ),
  'unigram_lossy': dict(  # as T5: spaces collapse, a normalizer, no bytes
    model_type='unigram',
    normalization_rule_tsv='rules',
  ),
}


def train(name, options):
  # In a folder of its own: the model keeps the names of its files.
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    corpus = '\n'.join(vocabularies.CORPUS)
    pathlib.Path('corpus').write_text(corpus, encoding='utf-8')
    pathlib.Path('rules').write_text(RULES)
    sentencepiece.SentencePieceTrainer.train(
      input='corpus', model_prefix=name, **SHARED, **options
    )
    data = pathlib.Path(f'{name}.model').read_bytes()
  (HERE / 'tokenizers' / f'{name}.model').write_bytes(data)
  return sentencepiece.SentencePieceProcessor(model_proto=data)


def texts():
  random.seed(0)
  words = ' '.join(vocabularies.CORPUS).split()
  made = list(vocabularies.TEXTS)
  for _ in range(60):
    gaps = [random.choice(['', ' ', ' ', ' ', '  ', '   ', '\n', '\n\n\n'])]
    gaps += random.choices(['', ' ', ' ', ' ', '  ', '     ', '\n\n'], k=8)
    made.append(
      ''.join(g + w for g, w in zip(gaps, random.choices(words, k=9)))
    )
  for _ in range(40):
    alphabet = 'aaab  eéthTH<|>_.\n\t12你🤖'
    made.append(''.join(random.choices(alphabet, k=random.randint(1, 30))))
  return made


def saved_ids(tokenizer, texts):
  """Ids of transformers on what `save` writes; special tokens are text."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
  assert theirs.eos_token_id == tokenizer.eos_id
  assert theirs.chat_template == tokenizer.template
  with_bos = theirs('a')['input_ids']
  assert (with_bos[0] == tokenizer.bos_id) == (tokenizer.bos_id is not None)
  return [
    theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    for text in texts
  ]


def main():
  golden = {
    'versions': {
      module.__name__: module.__version__
      for module in (sentencepiece, transformers, backend)
    },
    'texts': texts(),
    'sentencepiece': {},
    'saved': {},
  }
  for name, options in KINDS.items():
    model = train(name, options)
    golden['sentencepiece'][name] = [
      model.encode(text) for text in golden['texts']
    ]
  for name, metadata in vocabularies.ggufs().items():
    tokenizer = tokenizers.from_gguf(metadata)
    golden['saved'][name] = saved_ids(tokenizer, golden['texts'])
  golden['saved']['bytes'] = saved_ids(
    tokenizers.ByteTokenizer(), golden['texts']
  )
  if sys.argv[1:]:
    import gguf

    fields = gguf.GGUFReader(sys.argv[1]).fields
    smollm2 = tokenizers.from_gguf({k: f.contents() for k, f in fields.items()})
    golden['saved']['smollm2'] = saved_ids(smollm2, golden['texts'])
  text = json.dumps(golden, separators=(',', ':'))
  (HERE / 'tokenizers.json').write_text(text + '\n')


if __name__ == '__main__':
  main()
