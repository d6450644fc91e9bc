"""Which groups a step sees, and in how many rows.

Data order is a pure function of (seed, step): step s consumes the groups
s*B .. (s+1)*B - 1 of an endless sequence of shuffled epochs. Lengths are known
before the first step, so the planner packs every step of the run in advance
and settles on at most two array shapes.

A batch is the dict of `rows.fill`; a process takes its slice of the rows.
"""

import dataclasses
import functools

import numpy as np

from dpo_jax.data import rows

_SCORED_MULTIPLE = 16  # row_scored is rounded up to this
_SCORED_SLACK = 1.25  # most scored tokens of a row, over the mean row's


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


@dataclasses.dataclass(frozen=True)
class Plan:
  """The shapes of a run and the rows of each of its steps."""

  groups: list  # of examples.Group
  steps: list  # per step: group numbers
  members: list  # per step: for each row, group numbers
  row_counts: tuple  # one or two legal R, ascending
  row_length: int  # T
  row_scored: int  # S
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

  def rows_of(self, step):
    """R of a step: the smallest compiled shape that holds it."""
    need = len(self.members[step])
    return next(count for count in self.row_counts if count >= need)

  def batch(self, step, *, process=0, processes=1):
    """Lays out one step; a process gets rows/processes consecutive rows."""
    members = self.members[step]
    count = self.rows_of(step)
    members = members + [[]] * (count - len(members))
    if count % processes:
      raise ValueError(
        f'{count} rows cannot be shared by {processes} processes'
      )
    share = count // processes
    return rows.fill(
      self.groups,
      members[process * share : (process + 1) * share],
      row_length=self.row_length,
      row_scored=self.row_scored,
      row_groups=self.row_groups,
      responses=self.responses,
      window=self.window,
    )

  def tokens(self, step):
    """Slots of a step that hold a token."""
    return sum(
      rows.slots_needed(self.groups[g], window=self.window)
      for g in self.steps[step]
    )

  def slots(self):
    """Token slots of all steps, padding included."""
    return sum(map(self.rows_of, range(self.num_steps))) * self.row_length

  def fill(self):
    """Share of all slots that hold a token."""
    used = sum(self.tokens(step) for step in range(self.num_steps))
    return used / self.slots()

  def summary(self):
    """One line for the log."""
    groups = sum(map(len, self.steps))
    shapes = ' or '.join(
      f'{count}x{self.row_length}' for count in self.row_counts
    )
    return (
      f'{self.num_steps} steps of {len(self.steps[0])} groups in {shapes}'
      f' slots: {100 * self.fill():.1f}% full,'
      f' {self.slots() / groups:.0f} slots a group'
    )


def _two_shapes(needs, multiple):
  """Picks one or two row counts that cover `needs` with the fewest rows."""
  needs = -(-np.asarray(needs) // multiple) * multiple
  top = needs.max()

  def cost(small):
    return np.where(needs <= small, small, top).sum()

  small = min(np.unique(needs), key=cost)
  return (int(top),) if small == top else (int(small), int(top))


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
  mean_scored = sum(scored) / sum(slots) * row_length
  most_scored = max(int(_SCORED_SLACK * mean_scored), *scored, 1)
  members = []
  for numbers in steps:
    least = -(-sum(slots[g] for g in numbers) // row_length)
    packed = rows.assign(
      [slots[g] for g in numbers],
      [scored[g] for g in numbers],
      row_length=row_length,
      row_scored=most_scored,
      rows=least,
    )
    members.append([[numbers[i] for i in row] for row in packed])
  row_scored = max(sum(scored[g] for g in row) for m in members for row in m)
  return Plan(
    groups=groups,
    steps=steps,
    members=members,
    row_counts=_two_shapes([len(m) for m in members], multiple),
    row_length=row_length,
    row_scored=-(-row_scored // _SCORED_MULTIPLE) * _SCORED_MULTIPLE,
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
    row_counts=(count,),
    row_length=row_groups * (max_prompt + max_response),
    row_scored=row_groups * max_response,
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
