"""Grids of overrides: a config file and NAME=VALUE,... become jobs.

    loss=dpo,kto beta=0.1,0.5

is, for configs/preference.py:data=jsonl, four jobs:

    name              loss=dpo,beta=0.1
    arguments         --config=configs/preference.py:data=jsonl,loss=dpo
                      --config.loss.dpo.beta=0.1
"""

import difflib
import importlib.util
import itertools
import json
import os
import pathlib
import sys
import urllib.parse
from typing import NamedTuple

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from dpo_jax import names
from dpo_jax import ppo
from dpo_jax import rounds
from dpo_jax import settings
from dpo_jax import train
from dpo_jax import workdirs

CHECKS = {'train': train.check, 'ppo': ppo.check, 'online': rounds.check}
VERBS = tuple(CHECKS)
_LONGEST = 200  # bytes of a name; folders allow 255


class Job(NamedTuple):
  """One run of a grid.

  values: {NAME: text} of all entries. arguments: of the verb, without a
  workdir. config: what they give, nested dicts.
  """

  name: str
  values: dict
  verb: str
  arguments: tuple
  config: dict


# --- Entries ------------------------------------------------------------------


def read(entries, problems):
  """Returns {NAME: [text, ...]}; appends to `problems` what is none."""
  grid = {}
  for entry in entries:
    name, equals, text = entry.partition('=')
    texts = split(text)
    if not equals or not name:
      problems.append(f'{entry!r} is no NAME=VALUE[,VALUE...]')
    elif name in grid:
      problems.append(f'{name} stands twice; give all its values at once')
    else:
      for value in dict.fromkeys(t for t in texts if texts.count(t) > 1):
        problems.append(f'{name}={value} stands twice; duplicate jobs')
      grid[name] = list(dict.fromkeys(texts))
  return grid


def split(text):
  """Splits a text at its commas, but not within brackets."""
  texts, depth = [''], 0
  for letter in text:
    if letter == ',' and not depth:
      texts.append('')
      continue
    texts[-1] += letter
    depth = max(depth + (letter in '([{') - (letter in ')]}'), 0)
  return texts


def job_name(values, varying):
  """Returns the folder of a job: its values that vary, safe in any shell."""
  parts = [
    f'{name}={urllib.parse.quote(values[name], safe="+@")}' for name in varying
  ]
  return ','.join(parts) or 'run'


# --- Configs ------------------------------------------------------------------


def load(path):
  """Returns `get_config` of a config file."""
  # Config files import their neighbours, as in `main.run`.
  sys.path.insert(0, str(pathlib.Path(path).absolute().parents[1]))
  try:
    spec = importlib.util.spec_from_file_location('sweep_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config
  except (AttributeError, OSError) as error:
    raise ValueError(f'{path!r} is no config file: {error}') from error
  finally:
    del sys.path[0]


def colon_arguments(get_config):
  """Returns {name: default} of what a config file takes behind the colon."""
  try:
    get_config('=')  # `common.parse` knows no argument without a name
  except names.Unknown as error:
    return dict(error.table)
  except (TypeError, ValueError):
    pass
  return {}


def with_arguments(base, values, known):
  """Returns the text behind the colon: that of `base`, with other `values`."""
  parts = [p for p in base.split(',') if p and p.split('=')[0] not in values]
  for name, text in values.items():
    if not isinstance(known[name], bool):
      parts.append(f'{name}={text}')
    elif text.lower() in ('true', '1'):
      parts.append(name)
    elif text.lower() not in ('false', '0'):
      raise ValueError(f'{name}={text}: use true or false')
  return ','.join(parts)


def leaves(config, prefix=''):
  """Lists the dotted keys of a config that hold a value."""
  out = []
  for name in config:
    if isinstance(config[name], ml_collections.ConfigDict):
      out += leaves(config[name], f'{prefix}{name}.')
    else:
      out.append(prefix + name)
  return out


def find_key(name, config, known):
  """Returns the one key of a config that is `name` or ends with it."""
  keys = leaves(config)
  if name in keys:
    return name
  found = [key for key in keys if key.endswith(f'.{name}')]
  if len(found) == 1:
    return found[0]
  if found:
    raise ValueError(f'{name} may be {", ".join(found)}; say which')
  inside = [key for key in keys if key.startswith(f'{name}.')]
  if inside:
    raise ValueError(f'{name} is a section; name one of {", ".join(inside)}')
  short = {key.rpartition('.')[2] for key in keys}
  near = difflib.get_close_matches(name, sorted({*keys, *short, *known}))
  hint = f'; did you mean {" or ".join(near)}?' if near else ''
  raise ValueError(f'{name} is no key of the config{hint}')


def set_keys(config, values):
  """Returns a copy with {key: text} set, read as the command line does."""
  argv = ['sweep', *(f'--config.{key}={text}' for key, text in values.items())]
  holder = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    'config',
    config.copy_and_resolve_references(),
    flag_values=holder,
    sys_argv=argv,
  )
  holder(argv)
  return holder.config


