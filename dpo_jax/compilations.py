"""Ahead-of-time proof: a config's training step, compiled for a TPU slice.

What is compiled is the step that `train` runs, made by the same functions from
shapes instead of arrays: no weights and no data are read. The batch is one of
`batch_size` groups of given lengths, by default the longest that the config
allows, packed into rows as a run packs them.
"""

import dataclasses
import resource

import jax
import numpy as np

from dpo_jax import accounting
from dpo_jax import attention_tpu
from dpo_jax import compile_check
from dpo_jax import hlo_counts
from dpo_jax import logps
from dpo_jax import objectives
from dpo_jax import policies
from dpo_jax import runs
from dpo_jax import sharding
from dpo_jax import topologies
from dpo_jax import train
from dpo_jax import updates
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.data import partners
from dpo_jax.losses import table

_GIB = 2**30
_RANKED = 4  # responses of a ranking, where no lengths are given


@dataclasses.dataclass(frozen=True)
class Proof:
  """What is known of the step on a slice.

  place: {kind: bytes per chip}, of arguments. needed, usable: bytes per chip.
  account: `hlo_counts.Account` of a chip. kernel_flops: of a chip. estimate:
  `compile_check.Estimate`. useful: FLOPs of the step, of all chips, as
  `accounting` counts them. pairs: groups of the step. seconds: of compiling.
  memory: most bytes of memory of this process so far.
  """

  topology: topologies.Topology
  mesh: dict
  shape: batches.Shape
  lengths: tuple
  pairs: int
  place: dict
  needed: int
  account: hlo_counts.Account
  kernel_flops: float
  estimate: compile_check.Estimate
  useful: float
  seconds: float
  memory: int

  @property
  def usable(self):
    return self.topology.chip.usable

  def mfu(self, seconds):
    """Share of the slice's peak that useful FLOPs take of so many seconds."""
    return (
      self.useful / self.topology.chips / self.topology.chip.flops / seconds
    )

  def __str__(self):
    chip, estimate = self.topology.chip, self.estimate
    of = ', '.join(f'{n:,}' for n in self.lengths[1:])
    rest = self.needed - sum(self.place.values())
    lines = [
      f'{self.topology} ({self.topology.cloud_name}, {self.topology.chips}'
      f' chips), mesh {_mesh(self.mesh)}',
      f'{self.pairs:,} groups of {self.lengths[0]:,} prompt and {of} response'
      f' tokens in {self.shape.rows:,} rows of {self.shape.length:,} slots,'
      f' {self.shape.scored:,} of them scored',
      '',
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
      'seconds',
      f'  matrix unit         {estimate.matrix:8.3f}  at its peak',
      f'  memory              {estimate.memory:8.3f}  at its peak, estimated',
      f'  links               {estimate.links:8.3f}  at their peak',
      f"  compiler's cycles   {estimate.compiler:8.3f}  with attention kernels"
      ' as fast as the matrix unit',
      f'  a step              {estimate.at_best:8.3f}  to'
      f' {estimate.at_worst:.3f}: collectives behind the rest, or after it',
      f'groups a second       {self.pairs / estimate.at_best:8.1f}  to'
      f' {self.pairs / estimate.at_worst:.1f}',
      f'useful share of peak  {self.mfu(estimate.at_best):8.3f}  to'
      f' {self.mfu(estimate.at_worst):.3f}',
      f'compiled in {self.seconds:.0f} s, {self.memory / _GIB:.1f} GiB of this'
      f" machine's memory; clock {chip.clock / 1e9:.2f} GHz, peak"
      f' {_tera(chip.flops)}/s',
    ]
    return '\n'.join(lines)

  @property
  def flops(self):
    return self.account.flops + self.kernel_flops


