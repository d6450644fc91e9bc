"""The compiled programs of a config's loop, made from shapes alone.

`of_config` is the one way from a config to them: for `train` the step, for
`ppo` its update and what its rollouts run. They are made by the functions that
the loops themselves call, with shapes in the place of arrays: no weights and no
data are read. The rows are those of groups of given lengths, by default the
longest that the config allows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax import accounting
from dpo_jax import evaluators
from dpo_jax import logps
from dpo_jax import objectives
from dpo_jax import policies
from dpo_jax import ppo
from dpo_jax import rollouts
from dpo_jax import runs
from dpo_jax import sampling
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import updates
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.data import partners
from dpo_jax.losses import table
from dpo_jax.models import lora
from dpo_jax.models import transformer

_RANKED = 4  # responses of a ranking, where no lengths are given


class Program(NamedTuple):
  """A program, and what is known of it before it is compiled.

  name: of it. what: in words, what a run of it is of. groups: of a run. times:
  runs in a step of the loop. lower: () -> what JAX lowers. given: {kind: tree
  of placed shapes} that it takes. beside: the same of what lies on the devices
  meanwhile. batch: the rows that it attends over, on the host. accumulate:
  micro-batches that it cuts them into. turns: {scope: how often loops turn}
  where the data decides, see `hlo_counts.count`. useful: FLOPs of a run, of all
  devices, as `accounting` counts them.
  """

  name: str
  what: str
  groups: int
  times: int
  lower: Callable
  given: dict
  beside: dict
  batch: dict
  accumulate: int
  turns: dict
  useful: float


class Loop(NamedTuple):
  """The programs of a step of a loop, in their order.

  model: `TransformerConfig`. noun: what its groups are called. groups: of a
  step. shape, lengths: of the rows that it learns from, and of their groups.
  """

  model: transformer.TransformerConfig
  noun: str
  groups: int
  shape: batches.Shape
  lengths: tuple
  programs: tuple


def of_config(config, mesh, *, lengths=()):
  """Returns the Loop of a config: that of `ppo.run`, or that of `train.train`.

  Args:
    config: `settings.Settings` of training.
    mesh: of the devices, which need not be there.
    lengths: tokens of a prompt and of its responses, of every group; one number
      for all responses will do; () are the longest that the config allows.
  """
  make = _of_ppo if 'ppo' in config else _of_train
  return make(config, mesh, tuple(lengths))


# --- Offline ------------------------------------------------------------------


def _of_train(config, mesh, lengths):
  train.check(config, mesh)
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
  update = updates.make(
    config,
    policy,
    objectives.make_sums(
      policy.config,
      terms,
      chunk=runs.head_chunk(config),
      reference=config.reference.mode,
      responses=plan.responses,
      form=config.data.form,
      rewards=False,
    ),
    jax.eval_shape(lambda: objectives.first_memory(terms)),
    mesh,
    num_steps=config.num_steps or 1000,
  )
  frozen = {'base': policy.base, 'ref': reference}
  inputs = _placed(batch, mesh)
  step = Program(
    name='step',
    what=_rows_of(config.batch_size, 'groups', lengths, shape),
    groups=config.batch_size,
    times=1,
    lower=_within(mesh, update.step.lower, update.shapes, frozen, inputs),
    given={
      'trained': update.shapes.params,
      'optimizer': update.shapes.opt_state,
      'reference': (reference, update.shapes.ref),
      'base': policy.base,
      'batch': inputs,
    },
    beside={},
    batch=batch,
    accumulate=config.accumulate,
    turns=_head_turns(config, batch, mesh, parts=config.accumulate),
    useful=accounting.step_flops(
      policy.config,
      _work(plan, policy),
      live=config.reference.mode not in ('cached', 'none'),
      adapter=_adapter_size(policy),
      outputs=1 if table.of_head(config.loss) else None,
    ),
  )
  return Loop(
    policy.config, 'groups', config.batch_size, shape, lengths, (step,)
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
  return _abstract_copy(policy)


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
  groups = _zeros(lengths, config.batch_size)
  if any(term.loss.mismatched for term in terms):
    groups = partners.mismatched(groups)
  return groups


# --- On-policy ----------------------------------------------------------------


def _of_ppo(config, mesh, lengths):
  """Of `lengths` the prompt's decides shapes: it is a run's longest one."""
  ppo.check(config, mesh)
  # ------------------------------------------------------ model and batch ----
  chunk, size = runs.head_chunk(config), config.rollout.size
  policy = policies.abstract_policy(config, mesh, head=0.0)
  reference = abstract_reference(config, policy)
  lengths = _sample_lengths(config, lengths)
  prompt, response = lengths
  plan = rollouts.plan(
    _zeros(lengths, config.batch_size),
    max_prompt=prompt,
    max_response=config.data.max_response_tokens,
    batch_size=config.batch_size,
    mesh=mesh,
  )
  rows, shape = plan.batch(0), plan.shape_of(0)
  inputs = _placed(rows, mesh)
  variables = lora.variables(policy.base, policy.trained, None)
  ref_variables = lora.variables(policy.base, reference, None)
  work = _work(plan, policy)
  forward = accounting.forward_flops(policy.config, work)

  # ------------------------------------------------- what is learned from ----
  observe = rollouts.make_observe_step(policy.config, mesh, chunk=chunk)
  memory = jax.eval_shape(lambda: rollouts.first_memory(kl_coef=config.kl.coef))
  with sharding.use(mesh):
    seen = jax.eval_shape(observe, variables, ref_variables, inputs)
    arrays, _, _ = jax.eval_shape(
      ppo.make_experience(config, mesh),
      memory,
      seen,
      np.zeros(config.batch_size, np.float32),
      np.zeros(config.batch_size, bool),
    )
  batch = rollouts.minibatch(
    plan,
    0,
    np.arange(config.batch_size),
    jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arrays),
  )
  minibatch = _placed(batch, mesh)

  # --------------------------------------------------------------- update ----
  update = updates.make(
    config,
    policy,
    ppo.make_sums(config, policy.config),
    memory,
    mesh,
    num_steps=config.num_steps * ppo.updates_a_step(config),
  )
  frozen = {'base': policy.base, 'ref': None}

  # ------------------------------------------------------------- programs ----
  weights = {'trained': update.shapes.params, 'base': policy.base}
  optimizer = {'optimizer': update.shapes.opt_state}
  learned = {}
  if config.reward.name.startswith('model:'):
    # It was most likely trained from the same model.
    learned = {'reward model': (_abstract_copy(policy), policy.base)}
  at_once = config.rollout.batch_size
  # Samples are computed with copies: cast and gathered, layers apart.
  how = evaluators.how_to_sample(policy.config, variables)
  computed, layers = sampling.prepared(policy.config, variables, **how)
  copies, kept = {'copies': (computed, layers)}, weights
  if sampling.same(computed, variables):
    copies, kept = weights | {'copies': layers}, {}
  programs = (
    Program(
      name='sampling',
      what=f'{at_once:,} samples of {prompt:,} prompt tokens in'
      f' {sampling.prompt_slots(prompt):,} slots, {response:,} new tokens each',
      groups=at_once,
      times=-(-size // at_once),
      lower=_within(
        mesh,
        sampling.lower,
        policy.config,
        variables,
        sharding.abstract(
          jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh)
        ),
        longest=prompt,
        max_new_tokens=config.data.max_response_tokens,
        temperature=1.0,
        top_p=1.0,
        batch_size=at_once,
        **how,
      ),
      given=copies,
      beside=kept | optimizer | {'reference': reference} | learned,
      batch=_prefilled(sampling.prompt_slots(prompt), at_once),
      accumulate=1,
      turns={sampling.SCOPE: response - 1},  # the prompt gives the first one
      useful=forward * at_once / config.batch_size,
    ),
    Program(
      name='observe',
      what=_rows_of(config.batch_size, 'samples', lengths, shape),
      groups=config.batch_size,
      times=-(-size // config.batch_size),
      lower=_within(mesh, observe.lower, variables, ref_variables, inputs),
      given=weights | {'reference': reference, 'batch': inputs},
      beside=optimizer | learned,
      batch=rows,
      accumulate=1,
      turns=_head_turns(config, rows, mesh, parts=1),
      useful=2 * forward,
    ),
    Program(
      name='update',
      what=_rows_of(config.batch_size, 'samples', lengths, shape),
      groups=config.batch_size,
      times=ppo.updates_a_step(config),
      lower=_within(mesh, update.step.lower, update.shapes, frozen, minibatch),
      given=weights | optimizer | {'batch': minibatch},
      beside={'reference': reference} | learned,
      batch=batch,
      accumulate=config.accumulate,
      turns=_head_turns(config, batch, mesh, parts=config.accumulate),
      useful=accounting.step_flops(
        policy.config, work, live=False, adapter=_adapter_size(policy)
      ),
    ),
  )
  return Loop(policy.config, 'samples', size, shape, lengths, programs)


def _sample_lengths(config, lengths):
  """Returns tokens of a prompt and of a sample."""
  most = config.data.max_response_tokens
  lengths = lengths or (config.data.max_prompt_tokens, most)
  if len(lengths) != 2 or min(lengths) < 1 or lengths[1] > most:
    raise ValueError(
      f'lengths {",".join(map(str, lengths))}: a sample has a prompt and one'
      f' response, of 1 token or more and at most data.max_response_tokens'
      f' {most}'
    )
  return tuple(lengths)


def _prefilled(slots, rows):
  """What prompts attend to before their first new token: all are as long."""
  hi = np.broadcast_to(np.arange(1, slots + 1, dtype=np.int32), (rows, slots))
  return {'lo': np.zeros_like(hi), 'hi': hi}


# --- Parts --------------------------------------------------------------------


def head_turns(batch, parts, chunk):
  """Turns of the loop over chunks of scored tokens, see `logps`.

  `parts` are devices that share the rows, times micro-batches.
  """
  scored_RS = batch['slot'] >= 0
  of_parts = scored_RS.reshape(parts, -1)
  size = logps.chunk_size(of_parts.shape[1], chunk)
  return -(-int(of_parts.sum(1).max()) // size)


def _head_turns(config, batch, mesh, *, parts):
  parts *= sharding.row_shards(mesh)
  return {logps.SCOPE: head_turns(batch, parts, runs.head_chunk(config))}


def _within(mesh, lower, *args, **keywords):
  """Returns () -> what is lowered on a mesh."""

  def lowered():
    with sharding.use(mesh):
      return lower(*args, **keywords)

  return lowered


def _placed(batch, mesh):
  where = sharding.of_rows(mesh)
  return sharding.abstract(batch, jax.tree.map(lambda _: where, batch))


def _abstract_copy(policy):
  """Returns the shapes of `runs.frozen_copy` of what is trained, placed."""
  return sharding.abstract(
    jax.eval_shape(lambda x: runs.frozen_copy(x, policy), policy.trained),
    jax.tree.map(lambda x: x.sharding, policy.trained),
  )


def _adapter_size(policy):
  """Returns the parameters of the adapter that is trained, or None."""
  if policy.base is None:
    return None
  return sum(x.size for x in jax.tree.leaves(policy.trained))


def _work(plan, policy):
  work = accounting.work_of(plan.groups, window=policy.config.window)
  return accounting.summed(work, plan.steps[0])


def _zeros(lengths, number):
  """Returns so many groups of tokens that are all 0."""
  prompt, *responses = (np.zeros(n, np.int32) for n in lengths)
  return [
    examples.Group(prompt, tuple(responses), 1.0, 1.0, str(n))
    for n in range(number)
  ]


def _rows_of(number, noun, lengths, shape):
  """'8 groups of ... tokens in 4 rows of ... slots, ... of them scored'."""
  of = ', '.join(f'{n:,}' for n in lengths[1:])
  return (
    f'{number:,} {noun} of {lengths[0]:,} prompt and {of} response tokens in'
    f' {shape.rows:,} rows of {shape.length:,} slots, {shape.scored:,} of them'
    ' scored'
  )
