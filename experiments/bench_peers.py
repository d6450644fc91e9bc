r"""Measure our DPO step against those of TRL, plain PyTorch and Tunix.

All sides start from the same two checkpoints (a policy and a frozen reference
near it, written by `exports`) and do the same steps on the same tokens in the
same order: DPO, beta 0.1, AdamW without weight decay, gradients clipped at norm
1. Each is a process of its own, in an environment of its own, on one thread of
one core, and is told how many steps to do next; they take turns (A B C A B C),
so that what else the machine does hits all of them. The first step of each
(compilation, memory) is not timed. Time is that of the process (user + system);
with `--platform=gpu` (TRL alone) it is the clock's. Losses of a
step must agree to 1e-3 (2e-2 in bfloat16), on all sides and all steps, or there
is no table.

Environments, each made once (their versions are printed; those of README's
table are named here):

  mkdir -p runs/peers && cd runs/peers
  python3 -m venv torch && torch/bin/pip install torch==2.13.0 \
      transformers==5.23.0
  python3 -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0 \
      transformers==5.23.0
  python3 -m venv tunix && tunix/bin/pip install google-tunix==0.1.7

Then, in an environment of ours, at the root of the checkout:

  python -m experiments.bench_peers --data=FOLDER --batch_size=16 --steps=4 \
      --micro=8 --side plain_torch=runs/peers/torch/bin/python \
      trl_trainer=runs/peers/trl/bin/python \
      tunix_trainer=runs/peers/tunix/bin/python

and on a GPU, with JAX and PyTorch for it:

  python -m experiments.bench_peers --data=FOLDER --platform=gpu \
      --dtype=bfloat16 --shape=llama3.2-1b --limit=512 --row_length=2048 \
      --batch_size=32 --micro=4 --chunk=1024 --steps=10 \
      --side trl_trainer=runs/peers/trl/bin/python

`--data` is as in `bench_step`. Our rows have the shapes of a whole epoch, whose
first steps these are; Tunix pads to the longest of these steps. Peers do
`--micro` pairs at a time and add up gradients: plain PyTorch and Tunix hold
their logits, TRL has a fused head and computes an entropy and an accuracy of
tokens besides. Real tokens are those of a prompt, once, and its two responses,
for every side, whatever it computes.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from dpo_jax import exports
from dpo_jax import weights
from dpo_jax.data import batches
from dpo_jax.data import rows
from dpo_jax.data import tokenizers
from experiments import bench_step

ROOT = pathlib.Path(__file__).parents[1]
SIDES = ('plain_torch', 'trl_trainer', 'tunix_trainer')
# How far apart the losses of a step may be.
AGREE = {'float32': 1e-3, 'bfloat16': 2e-2}
NEAR = 0.3  # the reference is the policy plus so much of its own deviation
ONE_THREAD = {
  'OMP_NUM_THREADS': '1',
  'MKL_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1',
  'XLA_FLAGS': '--xla_cpu_multi_thread_eigen=false'
  ' intra_op_parallelism_threads=1',
  'HF_HUB_OFFLINE': '1',
  'TRANSFORMERS_VERBOSITY': 'error',
}


# --- The same for all --------------------------------------------------------


def write_checkpoints(folder, model_config):
  """Writes `policy/` and `ref/` of random weights in Hugging Face's format."""
  checkpoint = weights.random(
    model_config, source='random', tokenizer=tokenizers.ByteTokenizer()
  )
  policy = weights.assemble(checkpoint)
  rng = np.random.default_rng(0)

  def moved(tree):
    if isinstance(tree, dict):
      return {name: moved(branch) for name, branch in tree.items()}
    noise = rng.standard_normal(tree.shape, np.float32)
    return tree + NEAR * tree.std() * noise

  for name, params in (('policy', policy), ('ref', moved(policy))):
    model = exports.with_parameters(checkpoint, params)
    exports.write(model, folder / name, shard_size=5 * 10**9)


def write_task(folder, groups, options):
  """Writes `task.json`, see `peers.protocol`; returns real tokens per step."""
  steps = [
    batches.shuffled(
      seed=0, step=s, batch_size=options.batch_size, num_groups=len(groups)
    )
    for s in range(bench_step.epoch_steps(groups, options))
  ]
  task = dict(
    batch_size=options.batch_size,
    beta=bench_step.BETA,
    learning_rate=bench_step.LEARNING_RATE,
    clip_norm=bench_step.CLIP_NORM,
    row_length=options.row_length,
    chunk=options.chunk,
    reference='frozen',
    dtype=options.dtype,
    remat=options.remat,
    platform=options.platform,
    timed=options.steps,
    steps=[
      [
        dict(
          prompt=groups[g].prompt.tolist(),
          chosen=groups[g].responses[0].tolist(),
          rejected=groups[g].responses[1].tolist(),
        )
        for g in numbers
      ]
      for numbers in steps
    ],
  )
  (folder / 'task.json').write_text(json.dumps(task))
  return [
    sum(rows.real_tokens(groups[g]) for g in numbers)
    for numbers in steps[: options.steps + 1]
  ]


# --- Sides -------------------------------------------------------------------


