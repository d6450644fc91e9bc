"""Programs are read as they run: loops in full, every collective once."""

import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dpo_jax import hlo
from dpo_jax import hlo_counts
from dpo_jax import logps
from dpo_jax import objectives
from dpo_jax import optim
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax.data import batches
from dpo_jax.losses import table
from dpo_jax.models import transformer
from tests import worlds

# What a TPU's compiler writes: a loop whose turns follow from constants (start
# 4, limit 10, step 2), in it a dot as a convolution whose window dimension is
# three heads, a gather whose start and end are two fusions of one channel, a
# reduce-scatter as an all-reduce that is sliced, a kernel; then a loop of which
# the data decides.
GOLDEN = pathlib.Path(__file__).parent / 'golden'
TPU = GOLDEN / 'tpu_program.hlo'


def test_what_a_tpu_compiler_writes_is_counted_as_it_runs():
  program = hlo.parse(TPU.read_text())
  main = program.computations['main']
  loops = [main.instructions[name] for name in ('while.1', 'while.2')]
  turns = [hlo.trip_count(program, main, loop) for loop in loops]
  assert turns == [3, None]

  account = hlo_counts.count(program, turns={'chunks': 5})
  # Of 3 x 3 places of window and result, three meet the one input.
  assert account.flops == 3 * (2 * 128 * 4 * 64 * 3)
  assert account.cycles == account.product_cycles + 3 * 10 == 3 * 1010
  assert account.kernels == {'attend': 3}
  assert not account.unknown
  counts = {kind: t.count for kind, t in account.collectives.items()}
  assert counts == {
    'all-gather': 3,
    'reduce-scatter': 3,
    'collective-permute': 5,
  }
  gathered = account.collectives['all-gather']
  assert gathered.payload == 3 * 128 * 32 * 2
  assert gathered.linked == gathered.payload * 7 / 8
  scattered = account.collectives['reduce-scatter']
  assert scattered.payload == 3 * 64 * 128 * 4
  assert scattered.linked == scattered.payload * 7 / 8
  permuted = account.collectives['collective-permute']
  assert permuted.payload == permuted.linked == 5 * 8 * 8 * 2


@pytest.mark.parametrize(
  'text, size',
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}', 4),
    ('replica_groups=[16,16]<=[256], dimensions={1}', 16),
    ('replica_groups=[32,8]<=[16,16]T(1,0)', 8),
    ("replica_groups=mesh['axis_0'=256,'axis_1'=1] {'axis_0'}", 256),
    ("replica_groups=mesh['a'=2,'b'=4,'c'=8] {'a','c'}", 16),
    ('dimensions={0}', 0),
  ],
)
def test_groups_are_read_in_all_their_spellings(text, size):
  assert hlo_counts.group_size(text) == size


def counted(function, *args, turns=types.MappingProxyType({})):
  compiled = jax.jit(function).lower(*args).compile()
  program = hlo.parse(compiled.as_text())
  return hlo_counts.count(program, turns=turns)


def test_loops_of_a_compiled_program_count_in_full():
  x, weights = jnp.ones((8, 16)), jnp.ones((5, 3, 16, 16))

  def layers(x, weights):
    def outer(x, pair):
      inner = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, pair)
      return inner[0], None

    return jax.lax.scan(outer, x, weights)[0]

  account = counted(layers, x, weights)
  assert account.flops == 5 * 3 * (2 * 8 * 16 * 16)
  assert not account.unknown


def test_a_loop_of_the_datas_length_counts_as_told_by_its_scope():
  def function(x, turns):
    with jax.named_scope('words'):
      return jax.lax.fori_loop(0, turns, lambda _, x: jnp.tanh(x @ x), x)

  args = (jnp.ones((16, 16)), jnp.int32(3))
  account = counted(function, *args, turns={'words': 7})
  assert account.flops == 7 * 2 * 16**3 and not account.unknown
  account = counted(function, *args, turns={'word': 7})
  assert account.flops == 2 * 16**3
  assert account.unknown == {'jit(function)/words/while'}


def test_loops_of_a_derivative_are_in_the_scope_of_what_is_derived():
  program = hlo.parse(
    TPU.read_text().replace('jvp()/chunks', 'transpose(jvp(chunks))')
  )
  account = hlo_counts.count(program, turns={'chunks': 5})
  assert not account.unknown
  assert account.collectives['collective-permute'].count == 5


def test_a_loop_that_no_constant_ends_is_not_taken_for_one_that_is_known():
  program = hlo.parse(TPU.read_text().replace('constant(10)', 'constant(?)'))
  account = hlo_counts.count(program, turns={'chunks': 5})
  assert account.unknown == {'while.1'}
  assert account.flops == 2 * 128 * 4 * 64 * 3  # once
  assert account.collectives['collective-permute'].count == 5


def test_an_asynchronous_gather_of_several_arrays_counts_all_of_them():
  program = hlo.parse((GOLDEN / 'gathers.hlo').read_text())
  account = hlo_counts.count(program)
  (kind,) = account.collectives
  traffic = account.collectives[kind]
  assert kind == 'all-gather' and traffic.count == 1
  assert traffic.payload == 32 * 8 * 2 + 16 * 16 * 4


