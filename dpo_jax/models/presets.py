"""Small random models for tests and `debug` configs."""

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
