"""From one raw row to an example in the schema, or the reason why not.

Every preference task comes out in one schema (`FIELDS`): prompt, chosen and
rejected text, a weight, `p` (the probability that chosen is really preferred)
and whether each text really ended. The form 'sft' has prompt and response;
IMDb's own form is 'reviews'. `TASKS` says what each task's rows can become.

    HH file    "chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Yes", "rejected": ...
    example    prompt "\\n\\nHuman: Hi\\n\\nAssistant:", chosen " Yes"
"""

import dataclasses
import gzip
import json
import math
import re
import tarfile
import zlib
from collections.abc import Callable
from collections.abc import Iterator

from dpo_jax.data import locations

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
  },
  'sft': {
    'id': str,
    'prompt': str,
    'response': str,
    'weight': float,
    'ended': bool,
  },
  'reviews': {'id': str, 'text': str, 'label': int},
}
HH_MARKER = '\n\nAssistant:'


class BadRow(ValueError):
  """Why a row cannot be used; the reader adds file and line."""


@dataclasses.dataclass(frozen=True)
class Record:
  """An example on its way; rows that share a key must share a split.

  `split` is the official one, where the file or the row has one.
  """

  example: dict
  split: str | None
  keys: tuple[str, ...]


def read_lines(
  file: locations.RawFile, bad: list[str]
) -> Iterator[tuple[int, dict]]:
  """Yields (line number, object); what is no JSON object goes to `bad`."""
  opener = gzip.open if file.name.endswith('.gz') else open
  number = 0
  try:
    with opener(file.path, 'rb') as stream:
      for number, line in enumerate(stream, 1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
        except ValueError as error:
          bad.append(f'{file.path}:{number}: malformed JSON ({error})')
          continue
        if isinstance(row, dict):
          yield number, row
        else:
          bad.append(f'{file.path}:{number}: no JSON object: {row!s:.40}')
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    bad.append(
      f'{file.path}:{number + 1}: broken gzip file ({error}); fetch it again'
    )


def read_archive(
  file: locations.RawFile, bad: list[str]
) -> Iterator[tuple[int, dict]]:
  """Yields IMDb's labelled reviews from the archive, without unpacking it."""
  pattern = re.compile(r'(?:\./)?aclImdb/(train|test)/(neg|pos)/(\d+)_\d+\.txt')
  rows = []
  try:
    with tarfile.open(file.path, 'r|gz') as archive:
      for member in archive:
        match = pattern.fullmatch(member.name)
        if match:
          split, side, number = match.groups()
          text = archive.extractfile(member).read().decode()
          rows.append((split, side, int(number), text))
  except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
    bad.append(
      f'{file.path}:{len(rows) + 1}: broken archive ({error}); fetch it again'
    )
  # The order of an archive is an accident; the numbers are not.
  for line, (split, side, number, text) in enumerate(sorted(rows), 1):
    yield (
      line,
      {
        'id': f'{split}/{side}/{number}',
        'text': text,
        'label': int(side == 'pos'),
        'split': split,
      },
    )


# --- Fields ---


def _text(row: dict, name: str) -> str:
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


def _number(row: dict, name: str, high: float) -> float:
  value = row.get(name, 1.0)
  # bool is an int in Python, and true is no weight.
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise BadRow(f'field {name!r} must be a number, not {value!r:.40}')
  # Stored as float32, so that is where it has to be finite.
  if not 0.0 <= value <= min(high, 3e38):
    raise BadRow(f'field {name!r} must lie in [0, {high:g}], not {value!s:.40}')
  return float(value)


def _flag(row: dict, name: str) -> bool:
  value = row.get(name, True)
  if not isinstance(value, bool):
    raise BadRow(f'field {name!r} must be true or false, not {value!r:.40}')
  return value


def _choice(row: dict, name: str, choices: tuple) -> int | str:
  if name not in row:
    raise BadRow(f'field {name!r} is missing')
  value = row[name]
  # type, not isinstance: true and 1.0 are no labels.
  if type(value) is not type(choices[0]) or value not in choices:
    raise BadRow(f'field {name!r} must be one of {choices}, not {value!r:.40}')
  return value


def _example(row: dict, form: str) -> dict:
  """Checks a row with prompt and responses and brings it into the schema."""
  if form == 'sft' and 'response' in row:
    return {
      'prompt': _text(row, 'prompt'),
      'response': _text(row, 'response'),
      'weight': _number(row, 'weight', math.inf),
      'ended': _flag(row, 'ended'),
    }
  if 'response' in row and 'chosen' not in row:
    raise BadRow("a row with 'response' and no 'chosen' needs form 'sft'")
  pair = {
    'prompt': _text(row, 'prompt'),
    'chosen': _text(row, 'chosen'),
    'rejected': _text(row, 'rejected'),
    'weight': _number(row, 'weight', math.inf),
    'p': _number(row, 'p', 1.0),
    'chosen_ended': _flag(row, 'chosen_ended'),
    'rejected_ended': _flag(row, 'rejected_ended'),
  }
  if form == 'pairs':
    return pair
  return {
    'prompt': pair['prompt'],
    'response': pair['chosen'],
    'weight': pair['weight'],
    'ended': pair['chosen_ended'],
  }


# --- Tasks ---


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Cuts two dialogues after the last assistant marker that both share."""
  cut = chosen.rfind(HH_MARKER)
  while cut >= 0 and not rejected.startswith(chosen[: cut + len(HH_MARKER)]):
    cut = chosen.rfind(HH_MARKER, 0, cut)
  if cut < 0:
    raise BadRow(f'chosen and rejected share no {HH_MARKER!r}')
  cut += len(HH_MARKER)
  return chosen[:cut], chosen[cut:], rejected[cut:]


def parse_hh(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads two full dialogues, or prompt and two responses."""
  if 'prompt' not in row:
    texts = split_dialogues(_text(row, 'chosen'), _text(row, 'rejected'))
    row = dict(zip(('prompt', 'chosen', 'rejected'), texts))
  name = f'{file.stem.replace(".", "/")}/{line - 1}'
  example = {'id': name, **_example(row, form)}
  # Rows of one conversation, cut at different turns, share its opening: they
  # go to the same side.
  opening = example['prompt'].split(HH_MARKER, 1)[0]
  return Record(example, file.split, (opening,))


def parse_tldr(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads a row of OpenAI's comparison files, or prompt and two responses."""
  split = None
  if row.get('split') is not None:
    split = _choice(row, 'split', ('train', 'valid1', 'valid2'))
    split = 'train' if split == 'train' else 'test'
  if 'info' in row:
    row = _plain_tldr(row)
  example = {'id': f'{file.stem}/{line - 1}', **_example(row, form)}
  # The same post comes with and without its subreddit and its id.
  prompt = example['prompt']
  post = ' '.join(prompt[max(prompt.find('POST:'), 0) :].split())
  keys = (f'text {post}',)
  if row.get('post_id') is not None:
    keys += (f'id {_text(row, "post_id")}',)
  return Record(example, split, keys)


def _plain_tldr(row: dict) -> dict:
  info = row['info']
  if not isinstance(info, dict):
    raise BadRow("field 'info' must be an object")
  summaries = row.get('summaries')
  if not isinstance(summaries, list) or [type(s) for s in summaries] != (
    [dict, dict]
  ):
    raise BadRow("field 'summaries' must hold two objects")
  texts = [_text(summary, 'text').strip() for summary in summaries]
  choice = _choice(row, 'choice', (0, 1))
  subreddit = _text(info, 'subreddit').removeprefix('r/')
  title, post = _text(info, 'title'), _text(info, 'post')
  return {
    'prompt': f'SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}'
    '\n\nTL;DR:',
    'chosen': f' {texts[choice]}',
    'rejected': f' {texts[1 - choice]}',
    'post_id': _text(info, 'id'),
  }


def parse_imdb(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads a labelled review; the SFT form is cut from it later."""
  del line, form
  example = {
    'id': _text(row, 'id'),
    'text': _text(row, 'text'),
    'label': _choice(row, 'label', (0, 1)),
  }
  return Record(example, row.get('split', file.split), (example['text'],))


def parse_jsonl(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads a row that is in the schema already, but for what it leaves out."""
  name = row.get('id', f'{file.stem}/{line - 1}')
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise BadRow(f"field 'id' must be text or an integer, not {name!r:.40}")
  example = {'id': _text({'id': str(name)}, 'id'), **_example(row, form)}
  return Record(example, file.split, (example['prompt'],))


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
  }


@dataclasses.dataclass(frozen=True)
class Task:
  """What the rows of a task can become.

  parse: (row, file, line number, form) -> Record, or raises BadRow.
  forms: what its examples may be, of `FIELDS`.
  unit: what a split keeps together, in words: rows that share a key.
  """

  parse: Callable[[dict, locations.RawFile, int, str], Record]
  forms: tuple[str, ...]
  unit: str


TASKS = {
  'hh': Task(parse_hh, ('pairs', 'sft'), 'opening turn'),
  'tldr': Task(parse_tldr, ('pairs', 'sft'), 'post'),
  'imdb': Task(parse_imdb, ('reviews', 'sft'), 'text'),
  'jsonl': Task(parse_jsonl, ('pairs', 'sft'), 'prompt'),
}
