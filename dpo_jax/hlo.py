"""The text of a compiled program, read: instructions, and how often loops run.

XLA annotates a loop with its number of turns on a CPU; on a TPU it follows from
the constants that the loop's counter starts from, grows by and is compared
with. Where the data decides, nothing here knows.
"""

import functools
import math
import re
from typing import NamedTuple

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 'token': 0, 'opaque': 0}

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'(\w+)\[([\d,<=]*)\](\{[^}]*\})?')
_OPCODE = re.compile(r'\s*([a-z][\w\-]*)\((.*)$')
CALLED = re.compile(r'(?:calls|to_apply)=%?([\w.\-]+)')
NAMED = re.compile(r'%([\w.\-]+)')


class Array(NamedTuple):
  """A result, or a part of one; `near` if it lies in the core's own memory."""

  dtype: str
  dims: tuple
  near: bool

  @property
  def size(self):
    """Bytes, without the padding of tiles."""
    known = _BYTES.get(self.dtype)
    if known is None:
      bits = re.search(r'\d+', self.dtype)
      known = int(bits.group()) / 8 if bits else 0
    return math.prod(self.dims) * known


class Instruction(NamedTuple):
  """One line: name, arrays of the result, opcode, operands, all the rest."""

  name: str
  arrays: tuple
  opcode: str
  operands: tuple
  rest: str

  @property
  def bytes(self):
    return sum(array.size for array in self.arrays)


class Computation(NamedTuple):
  """Instructions by name, in order; the last one is the result."""

  name: str
  instructions: dict
  root: Instruction


class Program(NamedTuple):
  """Computations by name, and the name of the first one that runs."""

  computations: dict
  entry: str


def parse(text):
  """Reads the text of a compiled module (`compiled.as_text()`)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current, instructions, root = header.group(2), {}, None
      if header.group(1):
        entry = current
    elif line.startswith('}') and current:
      computations[current] = Computation(current, instructions, root)
      current = None
    elif current and (match := _LINE.match(line)):
      instruction = _instruction(match.group(1), match.group(2))
      instructions[instruction.name] = instruction
      if root is None or line.lstrip().startswith('ROOT '):
        root = instruction
  if entry is None:
    raise ValueError('the text has no ENTRY computation; it is no HLO module')
  return Program(computations, entry)


def _instruction(name, text):
  text = re.sub(r'/\*.*?\*/', '', text)
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  kind, (opcode, rest) = text[:end], _OPCODE.match(text[end:]).groups()
  close = _closing('(' + rest, 0) - 1
  operands = tuple(NAMED.findall(rest[:close])) or tuple(
    part.split()[-1] for part in rest[:close].split(',') if part.strip()
  )
  arrays = tuple(
    Array(
      dtype,
      tuple(int(n.strip('<=')) for n in dims.split(',') if n),
      'S(' in (layout or ''),
    )
    for dtype, dims, layout in _ARRAY.findall(kind)
  )
  # A constant's value and a parameter's number are operands that name nothing.
  return Instruction(
    name, arrays, opcode, operands, rest[:close] + rest[close:]
  )


def _closing(text, start):
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for n in range(start, len(text)):
    depth += (text[n] == '(') - (text[n] == ')')
    if not depth:
      return n
  raise ValueError(f'no parenthesis closes that of {text[start : start + 80]}')


# --- Loops --------------------------------------------------------------------


def trip_count(program, computation, loop):
  """Returns how often a while loop turns, or None where the data decides."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
  if known:
    return int(known.group(1))
  condition = program.computations[attribute(loop, 'condition')]
  body = program.computations[attribute(loop, 'body')]
  compared = _compared(program, condition)
  if compared is None:
    return None
  counter, limit = compared
  start = _initial(computation, loop, counter)
  if isinstance(limit, Instruction):
    limit = _constant(condition, limit.name)
  else:
    limit = _initial(computation, loop, limit)
  step = _step(program, body, counter)
  if start is None or limit is None or not step:
    return None
  return max(0, math.ceil((limit - start) / step))


def _compared(program, condition):
  """Returns (the counter's place in the state, the limit's or a constant)."""
  root, sides = condition.root, None
  if root.opcode == 'fusion':
    inner = program.computations[CALLED.search(root.rest).group(1)]
    if inner.root.opcode != 'compare':
      return None
    number = {
      op.name: int(op.rest.split(')')[0])
      for op in inner.instructions.values()
      if op.opcode == 'parameter'
    }
    sides = [
      root.operands[number[name]] if name in number else None
      for name in map(functools.partial(_origin, inner), inner.root.operands)
    ]
    root = inner.root
  elif root.opcode == 'compare':
    sides = root.operands
  if not sides or None in sides or 'direction=LT' not in root.rest:
    return None
  counter, limit = (
    condition.instructions[_origin(condition, s)] for s in sides
  )
  if counter.opcode != 'get-tuple-element':
    return None
  if limit.opcode == 'get-tuple-element':
    return _index(counter), _index(limit)
  return _index(counter), limit


def _index(op):
  return int(re.search(r'index=(\d+)', op.rest).group(1))


def _origin(computation, name):
  """Follows copies and casts to where a value comes from."""
  op = computation.instructions[name]
  while op.opcode in ('copy', 'bitcast', 'convert', 'copy-done', 'copy-start'):
    op = computation.instructions[op.operands[0]]
  return op.name


def _constant(computation, name):
  op = computation.instructions[_origin(computation, name)]
  found = re.match(r'(-?\d+)\)', op.rest)
  return int(found.group(1)) if op.opcode == 'constant' and found else None


def _initial(computation, loop, place):
  """The constant with which a place of a loop's state starts, or None."""
  state = computation.instructions[_origin(computation, loop.operands[0])]
  if state.opcode != 'tuple':
    return None
  return _constant(computation, state.operands[place])


def _step(program, body, place):
  """By how much a turn raises a place of the state."""
  if body.root.opcode != 'tuple':
    return None
  op = body.instructions[_origin(body, body.root.operands[place])]
  where, inside = body, op
  if op.opcode == 'fusion':
    where = program.computations[CALLED.search(op.rest).group(1)]
    inside = where.root
  if inside.opcode != 'add':
    return None
  added = [_constant(where, name) for name in inside.operands]
  if op.opcode == 'fusion' and added == [None, None]:
    added = [_constant(body, name) for name in op.operands]
  return next((value for value in added if value is not None), None)


def attribute(op, name):
  return re.search(rf'\b{name}(?:_computation)?=%?([\w.\-]+)', op.rest).group(1)
