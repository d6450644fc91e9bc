"""TPU slices that are not there: their names, their chips, their compiler.

`libtpu`, the TPU's compiler, runs on any Linux machine and describes any slice
by name; what it compiles for one cannot be run here, but is what a pod would
run. A slice is named by its shape in chips, `v5e:16x16`, or as Google Cloud
sells it: `v5e-256` and `v6e-256` are 256 chips, `v4-32` and `v5p-32` are 32
cores, which is 16 chips.
"""

import dataclasses
import fnmatch
import importlib.metadata
import math
import os
import re

import jax
from jax.experimental import topologies

from dpo_jax import names


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU chip.

  Peaks, memory and links: https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e
  (read in 2026). `usable` is what the compiler says that a program may have.

  flops: bfloat16, a second. usable: bytes of memory. bandwidth: bytes a
  second between memory and core. links: bytes a second that a chip sends to
  its neighbours, all links busy: an upper bound, since a collective along one
  axis of the torus uses the links of that axis. clock: cycles a second at
  which the matrix units reach `flops`. side: of a matrix unit.
  """

  flops: float
  usable: float
  bandwidth: float
  links: float
  clock: float
  side: int
  dimensions: int  # of the torus
  chip_config: str
  cores: int  # that the name of a slice counts for a chip
  device_kind: str  # what JAX calls it


_GIB = 2**30

CHIPS = {
  'v4': Chip(
    flops=275e12,
    usable=30.75 * _GIB,
    bandwidth=1228e9,
    links=6 * 45e9,
    clock=1.05e9,
    side=128,
    dimensions=3,
    chip_config='megacore',  # both cores are one device
    cores=2,
    device_kind='TPU v4',
  ),
  'v5e': Chip(
    flops=197e12,
    usable=15.75 * _GIB,
    bandwidth=819e9,
    links=4 * 45e9,
    clock=1.5e9,
    side=128,
    dimensions=2,
    chip_config='default',
    cores=1,
    device_kind='TPU v5 lite',
  ),
  'v5p': Chip(
    flops=459e12,
    usable=95.74 * _GIB,
    bandwidth=2765e9,
    links=6 * 90e9,
    clock=1.75e9,
    side=128,
    dimensions=3,
    chip_config='megacore',
    cores=2,
    device_kind='TPU v5',
  ),
  'v6e': Chip(
    flops=918e12,
    usable=31.25 * _GIB,
    bandwidth=1640e9,
    links=4 * 90e9,
    clock=1.75e9,
    side=256,
    dimensions=2,
    chip_config='default',
    cores=1,
    device_kind='TPU v6 lite',
  ),
}


def memory(devices):
  """Returns the bytes that programs may have of each device, or None.

  None: it is not known, as of a CPU. Devices are of one kind; of a kind that is
  not in `CHIPS` one of this process is asked.
  """
  kinds = {chip.device_kind: chip.usable for chip in CHIPS.values()}
  if devices[0].device_kind in kinds:
    return kinds[devices[0].device_kind]
  own = [d for d in devices if d.process_index == jax.process_index()]
  found = own[0].memory_stats() if own else None
  return (found or {}).get('bytes_limit')


# Chips -> shape, as Google Cloud sells slices; larger ones by their shape.
_FLAT = {
  1: (1, 1),
  4: (2, 2),
  8: (2, 4),
  16: (4, 4),
  32: (4, 8),
  64: (8, 8),
  128: (8, 16),
  256: (16, 16),
}
_SOLID = {
  4: (2, 2, 1),
  8: (2, 2, 2),
  16: (2, 2, 4),
  32: (2, 4, 4),
  64: (4, 4, 4),
  128: (4, 4, 8),
  256: (4, 8, 8),
  512: (8, 8, 8),
}
_LARGEST = {2: 16, 3: 28}  # side of a torus


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice: chips of a kind in a shape."""

  kind: str
  shape: tuple

  @property
  def chip(self):
    return CHIPS[self.kind]

  @property
  def chips(self):
    return math.prod(self.shape)

  @property
  def cloud_name(self):
    return f'{self.kind}-{self.chips * self.chip.cores}'

  def __str__(self):
    return f'{self.kind}:{"x".join(map(str, self.shape))}'


def find(name):
  """Reads a name of a slice; what it is not is said in one line."""
  kind, mark, rest = re.match(r'([^:-]*)([:-]?)(.*)', name).groups()
  names.look_up(CHIPS, 'kind of TPU', kind)
  chip = CHIPS[kind]
  sold = _FLAT if chip.dimensions == 2 else _SOLID
  if mark == '-' and rest.isdigit():
    shape = sold.get(int(rest) // chip.cores)
    if shape and int(rest) % chip.cores == 0:
      return Topology(kind, shape)
    known = ', '.join(f'{kind}-{n * chip.cores}' for n in sold)
    raise ValueError(
      f'no topology {name!r} is known by that name; there are {known}; others'
      f' by their shape, such as {Topology(kind, sold[16])}'
    )
  if mark == ':' and re.fullmatch(r'\d+(x\d+)*', rest):
    shape = tuple(map(int, rest.split('x')))
    largest = _LARGEST[chip.dimensions]
    if len(shape) == chip.dimensions and all(1 <= n <= largest for n in shape):
      return Topology(kind, shape)
  raise ValueError(
    f'no topology {name!r}: a {kind} has {chip.dimensions} dimensions, such as'
    f' {Topology(kind, sold[16])}, each at most {_LARGEST[chip.dimensions]}'
  )


def check_libtpu():
  """Refuses to go on without the compiler that this JAX was made for."""
  version = importlib.metadata.version('jax')
  fix = f"pip install 'jax[tpu]=={version}'"
  wanted = [
    match.group(1)
    for line in importlib.metadata.requires('jax') or ()
    if (match := re.match(r'libtpu\s*==\s*([\d.*]+)', line))
  ]
  if not wanted:
    raise ValueError(
      f'JAX {version}, as installed, does not say which libtpu it was made for;'
      ' install a release of it, with its compiler: '
      "pip install --force-reinstall 'jax[tpu]'"
    )
  wanted = wanted[0]
  try:
    found = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise ValueError(
      f'compiling for a TPU needs its compiler, libtpu {wanted}; {fix}'
    ) from None
  if not fnmatch.fnmatch(found, wanted):
    raise ValueError(
      f'libtpu {found} is installed, but this JAX was made for {wanted}; {fix}'
    )


# What the compiler asks a TPU's host for; any answer serves every topology.
_ENVIRONMENT = {
  # Without it a second process finds the lock of the first.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_ID': '0',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
}


def devices(topology):
  """Returns the devices of a slice, one a chip, to compile for."""
  check_libtpu()
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  chip, shape = topology.chip, topology.shape
  if chip.dimensions == 3:  # cubes of 4 x 4 x 4 are wired to rings
    wrap = (all(n % 4 == 0 for n in shape),) * 3
  else:
    wrap = (*(n == _LARGEST[2] for n in shape), False)
  host = tuple(math.gcd(n, 2) for n in (*shape, 1)[:3])
  try:
    found = topologies.get_topology_desc(
      platform='tpu',
      topology_name=str(topology),
      chip_config_name=chip.chip_config,
      chips_per_host_bounds=host,
      wrap=wrap,
      num_slices=1,
    ).devices
  except Exception as error:  # of libtpu, in its own words and types
    line = str(error).splitlines()[0]
    raise ValueError(f'libtpu knows no topology {topology}: {line}') from error
  if len(found) != topology.chips:
    raise ValueError(
      f'libtpu describes {topology} as {len(found)} devices, not'
      f' {topology.chips}'
    )
  return found
