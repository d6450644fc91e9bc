"""Parameters go from file to device piece by piece, and own their memory."""

import dataclasses
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest

from dpo_jax import exports
from dpo_jax import policies
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import weights
from dpo_jax.models import layouts
from dpo_jax.models import presets
from dpo_jax.models import transformer
from tests import weights_test

GOLDEN = weights_test.GOLDEN
assert_trees_equal = weights_test.assert_trees_equal


def test_opening_reads_no_numbers(monkeypatch):
  folder = GOLDEN / 'llama_untied'
  expected = weights.load(folder).params
  read = weights._read_bytes
  reads = []
  monkeypatch.setattr(
    weights, '_read_bytes', lambda *a: reads.append(a) or read(*a)
  )
  checkpoint = weights.open_checkpoint(folder)
  assert not reads
  assert_trees_equal(weights.assemble(checkpoint), expected)
  assert len(reads) == len(checkpoint.tensors)  # each once


def shardings_of(config, mesh_shape):
  mesh = jax.make_mesh(
    mesh_shape,
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[: np.prod(mesh_shape)],
  )
  even = dataclasses.replace(config, vocab_size=64)  # an odd one is refused
  boxed = jax.eval_shape(
    lambda: transformer.init_params(even, jax.random.key(0))
  )
  return sharding.parameter_shardings(boxed, mesh)


@pytest.mark.parametrize('mesh_shape', [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize('name', ['qwen3', 'gpt2'])
def test_placed_parameters_are_the_assembled_ones(name, mesh_shape):
  checkpoint = weights.open_checkpoint(GOLDEN / name)
  # Widths of the golden models do not all divide; those of one that do.
  shardings = shardings_of(checkpoint.config, mesh_shape)
  shardings = jax.tree.map(
    lambda s, shape: s if fits(s, shape) else unsharded(s),
    shardings,
    layouts.tree(checkpoint.shapes),
    is_leaf=lambda x: isinstance(x, jax.sharding.Sharding),
  )
  placed = weights.place(
    checkpoint,
    shardings,
    dtype_of=lambda path: 'float32' if 'norm' in path else 'bfloat16',
  )
  assembled = weights.assemble(checkpoint, dtype='float32')
  for (path, x), sharding_, y in zip(
    jax.tree.leaves_with_path(placed),
    jax.tree.leaves(shardings),
    jax.tree.leaves(assembled),
    strict=True,
  ):
    assert x.sharding.is_equivalent_to(sharding_, x.ndim)
    in_norm = 'norm' in jax.tree_util.keystr(path)
    kind = np.float32 if in_norm else ml_dtypes.bfloat16
    assert x.dtype == kind
    np.testing.assert_array_equal(x, y.astype(kind), err_msg=str(path))


def fits(sharding_, shape):
  try:
    sharding_.shard_shape(shape)
  except ValueError:
    return False
  return True


def unsharded(sharding_):
  spec = jax.sharding.PartitionSpec()
  return jax.sharding.NamedSharding(sharding_.mesh, spec)


@pytest.mark.parametrize('devices', [1, 8])
def test_placed_parameters_may_be_donated(devices):
  """They share no memory with what was read, on any device."""
  opened = weights.open_checkpoint(GOLDEN / 'llama_tied')
  pieces = [
    piece._replace(array=aligned(piece.array)) for piece in opened.read()
  ]
  before = [piece.array.copy() for piece in pieces]
  checkpoint = dataclasses.replace(opened, read=lambda: iter(pieces))
  shardings = jax.tree.map(
    unsharded,
    shardings_of(opened.config, (devices, 1, 1)),
    is_leaf=lambda x: isinstance(x, jax.sharding.Sharding),
  )
  params = weights.place(checkpoint, shardings, dtype_of=lambda _: 'float32')
  copies = jax.tree.map(np.array, params)
  for piece in pieces:
    piece.array[...] = np.nan  # the host's memory is used for something else
  assert_trees_equal(jax.device_get(params), copies)

  def step(params):
    return jax.tree.map(lambda x: 2.0 * x + 1.0, params)

  update = jax.jit(step, donate_argnums=0)
  trained = update(update(params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
  assert_trees_equal(jax.device_get(trained), step(step(copies)))
  assert all(np.isnan(piece.array).all() for piece in pieces)
  expected = weights.assemble(opened, dtype='float32')
  assert_trees_equal(copies, expected)
  assert [a.tobytes() for a in before] == [
    piece.array.tobytes() for piece in opened.read()
  ]


def aligned(array):
  """A copy where XLA on CPU takes host memory as it is."""
  room = np.empty(array.nbytes + 64, np.uint8)
  start = -room.ctypes.data % 64
  copy = room[start : start + array.nbytes].view(array.dtype)
  copy = copy.reshape(array.shape)
  copy[...] = array
  return copy


def test_placing_holds_one_tensor_of_host_memory(tmp_path):
  config = dataclasses.replace(
    presets.DEBUG['debug-llama'], vocab_size=20_000, d_ff=16_000, num_layers=4
  )
  model = weights.random(config, source='', tokenizer=None)
  model = exports.with_parameters(model, weights.assemble(model))
  exports.write(model, tmp_path / 'm', shard_size=10**7)
  checkpoint = weights.open_checkpoint(tmp_path / 'm')
  sizes = [np.prod(t.shape) * 4 for t in checkpoint.tensors.values()]
  shardings = shardings_of(config, (1, 8, 1))

  def place():
    return weights.place(
      checkpoint, shardings, dtype_of=lambda _: np.dtype('bfloat16')
    )

  place()  # Compiles.
  tracemalloc.start()  # It sees the memory of numpy, not that of XLA.
  place()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert sum(sizes) > 10 * max(sizes)
  assert max(sizes) <= peak < 1.5 * max(sizes)


@pytest.mark.parametrize('param_dtype', ['float32', 'compute'])
def test_open_model_stores_what_it_is_asked_for(param_dtype):
  model = dict(dtype='bfloat16', remat='none', scan_unroll=1, gather_share=0.0)
  model = settings.Settings(model | dict(source='debug-gpt2'))
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
  config, params, _ = policies.open_model(
    model, mesh=mesh, param_dtype=param_dtype
  )
  assert config.dtype == 'bfloat16'
  for path, leaf in jax.tree.leaves_with_path(params):
    in_norm = 'norm' in jax.tree_util.keystr(path)
    half = param_dtype == 'compute' and not in_norm
    assert leaf.dtype == ('bfloat16' if half else 'float32'), path
  with pytest.raises(ValueError, match="unknown param_dtype 'float16'"):
    policies.open_model(model, mesh=mesh, param_dtype='float16')


def test_random_models_have_the_shape_of_a_published_one():
  checkpoint = policies.open_source('random:gpt2')
  assert checkpoint.config == presets.MODELS['gpt2']
  assert checkpoint.tokenizer.vocab_size == 257
  with pytest.raises(ValueError, match="did you mean 'gpt2-large'"):
    policies.open_source('random:gpt2-larg')
