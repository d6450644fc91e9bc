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


def losses_of_a_run(devices, mesh_shape):
  """Losses of five steps and the parameters after them."""
  config = worlds.LLAMA
  mesh = jax.make_mesh(
    mesh_shape,
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:devices],
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
  tx = optax.adamw(1e-2)
  schedule = optax.constant_schedule(1e-2)
  step = jax.jit(
    steps.make_step(sums, tx, schedule, batch_size=16), donate_argnums=0
  )
  state = steps.init_state(params, tx)
  plan = batches.training_plan(
    worlds.make_groups(40),
    seed=0,
    num_steps=5,
    batch_size=16,
    row_length=48,
    multiple=8,
    window=None,
  )
  values = []
  with sharding.use(mesh):
    for number in range(5):
      batch = evaluators.put_batch(plan, number, mesh)
      state, metrics = step(state, {'base': None, 'ref': ref}, batch)
      values.append(float(metrics['loss'][0]))
  return np.array(values), jax.device_get(state.params), state


@pytest.mark.parametrize('shape', [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_eight_devices_equal_one(shape):
  one, one_params, _ = losses_of_a_run(1, (1, 1, 1))
  many, many_params, state = losses_of_a_run(8, shape)
  assert one[0] - one[-1] > 0.05  # it does learn
  np.testing.assert_allclose(many, one, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    many_params,
    one_params,
  )
  # Moments lie where their parameters do.
  for moment in jax.tree.leaves(state.opt_state[0].mu):
    assert moment.sharding.mesh.shape == state.step.sharding.mesh.shape
  q = state.params['layers']['attention']['q'].sharding.spec
  assert state.opt_state[0].mu['layers']['attention']['q'].sharding.spec == q


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