def verb_of(config):
  """Returns the verb that a config is made for."""
  if 'ppo' in config:
    return 'ppo'
  return 'online' if 'rounds' in config else 'train'


def check(config, verb):
  """Refuses what a verb would refuse before it looks at data or devices."""
  config = settings.Settings(config)
  mesh = (config.train if verb == 'online' else config).mesh
  sizes = {axis: max(1, size) for axis, size in dict(mesh).items()}
  CHECKS[verb](
    config, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  )


# --- Jobs ---------------------------------------------------------------------


class _Problems:
  """Lines, each once, with the choices or the jobs that it is true for."""

  def __init__(self):
    self.lines, self.opened = {}, set()

  def add(self, text, where):
    self.lines.setdefault(text, {})[where] = None

  def listed(self):
    out = []
    for text, where in self.lines.items():
      if '' not in where and not where.keys() >= self.opened > set():
        first, *others = where
        more = f' and {len(others)} more' if others else ''
        text += f' (with {first}{more})'
      out.append(text)
    return out


def expand(config, entries, *, verb=None):
  """Returns (jobs, problems); the first name varies slowest.

  Args:
    config: a config file, perhaps with arguments behind a colon.
    entries: texts NAME=VALUE[,VALUE...].
    verb: of `VERBS`; None is the one of each config.
  """
  path, _, base = config.partition(':')
  syntax, found = [], _Problems()
  grid = read(entries, syntax)
  try:
    get_config = load(path)
  except ValueError as error:
    return [], [*syntax, str(error)]
  known = colon_arguments(get_config)
  varying = [name for name, texts in grid.items() if len(texts) > 1]
  opened, jobs, whole = {}, [], []
  for texts in itertools.product(*grid.values()):
    values = dict(zip(grid, texts))
    chosen = {name: text for name, text in values.items() if name in known}
    choice = ','.join(f'{name}={text}' for name, text in chosen.items())
    if choice not in opened:
      opened[choice] = None
      try:
        arg = with_arguments(base, chosen, known)
        start = get_config(arg) if arg else get_config()
      except (ValueError, AttributeError, KeyError, TypeError) as error:
        found.add(str(error), choice)
        continue
      found.opened.add(choice)
      opened[choice] = arg, start, *_keys(start, known, grid, choice, found)
    if opened[choice] is None:
      continue
    arg, start, keys, bad = opened[choice]
    if bad & values.items():
      continue
    set_to = {keys[name]: values[name] for name in keys}
    made = set_keys(start, set_to)
    of = verb or verb_of(made)
    name = job_name(values, varying)
    arguments = [f'--config={path}:{arg}' if arg else f'--config={path}']
    arguments += [f'--config.{key}={text}' for key, text in set_to.items()]
    made = made.to_dict()
    try:
      check(made, of)
    except (ValueError, AttributeError, KeyError) as error:
      for line in str(error).split('\n'):
        found.add(line, name)
    if len(name.encode()) > _LONGEST:
      found.add('names too long for a folder; vary fewer of them', name)
    jobs.append(Job(name, values, of, tuple(arguments), made))
    if len(chosen) + len(keys) == len(grid):
      whole.append(jobs[-1])
  return jobs, [*syntax, *found.listed(), *_duplicates(whole)]


def _keys(config, known, grid, choice, found):
  """Returns ({name: key}, values (name, text) that the keys refuse)."""
  keys, bad = {}, set()
  for name in grid:
    if name in known:
      continue
    try:
      key = find_key(name, config, known)
      if key in keys.values():
        raise ValueError(f'{name} sets {key}, which another name sets too')
    except ValueError as error:
      found.add(str(error), choice)
      continue
    keys[name] = key
    for text in grid[name]:
      try:
        set_keys(config, {key: text})
      except (flags.Error, ValueError, TypeError) as error:
        why = str(error).partition(f'{key}={text}: ')[2] or error
        found.add(f'{name}={text}: {why}', choice)
        bad.add((name, text))
  return keys, bad


def _duplicates(jobs):
  seen, out = {}, []
  for job in jobs:
    text = json.dumps(job.config, sort_keys=True, default=str)
    if text in seen:
      out.append(f'{job.name} is the same run as {seen[text]}')
    seen.setdefault(text, job.name)
  return out


def strangers(jobs, workdir):
  """Lists the jobs whose folder has a run with another config."""
  out = []
  for job in jobs:
    try:
      config = settings.Settings(job.config)
      workdirs.check(os.path.join(workdir, job.name), config)
    except ValueError as error:
      out.append(str(error))
  return out
