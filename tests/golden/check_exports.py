"""Write exported/: tiny trained models as folders, and their logits elsewhere.

In two steps, because the environments are two. In the project's own,
  .venv/bin/python tests/golden/check_exports.py train
makes a random Llama and a random GPT-2, trains them with `dpo-jax train` and
exports the runs with `dpo-jax convert`; and again with an adapter, merged in
the export (..._lora). Then, with torch and transformers,
  pip install torch==2.13.0 'transformers==5.*'
  python tests/golden/check_exports.py read
loads the folders and writes logits, token ids and versions to exported.json,
to which exports_test.py holds our model.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = HERE / 'exported'
TEXTS = ('the sea', ' two  spaces\n', 'é 你好 \U0001f916', "it's 1984")
STEPS = 20
OVER, MERGE = ('--overwrite',), ('--merge',)
_SIZES = dict(
  vocab_size=257,
  d_model=16,
  num_layers=2,
  num_heads=4,
  head_dim=6,
  d_ff=24,
  norm_eps=1e-5,
  max_positions=128,
  rope_theta=500.0,
)


def configs():
  """Returns {name: TransformerConfig}."""
  from dpo_jax.models import transformer

  return {
    'llama': transformer.TransformerConfig(
      num_kv_heads=2,
      norm='rms',
      positions='rotary',
      mlp='swiglu',
      attention_bias=False,
      mlp_bias=False,
      tied=False,
      **_SIZES,
    ),
    'gpt2': transformer.TransformerConfig(
      num_kv_heads=4,
      norm='layer',
      positions='learned',
      mlp='gelu',
      attention_bias=True,
      mlp_bias=True,
      tied=True,
      # No rotation; GPT-2 has the width in its heads.
      **(_SIZES | dict(head_dim=4, rope_theta=10000.0)),
    ),
  }


def train():
  """Makes, trains and exports the models."""
  from dpo_jax import exports
  from dpo_jax import weights
  from dpo_jax.data import tokenizers

  for name, config in configs().items():
    with tempfile.TemporaryDirectory() as scratch:
      scratch = pathlib.Path(scratch)
      checkpoint = weights.random(
        config, source=name, tokenizer=tokenizers.ByteTokenizer()
      )
      model = exports.with_parameters(checkpoint, weights.assemble(checkpoint))
      exports.write(model, scratch / 'random', shard_size=10**9)
      pairs = [
        {
          'prompt': f'Question {i}: {i % 7} or {i % 5}?',
          'chosen': f' It is {i % 7}.',
          'rejected': f' Never {i % 5}!',
        }
        for i in range(40)
      ]
      (scratch / 'pairs.jsonl').write_text(
        ''.join(json.dumps(pair) + '\n' for pair in pairs)
      )
      for suffix, adapter, merge in [
        ('', 'none', ()),
        ('_lora', 'lora', MERGE),
      ]:
        run = scratch / f'run{suffix}'
        _dpo_jax(
          'train',
          '--config=configs/preference.py:data=jsonl,optim=adamw,debug,'
          f'adapter={adapter}',
          f'--config.model.source={scratch / "random"}',
          f'--config.data.source={scratch / "pairs.jsonl"}',
          f'--config.data.cache_dir={scratch / "data"}',
          f'--config.num_steps={STEPS}',
          '--config.optim.lr=1e-2',
          f'--workdir={run}',
        )
        _dpo_jax('convert', run, FOLDER / f'{name}{suffix}', *OVER, *merge)


def _dpo_jax(*arguments):
  command = [sys.executable, '-m', 'dpo_jax.main', *map(str, arguments)]
  subprocess.run(command, cwd=ROOT, check=True)


def read():
  """Writes what transformers makes of the folders."""
  import torch
  import transformers

  golden = {
    'versions': {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
    },
    'texts': TEXTS,
  }
  for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation='eager', output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)['input_ids'] for text in TEXTS]
    with torch.no_grad():
      logits = model.eval()(torch.tensor([ids[0]])).logits[0]
    golden[folder.name] = {
      'class': type(model).__name__,
      'ids': ids,
      'eos': [tokenizer.eos_token_id, model.generation_config.eos_token_id],
      'logits': [[round(float(x), 7) for x in row] for row in logits],
    }
  (HERE / 'exported.json').write_text(json.dumps(golden) + '\n')


if __name__ == '__main__':
  {'train': train, 'read': read}[sys.argv[1]]()
