"""The command line: `dpo-jax VERB --config=FILE[:ARGUMENTS] --workdir=DIR`.

Verbs:
  prepare  read, split and tokenize the data; show what was kept, and why not
  compile  compile what training runs, offline or PPO, for a TPU slice that is
           not there, by --topology; show what it needs and costs
           (`compilations`)
  train    train, or go on training, in --workdir
  sample   continue --prompt with the policy of --workdir (or model.source)
  eval     measure the policy of --workdir (or model.source)
  online   rounds of sampling, scoring and training (configs/quickstart.py)
  ppo      PPO on rewards of the policy's own samples (configs/ppo.py)
  convert  write a model, a run or an adapter as a folder that other libraries
           load (`conversions`): `dpo-jax convert SOURCE FOLDER`, no --config
  sentiment  train a classifier of movie reviews, and a second judge, for
           rewards (`sentiment`): `dpo-jax sentiment REVIEWS FOLDER`

A config key is set by --config.KEY=VALUE. train, eval, sample, online and ppo
may run as several processes, of which docs/launching.md tells.
"""

import json
import logging as stdlib_logging
import os
import pathlib
import signal
import sys
import traceback

import jax
import ml_collections.config_flags
from absl import app
from absl import flags
from absl import logging

from dpo_jax import compilations
from dpo_jax import conversions
from dpo_jax import evaluators
from dpo_jax import exports
from dpo_jax import fetch
from dpo_jax import launches
from dpo_jax import names
from dpo_jax import online
from dpo_jax import policies
from dpo_jax import ppo
from dpo_jax import processes
from dpo_jax import runs
from dpo_jax import sentiment
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import workdirs
from dpo_jax.data import examples

CONFIG = ml_collections.config_flags.DEFINE_config_file(
  'config', None, 'Config file, with arguments behind a colon.'
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
flags.DEFINE_bool('traceback', False, 'Show where errors arise.')
DTYPE = flags.DEFINE_enum(
  'dtype', 'auto', exports.DTYPES, 'convert: type to store; auto: as it is.'
)
SHARD_SIZE = flags.DEFINE_string(
  'shard_size', '5GB', 'convert: how large a file may get.'
)
ADAPTER = flags.DEFINE_string(
  'adapter', '', "convert: PEFT's folder, to merge into the model."
)
MERGE = flags.DEFINE_bool(
  'merge', False, 'convert: merge what a run of an adapter trained.'
)
OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'convert: replace a model that is there.'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'Several processes: HOST:PORT where process 0 listens.'
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes',
  None,
  'How many; 1: no others, whatever the environment says.',
)
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0.'
)
START_TIMEOUT = flags.DEFINE_float(
  'start_timeout', 300.0, 'Seconds to wait until all processes are there.'
)
GRACE = flags.DEFINE_float(
  'grace',
  processes.GRACE,
  'Seconds after a SIGTERM until a step or a compilation is given up.',
)
CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  'newest',
  'eval, sample, convert: of a run; newest, best, a step.',
)
TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'compile: TPU slice, such as v5e:16x16 or v5e-256.'
)
LENGTHS = flags.DEFINE_list(
  'lengths',
  [],
  'compile: tokens of a prompt and of its responses; default: the most that the'
  ' config allows. Of PPO: of the longest prompt, and of a sample.',
)
PROMPT = flags.DEFINE_multi_string('prompt', [], 'sample: text to continue.')


def prepare(config, workdir):
  """Shows what training would read, keep and drop, and in which rows."""
  del workdir  # nothing is written but the data cache
  # As few devices as the config allows: to ask which are here would start them,
  # and those of a pod wait for each other.
  sizes = {axis: max(1, size) for axis, size in dict(config.mesh).items()}
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  model = policies.open_source(config.model.source)
  tokenizer = policies.templated(model.tokenizer, config.data.chat_template)
  train.check(config, mesh)
  terms = runs.bind_losses(config)
  groups, report = runs.load_groups(config.data, tokenizer, model.config, terms)
  plan = train.training_plan(
    config, groups['train'], mesh, window=model.config.window
  )
  print(f'{report}\n\ntrain: {plan.summary()}; mesh axes of -1 taken as 1')


