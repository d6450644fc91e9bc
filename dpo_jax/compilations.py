"""Ahead-of-time proof: the programs of a config, compiled for a TPU slice.

What is compiled is what `train` or `ppo` would run (`programs`): no weights and
no data are read. Beside a program lies what the loop keeps on the devices
meanwhile, such as the optimizer while samples are drawn; it counts too.
"""

import dataclasses
import resource

import numpy as np

from dpo_jax import attention_tpu
from dpo_jax import compile_check
from dpo_jax import hlo_counts
from dpo_jax import programs
from dpo_jax import sharding
from dpo_jax import topologies
from dpo_jax.data import batches

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Proven:
  """What is known of a program on a slice.

  what, groups, times, useful: of `programs.Program`. place: {kind: bytes per
  chip}, of what it takes and of what lies beside it. needed: bytes per chip,
  all told. account: `hlo_counts.Account` of a chip. kernel_flops: of a chip.
  estimate: `compile_check.Estimate`. seconds: of compiling.
  """

  name: str
  what: str
  groups: int
  times: int
  useful: float
  topology: topologies.Topology
  place: dict
  needed: int
  account: hlo_counts.Account
  kernel_flops: float
  estimate: compile_check.Estimate
  seconds: float

  @property
  def usable(self):
    return self.topology.chip.usable

  @property
  def flops(self):
    return self.account.flops + self.kernel_flops

  def mfu(self, seconds):
    """Share of the slice's peak that useful FLOPs take of so many seconds."""
    return (
      self.useful / self.topology.chips / self.topology.chip.flops / seconds
    )

  def lines(self, *, once, noun):
    """Returns its account; `once` is what a run is called, `noun` a group."""
    estimate, rest = self.estimate, self.needed - sum(self.place.values())
    return [
      f'memory of a chip      {self.needed / _GIB:8.2f} GiB of'
      f' {self.usable / _GIB:.2f}',
      *(
        f'  {name:<20}{size / _GIB:8.2f}'
        for name, size in [*self.place.items(), ('all else', rest)]
        if size
      ),
      f'FLOPs of a chip       {_tera(self.flops)}, of them'
      f' {_tera(self.kernel_flops)} in attention kernels',
      f'  useful              {_tera(self.useful / self.topology.chips)}',
      'collectives of a chip',
      *(
        f'  {name:<20}{t.count:8,.0f} times, {t.payload / 1e9:.2f} GB'
        for name, t in sorted(self.account.collectives.items())
      ),
      *(
        f'not known: how often a loop of {source} turns; it counts once, and'
        ' FLOPs, collectives and seconds are too low'
        for source in sorted(self.account.unknown)
      ),
      'seconds',
      f'  matrix unit         {estimate.matrix:8.3f}  at its peak',
      f'  memory              {estimate.memory:8.3f}  at its peak, estimated',
      f'  links               {estimate.links:8.3f}  at their peak',
      f"  compiler's cycles   {estimate.compiler:8.3f}  with attention kernels"
      ' as fast as the matrix unit',
      f'    products          {estimate.products:8.3f}  of them, of matrices'
      ' outside kernels',
      f'  {once:<20}{estimate.at_best:8.3f}  to'
      f' {estimate.at_worst:.3f}: collectives behind the rest, or after it',
      f'{noun + " a second":<22}{self.groups / estimate.at_best:8.1f}  to'
      f' {self.groups / estimate.at_worst:.1f}',
      f'useful share of peak  {self.mfu(estimate.at_best):8.3f}  to'
      f' {self.mfu(estimate.at_worst):.3f}',
    ]


