"""What a compiled program does, loops counted in full.

XLA's own count (`cost_analysis`) takes the body of a loop once, so a model of
32 scanned layers looks like one layer. Here a loop counts as often as it runs.
Where the data decides, the caller says how often, by the `jax.named_scope` that
the loop is in; a loop of which nobody knows counts once, and is named.

Counted are the multiplications and additions of dots and of convolutions (which
is what the TPU's compiler makes of dots), collectives by kind, calls of Pallas
kernels by name, the compiler's own estimate of cycles, and, roughly, the bytes
between a chip's memory and its core.
"""

import collections
import dataclasses
import functools
import math
import re
import types

from dpo_jax import hlo

COLLECTIVES = (
  'all-gather',
  'reduce-scatter',
  'all-reduce',
  'all-to-all',
  'collective-permute',
)


@dataclasses.dataclass
class Traffic:
  """Collectives of a kind: how many, bytes moved, bytes over a chip's links.

  `payload` is the larger of what goes in and what comes out on a chip. Of a
  group of g chips a ring sends (g - 1) / g of it over a chip's links, twice
  that for an all-reduce.
  """

  count: float = 0
  payload: float = 0
  linked: float = 0


@dataclasses.dataclass
class Account:
  """What one run of a program does on one device.

  flops: of dots and convolutions. collectives: {kind: Traffic}. kernels:
  {name: calls}. cycles: the compiler's estimate, of what it has one for: not
  of kernels and collectives. product_cycles: those of operations with dots or
  convolutions in them. memory_bytes: read from or written to the chip's
  memory, estimated from operands and results. unknown: names of loops of
  which nobody knows how often they turn: with any, all else is too low.
  """

  flops: float = 0
  collectives: dict = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Traffic)
  )
  kernels: dict = dataclasses.field(
    default_factory=lambda: collections.defaultdict(float)
  )
  cycles: float = 0
  product_cycles: float = 0
  memory_bytes: float = 0
  unknown: set = dataclasses.field(default_factory=set)

  def add(self, other):
    """Adds another Account to this one."""
    self.flops += other.flops
    self.cycles += other.cycles
    self.product_cycles += other.product_cycles
    self.memory_bytes += other.memory_bytes
    self.unknown |= other.unknown
    for name, calls in other.kernels.items():
      self.kernels[name] += calls
    for kind, traffic in other.collectives.items():
      mine = self.collectives[kind]
      mine.count += traffic.count
      mine.payload += traffic.payload
      mine.linked += traffic.linked


def count(program, *, turns=types.MappingProxyType({})):
  """Returns the Account of a run.

  Args:
    program: `hlo.Program`.
    turns: {scope: how often each loop in this `jax.named_scope` turns}, for
      loops of which the program does not say it.
  """
  account = Account()
  _visit(program, program.entry, 1, account, turns, set(), inside=False)
  return account


_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SOURCE = re.compile(r'op_name="([^"]*)"')


def _turns(program, computation, loop, account, turns):
  """How often a loop turns; where nobody knows, 1, and `account` says so."""
  found = hlo.trip_count(program, computation, loop)
  if found is not None:
    return found
  source = _SOURCE.search(loop.rest)
  source = source.group(1) if source else loop.name
  for scope, number in turns.items():
    # Derivatives write it transpose(jvp(scope)).
    if re.search(rf'\b{re.escape(scope)}\b', source):
      return number
  account.unknown.add(source)
  return 1


