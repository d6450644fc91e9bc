"""Log-probabilities of tokens without ever holding [tokens, vocabulary].

Hidden states are gathered at scored positions, then pass through the
unembedding in chunks; the backward pass recomputes each chunk's logits from
the saved log-normalizer. Everything here is float32 from the logits on.

Dimension key: R rows, T slots, S scored tokens per row, D model, V
vocabulary, C tokens of a chunk, Q responses per row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import custom_derivatives

from dpo_jax import attention


def gather_scored(hidden_RTD, source_RS):
  """Picks the hidden states that predict the scored tokens: [R, S, D]."""
  return jnp.take_along_axis(hidden_RTD, source_RS[..., None], axis=1)


def _split(x, chunk):
  """[R, S, ...] -> [chunks, R, C, ...], zero-padded; R * C is about chunk.

  Rows stay whole, because they lie on different devices.
  """
  R, S = x.shape[:2]
  C = min(max(chunk // R, 1), S)
  pad = [(0, 0), (0, -S % C)] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad).reshape(R, -1, C, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _join(x, S):
  """[chunks, R, C, ...] -> [R, S, ...], the inverse of `_split`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :S]


# What a padding target has for a log-prob; nobody looks at it, so it is any
# number at which all functions of log-probs are finite.
_PADDING = -1.0


