"""Models by name: small random ones, and the shapes of published ones.

`MODELS` is for what needs no weights: sizes, compile checks, timings. With
weights, a model's own config.json says the same (`families.config_from_hf`).
"""

from dpo_jax.models import transformer

_DEBUG = dict(
  vocab_size=257,
  d_model=64,
  num_layers=2,
  num_heads=4,
  head_dim=16,
  d_ff=128,
  norm_eps=1e-5,
  max_positions=2048,
  rope_theta=10000.0,
)

# name -> TransformerConfig; both take `tokenizers.ByteTokenizer`.
DEBUG = {
  'debug-llama': transformer.TransformerConfig(
    num_kv_heads=2,
    norm='rms',
    positions='rotary',
    mlp='swiglu',
    attention_bias=False,
    mlp_bias=False,
    tied=False,
    **_DEBUG,
  ),
  'debug-gpt2': transformer.TransformerConfig(
    num_kv_heads=4,
    norm='layer',
    positions='learned',
    mlp='gelu',
    attention_bias=True,
    mlp_bias=True,
    tied=True,
    **_DEBUG,
  ),
}


def _gpt2(**sizes):
  return transformer.TransformerConfig(
    vocab_size=50257,
    num_kv_heads=sizes['num_heads'],
    head_dim=64,
    d_ff=4 * sizes['d_model'],
    norm='layer',
    norm_eps=1e-5,
    positions='learned',
    max_positions=1024,
    rope_theta=10000.0,
    mlp='gelu',
    attention_bias=True,
    mlp_bias=True,
    tied=True,
    **sizes,
  )


def _pythia(**sizes):
  return transformer.TransformerConfig(
    num_kv_heads=sizes['num_heads'],
    head_dim=sizes['d_model'] // sizes['num_heads'],
    d_ff=4 * sizes['d_model'],
    norm='layer',
    norm_eps=1e-5,
    positions='rotary',
    max_positions=2048,
    rope_theta=10000.0,
    rotary_fraction=0.25,
    mlp='gelu_exact',
    attention_bias=True,
    mlp_bias=True,
    tied=False,
    parallel=True,
    **sizes,
  )


def _llama(**values):
  """Llama and what is like it; `values` win."""
  defaults = dict(
    norm='rms',
    norm_eps=1e-5,
    positions='rotary',
    mlp='swiglu',
    attention_bias=False,
    mlp_bias=False,
    tied=False,
  )
  return transformer.TransformerConfig(**(defaults | values))


def _smollm2(**sizes):
  return _llama(
    vocab_size=49152, head_dim=64, max_positions=8192, tied=True, **sizes
  )


def _llama3(*, factor, **sizes):
  return _llama(
    vocab_size=128256,
    max_positions=131072,
    num_heads=32,
    num_kv_heads=8,
    rope_theta=500000.0,
    rope_scaling='llama3',
    rope_factor=factor,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_positions=8192,
    **sizes,
  )


def _qwen(**values):
  defaults = dict(vocab_size=151936, norm_eps=1e-6, rope_theta=1e6, tied=True)
  return _llama(**defaults, **values)


def _gemma(**values):
  return _llama(
    norm_eps=1e-6,
    norm_offset=True,
    post_norms=True,
    mlp='geglu',
    head_dim=256,
    embed_scale=True,
    query_scalar=256.0,
    num_layers=26,
    tied=True,
    **values,
  )