def prove(config, topology, *, lengths=()):
  """Compiles the step of a config for a slice; returns the Proof.

  Args:
    config: `settings.Settings` of training.
    topology: name of a slice, see `topologies.find`.
    lengths: tokens of a prompt and of its responses, of every group; one number
      for all responses will do; () are the longest that the config allows.
  """
  slice_ = topologies.find(topology)
  mesh = sharding.make_mesh(**config.mesh, devices=topologies.devices(slice_))
  train.check_accumulate(config, mesh)

  # ------------------------------------------------------ model and batch ----
  terms = runs.bind_losses(config)
  policy = policies.abstract_policy(config, mesh, head=runs.head_scale(config))
  reference = abstract_reference(config, policy)
  lengths = group_lengths(config, lengths)
  plan = batches.plan_steps(
    make_groups(config, lengths, terms),
    [list(range(config.batch_size))],
    row_length=config.data.row_length,
    multiple=sharding.row_shards(mesh) * config.accumulate,
    window=policy.config.window,
  )
  batch, shape = plan.batch(0), plan.shape_of(0)
  if config.reference.mode == 'cached':
    batch['ref_token_logps'] = np.zeros(batch['target'].shape, np.float32)

  # ----------------------------------------------------------------- step ----
  first_memory = jax.eval_shape(lambda: objectives.first_memory(terms))
  chunk = runs.head_chunk(config)
  sums = objectives.make_sums(
    policy.config,
    terms,
    chunk=chunk,
    reference=config.reference.mode,
    responses=plan.responses,
    form=config.data.form,
    rewards=False,
  )
  update = updates.make(
    config, policy, sums, first_memory, mesh, num_steps=config.num_steps or 1000
  )
  frozen = {'base': policy.base, 'ref': reference}
  where = sharding.of_rows(mesh)
  inputs = sharding.abstract(batch, jax.tree.map(lambda _: where, batch))
  place = {
    'trained': update.shapes.params,
    'optimizer': update.shapes.opt_state,
    'reference': (reference, update.shapes.ref),
    'base': policy.base,
    'batch': inputs,
  }
  place = {name: sharding.bytes_per_device(x) for name, x in place.items()}
  with sharding.use(mesh):
    lowered = update.step.lower(update.shapes, frozen, inputs)
  try:
    compiled = compile_check.compile_for_tpu(lowered, slice_.chip)
  except compile_check.DoesNotFitError as error:
    raise compile_check.DoesNotFitError(
      error.needed, error.usable, not_fitting(config, slice_, place, error)
    ) from error

  # -------------------------------------------------------------- account ----
  shards = sharding.row_shards(mesh)
  account = compile_check.counted(
    compiled,
    data_turns=head_turns(batch, shards * config.accumulate, chunk),
  )
  kernel_flops = attention_flops(
    account, batch, policy.config, mesh, accumulate=config.accumulate
  )
  adapter = None
  if policy.base is not None:
    adapter = sum(x.size for x in jax.tree.leaves(policy.trained))
  work = accounting.work_of(plan.groups, window=policy.config.window)
  return Proof(
    topology=slice_,
    mesh=dict(mesh.shape),
    shape=shape,
    lengths=lengths,
    pairs=config.batch_size,
    place=place,
    needed=compiled.needed,
    account=account,
    kernel_flops=kernel_flops,
    estimate=compile_check.estimate(
      account,
      slice_.chip,
      kernel_flops=kernel_flops,
      kernel_depth=policy.config.head_dim,
    ),
    useful=accounting.step_flops(
      policy.config,
      accounting.summed(work, plan.steps[0]),
      live=config.reference.mode not in ('cached', 'none'),
      adapter=adapter,
      outputs=1 if table.of_head(config.loss) else None,
    ),
    seconds=compiled.seconds,
    memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
  )


def abstract_reference(config, policy):
  """Returns the shapes of `runs.Run.ref`, where the step is given it.

  A new adapter changes nothing, and its reference is the model without it; one
  that `config.init` brings does.
  """
  if config.reference.mode != 'frozen':
    return None
  if policy.base is not None and not config.init:
    return None
  return sharding.abstract(
    jax.eval_shape(lambda x: runs.frozen_copy(x, policy), policy.trained),
    jax.tree.map(lambda x: x.sharding, policy.trained),
  )


def group_lengths(config, lengths):
  """Returns tokens of a prompt and of each of its responses."""
  form, data = config.data.form, config.data
  number = {'pairs': 2, 'rankings': max(_RANKED, len(lengths) - 1)}.get(form, 1)
  if not lengths:
    lengths = (data.max_prompt_tokens, data.max_response_tokens)
  if len(lengths) == 2:
    lengths = (lengths[0], *[lengths[1]] * number)
  if len(lengths) != 1 + number or min(lengths) < 1:
    raise ValueError(
      f'lengths {",".join(map(str, lengths))}: a group of {form} has a prompt'
      f' and {number} responses, of 1 token or more'
    )
  return tuple(lengths)


def make_groups(config, lengths, terms):
  """Returns `batch_size` groups of so many tokens."""
  prompt, *responses = (np.zeros(n, np.int32) for n in lengths)
  groups = [
    examples.Group(prompt, tuple(responses), 1.0, 1.0, str(n))
    for n in range(config.batch_size)
  ]
  if any(term.loss.mismatched for term in terms):
    groups = partners.mismatched(groups)
  return groups


def head_turns(batch, parts, chunk):
  """Turns of the loop over chunks of scored tokens, see `logps`.

  `parts` are devices that share the rows, times micro-batches.
  """
  scored_RS = batch['slot'] >= 0
  of_parts = scored_RS.reshape(parts, -1)
  size = logps.chunk_size(of_parts.shape[1], chunk)
  return -(-int(of_parts.sum(1).max()) // size)


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


def not_fitting(config, slice_, place, error):
  """Says by how much a step does not fit, and which keys help."""
  kinds = ', '.join(
    f'{name} {size / _GIB:.2f}' for name, size in place.items() if size
  )
  text = f'on {slice_} {error}'
  if error.needed:
    text += f': {(error.needed - error.usable) / _GIB:.2f} GiB too much'
  return f'{text}; of arguments, in GiB, {kinds}. {"; ".join(knobs(config))}'


def knobs(config):
  """Returns what saves memory and is not turned yet, what costs least first."""
  out = []
  if config.mesh.data != 1:
    out.append('share parameters among all chips (mesh.data=1 mesh.fsdp=-1)')
  if config.model.remat == 'none':
    out.append('recompute what is cheap (model.remat=dots)')
  if config.model.remat != 'full':
    out.append('recompute layers (model.remat=full)')
  out.append(
    f'compute a step in more micro-batches (accumulate={2 * config.accumulate})'
    ' or take a smaller batch_size'
  )
  if config.reference.mode in ('frozen', 'ema'):
    out.append('compute the reference once (reference=cached)')
  if config.logps_chunk > 256:
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
