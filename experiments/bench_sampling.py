r"""Measure our sampler against `generate` of transformers, on one checkpoint.

Both continue the same prompts at temperature 1, without truncation and without
an end of text, so that both make the same number of tokens; each is a process
of its own, on the cores of `--core`, and they take turns (A B A B). The first
turn of each is greedy, is not timed, and must give the same tokens on both
sides for nearly all prompts (rounding may turn a near tie), or there is no
table. Time is that of the process (user + system); with `--clock=wall` it is
the clock's, for a GPU.

The environment of the other side, made once:

  mkdir -p runs/peers && cd runs/peers
  python3 -m venv torch && torch/bin/pip install torch==2.13.0 \
      transformers==5.23.0

Then, in an environment of ours, at the root of the checkout:

  python -m experiments.bench_sampling \
      --side transformers_generate=runs/peers/torch/bin/python
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np

from dpo_jax import exports
from dpo_jax import policies
from dpo_jax import weights
from dpo_jax.data import openings
from experiments import bench_peers

SIDES = ('transformers_generate',)
AGREE = 0.9  # share of prompts whose greedy tokens must be the same


def write_task(folder, options):
  """Writes the checkpoint, and `task.json` with the tokens of the prompts."""
  checkpoint = policies.open_source(options.model)
  model = exports.with_parameters(checkpoint, weights.assemble(checkpoint))
  exports.write(model, folder / 'policy', shard_size=5 * 10**9)
  texts = openings.openings()
  texts = [*texts['train'], *texts['test']]
  prompts = [
    checkpoint.tokenizer.encode(texts[n % len(texts)])
    for n in range(options.batch_size)
  ]
  task = dict(
    prompts=[[int(token) for token in prompt] for prompt in prompts],
    batch_size=options.batch_size,
    max_new_tokens=options.new_tokens,
    dtype=options.dtype,
    clock=options.clock,
  )
  (folder / 'task.json').write_text(json.dumps(task))


def check_greedy(folder, names):
  """Exits where sides do not continue the prompts in the same way."""
  ours, *others = (
    np.array(json.loads((folder / f'{name}.json').read_text()))
    for name in names
  )
  for name, theirs in zip(names[1:], others, strict=True):
    share = float((ours == theirs).all(-1).mean())
    print(f'greedy tokens of {name}: the same for {share:.0%} of the prompts')
    if not share >= AGREE:
      raise SystemExit(
        f'{name} continues {1 - share:.0%} of the prompts in another way; what'
        ' is compared must compute the same, so there is no table'
      )


def table(seconds, tokens):
  """Returns the table; `seconds` is {side: of each turn}."""
  first = np.array(next(iter(seconds.values())))
  spread = bench_peers.spread
  lines = [
    '| side | seconds | tokens/s | time over ours |',
    '|---|---|---|---|',
  ]
  for name, values in seconds.items():
    values = np.array(values)
    lines.append(
      f'| {name} | {spread(values, 2)} | {spread(tokens / values, 1)} |'
      f' {spread(values / first, 2)} |'
    )
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--model', default='smollm2-135m', help='a model.source')
  add('--batch_size', type=int, default=64)
  add('--new_tokens', type=int, default=64)
  add('--turns', type=int, default=3)
  add('--dtype', default='float32')
  add('--core', default='0', help='or cores, that all sides run on')
  add('--platform', choices=('cpu', 'gpu'), default='cpu')
  add('--clock', choices=('process', 'wall'), default='process')
  add('--side', nargs='*', action='extend', default=[], help='NAME=PYTHON')
  options = parser.parse_args()
  options.micro = options.batch_size
  sides = [
    ('sampler', sys.executable),
    *bench_peers.parse_sides(options.side, SIDES),
  ]
  names = [name for name, _ in sides]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_task(folder, options)
    running = [
      bench_peers.Side(name, python, folder, options) for name, python in sides
    ]
    seconds = {name: [] for name in names}
    try:
      for side in running:
        print(f'{side.name}: {side.versions}', flush=True)
      for turn in range(options.turns + 1):
        for side in running:
          answer = side.steps(1)
          took = answer[options.clock]
          if turn:
            seconds[side.name].append(took)
          print(
            f'turn {turn} {side.name}: {took:.2f} s ({options.clock}), wall'
            f' {answer["wall"]:.2f}, peak'
            f' {answer["peak_memory"] / 2**30:.2f} GiB',
            flush=True,
          )
        if not turn:
          check_greedy(folder, names)
    finally:
      for side in running:
        side.close()
  tokens = options.batch_size * options.new_tokens
  print(f'\n{tokens} tokens a turn\n\n{table(seconds, tokens)}')


if __name__ == '__main__':
  main()
