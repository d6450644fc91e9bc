"""The forms of an example, and how a row's fields come into them.

'pairs' have a chosen and a rejected response, and `p`, the probability that
chosen is really preferred. 'unpaired' has one response, and `label`, the
probability that it is desirable. 'rankings' have responses, best first. 'sft'
has one response. All have a weight and say whether each text really ended;
rewards are optional. With `chat` the prompt is messages and a response what the
assistant answers, see `conversations`. 'reviews' are IMDb's own. A row is read
as what it is, and `of_form` makes examples of the wanted form of it:

    pairs      prompt 'Hi', chosen ' Yes', rejected ' No', p 0.9
    unpaired   prompt 'Hi', response ' Yes', label 0.9
               prompt 'Hi', response ' No', label 0.1
    sft        prompt 'Hi', response ' Yes'
"""

import math
import re
from collections.abc import Callable

from dpo_jax.data import conversations

FIELDS = {
  'pairs': {
    'id': str,
    'prompt': str,
    'chosen': str,
    'rejected': str,
    'weight': float,
    'p': float,
    'chosen_ended': bool,
    'rejected_ended': bool,
    # Both or none.
    'chosen_reward': float | None,
    'rejected_reward': float | None,
    'chat': bool,
  },
  'unpaired': {
    'id': str,
    'prompt': str,
    'response': str,
    'label': float,
    'weight': float,
    'ended': bool,
    'chat': bool,
  },
  'rankings': {
    'id': str,
    'prompt': str,
    'responses': list[str],
    # One a response, falling; or empty.
    'rewards': list[float],
    'weight': float,
    'ended': list[bool],
    'chat': bool,
  },
  'sft': {
    'id': str,
    'prompt': str,
    'response': str,
    'weight': float,
    'ended': bool,
    'chat': bool,
  },
  'reviews': {'id': str, 'text': str, 'label': int},
}
# What tells how a row is to be read, for each form; the first that it has.
_READ_BY = {
  'pairs': ('chosen',),
  'sft': ('response', 'responses', 'chosen'),
  'unpaired': ('response', 'chosen'),
  'rankings': ('responses',),
}
_KIND = {'chosen': 'pairs', 'response': 'unpaired', 'responses': 'rankings'}
_FORMS_OF = {
  'chosen': "'pairs', 'unpaired' or 'sft'",
  'response': "'sft', or 'unpaired' with a 'label'",
  'responses': "'rankings' or 'sft'",
}
# float32 is what is stored, so that is where numbers have to be finite.
_LARGEST = 3e38


BadRow = conversations.BadRow


# --- Fields ---


def text(row: dict, name: str) -> str:
  """Returns a field that must be text."""
  if name not in row:
    raise BadRow(f'field {name!r} is missing')
  value = row[name]
  if not isinstance(value, str):
    raise BadRow(f'field {name!r} must be text, not {value!r:.40}')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise BadRow(f'field {name!r} holds half a surrogate pair') from None
  return value


def _number(row: dict, name: str, low: float, high: float) -> float:
  value = row.get(name, 1.0)
  # bool is an int in Python, and true is no weight.
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise BadRow(f'field {name!r} must be a number, not {value!r:.40}')
  if not max(low, -_LARGEST) <= value <= min(high, _LARGEST):
    limits = f'lie in [{low:g}, {high:g}]'
    if low == -math.inf:
      limits = 'be finite in float32'
    raise BadRow(f'field {name!r} must {limits}, not {value!s:.40}')
  return float(value)


def _label(row: dict) -> float:
  if 'label' not in row:
    raise BadRow(
      "field 'label' is missing: 1 for a desirable response, 0 for an"
      ' undesirable one'
    )
  if isinstance(row['label'], bool):
    return float(row['label'])
  return _number(row, 'label', 0.0, 1.0)


def _flag(row: dict, name: str) -> bool:
  value = row.get(name, True)
  if not isinstance(value, bool):
    raise BadRow(f'field {name!r} must be true or false, not {value!r:.40}')
  return value


def choice(row: dict, name: str, choices: tuple) -> int | str:
  """Returns a field that must be one of the choices."""
  if name not in row:
    raise BadRow(f'field {name!r} is missing')
  value = row[name]
  # type, not isinstance: true and 1.0 are no labels.
  if type(value) is not type(choices[0]) or value not in choices:
    raise BadRow(f'field {name!r} must be one of {choices}, not {value!r:.40}')
  return value


def _list(row: dict, name: str, number: int | None = None) -> list:
  if name not in row:
    raise BadRow(f'field {name!r} is missing')
  values = row[name]
  if not isinstance(values, list):
    raise BadRow(f'field {name!r} must be a list, not {values!r:.40}')
  if number is not None and len(values) != number:
    raise BadRow(
      f'field {name!r} holds {len(values)} values for {number} responses; give'
      ' one to each'
    )
  return values


def _each(check: Callable, name: str, values: list, *arguments) -> list:
  """Checks every value of a list; an error names its place."""
  checked = []
  for n, value in enumerate(values):
    place = f'{name}[{n}]'
    checked.append(check({place: value}, place, *arguments))
  return checked


