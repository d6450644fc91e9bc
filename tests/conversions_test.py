"""`convert`: runs of adapters, and adapters merged into models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import adapters
from dpo_jax import conversions
from dpo_jax import policies
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import weights
from dpo_jax.models import families
from dpo_jax.models import lora
from dpo_jax.models import transformer
from tests import adapting_test
from tests import worlds

TOKENS = jnp.array(np.random.default_rng(0).integers(0, 256, (2, 12)))


def hidden(config, variables):
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  return transformer.Transformer(config).apply(
    variables, TOKENS, positions, 0 * positions, positions + 1
  )


def policy_of(config, workdir):
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  return policies.open_policy(config, mesh, workdir=str(workdir))


@pytest.fixture(scope='module', params=['debug-llama', 'debug-gpt2'])
def run(request, tmp_path_factory):
  """A run of an adapter: (its folder, config, policy)."""
  tmp_path = tmp_path_factory.mktemp('run')
  config = worlds.debug_config(
    tmp_path,
    'adapter=lora',
    **adapting_test.FAST | {'model.source': request.param},
  )
  train.train(config, tmp_path / 'run')
  return tmp_path, config, policy_of(config, tmp_path / 'run')


def test_an_adapter_goes_to_peft_and_is_trained_on(run, tmp_path):
  folder, _, policy = run
  text = conversions.convert(folder / 'run', tmp_path / 'peft')
  assert 'alpha / rank 2' in text and 'adapter_model.safetensors' in text
  attributes = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
  assert attributes['base_model_name_or_path'].startswith('debug-')
  config = worlds.debug_config(
    tmp_path,
    'adapter=peft',
    **adapting_test.FAST,
    **{
      'adapter.source': str(tmp_path / 'peft'),
      'model.source': attributes['base_model_name_or_path'],
    },
  )
  assert config.reference.mode == 'frozen'
  before = hidden(policy.config, policy.variables(policy.trained))
  start = policy_of(config, '')
  np.testing.assert_allclose(
    hidden(start.config, start.variables(start.trained)), before, atol=1e-5
  )
  train.train(config, tmp_path / 'second')
  losses = adapting_test.losses_of(tmp_path / 'second')
  moved = [abs(x - adapting_test.LN2) for x in losses]
  assert moved[0] < 1e-6 and moved[-1] > 1e-3
  # And out again.
  conversions.convert(tmp_path / 'second', tmp_path / 'again')
  after = policy_of(config, tmp_path / 'second')
  _, how = policies.open_adapter(
    {'kind': 'peft', 'source': str(tmp_path / 'again')},
    after.config,
    key=jax.random.key(0),
  )
  assert how.scale == 2.0


def test_a_merged_model_says_what_the_adapter_says(run, tmp_path):
  folder, _, policy = run
  conversions.convert(folder / 'run', tmp_path / 'merged', merge=True)
  adapted = hidden(policy.config, policy.variables(policy.trained))
  loaded = weights.load(tmp_path / 'merged')
  np.testing.assert_allclose(
    hidden(policy.config, {'params': loaded.params}), adapted, atol=1e-5
  )
  base = hidden(policy.config, policy.variables(None))
  assert np.abs(adapted - base).max() > 1e-3
  # The same by way of PEFT's folder and the base.
  conversions.convert(folder / 'run', tmp_path / 'peft')
  conversions.convert(
    policy_source(folder), tmp_path / 'two', adapter=str(tmp_path / 'peft')
  )
  again = weights.load(tmp_path / 'two').params
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    again,
    loaded.params,
  )


def policy_source(folder):
  return json.loads((folder / 'run/config.json').read_text())['model']['source']


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'dtype': 'bfloat16'}, 'add --merge for a model'),
    ({'adapter': 'x'}, 'has its own, which --merge merges'),
    ({'dtype': 'float8'}, 'use one of auto'),
  ],
)
def test_what_makes_no_sense_of_an_adapter_is_refused(
  run, tmp_path, changes, message
):
  with pytest.raises(ValueError, match=message):
    conversions.convert(run[0] / 'run', tmp_path / 'out', **changes)
  assert not (tmp_path / 'out').exists()


def test_what_makes_no_sense_of_a_model_is_refused(tmp_path):
  with pytest.raises(ValueError, match='trained no adapter'):
    conversions.convert('debug-llama', tmp_path / 'out', merge=True)
  with pytest.raises(FileNotFoundError, match=r'has no adapter_config.json'):
    conversions.convert('debug-llama', tmp_path / 'out', adapter=str(tmp_path))
  assert not (tmp_path / 'out').exists()


def test_the_adapter_of_another_model_is_refused(run, tmp_path):
  folder, config, _ = run
  conversions.convert(folder / 'run', tmp_path / 'peft')
  other = {'debug-llama': 'debug-gpt2', 'debug-gpt2': 'debug-llama'}
  with pytest.raises(ValueError, match=r'target_modules|tensors do not fit'):
    conversions.convert(
      other[config.model.source], tmp_path / 'out', adapter=tmp_path / 'peft'
    )


def test_an_adapter_needs_its_folder(tmp_path):
  values = worlds.debug_config(tmp_path, 'adapter=peft').as_dict()
  with pytest.raises(ValueError, match=r'set adapter.source to a folder'):
    policy_of(settings.Settings(values), '')


def test_merging_a_new_adapter_changes_no_bit(tmp_path):
  checkpoint = policies.open_source('debug-llama')
  family = families.family_of(checkpoint.family)
  kind = lora.Lora(targets='mlp/.*', rank=2, alpha=1.0, init='b_zero')
  adapter = lora.init_adapter(checkpoint.config, kind, jax.random.key(0))
  adapters.save(
    tmp_path / 'peft',
    adapter,
    kind,
    checkpoint.config,
    family=family,
    base='debug-llama',
  )
  conversions.convert(
    'debug-llama', tmp_path / 'same', adapter=str(tmp_path / 'peft')
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    weights.load(tmp_path / 'same').params,
    conversions.read('debug-llama').params,
  )
