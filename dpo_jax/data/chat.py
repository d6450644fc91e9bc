"""Chat templates: from messages to the tokens of a prompt and its responses.

    messages   user 'Hi'                              answer 'Yes'
    prompt     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    response   Yes<|im_end|>

The prompt is what the template writes of the messages and of the beginning of
an answer; the response is what it writes more when the answer is there. A
response ends with the template's end of turn, the first special token after the
answer; what comes behind it (here a line break) is no part of it. A template
without one has `eos_id` put at the end. BOS is there if the template writes it.

Special tokens are only what the template itself writes. Each conversation is
rendered twice, as it is and with every letter of the data moved to a private
plane of Unicode; where both say the same, letters that did not move are the
template's. So a user who writes '<|im_end|>' gets the letters, not the token,
however the template puts texts together.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np

# Wall time to wait for a rendering whose processor time is limited: only a
# machine that stands still needs it.
_PATIENCE = 120.0
_PLANE = 0x100000
_PROBE = (
  {'role': 'user', 'content': 'a'},
  {'role': 'assistant', 'content': 'b'},
  {'role': 'user', 'content': 'c'},
)
_REMEDY = (
  'use another template (data.chat_template), or give prompt and responses as '
  'text'
)


class Renderer:
  """A chat template at work in a process with limits, see `rendering`."""

  def __init__(self, template: str, names: dict[str, str]):
    file = pathlib.Path(__file__).with_name('rendering.py')
    self._process = subprocess.Popen(
      # -P: the folder of the file holds no modules to import.
      [sys.executable, '-P', str(file)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      encoding='utf-8',
    )
    self._finalizer = weakref.finalize(self, _end, self._process)
    self.constants = self._ask([template, names])['constants']

  def render(self, requests: Sequence[tuple[list[dict], bool]]) -> list[str]:
    """Renders (messages, with the beginning of an answer) each."""
    return self._ask(requests)['texts']

  def close(self) -> None:
    self._finalizer()

  def _ask(self, value) -> dict:
    process = self._process
    try:
      process.stdin.write(json.dumps(value, ensure_ascii=False) + '\n')
      process.stdin.flush()
      ready, _, _ = select.select([process.stdout], [], [], _PATIENCE)
      line = process.stdout.readline() if ready else ''
    except BrokenPipeError:
      line = ''
    if not line:
      process.kill()
      late = process.wait() == -signal.SIGPROF or not ready
      what = 'takes too long to render' if late else 'ends its process'
      raise ValueError(f'the chat template {what}; {_REMEDY}')
    reply = json.loads(line)
    if 'error' in reply:
      raise ValueError(
        f'the chat template cannot render this: {reply["error"]}; mend the '
        f'messages, or {_REMEDY}'
      )
    return reply


def _end(process) -> None:
  process.kill()
  process.wait()
  process.stdout.close()
  with contextlib.suppress(BrokenPipeError):  # it may have died before
    process.stdin.close()


@dataclasses.dataclass(frozen=True)
class _Mark:
  """An added token in a text; start and end with the blanks it takes."""

  token: str
  start: int
  token_end: int
  end: int


class Chat:
  """A tokenizer's chat template, and the tokens of what it writes.

  Use as a context manager: it holds a process.
  """

  def __init__(self, tokenizer):
    if tokenizer.template is None:
      raise ValueError(
        'the data has messages, but the tokenizer has no chat template; put '
        'chat_template.jinja into the folder of the model, set '
        'data.chat_template to such a file, or give prompt and responses as '
        'text'
      )
    self._tokenizer = tokenizer
    texts = sorted(filter(str.strip, tokenizer.added_tokens), key=len)
    # The longest of those that begin at a place.
    self._pattern = re.compile('|'.join(map(re.escape, texts[::-1])))
    self._renderer = Renderer(tokenizer.template, tokenizer.names)
    (probe,) = self._renderer.render([([*_PROBE], True)])
    # Gemma's <end_of_turn> is no special token in all of its files.
    markers = {mark.token for mark in self._marks(probe)}
    self._tokenizer = tokenizer.guarded(markers)
    self._special = {
      text
      for text, added in self._tokenizer.added_tokens.items()
      if added.special
    }
    shared = [
      text
      for text in self._renderer.constants
      if text.strip()
      and not any(text in token or token in text for token in self._special)
    ]
    self._mask_all = _Mask()
    self._mask_most = _Mask(keep=shared)

  def __enter__(self) -> 'Chat':
    return self

  def __exit__(self, *error) -> None:
    self._renderer.close()

  def encode(
    self, prompt: list[dict], answers: Sequence[tuple[str, bool]]
  ) -> tuple[list[int], list[list[int]]]:
    """Returns the tokens of a prompt and of each answer (text, did it end).

    They are complete: BOS and end of turn are there, once.
    """
    before, after = self._parts(prompt, [text for text, _ in answers])
    ids, special = self._ids(*before, begins=True)
    responses = []
    for (real, masked, over), (_, ended) in zip(after, answers):
      # Behind the answer: some templates write special tokens before it, too.
      ends = (m for m in self._marks(masked, over) if m.token in self._special)
      end = next(ends, None)
      cut = (end.token_end if end else len(real)) if ended else over
      tokens, _ = self._ids(
        real[:cut],
        masked[:cut],
        begins=special and self._tokenizer.prefix.where == 'segments',
      )
      responses.append(
        tokens if end or not ended else [*tokens, self._tokenizer.eos_id]
      )
    return ids, responses

  def _parts(self, prompt, texts):
    """Returns (real, masked) of the prompt, and of each answer what follows.

    The latter with the place where the answer itself is over.
    """
    for mask in (self._mask_all, self._mask_most):
      asked = [(prompt, True)]
      asked += [(_answered(prompt, text), False) for text in texts]
      masked = [(mask.messages(messages), p) for messages, p in asked]
      rendered = self._renderer.render([*asked, *masked])
      pairs = list(zip(rendered[: len(asked)], rendered[len(asked) :]))
      if all(_moved(*pair) is not None for pair in pairs):
        break
    else:
      raise ValueError(
        'the chat template changes or looks into the texts of the messages, so '
        f'its own special tokens cannot be told from theirs; {_REMEDY}'
      )
    (before, masked_before), *others = pairs
    after = []
    for real, masked in others:
      if not real.startswith(before):
        raise ValueError(
          'the chat template writes a prompt otherwise when an answer follows '
          f'({_difference(before, real)}); {_REMEDY}'
        )
      real, masked = real[len(before) :], masked[len(before) :]
      moved = np.flatnonzero(_moved(real, masked))
      if not len(moved):
        raise ValueError(
          f'the chat template does not write the answer; {_REMEDY}'
        )
      after.append((real, masked, int(moved[-1]) + 1))
    return (before, masked_before), after

  def _marks(self, masked: str, start: int = 0) -> Iterator[_Mark]:
    """Yields the added tokens that the template wrote."""
    at = start
    for match in self._pattern.finditer(masked, start):
      added = self._tokenizer.added_tokens[match.group()]
      first, last = match.span()
      if added.lstrip:
        first = at + len(masked[at:first].rstrip())
      if added.rstrip:
        last += len(masked[last:]) - len(masked[last:].lstrip())
      yield _Mark(match.group(), first, match.end(), last)
      at = last

  def _ids(self, real: str, masked: str, *, begins: bool):
    """Encodes a text whose added tokens are where the masked one has them.

    begins: SentencePiece's space goes before it. Returns also whether the last
    token is an added one.
    """
    ids, at = [], 0
    for mark in self._marks(masked):
      text = real[at : mark.start]
      ids += self._tokenizer.encode(text, start=begins) if text else []
      ids.append(self._tokenizer.added_tokens[mark.token].id)
      at, begins = mark.end, self._tokenizer.prefix.where == 'segments'
    text = real[at:]
    ids += self._tokenizer.encode(text, start=begins) if text else []
    return ids, not text


def _answered(prompt: list[dict], text: str) -> list[dict]:
  return [*prompt, {'role': 'assistant', 'content': text}]


def _difference(one: str, two: str) -> str:
  n = next(
    (n for n, (a, b) in enumerate(zip(one, two)) if a != b),
    min(len(one), len(two)),
  )
  return f'{one[n : n + 30]!r} becomes {two[n : n + 30]!r}'


# --- Provenance ---


class _Mask:
  """Moves the letters of messages to a private plane of Unicode.

  Blanks stay, which templates strip, and what JSON escapes. `keep`: texts that
  stay too, because the template looks for them.
  """

  def __init__(self, keep: Sequence[str] = ()):
    self._table = _Table()
    parts = sorted(map(re.escape, keep), key=len, reverse=True)
    self._keep = re.compile(f'({"|".join(parts)})') if parts else None

  def messages(self, value):
    """Masks all texts of messages but the roles."""
    if isinstance(value, str):
      return self._text(value)
    if isinstance(value, list):
      return [self.messages(item) for item in value]
    if isinstance(value, dict):
      return {
        name: item if name == 'role' else self.messages(item)
        for name, item in value.items()
      }
    return value

  def _text(self, text: str) -> str:
    if self._keep is None:
      return text.translate(self._table)
    parts = self._keep.split(text)
    parts[::2] = [part.translate(self._table) for part in parts[::2]]
    return ''.join(parts)


class _Table(dict):
  def __missing__(self, code: int) -> int:
    stays = code > 0xFFFF or chr(code).isspace() or chr(code) in '"\\'
    self[code] = code if stays else _PLANE + code
    return self[code]


def _moved(real: str, masked: str) -> np.ndarray | None:
  """Which letters of a text were moved; None if it is another text."""
  if len(real) != len(masked):
    return None
  real_codes, codes = (
    np.frombuffer(text.encode('utf-32-le'), np.uint32)
    for text in (real, masked)
  )
  moved = codes == real_codes + _PLANE
  return moved if (moved | (codes == real_codes)).all() else None
