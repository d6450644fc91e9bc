"""The offline loop: SFT and preference training over prefix-shared rows.

Read `train` from top to bottom. Data order is a function of (seed, step) and
the state holds everything else, so a killed run resumes to the same bits.
"""

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

from dpo_jax import checkpoint
from dpo_jax import evaluators
from dpo_jax import metrics
from dpo_jax import optim
from dpo_jax import runs
from dpo_jax import sharding
from dpo_jax.data import batches
from dpo_jax.data import rows


@flax.struct.dataclass
class State:
  """What a step changes and a checkpoint holds."""

  params: Any
  opt_state: Any
  step: jax.Array


def make_step(sums, tx, schedule, *, batch_size):
  """Returns (state, ref_params, batch) -> (state, metrics).

  The loss is the mean over the `batch_size` groups of the global batch,
  wherever they lie. Donate `state` when jitting.
  """

  def step(state, ref_params, batch):
    def loss_function(params):
      totals = sums(params, ref_params, batch)
      return totals['loss'] / batch_size, totals

    (_, totals), grads = jax.value_and_grad(loss_function, has_aux=True)(
      state.params
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    values = evaluators.means(totals)
    values['grad_norm'] = optax.global_norm(grads)
    values['learning_rate'] = schedule(state.step)
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.step + 1), values

  return step


def init_state(params, tx, mesh):
  """Returns the State before the first step; moments lie as parameters do."""
  replicated = sharding.replicated(mesh)
  shardings = optax.tree.map_params(
    tx,
    lambda _, param: param.sharding,
    jax.eval_shape(tx.init, params),
    params,
    transform_non_params=lambda _: replicated,
  )
  opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
  step = jax.device_put(jnp.zeros((), jnp.int32), replicated)
  return State(params, opt_state, step)


def saved(state):
  """The items of a checkpoint; its number is the step."""
  return {'params': state.params, 'opt_state': state.opt_state}


def restored(state, step, items):
  """Puts the items of checkpoint `step` in place of `state`'s."""
  step = jax.device_put(jnp.asarray(step, jnp.int32), state.step.sharding)
  return State(step=step, **items)


def training_plan(config, groups, mesh):
  """Plans `num_steps` steps, or as many as `epochs` passes need."""
  num_steps, epochs = config.num_steps, config.epochs
  if bool(num_steps) == bool(epochs):
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
    multiple=sharding.row_shards(mesh),
  )


def check_finite(values, step, checkpoints):
  """Raises on a NaN or infinite loss or gradient of update `step`."""
  for name in ('loss', 'grad_norm'):
    if not np.isfinite(values[name]):
      kept = checkpoints.latest()
      raise FloatingPointError(
        f'{name} is {values[name]} at step {step}; the last good checkpoint'
        f' is {"none" if kept is None else f"that of step {kept}"}. Lower'
        ' optim.lr or set optim.clip_norm'
      )


def train(config, workdir):
  """Trains as `config` says; returns the final parameters.

  Args:
    config: `settings.Settings`; every key is read or the run does not start.
    workdir: config.json, metrics.jsonl, samples.jsonl, tensorboard/ and
      checkpoints/ of this run; a run found there is resumed.
  """
  workdir = os.fspath(workdir)
  runs.check_workdir(workdir, config)
  mesh = sharding.make_mesh(**config.mesh)
  with sharding.use(mesh):
    return _train(config, workdir, mesh)


def _train(config, workdir, mesh):
  # ----------------------------------------- loss, model, data, reference ----
  run = runs.set_up(config, mesh)
  groups, ref_values = run.groups, run.ref_values
  step_ref = run.ref_params if config.reference.mode == 'frozen' else None

  # ------------------------------------------------- what each step sees ----
  plan = training_plan(config, groups['train'], mesh)
  num_steps = plan.num_steps
  tqdm.tqdm.write(f'train: {plan.summary()}')

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
  step = make_step(run.sums, tx, schedule, batch_size=config.batch_size)
  step = jax.jit(step, donate_argnums=0)
  state = init_state(run.params, tx, mesh)
  run.params = None  # donated with the state

  # ------------------------------------------------------------- restore ----
  # 1 this workdir, 2 config.resume, 3 config.init, 4 model.source; the last
  # two are in run.params already.
  intervals = {
    'log': config.log_every,
    'evaluate': config.eval.every,
    'save': config.checkpoint.every,
  }
  resume, keep = config.resume, config.checkpoint.keep
  config.check_all_read()
  runs.claim_workdir(workdir, config)
  checkpoints = checkpoint.Checkpoints(
    os.path.join(workdir, 'checkpoints'), keep=keep
  )
  first = checkpoints.latest()
  if first is not None:
    state = restored(state, first, checkpoints.restore(first, saved(state)))
  elif resume:
    state = restored(state, *runs.restore_newest(resume, saved(state)))
  first = int(state.step)
  writer = metrics.Writer(workdir, after=first if first else -1)

  # ---------------------------------------------------------------- loop ----
  def due(what, number):
    every = intervals[what]
    return number == num_steps or (every and number % every == 0)

  def finish(number, values):
    """Waits for a step, checks and logs its metrics."""
    nonlocal clock
    values = jax.device_get(values)
    seconds, clock = time.perf_counter() - clock, time.perf_counter()
    check_finite(values, number, checkpoints)
    if due('log', number):
      rates = speed(plan, number - 1, seconds)
      named = {f'train/{name}': x for name, x in (values | rates).items()}
      writer.write(number, named)

  clock = time.perf_counter()  # when the last step, or a pause, was over
  try:
    if not first:
      writer.write(0, *run.evaluate(state.params, 0))
    pending = None  # the previous step's metrics, still on the device
    clock = time.perf_counter()
    for number in tqdm.trange(
      first + 1, num_steps + 1, initial=first, total=num_steps, desc='train'
    ):
      batch = evaluators.put_batch(
        plan, number - 1, mesh, ref_values=ref_values['train']
      )
      state, values = step(state, step_ref, batch)
      if pending:
        finish(*pending)
      pending = number, values
      if due('evaluate', number) or due('save', number):
        finish(*pending)
        pending = None
        if due('evaluate', number):
          writer.write(number, *run.evaluate(state.params, number))
        if due('save', number):
          checkpoints.save(number, saved(state))
        clock = time.perf_counter()
  finally:  # whatever happens, saves under way are finished
    checkpoints.close()
    writer.close()
  return state.params


def speed(plan, step, seconds):
  """Rates of one step: pairs/s, real tokens/s, share of slots with a token."""
  used = [plan.groups[g] for g in plan.steps[step]]
  tokens = sum(map(rows.slots_needed, used))
  return {
    'step_seconds': seconds,
    'pairs_per_second': len(used) / seconds,
    'tokens_per_second': tokens / seconds,
    'row_fill': tokens / (plan.rows_of(step) * plan.row_length),
  }
