"""From examples to token groups: a prompt and its responses.

BOS, where the model wants one, starts the prompt and appears nowhere else. EOS
ends a response exactly once, and only if its text really ended and was not
truncated. Nothing stands between prompt and response. A prompt too long keeps
its tail, a response its head. Both limits count BOS and EOS.

    prompt 'Hi', chosen ' Yes', byte tokens (EOS 256), limits 2 and 4
    prompt [72, 105], chosen [32, 89, 101, 115]     truncated, so no EOS
    with limits 2 and 5: chosen [32, 89, 101, 115, 256]
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable

import numpy as np

from dpo_jax.data import reports

_RESPONSES = {
  'pairs': (('chosen', 'chosen_ended'), ('rejected', 'rejected_ended')),
  'sft': (('response', 'ended'),),
}
# Examples that are encoded at once.
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Group:
  """A prompt and its responses as int32 tokens; chosen comes first."""

  prompt: np.ndarray
  responses: tuple[np.ndarray, ...]
  weight: float
  p: float
  id: str


@dataclasses.dataclass(frozen=True)
class TokenReport:
  """What tokenization did; `truncated` and `lengths` count kept groups."""

  read: int
  kept: int
  dropped: dict[str, int]
  truncated: dict[str, int]
  lengths: dict[str, dict[str, float]]

  def __str__(self) -> str:
    counts = [('groups', ''), ('read', f'{self.read:,}')]
    counts += [(f'  dropped: {k}', f'{v:,}') for k, v in self.dropped.items()]
    counts += [('kept', f'{self.kept:,}')]
    names = list(next(iter(self.lengths.values())))
    lengths = [('tokens', *names, 'truncated')]
    for part, numbers in self.lengths.items():
      cells = [f'{number:,.1f}' for number in numbers.values()]
      lengths.append((part, *cells, f'{self.truncated[part]:,}'))
    return f'{reports.aligned(counts)}\n{reports.aligned(lengths)}'


def check_vocabulary(tokenizer, model_vocab_size: int) -> None:
  """Raises if the tokenizer has tokens that the model has no row for."""
  if tokenizer.vocab_size > model_vocab_size:
    raise ValueError(
      f'the tokenizer has {tokenizer.vocab_size:,} tokens, the model only '
      f"{model_vocab_size:,}: use the model's own tokenizer, or a model with "
      f'vocab_size >= {tokenizer.vocab_size}'
    )


def tokenize(
  examples: Iterable[dict],
  tokenizer,
  *,
  max_prompt_tokens: int,
  max_response_tokens: int,
  form: str,
) -> tuple[list[Group], TokenReport]:
  """Turns examples of the form 'pairs' or 'sft' into groups, and reports."""
  for name, limit in (
    ('max_prompt_tokens', max_prompt_tokens),
    ('max_response_tokens', max_response_tokens),
  ):
    if limit < 1:
      raise ValueError(f'{name} is {limit}, it must be at least 1')
  if form not in _RESPONSES:
    raise ValueError(f'form {form!r} has no tokens, use one of {[*_RESPONSES]}')
  parts = ('prompt', *(name for name, _ in _RESPONSES[form]))
  groups, read = [], 0
  dropped, truncated = collections.Counter(), collections.Counter()
  examples = iter(examples)
  while chunk := list(itertools.islice(examples, _CHUNK)):
    read += len(chunk)
    encoded = [
      tokenizer.encode_batch([example[part] for example in chunk])
      for part in parts
    ]
    for example, prompt, *responses in zip(chunk, *encoded, strict=True):
      reason = _unusable(prompt, responses, tokenizer)
      prompt, cut = fit_prompt(prompt, tokenizer, max_prompt_tokens)
      fitted = [
        _fit_response(tokens, example[ended], tokenizer, max_response_tokens)
        for tokens, (_, ended) in zip(responses, _RESPONSES[form])
      ]
      responses = [tokens for tokens, _ in fitted]
      if not reason and form == 'pairs' and responses[0] == responses[1]:
        reason = 'responses identical in tokens'
      if reason:
        dropped[reason] += 1
        continue
      truncated.update(
        part for part, was in zip(parts, [cut, *(c for _, c in fitted)]) if was
      )
      groups.append(
        Group(
          prompt=np.asarray(prompt, np.int32),
          responses=tuple(np.asarray(r, np.int32) for r in responses),
          weight=example['weight'],
          p=example['p'] if form == 'pairs' else 1.0,
          id=example['id'],
        )
      )
  report = TokenReport(
    read=read,
    kept=len(groups),
    dropped=dict(dropped),
    truncated={part: truncated[part] for part in parts},
    lengths=_lengths(groups, parts),
  )
  return groups, report


def _unusable(prompt, responses, tokenizer) -> str | None:
  if not prompt and tokenizer.bos_id is None:
    return 'prompt without tokens'
  if not all(responses):
    return 'response without tokens'
  return None


def fit_prompt(
  tokens: list[int], tokenizer, limit: int
) -> tuple[list[int], bool]:
  """Puts BOS, if wanted, before the tail that fits: (tokens, was it cut)."""
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  room = limit - len(bos)
  # Not tokens[-room:], which would keep everything where there is no room.
  return bos + tokens[max(len(tokens) - room, 0) :], len(tokens) > room


def _fit_response(tokens, ended, tokenizer, limit) -> tuple[list[int], bool]:
  if ended and tokens[-1:] != [tokenizer.eos_id]:
    tokens = [*tokens, tokenizer.eos_id]
  return tokens[:limit], len(tokens) > limit


def _lengths(groups, parts) -> dict[str, dict[str, float]]:
  sizes = [[len(g.prompt), *map(len, g.responses)] for g in groups]
  columns = np.array(sizes, np.int64).reshape(len(groups), len(parts)).T
  return {
    part: {
      'mean': float(column.mean()),
      'median': float(np.median(column)),
      'p95': float(np.percentile(column, 95)),
      'max': float(column.max()),
    }
    if len(column)
    else {'mean': 0.0, 'median': 0.0, 'p95': 0.0, 'max': 0.0}
    for part, column in zip(parts, columns)
  }
