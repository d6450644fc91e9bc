"""Presets are the published models: their sizes, and their config files."""

import math

import jax
import pytest

from configs import common
from dpo_jax import policies
from dpo_jax.models import families
from dpo_jax.models import presets
from dpo_jax.models import transformer

# Numbers in the published checkpoints; a tied table counts once.
PARAMETERS = {
  'gpt2': 124_439_808,
  'gpt2-large': 774_030_080,
  'pythia-1.4b': 1_414_647_808,
  'pythia-2.8b': 2_775_208_960,
  'pythia-6.9b': 6_857_302_016,
  'smollm2-135m': 134_515_008,
  'smollm2-360m': 361_821_120,
  'smollm2-1.7b': 1_711_376_384,
  'llama2-7b': 6_738_415_616,
  'llama2-70b': 68_976_648_192,
  'llama3.1-8b': 8_030_261_248,
  'llama3.2-1b': 1_235_814_400,
  'mistral-7b': 7_241_732_096,
  'qwen2.5-0.5b': 494_032_768,
  'qwen3-0.6b': 596_049_920,
  'qwen3-4b': 4_022_468_096,
  'gemma-2-2b': 2_614_341_888,
  'gemma-3-1b': 999_885_952,
}

# What the files on the Hub say, in the words of the year they are of.
HUB = {
  'gpt2': dict(
    model_type='gpt2',
    activation_function='gelu_new',
    vocab_size=50257,
    n_ctx=1024,
    n_embd=768,
    n_head=12,
    n_layer=12,
    n_positions=1024,
    layer_norm_epsilon=1e-5,
    resid_pdrop=0.1,
    summary_type='cls_index',
    task_specific_params={'text-generation': {'max_length': 50}},
  ),
  'pythia-1.4b': dict(
    model_type='gpt_neox',
    hidden_act='gelu',
    hidden_size=2048,
    intermediate_size=8192,
    layer_norm_eps=1e-5,
    max_position_embeddings=2048,
    num_attention_heads=16,
    num_hidden_layers=24,
    rotary_emb_base=10000,
    rotary_pct=0.25,
    tie_word_embeddings=False,
    use_parallel_residual=True,
    vocab_size=50304,
  ),
  'smollm2-135m': dict(
    model_type='llama',
    hidden_act='silu',
    hidden_size=576,
    intermediate_size=1536,
    is_llama_config=True,
    max_position_embeddings=8192,
    num_attention_heads=9,
    num_hidden_layers=30,
    num_key_value_heads=3,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_interleaved=False,
    rope_scaling=None,
    rope_theta=100000,
    tie_word_embeddings=True,
    vocab_size=49152,
  ),
  'llama3.2-1b': dict(
    model_type='llama',
    attention_bias=False,
    head_dim=64,
    hidden_act='silu',
    hidden_size=2048,
    intermediate_size=8192,
    max_position_embeddings=131072,
    mlp_bias=False,
    num_attention_heads=32,
    num_hidden_layers=16,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_scaling={
      'factor': 32.0,
      'high_freq_factor': 4.0,
      'low_freq_factor': 1.0,
      'original_max_position_embeddings': 8192,
      'rope_type': 'llama3',
    },
    rope_theta=500000.0,
    tie_word_embeddings=True,
    vocab_size=128256,
  ),
  'mistral-7b': dict(
    model_type='mistral',
    hidden_act='silu',
    hidden_size=4096,
    intermediate_size=14336,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    vocab_size=32000,
  ),
  'qwen2.5-0.5b': dict(
    model_type='qwen2',
    hidden_act='silu',
    hidden_size=896,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=24,
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    sliding_window=32768,
    tie_word_embeddings=True,
    use_mrope=False,
    use_sliding_window=False,
    vocab_size=151936,
  ),
  'qwen3-0.6b': dict(
    model_type='qwen3',
    attention_bias=False,
    head_dim=128,
    hidden_act='silu',
    hidden_size=1024,
    intermediate_size=3072,
    max_position_embeddings=40960,
    max_window_layers=28,
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=None,
    tie_word_embeddings=True,
    use_sliding_window=False,
    vocab_size=151936,
  ),
  'gemma-2-2b': dict(
    model_type='gemma2',
    attention_bias=False,
    attn_logit_softcapping=50.0,
    cache_implementation='hybrid',
    final_logit_softcapping=30.0,
    head_dim=256,
    hidden_act='gelu_pytorch_tanh',
    hidden_activation='gelu_pytorch_tanh',
    hidden_size=2304,
    intermediate_size=9216,
    max_position_embeddings=8192,
    num_attention_heads=8,
    num_hidden_layers=26,
    num_key_value_heads=4,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=256000,
  ),
  'gemma-3-1b': dict(
    model_type='gemma3_text',
    attention_bias=False,
    attn_logit_softcapping=None,
    cache_implementation='hybrid',
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation='gelu_pytorch_tanh',
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
  ),
}


def test_every_preset_has_a_published_size():
  assert set(PARAMETERS) == set(presets.MODELS)


def test_every_preset_is_a_model_of_a_config_and_has_a_source():
  debug = set(presets.DEBUG)
  assert set(common.MODELS) == set(presets.MODELS) | debug
  for name in presets.MODELS:
    source = common.MODELS[name]['source']
    assert source in policies.PACKAGES or source.startswith('hf:')


@pytest.mark.parametrize('name', presets.MODELS)
def test_parameters_are_as_many_as_published(name):
  config = presets.MODELS[name]
  shapes = jax.eval_shape(
    lambda: transformer.init_params(config, jax.random.key(0))
  )
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == PARAMETERS[name]


@pytest.mark.parametrize('name', HUB)
def test_the_published_config_is_the_preset(name):
  assert families.config_from_hf(HUB[name]) == presets.MODELS[name]
