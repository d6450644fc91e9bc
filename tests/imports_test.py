"""The rooms of README's map, held by walking the imports."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

from dpo_jax.losses import table

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'dpo_jax'

DEVICE_MATHS = {
  'attention',
  'attention_blocks',
  'attention_tpu',
  'losses',
  'logps',
  'rl',
  'sampling',
}
HOST = {
  'data',
  'rewards',
  'sentiment',
  'judges',
  'reweighting',
  'frontiers',
  'report',
  'constraints',
}
# What a room's files must not import: names of packages, or of modules of ours.
MACHINE = {
  'accounting',
  'sharding',
  'processes',
  'launches',
  'digests',
  'optim',
  'causes',
  'checkpoint',
  'compile_check',
  'hlo',
  'hlo_counts',
  'topologies',
  'metrics',
  'weights',
  'adapters',
  'exports',
  'fetch',
  'folders',
  'workdirs',
}
MIDDLE = {
  'checks',
  'objectives',
  'evaluators',
  'ref_cache',
  'runs',
  'steps',
  'policies',
  'reward_models',
  'conversions',
  'updates',
  'progress',
  'rollouts',
}
# What every room may import, because it imports nothing of ours.
LEAVES = {'names'}
LOOPS = {
  'train',
  'ppo',
  'rounds',
  'online',
  'programs',
  'compilations',
  'main',
}
HOST_FORBIDDEN = {'jax', 'flax', 'optax', 'orbax', 'ml_collections'}
MATHS_FORBIDDEN = {
  'absl',
  'os',
  'io',
  'pathlib',
  'time',
  'tensorflow_datasets',
  'ml_collections',
  'orbax',
  'optax',
}


def room(path):
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  if parts[0] in HOST:
    return 'host'
  if parts[0] == 'models' or parts[0] in DEVICE_MATHS:
    return 'maths'
  for name, members in [
    ('leaf', LEAVES),
    ('machine', MACHINE | {'settings'}),
    ('middle', MIDDLE),
    ('loops', LOOPS),
  ]:
    if parts[0] in members:
      return name
  raise AssertionError(f'{path} is in no room; put it on the map')


def imports(path):
  """Returns (packages from outside, our own modules) of a file."""
  outside, ours = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      outside |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      top, *rest = node.module.split('.')
      if top == 'dpo_jax':
        names = [alias.name for alias in node.names]
        ours |= {rest[0]} if rest else set(names)
      else:
        outside.add(top)
  return outside, ours


FILES = sorted(p for p in PACKAGE.rglob('*.py') if p.name != '__init__.py')


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_in_their_rooms(path):
  outside, ours = imports(path)
  ours -= LEAVES
  where = room(path)
  assert 'configs' not in outside and 'tests' not in outside
  if where == 'host':
    assert not outside & HOST_FORBIDDEN
    # What the host room asks of the machine room: downloads, and whole files.
    assert ours <= HOST | {'fetch', 'folders'}
  elif where == 'leaf':
    assert outside <= {'difflib'} and not ours
  elif where == 'maths':
    assert not outside & MATHS_FORBIDDEN
    assert ours <= {'models'} | DEVICE_MATHS
  elif where == 'machine':
    assert ours <= MACHINE | {'models', 'data'}
  elif where == 'middle':
    assert not ours & LOOPS
  if where != 'loops':
    assert not ours & {'main'}


def test_no_loss_is_named_outside_the_table():
  known = {*table.LOSSES, *table.SUMS, *table.ELSEWHERE}
  # 'sft' is also a form of data; the table itself names losses, but compares
  # none either.
  for path in FILES:
    allowed = {'sft'} if room(path) == 'host' else set()
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Compare):
        for side in (node.left, *node.comparators):
          compared = {
            leaf.value
            for leaf in ast.walk(side)
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
          }
          assert not compared & known - allowed, f'{path}:{node.lineno}'


def test_importing_starts_no_device():
  modules = [
    str(path.relative_to(ROOT).with_suffix('')).replace('/', '.')
    for path in FILES
  ]
  code = f'import {", ".join(modules)}, configs.common'
  # A platform that does not exist: whatever asks for devices raises.
  env = os.environ | {'JAX_PLATFORMS': 'nowhere', 'PYTHONPATH': str(ROOT)}
  subprocess.run([sys.executable, '-c', code], env=env, check=True)


def test_package_inits_are_empty():
  for path in PACKAGE.rglob('__init__.py'):
    assert not path.read_text().strip(), path