def _visit(program, name, times, account, turns, seen, *, inside):
  """Adds a computation; `inside` one that its caller runs as one operation.

  `seen` are channels of collectives that this turn has counted: an
  asynchronous one is written where it starts and where it ends.
  """
  computation = program.computations[name]
  for op in computation.instructions.values():
    if op.opcode == 'while':
      often = times * _turns(program, computation, op, account, turns)
      body = hlo.attribute(op, 'body')
      _visit(program, body, often, account, turns, set(), inside=False)
      continue
    if op.opcode == 'conditional':
      # One branch is run; which, the data decides: the costliest, to be safe.
      branches = [Account() for _ in _branches(op)]
      for branch, its in zip(_branches(op), branches):
        _visit(program, branch, times, its, turns, set(), inside=inside)
      account.add(max(branches, key=_cost))
      continue
    flops = account.flops
    kind = op.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      _add_collective(account, computation, op, kind, times, seen)
    elif op.opcode == 'dot':
      account.flops += times * _dot_flops(computation, op)
    elif op.opcode == 'convolution':
      account.flops += times * _convolution_flops(computation, op)
    elif 'custom_call_target="tpu_custom_call"' in op.rest:
      account.kernels[re.sub(r'\.\d+$', '', op.name)] += times
    if not inside:
      account.cycles += times * _cycles(op)
      account.memory_bytes += times * _memory_bytes(program, computation, op)
    if op.opcode in ('fusion', 'call', 'async-start', 'custom-call'):
      for called in hlo.CALLED.findall(op.rest):
        if called in program.computations:
          within = inside or op.opcode != 'call'
          _visit(program, called, times, account, turns, seen, inside=within)
    if not inside and account.flops > flops:
      account.product_cycles += times * _cycles(op)


def _cost(account):
  """What orders branches: FLOPs, then bytes."""
  moved = sum(traffic.linked for traffic in account.collectives.values())
  kernels = sum(account.kernels.values())
  return account.flops, kernels, account.memory_bytes + moved


def _branches(op):
  found = _BRANCHES.search(op.rest)
  if found:
    return hlo.NAMED.findall(found.group(1))
  return [hlo.attribute(op, name) for name in ('true', 'false')]


def _cycles(op):
  found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
  return int(found.group(1)) if found else 0


# --- FLOPs --------------------------------------------------------------------


def _dims(computation, name):
  return computation.instructions[name].arrays[0].dims


def _dot_flops(computation, op):
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', op.rest).group(1)
  left = _dims(computation, op.operands[0])
  depth = math.prod(left[int(n)] for n in contracted.split(',') if n)
  return 2 * math.prod(op.arrays[0].dims) * depth


