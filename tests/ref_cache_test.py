import dataclasses

import jax
import numpy as np
import pytest

from dpo_jax import objectives
from dpo_jax import ref_cache
from dpo_jax import sharding
from dpo_jax.data import batches
from dpo_jax.data import examples
from tests import worlds

GROUPS = worlds.make_groups(40)


def fill(folder, *, batch_size=8, stop_after=None, model=worlds.LLAMA, scale=1):
  """Fills the cache of `GROUPS`; returns (values, batches computed)."""
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  plan = batches.evaluation_plan(
    GROUPS, batch_size=batch_size, row_length=48, multiple=8, window=None
  )
  token_logps = objectives.make_token_logps(model, chunk=64)
  params = jax.device_put(
    jax.tree.map(lambda x: scale * x, worlds.params_of(model)),
    sharding.replicated(mesh),
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
      model,
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


def test_runs_that_begin_together_fill_one_file(tmp_path, monkeypatch):
  compute, others = ref_cache.compute, []

  def beside(token_logps, variables, plan, mesh, values, *, name):
    (partial,) = tmp_path.glob('*.partial')  # another run begins, and is killed
    path = str(partial).removesuffix('.partial')
    others.append(ref_cache._open_partial(path, len(values), {}))
    compute(token_logps, variables, plan, mesh, values, name=name)

  monkeypatch.setattr(ref_cache, 'compute', beside)
  ours, _ = fill(tmp_path)
  np.testing.assert_array_equal(others[0], ours)
  later, computed = fill(tmp_path)
  assert computed == 0
  np.testing.assert_array_equal(later, ours)


@pytest.mark.parametrize('damage', ['cut', 'nan', 'short'])
def test_a_damaged_file_is_computed_again(tmp_path, damage, capsys):
  whole, _ = fill(tmp_path)
  (path,) = tmp_path.glob('*.npy')
  if damage == 'cut':
    path.write_bytes(path.read_bytes()[:-8])
  else:
    np.save(
      path, whole[:-1] if damage == 'short' else np.full_like(whole, np.nan)
    )
  again, computed = fill(tmp_path)
  assert computed == 5 and 'is damaged' in capsys.readouterr().out
  np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize('left', [40, -4])
def test_a_partial_file_cut_short_is_begun_again(tmp_path, left, capsys):
  whole, _ = fill(tmp_path / 'whole')
  with pytest.raises(KeyboardInterrupt):
    fill(tmp_path / 'cut', stop_after=2)
  (path,) = (tmp_path / 'cut').glob('*.partial')
  path.write_bytes(path.read_bytes()[:left])
  again, computed = fill(tmp_path / 'cut')
  said = capsys.readouterr().out
  assert computed == 5 and '.npy.partial is damaged: it is computed' in said
  np.testing.assert_array_equal(again, whole)


def test_a_reference_without_finite_numbers_is_refused(tmp_path):
  with pytest.raises(FloatingPointError, match='weights are broken'):
    fill(tmp_path, scale=np.nan)
  assert not list(tmp_path.glob('*.npy'))


def test_what_differs_from_the_cache_is_said(tmp_path, capsys):
  fill(tmp_path)
  assert 'there are none in' in capsys.readouterr().out
  low = dataclasses.replace(worlds.LLAMA, dtype='bfloat16')
  values, computed = fill(tmp_path, model=low)
  said = capsys.readouterr().out
  assert computed == 5 and "model.dtype ('float32', now 'bfloat16')" in said
  other, computed = fill(tmp_path, scale=1.5)
  assert computed == 5 and 'have other weights' in capsys.readouterr().out
  assert np.abs(other - values).max() > 1e-3
  with jax.default_matmul_precision('highest'):
    _, computed = fill(tmp_path)
  said = capsys.readouterr().out
  assert computed == 5 and "precision ('None', now 'highest')" in said


def test_the_number_of_responses_is_part_of_the_key():
  a, b, c = (np.array([n], np.int32) for n in range(3))

  def digest(*groups):
    return ref_cache.groups_digest(
      [examples.Group(p, rest, 1.0, 1.0, 'x') for p, *rest in groups]
    )

  assert digest((a, b, c)) != digest((a, b), (c,))
  assert digest((a, b, c)) == digest((a, b, c))
