"""The offline loop: SFT and preference training over prefix-shared rows.

Read `train` from top to bottom. Data order is a function of (seed, step) and
the state holds everything else, so a killed run resumes to the same bits.
"""

import functools
import math
import os
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from dpo_jax import accounting
from dpo_jax import checkpoint
from dpo_jax import evaluators
from dpo_jax import metrics
from dpo_jax import optim
from dpo_jax import ref_cache
from dpo_jax import runs
from dpo_jax import sharding
from dpo_jax import workdirs
from dpo_jax.data import batches
from dpo_jax.models import lora


@flax.struct.dataclass
class State:
  """What a step changes and a checkpoint holds.

  params: all that is trained: the parameters, or an adapter on frozen ones.
  """

  params: Any
  opt_state: Any
  step: jax.Array
  ref: Any  # the reference, where it moves (TR-DPO), else None
  memory: dict  # of losses that outlive a batch, see `objectives`


def make_step(
  sums, tx, schedule, *, batch_size, accumulate=1, scale=1.0, ema=None
):
  """Returns (state, frozen, batch) -> (state, {name: (sum, count)}).

  `frozen` is {'base': parameters under an adapter or None, 'ref': what
  `state.params` is for the reference, or None where the reference is the base
  or there is none}; neither gets gradients. The loss is the mean over the
  `batch_size` groups of the global batch, wherever they lie. Donate `state`
  when jitting.

  Args:
    sums: of `objectives.make_sums`.
    tx: the optimizer.
    schedule: step -> learning rate, for the log.
    batch_size: groups.
    accumulate: micro-batches, of equal row counts, whose sums and gradients are
      added up in float32; see `check_accumulate`.
    scale: of the adapter, see `lora.variables`.
    ema: {'alpha', 'every'} where the reference is part of the state: after each
      `every` updates it becomes alpha policy + (1 - alpha) reference; alpha 1
      is a hard update. TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656.
  """

  def step(state, frozen, batch):
    base = frozen['base']
    ref = frozen['ref'] if state.ref is None else state.ref
    ref_variables = lora.variables(base, ref, scale)

    def loss_function(params, batch):
      variables = lora.variables(base, params, scale)
      totals, memory = sums(variables, ref_variables, batch, state.memory)
      return totals['loss'][0] / batch_size, (totals, memory)

    gradient = jax.grad(loss_function, has_aux=True)
    if accumulate == 1:
      grads, (totals, memory) = gradient(state.params, batch)
    else:
      memory = state.memory  # empty
      grads, (totals, _) = summed(
        functools.partial(gradient, state.params),
        micro_batches(batch, accumulate),
      )
    loss = totals['loss'][0] / batch_size
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    values = {
      'loss': loss,
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': schedule(state.step),
      'param_norm': optax.tree.norm(params),
    }
    number = state.step + 1
    if ema:
      ref = jax.lax.cond(
        number % ema['every'] == 0,
        lambda: moved(ref, params, ema['alpha']),
        lambda: ref,
      )
      values['reference_distance'] = optax.tree.norm(
        optax.tree.sub(params, ref)
      )
    else:
      ref = None
    measured = totals | {name: (value, 1) for name, value in values.items()}
    return State(params, opt_state, number, ref, memory), measured

  return step


def micro_batches(batch, number):
  """[R, ...] -> [number, R / number, ...]: every number-th row.

  So each of the devices that share the rows has its share of each.
  """
  return jax.tree.map(
    lambda x: jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1), batch
  )


def summed(function, parts):
  """Sums function(part) over the leading axis of `parts`, in float32."""

  def zeros(x):
    wide = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros(x.shape, jnp.float32 if wide else x.dtype)

  def add(total, part):
    return jax.tree.map(lambda t, x: t + x, total, function(part)), None

  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
  total, _ = jax.lax.scan(add, jax.tree.map(zeros, shapes), parts)
  return total


