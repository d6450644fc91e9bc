"""From raw files to splits of examples and an honest account of them.

Nothing is silent: bad rows are all listed in one error before anything is
written; dropped rows are counted by reason; how the split was made is said.
Rows of one prompt (HH: one conversation, TL;DR: one post) never meet on both
sides of a split that we made; where an official split shares some, they are
counted, and IMDb's reviews that are also in test leave train.
"""

import collections
import hashlib

from dpo_jax import names
from dpo_jax.data import locations
from dpo_jax.data import records
from dpo_jax.data import reports


def check_arguments(
  task: str, *, form: str, held_out: float, prompt_words: int | None
) -> None:
  """Raises if the task has no such form, or an argument makes no sense."""
  forms = names.look_up(records.TASKS, 'task', task).forms
  names.look_up(dict.fromkeys(forms), f'form of {task}', form)
  if not 0.0 <= held_out < 1.0:
    raise locations.SourceError(f'held_out {held_out} must lie in [0, 1)')
  if task == 'imdb' and form == 'sft':
    if prompt_words is None or prompt_words < 1:
      raise locations.SourceError(
        'IMDb as sft needs prompt_words >= 1, the words that make the prompt'
      )
  elif prompt_words is not None:
    raise locations.SourceError('prompt_words is only for IMDb as sft')


def read(
  task: str,
  files: list[locations.RawFile],
  *,
  form: str,
  held_out: float,
  prompt_words: int | None,
) -> tuple[dict[str, list[dict]], reports.Report]:
  """Reads, checks, splits and filters files: (examples per split, report).

  The files' own split is used where every row has one and both sides are
  there; else a hash holds out about the fraction `held_out` of the prompts.
  """
  check_arguments(task, form=form, held_out=held_out, prompt_words=prompt_words)
  rows, rows_per_file, unused = _read_rows(task, files, form)
  groups = _group([row.keys for row in rows])
  sides, rule = _sides(task, rows, groups, held_out)
  members = {
    split: {g for g, side in zip(groups, sides) if side == split}
    for split in locations.SPLITS
  }
  shared = members['train'] & members['test']
  splits, counts = {}, {}
  for split in locations.SPLITS:
    if not members[split]:
      continue
    side_rows = [
      (row.example, group in shared)
      for row, group, side in zip(rows, groups, sides)
      if side == split
    ]
    splits[split], counts[split] = _filter(
      task,
      side_rows,
      split=split,
      form=form,
      prompt_words=prompt_words,
    )
    if not splits[split]:
      raise locations.SourceError(
        f'no row of the {split} split is left, dropped: '
        f'{counts[split].dropped}; mend the rows, or change held_out={held_out}'
      )
  report = reports.Report(task, form, rule, rows_per_file, unused, counts)
  return splits, report


def _read_rows(task, files, form):
  """Parses all rows, or raises one error that lists all that is bad."""
  parse = records.TASKS[task].parse
  expected = {*records.FIELDS['pairs'], *records.FIELDS['sft']}
  rows, rows_per_file, bad = [], {}, []
  unused = collections.Counter()
  for file in files:
    before = len(rows) + len(bad)
    archive = file.name.endswith('.tar.gz')
    reader = records.read_archive if archive else records.read_lines
    for line, row in reader(file, bad):
      try:
        rows.append(parse(row, file, line, form))
      except records.BadRow as error:
        bad.append(f'{file.path}:{line}: {error}')
      if task == 'jsonl':
        unused.update(row.keys() - expected)
    rows_per_file[file.name] = len(rows) + len(bad) - before
    if not rows_per_file[file.name]:
      bad.append(f'{file.path}: the file is empty, it holds no row')
  if bad:
    listing = '\n  '.join(bad)
    raise locations.SourceError(
      f'{len(bad):,} bad rows, nothing was written; mend or remove them:\n'
      f'  {listing}'
    )
  return rows, rows_per_file, dict(sorted(unused.items()))


def _group(keys: list[tuple[str, ...]]) -> list[str]:
  """Names each row's group: rows are joined by any key they have in common.

  A group is named by its smallest key, so that the name does not depend on the
  order of the rows.
  """
  parent = {}

  def find(key):
    while parent.setdefault(key, key) != key:
      parent[key] = key = parent[parent[key]]
    return key

  for first, *others in keys:
    find(first)
    for other in others:
      low, high = sorted((find(first), find(other)))
      parent[high] = low
  return [find(first) for first, *_ in keys]


def _hash(group: str) -> float:
  """Maps a group to [0, 1), the same everywhere and forever."""
  return int.from_bytes(hashlib.sha256(group.encode()).digest()[:7]) / 2**56


def _sides(task, rows, groups, held_out) -> tuple[list[str], str]:
  """Decides each row's split, and says how."""
  labels = collections.Counter(row.split or 'unlabelled' for row in rows)
  if set(labels) == set(locations.SPLITS):
    return [row.split for row in rows], 'as the files say'
  said = ', '.join(f'{count:,} {label}' for label, count in labels.items())
  if not held_out:
    rule = f'all rows are train, held_out is 0 (the files have {said})'
    return ['train'] * len(rows), rule
  order = sorted(set(groups), key=_hash)
  unit = records.TASKS[task].unit
  if len(order) < 2:
    raise locations.SourceError(
      f'one {unit} cannot be split; set held_out to 0'
    )
  number = sum(_hash(group) < held_out for group in order)
  test = set(order[: min(max(number, 1), len(order) - 1)])
  rule = (
    f'our own, by {unit}, not an official protocol: a hash holds out '
    f'{len(test):,} of {len(order):,}, held_out is {held_out:g} (the files '
    f'have {said})'
  )
  return ['test' if group in test else 'train' for group in groups], rule


def _drop_reason(example: dict, form: str) -> str | None:
  if form == 'reviews':
    return None if example['text'].strip() else 'empty text'
  names = ('chosen', 'rejected') if form == 'pairs' else ('response',)
  if not example['prompt'].strip():
    return 'empty prompt'
  if not all(example[name].strip() for name in names):
    return 'empty response'
  if form == 'pairs' and example['chosen'] == example['rejected']:
    return 'identical responses'
  return None


def _filter(task, rows, *, split, form, prompt_words):
  """Drops what cannot be learned from and counts it.

  `rows` holds (example, whether the other split has its group too).
  """
  kept, seen = [], set()
  dropped, noticed = collections.Counter(), collections.Counter()
  unit = records.TASKS[task].unit
  for example, shared in rows:
    if task == 'imdb' and split == 'train' and shared:
      dropped['text also in test'] += 1
      continue
    if task == 'imdb' and form == 'sft':
      example = records.review_to_sft(example, prompt_words=prompt_words)
    reason = _drop_reason(example, form)
    if reason:
      dropped[reason] += 1
      continue
    kept.append(example)
    if task != 'imdb':  # There the shared rows have left train.
      noticed[f'{unit} also in train'] += split == 'test' and shared
    texts = tuple(v for k, v in example.items() if type(v) is str and k != 'id')
    noticed['exact duplicate'] += texts in seen
    if form == 'pairs':
      noticed['same pair, other label'] += (texts[0], *texts[:0:-1]) in seen
    seen.add(texts)
    if task == 'hh':
      turns = ('\n\nHuman:', records.HH_MARKER)
      further = any(turn in text for text in texts[1:] for turn in turns)
      noticed['response holds further turns'] += further
  noticed = {name: count for name, count in noticed.items() if count}
  return kept, reports.Counts(len(rows), len(kept), dict(dropped), noticed)