@dataclasses.dataclass(frozen=True)
class Proof:
  """What is known of a loop on a slice.

  noun, groups, shape, lengths: of `programs.Loop`. programs: its Provens.
  memory: most bytes of memory of this process so far.
  """

  topology: topologies.Topology
  mesh: dict
  noun: str
  groups: int
  shape: batches.Shape
  lengths: tuple
  programs: tuple
  memory: int

  @property
  def needed(self):
    """Bytes per chip of the program that needs most."""
    return max(program.needed for program in self.programs)

  @property
  def seconds(self):
    """Seconds of a step of the loop: (at best, at worst)."""
    runs = [(p.times, p.estimate) for p in self.programs]
    return (
      sum(times * estimate.at_best for times, estimate in runs),
      sum(times * estimate.at_worst for times, estimate in runs),
    )

  def __str__(self):
    chip, compiled = self.topology.chip, sum(p.seconds for p in self.programs)
    lines = [
      f'{self.topology} ({self.topology.cloud_name}, {self.topology.chips}'
      f' chips), mesh {_mesh(self.mesh)}'
    ]
    if len(self.programs) == 1:
      (step,) = self.programs
      lines += [step.what, '', *step.lines(once='a step', noun=self.noun)]
    else:
      for program in self.programs:
        lines += [f'{program.name}: {program.what}', '']
        lines += [*program.lines(once='a run', noun=self.noun), '']
      lines += self._sum()
    lines += [
      f'compiled in {compiled:.0f} s, {self.memory / _GIB:.1f} GiB of this'
      f" machine's memory; clock {chip.clock / 1e9:.2f} GHz, peak"
      f' {_tera(chip.flops)}/s'
    ]
    return '\n'.join(lines)

  def _sum(self):
    best, worst = self.seconds
    return [
      f'a step of {self.groups:,} {self.noun}',
      f'  memory of a chip    {self.needed / _GIB:8.2f} GiB at most',
      *(
        f'  {p.name:<20}{p.times * p.estimate.at_best:8.3f}  to'
        f' {p.times * p.estimate.at_worst:.3f} s of {p.times:,} runs'
        for p in self.programs
      ),
      f'  seconds             {best:8.3f}  to {worst:.3f}, without rewards',
      f'{self.noun + " a second":<22}{self.groups / best:8.1f}  to'
      f' {self.groups / worst:.1f}',
    ]


def prove(config, topology, *, lengths=()):
  """Compiles the programs of a config for a slice; returns the Proof.

  Args:
    config: `settings.Settings` of training, offline or PPO.
    topology: name of a slice, see `topologies.find`.
    lengths: see `programs.of_config`.
  """
  slice_ = topologies.find(topology)
  mesh = sharding.make_mesh(**config.mesh, devices=topologies.devices(slice_))
  loop = programs.of_config(config, mesh, lengths=lengths)
  proven = tuple(
    _prove(program, loop.model, config, slice_, mesh)
    for program in loop.programs
  )
  return Proof(
    topology=slice_,
    mesh=dict(mesh.shape),
    noun=loop.noun,
    groups=loop.groups,
    shape=loop.shape,
    lengths=loop.lengths,
    programs=proven,
    memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  )


def _prove(program, model, config, slice_, mesh):
  """Compiles a program; returns its Proven."""
  given, beside = (
    {name: sharding.bytes_per_device(tree) for name, tree in trees.items()}
    for trees in (program.given, program.beside)
  )
  place, more = given | beside, sum(beside.values())
  try:
    compiled = compile_check.compile_for_tpu(program.lower(), slice_.chip)
    needed = compiled.needed + more
  except compile_check.DoesNotFitError as error:
    needed = error.needed and error.needed + more
    raise _does_not_fit(config, slice_, program, place, needed) from error
  if needed > slice_.chip.usable:  # not by itself, but beside the rest
    raise _does_not_fit(config, slice_, program, place, needed)

  # -------------------------------------------------------------- account ----
  account = compile_check.counted(compiled, turns=program.turns)
  kernel_flops = attention_flops(
    account, program.batch, model, mesh, accumulate=program.accumulate
  )
  return Proven(
    name=program.name,
    what=program.what,
    groups=program.groups,
    times=program.times,
    useful=program.useful,
    topology=slice_,
    place=place,
    needed=needed,
    account=account,
    kernel_flops=kernel_flops,
    estimate=compile_check.estimate(
      account,
      slice_.chip,
      kernel_flops=kernel_flops,
      kernel_depth=model.head_dim,
    ),
    seconds=compiled.seconds,
  )


