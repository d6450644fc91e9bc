"""Log-probabilities of tokens without ever holding [tokens, vocabulary].

Hidden states are gathered at scored positions; each device makes one list of
the scored tokens of its rows, without the padding between them, which passes
through the unembedding in chunks. The backward pass recomputes logits from the
saved log-normalizers, a block of the vocabulary after the other, so that each
part of the unembedding's gradient is written once. Everything here is float32
from the logits on.

Dimension key: R rows, T slots, S scored tokens per row, L lists, N tokens of
a list, C tokens of a chunk, D model, V vocabulary, B words of a block, Q
responses per row.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import custom_derivatives

from dpo_jax import attention


def gather_scored(hidden_RTD, source_RS):
  """Picks the hidden states that predict the scored tokens: [R, S, D]."""
  return jnp.take_along_axis(hidden_RTD, source_RS[..., None], axis=1)


# --- Lists of tokens, and chunks of them --------------------------------------

# Names the loops over chunks in a compiled program, which does not say how
# often they turn: the data decides.
SCOPE = 'scored_chunks'


def _row_shards(rows):
  """How many devices share the rows: the number of lists."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = nn.logical_to_mesh_axes(('rows',))[0] or ()
  axes = (axes,) if isinstance(axes, str) else axes
  shards = math.prod(mesh.shape.get(name, 1) for name in axes)
  return shards if rows % shards == 0 else 1


def _listed(x):
  """[R, S, ...] -> [L, N, ...]: the rows of a device, one after the other."""
  lists = _row_shards(x.shape[0])
  x = x.reshape(lists, -1, *x.shape[2:])
  if lists == 1:
    return x
  return nn.with_logical_constraint(x, ('rows',) + (None,) * (x.ndim - 1))


def chunk_size(tokens, chunk):
  """C: as many of `tokens` as give even chunks of at most `chunk`."""
  return math.ceil(tokens / max(math.ceil(tokens / chunk), 1)) or 1


def _pad(x_LN, multiple):
  """Pads N with zeros to a multiple."""
  pad = [(0, 0), (0, -x_LN.shape[1] % multiple)]
  return jnp.pad(x_LN, pad + [(0, 0)] * (x_LN.ndim - 2))


