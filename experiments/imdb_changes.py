"""What training has done to log pi(y_w) of held-out pairs, prompt by prompt.

The log of a run has the mean over pairs. Its standard error needs every pair,
and the pairs of a prompt, which share their four responses, count as one.
"""

import json

import numpy as np

from dpo_jax import objectives
from dpo_jax import policies
from dpo_jax import ref_cache
from dpo_jax import runs
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import workdirs
from dpo_jax.data import batches

FILE = 'change.json'  # of a run's folder: the change of each held-out prompt


def by_prompt(groups, values):
  """Returns {prompt's tokens: mean of the values of its groups}."""
  found = {}
  for group, value in zip(groups, values, strict=True):
    found.setdefault(tuple(group.prompt.tolist()), []).append(float(value))
  return {prompt: float(np.mean(x)) for prompt, x in found.items()}


def chosen_logps(config, workdir):
  """Returns log pi(chosen) of a run's held-out pairs, see `by_prompt`.

  Args:
    config: of the run, on pairs.
    workdir: of the run; '' is the model that it begins with.
  """
  mesh = sharding.make_mesh(**config.mesh)
  with sharding.use(mesh):
    policy = policies.open_policy(config, mesh, workdir=str(workdir))
    groups, _ = runs.load_groups(
      config.data, policy.tokenizer, policy.config, runs.bind_losses(config)
    )
    plan = batches.evaluation_plan(
      groups['test'],
      batch_size=config.eval.batch_size,
      row_length=config.data.row_length,
      multiple=sharding.row_shards(mesh),
      window=policy.config.window,
    )
    token_logps = objectives.make_token_logps(
      policy.config, chunk=runs.head_chunk(config)
    )
    values = np.full(plan.starts[-1], np.nan, np.float32)
    ref_cache.compute(
      token_logps,
      policy.variables(policy.trained),
      plan,
      mesh,
      values,
      name='held-out pairs',
    )
  sums = [
    values[start : start + len(group.responses[0])].sum()
    for start, group in zip(plan.starts, plan.groups)
  ]
  return by_prompt(plan.groups, sums)


def write(folders):
  """Writes `FILE` of finished runs that begin at one model, on the same pairs.

  What is there stays.
  """
  first = None
  for folder in folders:
    if (folder / FILE).exists():
      continue
    config = settings.Settings(workdirs.read_config(str(folder)))
    first = first or chosen_logps(config, '')
    last = chosen_logps(config, folder)
    changes = [last[prompt] - first[prompt] for prompt in first]
    workdirs.write(str(folder / FILE), json.dumps(changes))


def read(folder):
  """Returns the changes of a run, nats, [prompts]; None without a file."""
  path = folder / FILE
  return np.array(json.loads(path.read_text())) if path.exists() else None
