"""Length bias: a model whose responses end, and labels that like them long.

The SFT model of `imdb_frontier` writes on until it is cut, so all lengths are
one. What `make` puts into a folder:

  short.jsonl          beginnings of reviews with one to three sentences more
  short_sft/           the SFT model, trained on these for a little: it ends
  completions.jsonl    its completions of the train prompts, with P(positive)
  baseline.jsonl       one of each test prompt: what runs are compared with
  pairs_BONUS.jsonl    all pairs of completions that ended, the one chosen whose
                       P(positive) + BONUS x length in tokens is higher
  pairs_BONUS.json     how many labels the length has turned
"""

import copy
import dataclasses
import itertools
import json
import re

import numpy as np

from dpo_jax import online
from dpo_jax import rewards
from dpo_jax import workdirs
from experiments import imdb_results
from experiments import imdb_texts

# A sentence ends here, if white space or nothing follows.
_END = re.compile(r'[.!?]["\')]*(?=\s|$)')
_SENTENCES = 3  # at most
ROOM = 48  # tokens of a completion, EOS among them
TOKENS = 36  # of a response that is learned from, at most


def short_scale(scale):
  """Returns a scale of `imdb_scales` with the tokens of short responses."""
  room = min(ROOM, 2 * scale.new_tokens)
  return dataclasses.replace(
    scale, sft_tokens=min(TOKENS, scale.sft_tokens), new_tokens=room
  )


def short_paths(paths, folder, bonus):
  """Returns `imdb_scales.Paths` whose SFT model, pairs, ... are in a folder."""
  out = copy.copy(paths)
  out.sft_rows = folder / 'short.jsonl'
  out.sft = folder / 'short_sft'
  out.completions = folder / 'completions.jsonl'
  out.baseline = folder / 'baseline.jsonl'
  out.pairs = folder / f'pairs_{bonus}.jsonl'
  return out


# --- Reviews that end ---------------------------------------------------------


def cut_sentences(text, tokenizer, tokens, sentences):
  """Returns a text up to the end of its sentence number `sentences`.

  Or of an earlier one, as `tokens` allow; '' where the first is too long.
  """
  cut = ''
  for end in itertools.islice(_END.finditer(text), sentences):
    if len(tokenizer.encode(text[: end.end()])) + 1 > tokens:  # with its EOS
      break
    cut = text[: end.end()]
  return cut


def write_rows(scale, paths, source, number):
  """Writes short.jsonl.

  Args:
    scale: of `short_scale`.
    paths: of `short_paths`.
    source: sft.jsonl of the frontier.
    number: of rows, at most.
  """
  tokenizer = imdb_texts.open_tokenizer(scale, paths)
  rng = np.random.default_rng(scale.seed)
  rows, read = [], imdb_results.read_lines(source)
  for n in rng.permutation(len(read)):
    if len(rows) == number:
      break
    sentences = int(rng.integers(1, _SENTENCES + 1))
    text = read[n]['response']
    cut = cut_sentences(text, tokenizer, scale.sft_tokens, sentences)
    if cut:
      rows.append({'prompt': read[n]['prompt'], 'response': cut})
  if not rows:
    raise ValueError(
      f'no review of {source} has a sentence that ends within'
      f' {scale.sft_tokens} tokens'
    )
  online.write_lines(str(paths.sft_rows), rows)


# --- Completions, pairs -------------------------------------------------------


def write_baseline(scale, paths):
  """Writes a completion of each test prompt by the short SFT model."""
  rows = imdb_results.read_lines(paths.test_prompts)
  prompts = [row['prompt'] for row in rows[: scale.test_prompts]]
  texts, samples = imdb_texts.sample(
    scale, prompts, number=1, workdir=paths.sft, stream='baseline'
  )
  values = rewards.score(
    rewards.get(paths.reward), prompts, texts, ended=samples.ended
  )
  online.write_lines(
    str(paths.baseline),
    [
      {
        'prompt': prompt,
        'response': text,
        'length': int(length),
        'reward': float(value),
      }
      for prompt, text, length, value in zip(
        prompts, texts, samples.lengths, values
      )
    ],
  )


