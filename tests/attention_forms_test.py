"""The blocked forms of interval attention against the dense one."""

import functools
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from dpo_jax import attention
from dpo_jax import attention_blocks
from dpo_jax import attention_tpu
from dpo_jax import sharding
from dpo_jax.data import examples
from dpo_jax.data import rows

SCALE = 0.3
BLOCKS = attention_blocks.forward, attention_blocks.backward
KERNELS = attention_tpu.forward, attention_tpu.backward
FORMS = {
  'blocks': (*BLOCKS, dict(block_q=8, block_k=16)),
  'all keys at once': (*BLOCKS, dict(block_q=8, block_k=None)),
  'kernels': (*KERNELS, dict(interpret=True)),
}
SKIPPING = ('blocks', 'kernels')


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
  """A function of (query, ..., hi, scale, cap) with small blocks."""
  monkeypatch.setattr(attention_tpu, 'block_sizes', lambda _: (8, 16))
  return _form(request.param)


def _form(name):
  forward, backward, options = FORMS[name]

  def attend(*args, scale=SCALE, cap=None):
    options_ = dict(scale=scale, cap=cap, **options)
    return attention.blocked(forward, backward, **options_)(*args)

  return attend


def ragged(queries, slots, rng):
  lo = rng.integers(0, slots, (2, queries))
  return lo, lo + 1 + rng.integers(0, slots - lo)


def packed(queries, slots, rng):
  """Rows of pairs, and what is left is padding; keys as many as queries."""
  assert queries == slots
  groups = [
    examples.Group(
      prompt=np.zeros(rng.integers(2, 12), np.int32),
      responses=tuple(np.zeros((2, rng.integers(1, 6)), np.int32)),
      weight=1.0,
      p=1.0,
      id='',
    )
    for _ in range(3)
  ]
  batch = rows.fill(
    groups,
    [[0, 1], [2]],
    row_length=slots,
    row_scored=slots,
    row_groups=2,
    responses=2,
    window=None,
  )
  assert batch['lo'][1, -1] == slots - 1  # padding
  return batch['lo'], batch['hi']


def windowed(queries, slots, rng):
  lo, hi = packed(queries, slots, rng)
  return np.maximum(lo, np.arange(slots) - 4), hi


def cached(queries, slots, rng):
  """The prompt's queries of a cache with room: the last keys are never seen."""
  assert queries < slots
  lo = np.tile(rng.integers(0, 5, (2, 1)), (1, queries))
  return lo, np.maximum(np.arange(queries) + 1, lo + 1)


def inputs(intervals, *, queries, slots, heads, kv_heads, dtype=np.float32):
  rng = np.random.default_rng(0)
  query = rng.normal(size=(2, queries, heads, 8))
  key, value = rng.normal(size=(2, 2, slots, kv_heads, 8))
  lo, hi = intervals(queries, slots, rng)
  arrays = [jnp.asarray(x, dtype) for x in (query, key, value)]
  return *arrays, jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


def values_and_gradients(attend, args):
  """Of a weighted sum of outputs with a weight of its own for each."""
  *arrays, lo, hi = args

  @jax.jit
  def run(arrays):
    out, vjp = jax.vjp(lambda *xs: attend(*xs, lo, hi), *arrays)
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return out, vjp(weights.astype(out.dtype))

  return run(arrays)


def assert_same(one, other, *, values=1e-5, gradients=1e-4):
  np.testing.assert_allclose(one[0], other[0], atol=values)
  for a, b in zip(one[1], other[1]):
    np.testing.assert_allclose(a, b, atol=gradients * np.abs(b).max())


@pytest.mark.parametrize(
  'intervals, queries, slots, heads, kv_heads, cap',
  [
    (ragged, 37, 50, 2, 2, None),
    (ragged, 37, 50, 4, 2, 0.4),
    (packed, 48, 48, 4, 2, None),
    (windowed, 48, 48, 3, 1, None),
    (cached, 21, 60, 4, 2, None),
  ],
)
def test_form_equals_dense(
  form, intervals, queries, slots, heads, kv_heads, cap
):
  args = inputs(
    intervals, queries=queries, slots=slots, heads=heads, kv_heads=kv_heads
  )
  dense = functools.partial(attention.dense, scale=SCALE, cap=cap)
  expected = values_and_gradients(dense, args)
  if cap is not None:
    uncapped = attention.dense(*args, scale=SCALE, cap=None)
    assert np.abs(uncapped - expected[0]).max() > 0.01
  attend = functools.partial(form, cap=cap)
  assert_same(values_and_gradients(attend, args), expected)


