"""FLOPs of an adapter's training step against a full one's, by XLA's count.

    PYTHONPATH=. python experiments/lora_flops.py [SHAPE ...]

SHAPE is a name of `presets.MODELS`. Nothing is run: steps of one and two layers
are compiled, unrolled, and extrapolated to all layers (the count is linear in
them). XLA counts the body of a loop once, so the head's loop over chunks comes
from two numbers of chunks, and attention, which is a loop of tiles whose number
the data decides, is left out of both sides, nearly: one tile of it is counted.
"""

import dataclasses
import functools
import math
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import objectives
from dpo_jax import steps
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.losses import table
from dpo_jax.models import lora
from dpo_jax.models import presets
from dpo_jax.models import transformer

PAIRS, ROW = 8, 1024
KINDS = [('.*', 16), ('attention/(q|v)', 8)]
MODES = [('frozen', 'adapter_off'), ('cached', 'cached')]


def groups():
  """Pairs of 200 prompt and 2 x 45 response tokens at most."""
  rng = np.random.default_rng(0)

  def tokens(most):
    return np.ones(rng.integers(1, most + 1), np.int32)

  return [
    examples.Group(tokens(200), (tokens(90), tokens(90)), 1.0, 1.0, str(n))
    for n in range(2 * PAIRS)
  ]


def counted(config, kind, reference, chunks):
  """FLOPs of one compiled step, the head in so many chunks."""
  params = jax.eval_shape(
    lambda: nn.unbox(transformer.init_params(config, jax.random.key(0)))
  )
  plan = batches.training_plan(
    groups(),
    seed=0,
    num_steps=1,
    batch_size=PAIRS,
    row_length=ROW,
    multiple=1,
    window=None,
  )
  batch = plan.batch(0)
  rows, scored = batch['target'].shape
  sums = objectives.make_sums(
    config,
    table.bind(table.section('dpo')),
    chunk=rows * math.ceil(scored / chunks),
    reference=reference,
    responses=2,
    form='pairs',
    rewards=False,
  )
  base, trained, scale = None, params, 1.0
  if kind is not None:
    base, scale = params, kind.scale
    trained = jax.eval_shape(
      lambda: lora.init_adapter(config, kind, jax.random.key(0))
    )
  if reference == 'cached':
    batch['ref_token_logps'] = np.zeros((rows, scored), np.float32)
  ref = params if reference == 'frozen' else None
  tx = optax.adamw(1e-3)
  step = steps.make_step(
    sums, tx, lambda _: 1e-3, batch_size=PAIRS, scale=scale
  )
  state = steps.State(
    trained,
    jax.eval_shape(tx.init, trained),
    jax.ShapeDtypeStruct((), jnp.int32),
    ref=None,
    memory={},
  )
  lowered = jax.jit(step, donate_argnums=0).lower(
    state, {'base': base, 'ref': ref}, batch
  )
  return lowered.compile().cost_analysis()['flops']


def flops(shape, kind, reference):
  """FLOPs of the step of a whole model."""

  def at(layers, chunks):
    config = dataclasses.replace(
      shape,
      num_layers=layers,
      scan_unroll=layers,
      windowed=shape.windowed[:layers],
    )
    return counted(config, kind, reference, chunks)

  one, two, four = at(1, 2), at(2, 2), at(1, 4)
  head = (one - four) / (1 / 2 - 1 / 4)
  return one + head / 2 + (two - one) * (shape.num_layers - 1)


def main():
  for name in sys.argv[1:] or ['llama3.2-1b', 'smollm2-135m']:
    full = functools.partial(flops, presets.MODELS[name], None)
    for before, reference in MODES:
      whole = full(before)
      print(f'{name}: full, {before}: {whole / 1e12:.2f} TFLOP')
      for targets, rank in KINDS:
        kind = lora.Lora(targets, rank, 2.0 * rank, 'a_zero')
        ratio = flops(presets.MODELS[name], kind, reference) / whole
        print(f'  {reference}, rank {rank}, targets {targets}: {ratio:.3f}')


if __name__ == '__main__':
  main()