def sample(config, workdir):
  """Continues each --prompt; `eval.samples` in the config says how."""
  if not PROMPT.value:
    raise ValueError("sample continues a text; give one with --prompt='...'")
  mesh = sharding.make_mesh(**config.mesh)
  if workdir:
    workdirs.check_same(workdir, config, ('model', 'adapter'))
  policy = policies.open_policy(
    config, mesh, workdir=workdir or '', which=CHECKPOINT.value
  )
  tokenizer = policy.tokenizer
  how = config.eval.samples
  repeated = [
    text for text in PROMPT.value for _ in range(how.samples_per_prompt)
  ]
  prompts = examples.encode_prompts(
    repeated, tokenizer, config.data.max_prompt_tokens
  )
  with sharding.use(mesh):
    samples = evaluators.sample(
      policy.config,
      tokenizer,
      policy.variables(policy.trained),
      prompts,
      title='sample',
      key=policies.stream(config.seed, 'sample'),
      max_new_tokens=how.max_new_tokens,
      temperature=how.temperature,
      top_p=how.top_p,
      batch_size=how.batch_size,
    )
  texts = evaluators.response_texts(samples, tokenizer)
  for prompt, text in zip(repeated, texts):
    print(json.dumps({'prompt': prompt, 'response': text}, ensure_ascii=False))


def evaluate(config, workdir):
  """Prints the held-out metrics of a policy as one JSON object."""
  if workdir:
    workdirs.check_same(workdir, config, (*train.RESUMED, 'eval'))
  mesh = sharding.make_mesh(**config.mesh)
  with sharding.use(mesh):
    if 'ppo' in config:
      ppo.check(config, mesh)
      run, _ = ppo.set_up(config, mesh)
    else:
      train.check(config, mesh)
      run = runs.set_up(config, mesh, splits=('test',))
    items, step = {'params': run.policy.trained}, 0
    if config.reference.mode == 'ema':
      items['ref'] = run.policy.trained
    if run.first_memory:
      items['memory'] = run.first_memory
    if workdir:
      step, items = workdirs.restore(workdir, items, which=CHECKPOINT.value)
    values, _ = run.evaluate(**({'ref': None, 'memory': {}} | items))
  values = {name: float(value) for name, value in values.items()}
  print(json.dumps({'step': step, **values}, indent=2))


def compile_step(config, workdir):
  """Compiles the programs of a config for --topology; shows what they cost."""
  del workdir  # nothing is written
  if not TOPOLOGY.value:
    raise ValueError(
      'compile needs the name of a TPU slice; add --topology=v5e-256, say'
    )
  if not all(text.isdigit() for text in LENGTHS.value):
    raise ValueError(f'--lengths are numbers, got {",".join(LENGTHS.value)}')
  # Devices that are here are of no use, and may be busy.
  jax.config.update('jax_platforms', 'cpu')
  lengths = tuple(map(int, LENGTHS.value))
  print(compilations.prove(config, TOPOLOGY.value, lengths=lengths))


def train_and_print(config, workdir):
  """Trains in `workdir`."""
  print(json.dumps(config.as_dict(), indent=2), flush=True)
  train.train(config, _needed(workdir))


def online_and_print(config, workdir):
  """Runs the rounds of an online config in `workdir`."""
  print(json.dumps(config.as_dict(), indent=2), flush=True)
  print(online.run(config, _needed(workdir)))


def ppo_and_print(config, workdir):
  """Trains by PPO in `workdir`."""
  print(json.dumps(config.as_dict(), indent=2))
  ppo.run(config, _needed(workdir))


def convert(arguments):
  """Writes a model or an adapter as a folder; see `conversions`."""
  if len(arguments) != 2:
    raise ValueError(
      'convert needs what to read and the folder to write: dpo-jax convert'
      f' SOURCE FOLDER; got {arguments}'
    )
  # An accelerator is of no use here and may be busy.
  jax.config.update('jax_platforms', 'cpu')
  print(
    conversions.convert(
      *arguments,
      adapter=ADAPTER.value,
      merge=MERGE.value,
      dtype=DTYPE.value,
      shard_size=SHARD_SIZE.value,
      overwrite=OVERWRITE.value,
      which=CHECKPOINT.value,
    )
  )


def train_sentiment(arguments):
  """Trains the classifiers of `sentiment` and shows how good they are."""
  if len(arguments) != 2:
    raise ValueError(
      "sentiment needs IMDb's reviews ('official' or a folder) and the folder"
      f' to write: dpo-jax sentiment REVIEWS FOLDER; got {arguments}'
    )
  source, folder = arguments
  made = sentiment.train(
    source, folder, cache_dir=fetch.cache_folder() / 'data'
  )
  print(sentiment.account(made))


def _needed(workdir):
  if not workdir:
    raise ValueError('this verb writes to a directory; add --workdir=DIR')
  return workdir


VERBS = {
  'prepare': prepare,
  'compile': compile_step,
  'train': train_and_print,
  'sample': sample,
  'eval': evaluate,
  'online': online_and_print,
  'ppo': ppo_and_print,
}

# Verbs that need no config and take arguments of their own.
BARE_VERBS = {'convert': convert, 'sentiment': train_sentiment}

