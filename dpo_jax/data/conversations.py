"""Rows that hold messages, made into rows of text.

A row may have messages where it could have text. The prompt is then stored as
their JSON, the answer as what the assistant says in the last one. The template
that turns them into tokens is the model's, and `examples` applies it.

    row        "chosen": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "Yes"}], ...
    becomes    "prompt": '[{"role": "user", "content": "Hi"}]', "chosen": "Yes"
"""

import json

ROLES = ('system', 'developer', 'user', 'assistant', 'tool', 'function')
_ANSWERS = ('chosen', 'rejected', 'response')


class BadRow(ValueError):
  """Why a row cannot be used; the reader adds file and line."""


def to_text(row: dict) -> tuple[dict, bool]:
  """Returns the row with texts for messages, and whether it had any."""
  if 'chat' in row:  # an example as we made it before
    if not isinstance(row['chat'], bool):
      raise BadRow(
        f"field 'chat' must be true or false, not {row['chat']!r:.40}"
      )
    if row['chat']:
      return row | {'prompt': _stored(_parsed(row.get('prompt')))}, True
  lists = [name for name in _ANSWERS if isinstance(row.get(name), list)]
  responses = row.get('responses')
  if isinstance(responses, list) and any(
    isinstance(response, list) for response in responses
  ):
    lists.append('responses')
  if 'messages' in row:
    others = [n for n in ('prompt', 'responses', *_ANSWERS) if n in row]
    if others:
      raise BadRow(
        f"'messages' hold prompt and response, but there is {others[0]!r}, too;"
        f" give {others[0]!r} or 'messages'"
      )
    row = dict(row)
    messages = row.pop('messages')
    prompt, row['response'] = _conversation(messages, 'messages')
    return row | {'prompt': _stored(prompt)}, True
  if isinstance(row.get('prompt'), list):
    _check(row['prompt'], 'prompt')
    if row['prompt'][-1]['role'] == 'assistant':
      raise BadRow(
        "'prompt' ends with an assistant's message; it is the answer"
      )
    texts = {n: _answer(row[n], n) for n in _ANSWERS if n in row}
    if isinstance(responses, list):
      texts['responses'] = [
        _answer(response, f'responses[{n}]')
        for n, response in enumerate(responses)
      ]
    return row | texts | {'prompt': _stored(row['prompt'])}, True
  if not lists:
    return row, False
  if 'prompt' in row:
    raise BadRow(
      f"{lists[0]!r} is messages but 'prompt' is not; make both messages"
    )
  if lists == ['chosen', 'rejected']:
    chosen, rejected = (_conversation(row[n], n) for n in lists)
    if chosen[0] != rejected[0]:
      raise BadRow(
        "'chosen' and 'rejected' must have the same messages before the last"
        ' one'
      )
    texts = {'chosen': chosen[1], 'rejected': rejected[1]}
    return row | texts | {'prompt': _stored(chosen[0])}, True
  raise BadRow(f"{lists[0]!r} is messages, so 'prompt' must be, too")


def _parsed(prompt) -> list[dict]:
  try:
    messages = json.loads(prompt)
  except (TypeError, ValueError):
    raise BadRow(
      "with 'chat', field 'prompt' must be messages as JSON"
    ) from None
  _check(messages, 'prompt')
  return messages


def load(prompt: str) -> list[dict]:
  """Returns the messages of a prompt that `to_text` made."""
  return json.loads(prompt)


def checked(prompt) -> list[dict]:
  """Returns the messages of a prompt, or raises ValueError."""
  _check(prompt, 'prompt')
  return prompt


def _stored(messages: list[dict]) -> str:
  return json.dumps(messages, ensure_ascii=False)


def _conversation(messages, name: str) -> tuple[list[dict], str]:
  """Cuts a conversation before its last message, an assistant's."""
  _check(messages, name)
  if len(messages) < 2:
    raise BadRow(f'{name!r} must hold a prompt and an answer')
  return messages[:-1], _text(messages[-1], f'{name}[{len(messages) - 1}]')


def _answer(value, name: str):
  """Returns text as it is, and of a single message its text."""
  if not isinstance(value, list):
    return value
  _check(value, name)
  if len(value) > 1:
    raise BadRow(
      f'{name!r} holds {len(value)} messages beside a prompt; it must be one,'
      " the answer; move the others to 'prompt'"
    )
  return _text(value[0], f'{name}[0]')


def _text(message: dict, place: str) -> str:
  if message['role'] != 'assistant':
    raise BadRow(
      f"{place}: the answer must be the assistant's, not of role"
      f' {message["role"]!r}'
    )
  others = message.keys() - {'role', 'content'}
  if others:
    raise BadRow(
      f'{place}: an answer is text; it cannot have {min(others)!r} as well'
    )
  return message['content']


def _check(messages, name: str) -> None:
  if not isinstance(messages, list) or not messages:
    raise BadRow(f'{name!r} must be a list of messages, not {messages!r:.40}')
  for n, message in enumerate(messages):
    place = f'{name}[{n}]'
    if not isinstance(message, dict):
      raise BadRow(f'{place} must be an object, not {message!r:.40}')
    if 'from' in message and 'role' not in message:
      raise BadRow(
        f"{place} has 'from'; rename 'from', 'value' to 'role', 'content'"
      )
    role = message.get('role')
    if role not in ROLES:
      raise BadRow(f'{place}: role {role!r:.40} is none of {", ".join(ROLES)}')
    content = message.get('content')
    if content is None and message.get('tool_calls'):
      continue
    if isinstance(content, list):
      raise BadRow(f"{place}: content must be text; join its parts' texts")
    if not isinstance(content, str):
      raise BadRow(f'{place}: content must be text, not {content!r:.40}')
  try:
    _stored(messages).encode()
  except UnicodeEncodeError:
    raise BadRow(f'{name!r} holds half a surrogate pair') from None
