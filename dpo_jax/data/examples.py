"""From examples to token groups: a prompt and its responses.

BOS, where the model wants one, starts the prompt and appears nowhere else. EOS
ends a response exactly once, and only if its text really ended and was not
truncated. Nothing stands between prompt and response. A prompt too long keeps
its tail, a response its head. Both limits count BOS and EOS. A prompt of
messages is written by the tokenizer's chat template, see `chat`; there BOS and
EOS are where the template puts them, and what ends a turn ends a response.

    prompt 'Hi', chosen ' Yes', byte tokens (EOS 256), limits 2 and 4
    prompt [72, 105], chosen [32, 89, 101, 115]     truncated, so no EOS
    with limits 2 and 5: chosen [32, 89, 101, 115, 256]
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np

from dpo_jax import rewards
from dpo_jax.data import chat
from dpo_jax.data import conversations
from dpo_jax.data import reports

# The forms that have tokens, and the field that becomes a group's `p`.
_LABELS = {'pairs': 'p', 'sft': None, 'unpaired': 'label', 'rankings': None}
# Examples that are encoded at once.
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Group:
  """A prompt and its responses as int32 tokens; chosen, or the best, first.

  p: for a pair the probability that chosen is really preferred, for a single
  response the probability that it is desirable; else 1.
  rewards: one a response, falling in a ranking; None where the data has none.
  costs: constraint scores in [0, 1], one a response; None where none are asked
  for.
  """

  prompt: np.ndarray
  responses: tuple[np.ndarray, ...]
  weight: float
  p: float
  id: str
  rewards: tuple[float, ...] | None = None
  costs: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TokenReport:
  """What tokenization did; `truncated` and `lengths` are of kept groups.

  Both have a part for the prompt and for each response.
  """

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
  cost: Callable | None = None,
) -> tuple[list[Group], TokenReport]:
  """Turns examples of a form into groups, and reports.

  Args:
    examples: of the form 'pairs', 'sft', 'unpaired' or 'rankings'.
    tokenizer: of the model.
    max_prompt_tokens: limit of a prompt.
    max_response_tokens: limit of each response.
    form: what the examples are.
    cost: (prompts, responses) -> float array in [0, 1], a constraint score of
      whole texts (see `rewards.CONSTRAINTS`); None for groups without costs.
  """
  for name, limit in (
    ('max_prompt_tokens', max_prompt_tokens),
    ('max_response_tokens', max_response_tokens),
  ):
    if limit < 1:
      raise ValueError(f'{name} is {limit}, it must be at least 1')
  if form not in _LABELS:
    raise ValueError(f'form {form!r} has no tokens, use one of {[*_LABELS]}')
  examples = iter(examples)
  first = next(examples, None)
  parts = ('prompt', *_names(first, form))
  examples = itertools.chain([] if first is None else [first], examples)
  groups, read = [], 0
  encode = _Encoder(tokenizer)
  dropped, truncated = collections.Counter(), collections.Counter()
  while chunk := list(itertools.islice(examples, _CHUNK)):
    read += len(chunk)
    answers = [_answers(example, form, len(parts) - 1) for example in chunk]
    prompts = [example['prompt'] for example in chunk]
    costs = _costs(cost, prompts, answers)
    for example, scores, (bos, prompt, responses) in zip(
      chunk, costs, encode(chunk, answers), strict=True
    ):
      reason = None if bos or prompt else 'prompt without tokens'
      if not all(responses):
        reason = 'response without tokens'
      prompt, cut = _fit(bos, prompt, max_prompt_tokens)
      cuts = [cut, *(len(r) > max_response_tokens for r in responses)]
      responses = [tokens[:max_response_tokens] for tokens in responses]
      if not reason and len({*map(tuple, responses)}) < len(responses):
        reason = 'responses identical in tokens'
      if reason:
        dropped[reason] += 1
        continue
      truncated.update(
        part for part, was in zip(parts, cuts, strict=True) if was
      )
      groups.append(
        Group(
          prompt=np.asarray(prompt, np.int32),
          responses=tuple(np.asarray(r, np.int32) for r in responses),
          weight=example['weight'],
          p=example[_LABELS[form]] if _LABELS[form] else 1.0,
          id=example['id'],
          rewards=_rewards(example, form),
          costs=scores,
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


def _names(example: dict | None, form: str) -> list[str]:
  """What the report calls the responses of an example."""
  if form == 'pairs':
    return ['chosen', 'rejected']
  if form == 'rankings':
    number = len(example['responses']) if example else 0
    return [f'response {n}' for n in range(1, number + 1)]
  return ['response']


def _answers(example: dict, form: str, number: int) -> list[tuple[str, bool]]:
  """Returns the responses of an example: (text, whether it ended)."""
  if form == 'pairs':
    return [(example[s], example[f'{s}_ended']) for s in ('chosen', 'rejected')]
  if form != 'rankings':
    return [(example['response'], example['ended'])]
  if len(example['responses']) != number:
    raise ValueError(
      f'example {example["id"]!r} has {len(example["responses"])} responses,'
      f' the first one {number}; cut all to one number'
    )
  return list(zip(example['responses'], example['ended'], strict=True))


def _rewards(example: dict, form: str) -> tuple[float, ...] | None:
  if form == 'pairs' and example['chosen_reward'] is not None:
    return example['chosen_reward'], example['rejected_reward']
  if form == 'rankings' and example['rewards']:
    return tuple(example['rewards'])
  return None


def _costs(cost, prompts, answers) -> list[tuple[float, ...] | None]:
  """Scores the responses of each example."""
  if cost is None:
    return [None] * len(prompts)
  columns = [
    rewards.score_constraint(cost, prompts, [text for text, _ in column])
    for column in zip(*answers)
  ]
  return [tuple(map(float, values)) for values in zip(*columns)]


class _Encoder:
  """Encodes examples: (BOS or nothing, prompt, responses) of each.

  Responses have their EOS, but one without tokens stays without.
  """

  def __init__(self, tokenizer):
    self._tokenizer = tokenizer
    self._chat = None

  def __call__(self, chunk, answers):
    if not any(example['chat'] for example in chunk):
      return self._texts([example['prompt'] for example in chunk], answers)
    encoded = []
    for example, answer in zip(chunk, answers):
      try:
        if example['chat']:
          prompt = conversations.load(example['prompt'])
          encoded.append(self.messages(prompt, answer))
        else:
          encoded += self._texts([example['prompt']], [answer])
      except ValueError as error:
        raise ValueError(f'example {example["id"]!r}: {error}') from error
    return encoded

  def _texts(self, prompts, answers):
    tokenizer = self._tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    columns = [
      [
        _with_eos(tokens, ended, tokenizer)
        for tokens, (_, ended) in zip(
          tokenizer.encode_batch([text for text, _ in column]), column
        )
      ]
      for column in zip(*answers)
    ]
    prompts = tokenizer.encode_batch(prompts, start=True)
    return [
      (bos, prompt, responses)
      for prompt, *responses in zip(prompts, *columns, strict=True)
    ]

  def messages(self, prompt: list[dict], answer):
    self._chat = self._chat or chat.Chat(self._tokenizer)
    tokens, responses = self._chat.encode(prompt, answer)
    bos = [i for i in tokens[:1] if i == self._tokenizer.bos_id]
    return bos, tokens[len(bos) :], responses


def _with_eos(tokens, ended, tokenizer) -> list[int]:
  if tokens and ended and tokens[-1] != tokenizer.eos_id:
    return [*tokens, tokenizer.eos_id]
  return tokens


def encode_prompts(
  prompts: Iterable[str | list[dict]], tokenizer, limit: int
) -> list[np.ndarray]:
  """Encodes prompts, texts or messages, to sample from, as to train on."""
  encode, encoded = _Encoder(tokenizer), []
  for prompt in prompts:
    if isinstance(prompt, str):
      tokens = tokenizer.encode(prompt, start=True)
      encoded.append(fit_prompt(tokens, tokenizer, limit)[0])
    else:
      bos, tokens, _ = encode.messages(conversations.checked(prompt), [])
      encoded.append(_fit(bos, tokens, limit)[0])
  return [np.array(tokens) for tokens in encoded]


def encode_responses(
  responses: Sequence[str],
  tokenizer,
  limit: int,
  *,
  ended: Sequence[bool] | None = None,
) -> list[np.ndarray]:
  """Encodes responses as to train on; where nothing is, EOS alone.

  `ended` says which get an EOS; None: all.
  """
  if ended is None:
    ended = [True] * len(responses)
  encoded = []
  for tokens, end in zip(
    tokenizer.encode_batch(list(responses)), ended, strict=True
  ):
    tokens = _with_eos(tokens, bool(end), tokenizer) or [tokenizer.eos_id]
    encoded.append(np.array(tokens[:limit], np.int32))
  return encoded


def fit_prompt(
  tokens: list[int], tokenizer, limit: int
) -> tuple[list[int], bool]:
  """Puts BOS, if wanted, before the tail that fits: (tokens, was it cut)."""
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return _fit(bos, tokens, limit)


def _fit(bos, tokens, limit) -> tuple[list[int], bool]:
  room = limit - len(bos)
  # Not tokens[-room:], which would keep everything where there is no room.
  return bos + tokens[max(len(tokens) - room, 0) :], len(tokens) > room


def drop_ties(groups: list[Group]) -> tuple[list[Group], int]:
  """Drops groups with two equal rewards: (those that are left, how many not).

  For losses that need a strict order. Equal is equal in float32, as the losses
  see rewards; groups without rewards are in order as they are.
  """
  kept = [
    group
    for group in groups
    if group.rewards is None
    or len({*map(np.float32, group.rewards)}) == len(group.rewards)
  ]
  return kept, len(groups) - len(kept)


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