def _pair(row: dict, form: str) -> dict:
  del form
  rewards = {'chosen_reward': None, 'rejected_reward': None}
  if rewards.keys() & row.keys():
    for name in rewards:
      if name not in row:
        raise BadRow(f'field {name!r} is missing; give both rewards or none')
      rewards[name] = _number(row, name, -math.inf, math.inf)
  return {
    'prompt': text(row, 'prompt'),
    'chosen': text(row, 'chosen'),
    'rejected': text(row, 'rejected'),
    'weight': _number(row, 'weight', 0.0, math.inf),
    'p': _number(row, 'p', 0.0, 1.0),
    'chosen_ended': _flag(row, 'chosen_ended'),
    'rejected_ended': _flag(row, 'rejected_ended'),
    **rewards,
  }


def _single(row: dict, form: str) -> dict:
  single = {
    'prompt': text(row, 'prompt'),
    'response': text(row, 'response'),
    'weight': _number(row, 'weight', 0.0, math.inf),
    'ended': _flag(row, 'ended'),
  }
  if form == 'unpaired' or 'label' in row:
    single['label'] = _label(row)
  return single


def _ranking(row: dict, form: str) -> dict:
  """Reads responses, best first; where they have rewards, sorts by them."""
  del form
  prompt = text(row, 'prompt')
  responses = _each(text, 'responses', _list(row, 'responses'))
  number = len(responses)
  if number < 2:
    raise BadRow(
      f"field 'responses' must hold at least 2 texts, best first, not {number}"
    )
  if isinstance(row.get('ended'), list):
    ended = _each(_flag, 'ended', _list(row, 'ended', number))
  else:
    ended = [_flag(row, 'ended')] * number
  rewards = []
  if 'rewards' in row:
    values = _list(row, 'rewards', number)
    rewards = _each(_number, 'rewards', values, -math.inf, math.inf)
    # Stable: equals stay as the row has them.
    order = sorted(range(number), key=lambda n: -rewards[n])
    responses = [responses[n] for n in order]
    ended = [ended[n] for n in order]
    rewards = [rewards[n] for n in order]
  return {
    'prompt': prompt,
    'responses': responses,
    'rewards': rewards,
    'weight': _number(row, 'weight', 0.0, math.inf),
    'ended': ended,
  }


_READERS = {'chosen': _pair, 'response': _single, 'responses': _ranking}


def read(row: dict, form: str) -> dict:
  """Checks a row that is to become the form; leaves it what it is."""
  row, chat = conversations.to_text(row)
  for name in _READ_BY[form]:
    if name in row:
      return {**_READERS[name](row, form), 'chat': chat}
  for name, others in _FORMS_OF.items():
    if name in row:
      raise BadRow(
        f'a row with {name!r} cannot be {form!r}; use form {others} (data.form)'
      )
  return _READERS[_READ_BY[form][-1]](row, form)  # says what is missing


def fields_read(form: str) -> set[str]:
  """Names the fields of rows that can become the form, and matter there."""
  fields = {field for name in _READ_BY[form] for field in FIELDS[_KIND[name]]}
  if form in ('sft', 'unpaired'):
    fields -= {'chosen_reward', 'rejected_reward', 'rewards'} - {*FIELDS[form]}
  if 'response' in _READ_BY[form]:
    fields |= {'messages'}
  return fields


# --- Forms ---


def of_form(
  example: dict, form: str, *, prompt_words: int | None = None
) -> list[dict]:
  """Makes examples of a form of what a row was.

  A pair is two unpaired examples, the rejected response's label is 1 - p. For
  SFT a pair is the response more likely preferred, a ranking its best, a review
  what follows its first `prompt_words`, and a response with a label under 0.5
  is none.
  """
  if form == 'unpaired' and 'chosen' in example:
    return [
      {
        'id': f'{example["id"]}/{side}',
        'prompt': example['prompt'],
        'response': example[side],
        'label': label,
        'weight': example['weight'],
        'ended': example[f'{side}_ended'],
        'chat': example['chat'],
      }
      for side, label in (
        ('chosen', example['p']),
        ('rejected', 1.0 - example['p']),
      )
    ]
  if form != 'sft':
    return [example]
  if 'text' in example:
    return [review_to_sft(example, prompt_words=prompt_words)]
  if example.get('label', 1.0) < 0.5:
    return []
  if 'chosen' in example:
    side = 'chosen' if example['p'] >= 0.5 else 'rejected'
    response, ended = example[side], example[f'{side}_ended']
  elif 'responses' in example:
    response, ended = example['responses'][0], example['ended'][0]
  else:
    response, ended = example['response'], example['ended']
  return [
    {
      'id': example['id'],
      'prompt': example['prompt'],
      'response': response,
      'weight': example['weight'],
      'ended': ended,
      'chat': example['chat'],
    }
  ]


def review_to_sft(review: dict, *, prompt_words: int) -> dict:
  """Cuts a review after its first words; prompt + response is the review."""
  pattern = rf'\s*(?:\S+\s+){{{prompt_words - 1}}}\S+'
  match = re.match(pattern, review['text'])
  cut = match.end() if match else len(review['text'])
  return {
    'id': review['id'],
    'prompt': review['text'][:cut],
    'response': review['text'][cut:],
    'weight': 1.0,
    'ended': True,
    'chat': False,
  }
