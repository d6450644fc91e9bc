"""Prefix-shared rows: a prompt and its responses, laid out once.

A group is a prompt and its K responses. A pair is written

    reversed rejected | prompt | chosen

so that what a token may attend to is one interval of slots, `lo <= s < hi`.
Literal example, prompt `p1 p2 p3`, chosen `c1 c2 E`, rejected `r1 E`:

    slot        0    1    2    3    4    5    6    7
    token       E    r1   p1   p2   p3   c1   c2   E
    position    4    3    0    1    2    3    4    5
    lo          0    1    2    2    2    2    2    2
    hi          5    5    3    4    5    6    7    8

K = 1 is `prompt | response`; K > 2 writes ceil(K / 2) such blocks.

A layer with a sliding window sees the last `window` slots of an interval. That
is right for what stands in order, but a reversed response has the start of the
prompt in the middle of its interval. So where prompt and left response are
longer than the window, the block is written as two, `prompt | chosen` and
`prompt | rejected`.

Only response tokens are scored; each scored token has `source` (the slot whose
hidden state predicts it), `at` (its own), `target` and `slot` (which response
of the row): above 4->c1, 5->c2, 6->E in slot 0 and 4->r1, 1->E in slot 1.
Group g of a row owns slots gK .. gK+K-1.

Dimension key: R rows, T slots, S scored tokens per row, G groups per row, K
responses per group.
"""

import numpy as np


def blocks(group, *, window):
  """Returns the (right, left) response numbers of each block; left or None.

  `window` is that of the model's windowed layers, or None.
  """
  out = []
  for k in range(0, len(group.responses), 2):
    pair = group.responses[k : k + 2]
    if len(pair) == 1:
      out.append((k, None))
    elif window is None or len(group.prompt) + len(pair[1]) <= window:
      out.append((k, k + 1))
    else:
      out += [(k, None), (k + 1, None)]
  return out


def slots_needed(group, *, window):
  """Token slots a group takes in a row."""
  prompts = len(blocks(group, window=window)) * len(group.prompt)
  return prompts + scored_tokens(group)


def scored_tokens(group):
  """Response tokens of a group, over all its responses."""
  return sum(len(r) for r in group.responses)


def real_tokens(group):
  """Tokens of a group: its prompt, once, and its responses."""
  return len(group.prompt) + scored_tokens(group)


# What `pack` tries: most scored tokens of a row, over the mean row's, and how
# many orders of the groups for each.
_SCORED_SLACKS = (1.1, 1.25, 2.0)
_ORDERS = 5


def pack(slots, scored, *, row_length, rows):
  """Packs groups into `rows` rows whose scored tokens are about even.

  Even, because the head works on as many tokens of each row as the row with
  most of them has. Returns what `assign` does, or None if no try fits. The
  tries are the same in every process.
  """
  if sum(slots) > rows * row_length or max(slots) > row_length:
    return None
  for slack in _SCORED_SLACKS:
    row_scored = max(int(slack * sum(scored) / rows) + 1, *scored)
    for attempt in range(_ORDERS):
      rng = np.random.default_rng(attempt)
      blur = rng.uniform(0.7, 1.0, len(slots)) if attempt else 1.0
      members = assign(
        slots,
        scored,
        row_length=row_length,
        row_scored=row_scored,
        rows=rows,
        sizes=(blur * np.asarray(slots)).tolist(),
      )
      if len(members) <= rows:
        return members
  return None


def assign(slots, scored, *, row_length, row_scored, rows=0, sizes=None):
  """Packs groups into rows by best fit, longest first.

  Args:
    slots: slots of each group.
    scored: scored tokens of each group.
    row_length: T, slots of a row.
    row_scored: S, scored tokens of a row.
    rows: rows to start with; more are opened when nothing fits.
    sizes: what to call long, for another order; None is `slots`.

  Returns:
    One list of group numbers a row, in the order given by packing.
  """
  free_slots = [row_length] * rows
  free_scored = [row_scored] * rows
  members = [[] for _ in range(rows)]
  sizes = slots if sizes is None else sizes
  for g in sorted(range(len(slots)), key=lambda g: (-sizes[g], g)):
    best, best_free = -1, row_length + 1
    for r, free in enumerate(free_slots):
      if slots[g] <= free < best_free and scored[g] <= free_scored[r]:
        best, best_free = r, free
    if best < 0:
      if slots[g] > row_length or scored[g] > row_scored:
        raise ValueError(
          f'a group needs {slots[g]} slots ({scored[g]} scored) but a row'
          f' has {row_length} ({row_scored} scored); raise data.row_length'
          ' or lower data.max_prompt_tokens or data.max_response_tokens'
        )
      best = len(members)
      free_slots.append(row_length)
      free_scored.append(row_scored)
      members.append([])
    free_slots[best] -= slots[g]
    free_scored[best] -= scored[g]
    members[best].append(g)
  return members