def _convolution_flops(computation, op):
  """Multiplications and additions that meet no padding, and no hole.

  The TPU's compiler writes the dimensions of heads and batches as windows with
  padding, in which most places are empty.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', op.rest).groups()
  left, right = (_dims(computation, name) for name in op.operands[:2])
  out = op.arrays[0].dims
  kernel_inputs = right[labels[1].index('i')]
  flops = 2 * kernel_inputs * out[labels[2].index('b')]
  flops *= out[labels[2].index('f')]
  window = re.search(r'window=\{([^}]*)\}', op.rest)
  fields = (
    dict(part.split('=') for part in window.group(1).split()) if window else {}
  )
  spatial = sum(label.isdigit() for label in labels[0])
  for n in range(spatial):

    def field(name, default, n=n):
      return fields[name].split('x')[n] if name in fields else default

    flops *= _meetings(
      left[labels[0].index(str(n))],
      right[labels[1].index(str(n))],
      out[labels[2].index(str(n))],
      stride=int(field('stride', 1)),
      low=int(field('pad', '0_0').split('_')[0]),
      left_dilation=int(field('lhs_dilate', 1)),
      right_dilation=int(field('rhs_dilate', 1)),
    )
  return flops


@functools.cache
def _meetings(
  size, window, outs, *, stride, low, left_dilation, right_dilation
):
  """Pairs of a place of the result and of the window that meet an element."""
  last, pairs = (size - 1) * left_dilation, 0
  for place in range(outs):
    for tap in range(window):
      at = place * stride + tap * right_dilation - low
      pairs += 0 <= at <= last and at % left_dilation == 0
  return pairs


# --- Collectives --------------------------------------------------------------


def _add_collective(account, computation, op, kind, times, seen):
  channel = re.search(r'channel_id=(\d+)', op.rest)
  if channel:
    if (kind, channel.group(1)) in seen:
      return
    seen.add((kind, channel.group(1)))
  given = sum(
    computation.instructions[name].bytes
    for name in op.operands
    if name in computation.instructions
  )
  made = op.bytes
  if op.opcode == 'all-gather-start':  # result: operands, then results
    n = len(op.operands)
    made = sum(array.size for array in op.arrays[n : 2 * n])
  scattered = (
    kind == 'all-reduce'
    and computation.root.opcode == 'dynamic-slice'
    and computation.root.operands[0] == op.name
  )
  if scattered:  # how the TPU's compiler writes one
    kind = 'reduce-scatter'
  if kind == 'collective-permute':
    payload = given
  elif kind == 'all-reduce':
    payload = given
  else:
    payload = max(given, made)
  group = group_size(op.rest)
  if group == 1:
    return
  share = 1 if kind == 'collective-permute' or not group else 1 - 1 / group
  traffic = account.collectives[kind]
  traffic.count += times
  traffic.payload += times * payload
  traffic.linked += times * payload * share * (2 if kind == 'all-reduce' else 1)


def group_size(rest):
  """Returns how many devices a collective joins; 0 where it does not say.

  Groups are written {{0,1},{2,3}}, or [groups,size]<=[...], or
  mesh['a'=2,'b'=4] {'a'}.
  """
  found = re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', rest)
  if found:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
    part = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found.group(2))
    return math.prod(int(size or sizes[name]) for name, _, size in part)
  found = re.search(r'replica_groups=\[\d+,(\d+)\]<=', rest)
  if found:
    return int(found.group(1))
  found = re.search(r'replica_groups=\{\{([\d,]*)\}', rest)
  return len(found.group(1).split(',')) if found else 0


# --- Bytes --------------------------------------------------------------------

# What moves nothing, or is counted elsewhere.
_FREE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'iota',
)


def _memory_bytes(program, computation, op):
  """Estimates the bytes of an operation between memory and core.

  Operands and results that do not lie near the core, each once; of what a
  fusion, or one within it, only slices, or writes a slice of, the slice.
  """
  if op.opcode in _FREE or op.opcode.endswith('-done'):
    return 0
  far = sum(array.size for array in op.arrays if not array.near)
  if op.opcode.endswith('-start'):
    return far / 2 if op.opcode != 'async-start' else 0
  sliced = {}
  if op.opcode == 'fusion':
    sliced, far = _slices(program, _inner(program, op), far)
  elif op.opcode in ('dynamic-slice', 'gather'):
    sliced = {0: far}
  elif op.opcode == 'dynamic-update-slice':
    update = computation.instructions[op.operands[1]].bytes
    return 2 * update if far else 0
  total = far
  for n, name in enumerate(op.operands):
    operand = computation.instructions.get(name)
    if operand is None or any(array.near for array in operand.arrays):
      continue
    total += sliced.get(n, operand.bytes)
  return total


def _inner(program, fusion):
  return program.computations[hlo.CALLED.search(fusion.rest).group(1)]


def _slices(program, inner, far):
  """Returns ({operand: bytes of its slices}, bytes written) of a fusion."""
  sliced = {}
  for parameter in inner.instructions.values():
    if parameter.opcode != 'parameter':
      continue
    number = _number(parameter)
    users = _users(inner, parameter.name)
    part = _part(program, inner, parameter.name)
    if part is not None:
      sliced[number] = part
    elif users and all(
      place == 0 and user.opcode == 'dynamic-update-slice'
      for user, place in users
    ):
      updates = [inner.instructions[user.operands[1]] for user, _ in users]
      sliced[number] = 0
      if far:
        far -= parameter.bytes - sum(update.bytes for update in updates)
  return sliced, max(far, 0)


def _part(program, inner, name):
  """Returns the bytes of the slices of a value that are all of it that is
  used, by fusions in the fusion too; None where it is used whole.
  """
  total, users = 0, _users(inner, name)
  for user, place in users:
    part = None
    if user.opcode == 'fusion':
      nested = _inner(program, user)
      (parameter,) = (
        instruction.name
        for instruction in nested.instructions.values()
        if instruction.opcode == 'parameter' and _number(instruction) == place
      )
      part = _part(program, nested, parameter)
    elif user.opcode == 'bitcast':
      part = _part(program, inner, user.name)
    elif place == 0 and user.opcode in ('dynamic-slice', 'gather', 'slice'):
      part = user.bytes
    if part is None:
      return None
    total += part
  return total if users else None


def _number(parameter):
  return int(parameter.rest.split(')')[0])


def _users(inner, name):
  """Returns [(instruction, place of the value among its operands)]."""
  return [
    (user, place)
    for user in inner.instructions.values()
    for place, operand in enumerate(user.operands)
    if operand == name
  ]
