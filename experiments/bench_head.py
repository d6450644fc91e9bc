"""What the chunked head costs, against logits held whole.

Process CPU time of log-probs of scored tokens and of their gradients, on one
thread, ours and the naive head in turns (A B A B, median of `--times`), and the
temporary memory of both by XLA's account, for which nothing is run.

  python experiments/bench_head.py --widths 576 256 --tokens 512 2048 \
      --chunks 128 256 512 1024
  python experiments/bench_head.py --memory
"""

import argparse
import os
import statistics
import time

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_cpu_multi_thread_eigen=false'
)

import jax
import jax.numpy as jnp

from dpo_jax import logps


def naive(hidden_RSD, unembed_VD, target_RS):
  logits_RSV = jnp.einsum('RSD,VD->RSV', hidden_RSD, unembed_VD)
  logps_RSV = jax.nn.log_softmax(logits_RSV)
  return jnp.take_along_axis(logps_RSV, target_RS[..., None], -1)[..., 0]


def chunked(chunk):
  return lambda *arrays: logps.token_logps(*arrays, chunk, cap=None)


def trained(function):
  """The gradients in both arrays, of a loss that weighs tokens unequally."""

  def loss(hidden_RSD, unembed_VD, target_RS):
    values_RS = function(hidden_RSD, unembed_VD, target_RS)
    return -jnp.sum(jax.nn.log_sigmoid(0.1 * jnp.sum(values_RS, axis=-1)))

  return jax.value_and_grad(loss, (0, 1))


def shapes(tokens, width, vocab, rows):
  share = tokens // rows
  return [
    jax.ShapeDtypeStruct((rows, share, width), jnp.float32),
    jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    jax.ShapeDtypeStruct((rows, share), jnp.int32),
  ]


def compiled(function, arguments):
  return jax.jit(function).lower(*arguments).compile()


def seconds(program, arrays):
  start = time.process_time()
  jax.block_until_ready(program(*arrays))
  return time.process_time() - start


def times(how, tokens, width):
  """Prints one line a chunk size: CPU seconds, and ours over naive."""
  arguments = shapes(tokens, width, how.vocab, how.rows)
  keys = jax.random.split(jax.random.key(0), 3)
  arrays = [
    jax.random.normal(keys[0], arguments[0].shape),
    0.05 * jax.random.normal(keys[1], arguments[1].shape),
    jax.random.randint(keys[2], arguments[2].shape, 0, how.vocab),
  ]
  forms = {'naive': naive} | {c: chunked(c) for c in how.chunks}
  for name, transform in [('forward', lambda f: f), ('gradient', trained)]:
    programs = {k: compiled(transform(f), arguments) for k, f in forms.items()}
    spent = {k: [] for k in programs}
    for turn in range(how.times + 1):
      for k, program in programs.items():
        one = seconds(program, arrays)
        if turn:  # the first one warms up
          spent[k].append(one)
    base = statistics.median(spent['naive'])
    cells = [
      f'{k}: {statistics.median(v) / base:.2f}'
      for k, v in spent.items()
      if k != 'naive'
    ]
    print(
      f'D {width} tokens {tokens} {name}: naive {base:.2f} s; '
      + ', '.join(cells),
      flush=True,
    )


def temporary(function, arguments):
  program = compiled(trained(function), arguments)
  return program.memory_analysis().temp_size_in_bytes


def memory(how):
  for vocab in (49_152, 262_144):
    for tokens in how.tokens:
      arguments = shapes(tokens, how.widths[0], vocab, how.rows)
      base = temporary(naive, arguments)
      cells = [
        f'{chunk}: 1/{base / temporary(chunked(chunk), arguments):.1f}'
        for chunk in how.chunks
      ]
      print(
        f'V {vocab} tokens {tokens}: naive {base / 2**20:.0f} MiB; '
        + ', '.join(cells)
      )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--widths', type=int, nargs='+', default=[576, 256])
  parser.add_argument('--tokens', type=int, nargs='+', default=[512, 2048])
  parser.add_argument('--chunks', type=int, nargs='+', default=[128, 256, 512])
  parser.add_argument('--rows', type=int, default=4)
  parser.add_argument('--vocab', type=int, default=49_152)
  parser.add_argument('--times', type=int, default=3)
  parser.add_argument('--memory', action='store_true')
  how = parser.parse_args()
  if how.memory:
    return memory(how)
  for width in how.widths:
    for tokens in how.tokens:
      times(how, tokens, width)


if __name__ == '__main__':
  main()
