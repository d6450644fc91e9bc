"""From one raw row to an example in the schema, or the reason why not.

Every preference task comes out in the schema of `forms`; `TASKS` says what each
task's rows can become.

    HH file    "chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Yes", "rejected": ...
    example    prompt "\\n\\nHuman: Hi\\n\\nAssistant:", chosen " Yes"
"""

import dataclasses
import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from collections.abc import Iterator

from dpo_jax.data import forms
from dpo_jax.data import locations

HH_MARKER = '\n\nAssistant:'


@dataclasses.dataclass(frozen=True)
class Record:
  """A row on its way; rows that share a key must share a split.

  `example` is still what the row was, a pair or a ranking, say: see
  `forms.of_form`. `split` is the official one, where the file or the row has
  one.
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


# --- Tasks ---


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
  """Cuts two dialogues after the last assistant marker that both share."""
  cut = chosen.rfind(HH_MARKER)
  while cut >= 0 and not rejected.startswith(chosen[: cut + len(HH_MARKER)]):
    cut = chosen.rfind(HH_MARKER, 0, cut)
  if cut < 0:
    raise forms.BadRow(f'chosen and rejected share no {HH_MARKER!r}')
  cut += len(HH_MARKER)
  return chosen[:cut], chosen[cut:], rejected[cut:]


def parse_hh(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads two full dialogues, or prompt and two responses."""
  if 'prompt' not in row:
    chosen, rejected = forms.text(row, 'chosen'), forms.text(row, 'rejected')
    texts = split_dialogues(chosen, rejected)
    row = dict(zip(('prompt', 'chosen', 'rejected'), texts))
  name = f'{file.stem.replace(".", "/")}/{line - 1}'
  example = {'id': name, **forms.read(row, form)}
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
    split = forms.choice(row, 'split', ('train', 'valid1', 'valid2'))
    split = 'train' if split == 'train' else 'test'
  if 'info' in row:
    row = _plain_tldr(row)
  example = {'id': f'{file.stem}/{line - 1}', **forms.read(row, form)}
  # The same post comes with and without its subreddit and its id.
  prompt = example['prompt']
  post = ' '.join(prompt[max(prompt.find('POST:'), 0) :].split())
  keys = (f'text {post}',)
  if row.get('post_id') is not None:
    keys += (f'id {forms.text(row, "post_id")}',)
  return Record(example, split, keys)


def _plain_tldr(row: dict) -> dict:
  info = row['info']
  if not isinstance(info, dict):
    raise forms.BadRow("field 'info' must be an object")
  summaries = row.get('summaries')
  if not isinstance(summaries, list) or [type(s) for s in summaries] != (
    [dict, dict]
  ):
    raise forms.BadRow("field 'summaries' must hold two objects")
  texts = [forms.text(summary, 'text').strip() for summary in summaries]
  choice = forms.choice(row, 'choice', (0, 1))
  subreddit = forms.text(info, 'subreddit').removeprefix('r/')
  title, post = forms.text(info, 'title'), forms.text(info, 'post')
  return {
    'prompt': f'SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}'
    '\n\nTL;DR:',
    'chosen': f' {texts[choice]}',
    'rejected': f' {texts[1 - choice]}',
    'post_id': forms.text(info, 'id'),
  }


def parse_imdb(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads a labelled review; the SFT form is cut from it later."""
  del line, form
  example = {
    'id': forms.text(row, 'id'),
    'text': forms.text(row, 'text'),
    'label': forms.choice(row, 'label', (0, 1)),
  }
  return Record(example, row.get('split', file.split), (example['text'],))


def parse_jsonl(
  row: dict, file: locations.RawFile, line: int, form: str
) -> Record:
  """Reads a row that is in the schema already, but for what it leaves out."""
  name = row.get('id', f'{file.stem}/{line - 1}')
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise forms.BadRow(
      f"field 'id' must be text or an integer, not {name!r:.40}"
    )
  example = {'id': forms.text({'id': str(name)}, 'id'), **forms.read(row, form)}
  return Record(example, file.split, (example['prompt'],))


@dataclasses.dataclass(frozen=True)
class Task:
  """What the rows of a task can become.

  parse: (row, file, line number, form) -> Record, or raises forms.BadRow.
  forms: what its examples may be, of `forms.FIELDS`.
  unit: what a split keeps together, in words: rows that share a key.
  """

  parse: Callable[[dict, locations.RawFile, int, str], Record]
  forms: tuple[str, ...]
  unit: str


TASKS = {
  'hh': Task(parse_hh, ('pairs', 'unpaired', 'sft'), 'opening turn'),
  'tldr': Task(parse_tldr, ('pairs', 'unpaired', 'sft'), 'post'),
  'imdb': Task(parse_imdb, ('reviews', 'sft'), 'text'),
  'jsonl': Task(
    parse_jsonl, ('pairs', 'unpaired', 'rankings', 'sft'), 'prompt'
  ),
}
