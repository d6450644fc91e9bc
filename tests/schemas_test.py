"""A config.json is translated attribute by attribute, or refused by name."""

import pytest

from dpo_jax.models import families
from dpo_jax.models import transformer
from tests import families_test


def test_config_fields_are_translated_one_by_one():
  assert families_test.read('llama_untied')[1] == transformer.TransformerConfig(
    vocab_size=67,
    d_model=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    d_ff=28,
    norm='rms',
    norm_eps=1e-5,
    positions='rotary',
    max_positions=40,
    rope_theta=10000.0,
    mlp='swiglu',
    attention_bias=True,
    mlp_bias=False,
    tied=False,
  )
  assert families_test.read('gpt2')[1] == transformer.TransformerConfig(
    vocab_size=67,
    d_model=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=5,
    d_ff=36,
    norm='layer',
    norm_eps=1e-3,
    positions='learned',
    max_positions=24,
    rope_theta=10000.0,
    mlp='gelu',
    attention_bias=True,
    mlp_bias=True,
    tied=True,
  )


def test_old_config_files_say_the_same():
  """Files from before `head_dim` and `rope_parameters`; GPT-2's `n_ctx`."""
  llama = families_test.attributes_of('llama_tied')
  expected = families.config_from_hf(
    llama | dict(hidden_size=24, num_key_value_heads=4)
  )
  for name in (
    'head_dim',
    'num_key_value_heads',
    'rope_parameters',
    'attention_bias',
    'mlp_bias',
    'dtype',
  ):
    del llama[name]
  llama |= dict(
    hidden_size=24,
    rope_scaling=None,
    rope_theta=500.0,
    torch_dtype='bfloat16',
    is_llama_config=True,
    rope_interleaved=False,
  )
  assert families.config_from_hf(llama) == expected
  gpt2 = families_test.attributes_of('gpt2')
  expected = families.config_from_hf(gpt2 | dict(n_inner=80))
  for name in (
    'n_inner',
    'tie_word_embeddings',
    'scale_attn_weights',
    'reorder_and_upcast_attn',
    'add_cross_attention',
  ):
    del gpt2[name]
  gpt2 |= dict(n_ctx=24, task_specific_params={'text-generation': {}})
  assert families.config_from_hf(gpt2) == expected


