"""Slices by name; what is wrong with a name or a compiler is one line."""

import importlib.metadata

import pytest

from dpo_jax import topologies


@pytest.mark.parametrize(
  'name, shape, chips, sold',
  [
    ('v5e:16x16', (16, 16), 256, 'v5e-256'),
    ('v5e-8', (2, 4), 8, 'v5e-8'),
    ('v6e-64', (8, 8), 64, 'v6e-64'),
    # The number of v4 and v5p is that of cores, two a chip.
    ('v4-32', (2, 2, 4), 16, 'v4-32'),
    ('v5p-128', (4, 4, 4), 64, 'v5p-128'),
    ('v5p:4x8x8', (4, 8, 8), 256, 'v5p-512'),
  ],
)
def test_slices_have_the_shape_that_they_are_sold_with(
  name, shape, chips, sold
):
  topology = topologies.find(name)
  assert topology.shape == shape and topology.chips == chips
  assert topology.cloud_name == sold
  assert topologies.find(str(topology)) == topology


@pytest.mark.parametrize(
  'name, message',
  [
    ('v5-8', "unknown kind of TPU 'v5'; did you mean"),
    ('h100', 'There are v4, v5e, v5p, v6e'),
    ('v5e-7', 'there are v5e-1, v5e-4, v5e-8'),
    ('v4-9', 'there are v4-8'),
    ('v5e:4x4x4', 'a v5e has 2 dimensions, such as v5e:4x4'),
    ('v5e:0x4', 'each at most 16'),
    ('v5e', 'such as v5e:4x4'),
  ],
)
def test_an_unknown_slice_shows_those_there_are(name, message):
  with pytest.raises(ValueError, match=message) as error:
    topologies.find(name)
  assert '\n' not in str(error.value)


def give_versions(monkeypatch, libtpu):
  def version(name):
    if name == 'libtpu':
      if libtpu is None:
        raise importlib.metadata.PackageNotFoundError(name)
      return libtpu
    return '0.10.2'

  monkeypatch.setattr(importlib.metadata, 'version', version)
  monkeypatch.setattr(
    importlib.metadata,
    'requires',
    lambda _: ['numpy', 'libtpu==0.0.42.*; extra == "tpu"'],
  )


def test_a_compiler_that_is_missing_or_of_another_version_is_refused(
  monkeypatch,
):
  topology = topologies.find('v5e-8')
  give_versions(monkeypatch, None)
  with pytest.raises(
    ValueError, match=r"libtpu 0.0.42.\*; pip install 'jax\[tpu\]==0"
  ):
    topologies.devices(topology)
  give_versions(monkeypatch, '0.0.41.1')
  with pytest.raises(ValueError, match=r'libtpu 0\.0\.41\.1 is installed'):
    topologies.devices(topology)
  give_versions(monkeypatch, '0.0.42.1')
  topologies.check_libtpu()
  for told in (['numpy'], None):  # a JAX that was not released
    monkeypatch.setattr(importlib.metadata, 'requires', lambda _, t=told: t)
    with pytest.raises(ValueError, match='does not say which libtpu') as error:
      topologies.check_libtpu()
    assert '\n' not in str(error.value)


def test_a_chips_clock_and_matrix_units_make_its_peak():
  for chip in topologies.CHIPS.values():
    units = chip.flops / (2 * chip.side**2 * chip.clock)
    assert units == pytest.approx(round(units), rel=2e-3)
