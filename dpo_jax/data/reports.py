"""What was read, kept, dropped and noticed, and how it prints.

A report is honest when its numbers add up: in every split `read` equals `kept`
plus everything under `dropped`. What is under `noticed` was kept. Files are
counted in rows, the rest in examples: a pair is two of the form 'unpaired'.
"""

import dataclasses


def aligned(rows: list[tuple[str, ...]]) -> str:
  """Lays out rows of cells as a text table: names left, numbers right."""
  widths = [max(len(cell) for cell in column) for column in zip(*rows)]
  lines = []
  for name, *cells in rows:
    numbers = (c.rjust(w) for c, w in zip(cells, widths[1:]))
    lines.append('  '.join([name.ljust(widths[0]), *numbers]).rstrip())
  return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class Counts:
  """Examples of one split."""

  read: int
  kept: int
  dropped: dict[str, int]
  noticed: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Report:
  """The account of one data set, saved beside it."""

  task: str
  form: str
  split_rule: str
  rows_per_file: dict[str, int]
  unused_fields: dict[str, int]
  splits: dict[str, Counts]

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, fields: dict) -> 'Report':
    splits = {name: Counts(**c) for name, c in fields['splits'].items()}
    return cls(**{**fields, 'splits': splits})

  def __str__(self) -> str:
    counts = list(self.splits.values())

    def row(name, numbers):
      return (name, *(f'{n:,}' for n in (*numbers, sum(numbers))))

    def rows(kind, entries):
      reasons = sorted({reason for e in entries for reason in e})
      return [
        row(f'  {kind}: {reason}', [e.get(reason, 0) for e in entries])
        for reason in reasons
      ]

    table = [('examples', *self.splits, 'total')]
    table += [row('read', [c.read for c in counts])]
    table += rows('dropped', [c.dropped for c in counts])
    table += [row('kept', [c.kept for c in counts])]
    table += rows('noticed', [c.noticed for c in counts])
    lines = [f'{self.task} ({self.form})', f'split: {self.split_rule}']
    lines += [f'file: {n}, {k:,} rows' for n, k in self.rows_per_file.items()]
    lines += [
      f'field not used: {name}, in {count:,} rows'
      for name, count in self.unused_fields.items()
    ]
    return '\n'.join([*lines, aligned(table)])
