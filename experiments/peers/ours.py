"""Our own training step as a side of the benchmark; runs where we run."""

from dpo_jax import policies
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax.data import batches
from experiments import bench_step
from experiments.peers import protocol


def main():
  steps = protocol.Steps('jax', 'flax', 'optax', memory=bench_step.peak_memory)
  folder, task, _ = protocol.arguments()
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  groups, numbers = [], []
  for pairs in task['steps']:
    numbers.append(list(range(len(groups), len(groups) + len(pairs))))
    groups += [
      bench_step.make_group(
        pair['prompt'], (pair['chosen'], pair['rejected']), id='pair'
      )
      for pair in pairs
    ]
  with sharding.use(mesh):
    params = {}
    for part in ('policy', 'ref'):
      model = settings.Settings(
        dict(
          source=str(folder / part),
          dtype=task['dtype'],
          remat=task['remat'],
          scan_unroll=1,
          gather_share=0.0,
        )
      )
      config, params[part], _ = policies.open_model(model, mesh=mesh)
    plan = batches.plan_steps(
      groups,
      numbers,
      row_length=task['row_length'],
      multiple=sharding.row_shards(mesh),
      window=config.window,
    )
    run = bench_step.make_run(
      config,
      params.pop('policy'),
      params.pop('ref'),
      plan,
      mesh,
      reference=task['reference'],
      batch_size=task['batch_size'],
      chunk=task['chunk'],
    )
    steps.begin()
    for number in range(task['timed'] + 1):
      steps.end(run(number))


if __name__ == '__main__':
  main()
