"""Micro-batches: one step in parts is the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import metrics
from dpo_jax import steps
from dpo_jax import train
from dpo_jax.data import batches
from tests import worlds


def end_of_steps(accumulate, *, loss, K):
  """Totals of five steps on the same rows, and the parameters after them."""
  config = worlds.LLAMA
  sums = worlds.make_sums(
    config,
    loss,
    reference='frozen' if K == 2 else 'none',
    form='pairs' if K == 2 else 'sft',
    responses=K,
  )
  tx = optax.sgd(0.01)
  step = steps.make_step(
    sums,
    tx,
    optax.constant_schedule(0.01),
    batch_size=32,
    accumulate=accumulate,
  )
  plan = batches.training_plan(
    worlds.make_groups(40, responses=K),
    seed=0,
    num_steps=5,
    batch_size=32,
    row_length=48,
    multiple=8,
    window=None,
  )
  params = worlds.params_of(config, size=0.3)
  frozen = {'base': None, 'ref': worlds.params_of(config, 1, size=0.3)}
  state = steps.init_state(jax.device_put(params, one_device()), tx)
  step, seen = jax.jit(step), []
  for number in range(5):
    batch = plan.batch(number)
    batch['weight'] *= np.linspace(0.1, 2.0, batch['weight'].size).reshape(
      batch['weight'].shape
    )
    state, values = step(state, frozen, batch)
    seen.append(jax.device_get(values))
  return seen, jax.device_get(state.params)


def one_device():
  mesh = jax.make_mesh(
    (1,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:1],
  )
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize('loss, K', [('dpo', 2), ('sft', 1)])
def test_eight_micro_batches_equal_one(loss, K):
  whole, params = end_of_steps(1, loss=loss, K=K)
  parts, params_of_parts = end_of_steps(8, loss=loss, K=K)
  for one, other in zip(whole, parts, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_allclose(
        np.divide(*one[name]),
        np.divide(*other[name]),
        # The norm of thousands of gradients is no more exact than that.
        rtol=1e-5 if name == 'grad_norm' else 2e-6,
        atol=1e-6,
        err_msg=name,
      )
      assert one[name][1] == other[name][1]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    params,
    params_of_parts,
  )
  assert abs(float(whole[-1]['loss'][0] - whole[0]['loss'][0])) > 1e-3


def test_every_device_has_its_share_of_a_micro_batch():
  rows = np.arange(48)
  parts = steps.micro_batches({'x': rows}, 3)['x']
  assert sorted(parts.ravel()) == list(rows)
  shares = np.split(rows, 8)  # of eight devices
  for part in parts:
    for d, held in enumerate(np.split(np.asarray(part), 8)):
      assert set(held) <= set(shares[d])


def test_low_precision_parts_are_summed_in_float32():
  parts = jnp.full((1024, 1), 1 + 1 / 128, jnp.bfloat16)
  total = steps.summed(lambda part: part, parts)
  assert total.dtype == jnp.float32
  assert total[0] == 1024 + 8


FAST = {
  'batch_size': 32,
  'num_steps': 3,
  'optim.lr': 1e-3,
  'optim.warmup_steps': 0,
  'log_every': 1,
}


@pytest.mark.parametrize(
  'arg, changes',
  [
    pytest.param(
      'reference=ema', {'reference.every': 2}, marks=pytest.mark.slow
    ),
    ('adapter=lora,reference=cached', {}),
  ],
)
def test_runs_with_micro_batches_equal_runs_without(tmp_path, arg, changes):
  found = []
  for accumulate in (1, 4):
    config = worlds.debug_config(
      tmp_path, arg, accumulate=accumulate, **FAST, **changes
    )
    workdir = tmp_path / str(accumulate)
    train.train(config, workdir)
    records = metrics.read(workdir)
    found.append(
      [
        [r[name] for r in records if name in r]
        for name in ('train/loss', 'train/rewards/margin', 'train/grad_norm')
      ]
    )
  np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
  assert len(found[0][0]) == 3 and abs(found[0][0][2] - found[0][0][0]) > 0.01


@pytest.mark.parametrize(
  'arg, changes, message',
  [
    ('loss=aot', {}, "loss 'aot' is a function of the whole batch"),
    ('loss=dr_dpo', {}, "loss 'dr_dpo' .* set accumulate to 1"),
    ('loss=kto', {'data.form': 'unpaired'}, "loss 'kto' .* accumulate to 1"),
    ('loss=dpo+bco', {}, "loss 'bco' .* set accumulate to 1"),
    (
      'loss=dpo+sft',
      {'loss.sft.reduction': 'batch_mean'},
      "'sft' with reduction 'batch_mean' .*choose 'mean'",
    ),
    ('loss=dpo', {'accumulate': 0}, 'accumulate is 0; use 1 or more'),
    (
      'loss=dpo',
      {'batch_size': 40},
      'batch_size 40 .* 8 devices .* times 2 micro-batches; use 32 or 48',
    ),
  ],
)
def test_what_does_not_add_up_is_refused(tmp_path, arg, changes, message):
  config = worlds.debug_config(
    tmp_path, arg, **{'batch_size': 32, 'accumulate': 2} | changes
  )
  with pytest.raises(ValueError, match=message):
    train.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
