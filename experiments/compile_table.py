"""The table of docs/scaling.md: training steps compiled for TPU slices.

    python -m experiments.compile_table             # all rows, then the table
    python -m experiments.compile_table --row 6 9   # some, and the table

needs the TPU's compiler (the extra `tpu`), no TPU. Every row is compiled in a
process of its own, so that its memory is its own: minutes of two cores and up
to 3 GiB each. What was found is kept in docs/compile_table.jsonl, one record a
row, from which the table in docs/scaling.md is written; `--render` does that
alone. No table is written where a row has no record or one of another program,
and it is an error if a row does not compile.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from configs import preference
from dpo_jax import compilations
from dpo_jax import settings
from experiments import compile_records

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'compile_table.jsonl'
PAGE = ROOT / 'docs' / 'scaling.md'

_IMDB = (8, 124, 124)  # tokens of a prompt and its responses
_LONGEST = ()  # that the config allows: 256 of each

# Options of the TPU's compiler, which a run of the model needs as well
# (LIBTPU_INIT_ARGS). Where little of D is on a chip, it would cut gathers and
# the products behind them into many small parts that are passed round.
FLAGS = {
  'pythia-2.8b': '--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000'
}

# (task, model, slice, pairs a step, mesh data and fsdp, remat and accumulate
# where they are not dots and 1, lengths).
ROWS = [
  ('IMDb', 'gpt2-large', 'v5e-8', 128, (4, 2), {}, _IMDB),
  ('IMDb', 'gpt2-large', 'v4-32', 256, (16, 1), {}, _IMDB),
  ('HH', 'pythia-2.8b', 'v5e-8', 64, (1, 8), {'accumulate': 2}, _LONGEST),
  ('HH', 'pythia-2.8b', 'v4-32', 128, (1, 16), {}, _LONGEST),
  ('HH', 'pythia-6.9b', 'v5e-256', 1024, (16, 16), {}, _LONGEST),
  ('HH', 'pythia-6.9b', 'v5p-128', 512, (4, 16), {}, _LONGEST),
  ('HH', 'pythia-6.9b', 'v6e-64', 256, (8, 8), {}, _LONGEST),
  ('HH', 'llama2-7b', 'v5e-256', 1024, (16, 16), {}, _LONGEST),
  ('HH', 'llama2-7b', 'v5p-128', 512, (4, 16), {}, _LONGEST),
  ('HH', 'llama2-7b', 'v6e-64', 256, (8, 8), {}, _LONGEST),
  ('HH', 'llama2-70b', 'v5p-512', 512, (4, 64), {}, _LONGEST),
  (
    'HH',
    'llama2-70b',
    'v6e-256',
    2048,
    (1, 256),
    {'model.remat': 'full'},
    _LONGEST,
  ),
]


def asked(number):
  """Returns what the record of a row says if it is of the row's program."""
  task, model, name, pairs, (data, fsdp), keys, _ = ROWS[number]
  return {
    'row': number,
    'task': task,
    'model': model,
    'slice': name,
    'mesh': {'data': data, 'fsdp': fsdp, 'tensor': 1},
    'pairs': pairs,
    'remat': keys.get('model.remat', 'dots'),
    'accumulate': keys.get('accumulate', 1),
    'flags': FLAGS.get(model, ''),
  }


def prove(number):
  """Compiles a row; returns its record."""
  task, model, name, pairs, (data, fsdp), keys, lengths = ROWS[number]
  config = preference.get_config(f'data=hh,model={model}')
  config.update_from_flattened_dict(
    {
      'batch_size': pairs,
      'mesh.data': data,
      'mesh.fsdp': fsdp,
      'logps_chunk': 1024,
      'model.remat': 'dots',
    }
    | keys
  )
  start = time.perf_counter()
  proof = compilations.prove(
    settings.Settings(config.to_dict()), name, lengths=lengths
  )
  print(proof, file=sys.stderr)
  (step,) = proof.programs
  if step.account.unknown:
    raise ValueError(f'loops of unknown length: {step.account.unknown}')
  estimate, chips = step.estimate, proof.topology.chips
  return {
    'row': number,
    'task': task,
    'model': model,
    'slice': name,
    'topology': str(proof.topology),
    'chips': chips,
    'mesh': proof.mesh,
    'pairs': pairs,
    'shape': list(proof.shape),
    'remat': config.model.remat,
    'accumulate': config.accumulate,
    'flags': os.environ.get('LIBTPU_INIT_ARGS', ''),
    'needed': step.needed,
    'usable': step.usable,
    'place': step.place,
    'flops': step.flops,
    'kernel_flops': step.kernel_flops,
    'useful_flops': step.useful / chips,
    'collectives': {
      kind: [traffic.count, traffic.payload, traffic.linked]
      for kind, traffic in step.account.collectives.items()
    },
    'matrix': estimate.matrix,
    'memory': estimate.memory,
    'links': estimate.links,
    'compiler': estimate.compiler,
    'products': estimate.products,
    'at_best': estimate.at_best,
    'at_worst': estimate.at_worst,
    'mfu': [step.mfu(estimate.at_best), step.mfu(estimate.at_worst)],
    'compile_seconds': step.seconds,
    'all_seconds': time.perf_counter() - start,
    'peak_memory': proof.memory,
  }