class Side:
  """A process that does steps when it is told to."""

  def __init__(self, name, python, folder, options):
    self.name = name
    self._log = open(folder / f'{name}.log', 'w+')
    command = [python, '-m', f'experiments.peers.{name}', str(folder)]
    self._process = subprocess.Popen(
      ['taskset', '-c', options.core, *command, f'--micro={options.micro}'],
      cwd=ROOT,
      env=os.environ
      | ONE_THREAD
      | {'PYTHONPATH': str(ROOT)}
      | ({'JAX_PLATFORMS': 'cpu'} if options.platform == 'cpu' else {}),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      text=True,
    )
    self.versions = self._read()

  def _read(self):
    line = self._process.stdout.readline()
    if not line:
      self._log.seek(0)
      raise SystemExit(f'{self.name} ended:\n{self._log.read()[-3000:]}')
    return json.loads(line)

  def steps(self, number):
    """Does so many steps; returns what `peers.protocol` says."""
    print(number, file=self._process.stdin, flush=True)
    return self._read()

  def close(self):
    self._process.stdin.close()
    self._process.wait()
    self._log.close()


@dataclasses.dataclass
class Result:
  """Of one side: a loss a step, seconds a timed step, bytes."""

  losses: list = dataclasses.field(default_factory=list)
  process: list = dataclasses.field(default_factory=list)
  wall: list = dataclasses.field(default_factory=list)
  peak_memory: int = 0

  def add(self, answer, *, timed):
    """Takes an answer about one step."""
    self.losses += answer['losses']
    self.peak_memory = answer['peak_memory']
    if timed:
      self.process.append(answer['process'])
      self.wall.append(answer['wall'])


def check_losses(results, *, agree=AGREE['float32']):
  """Exits where sides did not compute the same losses."""
  losses = np.array([result.losses for result in results.values()])
  for step, column in enumerate(losses.T, start=1):
    if not column.max() - column.min() <= agree:  # NaN is not
      told = ', '.join(f'{n} {x:.6f}' for n, x in zip(results, column))
      raise SystemExit(
        f'the losses of step {step} differ by more than {agree:g}: {told}; what'
        ' is compared must compute the same, so there is no table'
      )


def spread(values, digits=2):
  """Returns minimum / median / maximum as text."""
  cells = np.min(values), np.median(values), np.max(values)
  return ' / '.join(f'{cell:,.{digits}f}' for cell in cells)


def parse_sides(texts, known):
  """Returns (name, python) of each NAME=PYTHON, or exits."""
  sides = []
  for text in texts:
    name, _, python = text.partition('=')
    if name not in known or not python:
      raise SystemExit(
        f'--side {text!r}: give NAME=PYTHON, with a name of {", ".join(known)}'
      )
    sides.append((name, python))
  return sides


def table(results, *, pairs, tokens, clock='process'):
  """Returns the table; the first side is the one that others are held to.

  All do the same pairs, so that ratios of pairs/s and of tokens/s are those of
  time.

  Args:
    results: {side: Result}, of losses that `check_losses` has seen.
    pairs: of a step.
    tokens: real tokens of each timed step.
    clock: 'process' or 'wall', whose seconds count.
  """
  names = list(results)
  first = np.array(getattr(results[names[0]], clock))
  memory = results[names[0]].peak_memory

  lines = [
    f'| side | {clock} s a step | pairs/s | real tokens/s | peak GiB |'
    f' memory over {names[0]} | time over {names[0]} |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, result in results.items():
    seconds = np.array(getattr(result, clock))
    lines.append(
      f'| {name} | {spread(seconds)} | {spread(pairs / seconds, 3)} |'
      f' {spread(np.array(tokens) / seconds, 1)} |'
      f' {result.peak_memory / 2**30:.2f} | {result.peak_memory / memory:.2f} |'
      f' {spread(seconds / first)} |'
    )
  lines.append('')
  losses = np.array([result.losses for result in results.values()])
  gaps = losses.max(0) - losses.min(0)
  lines.append(
    f'Minimum / median / maximum of {len(tokens)} steps of {pairs} pairs, per'
    f' second of {clock} time. Losses of all sides agree to'
    f' {gaps.max():.1e} on {losses.shape[1]} steps'
    f' ({", ".join(f"{x:.4f}" for x in losses[0])}).'
  )
  return '\n'.join(lines)


def compare(sides, options, folder):
  """Runs all sides in turns; returns {name: Result}."""
  running = [Side(name, python, folder, options) for name, python in sides]
  results = {side.name: Result() for side in running}
  try:
    for side in running:
      print(f'{side.name}: {side.versions}', flush=True)
    for turn in range(options.steps + 1):
      for side in running:
        answer = side.steps(1)
        results[side.name].add(answer, timed=turn > 0)
        print(
          f'step {turn + 1} {side.name}: loss {answer["losses"][0]:.6f},'
          f' process {answer["process"]:.2f} s, wall {answer["wall"]:.2f} s',
          flush=True,
        )
      check_losses(results, agree=AGREE[options.dtype])
  finally:
    for side in running:
      side.close()
  return results


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  bench_step.add_arguments(add)
  add('--side', nargs='*', action='extend', default=[], help='NAME=PYTHON')
  add('--micro', type=int, default=16, help='pairs a peer does at one time')
  add('--core', default='0', help='or cores, that all sides run on')
  add('--platform', choices=('cpu', 'gpu'), default='cpu')
  options = parser.parse_args()
  sides = [('ours', sys.executable), *parse_sides(options.side, SIDES)]
  for name, _ in sides[1:]:
    if options.platform == 'gpu' and name != 'trl_trainer':
      raise SystemExit(f'--side {name}: on a GPU there is trl_trainer alone')
  model_config = bench_step.model_shape(options.shape)
  groups = bench_step.load_groups(options, model_config)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_checkpoints(folder, model_config)
    tokens = write_task(folder, groups, options)
    results = compare(sides, options, folder)
  print()
  clock = 'process' if options.platform == 'cpu' else 'wall'
  print(
    table(results, pairs=options.batch_size, tokens=tokens[1:], clock=clock)
  )


if __name__ == '__main__':
  main()