def check_accumulate(config, mesh):
  """Refuses micro-batches that would not add up to the batch."""
  if config.accumulate < 1:
    raise ValueError(f'accumulate is {config.accumulate}; use 1 or more')
  sharding.check_batch_size(
    'batch_size', config.batch_size, mesh, parts=config.accumulate
  )
  if config.accumulate == 1:
    return
  for term in runs.bind_losses(config):
    what, fix = f'loss {term.name!r}', 'model.remat=full saves memory too'
    if term.reduction == 'batch_mean':
      what, fix = f"{what} with reduction 'batch_mean'", "choose 'mean'"
    elif not (term.loss.batchwise or term.loss.mismatched or term.memory):
      continue
    raise ValueError(
      f'{what} is a function of the whole batch, which micro-batches do not'
      f' see; set accumulate to 1 ({fix})'
    )


def moved(ref, params, alpha):
  """alpha params + (1 - alpha) ref, in the parameters' own float32."""
  return jax.tree.map(lambda r, p: alpha * p + (1.0 - alpha) * r, ref, params)


def state_shapes(params, tx, *, ema, memory):
  """Returns the State as shapes with shardings; moments lie as params do."""
  replicated = sharding.replicated(jax.tree.leaves(params)[0].sharding.mesh)

  def shape(x, where):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  opt_state = jax.eval_shape(tx.init, params)
  params_shapes = jax.tree.map(lambda x: shape(x, x.sharding), params)
  return State(
    params=params_shapes,
    opt_state=optax.tree.map_params(
      tx,
      lambda moment, param: shape(moment, param.sharding),
      opt_state,
      params,
      transform_non_params=lambda x: shape(x, replicated),
    ),
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    ref=params_shapes if ema else None,
    memory=jax.tree.map(lambda x: shape(x, replicated), memory),
  )


def init_state(params, tx, *, ref=None, memory=None):
  """Returns the State before the first step; `ref` if the reference moves."""
  memory = memory or {}
  shapes = state_shapes(params, tx, ema=ref is not None, memory=memory)
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
  memory = jax.device_put(memory, shardings.memory)
  return State(params, opt_state, step, ref, memory)


def restored_state(shapes, workdir):
  """Returns the newest saved State of a run; `shapes` as of `state_shapes`."""
  step, items = workdirs.restore_newest(workdir, saved(shapes))
  step = jax.device_put(jnp.asarray(step, jnp.int32), shapes.step.sharding)
  return State(step=step, **({'ref': None, 'memory': {}} | items))


def saved(state):
  """The items of a checkpoint; its number is the step."""
  items = {'params': state.params, 'opt_state': state.opt_state}
  if state.ref is not None:
    items['ref'] = state.ref
  if state.memory:
    items['memory'] = state.memory
  return items


def training_plan(config, groups, mesh, *, window):
  """Plans `num_steps` steps, or as many as `epochs` passes need."""
  num_steps, epochs = config.num_steps, config.epochs
  if bool(num_steps) == bool(epochs) or min(num_steps, epochs) < 0:
    raise ValueError(
      'set one of num_steps and epochs and leave the other 0; got num_steps'
      f' {num_steps}, epochs {epochs}'
    )
  if epochs:
    num_steps = math.ceil(epochs * len(groups) / config.batch_size)
  return batches.training_plan(
    groups,
    seed=config.seed,
    num_steps=num_steps,
    batch_size=config.batch_size,
    row_length=config.data.row_length,
    multiple=sharding.row_shards(mesh) * config.accumulate,
    window=window,
  )


def check_finite(values, step, checkpoints):
  """Raises where a loss, a gradient or the updated parameters are not finite.

  Called on every step's metrics and on every evaluation before a checkpoint
  is written, so a checkpoint never holds what it finds.
  """
  for name, value in values.items():
    if name.split('/')[-1] in ('loss', 'grad_norm', 'param_norm'):
      if not np.isfinite(value):
        kept = checkpoints.latest()
        raise FloatingPointError(
          f'{name} is {value} at step {step}; the last good checkpoint is'
          f' {"none" if kept is None else f"that of step {kept}"}. Go on from'
          ' it in a new workdir, with config.resume set to this one and a'
          ' smaller optim.lr or a smaller optim.clip_norm'
        )


