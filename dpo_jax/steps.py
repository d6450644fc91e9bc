"""One update: what it changes, and how micro-batches become one."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dpo_jax import sharding
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


def restored_state(shapes, step, items):
  """Makes the State of what `saved` has given; `shapes` of `state_shapes`."""
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