@pytest.mark.parametrize('heads, kv_heads', [(2, 2), (9, 1)])
def test_kernels_equal_dense_with_the_blocks_of_a_tpu(heads, kv_heads):
  args = inputs(ragged, queries=300, slots=300, heads=heads, kv_heads=kv_heads)
  dense = functools.partial(attention.dense, scale=SCALE, cap=None)
  assert_same(
    values_and_gradients(_form('kernels'), args),
    values_and_gradients(dense, args),
  )


@pytest.mark.parametrize('name', SKIPPING)
def test_blocks_outside_the_intervals_are_not_computed(name, monkeypatch):
  monkeypatch.setattr(attention_tpu, 'block_sizes', lambda _: (8, 16))
  query, key, value, _, _ = inputs(
    ragged, queries=61, slots=64, heads=2, kv_heads=1
  )
  # Queries 0..31 see keys 0..15, queries 32..60 keys 48..63: blocks 0 and 3.
  left = np.arange(61) < 32
  lo, hi = (
    jnp.asarray(np.tile(np.where(left, *ends), (2, 1)), jnp.int32)
    for ends in [(0, 48), (16, 64)]
  )
  # A weight of zero times NaN would be NaN.
  poisoned = [x.at[:, 16:48].set(np.nan) for x in (key, value)]
  out, gradients = values_and_gradients(_form(name), (query, *poisoned, lo, hi))
  dense = functools.partial(attention.dense, scale=SCALE, cap=None)
  clean = values_and_gradients(dense, (query, key, value, lo, hi))
  assert_same((out, gradients), clean)


def test_softmax_of_a_form_is_float32_in_bfloat16(form):
  query, key, value, lo, hi = inputs(
    ragged, queries=37, slots=50, heads=2, kv_heads=2
  )
  # Scores near 19, where bfloat16 has steps of 1/8.
  query, key = (x.at[..., 0].set(8) for x in (query, key))
  low = [x.astype(jnp.bfloat16) for x in (query, key, value)]
  out, gradients = values_and_gradients(form, (*low, lo, hi))
  assert {x.dtype for x in (out, *gradients)} == {jnp.dtype('bfloat16')}
  rounded = [x.astype(jnp.float32) for x in low]
  dense = functools.partial(attention.dense, scale=SCALE, cap=None)
  expected, expected_gradients = values_and_gradients(dense, (*rounded, lo, hi))
  # Weights and output are rounded to 8 bits; scores would be off by 6 %.
  total = dense(rounded[0], rounded[1], jnp.abs(rounded[2]), lo, hi)
  bound = 2**-8 * (np.abs(expected) + total)
  assert (np.abs(out.astype(jnp.float32) - expected) <= bound).all()
  for a, b in zip(gradients, expected_gradients):
    far = np.abs(a.astype(jnp.float32) - b).max()
    assert far < 0.02 * np.abs(b).max()


def interval_attention(*args):
  return attention.interval_attention(*args, scale=SCALE, cap=None)


def test_no_form_holds_all_scores():
  args = inputs(ragged, queries=512, slots=512, heads=4, kv_heads=4)
  scores = 2 * 4 * 512 * 512 * 4

  def temporary(attend):
    *arrays, lo, hi = args
    gradients = jax.grad(lambda *xs: attend(*xs, lo, hi).sum(), (0, 1, 2))
    program = jax.jit(gradients).lower(*arrays).compile()
    return program.memory_analysis().temp_size_in_bytes

  dense = functools.partial(attention.dense, scale=SCALE, cap=None)
  assert temporary(dense) >= scores
  assert temporary(interval_attention) < scores / 4
  assert temporary(_form('all keys at once')) < scores / 4


@pytest.mark.parametrize(
  'platform, kernel, heads', [('tpu', 1, 4), ('tpu', 0, 64), ('cuda', 0, 4)]
)
def test_platform_chooses_the_form(platform, kernel, heads):
  args = inputs(packed, queries=128, slots=128, heads=heads, kv_heads=1)
  traced = jax.jit(interval_attention).trace(*args)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('tpu_custom_call') == kernel


def test_few_slots_take_the_dense_form():
  def text(queries):
    args = inputs(cached, queries=queries, slots=256, heads=2, kv_heads=2)
    return str(jax.make_jaxpr(interval_attention)(*args))

  assert 'custom_vjp' not in text(1)
  assert 'custom_vjp' in text(128)


