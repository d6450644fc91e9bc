import jax
import numpy as np
import pytest

from dpo_jax import objectives
from dpo_jax import ref_cache
from dpo_jax import sharding
from dpo_jax.data import batches
from tests import worlds

GROUPS = worlds.make_groups(40)


def fill(folder, *, batch_size=8, stop_after=None):
  """Fills the cache of `GROUPS`; returns (values, batches computed)."""
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  plan = batches.evaluation_plan(
    GROUPS, batch_size=batch_size, row_length=48, multiple=8, window=None
  )
  token_logps = objectives.make_token_logps(worlds.LLAMA, chunk=64)
  params = jax.device_put(
    worlds.params_of(worlds.LLAMA), sharding.replicated(mesh)
  )
  seen, collect = [], batches.collect

  def counted(*arguments):
    if len(seen) == stop_after:
      raise KeyboardInterrupt
    seen.append(1)
    return collect(*arguments)

  with pytest.MonkeyPatch.context() as patch, sharding.use(mesh):
    patch.setattr(batches, 'collect', counted)
    values = ref_cache.load_or_compute(
      folder,
      token_logps,
      {'params': params},
      worlds.LLAMA,
      plan,
      mesh,
      name='train',
    )
  return values, len(seen)


def test_interrupted_filling_goes_on_where_it_stopped(tmp_path):
  whole, computed = fill(tmp_path / 'whole')
  assert computed == 5 and np.isfinite(whole).all()
  with pytest.raises(KeyboardInterrupt):
    fill(tmp_path / 'cut', stop_after=2)
  assert not list((tmp_path / 'cut').glob('*.npy'))
  resumed, computed = fill(tmp_path / 'cut')
  assert computed == 3
  np.testing.assert_array_equal(resumed, whole)
  again, computed = fill(tmp_path / 'cut')
  assert computed == 0
  np.testing.assert_array_equal(again, whole)
  names = sorted(path.suffix for path in (tmp_path / 'cut').iterdir())
  assert names == ['.json', '.npy']


def test_another_batch_size_goes_on_too(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    fill(tmp_path, stop_after=2)
  resumed, computed = fill(tmp_path, batch_size=16)
  assert computed == 2  # of three, of which the first is there
  whole, _ = fill(tmp_path / 'whole')
  np.testing.assert_allclose(resumed, whole, atol=1e-5)