# What a run must share with the one whose state it goes on with.
RESUMED = ('init', 'model', 'adapter', 'reference', 'data', 'loss')


def train(config, workdir):
  """Trains as `config` says; returns the final parameters, or the adapter.

  Args:
    config: `settings.Settings`; every key is read or the run does not start.
    workdir: config.json, metrics.jsonl, samples.jsonl, tensorboard/ and
      checkpoints/ of this run; a run found there is resumed.
  """
  workdir = os.fspath(workdir)
  workdirs.check(workdir, config)
  mesh = sharding.make_mesh(**config.mesh)
  with sharding.use(mesh):
    return _train(config, workdir, mesh)


def _train(config, workdir, mesh):
  # ----------------------------------------- loss, model, data, reference ----
  check_accumulate(config, mesh)
  run = runs.set_up(config, mesh)
  policy, groups, ref_values = run.policy, run.groups, run.ref_values
  mode = config.reference.mode
  frozen = {'base': policy.base, 'ref': run.ref if mode == 'frozen' else None}
  ema = None
  if mode == 'ema':
    ema = {'alpha': config.reference.alpha, 'every': config.reference.every}

  # ------------------------------------------------- what each step sees ----
  plan = training_plan(
    config, groups['train'], mesh, window=policy.config.window
  )
  num_steps = plan.num_steps
  if ema and ema['every'] > num_steps:
    raise ValueError(
      f'reference.every is {ema["every"]}, but the run has {num_steps} steps:'
      ' the reference would never move; lower it, or choose reference=frozen'
    )
  tqdm.tqdm.write(f'train: {plan.summary()}')

  share_of_peak = make_share_of_peak(config, policy, plan.groups, mesh)

  # ----------------------------------------------------- optimizer, step ----
  schedule = optim.learning_rate(
    lr=config.optim.lr,
    schedule=config.optim.schedule,
    warmup_steps=config.optim.warmup_steps,
    warmup_init=config.optim.warmup_init,
    num_steps=num_steps,
  )
  tx = optim.make(
    config.optim.name,
    schedule,
    clip_norm=config.optim.clip_norm,
    keywords=dict(config.optim.keywords),
  )
  shapes = state_shapes(
    policy.trained, tx, ema=bool(ema), memory=run.first_memory
  )
  shardings = jax.tree.map(lambda x: x.sharding, shapes)
  step = jax.jit(
    make_step(
      run.sums,
      tx,
      schedule,
      batch_size=config.batch_size,
      accumulate=config.accumulate,
      scale=policy.scale,
      ema=ema,
    ),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )

  # ------------------------------------------------------------- restore ----
  # 1 this workdir, 2 config.resume, 3 config.init, 4 model.source; the last
  # two are in policy.trained already.
  intervals = {
    'log': config.log_every,
    'evaluate': config.eval.every,
    'save': config.checkpoint.every,
  }
  resume, keep = config.resume, config.checkpoint.keep
  if resume:
    workdirs.check_same(resume, config, RESUMED)
  config.check_all_read()
  checkpoint.check_keep(keep)
  workdirs.claim(workdir, config, ref_cache.data_digest(groups['train']))
  checkpoints = checkpoint.Checkpoints(
    os.path.join(workdir, 'checkpoints'), keep=keep
  )
  newest = checkpoints.latest()
  if newest is None and not resume:
    ref = jax.tree.map(jnp.copy, policy.trained) if ema else None
    state = init_state(policy.trained, tx, ref=ref, memory=run.first_memory)
    policy.trained = None  # donated with the state
  else:
    policy.trained = None  # makes room
    state = restored_state(shapes, resume if newest is None else workdir)
  first = int(state.step)
  writer = metrics.Writer(workdir, after=first if first else -1)

  # ---------------------------------------------------------------- loop ----
  def due(what, number):
    every = intervals[what]
    return number == num_steps or (every and number % every == 0)

  since = []  # steps done since the last record, and when the first began
  clock = None

  def finish(number, values):
    """Waits for a step, checks and logs its metrics."""
    nonlocal clock
    values = evaluators.means(jax.device_get(values))
    check_finite(values, number, checkpoints)
    since.append(number)
    if due('log', number):
      rates = speed(plan, since, time.perf_counter() - clock, share_of_peak)
      named = {f'train/{name}': x for name, x in (values | rates).items()}
      writer.write(number, named)
      since.clear()
      clock = time.perf_counter()

  def measure(number):
    values, samples = run.evaluate(state.params, state.ref, state.memory)
    check_finite(values, number, checkpoints)
    writer.write(number, values, samples)

  compiled = {}  # shape of a batch -> the step for it
  try:
    if not first:
      measure(0)
    pending = None  # the previous step's metrics, still on the device
    clock = time.perf_counter()
    for number in tqdm.trange(
      first + 1, num_steps + 1, initial=first, total=num_steps, desc='train'
    ):
      batch = evaluators.put_batch(
        plan, number - 1, mesh, ref_values=ref_values['train']
      )
      shape = plan.shape_of(number - 1)
      pause = time.perf_counter()
      if shape not in compiled:
        compiled[shape] = step.lower(state, frozen, batch).compile()
        pause = time.perf_counter() - pause
        tqdm.tqdm.write(
          f'compiled for {shape.rows} rows of {shape.length} slots in'
          f' {pause:.1f} s'
        )
        clock += pause
      state, values = compiled[shape](state, frozen, batch)
      if pending:
        finish(*pending)
      pending = number, values
      if due('evaluate', number) or due('save', number):
        finish(*pending)
        pending = None
        pause = time.perf_counter()
        if due('evaluate', number):
          measure(number)
        if due('save', number):
          checkpoints.save(number, saved(state))
        clock += time.perf_counter() - pause
  finally:  # whatever happens, saves under way are finished
    checkpoints.close()
    writer.close()
  return state.params