def _command(numbers):
  numbers = ' '.join(map(str, numbers))
  return f'python -m experiments.compile_table --row {numbers}'


def _named(number):
  task, model, name = ROWS[number][:3]
  return f'row {number} ({model}, {task}, {name})'


def records():
  """Returns the record of every row, in the order of ROWS.

  Raises ValueError, which names the rows and the command that mends them, where
  one has no record or one of another program than it asks for.
  """
  found, wrong = compile_records.read(RESULTS, 'row'), {}
  for number in range(len(ROWS)):
    row, record = asked(number), found.get(number)
    if record is None:
      wrong[number] = f'{_named(number)}: has no record'
      continue
    differ = [
      f'{name} is {record.get(name)!r}, not {value!r}'
      for name, value in row.items()
      if record.get(name) != value
    ]
    if differ:
      wrong[number] = f'{_named(number)}: {", ".join(differ)}'
  if wrong:
    problems = '\n'.join(wrong.values())
    raise ValueError(f'{RESULTS.name}: {problems}; run {_command(wrong)}')
  return [found[number] for number in range(len(ROWS))]


_SHORT = {
  'all-gather': 'AG',
  'reduce-scatter': 'RS',
  'all-reduce': 'AR',
  'all-to-all': 'A2A',
  'collective-permute': 'P',
}


def _cells(record):
  mesh = record['mesh']
  traffic = ', '.join(
    f'{_SHORT[kind]} {count:,.0f} ({payload / 1e9:.1f})'
    for kind, (count, payload, _) in sorted(record['collectives'].items())
    if payload >= 5e7
  )
  how = [f'remat {record["remat"]}']
  if record['accumulate'] > 1:
    how.append(f'accumulate {record["accumulate"]}')
  if record['flags']:
    how.append('gathers whole')
  return [
    f'{record["model"]} ({record["task"]})',
    f'{record["slice"]}, {record["chips"]} chips',
    f'{mesh["data"]} x {mesh["fsdp"]} x {mesh["tensor"]}',
    f'{record["pairs"]:,}',
    ', '.join(how),
    f'{record["needed"] / 2**30:.2f} / {record["usable"] / 2**30:.2f}',
    f'{record["flops"] / 1e12:.1f} / {record["useful_flops"] / 1e12:.1f}',
    traffic,
    f'{record["matrix"]:.3f} / {record["memory"]:.3f} / {record["links"]:.3f}',
    f'{record["compiler"]:.3f} ({record["products"]:.3f})',
    f'{record["mfu"][1]:.2f} to {record["mfu"][0]:.2f}',
    f'{record["compile_seconds"]:.0f} s, {record["peak_memory"] / 2**30:.1f}',
  ]


HEADINGS = [
  'model',
  'slice',
  'mesh data x fsdp x tensor',
  'pairs a step',
  'how',
  'GiB needed / usable',
  'TFLOP a chip, computed / useful',
  'collectives (GB)',
  's by matrix unit / memory / links',
  "s by compiler's cycles (of them products)",
  'useful share of peak',
  'compiled in, GiB',
]


def page():
  """Returns docs/scaling.md with the table of the records; see `records`."""
  rows = [HEADINGS, *map(_cells, records())]
  return compile_records.on_page(PAGE, 'compile_table', rows)


def render():
  """Writes the table into docs/scaling.md."""
  PAGE.write_text(page())


def _compile(number):
  """Compiles a row in a process of its own; returns whether that went well."""
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.compile_table', f'--inside={number}'],
    stdout=subprocess.PIPE,
    text=True,
    check=False,
    env=os.environ | {'LIBTPU_INIT_ARGS': asked(number)['flags']},
  )
  if not done.returncode:
    record = json.loads(done.stdout.splitlines()[-1])
    compile_records.keep(RESULTS, 'row', record, range(len(ROWS)))
  return not done.returncode


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  numbers = range(len(ROWS))
  parser.add_argument(
    '--row',
    type=int,
    nargs='+',
    choices=numbers,
    metavar='N',
    help=f'numbers of ROWS, 0 to {len(ROWS) - 1}',
  )
  parser.add_argument('--render', action='store_true', help='only the table')
  parser.add_argument('--inside', type=int, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.inside is not None:
    print(json.dumps(prove(options.inside)))
    return
  rows = [] if options.render else options.row or numbers
  failed = [number for number in rows if not _compile(number)]
  problems = []
  try:
    render()
  except ValueError as error:
    problems.append(f'no table: {error}')
  if failed:
    named = ', '.join(map(_named, failed))
    problems.append(f'not compiled: {named}; run {_command(failed)}')
  if problems:
    sys.exit('\n'.join(problems))


if __name__ == '__main__':
  main()