class _Scored:
  """The scored tokens of [R, S], packed to the front of each list."""

  def __init__(self, target_RS, chunk):
    self._shape = target_RS.shape
    real_LN = _listed(target_RS >= 0)
    self.chunk = chunk_size(real_LN.shape[1], chunk)
    self._order_LN = jnp.argsort(~real_LN, axis=1, stable=True)
    self._place_LN = jnp.maximum(jnp.cumsum(real_LN, axis=1) - 1, 0)
    self._real_RS = target_RS >= 0
    self._most = jnp.max(jnp.sum(real_LN, axis=1))

  def packed(self, x):
    """[R, S, ...] -> [L, N, ...], N a multiple of C, real tokens first."""
    x = _listed(x)
    order_LN = self._order_LN.reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return _pad(jnp.take_along_axis(x, order_LN, axis=1), self.chunk)

  def unpacked(self, x, padding):
    """[L, N, ...] -> [R, S, ...], with `padding` where no token is scored."""
    ones = [1] * (x.ndim - 2)
    place_LN = self._place_LN.reshape(*self._place_LN.shape, *ones)
    x = jnp.take_along_axis(x, place_LN, axis=1)
    x = x.reshape(*self._shape, *x.shape[2:])
    return jnp.where(self._real_RS.reshape(*self._shape, *ones), x, padding)

  def scan(self, one_chunk, carry, inputs):
    """`lax.scan` over the chunks of `inputs` [L, N, ...] that have a token.

    Chunks of padding alone, the last ones, are left out; their outputs are 0.
    """
    size = self.chunk

    def take(n):
      return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1),
        inputs,
      )

    def step(n, state):
      carry, outs = state
      carry, out = one_chunk(carry, take(n))
      put = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=n * size, axis=1
      )
      return carry, jax.tree.map(put, outs, out)

    _, out = jax.eval_shape(one_chunk, carry, jax.eval_shape(take, 0))
    length = jax.tree.leaves(inputs)[0].shape[1]
    outs = jax.tree.map(
      lambda x: jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype), out
    )
    with jax.named_scope(SCOPE):
      return jax.lax.fori_loop(0, -(-self._most // size), step, (carry, outs))


# --- Logits of a chunk, and their gradients -----------------------------------


def _ready(unembed_VD, dtype):
  """The unembedding as chunks want it: cast, and gathered over D, once."""
  return nn.with_logical_constraint(unembed_VD.astype(dtype), ('vocab', None))


def _as_parameter(grad_VD):
  """Cuts a gradient, or rows of it, like the unembedding itself."""
  return nn.with_logical_constraint(grad_VD, ('vocab', 'embed_cut'))


def _sum_of_lists(grad_LBD):
  """Sums over lists, [B, D], cut like the unembedding.

  Over the mesh axis that cuts D first, which makes a reduce-scatter; of one sum
  over all axes the TPU's compiler makes an all-reduce of the whole.
  """
  (rows,) = nn.logical_to_mesh_axes(('rows',))
  vocab, cut = nn.logical_to_mesh_axes(('vocab', 'embed_cut'))
  L, B, D = grad_LBD.shape
  if L == 1 or cut not in rows:
    return _as_parameter(jnp.sum(grad_LBD, axis=0))
  mesh = jax.sharding.get_abstract_mesh()
  place = jax.lax.with_sharding_constraint
  spec = jax.sharding.PartitionSpec
  sums = grad_LBD.reshape(*(mesh.shape[name] for name in rows), B, D)
  # Said of both sides, or the compiler makes one sum of the two.
  sums = jnp.sum(place(sums, spec(*rows, vocab, None)), axis=rows.index(cut))
  others = tuple(name for name in rows if name != cut)
  sums = place(sums, spec(*others, vocab, cut))
  return _as_parameter(jnp.sum(sums, axis=tuple(range(len(others)))))


def _logits(hidden_LCD, unembed_VD, cap):
  logits_LCV = jnp.einsum(
    'LCD,VD->LCV',
    hidden_LCD,
    unembed_VD,
    preferred_element_type=jnp.float32,
  )
  return attention.soft_cap(logits_LCV, cap)


def _logits_grad(logits_LCV, normalizer_LC, target_LC, cap):
  """Gradient of log p(target) in the logits before the cap."""
  probs_LCV = jnp.exp(logits_LCV - normalizer_LC[..., None])
  hit_LCV = jnp.arange(logits_LCV.shape[-1]) == target_LC[..., None]
  grad_LCV = hit_LCV - probs_LCV
  if cap is not None:  # the derivative of the soft cap, from its value
    grad_LCV *= 1 - (logits_LCV / cap) ** 2
  return grad_LCV


def _hidden_grad(logits_grad_LCV, unembed_VD):
  return jnp.einsum('LCV,VD->LCD', logits_grad_LCV, unembed_VD)


# --- Log-probs ----------------------------------------------------------------

# What a padding target has for a log-prob; nobody looks at it, so it is any
# number at which all functions of log-probs are finite.
_PADDING = -1.0


def _in_chunks(
  hidden_RSD, unembed_VD, target_RS, chunk, cap, collisions, slopes
):
  """One pass: (logps, normalizers, log sum_v p(v)^2, slopes) of [R, S].

  The last two are None unless asked for. `slopes` [R, S, D] are the gradients
  of the log-probs in the hidden states.
  """
  scored = _Scored(target_RS, chunk)
  unembed_VD = _ready(unembed_VD, hidden_RSD.dtype)

  def one_chunk(_, inputs):
    hidden_LCD, target_LC = inputs
    target_LC = jnp.maximum(target_LC, 0)
    logits_LCV = _logits(hidden_LCD, unembed_VD, cap)
    normalizer_LC = jax.nn.logsumexp(logits_LCV, axis=-1)
    picked_LC = jnp.take_along_axis(logits_LCV, target_LC[..., None], -1)
    collision_LC = slope_LCD = None
    if collisions:
      twice_LC = jax.nn.logsumexp(2.0 * logits_LCV, axis=-1)
      collision_LC = twice_LC - 2.0 * normalizer_LC
    if slopes:
      grad_LCV = _logits_grad(logits_LCV, normalizer_LC, target_LC, cap)
      slope_LCD = _hidden_grad(grad_LCV.astype(hidden_LCD.dtype), unembed_VD)
    return None, (
      picked_LC[..., 0] - normalizer_LC,
      normalizer_LC,
      collision_LC,
      slope_LCD,
    )

  inputs = (scored.packed(hidden_RSD), scored.packed(target_RS))
  _, (logps, normalizers, *others) = scored.scan(one_chunk, None, inputs)
  return (
    scored.unpacked(logps, _PADDING),
    scored.unpacked(normalizers, jnp.inf),  # so that all probabilities are 0
    *jax.tree.map(lambda x: scored.unpacked(x, 0), others),
  )


def token_logps(hidden_RSD, unembed_VD, target_RS, chunk, *, cap):
  """Returns float32 log p(target | hidden), [R, S].

  Args:
    hidden_RSD: hidden states that predict the targets.
    unembed_VD: unembedding; logits = hidden @ unembed.T, accumulated in
      float32.
    target_RS: int32 token ids; -1 is padding, which has no gradient and costs
      nothing beyond the end of the last chunk.
    chunk: tokens of a device whose logits exist at one time.
    cap: the model's `logit_cap`, soft cap of the logits or None.

  Without differentiation (the reference model) nothing is kept for a
  backward pass.
  """
  return _token_logps(hidden_RSD, unembed_VD, target_RS, chunk, cap, False)[0]


def token_logps_and_collisions(
  hidden_RSD, unembed_VD, target_RS, chunk, *, cap
):
  """Returns `token_logps` and, from the same pass, log sum_v p(v)^2, [R, S].

  The second, the log-probability that two draws of a token agree, is what WPO
  (arXiv:2406.11827) compares the first with; it has no gradient.
  """
  return _token_logps(hidden_RSD, unembed_VD, target_RS, chunk, cap, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logps(hidden_RSD, unembed_VD, target_RS, chunk, cap, collisions):
  logps_RS, _, collisions_RS, _ = _in_chunks(
    hidden_RSD, unembed_VD, target_RS, chunk, cap, collisions, slopes=False
  )
  return logps_RS, collisions_RS


def _token_logps_forward(hidden, unembed, target, chunk, cap, collisions):
  """Keeps slopes where the unembedding is frozen (adapters).

  A gradient in the hidden states alone is slope times cotangent, so that
  backward has no logits to compute again: two matmuls instead of three.
  """
  frozen = not unembed.perturbed
  hidden_RSD, unembed_VD, target_RS = (
    x.value for x in (hidden, unembed, target)
  )
  logps_RS, normalizer_RS, collisions_RS, slopes_RSD = _in_chunks(
    hidden_RSD, unembed_VD, target_RS, chunk, cap, collisions, slopes=frozen
  )
  if frozen:
    return (logps_RS, collisions_RS), slopes_RSD
  residuals = (hidden_RSD, unembed_VD, target_RS, normalizer_RS)
  return (logps_RS, collisions_RS), residuals


def _token_logps_backward(chunk, cap, collisions, residuals, grads):
  del collisions  # a weight; nothing is learned through it
  grad_RS, _ = grads
  if isinstance(grad_RS, custom_derivatives.SymbolicZero):
    grad_RS = jnp.zeros(grad_RS.shape, jnp.float32)
  if not isinstance(residuals, tuple):
    slopes_RSD = residuals
    hidden_grad_RSD = grad_RS[..., None] * slopes_RSD
    return hidden_grad_RSD.astype(slopes_RSD.dtype), None, None
  hidden_RSD, unembed_VD, target_RS, normalizer_RS = residuals
  scored = _Scored(target_RS, chunk)
  ready_VD = _ready(unembed_VD, hidden_RSD.dtype)
  inputs = tuple(
    map(scored.packed, (hidden_RSD, target_RS, normalizer_RS, grad_RS))
  )
  V, D = unembed_VD.shape
  blocks = _blocks(V)
  B = math.ceil(V / blocks)

  def one_block(n, state):
    """Adds to the states' gradient, and writes rows of the unembedding's."""
    hidden_grad_LND, unembed_grad_VD = state
    # The last blocks overlap: rows that were there before are written again,
    # but must not be added again.
    start = jnp.minimum(n * B, V - B) if blocks > 1 else 0
    part_BD = jax.lax.dynamic_slice_in_dim(ready_VD, start, B)
    new_B1 = (start + jnp.arange(B) >= n * B)[:, None]
    new_BD = jnp.where(new_B1, part_BD, 0) if V % B else part_BD

    def one_chunk(part_grad_LBD, inputs):
      hidden_LCD, target_LC, normalizer_LC, grad_LC = inputs
      logits_LCB = _logits(hidden_LCD, part_BD, cap)
      logits_grad_LCB = _logits_grad(
        logits_LCB, normalizer_LC, target_LC - start, cap
      ).astype(hidden_LCD.dtype)
      # The cotangents, which are small, are multiplied where nothing of theirs
      # is lost in float16.
      grad_LC1 = grad_LC[..., None]
      part_grad_LBD += jnp.einsum(
        'LCB,LCD->LBD',
        logits_grad_LCB,
        (grad_LC1 * hidden_LCD).astype(hidden_LCD.dtype),
        preferred_element_type=jnp.float32,
      )
      return part_grad_LBD, grad_LC1 * jnp.einsum(
        'LCB,BD->LCD',
        logits_grad_LCB,
        new_BD,
        preferred_element_type=jnp.float32,
      )

    L = len(hidden_grad_LND)
    zeros_LBD = jnp.zeros((L, B, D), jnp.float32)
    if L > 1:
      zeros_LBD = nn.with_logical_constraint(zeros_LBD, ('rows', 'vocab', None))
    part_grad_LBD, added_LND = scored.scan(one_chunk, zeros_LBD, inputs)
    part_grad_BD = _sum_of_lists(part_grad_LBD).astype(unembed_VD.dtype)
    return hidden_grad_LND + added_LND, jax.lax.dynamic_update_slice_in_dim(
      unembed_grad_VD, part_grad_BD, start, axis=0
    )

  state = (
    jnp.zeros(inputs[0].shape, jnp.float32),
    _as_parameter(jnp.zeros(unembed_VD.shape, unembed_VD.dtype)),
  )
  if blocks == 1:
    hidden_grad_LND, unembed_grad_VD = one_block(0, state)
  else:
    hidden_grad_LND, unembed_grad_VD = jax.lax.fori_loop(
      0, blocks, one_block, state
    )
  hidden_grad_RSD = scored.unpacked(hidden_grad_LND, 0)
  return hidden_grad_RSD.astype(hidden_RSD.dtype), unembed_grad_VD, None


# Words of which the backward pass computes logits at one time.
_BLOCK = 8192


def _blocks(vocab):
  """Number of blocks; a vocabulary that devices share is not cut further."""
  mesh = jax.sharding.get_abstract_mesh()
  axis = nn.logical_to_mesh_axes(('vocab',))[0]
  if axis and mesh.shape.get(axis, 1) > 1:
    return 1
  return math.ceil(vocab / _BLOCK)


_token_logps.defvjp(
  _token_logps_forward, _token_logps_backward, symbolic_zeros=True
)


def token_kls(
  p_hidden_RSD, p_unembed_VD, q_hidden_RSD, q_unembed_VD, *, chunk, cap
):
  """Returns float32 KL(p || q) of each next-token distribution, [R, S].

  The full-vocabulary sum: over prefixes that p sampled it is the
  Rao-Blackwellized estimator of the sequence KL (DPO, footnote 3,
  arXiv:2305.18290). Differentiable in all arrays; the backward pass recomputes
  each chunk. Arguments as in `token_logps`, but of padding nothing is known.
  """
  return _compared(
    lambda p_logp_LCV, q_logp_LCV, _: _kls(p_logp_LCV, q_logp_LCV),
    (p_hidden_RSD, p_unembed_VD),
    (q_hidden_RSD, q_unembed_VD),
    jnp.zeros(p_hidden_RSD.shape[:2], jnp.int32),
    chunk=chunk,
    cap=cap,
  )


def token_comparisons(
  p_hidden_RSD,
  p_unembed_VD,
  q_hidden_RSD,
  q_unembed_VD,
  target_RS,
  *,
  chunk,
  cap,
):
  """Returns {'kl', 'log_ratio', 'entropy'} of each next token, [R, S] each.

  KL(p || q) as of `token_kls`; log p - log q of the target, whose mean over
  what p sampled is the same KL with more variance; and the entropy of p, nats.
  Arguments as in `token_logps`; of padding nothing is known.
  """

  def compare(p_logp_LCV, q_logp_LCV, target_LC):
    log_ratio_LCV = p_logp_LCV - q_logp_LCV
    index_LC1 = jnp.maximum(target_LC, 0)[..., None]
    return {
      'kl': _kls(p_logp_LCV, q_logp_LCV),
      'log_ratio': jnp.take_along_axis(log_ratio_LCV, index_LC1, -1)[..., 0],
      'entropy': -jnp.sum(jnp.exp(p_logp_LCV) * p_logp_LCV, -1),
    }

  return _compared(
    compare,
    (p_hidden_RSD, p_unembed_VD),
    (q_hidden_RSD, q_unembed_VD),
    target_RS,
    chunk=chunk,
    cap=cap,
  )


def _kls(p_logp_LCV, q_logp_LCV):
  return jnp.sum(jnp.exp(p_logp_LCV) * (p_logp_LCV - q_logp_LCV), -1)


def _compared(function, p, q, target_RS, *, chunk, cap):
  """Maps (log p [L, C, V], log q, targets [L, C]) -> [L, C] over all tokens."""
  R, S = target_RS.shape
  unembeddings = [
    _ready(unembed_VD, hidden.dtype) for hidden, unembed_VD in (p, q)
  ]

  @jax.checkpoint
  def one_chunk(_, inputs):
    *hidden, target_LC = inputs
    logps = [
      jax.nn.log_softmax(_logits(hidden_LCD, unembed_VD, cap))
      for hidden_LCD, unembed_VD in zip(hidden, unembeddings, strict=True)
    ]
    return None, function(*logps, target_LC)

  def chunks(x_RS):
    x_LN = _listed(x_RS)
    L, N = x_LN.shape[:2]
    C = chunk_size(N, chunk)
    return jnp.moveaxis(_pad(x_LN, C).reshape(L, -1, C, *x_LN.shape[2:]), 1, 0)

  def rows(x_nLC):
    L = x_nLC.shape[1]
    x_LN = jnp.moveaxis(x_nLC, 1, 0).reshape(L, -1)[:, : R * S // L]
    return x_LN.reshape(R, S)

  inputs = (chunks(p[0]), chunks(q[0]), chunks(target_RS))
  _, out_nLC = jax.lax.scan(one_chunk, None, inputs)
  return jax.tree.map(rows, out_nLC)


def sum_by_slot(values_RS, slot_RS, *, num_slots):
  """Sums token values over each response: [R, num_slots].

  Slot -1 is padding. Comparisons and a float32 sum, not a matmul, because a
  TPU matmul would round the addends to bfloat16.
  """
  hit_RSQ = slot_RS[..., None] == jnp.arange(num_slots)
  return jnp.sum(jnp.where(hit_RSQ, values_RS[..., None], 0.0), axis=1)


def index_in_slot(slot_RS, *, num_slots):
  """Returns each scored token's index in its response, from 0: int32 [R, S].

  A response's tokens stand in order; padding gets 0.
  """
  hit_RSQ = slot_RS[..., None] == jnp.arange(num_slots)
  before_RSQ = jnp.cumsum(hit_RSQ, axis=1) - 1
  return jnp.sum(jnp.where(hit_RSQ, before_RSQ, 0), axis=-1)
