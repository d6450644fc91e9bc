"""Our own sampler as a side of `bench_sampling`; runs where we run."""

import json

import jax
import numpy as np

from dpo_jax import policies
from dpo_jax import sampling
from dpo_jax import settings
from dpo_jax import sharding
from experiments import bench_step
from experiments.peers import protocol


def main():
  steps = protocol.Steps('jax', 'flax', memory=bench_step.peak_memory)
  folder, task, _ = protocol.arguments()
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  model = settings.Settings(
    dict(
      source=str(folder / 'policy'),
      dtype=task['dtype'],
      remat='none',
      scan_unroll=1,
      gather_share=0.0,
    )
  )
  with sharding.use(mesh):
    config, params, _ = policies.open_model(
      model, mesh=mesh, param_dtype='compute'
    )

    def generate(turn, temperature):
      return sampling.generate(
        config,
        {'params': params},
        [np.array(prompt, np.int32) for prompt in task['prompts']],
        key=jax.random.key(turn),
        max_new_tokens=task['max_new_tokens'],
        temperature=temperature,
        top_p=1.0,
        eos_id=-1,  # none ends
        batch_size=task['batch_size'],
      ).tokens

    generate(0, 1.0)  # compiles
    steps.begin()
    greedy = generate(0, 0.0)
    (folder / 'sampler.json').write_text(json.dumps(greedy.tolist()))
    steps.end(greedy.size)
    turn = 0
    while True:  # until no more are asked for
      turn += 1
      steps.end(generate(turn, 1.0).size)


if __name__ == '__main__':
  main()
