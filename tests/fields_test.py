"""Every field of a TransformerConfig is needed by a golden checkpoint.

A mutation check: with any one field changed a checkpoint no longer gives the
logits of `transformers`, or does not even fit the model.
"""

import dataclasses

import flax.errors
import jax
import numpy as np
import pytest

from dpo_jax.models import families
from dpo_jax.models import transformer
from tests import families_test

# Field -> (golden folder, another value).
CHANGES = {
  'vocab_size': ('gpt2', 66),
  'd_model': ('gpt2', 24),
  'num_layers': ('gpt2', 1),
  'num_heads': ('llama3', 2),
  'num_kv_heads': ('llama3', 4),
  'head_dim': ('llama3', 4),
  'd_ff': ('gpt2', 28),
  'norm': ('gpt2', 'rms'),
  'norm_eps': ('gpt2', 1e-5),
  'positions': ('pythia', 'learned'),
  'max_positions': ('gpt2', 25),
  'rope_theta': ('llama_tied', 10000.0),
  'mlp': ('gemma', 'swiglu'),
  'attention_bias': ('llama_untied', False),
  'mlp_bias': ('gpt2', False),
  'dtype': ('llama_tied', 'bfloat16'),
  'out_bias': ('qwen2', True),
  'norm_offset': ('gemma', False),
  'qk_norm': ('qwen3', False),
  'post_norms': ('gemma2', False),
  'parallel': ('pythia', False),
  'embed_scale': ('gemma', False),
  'rotary_fraction': ('pythia', 1.0),
  'rope_scaling': (
    'llama3',
    {
      'rope_scaling': 'linear',
      'rope_low_freq_factor': None,
      'rope_high_freq_factor': None,
      'rope_original_positions': None,
    },
  ),
  'rope_factor': ('llama3', 2.0),
  'rope_low_freq_factor': ('llama3', 0.1),
  'rope_high_freq_factor': ('llama3', 3.0),
  'rope_original_positions': ('llama3', 14),
  'window': ('mistral', 6),
  'windowed': ('gemma3', (True, False, True, True)),
  'local_rope_theta': ('gemma3', None),
  'query_scalar': ('gemma2', None),
  'attention_cap': ('gemma2', None),
  'logit_cap': ('gemma2', None),
}
# Those that change speed or memory only (transformer_test) and the one that
# only decides what there is to import.
OTHERS = {'remat', 'scan_unroll', 'gather_share', 'tied'}
# What else a family turns on or off.
MORE = [
  ('mlp', 'gpt2', 'gelu_exact'),
  ('mlp', 'pythia', 'gelu'),
  ('parallel', 'pythia_serial', True),
  ('rope_scaling', 'gemma3', {'rope_scaling': 'none', 'rope_factor': None}),
  ('rope_theta', 'gemma3', 30.0),
  ('qk_norm', 'gemma3', False),
  ('query_scalar', 'gemma3', None),
  ('logit_cap', 'gemma3', None),
  ('attention_bias', 'pythia_serial', True),
  ('window', 'mistral', {'window': None, 'windowed': ()}),
  ('windowed', 'gemma2', (True, True, True)),
  ('windowed', 'qwen2', (True, True, True)),
]


def test_the_table_has_every_field():
  fields = {f.name for f in dataclasses.fields(transformer.TransformerConfig)}
  assert set(CHANGES) | OTHERS == fields


@pytest.mark.parametrize(
  'field, name, other',
  [(field, *change) for field, change in CHANGES.items()] + MORE,
  ids=lambda x: str(x)[:20],
)
def test_every_field_matters(field, name, other):
  family, config, tensors = families_test.read(name)
  golden = np.load(families_test.GOLDEN / name / 'logits.npz')
  changes = other if isinstance(other, dict) else {field: other}
  assert getattr(config, field) != changes[field]
  params = families.from_hf(tensors, config, family=family)
  changed = dataclasses.replace(config, **changes)
  with jax.default_matmul_precision('highest'):
    try:
      logits = families_test.logits_of(params, changed, golden['input_ids'])
    except (
      flax.errors.ScopeParamShapeError,
      flax.errors.ScopeParamNotFoundError,
    ):
      return  # The checkpoint does not fit.
    except ValueError as error:
      assert 'scan' in str(error)  # Another number of layers.
      return
  if logits.shape == golden['logits'].shape:
    # Ten times what the test of parity allows.
    assert np.abs(logits - golden['logits']).max() > 2e-4


@pytest.mark.parametrize('name', ['llama_untied', 'qwen2'])
def test_tied_decides_what_is_imported(name):
  family, config, tensors = families_test.read(name)
  changed = dataclasses.replace(config, tied=not config.tied)
  with pytest.raises(ValueError, match=r'lm_head.weight'):
    families.from_hf(tensors, changed, family=family)
