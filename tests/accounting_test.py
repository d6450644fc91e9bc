import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import accounting
from dpo_jax import metrics
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax import train
from dpo_jax.data import batches
from dpo_jax.data import rows
from dpo_jax.models import presets
from tests import worlds


def test_the_parameters_of_the_matrices_by_hand():
  # Llama: q and out 16 x 4 x 4, k and v 16 x 2 x 4, three of 16 x 24.
  assert accounting.matmul_parameters(worlds.LLAMA) == 3 * (
    2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
  )
  # GPT-2: as many key heads as heads, two matrices.
  assert accounting.matmul_parameters(worlds.GPT2) == 3 * (
    4 * 16 * 16 + 2 * 16 * 24
  )


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gemma'])
def test_they_are_the_matrices_that_the_model_has(name):
  config = worlds.FAMILIES[name]
  layers = worlds.params_of(config)['layers']
  size = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
    if not any(part in str(path) for part in ('norm', 'bias'))
  )
  assert accounting.matmul_parameters(config) == size


def test_a_step_by_hand():
  config = dataclasses.replace(worlds.LLAMA, window=5, windowed=(1, 0, 1))
  work = accounting.Work(tokens=100, scored=40, seen=900, seen_windowed=300)
  n = accounting.matmul_parameters(config)
  attention = 4 * 4 * 4 * (900 + 2 * 300)  # head_dim 4, four heads
  head = 2 * 16 * 50 * 40
  for live, adapter, layers, passes, heads in [
    (True, None, 8 * n, 4, 4),
    (False, None, 6 * n, 3, 3),
    (False, 7, 4 * n + 6 * 7, 3, 2),
    (True, 7, 6 * n + 6 * 7, 4, 3),
  ]:
    assert (
      accounting.step_flops(config, work, live=live, adapter=adapter)
      == layers * 100 + passes * attention + heads * head
    )


@pytest.mark.parametrize('window', [None, 5, 9, 13])
@pytest.mark.parametrize('K', [1, 2])
def test_work_is_what_the_rows_hold(K, window):
  groups = [
    group
    for group in worlds.make_groups(99, responses=K)
    if len(rows.blocks(group, window=window)) == 1  # no prompt is repeated
  ]
  assert len(groups) > 4
  plan = batches.evaluation_plan(
    groups, batch_size=5, row_length=128, multiple=1, window=window
  )
  work = accounting.work_of(groups, window=window)
  for step in range(plan.num_steps):
    batch = plan.batch(step)
    real = np.zeros(batch['tokens'].shape, bool)
    for r, members in enumerate(plan.members[step]):
      need = sum(rows.slots_needed(groups[g], window=window) for g in members)
      real[r, :need] = True
    spans = (batch['hi'] - batch['lo'])[real]
    assert accounting.summed(work, plan.steps[step]) == accounting.Work(
      tokens=real.sum(),
      scored=np.sum(batch['slot'] >= 0),
      seen=spans.sum(),
      seen_windowed=np.minimum(spans, window or 999).sum(),
    )
    assert plan.tokens(step) == real.sum()


@pytest.mark.parametrize('window', [None, 5, 9])
def test_a_prompt_counts_once_however_often_it_is_laid_out(window):
  groups = worlds.make_groups(6, responses=5)
  work = accounting.work_of(groups, window=window)
  for number, group in enumerate(groups):
    P = len(group.prompt)
    seen = windowed = 0
    for k, response in enumerate(group.responses):
      for query in range(P if k else 0, P + len(response)):
        seen += query + 1
        windowed += min(query + 1, window or 999)
    assert len(rows.blocks(group, window=window)) > 2
    tokens = P + sum(map(len, group.responses))
    assert accounting.summed(work, [number]) == (
      tokens,
      tokens - P,
      seen,
      windowed,
    )


@pytest.mark.parametrize('reference', ['frozen', 'none'])
def test_xla_counts_the_same(reference):
  # Nothing is masked or padded here. XLA counts norms, rotations and the
  # optimizer too, which are small at this width.
  config = dataclasses.replace(
    worlds.LLAMA,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    d_ff=512,
    vocab_size=1000,
    scan_unroll=3,
  )
  R, T, S = 8, 64, 32
  sums = worlds.make_sums(
    config,
    'dpo' if reference == 'frozen' else 'orpo',
    reference=reference,
    chunk=R * S,
  )
  batch = {
    'tokens': np.zeros((R, T), np.int32),
    'positions': np.zeros((R, T), np.int32),
    'lo': np.zeros((R, T), np.int32),
    'hi': np.full((R, T), T, np.int32),
    'source': np.zeros((R, S), np.int32),
    'target': np.zeros((R, S), np.int32),
    'slot': np.zeros((R, S), np.int32),
    'weight': np.ones((R, 1), np.float32),
    'p': np.ones((R, 1), np.float32),
    'mask': np.ones((R, 1), bool),
    'group': np.zeros((R, 1), np.int32),
    'rewards': np.zeros((R, 1, 2), np.float32),
    'costs': np.zeros((R, 1, 2), np.float32),
  }
  tx = optax.sgd(1e-3)
  step = steps.make_step(sums, tx, optax.constant_schedule(0.0), batch_size=R)
  params = worlds.params_of(config)
  state = steps.State(params, tx.init(params), jnp.int32(0), None, {})
  frozen = {'base': None, 'ref': params if reference == 'frozen' else None}
  compiled = jax.jit(step).lower(state, frozen, batch).compile()
  counted = compiled.cost_analysis()['flops']
  work = accounting.Work(R * T, R * S, R * T * T, R * T * T)
  ours = accounting.step_flops(config, work, live=reference == 'frozen')
  # The backward pass computes the logits again: useful only once.
  again = 2 * config.d_model * config.vocab_size * R * S
  assert ours + again == pytest.approx(counted, rel=0.04)


def test_a_measured_peak_is_that_of_a_matmul():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  peak = accounting.measured_peak(mesh, 'float32')
  assert 1e8 < peak < 1e14


def test_the_log_has_the_share_of_the_peak(tmp_path):
  config = worlds.debug_config(tmp_path, **{'peak_tflops': 0.5})
  train.train(config, tmp_path / 'run')
  records = [r for r in metrics.read(tmp_path / 'run') if 'train/mfu' in r]
  assert len(records) == 2
  for record in records:
    assert 0 < record['train/row_fill'] <= 1
    assert record['train/slot_tokens_per_second'] * record[
      'train/row_fill'
    ] == pytest.approx(record['train/tokens_per_second'])
    # At least 8N a token, at most that and all scored and seen twice over.
    n = accounting.matmul_parameters(presets.DEBUG['debug-llama'])
    least = 8 * n * record['train/tokens_per_second'] / 0.5e12
    assert least < record['train/mfu'] < 4 * least


@pytest.mark.parametrize(
  'number, every, of', [(4, 2, [3, 4]), (5, 2, [5]), (5, 0, [1, 2, 3, 4, 5])]
)
def test_the_row_fill_is_that_of_the_steps_since_the_last_log_point(
  number, every, of
):
  plan = types.SimpleNamespace(
    num_steps=5, tokens=lambda i: [1, 2, 4, 8, 16][i], slots_of=lambda _: 32
  )
  expected = sum(2 ** (step - 1) for step in of) / (32 * len(of))
  assert train.row_fill(plan, number, every=every) == expected
