"""Eight CPU devices, caches of the tests' own, the optional shared data."""

import os
import pathlib
import tempfile

import pytest


def pytest_configure(config):
  """Sets the environment; test modules, and with them jax, come after."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    # Half the compile time; the laws under test hold at any level.
    + ' --xla_backend_optimization_level=0'
  )
  folder = tempfile.TemporaryDirectory(prefix='dpo_jax_tests_')
  config.add_cleanup(folder.cleanup)
  # What several tests, or a killed and a resumed process, compile is compiled
  # once.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = f'{folder.name}/compiled'
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  # Slow tests fetch 98 MB into the user's cache; the others leave it alone.
  if config.option.markexpr != 'slow':
    os.environ['DPO_JAX_CACHE'] = f'{folder.name}/cache'


@pytest.fixture(scope='session')
def shared():
  """Folder of extra real data and oracles; tests that need it skip without."""
  root = pathlib.Path(__file__).parents[1]
  folder = root.parent / 'shared'
  folder = pathlib.Path(os.environ.get('DPO_JAX_SHARED', folder))
  if not folder.is_dir():
    pytest.skip('no shared folder beside the checkout (see README, "Tests")')
  return folder


@pytest.fixture
def float64():
  """JAX computes in float64."""
  import jax  # not before the environment is set

  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='module', autouse=True)
def _forget_compiled():
  """Frees what a module compiled; all of it together would be gigabytes."""
  yield
  import jax  # not before the environment is set

  jax.clear_caches()