def _scan(one_chunk, carry, inputs, target_RS):
  """`lax.scan` over chunks, of which those of padding alone are left out.

  Padding ends rows, so they are the last ones; their outputs are zero. `inputs`
  are of `_split`, for targets [R, S].
  """
  S, C = target_RS.shape[1], inputs[0].shape[2]
  last = jnp.max(jnp.where(target_RS >= 0, jnp.arange(1, S + 1), 0))

  def take(n):
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), inputs
    )

  def step(n, state):
    carry, outs = state
    carry, out = one_chunk(carry, take(n))
    put = functools.partial(
      jax.lax.dynamic_update_index_in_dim, index=n, axis=0
    )
    return carry, jax.tree.map(put, outs, out)

  _, out = jax.eval_shape(one_chunk, carry, jax.eval_shape(take, 0))
  outs = jax.tree.map(
    lambda x: jnp.zeros((len(inputs[0]), *x.shape), x.dtype), out
  )
  return jax.lax.fori_loop(0, -(-last // C), step, (carry, outs))


def _logits(hidden_RCD, unembed_VD, cap):
  logits_RCV = jnp.einsum(
    'RCD,VD->RCV',
    hidden_RCD,
    unembed_VD.astype(hidden_RCD.dtype),
    preferred_element_type=jnp.float32,
  )
  return attention.soft_cap(logits_RCV, cap)


def _in_chunks(
  hidden_RSD, unembed_VD, target_RS, chunk, cap, collisions, slopes
):
  """One pass: (logps, normalizers, log sum_v p(v)^2, slopes) of [R, S].

  The last two are None unless asked for. `slopes` [R, S, D] are the gradients
  of the log-probs in the hidden states.
  """

  def one_chunk(_, inputs):
    hidden_RCD, target_RC = inputs
    target_RC = jnp.maximum(target_RC, 0)
    logits_RCV = _logits(hidden_RCD, unembed_VD, cap)
    normalizer_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
    picked_RC = jnp.take_along_axis(logits_RCV, target_RC[..., None], -1)
    collision_RC = slope_RCD = None
    if collisions:
      twice_RC = jax.nn.logsumexp(2.0 * logits_RCV, axis=-1)
      collision_RC = twice_RC - 2.0 * normalizer_RC
    if slopes:
      grad_RCV = _logits_grad(logits_RCV, normalizer_RC, target_RC, cap)
      slope_RCD = _hidden_grad(grad_RCV.astype(hidden_RCD.dtype), unembed_VD)
    return None, (
      picked_RC[..., 0] - normalizer_RC,
      normalizer_RC,
      collision_RC,
      slope_RCD,
    )

  inputs = (_split(hidden_RSD, chunk), _split(target_RS, chunk))
  _, out = _scan(one_chunk, None, inputs, target_RS)
  logps_RS, *others = jax.tree.map(lambda x: _join(x, target_RS.shape[1]), out)
  return jnp.where(target_RS < 0, _PADDING, logps_RS), *others


def _logits_grad(logits_RCV, normalizer_RC, target_RC, cap):
  """Gradient of log p(target) in the logits before the cap."""
  probs_RCV = jnp.exp(logits_RCV - normalizer_RC[..., None])
  hit_RCV = jnp.arange(logits_RCV.shape[-1]) == target_RC[..., None]
  grad_RCV = hit_RCV - probs_RCV
  if cap is not None:  # the derivative of the soft cap, from its value
    grad_RCV *= 1 - (logits_RCV / cap) ** 2
  return grad_RCV


def _hidden_grad(logits_grad_RCV, unembed_VD):
  return jnp.einsum(
    'RCV,VD->RCD', logits_grad_RCV, unembed_VD.astype(logits_grad_RCV.dtype)
  )


def token_logps(hidden_RSD, unembed_VD, target_RS, chunk, *, cap):
  """Returns float32 log p(target | hidden), [R, S].

  Args:
    hidden_RSD: hidden states that predict the targets.
    unembed_VD: unembedding; logits = hidden @ unembed.T, accumulated in
      float32.
    target_RS: int32 token ids; -1 is padding, which ends a row, has no
      gradient and, where it fills a chunk, costs nothing.
    chunk: tokens, over all rows, whose logits exist at one time.
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
  residuals = (hidden_RSD, unembed_VD, target_RS, normalizer_RS)
  if frozen:
    residuals = jnp.where(target_RS[..., None] < 0, 0.0, slopes_RSD)
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
  dtype = hidden_RSD.dtype
  grad_RS = jnp.where(target_RS < 0, 0.0, grad_RS)

  def one_chunk(unembed_grad_VD, inputs):
    hidden_RCD, target_RC, normalizer_RC, grad_RC = inputs
    logits_RCV = _logits(hidden_RCD, unembed_VD, cap)
    logits_grad_RCV = grad_RC[..., None] * _logits_grad(
      logits_RCV, normalizer_RC, target_RC, cap
    )
    logits_grad_RCV = logits_grad_RCV.astype(dtype)
    unembed_grad_VD += jnp.einsum(
      'RCV,RCD->VD',
      logits_grad_RCV,
      hidden_RCD,
      preferred_element_type=jnp.float32,
    )
    return unembed_grad_VD, _hidden_grad(logits_grad_RCV, unembed_VD)

  inputs = tuple(
    _split(x, chunk) for x in (hidden_RSD, target_RS, normalizer_RS, grad_RS)
  )
  unembed_grad_VD, hidden_grad = _scan(
    one_chunk, jnp.zeros(unembed_VD.shape, jnp.float32), inputs, target_RS
  )
  hidden_grad_RSD = _join(hidden_grad, target_RS.shape[1])
  return hidden_grad_RSD, unembed_grad_VD.astype(unembed_VD.dtype), None


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
  each chunk. Arguments as in `token_logps`.
  """

  @jax.checkpoint
  def one_chunk(_, inputs):
    p_hidden_RCD, q_hidden_RCD = inputs
    p_logp = jax.nn.log_softmax(_logits(p_hidden_RCD, p_unembed_VD, cap))
    q_logp = jax.nn.log_softmax(_logits(q_hidden_RCD, q_unembed_VD, cap))
    return None, jnp.sum(jnp.exp(p_logp) * (p_logp - q_logp), -1)

  inputs = (_split(p_hidden_RSD, chunk), _split(q_hidden_RSD, chunk))
  _, kls = jax.lax.scan(one_chunk, None, inputs)
  return _join(kls, p_hidden_RSD.shape[1])


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
