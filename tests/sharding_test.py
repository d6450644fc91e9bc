import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import evaluators
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax.data import batches
from dpo_jax.models import transformer
from tests import worlds

STEPS = 20
# Besides the families, one whose heads and words eight devices can share.
WIDE = dataclasses.replace(
  worlds.LLAMA, num_heads=8, num_kv_heads=8, vocab_size=56
)
# Scores do not depend on GPT-2's key biases: their gradient is rounding, of
# which Adam's usual epsilon would make steps as long as all others.
EPSILON = {'gpt2': 1e-6}
MODELS = worlds.FAMILIES | {'wide': WIDE}


@functools.cache
def losses_of_a_run(data, fsdp, tensor, family='llama'):
  """Losses of 20 steps, the parameters after them and the state."""
  config = MODELS[family]
  mesh = sharding.make_mesh(
    data=data,
    fsdp=fsdp,
    tensor=tensor,
    devices=jax.devices()[: data * fsdp * tensor],
  )
  boxed = jax.eval_shape(
    lambda: transformer.init_params(config, jax.random.key(0))
  )
  params = jax.tree.map(
    jax.device_put,
    worlds.params_of(config),
    sharding.parameter_shardings(boxed, mesh),
  )
  ref = jax.tree.map(jnp.copy, params)
  sums = worlds.make_sums(config)
  tx = optax.adamw(1e-2, eps=EPSILON.get(family, 1e-8))
  schedule = optax.constant_schedule(1e-2)
  step = jax.jit(
    steps.make_step(sums, tx, schedule, batch_size=16), donate_argnums=0
  )
  state = steps.init_state(params, tx)
  plan = batches.training_plan(
    worlds.make_groups(40),
    seed=0,
    num_steps=STEPS,
    batch_size=16,
    row_length=48,
    multiple=8,
    window=None,
  )
  values = []
  with sharding.use(mesh):
    for number in range(STEPS):
      batch = evaluators.put_batch(plan, number, mesh)
      state, metrics = step(state, {'base': None, 'ref': ref}, batch)
      values.append(float(metrics['loss'][0]))
  return np.array(values), jax.device_get(state.params), state


QUICK = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
GRID = [
  (data, fsdp, tensor)
  for data in (1, 2, 4, 8)
  for fsdp in (1, 2, 4, 8)
  for tensor in (1, 2)
  if 1 < data * fsdp * tensor <= 8
]


WIDE_GRID = [(1, 1, 4), (2, 1, 4), (1, 2, 4), (1, 1, 8)]


def check_equals_one_device(shape, family):
  one, one_params, _ = losses_of_a_run(1, 1, 1, family)
  many, many_params, state = losses_of_a_run(*shape, family)
  assert one[0] - one[-1] > 0.05  # it does learn
  np.testing.assert_allclose(many, one, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    many_params,
    one_params,
  )
  # Moments lie where their parameters do.
  jax.tree.map(
    lambda param, moment: np.testing.assert_equal(
      moment.sharding, param.sharding
    ),
    state.params,
    state.opt_state[0].mu,
  )


@pytest.mark.parametrize('shape', QUICK, ids=str)
def test_eight_devices_equal_one(shape):
  check_equals_one_device(shape, 'llama')


@pytest.mark.slow
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'gemma'])
@pytest.mark.parametrize('shape', GRID, ids=str)
def test_any_mesh_equals_one_device(shape, family):
  check_equals_one_device(shape, family)


@pytest.mark.slow
@pytest.mark.parametrize('shape', WIDE_GRID, ids=str)
def test_a_wide_tensor_axis_equals_one_device(shape):
  check_equals_one_device(shape, 'wide')


def is_boxed(leaf):
  return isinstance(leaf, nn.LogicallyPartitioned)


def test_every_parameter_axis_is_in_the_table():
  known = {name for name, _ in sharding.RULES}
  for config in worlds.FAMILIES.values():
    boxed = jax.eval_shape(
      lambda config=config: transformer.init_params(config, jax.random.key(0))
    )
    for leaf in jax.tree.leaves(boxed, is_leaf=is_boxed):
      assert is_boxed(leaf) and set(leaf.names) <= known


def test_meshes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='for 8 devices; set one axis to -1'):
    sharding.make_mesh(data=3, fsdp=1, tensor=1)
  with pytest.raises(ValueError, match='one may be -1'):
    sharding.make_mesh(data=-1, fsdp=-1, tensor=1)
  assert dict(sharding.make_mesh(data=-1, fsdp=2, tensor=1).shape) == {
    'data': 4,
    'fsdp': 2,
    'tensor': 1,
  }


def test_a_batch_that_no_mesh_holds_names_sizes_that_fit():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  with pytest.raises(ValueError, match=r'batch_size 30 .* use 24 or 32'):
    sharding.check_batch_size('batch_size', 30, mesh)
  with pytest.raises(ValueError, match=r'batch_size 3 .* use 8'):
    sharding.check_batch_size('batch_size', 3, mesh)
  sharding.check_batch_size('batch_size', 32, mesh)


def boxed_of(config):
  return jax.eval_shape(
    lambda: transformer.init_params(config, jax.random.key(0))
  )


def test_a_mesh_axis_that_does_not_divide_names_the_sizes_that_fit():
  boxed = boxed_of(worlds.LLAMA)  # 4 heads, 2 key heads, 50 words, width 16
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=4)
  with pytest.raises(
    ValueError,
    match=r'mesh.tensor 4 does not divide the .* fit this model: 1, 2',
  ):
    sharding.parameter_shardings(boxed, mesh)
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  boxed = boxed_of(dataclasses.replace(worlds.LLAMA, d_model=18))
  with pytest.raises(ValueError, match=r'mesh.fsdp 4 .* 18 of axis .embed.'):
    sharding.parameter_shardings(boxed, mesh)
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2)
  boxed = boxed_of(dataclasses.replace(worlds.LLAMA, vocab_size=51))
  with pytest.raises(ValueError, match=r'takes mesh.tensor=1 only'):
    sharding.parameter_shardings(boxed, mesh)


def test_every_parameter_needs_axes_that_are_in_the_table():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  box = nn.LogicallyPartitioned(jnp.ones((2, 2)), ('embed', 'hidden'))
  with pytest.raises(ValueError, match="axis 'hidden' of parameter mlp/up"):
    sharding.parameter_shardings({'mlp': {'up': box}}, mesh)
  with pytest.raises(ValueError, match='parameter mlp/up has no logical axes'):
    sharding.parameter_shardings({'mlp': {'up': jnp.ones(2)}}, mesh)


def test_the_table_says_what_lies_where():
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  boxed = boxed_of(worlds.LLAMA)
  params = sharding.abstract(
    nn.unbox(boxed), sharding.parameter_shardings(boxed, mesh)
  )
  whole = sum(x.size * 4 for x in jax.tree.leaves(params))
  assert sharding.bytes_per_device(params) == whole / 4
  text = sharding.table({'trained': params, 'reference': None})
  assert 'On each of 8 devices (data 2 x fsdp 4 x tensor 1):' in text
  (row,) = [line for line in text.splitlines() if 'mlp/down' in line]
  assert row.split()[1:6] == ['3x24x16', 'float32', '-', 'tensor', 'fsdp']
  assert 'reference' not in text