def _write_block(row, start, prompt, right, left):
  """Writes `reversed left | prompt | right`; returns slot numbers of each."""
  P, m, n = len(prompt), len(left), len(right)
  middle = start + m
  end = middle + P + n
  left_slots = np.arange(middle - 1, start - 1, -1)
  right_slots = np.arange(middle + P, end)
  row['tokens'][left_slots] = left
  row['tokens'][middle : middle + P] = prompt
  row['tokens'][right_slots] = right
  row['positions'][left_slots] = np.arange(P, P + m)
  row['positions'][middle:end] = np.arange(P + n)
  row['lo'][left_slots] = left_slots
  row['hi'][left_slots] = middle + P
  row['lo'][middle:end] = middle
  row['hi'][middle:end] = np.arange(middle, end) + 1
  return left_slots, middle + P - 1, right_slots


def fill(
  groups, members, *, row_length, row_scored, row_groups, responses, window
):
  """Lays groups out.

  Args:
    groups: list of `examples.Group`.
    members: for each row, numbers into `groups` (see `assign`).
    row_length: T.
    row_scored: S.
    row_groups: G.
    responses: K, the same for every group.
    window: see `blocks`.

  Returns:
    Dict of numpy arrays: `tokens positions lo hi` int32 [R, T]; `source
    at target slot` int32 [R, S] (padding: slot -1, the others 0);
    `weight p` float32 and `mask` bool [R, G]; `group` int32 [R, G] (number
    into `groups`, padding -1); `rewards costs` float32 [R, G, K], 0 where a
    group has none. Padding slots hold token 0 and attend to themselves.
  """
  R, T, S, G, K = len(members), row_length, row_scored, row_groups, responses
  itself = np.tile(np.arange(T, dtype=np.int32), (R, 1))
  batch = {
    'tokens': np.zeros((R, T), np.int32),
    'positions': np.zeros((R, T), np.int32),
    'lo': itself,
    'hi': itself + 1,
    'source': np.zeros((R, S), np.int32),
    'at': np.zeros((R, S), np.int32),
    'target': np.zeros((R, S), np.int32),
    'slot': np.full((R, S), -1, np.int32),
    'weight': np.zeros((R, G), np.float32),
    'p': np.ones((R, G), np.float32),
    'mask': np.zeros((R, G), bool),
    'group': np.full((R, G), -1, np.int32),
    'rewards': np.zeros((R, G, K), np.float32),
    'costs': np.zeros((R, G, K), np.float32),
  }
  for r, numbers in enumerate(members):
    row = {name: array[r] for name, array in batch.items()}
    start = scored = 0
    for g, number in enumerate(numbers):
      group = groups[number]
      row['weight'][g], row['p'][g] = group.weight, group.p
      row['mask'][g], row['group'][g] = True, number
      for name, values in [('rewards', group.rewards), ('costs', group.costs)]:
        if values is not None:
          row[name][g] = values
      for right_k, left_k in blocks(group, window=window):
        right = group.responses[right_k]
        left = right[:0] if left_k is None else group.responses[left_k]
        left_slots, last, right_slots = _write_block(
          row, start, group.prompt, right, left
        )
        start += len(left) + len(group.prompt) + len(right)
        for k, slots in [(right_k, right_slots), (left_k, left_slots)]:
          if k is None:
            continue
          span = slice(scored, scored + len(slots))
          row['source'][span] = np.concatenate([[last], slots[:-1]])
          row['at'][span] = slots
          row['target'][span] = group.responses[k]
          row['slot'][span] = g * K + k
          scored += len(slots)
  return batch
