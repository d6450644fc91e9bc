"""Preference losses: pure functions of sequence scores, one table.

Conventions (all losses are minimised):
  rho = log pi(y|x) - log pi_ref(y|x), summed over the tokens of y (EOS
  included, prompt excluded); h = rho(chosen) - rho(rejected).
Every function maps `Scores` with leading dims [...] to per-group losses
[...]: no mean over the batch, no config, no mesh. `LOSSES` at the bottom is
the only place where a loss has a name.
"""

import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax import names


class Scores(NamedTuple):
  """What a loss may look at; float32.

  Pairs keep chosen at [..., 0] and rejected at [..., 1].
  """

  policy: Any  # [..., K] summed log pi
  ref: Any  # [..., K] summed log pi_ref; zeros without a reference
  lengths: Any  # [..., K] scored tokens, EOS included
  p: Any  # [...] probability that chosen is really preferred


def _margin(scores):
  """h, [...]."""
  rho = scores.policy - scores.ref
  return rho[..., 0] - rho[..., 1]


def implicit_rewards(scores, *, beta):
  """beta * rho, [..., K]: the reward DPO's policy stands for (eq. 5)."""
  return jax.lax.stop_gradient(beta * (scores.policy - scores.ref))


def dpo(scores, *, beta):
  """-log sigmoid(beta h). DPO, eq. 7, arXiv:2305.18290."""
  return -jax.nn.log_sigmoid(beta * _margin(scores))


def cdpo(scores, *, beta, label_smoothing):
  """DPO with labels flipped with probability `label_smoothing`.

  -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h): "conservative DPO",
  E. Mitchell, "A note on DPO with noisy preferences" (2023). Biased towards
  sigmoid(beta h) = 1 - e; e = 0 is DPO.
  """
  z = beta * _margin(scores)
  return -(
    (1.0 - label_smoothing) * jax.nn.log_sigmoid(z)
    + label_smoothing * jax.nn.log_sigmoid(-z)
  )


def soft(scores, *, beta):
  """DPO with a probability as label: cDPO with e = 1 - p for each pair."""
  z = beta * _margin(scores)
  return -(
    scores.p * jax.nn.log_sigmoid(z) + (1.0 - scores.p) * jax.nn.log_sigmoid(-z)
  )


def ipo_sum(scores, *, beta):
  """(h - 1/(2 beta))^2 on summed log-ratios. IPO, eq. 17, arXiv:2310.12036.

  `beta` is the paper's tau. This is the paper's and the DPO authors' form;
  TRL's `ipo` is `ipo_mean`.
  """
  return (_margin(scores) - 1.0 / (2.0 * beta)) ** 2


def ipo_mean(scores, *, beta):
  """IPO on per-token means of each response's log-ratio.

  What TRL and HALOs call `ipo`. The target margin 1/(2 beta) is then per
  token, so `beta` is not comparable with `ipo_sum`'s.
  """
  rho = (scores.policy - scores.ref) / scores.lengths
  return (rho[..., 0] - rho[..., 1] - 1.0 / (2.0 * beta)) ** 2


def sft(scores, *, reduction):
  """-log pi(y|x) of the first response.

  reduction 'sum' is the DPO authors' form, 'mean' divides by the response's
  own length.
  """
  if reduction not in ('sum', 'mean'):
    raise ValueError(f"sft: reduction {reduction!r}; use 'sum' or 'mean'")
  nll = -scores.policy[..., 0]
  return nll / scores.lengths[..., 0] if reduction == 'mean' else nll


def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
  """DPO exactly as in the paper's appendix B (arXiv:2305.18290).

  Args:
    pi_logps: [B] summed policy log-probs of all completions.
    ref_logps: [B] the same under the reference.
    yw_idxs: [T] indices of the preferred completion of each pair.
    yl_idxs: [T] indices of the dispreferred one.
    beta: temperature of the KL penalty.

  Returns:
    losses [T], and rewards [B] without gradient.
  """
  pairs = jnp.stack([yw_idxs, yl_idxs], axis=-1)
  p = jnp.ones(pairs.shape[0])
  scores = Scores(pi_logps[pairs], ref_logps[pairs], jnp.ones(pairs.shape), p)
  everything = Scores(pi_logps, ref_logps, None, None)
  return dpo(scores, beta=beta), implicit_rewards(everything, beta=beta)


class Loss(NamedTuple):
  """A table row: the function and what it needs."""

  function: Callable
  responses: int  # per prompt
  reference: bool  # needs reference log-probs
  soft_labels: bool  # uses Scores.p
  defaults: dict  # keyword arguments; configs copy them


LOSSES = {
  'dpo': Loss(dpo, 2, True, False, {'beta': 0.1}),
  'cdpo': Loss(cdpo, 2, True, False, {'beta': 0.1, 'label_smoothing': 0.1}),
  'soft': Loss(soft, 2, True, True, {'beta': 0.1}),
  'ipo_sum': Loss(ipo_sum, 2, True, False, {'beta': 0.1}),
  'ipo_mean': Loss(ipo_mean, 2, True, False, {'beta': 0.1}),
  'sft': Loss(sft, 1, False, False, {'reduction': 'sum'}),
}


def get(name):
  """Returns the table row; an unknown name raises with the nearest one."""
  return names.look_up(LOSSES, 'loss', name)


def bind(name, keywords):
  """Returns (row, function of scores alone); keywords must fit exactly."""
  loss = get(name)
  if set(keywords) != set(loss.defaults):
    raise ValueError(
      f'loss {name!r} takes {sorted(loss.defaults)}, got {sorted(keywords)}'
    )
  return loss, functools.partial(loss.function, **keywords)
