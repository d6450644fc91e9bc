"""Losses of a whole batch: what one group costs depends on the others.

All leading dims are one batch; inside a sharded step that is the global batch.
Groups with mask False are padding: they change no other group's loss and hold
numbers without a meaning. See `scoring` for the conventions.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import choices
from dpo_jax.losses import margins
from dpo_jax.losses import scoring


def dr_dpo(scores, *, beta=0.1, beta_prime=1.0, link=choices.reverse_kl):
  """Distributionally robust DPO: a soft minimum over the pairs of a batch.

  Pairs with a large loss, perhaps wrong labels, count less.

  Equation: -beta' log(mean over pairs of exp(-l / beta')), l = -log
    sigmoid(beta h); every pair gets this value
  Source: Wu et al. 2024, arXiv:2407.07880
  Sign: falls as any h grows; beta' -> infinity is DPO
  Tokens: sum; over pairs a soft minimum, not a mean
  Defaults: beta=0.1, beta_prime=1.0, link=reverse_kl

  >>> scoring.rounded(dr_dpo(scoring.example()))
  [0.467, 0.467, 0.467]
  """
  loss = margins.dpo(scores, beta=beta, link=link)
  mask = jnp.broadcast_to(scores.mask, loss.shape)
  mask = mask | ~jnp.any(mask)  # a batch of padding: any number will do
  count = jnp.maximum(jnp.sum(mask), 1)
  total = jax.nn.logsumexp(-loss / beta_prime, where=mask)
  return jnp.full(loss.shape, beta_prime * (jnp.log(count) - total))


def _partner_at_rank(values, others, mask):
  """The element of `others` that has the rank of each element of `values`.

  Ranks are among the real entries; 0 where there is none.
  """
  shape = values.shape
  mask = jnp.broadcast_to(mask, shape).reshape(-1)
  values = jnp.where(mask, values.reshape(-1), jnp.inf)
  others = jnp.where(mask, others.reshape(-1), jnp.inf)
  rank = jnp.argsort(jnp.argsort(jax.lax.stop_gradient(values)))
  at_rank = others[jnp.argsort(jax.lax.stop_gradient(others))[rank]]
  return jnp.where(mask, at_rank, 0.0).reshape(shape)


def aot(scores, *, beta=0.01, label_smoothing=0.0):
  """Alignment via optimal transport, paired: margins dominate the reference's.

  Equation: -log sigmoid(beta (a_(i) - b_(i))), a_(i) the i-th smallest over the
    batch of log pi(yw) - log pi(yl), b_(i) of the reference's; a pair's loss is
    that of its own a. label_smoothing as in `cdpo`
  Source: Melnyk et al. 2024, arXiv:2406.05882, section 3
  Sign: falls as the distribution of margins rises
  Tokens: sum; sorts over the global batch
  Defaults: beta=0.01, label_smoothing=0.0
  Elsewhere: TRL's `aot`, sorted over a device's micro-batch; until 0.24 that
    was `aot_pair` there, and `aot` was `aot_unpaired`

  >>> scoring.rounded(aot(scoring.example(), beta=0.1))
  [0.533, 0.554, 0.231]
  """
  policy = scores.policy[..., 0] - scores.policy[..., 1]
  ref = jnp.broadcast_to(scores.ref, scores.policy.shape)
  ref = ref[..., 0] - ref[..., 1]
  lead = policy - _partner_at_rank(policy, ref, scores.mask)
  return scoring.soft_logistic(beta * lead, 1.0 - label_smoothing)


def aot_unpaired(scores, *, beta=0.01, label_smoothing=0.0):
  """Alignment via optimal transport, unpaired: chosen dominate rejected.

  Equation: -log sigmoid(beta (c_(i) - r_(i))), c_(i) the i-th smallest rho of
    the batch's chosen responses, r_(i) of the rejected; a pair's loss is that
    of its own c. label_smoothing as in `cdpo`
  Source: Melnyk et al. 2024, arXiv:2406.05882, section 3
  Sign: falls as the distribution of the chosen's rho rises over the rejected's
  Tokens: sum; sorts over the global batch
  Defaults: beta=0.01, label_smoothing=0.0
  Elsewhere: until 0.24 TRL called this one `aot`

  >>> scoring.rounded(aot_unpaired(scoring.example(), beta=0.1))
  [0.621, 0.341, 0.327]
  """
  rho = scoring.log_ratio(scores)
  chosen, rejected = rho[..., 0], rho[..., 1]
  lead = chosen - _partner_at_rank(chosen, rejected, scores.mask)
  return scoring.soft_logistic(beta * lead, 1.0 - label_smoothing)


def kto(scores, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
  """Kahneman-Tversky optimization: single responses, desirable or not.

  Equation: p wd (1 - sigmoid(beta (rho - z))) + (1-p) wu (1 - sigmoid(beta (z -
    rho))), z = max(0, mean over the batch of rho(mismatched)) without gradient,
    p the label
  Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 (8 in later versions)
  Sign: rho rises for desirable responses, falls for undesirable ones
  Tokens: sum; z is a mean over the global batch
  Defaults: beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
  Elsewhere: TRL estimates z from a device's micro-batch; its former `kto_pair`
    is this on both halves of pairs

  >>> rho = jnp.array([[1.0, 0.5], [0.5, 0.1]])  # own, mismatched
  >>> scoring.rounded(kto(scoring.Scores(rho, p=jnp.array([1.0, 0.0]))))
  [0.483, 0.505]
  """
  rho = scoring.log_ratio(scores)
  kl = jax.nn.relu(scoring.masked_mean(rho[..., 1], scores.mask))
  lead = beta * (rho[..., 0] - jax.lax.stop_gradient(kl))
  desirable = desirable_weight * jax.nn.sigmoid(-lead)
  undesirable = undesirable_weight * jax.nn.sigmoid(lead)
  return scores.p * desirable + (1.0 - scores.p) * undesirable
