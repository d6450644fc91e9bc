"""The offline loop: SFT and preference training over prefix-shared rows.

Read `train` from top to bottom. Data order is a function of (seed, step) and
the state holds everything else, so a killed run resumes to the same bits.
"""

import math
import os
import time

import jax
import jax.numpy as jnp
import tqdm

from dpo_jax import accounting
from dpo_jax import checks
from dpo_jax import evaluators
from dpo_jax import processes
from dpo_jax import progress
from dpo_jax import ref_cache
from dpo_jax import runs
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax import updates
from dpo_jax.data import batches
from dpo_jax.losses import table


def check_accumulate(config, mesh):
  """Refuses micro-batches that would not add up to the batch."""
  updates.check_micro_batches(config, mesh)
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


# Numbers that this loop has besides those of `checks`.
_NUMBERS = {
  'data.row_length': '1 or more',
  'eval.max_groups': '0 or more',
}


def check(config, mesh):
  """Refuses what is wrong with a config whatever its data and its model are.

  All of it, a line each. `mesh` may be an abstract one.
  """
  config = settings.Settings(config.as_dict())  # to check is not to use
  checks.call(
    [
      *checks.of_training(config, mesh),
      checks.numbers(config, _NUMBERS),
      lambda: sharding.check_batch_size(
        'eval.batch_size', config.eval.batch_size, mesh
      ),
      lambda: check_accumulate(config, mesh),
      lambda: check_data(config),
      lambda: check_length(config),
    ]
  )


def check_data(config):
  """Refuses data and samples that do not fit the losses."""
  terms = runs.bind_losses(config)
  runs.check_source(config.data, terms)
  runs.constraint(config.data.constraint, terms)
  if config.eval.samples.num_prompts and table.of_head(config.loss):
    raise ValueError(
      'a reward model scores texts and writes none; set'
      ' eval.samples.num_prompts to 0'
    )


def check_length(config):
  """Refuses a run of no length, or of two."""
  num_steps, epochs = config.num_steps, config.epochs
  if bool(num_steps) == bool(epochs) or not min(num_steps, epochs) >= 0:
    raise ValueError(
      'set one of num_steps and epochs and leave the other 0; got num_steps'
      f' {num_steps}, epochs {epochs}'
    )


def training_plan(config, groups, mesh, *, window):
  """Plans `num_steps` steps, or as many as `epochs` passes need."""
  num_steps, epochs = config.num_steps, config.epochs
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


# Steps that may be under way before the host waits for their metrics; after a
# SIGTERM they are waited for.
_AHEAD = 4


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
  with progress.begun(config, workdir) as mesh:
    return _train(config, workdir, mesh)


def _train(config, workdir, mesh):
  # ----------------------------------------- loss, model, data, reference ----
  check(config, mesh)
  run = runs.set_up(config, mesh)
  policy, groups, ref_values = run.policy, run.groups, run.ref_values
  mode = config.reference.mode
  frozen = {'base': policy.base, 'ref': run.ref if mode == 'frozen' else None}
  ema = updates.moving_reference(config)

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
  update = updates.make(
    config, policy, run.sums, run.first_memory, mesh, num_steps=num_steps
  )
  tx, shapes, step = update.tx, update.shapes, update.step
  tqdm.tqdm.write(update.table(frozen))

  # ------------------------------------------------------------- restore ----
  here = progress.Progress(
    config,
    workdir,
    data=ref_cache.data_digest(groups['train']),
    resumed=RESUMED,
  )
  if here.fresh:
    ref = jax.tree.map(jnp.copy, policy.trained) if ema else None
    state = steps.init_state(
      policy.trained, tx, ref=ref, memory=run.first_memory
    )
    policy.trained = None  # donated with the state
  else:
    policy.trained = None  # makes room
    items = here.restore(steps.saved(shapes))
    state = steps.restored_state(shapes, here.first, items)

  # ------------------------------------------------------------- compile ----
  # All of it before the first step, since a compilation heeds no SIGTERM.
  compiled = {}  # shape of a batch -> the step for it
  for number in range(here.first + 1, num_steps + 1):
    shape = plan.shape_of(number - 1)
    if shape not in compiled:
      batch = evaluators.put_batch(
        plan, number - 1, mesh, ref_values=ref_values['train']
      )
      pause = time.perf_counter()
      compiled[shape] = step.lower(state, frozen, batch).compile()
      tqdm.tqdm.write(
        f'compiled for {shape.rows} rows of {shape.length} slots in'
        f' {time.perf_counter() - pause:.1f} s'
      )
  # Who computes first waits 30 s for the others, gloo does, and no longer.
  processes.wait('compiled')

  # ---------------------------------------------------------------- loop ----
  since = []  # steps done since the last record, and when the first began
  clock = None
  pending = []  # steps under way: (number, metrics on the device)

  def finish():
    """Waits for steps, checks their metrics and logs those that are due."""
    nonlocal clock
    for number, values in pending:
      here.check_saves()
      values = evaluators.means(jax.device_get(values))
      here.check_finite(values, number)
      since.append(number)
      if here.due('log', number):
        now = time.perf_counter()  # the next step runs while this is written
        values |= speed(plan, since, now - clock, share_of_peak)
        values['row_fill'] = row_fill(plan, number, every=here.log_every)
        here.log(number, values)
        since.clear()
        clock = now
    pending.clear()

  def evaluate():
    return run.evaluate(state.params, state.ref, state.memory)

  def saved():
    finish()
    return steps.saved(state)

  with here.open(num_steps, evaluate=evaluate, saved=saved):
    clock = time.perf_counter()
    for number in here.steps('train'):
      batch = evaluators.put_batch(
        plan, number - 1, mesh, ref_values=ref_values['train']
      )
      shape = plan.shape_of(number - 1)
      state, values = compiled[shape](state, frozen, batch)
      here.did(number)
      # Only now that the next step is under way is the log waited for, so that
      # the devices have work while the host writes and builds a batch.
      if pending and (here.due('log', number - 1) or len(pending) == _AHEAD):
        finish()
      pending.append((number, values))
      if here.due('evaluate', number) or here.due('save', number):
        finish()
        pause = time.perf_counter()
        here.settle(number)
        clock += time.perf_counter() - pause
  return state.params


def speed(plan, numbers, seconds, flops_of):
  """Means over steps (1 is the first) of `seconds` together.

  `flops_of`: group numbers -> the share of the peak that they take for a
  second.
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
    'mfu': flops_of(groups) / seconds,
  }


def row_fill(plan, number, *, every):
  """Returns the share of slots with a real token since the last log point.

  Of the plan alone, so a run that was resumed in between, and has not done all
  of these steps itself, logs the same.

  Args:
    plan: of the run.
    number: the last step, from 1.
    every: steps between log points; 0: only after the last step.
  """
  every = every or plan.num_steps
  steps = range((number - 1) // every * every, number)  # from 0
  return sum(map(plan.tokens, steps)) / sum(map(plan.slots_of, steps))


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
      outputs=1 if table.of_head(config.loss) else None,
    )
    return flops / peak

  return share
