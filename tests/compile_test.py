"""What compiling costs; slow, because the layers are many."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import optax
import pytest

from dpo_jax import losses
from dpo_jax import objectives
from dpo_jax import train
from dpo_jax.data import batches
from tests import worlds

# SmolLM2-135M's depth and head layout, narrower: XLA's work depends on the
# number of operations, not on their sizes.
DEEP = dataclasses.replace(
  worlds.LLAMA,
  vocab_size=512,
  d_model=64,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=8,
  d_ff=128,
)


def compile_seconds(config):
  loss, function = losses.bind('dpo', {'beta': 0.1})
  sums = objectives.make_sums(
    objectives.make_token_logps(config, chunk=16),
    loss,
    function,
    beta=0.1,
    reference='frozen',
  )
  tx = optax.sgd(1e-3)
  schedule = optax.constant_schedule(1e-3)
  step = train.make_step(sums, tx, schedule, batch_size=4)
  params = worlds.params_of(config)
  plan = batches.training_plan(
    worlds.make_groups(8),
    seed=0,
    num_steps=1,
    batch_size=4,
    row_length=64,
    multiple=1,
  )
  state = train.State(params, tx.init(params), jnp.zeros((), jnp.int32))
  lowered = jax.jit(step).lower(state, params, plan.batch(0))
  start = time.process_time()
  lowered.compile()
  return time.process_time() - start


@pytest.mark.slow
def test_scanning_halves_the_compile_time_of_thirty_layers():
  scanned = compile_seconds(DEEP)
  unrolled = compile_seconds(dataclasses.replace(DEEP, scan_unroll=30))
  print(f'scanned {scanned:.1f} s, unrolled {unrolled:.1f} s of process time')
  assert scanned <= 0.5 * unrolled