def attention_flops(account, batch, model_config, mesh, *, accumulate):
  """FLOPs of a chip in attention's kernels: blocks that they meet.

  The compiler cannot see into kernels; which blocks meet is a function of the
  batch.
  """
  query, key = attention_tpu.meetings(
    batch['lo'],
    batch['hi'],
    group=model_config.num_heads // model_config.num_kv_heads,
  )
  block_flops = 2 * np.prod(
    [
      *attention_tpu.block_sizes(
        model_config.num_heads // model_config.num_kv_heads
      ),
      model_config.head_dim,
      model_config.num_heads,
    ]
  )
  flops = 0.0
  for name, calls in account.kernels.items():
    products, by_key = attention_tpu.PRODUCTS[name]
    blocks = (key if by_key else query) / sharding.row_shards(mesh) / accumulate
    flops += calls * blocks * products * block_flops / mesh.shape['tensor']
  return flops


# --- What to do where it does not fit -----------------------------------------


def _does_not_fit(config, slice_, program, place, needed):
  return compile_check.DoesNotFitError(
    needed,
    slice_.chip.usable,
    not_fitting(config, slice_, program, place, needed),
  )


def not_fitting(config, slice_, program, place, needed):
  """Says by how much a program does not fit, and which keys help.

  `needed` is of a chip, in bytes, or None where the compiler did not say it.
  """
  usable = slice_.chip.usable
  amount = f'{needed / _GIB:.2f} GiB' if needed else 'more'
  text = (
    f'on {slice_} the {program.name} needs {amount} of a chip that has'
    f' {usable / _GIB:.2f}'
  )
  if needed:
    text += f': {(needed - usable) / _GIB:.2f} GiB too much'
  kinds = ', '.join(
    f'{name} {size / _GIB:.2f}' for name, size in place.items() if size
  )
  what = 'arguments and what lies beside' if program.beside else 'arguments'
  help_ = '; '.join(knobs(config, program))
  return f'{text}; of {what}, in GiB, {kinds}. {help_}'


def knobs(config, program):
  """Returns what saves memory and is not turned yet, what costs least first."""
  out = []
  learns = program.name in ('step', 'update')
  if config.mesh.data != 1:
    out.append('share parameters among all chips (mesh.data=1 mesh.fsdp=-1)')
  if learns and config.model.remat == 'none':
    out.append('recompute what is cheap (model.remat=dots)')
  if learns and config.model.remat != 'full':
    out.append('recompute layers (model.remat=full)')
  if learns:
    out.append(
      'compute a step in more micro-batches'
      f' (accumulate={2 * config.accumulate}) or take a smaller batch_size'
    )
  elif program.name == 'sampling':
    out.append(
      f'sample fewer at once (rollout.batch_size={program.groups // 2})'
    )
  else:
    out.append('take a smaller batch_size')
  if 'ppo' not in config and config.reference.mode in ('frozen', 'ema'):
    out.append('compute the reference once (reference=cached)')
  if program.name != 'sampling' and config.logps_chunk > 256:
    out.append(
      f'fewer logits at a time (logps_chunk={config.logps_chunk // 2})'
    )
  if config.adapter.kind == 'none':
    out.append('train an adapter (adapter=lora)')
  out.append('take a larger slice')
  return ['try, in this order: ' + out[0], *out[1:]]


def _mesh(shape):
  return ' x '.join(f'{name} {size}' for name, size in shape.items())


def _tera(flops):
  return f'{flops / 1e12:8.2f} TFLOP'
