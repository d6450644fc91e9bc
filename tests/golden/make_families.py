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
    rope_parameters=dict(rope_type='default', rope_theta=10000.0),
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