# name -> TransformerConfig.
MODELS = {
  'gpt2': _gpt2(d_model=768, num_layers=12, num_heads=12),
  'gpt2-large': _gpt2(d_model=1280, num_layers=36, num_heads=20),
  'pythia-1.4b': _pythia(
    vocab_size=50304, d_model=2048, num_layers=24, num_heads=16
  ),
  'pythia-2.8b': _pythia(
    vocab_size=50304, d_model=2560, num_layers=32, num_heads=32
  ),
  'pythia-6.9b': _pythia(
    vocab_size=50432, d_model=4096, num_layers=32, num_heads=32
  ),
  'smollm2-135m': _smollm2(
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    d_ff=1536,
    rope_theta=100000.0,
  ),
  'smollm2-360m': _smollm2(
    d_model=960,
    num_layers=32,
    num_heads=15,
    num_kv_heads=5,
    d_ff=2560,
    rope_theta=100000.0,
  ),
  'smollm2-1.7b': _smollm2(
    d_model=2048,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    d_ff=8192,
    rope_theta=130000.0,
  ),
  'llama2-7b': _llama(
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    d_ff=11008,
    max_positions=4096,
    rope_theta=10000.0,
  ),
  'llama2-70b': _llama(
    vocab_size=32000,
    d_model=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    d_ff=28672,
    max_positions=4096,
    rope_theta=10000.0,
  ),
  'llama3.1-8b': _llama3(
    d_model=4096, num_layers=32, head_dim=128, d_ff=14336, factor=8.0
  ),
  'llama3.2-1b': _llama3(
    d_model=2048, num_layers=16, head_dim=64, d_ff=8192, factor=32.0, tied=True
  ),
  'mistral-7b': _llama(  # v0.1; later ones have no window
    vocab_size=32000,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=14336,
    max_positions=32768,
    rope_theta=10000.0,
    window=4096,
    windowed=(True,) * 32,
  ),
  'qwen2.5-0.5b': _qwen(
    d_model=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    d_ff=4864,
    max_positions=32768,
    attention_bias=True,
    out_bias=False,
  ),
  'qwen3-0.6b': _qwen(
    d_model=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_ff=3072,
    max_positions=40960,
    qk_norm=True,
  ),
  'qwen3-4b': _qwen(
    d_model=2560,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_ff=9728,
    max_positions=40960,
    qk_norm=True,
  ),
  'gemma-2-2b': _gemma(
    vocab_size=256000,
    d_model=2304,
    num_heads=8,
    num_kv_heads=4,
    d_ff=9216,
    max_positions=8192,
    rope_theta=10000.0,
    window=4096,
    windowed=(True, False) * 13,
    attention_cap=50.0,
    logit_cap=30.0,
  ),
  'gemma-3-1b': _gemma(
    vocab_size=262144,
    d_model=1152,
    num_heads=4,
    num_kv_heads=1,
    d_ff=6912,
    max_positions=32768,
    rope_theta=1e6,
    local_rope_theta=1e4,
    window=512,
    windowed=((True,) * 5 + (False,)) * 4 + (True,) * 2,
    qk_norm=True,
  ),
}

# name of MODELS -> where its weights are: what `model.source` may be.
SOURCES = {
  'gpt2': 'hf:openai-community/gpt2',
  'gpt2-large': 'hf:openai-community/gpt2-large',
  'pythia-1.4b': 'hf:EleutherAI/pythia-1.4b',
  'pythia-2.8b': 'hf:EleutherAI/pythia-2.8b',
  'pythia-6.9b': 'hf:EleutherAI/pythia-6.9b',
  # Instruct, from the package index; see `policies.PACKAGES`.
  'smollm2-135m': 'smollm2-135m',
  'smollm2-360m': 'hf:HuggingFaceTB/SmolLM2-360M',
  'smollm2-1.7b': 'hf:HuggingFaceTB/SmolLM2-1.7B',
  'llama2-7b': 'hf:meta-llama/Llama-2-7b-hf',
  'llama2-70b': 'hf:meta-llama/Llama-2-70b-hf',
  'llama3.1-8b': 'hf:meta-llama/Llama-3.1-8B',
  'llama3.2-1b': 'hf:meta-llama/Llama-3.2-1B',
  'mistral-7b': 'hf:mistralai/Mistral-7B-v0.1',
  'qwen2.5-0.5b': 'hf:Qwen/Qwen2.5-0.5B',
  'qwen3-0.6b': 'hf:Qwen/Qwen3-0.6B',
  'qwen3-4b': 'hf:Qwen/Qwen3-4B',
  'gemma-2-2b': 'hf:google/gemma-2-2b',
  'gemma-3-1b': 'hf:google/gemma-3-1b-pt',
}
