"""The command line: `dpo-jax VERB --config=FILE[:ARGUMENTS] --workdir=DIR`.

Verbs:
  prepare  read, split and tokenize the data; show what was kept, and why not
  train    train, or go on training, in --workdir
  sample   continue --prompt with the policy of --workdir (or model.source)
  eval     measure the policy of --workdir (or model.source)
  online   rounds of sampling, scoring and training (configs/quickstart.py)

A config key is set by --config.KEY=VALUE.
"""

import difflib
import json
import pathlib
import sys

import jax
import ml_collections.config_flags
from absl import app
from absl import flags
from absl import logging

from dpo_jax import evaluators
from dpo_jax import losses
from dpo_jax import online
from dpo_jax import runs
from dpo_jax import sampling
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import train

CONFIG = ml_collections.config_flags.DEFINE_config_file(
  'config', None, 'Config file, with arguments behind a colon.'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where errors arise.')
PROMPT = flags.DEFINE_multi_string('prompt', [], 'sample: text to continue.')


def prepare(config, workdir):
  """Shows what training would read, keep and drop, and in which rows."""
  del workdir
  mesh = sharding.make_mesh(**config.mesh)
  model_config, _, tokenizer = runs.open_model(config.model, mesh=mesh)
  responses = losses.get(config.loss.name).responses
  groups, report = runs.load_groups(
    config.data, tokenizer, model_config, responses=responses
  )
  print(report)
  plan = train.training_plan(config, groups['train'], mesh)
  print(f'\ntrain: {plan.summary()}')


def sample(config, workdir):
  """Continues each --prompt; `eval.samples` in the config says how."""
  if not PROMPT.value:
    raise ValueError("sample continues a text; give one with --prompt='...'")
  mesh = sharding.make_mesh(**config.mesh)
  model_config, params, tokenizer = runs.open_model(config.model, mesh=mesh)
  if workdir:
    params = runs.restore_newest(workdir, {'params': params})[1]['params']
  how = config.eval.samples
  repeat = how.samples_per_prompt
  repeated = [text for text in PROMPT.value for _ in range(repeat)]
  samples = sampling.generate(
    model_config,
    params,
    runs.encode_prompts(repeated, tokenizer),
    key=jax.random.key(config.seed),
    max_new_tokens=how.max_new_tokens,
    temperature=how.temperature,
    top_p=how.top_p,
    eos_id=tokenizer.eos_id,
    batch_size=how.batch_size,
  )
  texts = evaluators.response_texts(samples, tokenizer)
  for prompt, text in zip(repeated, texts):
    print(json.dumps({'prompt': prompt, 'response': text}, ensure_ascii=False))


def evaluate(config, workdir):
  """Prints the held-out metrics of a policy as one JSON object."""
  mesh = sharding.make_mesh(**config.mesh)
  with sharding.use(mesh):
    run = runs.set_up(config, mesh)
    params, step = run.params, 0
    if workdir:
      step, items = runs.restore_newest(workdir, {'params': params})
      params = items['params']
    values, _ = run.evaluate(params, step)
  values = {name: float(value) for name, value in values.items()}
  print(json.dumps({'step': step, **values}, indent=2))


def _print(config):
  print(json.dumps(config.as_dict(), indent=2))


def train_and_print(config, workdir):
  """Trains in `workdir`."""
  _print(config)
  train.train(config, _needed(workdir))


def online_and_print(config, workdir):
  """Runs the rounds of an online config in `workdir`."""
  _print(config)
  print(online.run(config, _needed(workdir)))


def _needed(workdir):
  if not workdir:
    raise ValueError('this verb writes to a directory; add --workdir=DIR')
  return workdir


VERBS = {
  'prepare': prepare,
  'train': train_and_print,
  'sample': sample,
  'eval': evaluate,
  'online': online_and_print,
}


def main(argv):
  """Runs one verb; mistakes of the user end in one line, not a traceback."""
  verb = argv[1] if len(argv) == 2 else ''
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise app.UsageError(
      f'expected one verb of {", ".join(VERBS)}, got {argv[1:]}{hint}'
    )
  if CONFIG.value is None:
    raise app.UsageError('a verb needs --config=FILE, e.g. configs/sft.py')
  config = settings.Settings(CONFIG.value.to_dict())
  logging.set_verbosity(logging.WARNING)  # Orbax tells much
  try:
    VERBS[verb](config, WORKDIR.value)
  except (ValueError, FloatingPointError, OSError) as error:
    if TRACEBACK.value:
      raise
    sys.exit(f'dpo-jax: {error}')


def run():
  """Entry point: `dpo-jax`, `python -m dpo_jax.main`."""
  # Config files import their neighbours: `from configs import common`.
  for argument in sys.argv:
    if argument.startswith('--config='):
      path = pathlib.Path(argument.removeprefix('--config=').partition(':')[0])
      sys.path.insert(0, str(path.absolute().parents[1]))
  app.run(main)


if __name__ == '__main__':
  run()