# Verbs that several processes may run together.
SHARED_VERBS = ('train', 'eval', 'sample', 'online', 'ppo')

# Verbs of which a workdir is the run.
WRITERS = ('train', 'online', 'ppo')

# Verbs that read a run's checkpoint, of which --checkpoint says which.
READERS = ('eval', 'sample', 'convert')

# Mistakes of the user end in one line; --traceback shows where they arose.
MISTAKES = (ValueError, FloatingPointError, OSError, AttributeError, KeyError)


def main(argv):
  """Runs one verb."""
  known = VERBS | BARE_VERBS
  if len(argv) < 2 or (len(argv) > 2 and argv[1] not in BARE_VERBS):
    raise ValueError(f'expected one verb of {", ".join(known)}, got {argv[1:]}')
  verb = names.look_up(known, 'verb', argv[1])
  # Orbax tells much, and of errors before it raises them.
  trace = '--traceback' in sys.argv
  logging.set_verbosity(logging.WARNING if trace else logging.FATAL)
  if not trace:
    stdlib_logging.getLogger('asyncio').setLevel(stdlib_logging.CRITICAL)
  if CHECKPOINT.value != 'newest' and argv[1] not in READERS:
    raise ValueError(
      f'--checkpoint is for {", ".join(READERS)}; {argv[1]} goes on from the'
      ' newest one'
    )
  launch = launches.find(
    COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, os.environ
  )
  if argv[1] not in SHARED_VERBS and launch.how not in ('alone', 'TPU'):
    raise ValueError(
      f'{argv[1]} runs as one process, and this is one of several'
      f' ({launch.how}); run it once, with --num_processes=1'
    )
  if argv[1] in BARE_VERBS:
    verb(argv[2:])
    return
  if CONFIG.value is None:
    raise ValueError('a verb needs --config=FILE, such as configs/sft.py')
  config = settings.Settings(CONFIG.value.to_dict())
  if argv[1] not in SHARED_VERBS:
    verb(config, WORKDIR.value)
    return
  with processes.heed_sigterm(grace=GRACE.value):
    launches.start(launch, timeout=START_TIMEOUT.value)
    verb(config, WORKDIR.value)
    if argv[1] in WRITERS:
      workdirs.finish(WORKDIR.value)
    processes.finish()


def run():
  """Entry point: `dpo-jax`, `python -m dpo_jax.main`."""
  # Config files import their neighbours: `from configs import common`.
  for argument, following in zip(sys.argv, [*sys.argv[1:], '']):
    name, equals, value = argument.partition('=')
    if name in ('--config', '-config'):
      path = pathlib.Path((value if equals else following).partition(':')[0])
      sys.path.insert(0, str(path.absolute().parents[1]))
  ends_all(lambda: app.run(main, flags_parser=_parse))


def ends_all(function):
  """Calls; what ends this process ends the others of the run, and says why."""
  trace = '--traceback' in sys.argv
  try:
    function()
  except processes.Preempted as stop:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one of the others'
    text = f'{stop.what}; start it again to go on'
    if not stop.together:
      processes.fail(text, processes.PREEMPTED)
    print(f'dpo-jax: {text}', file=sys.stderr)
    processes.finish()
    raise
  except MISTAKES as error:
    if trace:
      _tell(error)
    processes.fail(str(error))
    sys.exit(f'dpo-jax: {error}  (--traceback shows where)')
  except Exception as error:
    # Of several processes, most likely one has gone in the middle of a step.
    gone = isinstance(error, jax.errors.JaxRuntimeError)
    if trace or not gone or processes.alone():
      _tell(error)
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    processes.fail(f'{line}; {processes.AGAIN}' if gone else line)
    sys.exit(1)
  except KeyboardInterrupt as error:
    if trace:
      _tell(error)
    processes.fail('interrupted')
    print(
      'dpo-jax: interrupted; started again, a run goes on from its last'
      ' checkpoint',
      file=sys.stderr,
    )
    sys.exit(130)


def _tell(error):
  # sys.stderr of all processes but the first is closed.
  traceback.print_exception(error, file=sys.__stderr__)


def _parse(argv):
  """Parses flags; what a config file raises is the last line of the error."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError) as error:
    if '--traceback' in argv:
      raise
    text = error
    while isinstance(text, BaseException) and text.args:
      text = text.args[0]
    if ' ' not in str(text):  # a bare key, with no other near it
      text = (
        f'the config has no key {text} here; what is chosen behind the colon of'
        ' --config, such as reference=ema, brings its keys'
      )
    lines = [line for line in str(text).splitlines() if line.strip()]
    if isinstance(error, flags.Error):
      lines = lines[-1:]
    sys.exit(f'dpo-jax: {" ".join(lines)}')


if __name__ == '__main__':
  run()
