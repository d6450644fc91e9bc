"""Scale `paper` of controlled sentiment, compiled for the slice it is for.

    python -m experiments.imdb_compile             # all configs, then the table
    python -m experiments.imdb_compile --only ppo  # some, and the table

needs the TPU's compiler (the extra `tpu`), no TPU: minutes of two cores a
program. What is found is kept in docs/imdb_compile.jsonl, one record a config,
from which the table in docs/scaling.md is written; `--render` does that alone.
A config without a record, or with one of another config, has no row, and it is
an error; only with all of them are there hours of all runs.

Hours are those of the steps alone, by arithmetic on compiled programs and at
the longest texts that the configs allow: no evaluation, no host; nothing ran.
"""

import argparse
import collections
import json
import math
import pathlib
import sys

import jax

from dpo_jax import compilations
from dpo_jax import settings
from experiments import compile_records
from experiments import imdb_scales

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'imdb_compile.jsonl'
PAGE = ROOT / 'docs' / 'scaling.md'

SCALE, SLICE = imdb_scales.SCALES['paper'], 'v5e-8'
_PATHS = imdb_scales.Paths('runs/imdb')  # nothing is read there
_REVIEWS = 25_000  # that SFT learns from

# One run of each method; the others differ in numbers that no shape depends
# on. `ppo_gt_ours` runs what `ppo` does, without the learned reward beside it.
RUNS = {
  'dpo': 'dpo_0.1',
  'unlikelihood': 'unlikelihood_0.1',
  'preferred_ft': 'preferred_ft_0',
  'ppo': 'ppo_6',
  'ppo_gt_trl': 'ppo_gt_trl_6',
}
SAME = {'ppo_gt_ours': 'ppo'}
NAMES = ('sft', 'reward_model', *RUNS)

# What of a config its programs and their number depend on.
_DECIDING = (
  'model',
  'mesh',
  'batch_size',
  'accumulate',
  'logps_chunk',
  'adapter',
  'reference',
  'loss',
  'num_steps',
  'epochs',
  'rollout',
)
_DECIDING_DATA = ('max_prompt_tokens', 'max_response_tokens', 'row_length')


def config_of(name):
  """Returns the config of a name of NAMES, or of SAME."""
  if name == 'sft':
    return imdb_scales.sft_config(SCALE, _PATHS)
  if name == 'reward_model':
    return imdb_scales.reward_model_config(SCALE, _PATHS)
  run = RUNS.get(name, f'{name}_6')
  return imdb_scales.run_config(imdb_scales.parse(run), SCALE, _PATHS)


def asked(name):
  """Returns what the record of a name says if it is of the name's config."""
  return deciding(config_of(name))


def deciding(config):
  """Returns what of a config decides its programs, as JSON has it."""
  config = config.to_dict()
  found = {key: config[key] for key in _DECIDING if key in config}
  found['optim'] = config['optim']['name']
  found['data'] = {
    key: config['data'][key] for key in _DECIDING_DATA if key in config['data']
  }
  found['ppo.epochs'] = config.get('ppo', {}).get('epochs')
  for options in found.get('loss', {}).values():
    options.pop('beta', None)  # what runs of a method differ in
    options.pop('alpha', None)
  return json.loads(json.dumps(found))


def steps_of(name):
  """Returns the steps of a run: where they depend on data, the most."""
  config = config_of(name)
  if config.num_steps:
    return config.num_steps
  pairs = math.comb(SCALE.completions, 2) * SCALE.prefixes
  rows = _REVIEWS if name == 'sft' else pairs
  return math.ceil(config.epochs * rows / config.batch_size)


def prove(name):
  """Compiles the programs of a name; returns its record."""
  config = settings.Settings(config_of(name).to_dict())
  proof = compilations.prove(config, SLICE)
  print(f'{name}\n{proof}\n', file=sys.stderr, flush=True)
  unknown = {x for p in proof.programs for x in p.account.unknown}
  if unknown:
    raise ValueError(f'loops of unknown length: {unknown}')
  return {
    'name': name,
    'asked': asked(name),
    'topology': str(proof.topology),
    'lengths': list(proof.lengths),
    'shape': list(proof.shape),
    'step': list(proof.seconds),
    'programs': [
      {
        'name': p.name,
        'what': p.what,
        'times': p.times,
        'needed': p.needed,
        'usable': p.usable,
        'place': p.place,
        'flops': p.flops,
        'collectives': {
          kind: [traffic.count, traffic.payload, traffic.linked]
          for kind, traffic in p.account.collectives.items()
        },
        'at_best': p.estimate.at_best,
        'at_worst': p.estimate.at_worst,
        'links': p.estimate.links,
        'compile_seconds': p.seconds,
      }
      for p in proof.programs
    ],
  }


def records():
  """Returns ({name: record}, {name: why it has none}) of NAMES."""
  found, wrong = compile_records.read(RESULTS, 'name'), {}
  for name in NAMES:
    if name not in found:
      wrong[name] = f'{name} has no record'
    elif found[name]['asked'] != asked(name):
      wrong[name] = f'the record of {name} is of another config'
  return {n: found[n] for n in NAMES if n not in wrong}, wrong


HEADINGS = [
  'what',
  'a step',
  'GiB needed, of 15.75',
  'seconds of a step',
  'steps, at most',
  'hours of all',
]


def page():
  """Returns docs/scaling.md with the table of the records."""
  found, wrong = records()
  runs = collections.Counter(
    imdb_scales.parse(run).method for run in imdb_scales.FULL
  )
  rows, total = [HEADINGS], [0.0, 0.0]
  for name, record in found.items():
    names = [name, *(n for n, like in SAME.items() if like == name)]
    number = sum(runs.get(n, 0) for n in names)
    hours = [
      (number or 1) * steps_of(name) * seconds / 3600
      for seconds in record['step']
    ]
    if number:
      total = [a + b for a, b in zip(total, hours)]
    rows.append(_cells(names, number, record, steps_of(name), hours))
  if not wrong:
    rows.append(
      [f'all {sum(runs.values())} runs', '', '', '', '', _span(total, 1)]
    )
  return compile_records.on_page(PAGE, 'imdb_compile', rows)


def _cells(names, number, record, steps, hours):
  programs = record['programs']

  def each(form):
    texts = [form(program) for program in programs]
    if len(programs) == 1:
      return texts[0]
    return ', '.join(f'{p["name"]} {text}' for p, text in zip(programs, texts))

  alone = len(programs) == 1
  return [
    ', '.join(names) + (f': {number} runs' if number else ''),
    programs[0]['what'] if alone else each(lambda p: f'x {p["times"]}'),
    each(lambda p: f'{p["needed"] / 2**30:.2f}'),
    ('' if alone else each(lambda p: f'{p["at_best"]:.3f}') + '; all ')
    + _span(record['step'], 3),
    f'{steps:,}',
    _span(hours, 1),
  ]


def _span(pair, digits):
  return ' to '.join(f'{x:.{digits}f}' for x in pair)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--only', nargs='+', choices=NAMES, metavar='NAME')
  parser.add_argument('--render', action='store_true', help='only the table')
  options = parser.parse_args()
  # Devices that are here are of no use, and may be busy.
  jax.config.update('jax_platforms', 'cpu')
  if not options.render:
    for name in options.only or NAMES:
      compile_records.keep(RESULTS, 'name', prove(name), NAMES)
  PAGE.write_text(page())
  _, wrong = records()
  if wrong:
    sys.exit(
      f'{", ".join(wrong.values())}; run python -m experiments.imdb_compile'
      f' --only {" ".join(wrong)}'
    )


if __name__ == '__main__':
  main()