def test_what_has_no_fast_form_is_logged_once(monkeypatch, caplog):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  args = inputs(packed, queries=130, slots=130, heads=2, kv_heads=2)
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      jax.make_jaxpr(interval_attention)(*args)
  assert len(caplog.records) == 1
  assert 'skips nothing' in caplog.text


def on_mesh(devices):
  """Returns a mesh and a function that gives a shape its place on it."""
  mesh = Mesh(
    np.array(devices).reshape(2, 2, 2),
    sharding.AXES,
    axis_types=(AxisType.Auto,) * 3,
  )

  def placed(x):
    spec = (('data', 'fsdp'), None, 'tensor')[: 2 if x.ndim == 2 else 3]
    place = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return mesh, placed


def with_gradients(query, key, value, lo, hi):
  attend = jax.checkpoint(lambda *xs: interval_attention(*xs, lo, hi))
  out, vjp = jax.vjp(attend, query, key, value)
  return out, vjp(jnp.cos(out))


COLLECTIVES = 'all-gather', 'all-reduce', 'all-to-all', 'collective-permute'


def test_each_device_attends_in_its_own_rows_and_heads():
  args = inputs(packed, queries=128, slots=128, heads=4, kv_heads=2)
  args = [jnp.tile(x, (4,) + (1,) * (x.ndim - 1)) for x in args]
  expected = jax.jit(with_gradients)(*args)
  mesh, placed = on_mesh(jax.devices())
  shapes = [placed(x) for x in args]
  with sharding.use(mesh):
    program = jax.jit(with_gradients).lower(*shapes).compile()
  assert not any(name in program.as_text() for name in COLLECTIVES)
  out = program(*(jax.device_put(x, s.sharding) for x, s in zip(args, shapes)))
  assert out[0].sharding.shard_shape(out[0].shape) == (2, 128, 2, 8)
  assert_same(out, expected)


def test_uneven_rows_take_the_dense_form(caplog):
  args = inputs(packed, queries=128, slots=128, heads=4, kv_heads=2)
  expected = jax.jit(interval_attention)(*args)
  mesh, _ = on_mesh(jax.devices())
  with sharding.use(mesh), caplog.at_level(logging.WARNING):
    out = jax.jit(interval_attention)(*args)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  assert 'dense form' in caplog.text


@pytest.fixture
def topology(monkeypatch):
  """The eight devices of a TPU v5e that is not there."""
  pytest.importorskip('libtpu', reason='no TPU compiler')
  from jax.experimental import topologies

  for name, value in {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_ID': '0',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  }.items():
    monkeypatch.setitem(os.environ, name, value)
  return topologies.get_topology_desc(
    platform='tpu',
    topology_name='v5e:2x4',
    chip_config_name='default',
    chips_per_host_bounds=(2, 2, 1),
  ).devices


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize(
  'heads, kv_heads, size, cap',
  [
    (9, 3, 64, None),
    (16, 16, 128, None),
    (8, 4, 256, 50.0),
    (32, 1, 256, 50.0),
  ],
)
def test_kernels_compile_for_a_tpu(topology, dtype, heads, kv_heads, size, cap):
  place = jax.sharding.SingleDeviceSharding(topology[0])
  arrays = [
    jax.ShapeDtypeStruct((2, 2048, n, size), dtype, sharding=place)
    for n in (heads, kv_heads, kv_heads)
  ]
  bounds = [jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=place)] * 2

  def run(query, key, value, lo, hi):
    attend = functools.partial(
      attention.interval_attention, lo_BT=lo, hi_BT=hi, scale=SCALE, cap=cap
    )
    out, vjp = jax.vjp(attend, query, key, value)
    return out, vjp(out)

  text = jax.jit(run).lower(*arrays, *bounds).compile().as_text()
  # Forward, queries' gradient, keys' and values' gradients.
  assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.slow
def test_kernels_of_a_mesh_compile_for_a_tpu(topology):
  mesh, placed = on_mesh(topology)
  args = inputs(packed, queries=512, slots=512, heads=4, kv_heads=2)
  args = [jnp.tile(x, (4,) + (1,) * (x.ndim - 1)) for x in args]
  with sharding.use(mesh):
    lowered = jax.jit(with_gradients).lower(*map(placed, args))
    text = lowered.compile().as_text()
  # And once more forward, since it is under a checkpoint.
  assert text.count('custom_call_target="tpu_custom_call"') == 4
  assert not any(name in text for name in COLLECTIVES)
