"""What a step must compute: the useful FLOPs of a run, and the share of a peak.

Model FLOPs, as in PaLM (arXiv:2204.02311, appendix B): the multiplications and
additions that the mathematics asks for, at real tokens, whatever is computed
besides (padding, recomputed layers and logits, masked scores, norms). With N
parameters in the matrices of the layers, a real token takes

  2N forward, 4N backward                     all weights trained
  2N forward, 2N backward, 6A                 an adapter of A parameters on them
  2N more                                     a reference that is computed

a pair of query and key in a layer 4 * head_dim * num_heads forward, twice that
backward, and a scored token 2 * D * V in the head forward, the same backward
for the hidden state and, if it is trained, for the unembedding; a reward model
has one number for V. What losses want besides log-probs (a KL over the
vocabulary) is not counted.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.data import rows
from dpo_jax.models import transformer

_SECONDS = 0.3  # of measuring a peak
# Side of the matrices of which a CPU, or something faster, multiplies two.
_CPU_SIDE, _SIDE = 1024, 8192


class Work(NamedTuple):
  """Counts: of each group (arrays), or summed; a prompt counts once.

  tokens: all. scored: those of responses. seen: pairs of a query and a key
  that it attends to; seen_windowed: in a layer with the model's window.
  """

  tokens: np.ndarray
  scored: np.ndarray
  seen: np.ndarray
  seen_windowed: np.ndarray


def work_of(groups, *, window):
  """Returns the Work of each group; `window` is that of the model or None."""
  columns = []
  for group in groups:
    prompt = len(group.prompt)
    seen, windowed = _chain(prompt, prompt), _chain(prompt, window or prompt)
    for response in group.responses:
      length = prompt + len(response)
      seen += _chain(length, length) - _chain(prompt, prompt)
      windowed += _chain(length, window or length)
      windowed -= _chain(prompt, window or prompt)
    columns.append(
      (rows.real_tokens(group), rows.scored_tokens(group), seen, windowed)
    )
  return Work(*np.array(columns, np.int64).reshape(-1, 4).T)


def _chain(length, window):
  """Pairs of a causal sequence whose tokens see at most `window` of it."""
  full = min(length, window)
  return full * (full + 1) // 2 + (length - full) * full


def summed(work, numbers):
  """Sums the Work of some groups."""
  return Work(*(int(column[numbers].sum()) for column in work))


def matmul_parameters(config):
  """Returns N: parameters of the matrices of all layers."""
  heads, kv_heads = config.num_heads, config.num_kv_heads
  attention = config.d_model * config.head_dim * 2 * (heads + kv_heads)
  matrices = 3 if config.mlp in transformer.GATED_MLPS else 2
  mlp = matrices * config.d_model * config.d_ff
  return config.num_layers * (attention + mlp)


def step_flops(config, work, *, live, adapter=None, outputs=None):
  """Returns the model FLOPs of training on some groups.

  Args:
    config: of the model.
    work: summed.
    live: whether a reference is computed, not cached.
    adapter: parameters of the adapter that is trained, None if all weights are.
    outputs: numbers that a scored token gets; None: a logit of every word.
  """
  frozen = adapter is not None
  # In units of a forward pass.
  layers = 2 + (not frozen) + live
  attention = 3 + live
  head = 2 + (not frozen) + live
  parts = _forward(config, work, outputs)
  return (
    layers * parts[0]
    + attention * parts[1]
    + head * parts[2]
    + 6 * (adapter or 0) * work.tokens
  )


def forward_flops(config, work):
  """Returns the model FLOPs of the log-probs of some groups, or of samples.

  Args:
    config: of the model; an adapter on it is not counted.
    work: summed.
  """
  return sum(_forward(config, work, None))


def _forward(config, work, outputs):
  """FLOPs of a forward pass in layers, attention and head."""
  windowed = sum(config.windowed)
  seen = (config.num_layers - windowed) * work.seen
  seen += windowed * work.seen_windowed
  return (
    2 * matmul_parameters(config) * work.tokens,
    4 * config.head_dim * config.num_heads * seen,
    2 * config.d_model * (outputs or config.vocab_size) * work.scored,
  )


def measured_peak(mesh, dtype):
  """Returns the FLOP/s of all devices of `mesh` in one large matmul each.

  The best of several, within a second. Not what a data sheet says: less, by
  what a matmul of this size cannot reach.
  """
  devices = mesh.devices.size
  side = _SIDE
  if jax.default_backend() == 'cpu':  # simulated devices share the cores
    side = max(128, int(_CPU_SIDE / devices ** (1 / 3)) // 128 * 128)
  spec = jax.sharding.PartitionSpec(mesh.axis_names)
  sharding = jax.sharding.NamedSharding(mesh, spec)
  make = jax.jit(
    lambda: jnp.full((devices, side, side), 1 / side, dtype),
    out_shardings=sharding,
  )
  multiply = jax.jit(
    lambda x: jnp.einsum('nij,njk->nik', x, x), out_shardings=sharding
  )
  matrices = make()
  multiply(matrices).block_until_ready()
  best, begun = math.inf, time.perf_counter()
  while best == math.inf or time.perf_counter() - begun < _SECONDS:
    start = time.perf_counter()
    multiply(matrices).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return devices * 2 * side**3 / best
