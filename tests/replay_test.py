"""Whole runs of independent implementations, replayed through our step."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import evaluators
from dpo_jax import losses
from dpo_jax import objectives
from dpo_jax import optim
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import weights
from dpo_jax.data import batches
from dpo_jax.data import examples

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def groups_of(arrays, step):
  """Turns one right-padded [2B, T] batch into groups."""
  ids, attend, scored = (
    arrays[f'{step}/{name}']
    for name in ('input_ids', 'attention_mask', 'completion_mask')
  )
  B = len(ids) // 2

  def split(i):
    prompt = ids[i][(attend[i] == 1) & (scored[i] == 0)]
    return prompt.astype(np.int32), ids[i][scored[i] == 1].astype(np.int32)

  out = []
  for i in range(B):
    (prompt, chosen), (same, rejected) = split(i), split(B + i)
    np.testing.assert_array_equal(prompt, same)
    out.append(examples.Group(prompt, (chosen, rejected), 1.0, 1.0, str(i)))
  return out


def replay(folder, *, loss_name, beta, optimizer, row_length):
  """Returns the losses and margins of our step over the folder's batches."""
  with open(folder / 'metrics.json') as f:
    args = json.load(f)['args']
  arrays = np.load(folder / 'batches.npz')
  policy = weights.load(folder / 'policy0')
  ref = weights.load(folder / 'ref')
  by_step = [groups_of(arrays, step) for step in range(args['steps'])]
  groups = [group for part in by_step for group in part]
  B = len(by_step[0])
  plan = batches.plan_steps(
    groups,
    [list(range(s * B, (s + 1) * B)) for s in range(len(by_step))],
    row_length=row_length,
    multiple=1,
  )
  mesh = jax.make_mesh(
    (1, 1, 1),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[:1],
  )
  loss, function = losses.bind(loss_name, {'beta': beta})
  schedule = optim.learning_rate(
    lr=args['lr'],
    schedule='constant',
    warmup_steps=args['lr_warmup'],
    warmup_init=0.0,
    num_steps=args['steps'],
  )
  tx = optim.make(
    optimizer,
    schedule,
    clip_norm=args['max_grad_norm'],
    keywords=optim.OPTIMIZERS[optimizer],
  )
  sums = objectives.make_sums(
    objectives.make_token_logps(policy.config, chunk=16),
    loss,
    function,
    beta=beta,
    reference='frozen',
  )
  step = jax.jit(
    train.make_step(sums, tx, schedule, batch_size=B), donate_argnums=0
  )
  params = jax.device_put(
    jax.tree.map(jnp.array, policy.params), sharding.replicated(mesh)
  )
  state = train.init_state(params, tx)
  out = []
  for number in range(plan.num_steps):
    batch = evaluators.put_batch(plan, number, mesh)
    state, values = step(state, ref.params, batch)
    out.append((values['loss'], values['rewards/margin']))
  return np.asarray(out).T


LOSSES = {'sigmoid': 'dpo', 'ipo': 'ipo_mean'}
OPTIMIZERS = {'adamw_torch': 'adamw', 'rmsprop': 'rmsprop'}


def miss(folder, *, row_length, **changes):
  """Returns how far our losses and margins are from the recorded ones, [2]."""
  with open(folder / 'metrics.json') as f:
    expected = json.load(f)
  args = expected['args'] | changes
  here = replay(
    folder,
    loss_name=LOSSES[args['loss']],
    beta=args['beta'],
    optimizer=OPTIMIZERS[args['optim']],
    row_length=row_length,
  )
  there = np.asarray([expected['loss'], expected['margin']])
  assert here.shape == there.shape == (2, 10)
  assert np.isfinite(here).all()
  return np.abs(here - there).max(-1)


@pytest.mark.parametrize(
  'name', ['run_trl_sigmoid', 'run_trl_ipo', 'run_torch_rmsprop']
)
def test_runs_of_trl_and_torch_are_followed(name):
  assert max(miss(GOLDEN / name, row_length=64)) < 1e-4


def test_a_wrong_beta_is_noticed():
  misses = miss(GOLDEN / 'run_trl_sigmoid', row_length=64, beta=0.21)
  assert min(misses) > 1e-3


@pytest.mark.parametrize(
  'name', ['trl_sigmoid', 'trl_ipo_mean', 'plain_sigmoid_rmsprop']
)
def test_shared_oracle_runs_are_followed(shared, name):
  assert max(miss(shared / 'oracles' / name, row_length=192)) < 1e-4