def speed(plan, numbers, seconds, flops_of):
  """Means over steps (1 is the first) of `seconds` together.

  `row_fill` is the share of slots that hold a token; `flops_of` (group
  numbers) -> the share of the peak that they take for a second.
  """
  steps = [number - 1 for number in numbers]
  groups = [group for step in steps for group in plan.steps[step]]
  tokens = sum(map(plan.tokens, steps))
  slots = sum(map(plan.slots_of, steps))
  return {
    'step_seconds': seconds / len(steps),
    'pairs_per_second': len(groups) / seconds,
    'tokens_per_second': tokens / seconds,
    'slot_tokens_per_second': slots / seconds,
    'row_fill': tokens / slots,
    'mfu': flops_of(groups) / seconds,
  }


def make_share_of_peak(config, policy, groups, mesh):
  """Returns group numbers -> their model FLOPs over those of a second.

  The second is one at `config.peak_tflops`, or what is measured now.
  """
  peak = 1e12 * config.peak_tflops
  if peak <= 0:
    peak = accounting.measured_peak(mesh, policy.config.dtype)
    tqdm.tqdm.write(
      f'peak: {peak / 1e12:.3g} TFLOP/s, measured in {policy.config.dtype};'
      ' set peak_tflops to count train/mfu against another'
    )
  work = accounting.work_of(groups, window=policy.config.window)
  adapter = None
  if policy.base is not None:
    adapter = sum(x.size for x in jax.tree.leaves(policy.trained))
  live = config.reference.mode not in ('cached', 'none')

  def share(numbers):
    flops = accounting.step_flops(
      policy.config,
      accounting.summed(work, numbers),
      live=live,
      adapter=adapter,
    )
    return flops / peak

  return share