@pytest.mark.parametrize(
  'name, absent, expected',
  [
    ('llama_tied', 'rope_parameters', dict(rope_theta=10000.0)),
    ('mistral', 'sliding_window', dict(window=4096)),
    ('pythia', 'rope_parameters', dict(rope_theta=1e4, rotary_fraction=0.25)),
    ('pythia_serial', 'use_parallel_residual', dict(parallel=True)),
    ('pythia_serial', 'attention_bias', dict(attention_bias=True)),
    ('qwen2', 'use_sliding_window layer_types', dict(window=None, windowed=())),
    ('qwen2', 'max_window_layers layer_types', dict(window=None, windowed=())),
    ('qwen2', 'layer_types', dict(windowed=(False, True, True))),
    ('qwen3', 'head_dim', dict(head_dim=128)),
    ('gemma', 'head_dim', dict(head_dim=256)),
    ('gemma2', 'attn_logit_softcapping', dict(attention_cap=50.0)),
    ('gemma2', 'final_logit_softcapping', dict(logit_cap=30.0)),
    ('gemma2', 'query_pre_attn_scalar', dict(query_scalar=256.0)),
    ('gemma2', 'layer_types', dict(windowed=(True, False, True))),
    ('gemma3', 'final_logit_softcapping', dict(logit_cap=None)),
    ('gemma3', 'layer_types', dict(windowed=(True,) * 4)),
    (
      'gemma3',
      'rope_parameters',
      dict(rope_theta=1e6, local_rope_theta=1e4, rope_scaling='none'),
    ),
    *(
      (name, 'tie_word_embeddings', dict(tied=tied))
      for name, tied in [
        ('llama_tied', False),
        ('gpt2', True),
        ('pythia_serial', False),
        ('mistral', False),
        ('qwen2', False),
        ('qwen3', False),
        ('gemma', True),
        ('gemma2', True),
        ('gemma3', True),
      ]
    ),
  ],
)
def test_absent_attributes_are_what_transformers_takes(name, absent, expected):
  attributes = families_test.attributes_of(name)
  for attribute in absent.split():
    del attributes[attribute]
  config = families.config_from_hf(attributes)
  assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
  'name, changes, expected',
  [
    ('mistral', dict(sliding_window=None), dict(window=None, windowed=())),
    ('gemma2', dict(attn_logit_softcapping=None), dict(attention_cap=None)),
    ('gemma2', dict(final_logit_softcapping=None), dict(logit_cap=None)),
    ('gemma', dict(hidden_act='gelu'), dict(mlp='geglu')),
    (
      'gemma3',
      dict(layer_types=None, sliding_window_pattern=2),
      dict(windowed=(True, False, True, False)),
    ),
    (
      'gemma3',
      dict(
        rope_parameters=None,
        rope_theta=1000,
        rope_local_base_freq=30,
        rope_scaling={'rope_type': 'linear', 'factor': 4},
      ),
      dict(
        rope_theta=1000.0,
        local_rope_theta=30.0,
        rope_scaling='linear',
        rope_factor=4.0,
      ),
    ),
    (
      'llama_tied',
      dict(
        rope_parameters=None,
        rope_theta=500.0,
        rope_scaling={'type': 'linear', 'factor': 2.0},
      ),
      dict(rope_theta=500.0, rope_scaling='linear', rope_factor=2.0),
    ),
  ],
)
def test_attributes_may_be_null_or_of_older_files(name, changes, expected):
  config = families.config_from_hf(families_test.attributes_of(name) | changes)
  assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
  'name, changes, reason',
  [
    (
      'llama_tied',
      dict(rope_scaling={'type': 'linear', 'factor': 2.0}),
      "rope_scaling.type = 'linear' .*another attribute says 'none'",
    ),
    (
      'llama_tied',
      dict(rope_parameters={'rope_type': 'linear', 'rope_theta': 500.0}),
      "'linear' needs rope_factor, got none",
    ),
    (
      'llama_tied',
      dict(rope_parameters={'rope_theta': 500.0, 'factor': 2.0}),
      "'none' needs no numbers, got rope_factor",
    ),
    (
      'llama3',
      dict(rope_parameters={'rope_type': 'llama3', 'factor': 2.0}),
      "'llama3' needs .*rope_original_positions, got rope_factor",
    ),
    ('mistral', dict(sliding_window=0), 'sliding_window = 0 .*integer'),
    ('gemma3', dict(sliding_window_pattern=0), 'pattern = 0 .*integer'),
    ('gemma3', dict(layer_types=None, sliding_window=None), 'window = None'),
    ('qwen2', dict(use_sliding_window=None), 'use_sliding_window = None'),
    ('mistral', dict(layer_types=['full_attention'] * 2), 'layer_types = '),
    ('pythia', dict(hidden_act='gelu_new'), "hidden_act = 'gelu_new'"),
    ('qwen2', dict(layer_types=['chunked'] * 3), "layer_types = .'chunked'"),
    ('qwen2', dict(layer_types=['full_attention']), 'each of the 3 layers'),
    ('qwen2', dict(use_sliding_window=False), 'use_sliding_window = False'),
    ('qwen2', dict(use_mrope=True), 'use_mrope = True'),
    ('qwen2', dict(attention_bias=False), 'attention_bias = False .*unknown'),
    ('gemma', dict(hidden_act='gelu_new'), "hidden_act = 'gelu_new'"),
    ('gemma2', dict(sliding_window=None), 'sliding_window = None'),
    ('gemma2', dict(use_bidirectional_attention=True), 'bidirectional_attent'),
    ('gemma3', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping = 5'),
    ('gemma3', dict(rope_theta=7.0), 'rope_theta = .*another'),
    (
      'gemma3',
      dict(rope_parameters={'sliding_attention': {'rope_type': 'linear'}}),
      "sliding_attention.rope_type = 'linear'",
    ),
    (
      'llama_tied',
      dict(rope_parameters={'rope_type': 'yarn', 'factor': 2.0}),
      "rope_parameters.rope_type = 'yarn'",
    ),
    (
      'llama_tied',
      dict(rope_parameters={'partial_rotary_factor': 0.5}),
      'rope_parameters.partial_rotary_factor = 0.5',
    ),
    ('llama_tied', dict(rope_theta=7.0), 'rope_theta = 7.0 .*another'),
    ('llama_tied', dict(sliding_window=4096), 'sliding_window = 4096'),
    ('llama_tied', dict(pretraining_tp=2), 'pretraining_tp = 2'),
    ('llama_tied', dict(hidden_act='gelu'), "hidden_act = 'gelu'"),
    ('llama_tied', dict(mlp_bias=True), 'mlp_bias = True'),
    (
      'llama_tied',
      dict(quantization_config={'bits': 4}),
      "quantization_config = {'bits': 4}",
    ),
    ('llama_tied', dict(invented=None), 'invented = None .*unknown'),
    ('llama_tied', dict(hidden_size='20'), "hidden_size = '20' .*integer"),
    ('llama_tied', dict(num_hidden_layers=0), 'num_hidden_layers = 0'),
    ('llama_tied', dict(tie_word_embeddings=1), 'not true or false'),
    ('llama_tied', dict(rms_norm_eps=None), 'rms_norm_eps is missing'),
    ('llama_tied', dict(num_key_value_heads=3), '4 query heads cannot share 3'),
    ('llama_tied', dict(head_dim=None), 'even head_dim, not 5'),
    ('llama_tied', dict(head_dim=None, hidden_size=22), 'not divisible by 4'),
    (
      'gpt2',
      dict(scale_attn_by_inverse_layer_idx=True),
      'scale_attn_by_inverse_layer_idx = True',
    ),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights = False'),
    ('gpt2', dict(activation_function='relu'), "activation_function = 'relu'"),
    ('gpt2', dict(add_cross_attention=True), 'add_cross_attention = True'),
    ('gpt2', dict(n_ctx=12), 'n_ctx = 12 .*says 24'),
  ],
)
def test_attributes_we_do_not_implement_are_refused(name, changes, reason):
  with pytest.raises(ValueError, match=reason):
    families.config_from_hf(families_test.attributes_of(name) | changes)


def test_all_refusals_are_in_one_error():
  with pytest.raises(ValueError) as error:
    families.config_from_hf(
      families_test.attributes_of('llama_tied')
      | dict(pretraining_tp=2, invented=3, hidden_act='gelu')
    )
  for part in ('pretraining_tp = 2', 'invented = 3', "hidden_act = 'gelu'"):
    assert part in str(error.value)
