"""Measure the memory and the time of importing a one-billion-parameter model.

    python experiments/import_memory.py [--folder=DIR] [--preset=llama3.2-1b]

Writes a Hugging Face folder of the preset's shape with random bfloat16 numbers
in shards of about 500 MB (a temporary folder, removed at the end), then imports
it onto the CPU in fresh processes, to float32 and to bfloat16, as training
does. Prints for each the sizes of the model and of its largest tensor, the
resident memory before and after (anonymous and mapped from files), its peak
(VmHWM), and the seconds. The bar: the peak is at most what the process had
before, the model in its target type, and one tensor.

"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from dpo_jax import exports
from dpo_jax import policies
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import weights
from dpo_jax.data import tokenizers
from dpo_jax.models import families
from dpo_jax.models import presets

SHARD = 500 * 10**6


def write(folder, preset):
  """Writes the synthetic folder, shard by shard."""
  config = presets.MODELS[preset]
  family = families.family_like(config)
  attributes = families.config_to_hf(config, family=family)
  (folder / 'config.json').write_text(json.dumps(attributes))
  tokenizers.ByteTokenizer().save(folder)
  shapes = families.hf_shapes(config, family=family)
  sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
  places, rng = {}, np.random.default_rng(0)
  for file, names in exports.plan_shards(sizes, SHARD).items():
    tensors = {
      name: rng.standard_normal(shapes[name], np.float32).astype(
        ml_dtypes.bfloat16
      )
      for name in names
    }
    safetensors.numpy.save_file(tensors, folder / file)
    places.update(dict.fromkeys(names, file))
  index = {'weight_map': places}
  (folder / weights.INDEX).write_text(json.dumps(index))


def memory():
  """Returns the lines of /proc/self/status about resident memory, in bytes."""
  values = {}
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    name, _, value = line.partition(':')
    if name in ('VmHWM', 'VmRSS', 'RssAnon', 'RssFile'):
      values[name] = int(value.split()[0]) * 1024
  return values


def read(folder, param_dtype):
  """Imports the folder in this process and prints what it took."""
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
  model = settings.Settings(
    dict(
      source=folder,
      dtype=param_dtype,
      remat='none',
      scan_unroll=1,
      gather_share=0.0,
    )
  )
  jax.block_until_ready(jax.numpy.zeros(1))
  kind = 'float32' if param_dtype == 'float32' else 'compute'
  before, start = memory(), time.perf_counter()
  _, params, _ = policies.open_model(model, mesh=mesh, param_dtype=kind)
  jax.block_until_ready(params)
  seconds, after = time.perf_counter() - start, memory()
  tensors = weights.open_checkpoint(folder).tensors.values()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  largest = max(np.prod(t.shape) * t.dtype.itemsize for t in tensors)
  over = after['VmHWM'] - before['VmRSS'] - size
  print(f'to {param_dtype} on {jax.device_count()} device(s): {seconds:.1f} s')
  for name, value in {
    'model': size,
    'largest tensor, as stored': largest,
    **{f'before, {name}': value for name, value in before.items()},
    **{f'after, {name}': value for name, value in after.items()},
    'peak - before - model': over,
  }.items():
    print(f'    {name:28} {value / 1e6:10,.1f} MB')
  print(f'    the bar {"holds" if over <= largest else "does NOT hold"}')


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--preset', default='llama3.2-1b')
  parser.add_argument('--folder', help='where the temporary folder goes')
  parser.add_argument('--read', nargs=2, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.read:
    read(*arguments.read)
    return
  with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
    write(pathlib.Path(name), arguments.preset)
    for param_dtype in ('float32', 'bfloat16'):
      subprocess.run(
        [sys.executable, __file__, '--read', name, param_dtype], check=True
      )


if __name__ == '__main__':
  main()
