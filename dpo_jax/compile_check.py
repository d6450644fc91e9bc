"""Compiling a program for a TPU slice that is not there, and what it will cost.

Memory, FLOPs and collectives are those of the program that the TPU's own
compiler made. Seconds are arithmetic on top: nothing has run.
"""

import dataclasses
import math
import pathlib
import re
import tempfile
import time

import jax

from dpo_jax import hlo
from dpo_jax import hlo_counts

_GIB = 2**30


class DoesNotFitError(ValueError):
  """The program needs more memory than a chip has.

  needed, usable: bytes, as the compiler says; needed may be None.
  """

  def __init__(self, needed, usable, text):
    super().__init__(text)
    self.needed, self.usable = needed, usable


@dataclasses.dataclass(frozen=True)
class Compiled:
  """text: of the program. needed: bytes of a chip's memory. seconds: taken."""

  text: str
  needed: int
  seconds: float


def compile_for_tpu(lowered, chip):
  """Compiles for the devices that `lowered` was lowered for, as Compiled.

  Raises `DoesNotFitError` where the compiler runs out of memory. What is needed
  is read from the compiler's memory report: the sum of arguments and
  temporaries that JAX has (`memory_analysis`) overstates it.
  """
  start = time.perf_counter()
  with tempfile.TemporaryDirectory(prefix='dpo_jax_compile_') as folder:
    try:
      compiled = lowered.compile(compiler_options={'xla_dump_to': folder})
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      needed = _needed(str(error)) or _reported(folder)
      said = f'{needed / _GIB:.2f} GiB' if needed else 'more'
      raise DoesNotFitError(
        needed,
        chip.usable,
        f'the step needs {said} of a chip that has {chip.usable / _GIB:.2f}',
      ) from error
    seconds = time.perf_counter() - start
    needed = _reported(folder)
  if needed is None:
    raise ValueError(
      'the compiler wrote no report of the memory that it needs, or one of a'
      ' form that is not known here; use the libtpu that your JAX asks for'
      " (pip install 'jax[tpu]') and a JAX that this package was tested with"
    )
  return Compiled(compiled.as_text(), needed, seconds)


def _needed(error):
  """Bytes that the compiler's message asks for, or None."""
  for pattern in (
    r'Used ([\d.]+)([KMGT]) of',
    r'required for HLO temporaries \(([\d.]+)([KMGT])\)',
    r'required[^(]*\(([\d.]+)([KMGT])\)',
  ):
    found = re.search(pattern, error)
    if found:
      return float(found.group(1)) * 1024 ** ('KMGT'.index(found.group(2)) + 1)
  return None


def _reported(folder):
  """Bytes of a chip's memory by the compiler's report in its dump, or None."""
  for path in pathlib.Path(folder).rglob('*memory-usage-report.txt'):
    found = re.search(
      r'color=0\)\s*Total bytes: (\d+)', path.read_text(encoding='utf-8')
    )
    if found:
      return int(found.group(1))
  return None


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a run of the program on a chip, and its share of the peak.

  matrix, memory, links: what each alone would take at its peak (a roofline).
  compiler: its own estimate of cycles, and the kernels, which it cannot see, as
  if they filled their matrix unit. products: what of that goes to products of
  matrices outside kernels, and to what is fused with them. at_best: collectives
  behind the computation; at_worst: one after the other.
  """

  matrix: float
  memory: float
  links: float
  compiler: float
  products: float

  @property
  def roofline(self):
    return max(self.matrix, self.memory, self.links)

  @property
  def at_best(self):
    return max(self.compiler, self.memory, self.links)

  @property
  def at_worst(self):
    return max(self.compiler, self.memory) + self.links


def estimate(account, chip, *, kernel_flops, kernel_depth):
  """Returns the Estimate of an `hlo_counts.Account`.

  Args:
    account: of one run on one device.
    chip: `topologies.Chip`.
    kernel_flops: of all kernels in the run, which `account` has none for.
    kernel_depth: the dimension that their products are summed over or give;
      less than a matrix unit's side leaves a part of it idle.
  """
  filled = math.ceil(kernel_depth / chip.side) * chip.side / kernel_depth
  return Estimate(
    matrix=(account.flops + kernel_flops) / chip.flops,
    memory=account.memory_bytes / chip.bandwidth,
    links=sum(t.linked for t in account.collectives.values()) / chip.links,
    compiler=account.cycles / chip.clock + kernel_flops * filled / chip.flops,
    products=account.product_cycles / chip.clock,
  )


def counted(compiled, *, turns):
  """Returns the `hlo_counts.Account` of a Compiled; see `hlo_counts.count`."""
  return hlo_counts.count(hlo.parse(compiled.text), turns=turns)
