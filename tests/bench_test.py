"""The benchmarks: their account, and that they refuse to compare unlikes."""

import json
import sys
import types

import numpy as np
import pytest

from dpo_jax import weights
from experiments import bench_peers
from experiments import bench_step

# Rank 16 on all seven matrices of one layer: width 16, MLP 48.
ADAPTER = 16 * (4 * (16 + 16) + 3 * (16 + 48))


def options(**changes):
  values = dict(
    shape='1/16/2/64',
    data='uniform',
    batch_size=8,
    steps=2,
    row_length=256,
    chunk=512,
    reference=['frozen'],
    dtype='float32',
    remat='none',
    trace='',
    platform='cpu',
  )
  return types.SimpleNamespace(**(values | changes))


# A live reference, the usual case, is what `ours` is asked for below.
def test_a_step_is_counted_as_what_it_is(tmp_path):
  how = options(trace=str(tmp_path), reference=['cached', 'adapter_off'])
  accounts, plan = bench_step.bench(how)
  assert list(tmp_path.rglob('*.xplane.pb'))
  assert list(accounts) == how.reference
  for reference, account in accounts.items():
    check_account(account, plan, reference)


def check_account(account, plan, reference):
  # Eight rows, one a device; a pair is three times 64 tokens.
  assert plan.shape_of(0)[:2] == (8, 256) and plan.num_steps == 3
  np.testing.assert_array_equal(account.pairs, [8, 8])
  np.testing.assert_array_equal(account.tokens, [8 * 3 * 64] * 2)
  np.testing.assert_array_equal(account.slots, [8 * 256] * 2)
  rows = account.rows()
  np.testing.assert_allclose(rows['row fill'], 3 * 64 / 256)
  np.testing.assert_allclose(rows['pairs/s'] * account.wall, 8)
  # Width 16, one layer: 4 d^2 of attention, 3 d 3d of the MLP.
  tokens, scored, matrices = 8 * 192, 8 * 128, 4 * 256 + 3 * 16 * 48
  seen = 8 * (128 * 129 / 2 + 64 * 64 + 64 * 65 / 2)
  forward = 2 * matrices * tokens
  attend, head = 4 * 16 * seen, 2 * 16 * 64 * scored
  expected = {
    'cached': 3 * (forward + attend + head),
    'adapter_off': 3 * forward + 4 * attend + 3 * head + 6 * tokens * ADAPTER,
  }
  np.testing.assert_allclose(account.flops, expected[reference], rtol=1e-9)
  assert account.wall.min() > 0 and account.peak_memory > 2**26
  # Near log 2 on new pairs, but the parameters have moved.
  assert 0 < np.abs(account.loss - np.log(2)).max() < 0.1
  assert '0.750' in str(account).split('row fill')[1].splitlines()[0]


def test_an_unknown_shape_is_told_what_there_is():
  with pytest.raises(SystemExit, match='layers/width/heads/vocabulary'):
    bench_step.model_shape('smollm')
  assert bench_step.model_shape(bench_step.TOY).vocab_size == 49152


def results(**losses):
  return {
    name: bench_peers.Result(of_name, [2.0, 4.0], [2.0, 4.0], 2**30)
    for name, of_name in losses.items()
  }


def test_peers_are_compared_by_process_time():
  sides = results(ours=[0.7, 0.6, 0.5], peer=[0.7, 0.6, 0.5005])
  sides['peer'].process = [8.0, 12.0]
  text = bench_peers.table(sides, pairs=16, tokens=[320, 640])
  peer = next(line for line in text.splitlines() if 'peer |' in line)
  cells = [cell.strip() for cell in peer.split('|')[2:-1]]
  assert cells[0] == '8.00 / 10.00 / 12.00'
  assert cells[1] == '1.333 / 1.667 / 2.000'
  assert cells[2] == '40.0 / 46.7 / 53.3'
  assert cells[4] == '1.00' and cells[5] == '3.00 / 3.50 / 4.00'
  assert 'agree to 5.0e-04 on 3 steps' in text


@pytest.mark.parametrize('wrong', [0.602, np.nan])
def test_no_table_where_losses_disagree(wrong):
  sides = results(ours=[0.7, 0.6, 0.5], peer=[0.7, wrong, 0.5])
  with pytest.raises(SystemExit, match='losses of step 2 differ'):
    bench_peers.check_losses(sides)


def test_all_sides_get_the_pairs_of_the_plan_and_both_checkpoints(tmp_path):
  config = bench_step.model_shape('1/16/2/300')
  bench_peers.write_checkpoints(tmp_path, config)
  groups = bench_step.uniform_groups(12, vocab_size=300)
  how = options(batch_size=4, steps=1)
  tokens = bench_peers.write_task(tmp_path, groups, how)
  task = json.loads((tmp_path / 'task.json').read_text())
  assert tokens == [4 * 3 * 64] * 2  # of the three steps of an epoch
  seen = [tuple(pair['prompt']) for step in task['steps'] for pair in step]
  assert sorted(seen) == sorted(tuple(g.prompt.tolist()) for g in groups)
  policy, ref = (
    weights.assemble(weights.open_checkpoint(tmp_path / name))
    for name in ('policy', 'ref')
  )
  there = policy['embed']['tokens'] - ref['embed']['tokens']
  np.testing.assert_allclose(
    there.std() / policy['embed']['tokens'].std(), bench_peers.NEAR, rtol=0.1
  )


def test_a_peer_does_the_steps_that_it_is_told_to(tmp_path):
  bench_peers.write_checkpoints(tmp_path, bench_step.model_shape('1/16/2/300'))
  groups = bench_step.uniform_groups(8, vocab_size=300)
  task = options(batch_size=2, micro=2, core='0')
  bench_peers.write_task(tmp_path, groups, task)
  side = bench_peers.Side('ours', sys.executable, tmp_path, task)
  try:
    one, two = side.steps(1), side.steps(2)
  finally:
    side.close()
  assert 'jax' in side.versions
  assert len(one['losses']) == 1 and len(two['losses']) == 2
  # The reference is not the policy, so even the first loss says something.
  assert np.ptp(one['losses'] + two['losses']) > 1e-5
  assert min(two['process'], two['wall'], two['peak_memory']) > 0


def test_a_peer_that_fails_is_shown(tmp_path):
  with pytest.raises(SystemExit, match=r'(?s)nobody ended:.*No module named'):
    bench_peers.Side(
      'nobody', sys.executable, tmp_path, options(micro=2, core='0')
    )