@pytest.mark.parametrize(
  'branches',
  [
    'branch_computations={%small, %large}',
    'branch_computations={%large, %small}',
    'true_computation=%large, false_computation=%small',
  ],
)
def test_of_the_branches_of_a_condition_the_costliest_counts(branches):
  text = (GOLDEN / 'branches.hlo').read_text().replace('BRANCHES', branches)
  program = hlo.parse(text)
  account = hlo_counts.count(program)
  assert account.flops == 2 * (2 * 8**3)
  assert account.collectives['all-reduce'].payload == 8 * 8 * 4


def test_of_what_a_fusion_within_a_fusion_slices_the_slice_is_read():
  text = (GOLDEN / 'slices.hlo').read_text()
  matrix, stack = 8 * 8 * 4, 36 * 8 * 8 * 4
  sliced = hlo_counts.count(hlo.parse(text))
  assert sliced.memory_bytes == 3 * matrix  # slice, weight and product
  assert sliced.flops == 2 * 8**3
  whole = text.replace('dynamic-slice(', 'reduce(')
  read = hlo_counts.count(hlo.parse(whole)).memory_bytes
  assert read == stack + 2 * matrix


def test_collectives_of_a_mesh_are_counted_by_kind_and_bytes():
  mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)

  def place(shape, *spec):
    where = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

  def function(x, weights):
    return jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0])

  account = counted(
    function, place((16, 32), 'fsdp'), place((4, 32, 32), None, 'fsdp')
  )
  assert account.flops == 4 * 2 * 2 * 32 * 32  # two rows on each device
  gathers = account.collectives['all-gather']
  assert gathers.count == 4 and gathers.payload == 4 * 32 * 32 * 4
  assert gathers.linked == gathers.payload * 7 / 8
  assert account.collectives['all-reduce'].count == 1


def training_step(model_config, plan, *, accumulate, chunk):
  """The step and shapes of its arguments, on one device."""
  sums = worlds.make_sums(model_config, chunk=chunk)
  schedule = optim.learning_rate(
    lr=1e-3,
    schedule='constant',
    warmup_steps=0,
    warmup_init=1.0,
    num_steps=1,
  )
  tx = optim.make(
    'adamw', schedule, clip_norm=1.0, keywords=optim.OPTIMIZERS['adamw']
  )
  step = steps.make_step(
    sums,
    tx,
    schedule,
    batch_size=len(plan.steps[0]),
    accumulate=accumulate,
  )
  params = worlds.params_of(model_config)
  state = steps.State(params, tx.init(params), jnp.int32(0), None, {})
  return step, (state, {'base': None, 'ref': params}, plan.batch(0))


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_flops_of_the_compiled_step_are_what_its_maths_asks_for(
  family, accumulate
):
  config = worlds.FAMILIES[family]
  groups = worlds.make_groups(8)
  plan = batches.plan_steps(
    groups, [list(range(8))], row_length=40, multiple=2, window=None
  )
  R, T, S = plan.shape_of(0)
  # In two chunks; of a single one XLA keeps the logits for the backward pass.
  function, args = training_step(
    config, plan, accumulate=accumulate, chunk=R // accumulate * S // 2
  )
  account = counted(function, *args, turns={logps.SCOPE: 2})
  D, H, N, K = (
    config.d_model,
    config.head_dim,
    config.num_heads,
    config.num_kv_heads,
  )
  matrices = 3 if config.mlp == 'swiglu' else 2
  parameters = config.num_layers * (
    D * H * 2 * (N + K) + matrices * D * config.d_ff
  )
  # Forward of reference and policy, and twice that backward.
  layers = 4 * 2 * parameters * R * T
  scores = 4 * 4 * R * T * T * N * H * config.num_layers
  # Forward twice; backward the logits again, the hidden state's gradient and
  # the unembedding's.
  head = 5 * 2 * R * S * D * config.vocab_size
  assert account.flops == pytest.approx(layers + scores + head, rel=1e-9)


def test_pairs_are_formed_without_a_collective():
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  rows = sharding.of_rows(mesh)

  def pairs(values_RQ):
    R, Q = values_RQ.shape
    values_RGK = values_RQ.reshape(R, Q // 2, 2)
    return values_RGK[..., 0] - values_RGK[..., 1]

  values = jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=rows)
  account = counted(functools.partial(pairs), values)
  assert not account.collectives


def test_the_losses_of_a_batch_need_one_sum_over_devices():
  """From log-probs on, only totals cross devices: scalars, by all-reduces."""
  mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
  plan = batches.plan_steps(
    worlds.make_groups(16),
    [list(range(16))],
    row_length=24,
    multiple=8,
    window=None,
  )
  rows = sharding.of_rows(mesh)
  batch = plan.batch(0)
  batch['ref_token_logps'] = np.zeros(batch['target'].shape, np.float32)
  inputs = sharding.abstract(batch, jax.tree.map(lambda _: rows, batch))
  config = worlds.LLAMA
  params = jax.eval_shape(lambda: worlds.params_of(config))
  where = sharding.replicated(mesh)
  params = sharding.abstract(params, jax.tree.map(lambda _: where, params))
  sums = objectives.make_sums(
    config,
    table.bind(table.section('dpo')),
    chunk=10**6,
    reference='cached',
    responses=2,
    form='pairs',
    rewards=False,
  )
  with sharding.use(mesh):
    account = counted(
      lambda params, batch: sums({'params': params}, None, batch, {})[0],
      params,
      inputs,
    )
  assert set(account.collectives) <= {'all-reduce'}
  assert account.collectives['all-reduce'].payload < 1024
  assert transformer.unembedding(params).shape == (50, 16)