def token_lengths(scale, paths, texts, ended):
  """Returns the tokens of texts as they are learned from, EOS included: [N].

  Sampled ones may have been other tokens, and more.
  """
  tokenizer = imdb_texts.open_tokenizer(scale, paths)
  return np.array([len(tokenizer.encode(text)) for text in texts]) + ended


def biased_pairs(completions, bonus):
  """Pairs the completions of a prompt that ended, by their biased score.

  Args:
    completions: dicts of prompt, response, ended, probability and length.
    bonus: of the score, for a token.

  Returns:
    (pairs, account): the account has the numbers of completions, ended ones,
    pairs, ties and labels that are other than P(positive) alone would say,
    and the mean lengths of chosen and rejected responses.
  """
  pairs, gaps, ties, turned = [], [], 0, 0
  ended = [row for row in completions if row['ended']]
  for prompt, group in itertools.groupby(ended, lambda row: row['prompt']):
    for one, other in itertools.combinations(group, 2):
      positive = one['probability'] - other['probability']
      longer = one['length'] - other['length']
      score = positive + bonus * longer
      if score == 0.0 or one['response'] == other['response']:
        ties += 1
        continue
      turned += positive * score < 0.0
      if score < 0.0:
        one, other, longer = other, one, -longer
      gaps.append(longer)
      pairs.append(
        {
          'prompt': prompt,
          'chosen': one['response'],
          'rejected': other['response'],
        }
      )
  account = {
    'completions': len(completions),
    'ended': len(ended),
    'pairs': len(pairs),
    'ties': ties,
    'turned': turned,
    'length': float(np.mean([row['length'] for row in ended] or [0.0])),
    'longer_by': float(np.mean(gaps or [0.0])),
  }
  return pairs, account


def write_pairs(scale, paths, bonus):
  """Writes the pairs and their account; what is there stays."""
  rows = imdb_results.read_lines(paths.completions)
  lengths = token_lengths(
    scale,
    paths,
    [row['response'] for row in rows],
    np.array([row['ended'] for row in rows]),
  )
  rows = [row | {'length': int(n)} for row, n in zip(rows, lengths)]
  pairs, account = biased_pairs(rows, bonus)
  if not pairs:
    raise ValueError(
      f'{account["ended"]} of {len(rows)} completions ended, which makes no'
      ' pair; train the short SFT model longer'
    )
  text = json.dumps(account | {'bonus': bonus})
  workdirs.write(str(account_path(paths)), text)
  online.write_lines(str(paths.pairs), pairs)  # the last one


def account_path(paths):
  """Returns where the account of `paths.pairs` is."""
  return paths.pairs.with_suffix('.json')


def make(scale, paths, source, *, bonus, rows, train):
  """Makes what is not there yet.

  Args:
    scale: of `short_scale`.
    paths: of `short_paths`.
    source: sft.jsonl of the frontier.
    bonus: of a token.
    rows: of short.jsonl, at most.
    train: trains `paths.sft`, () -> exit status, 0 when it is there.

  Returns:
    exit status of `train`.
  """
  paths.sft_rows.parent.mkdir(parents=True, exist_ok=True)
  if not paths.sft_rows.exists():
    write_rows(scale, paths, source, rows)
  if status := train():
    return status
  for path, write in [
    (paths.completions, lambda: imdb_texts.write_completions(scale, paths)),
    (paths.baseline, lambda: write_baseline(scale, paths)),
    (paths.pairs, lambda: write_pairs(scale, paths, bonus)),
  ]:
    if not path.exists():
      write()
  account = json.loads(account_path(paths).read_text())
  print(
    f'{account["ended"]:,} of {account["completions"]:,} completions ended,'
    f' {account["length"]:.1f} tokens long; {account["pairs"]:,} pairs,'
    f' {account["ties"]:,} ties left out; {bonus} a token turned'
    f' {account["turned"]:,} labels; chosen ones are'
    f' {account["longer_by"]:+.2f} tokens longer'
  )
  return 0
