"""Eight CPU devices, strict shapes, and the optional shared data."""

import os
import pathlib

# Before jax is imported anywhere.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  # Half the compile time; the laws under test hold at any level.
  + ' --xla_backend_optimization_level=1'
)

import pytest


@pytest.fixture(scope='session')
def shared():
  """Folder of extra real data and oracles; tests that need it skip without."""
  root = pathlib.Path(__file__).parents[1]
  folder = root.parent / 'shared'
  folder = pathlib.Path(os.environ.get('DPO_JAX_SHARED', folder))
  if not folder.is_dir():
    pytest.skip('no shared folder beside the checkout (see README, "Tests")')
  return folder
