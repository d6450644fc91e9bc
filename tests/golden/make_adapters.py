"""Write the tiny LoRA adapters of PEFT that adapters_test.py checks.

Needs torch, transformers and PEFT, which nothing else here does:
  pip install torch==2.13.0 'transformers==5.*' peft
  python tests/golden/make_adapters.py

The models under them are those of make_families.py. Every number of an adapter
is random, and none is zero. `adapters/NAME/` has what PEFT saved, and
`logits.npz` the logits with the adapter and after `merge_and_unload`. Folders
`ours_*` were written by export_adapters.py: PEFT loads them, a tensor too many
or too few is an error, and only `logits.npz` is added.
"""

import importlib.metadata
import json
import os
import pathlib

import numpy as np
import peft
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
COMMON = dict(r=3, lora_alpha=5, task_type='CAUSAL_LM')
ADAPTERS = {
  'llama_all': ('llama_untied', dict(target_modules='all-linear')),
  # Twice the rank for v, and the same scale.
  'llama_ranks': (
    'llama_untied',
    dict(
      target_modules=['q_proj', 'v_proj', 'down_proj'],
      rank_pattern={'v_proj': 6},
      alpha_pattern={'v_proj': 10},
    ),
  ),
  'llama_rslora': (
    'llama_untied',
    dict(target_modules=r'.*\.(o|gate)_proj', use_rslora=True),
  ),
  'gpt2_all': ('gpt2', dict(target_modules='all-linear')),
  'gpt2_usual': ('gpt2', dict(target_modules=['c_attn'])),
  'pythia_all': ('pythia', dict(target_modules='all-linear')),
  'pythia_some': (
    'pythia',
    dict(target_modules=['query_key_value', 'dense_h_to_4h']),
  ),
}


def make(base, options, folder):
  """Returns a random adapter on a model, saved in `folder`."""
  model = peft.get_peft_model(
    transformers.AutoModelForCausalLM.from_pretrained(base),
    peft.LoraConfig(**COMMON, **options),
  ).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'lora_' in name:
        parameter.copy_(0.8 * torch.rand_like(parameter) - 0.4)
  model.save_pretrained(folder)
  (folder / 'README.md').unlink()
  return model


def load(base, folder):
  """Returns a model with a folder of ours, whose tensors PEFT's own must be."""
  model = peft.PeftModel.from_pretrained(
    transformers.AutoModelForCausalLM.from_pretrained(base), folder
  ).eval()
  own = peft.get_peft_model_state_dict(model)
  stored = safetensors.torch.load_file(folder / 'adapter_model.safetensors')
  assert own.keys() == stored.keys(), own.keys() ^ stored.keys()
  assert all(torch.equal(own[name], stored[name]) for name in own)
  return model


def note_logits(model, folder):
  """Writes logits.npz; returns how far the adapter moves them."""
  ids = torch.randint(model.config.vocab_size, (2, 6))
  with torch.no_grad():
    with model.disable_adapter():
      base = model(ids).logits
    adapted = model(ids).logits
    merged = model.merge_and_unload()(ids).logits
  np.savez(
    folder / 'logits.npz',
    input_ids=ids.numpy().astype(np.int32),
    logits=adapted.numpy(),
    merged=merged.numpy(),
  )
  return float((adapted - base).std()), float((adapted - merged).abs().max())


def main():
  os.chdir(HERE)  # Paths are written into the adapters.
  torch.manual_seed(0)
  notes = {}
  for name, (base, options) in ADAPTERS.items():
    folder = pathlib.Path('adapters') / name
    notes[name] = note_logits(make(base, options, folder), folder)
  for folder in sorted(pathlib.Path('adapters').glob('ours_*')):
    attributes = json.loads((folder / 'adapter_config.json').read_text())
    model = load(attributes['base_model_name_or_path'], folder)
    notes[folder.name] = note_logits(model, folder)
  versions = {
    name: importlib.metadata.version(name)
    for name in ('torch', 'transformers', 'peft')
  }
  moved = {
    name: dict(adapter_moves_logits_std=moves, merging_moves_logits_max=merging)
    for name, (moves, merging) in notes.items()
  }
  (HERE / 'adapters.json').write_text(
    json.dumps(versions | {'adapters': moved}, indent=1) + '\n'
  )


if __name__ == '__main__':
  main()
