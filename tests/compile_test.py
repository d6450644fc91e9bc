"""What compiling costs; slow, because the layers are many."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from dpo_jax import steps
from dpo_jax.data import batches
from dpo_jax.models import transformer
from tests import worlds

# SmolLM2-135M.
DEEP = transformer.TransformerConfig(
  vocab_size=49152,
  d_model=576,
  num_layers=30,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  d_ff=1536,
  norm='rms',
  norm_eps=1e-5,
  positions='rotary',
  max_positions=8192,
  rope_theta=1e5,
  mlp='swiglu',
  attention_bias=False,
  mlp_bias=False,
  tied=True,
)


def compile_seconds(config):
  """Process time of compiling the training step, which is never run."""
  sums = worlds.make_sums(config, chunk=512)
  tx = optax.adamw(1e-3)
  schedule = optax.constant_schedule(1e-3)
  step = steps.make_step(sums, tx, schedule, batch_size=4)
  params = jax.eval_shape(
    lambda: nn.unbox(transformer.init_params(config, jax.random.key(0)))
  )
  plan = batches.training_plan(
    worlds.make_groups(8),
    seed=0,
    num_steps=1,
    batch_size=4,
    row_length=256,
    multiple=1,
    window=None,
  )
  state = steps.State(
    params,
    jax.eval_shape(tx.init, params),
    jax.ShapeDtypeStruct((), jnp.int32),
    ref=None,
    memory={},
  )
  lowered = jax.jit(step, donate_argnums=0).lower(
    state, {'base': None, 'ref': params}, plan.batch(0)
  )
  start = time.process_time()
  lowered.compile()
  return time.process_time() - start


@pytest.mark.slow
def test_scanning_halves_the_compile_time_of_thirty_layers():
  scanned = compile_seconds(DEEP)
  unrolled = compile_seconds(dataclasses.replace(DEEP, scan_unroll=30))
  print(f'scanned {scanned:.1f} s, unrolled {unrolled:.1f} s of process time')
  assert scanned <= 0.5 * unrolled
