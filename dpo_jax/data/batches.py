"""Which groups a step sees, and in how many rows.

Data order is a pure function of (seed, step): step s consumes the groups
s*B .. (s+1)*B - 1 of an endless sequence of shuffled epochs. Lengths are known
before the first step, so the planner packs every step of the run in advance
and settles on at most two array shapes.

A batch is the dict of `rows.fill`; a process takes its own rows of it.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from dpo_jax.data import rows

_SCORED_MULTIPLE = 16  # row_scored is rounded up to this
_LENGTH_MULTIPLE = 128  # of rows shorter than asked for
_SPARE = 3  # rows more than the slots of the fullest step ask for
_TRIED = 4  # shapes packed before one is chosen
_SAMPLE = 200  # steps of a run that the choice looks at


def shuffled(*, seed, step, batch_size, num_groups):
  """Returns the `batch_size` group numbers of one training step."""
  start = step * batch_size
  numbers = []
  while len(numbers) < batch_size:
    epoch, offset = divmod(start + len(numbers), num_groups)
    order = _epoch(seed, epoch, num_groups)
    numbers.extend(order[offset : offset + batch_size - len(numbers)].tolist())
  return numbers


@functools.lru_cache(maxsize=2)  # a step spans two epochs, mostly one
def _epoch(seed, epoch, num_groups):
  return np.random.default_rng([seed, epoch]).permutation(num_groups)


class Shape(NamedTuple):
  """What is compiled: R rows of T slots with up to S scored tokens each."""

  rows: int
  length: int
  scored: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """The shapes of a run and the rows of each of its steps."""

  groups: list  # of examples.Group
  steps: list  # per step: group numbers
  members: list  # per step: for each row, group numbers
  shapes: tuple  # one or two Shapes
  shape_numbers: list  # per step: which of them
  row_groups: int  # G
  responses: int  # K
  window: int | None  # of the model, see `rows.blocks`

  @property
  def num_steps(self):
    return len(self.steps)

  @functools.cached_property
  def starts(self):
    """Where each group's scored tokens start in one flat array: [groups + 1].

    See `place` and `collect`.
    """
    return np.cumsum([0, *map(rows.scored_tokens, self.groups)])

  def shape_of(self, step):
    """Returns the Shape of a step."""
    return self.shapes[self.shape_numbers[step]]

  def batch(self, step, *, own=None):
    """Lays out one step, or the rows of it with the numbers `own`."""
    members = self.members[step]
    count, row_length, row_scored = self.shape_of(step)
    members = members + [[]] * (count - len(members))
    return rows.fill(
      self.groups,
      members if own is None else [members[row] for row in own],
      row_length=row_length,
      row_scored=row_scored,
      row_groups=self.row_groups,
      responses=self.responses,
      window=self.window,
    )

  def tokens(self, step):
    """Real tokens of a step; a prompt counts once, even if laid out again."""
    return sum(rows.real_tokens(self.groups[g]) for g in self.steps[step])

  def slots_of(self, step):
    """Token slots of a step, padding included."""
    shape = self.shape_of(step)
    return shape.rows * shape.length

  def slots(self):
    """Token slots of all steps, padding included."""
    return sum(map(self.slots_of, range(self.num_steps)))

  def fill(self):
    """Share of all slots that hold a real token."""
    used = sum(self.tokens(step) for step in range(self.num_steps))
    return used / self.slots()

  def summary(self):
    """One line for the log."""
    groups = sum(map(len, self.steps))
    shapes = ' or '.join(f'{s.rows}x{s.length}' for s in self.shapes)
    return (
      f'{self.num_steps} steps of {len(self.steps[0])} groups in {shapes}'
      f' slots: {100 * self.fill():.1f}% full,'
      f' {self.slots() / groups:.0f} slots a group'
    )


def _candidates(most, longest, groups, *, row_length, multiple):
  """Returns (rows, length) of shapes that may hold `most` slots, small first.

  Shorter rows than `row_length` are multiples of 128, the blocks of attention
  kernels; they make steps of a size between two row counts. Rows of that length
  go up to one for each of the `groups` of a step, which always holds them.
  """
  lengths = [row_length]
  if row_length % _LENGTH_MULTIPLE == 0:
    lengths = range(row_length, longest - 1, -_LENGTH_MULTIPLE)
  shapes = []
  for length in lengths:
    top = -(-most // (length * multiple)) + _SPARE
    if length == row_length:
      top = max(top, -(-groups // multiple))
    shapes += [(n * multiple, length) for n in range(1, top + 1)]
  # Of equal sizes the longest rows, which are the easiest to fill.
  return sorted(shapes, key=lambda shape: (shape[0] * shape[1], -shape[1]))


def _two_shapes(candidates, needs, fits):
  """Picks one or two of `candidates` that hold all steps in the fewest slots.

  Args:
    candidates: (rows, length), small first.
    needs: tokens of each step.
    fits: (step, shape) -> whether the step's groups go into the shape.
  """
  sizes = {shape: shape[0] * shape[1] for shape in candidates}
  order = np.argsort(-needs, kind='stable')  # failures come early
  top = next(
    shape
    for shape in candidates
    if sizes[shape] >= needs.max() and all(fits(s, shape) for s in order)
  )
  # The best few by their sizes, then the best by what really fits in.
  sample = np.linspace(0, len(needs) - 1, min(len(needs), _SAMPLE)).astype(int)
  smaller = [shape for shape in candidates if sizes[shape] < sizes[top]]

  def hoped(shape):
    return np.where(needs <= sizes[shape], sizes[shape], sizes[top]).sum()

  def real(shape):
    return sum(
      sizes[shape if needs[s] <= sizes[shape] and fits(s, shape) else top]
      for s in sample
    )

  best = sorted(smaller, key=hoped)[:_TRIED]
  small = min([top, *best], key=real)
  return (top,) if small == top else (small, top)


def plan_steps(groups, steps, *, row_length, multiple, window):
  """Packs given steps (lists of group numbers) into rows of few shapes."""
  if not groups:
    raise ValueError('no examples are left to train or evaluate on')
  responses = {len(group.responses) for group in groups}
  if len(responses) > 1:
    raise ValueError(
      f'groups with {sorted(responses)} responses in one data set; a run'
      ' needs one number'
    )
  for name, without in [
    ('rewards', [group.id for group in groups if group.rewards is None]),
    ('costs', [group.id for group in groups if group.costs is None]),
  ]:
    if 0 < len(without) < len(groups):
      raise ValueError(
        f'{len(without)} of {len(groups)} examples have no {name}, such as'
        f' {without[0]!r}; give {name} to all of them or to none'
      )
  slots = [rows.slots_needed(group, window=window) for group in groups]
  scored = [rows.scored_tokens(group) for group in groups]
  for group, need in zip(groups, slots):
    if need > row_length:
      raise ValueError(
        f'example {group.id!r} needs {need} slots but data.row_length is'
        f' {row_length}; raise it to at least {max(slots)} or lower'
        ' data.max_prompt_tokens or data.max_response_tokens'
      )
  needs = np.array([sum(slots[g] for g in numbers) for numbers in steps])

  @functools.cache
  def packed(step, shape):
    return rows.pack(
      [slots[g] for g in steps[step]],
      [scored[g] for g in steps[step]],
      rows=shape[0],
      row_length=shape[1],
    )

  candidates = _candidates(
    needs.max(),
    max(slots),
    max(map(len, steps)),
    row_length=row_length,
    multiple=multiple,
  )
  shapes = _two_shapes(
    candidates, needs, lambda step, shape: packed(step, shape) is not None
  )
  members, shape_numbers = [], []
  for step, numbers in enumerate(steps):
    number = 0 if packed(step, shapes[0]) is not None else len(shapes) - 1
    shape_numbers.append(number)
    members.append(
      [[numbers[i] for i in row] for row in packed(step, shapes[number])]
    )
  most_scored = [0] * len(shapes)
  for number, step_members in zip(shape_numbers, members):
    for row in step_members:
      most = sum(scored[g] for g in row)
      most_scored[number] = max(most_scored[number], most)
  return Plan(
    groups=groups,
    steps=steps,
    members=members,
    shapes=tuple(
      Shape(*shape, -(-most // _SCORED_MULTIPLE) * _SCORED_MULTIPLE)
      for shape, most in zip(shapes, most_scored)
    ),
    shape_numbers=shape_numbers,
    row_groups=max(len(row) for m in members for row in m),
    responses=responses.pop(),
    window=window,
  )


def training_plan(
  groups, *, seed, num_steps, batch_size, row_length, multiple, window
):
  """Plans a run of `num_steps` steps of exactly `batch_size` groups.

  `multiple` is the number of devices that share the rows of a batch, `window`
  that of the model (see `rows.blocks`).
  """
  steps = [
    shuffled(seed=seed, step=s, batch_size=batch_size, num_groups=len(groups))
    for s in range(num_steps)
    if groups
  ]
  return plan_steps(
    groups, steps, row_length=row_length, multiple=multiple, window=window
  )


def evaluation_plan(groups, *, batch_size, row_length, multiple, window):
  """Plans one pass in order; the last batch may hold fewer groups."""
  numbers = list(range(len(groups)))
  steps = [
    numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)
  ]
  return plan_steps(
    groups, steps, row_length=row_length, multiple=multiple, window=window
  )


def uniform_plan(
  groups, *, max_prompt, max_response, row_groups, batch_rows, multiple
):
  """Plans one pass over single-response groups in a shape known beforehand.

  For samples, whose lengths change from call to call: every row has room for
  `row_groups` groups of the largest size, so repeated evaluations share one
  compiled program.

  Args:
    groups: groups with one response each.
    max_prompt: most prompt tokens of a group.
    max_response: most response tokens of a group.
    row_groups: groups a row.
    batch_rows: rows of a batch, before rounding up to `multiple`.
    multiple: number of devices that share the rows.
  """
  count = -(-batch_rows // multiple) * multiple
  numbers = list(range(len(groups)))
  size = count * row_groups
  steps = [numbers[i : i + size] for i in range(0, len(numbers), size)]
  members = [
    [step[i : i + row_groups] for i in range(0, len(step), row_groups)]
    for step in steps
  ]
  return Plan(
    groups=groups,
    steps=steps,
    members=members,
    shapes=(
      Shape(
        count,
        row_groups * (max_prompt + max_response),
        row_groups * max_response,
      ),
    ),
    shape_numbers=[0] * len(steps),
    row_groups=row_groups,
    responses=1,
    window=None,  # a single response stands in order
  )


def place(values, starts, batch):
  """Lays flat per-token values out like `target`: float32 [R, S].

  Args:
    values: float32, scored tokens of all groups, responses in order.
    starts: `Plan.starts`.
    batch: a batch of `Plan.batch`.
  """
  out = np.zeros(batch['target'].shape, np.float32)
  for r, numbers in enumerate(batch['group']):
    parts = [values[starts[g] : starts[g + 1]] for g in numbers if g >= 0]
    row = np.concatenate([[], *parts])
    out[r, : len(row)] = row
  return out


def collect(laid_out, starts, batch, values):
  """Writes [R, S] values back into the flat array: `place` reversed."""
  for r, numbers in enumerate(batch['group']):
    scored = 0
    for g in numbers[numbers >= 0]:
      size = starts[g + 1] - starts[g]
      values[starts[g] : starts[g + 1]] = laid_out[r, scored : scored + size]
      scored += size
