"""Forms of interval attention against each other, on packed rows.

Rows are packed by `data/rows.py` from pairs with the mean lengths of HH
harmless-base (125 prompt, 41 chosen, 51 rejected tokens), log-normal. Every
form is held to the dense one before it is timed. Forms take turns (A B A B) and
the table has dense time over the form's time, a ratio a turn: min, median, max.
Time is that of the process on a CPU (all threads), the clock elsewhere.

One thread, then all of them:

  taskset -c 0 env XLA_FLAGS='--xla_cpu_multi_thread_eigen=false
      intra_op_parallelism_threads=1' python experiments/bench_attention.py
  python experiments/bench_attention.py --clock=wall

On a GPU (`wide` is what runs there today; `cudnn` skips nothing either):

  python experiments/bench_attention.py --dtype=bfloat16 --slots 1024 2048 \
      --rows 8 32 --heads 32,8,64 --forms wide cudnn

On a TPU (`blocked` is its kernel):

  python experiments/bench_attention.py --dtype=bfloat16 --slots 1024 2048 \
      --rows 8 32 --heads 9,3,64 32,8,128 --forms blocked wide
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import attention
from dpo_jax import attention_blocks
from dpo_jax.data import examples
from dpo_jax.data import rows

MEANS = (125, 41, 51)  # prompt, chosen, rejected: experiments/LOG.md
SPREADS = (0.8, 0.9, 0.9)  # standard deviations of log lengths: our guess
VALUES, GRADIENTS = 1e-5, 1e-4  # how far a form may be from the dense one
BFLOAT16 = 200  # how much farther in bfloat16


def packed(slots, count):
  """Returns lo and hi of `count` rows, and the share of slots in use."""
  rng = np.random.default_rng(0)
  limits = [min(256, slots // 2), *[min(256, slots // 4)] * 2]

  def length(mean, spread, limit):
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread)
    return np.zeros(int(np.clip(drawn, 1, limit)), np.int32)

  groups = []
  for number in range(slots * count // 100):
    prompt, *responses = map(length, MEANS, SPREADS, limits)
    groups.append(
      examples.Group(
        prompt=prompt,
        responses=tuple(responses),
        weight=1.0,
        p=1.0,
        id=str(number),
      )
    )
  while True:
    needed = [rows.slots_needed(group, window=None) for group in groups]
    members = rows.assign(
      needed, [0] * len(groups), row_length=slots, row_scored=1, rows=count
    )
    if len(members) == count:
      break
    groups.pop()
  batch = rows.fill(
    groups,
    members,
    row_length=slots,
    row_scored=slots,
    row_groups=slots,
    responses=2,
    window=None,
  )
  return batch['lo'], batch['hi'], sum(needed) / (slots * count)


def _cudnn(query, key, value, lo, hi, *, scale, cap):
  if cap is not None:
    raise ValueError('cuDNN has no soft cap')
  slot = jnp.arange(key.shape[1])
  mask = (slot >= lo[..., None]) & (slot < hi[..., None])
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask[:, None], scale=scale, implementation='cudnn'
  )


def _of_blocks(block_q, block_k):
  """The XLA form with given blocks, whatever the platform."""

  def attend(*args, scale, cap):
    return attention.blocked(
      attention_blocks.forward,
      attention_blocks.backward,
      scale=scale,
      cap=cap,
      block_q=block_q,
      block_k=block_k,
    )(*args)

  return attend


FORMS = {
  'dense': attention.dense,
  'blocked': attention.interval_attention,  # what the platform runs
  'wide': _of_blocks(**attention.WIDE_BLOCKS),
  'cudnn': _cudnn,
  **{
    f'{q}x{k}': _of_blocks(q, k) for q in (32, 64, 128) for k in (32, 64, 128)
  },
}


def compiled(form, args, dout, scale):
  """Returns compiled (forward, forward and backward) of one form."""
  attend = functools.partial(FORMS[form], scale=scale, cap=None)

  def both(query, key, value, lo, hi, dout):
    out, vjp = jax.vjp(
      lambda *inputs: attend(*inputs, lo, hi), query, key, value
    )
    return out, vjp(dout)

  return (
    jax.jit(attend).lower(*args).compile(),
    jax.jit(both).lower(*args, dout).compile(),
  )


def check(name, out, oracle, slack):
  """Exits where values or gradients are not those of the dense form."""
  (value, gradients), (dense, dense_gradients) = out, oracle
  far = float(jnp.abs(value - dense).max())
  far_gradients = max(
    float(jnp.abs(a - b).max() / jnp.abs(b).max())
    for a, b in zip(gradients, dense_gradients)
  )
  if far > VALUES * slack or far_gradients > GRADIENTS * slack:
    raise SystemExit(
      f'{name} is {far:.1e} from dense, its gradients {far_gradients:.1e}'
    )


def bench(slots, count, heads, *, dtype, forms, repeats, clock):
  """Prints a line a form and pass for one shape."""
  N, K, H = heads
  lo, hi, fill = packed(slots, count)
  rng = np.random.default_rng(1)
  query, key, value, dout = (
    jnp.asarray(rng.normal(size=(count, slots, n, H)), dtype)
    for n in (N, K, K, N)
  )
  args = query, key, value, jnp.asarray(lo), jnp.asarray(hi)
  inputs = args, (*args, dout)
  programs = {form: compiled(form, args, dout, H**-0.5) for form in forms}
  oracle = programs['dense'][1](*inputs[1])
  for form, (_, both) in programs.items():
    slack = 1 if dtype == 'float32' else BFLOAT16
    check(form, both(*inputs[1]), oracle, slack)
  seconds = {(form, which): [] for form in forms for which in (0, 1)}
  for _ in range(repeats):
    for (form, which), taken in seconds.items():
      # Twice, and the second is timed: the first pays for memory that the form
      # before it gave back to the system.
      for _ in range(2):
        start = clock()
        jax.block_until_ready(programs[form][which](*inputs[which]))
        last = clock() - start
      taken.append(last)
  print(
    f'{count} rows of {slots}, N {N}, K {K}, H {H}, {dtype}, {fill:.0%} full,'
    f' intervals of {(hi - lo).mean():.0f} keys in the mean'
  )
  for (form, which), taken in seconds.items():
    ratios = np.array(seconds['dense', which]) / np.array(taken)
    memory = programs[form][which].memory_analysis().temp_size_in_bytes
    numbers = ' '.join(
      f'{number:6.2f}'
      for number in (ratios.min(), np.median(ratios), ratios.max())
    )
    print(
      f'  {form:8} {("forward", "forward + backward")[which]:18}'
      f' {np.median(taken) * 1e3:9.1f} ms  dense/form {numbers} '
      f' temporary {memory / 2**20:7.1f} MiB',
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--slots', type=int, nargs='+', default=[304, 512, 1024, 2048])
  add('--rows', type=int, nargs='+', default=[4, 16])
  add('--heads', nargs='+', default=['9,3,64', '4,4,64'], help='N,K,H')
  add('--dtype', default='float32')
  add('--forms', nargs='+', default=['blocked'], choices=FORMS)
  add('--repeats', type=int, default=5)
  add('--clock', choices=['process', 'wall'], help='process on CPU, else wall')
  options = parser.parse_args()
  clock = options.clock or (
    'process' if jax.default_backend() == 'cpu' else 'wall'
  )
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {clock} time')
  for heads in options.heads:
    for slots in options.slots:
      for count in options.rows:
        bench(
          slots,
          count,
          tuple(map(int, heads.split(','))),
          dtype=options.dtype,
          forms=list(dict.fromkeys(['dense', *options.forms])),
          repeats=options.repeats,
          clock=time.process_time if clock == 'process' else time.perf_counter,
        )


if __name__ == '__main__':
  main()
