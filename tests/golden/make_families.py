"""Write the tiny Hugging Face checkpoints that families_test.py checks.

Needs torch and transformers, which nothing else here does:
  pip install torch==2.13.0 'transformers==5.*'
  python tests/golden/make_families.py
Every number is random, norms and biases too: a swapped or forgotten one shows.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SHARED = dict(
  vocab_size=67,
  initializer_range=0.2,
  bos_token_id=1,
  eos_token_id=2,
  attn_implementation='eager',
)
# head_dim is not hidden_size / heads; two query heads share a key head.
LLAMA = dict(
  hidden_size=20,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  intermediate_size=28,
  max_position_embeddings=40,
  **SHARED,
)
PLAIN = dict(rope_type='default', rope_theta=10000.0)
# Four layers: sliding, sliding, full, sliding.
MIXED = ['full_attention' if i == 2 else 'sliding_attention' for i in range(4)]
CONFIGS = {
  'llama_tied': transformers.LlamaConfig(
    tie_word_embeddings=True,
    rms_norm_eps=1e-3,
    rope_parameters=dict(rope_type='default', rope_theta=500.0),
    **LLAMA,
  ),
  'llama_untied': transformers.LlamaConfig(
    tie_word_embeddings=False,
    rms_norm_eps=1e-5,
    attention_bias=True,
    rope_parameters=PLAIN,
    **LLAMA,
  ),
  'gpt2': transformers.GPT2Config(
    n_embd=20,
    n_layer=2,
    n_head=4,
    n_inner=36,
    n_positions=24,
    layer_norm_epsilon=1e-3,
    **SHARED,
  ),
  # Wavelengths 6, 25, 101 and 402: below 16 / 2, between, above 16 / 0.25.
  'llama3': transformers.LlamaConfig(
    tie_word_embeddings=False,
    rms_norm_eps=1e-5,
    rope_parameters=dict(
      rope_type='llama3',
      rope_theta=256.0,
      factor=6.0,
      low_freq_factor=0.25,
      high_freq_factor=2.0,
      original_max_position_embeddings=16,
    ),
    **(LLAMA | dict(head_dim=8)),
  ),
  'pythia': transformers.GPTNeoXConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=28,
    max_position_embeddings=40,
    layer_norm_eps=1e-3,
    rope_parameters=PLAIN | dict(partial_rotary_factor=0.5),
    **SHARED,
  ),
  'pythia_serial': transformers.GPTNeoXConfig(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=28,
    max_position_embeddings=40,
    attention_bias=False,
    use_parallel_residual=False,
    tie_word_embeddings=True,
    rope_parameters=dict(
      rope_type='linear',
      factor=3.0,
      rope_theta=100.0,
      partial_rotary_factor=0.25,
    ),
    **SHARED,
  ),
  'mistral': transformers.MistralConfig(
    rms_norm_eps=1e-5,
    rope_parameters=PLAIN,
    sliding_window=5,
    **LLAMA,
  ),
  # Its last two layers have windows.
  'qwen2': transformers.Qwen2Config(
    tie_word_embeddings=True,
    rope_parameters=PLAIN,
    use_sliding_window=True,
    sliding_window=4,
    max_window_layers=1,
    **{k: v for k, v in LLAMA.items() if k != 'head_dim'}
    | dict(hidden_size=24, num_hidden_layers=3, intermediate_size=20),
  ),
  'qwen3': transformers.Qwen3Config(
    tie_word_embeddings=False,
    rms_norm_eps=1e-3,
    rope_parameters=PLAIN,
    **LLAMA,
  ),
  'gemma': transformers.GemmaConfig(
    rms_norm_eps=1e-3,
    rope_parameters=PLAIN,
    **(LLAMA | dict(num_key_value_heads=1)),
  ),
  'gemma2': transformers.Gemma2Config(
    rms_norm_eps=1e-3,
    rope_parameters=PLAIN,
    sliding_window=5,
    query_pre_attn_scalar=3,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=4.0,
    **(LLAMA | dict(num_hidden_layers=3)),
  ),
  'gemma3': transformers.Gemma3TextConfig(
    rms_norm_eps=1e-3,
    rope_parameters=dict(
      full_attention=dict(rope_type='linear', factor=4.0, rope_theta=1000.0),
      sliding_attention=dict(rope_type='default', rope_theta=30.0),
    ),
    sliding_window=6,
    query_pre_attn_scalar=10,
    final_logit_softcapping=5.0,
    layer_types=MIXED,
    **(LLAMA | dict(num_hidden_layers=4, intermediate_size=18)),
  ),
}


def main():
  for seed, (name, config) in enumerate(CONFIGS.items()):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.float32
    ).eval()
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.ndim == 1:
          parameter.add_(0.3 * torch.randn_like(parameter))
      ids = torch.randint(config.vocab_size, (2, 17))
      logits = model(ids).logits
    model.save_pretrained(HERE / name)
    (HERE / name / 'generation_config.json').unlink(missing_ok=True)
    np.savez(
      HERE / name / 'logits.npz',
      input_ids=ids.numpy().astype(np.int32),
      logits=logits.numpy(),
    )
  (HERE / 'families.json').write_text(
    json.dumps(
      {'torch': torch.__version__, 'transformers': transformers.__version__},
      indent=1,
    )
    + '\n'
  )


if __name__ == '__main__':
  main()
