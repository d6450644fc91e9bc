"""Write the adapter folders that our own exporter makes, for PEFT to read.

  python tests/golden/export_adapters.py

Needs nothing but this project. make_adapters.py, which needs other libraries,
is to be run next: it adds the logits that PEFT gives with them.
adapters_test.py checks that they are still what is exported, and our logits.
"""

import json
import pathlib

import flax.linen as nn
import jax
import numpy as np

from dpo_jax import adapters
from dpo_jax.models import families
from dpo_jax.models import lora

HERE = pathlib.Path(__file__).parent
# Folder -> (model, targets, ranks of some weights). GPT-2 and Pythia fuse q, k
# and v, which have an a of their own each, and in GPT-2's case ranks of their
# own and no adapter on k.
EXPORTS = {
  'ours_llama': ('llama_untied', r'attention/(q|k|out)|mlp/down', {'k': 1}),
  'ours_gpt2': ('gpt2', r'attention/[qv]|mlp/down', {'v': 3}),
  'ours_pythia': ('pythia', r'attention/.*', {}),
}


def model(name):
  """Returns (config, family) of a golden folder."""
  attributes = json.loads((HERE / name / 'config.json').read_text())
  return (
    families.config_from_hf(attributes),
    families.family_of(attributes['model_type']),
  )


def random_adapter(config, kind, ranks, *, seed=0):
  """Draws a and b of every weight; a RandomState never changes its numbers."""
  rng = np.random.RandomState(seed)
  usual = nn.unbox(
    jax.eval_shape(lambda: lora.init_adapter(config, kind, jax.random.key(0)))
  )

  def draw(path, leaf):
    shape = list(leaf.shape)
    last, part = path[-2].key, path[-1].key
    shape[{'a': -1, 'b': 1}[part]] = ranks.get(last, kind.rank)
    return rng.uniform(-0.4, 0.4, shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, usual)


def export(name, folder):
  """Writes one of `EXPORTS`; returns (adapter, its `lora.Lora`)."""
  base, targets, ranks = EXPORTS[name]
  config, family = model(base)
  kind = lora.Lora(targets=targets, rank=2, alpha=3.0, init='a_zero')
  adapter = random_adapter(config, kind, ranks)
  adapters.save(
    folder, adapter, kind, config, family=family, base=base, overwrite=True
  )
  return adapter, kind


def main():
  for name in EXPORTS:
    export(name, HERE / 'adapters' / name)


if __name__ == '__main__':
  main()
