"""From raw files to splits of examples and an honest account of them.

Nothing is silent: bad rows are all listed in one error before anything is
written; what is dropped is counted by reason; how the split was made is said.
What is counted is examples: a row is one, but a pair is two unpaired ones.
Rows of one prompt (HH: one conversation, TL;DR: one post) never meet on both
sides of a split that we made; where an official split shares some, they are
counted, and IMDb's reviews that are also in test leave train.
"""

import collections
import hashlib

from dpo_jax import names
from dpo_jax.data import forms
from dpo_jax.data import locations
from dpo_jax.data import records
from dpo_jax.data import reports


def check_arguments(
  task: str, *, form: str, held_out: float, prompt_words: int | None
) -> None:
  """Raises if the task has no such form, or an argument makes no sense."""
  choices = names.look_up(records.TASKS, 'task', task).forms
  names.look_up(dict.fromkeys(choices), f'form of {task}', form)
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
  rows, rows_per_file, bad = [], {}, []
  unused = collections.Counter()
  for file in files:
    before = len(rows) + len(bad)
    archive = file.name.endswith('.tar.gz')
    reader = records.read_archive if archive else records.read_lines
    for line, row in reader(file, bad):
      try:
        rows.append(parse(row, file, line, form))
      except forms.BadRow as error:
        bad.append(f'{file.path}:{line}: {error}')
      if task == 'jsonl':
        unused.update(row.keys() - forms.fields_read(form))
    rows_per_file[file.name] = len(rows) + len(bad) - before
    if not rows_per_file[file.name]:
      bad.append(f'{file.path}: the file is empty, it holds no row')
  if bad:
    listing = '\n  '.join(bad)
    raise locations.SourceError(
      f'{len(bad):,} bad rows, nothing was written; mend or remove them:\n'
      f'  {listing}'
    )
  if form == 'rankings':
    _check_numbers([len(row.example['responses']) for row in rows])
  return rows, rows_per_file, dict(sorted(unused.items()))


def _check_numbers(numbers):
  """Raises if not all rankings have the same number of responses."""
  counts = sorted(collections.Counter(numbers).items())
  if len(counts) > 1:
    said = ', '.join(f'{rows:,} rows have {number}' for number, rows in counts)
    raise locations.SourceError(
      f'all rankings need the same number of responses, but {said}; cut each '
      f'to {counts[0][0]}, or make a data set of each number'
    )


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


def _responses(example: dict, form: str) -> list[str]:
  if form == 'reviews':
    return [example['text']]
  if form == 'pairs':
    return [example['chosen'], example['rejected']]
  return example['responses'] if form == 'rankings' else [example['response']]


def _repeats(row: dict, form: str) -> bool:
  """Whether a row compares a response with itself, which says nothing."""
  if form in ('pairs', 'unpaired') and 'chosen' in row:
    return row['chosen'] == row['rejected']
  return form == 'rankings' and len({*row['responses']}) < len(row['responses'])


def _drop_reason(example: dict, form: str, *, repeats: bool) -> str | None:
  blank = [not text.strip() for text in _responses(example, form)]
  if form == 'reviews':
    return 'empty text' if any(blank) else None
  if not example['prompt'].strip():
    return 'empty prompt'
  if any(blank):
    return 'empty response'
  return 'identical responses' if repeats else None


def _filter(task, rows, *, split, form, prompt_words):
  """Makes examples of rows, drops what cannot be learned from and counts it.

  `rows` holds (the row's example, whether the other split has its group too).
  """
  kept, read, seen = [], 0, set()
  dropped, noticed = collections.Counter(), collections.Counter()
  unit = records.TASKS[task].unit
  for row, shared in rows:
    made = forms.of_form(row, form, prompt_words=prompt_words)
    read += len(made) or 1
    if not made:
      dropped['undesirable response'] += 1
    for example in made:
      reason = _drop_reason(example, form, repeats=_repeats(row, form))
      if task == 'imdb' and split == 'train' and shared:
        reason = 'text also in test'
      if reason:
        dropped[reason] += 1
        continue
      kept.append(example)
      if task != 'imdb':  # There the shared rows have left train.
        noticed[f'{unit} also in train'] += split == 'test' and shared
      noticed.update(_notices(task, example, form, seen))
  noticed = {name: count for name, count in noticed.items() if count}
  return kept, reports.Counts(read, len(kept), dict(dropped), noticed)


def _notices(task, example, form, seen) -> list[str]:
  """Says what is worth counting; `seen` collects the examples before it."""
  found = []
  prompt, responses = example.get('prompt', ''), _responses(example, form)
  side = None
  if form == 'unpaired' and example['label'] != 0.5:
    side = 'desirable' if example['label'] > 0.5 else 'undesirable'
    found.append(side)
    other = {'desirable', 'undesirable'} - {side}
    if (prompt, *responses, *other) in seen:
      found.append('same response, other label')
  if (prompt, *responses, side) in seen:
    found.append('exact duplicate')
  if form == 'pairs':
    if (prompt, *responses[::-1], side) in seen:
      found.append('same pair, other label')
    rewards = example['chosen_reward'], example['rejected_reward']
    if None not in rewards and rewards[0] < rewards[1]:
      found.append('rejected has the higher reward')
  seen.add((prompt, *responses, side))
  if task == 'hh':
    turns = ('\n\nHuman:', records.HH_MARKER)
    if any(turn in text for text in responses for turn in turns):
      found.append('response holds further turns')
  return found
