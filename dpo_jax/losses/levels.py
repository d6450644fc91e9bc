"""Losses of each response's own rho, not only of the margin.

They fix the level of the log-probabilities too: adding the same number to all
of a prompt changes them. See `scoring` for the conventions.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import margins
from dpo_jax.losses import scoring


def nca(scores, *, beta=0.01, reward_temperature=0.0):
  """Noise contrastive alignment: each response against the reference's.

  Equation: -sum_k t_k log sigmoid(r_k) - (1/K) sum_k log sigmoid(-r_k), r =
    beta rho, t = softmax(rewards / reward_temperature), or one-hot (p of a
    pair) at temperature 0
  Source: Chen et al. 2024, arXiv:2402.05369, section 4.1
  Sign: the likelihood of the chosen response does not fall
  Tokens: sum
  Defaults: beta=0.01, reward_temperature=0.0
  Elsewhere: `nca_pair` in TRL is a pair at temperature 0

  >>> scoring.rounded(nca(scoring.example(), beta=0.1))
  [1.351, 1.426, 1.127]
  """
  target = margins.target_distribution(scores, reward_temperature)
  reward = beta * scoring.log_ratio(scores)
  pull = jnp.sum(target * jax.nn.log_sigmoid(reward), axis=-1)
  push = jnp.mean(jax.nn.log_sigmoid(-reward), axis=-1)
  return -pull - push


def bco(scores, *, beta=0.01, shift='running'):
  """Binary classifier optimization: is a response good or bad?

  Equation: -log sigmoid(r_w - d) - log sigmoid(-(r_l - d)), r = beta rho, d the
    running mean of all rewards r so far, without gradient; shift='none': d = 0.
    Single responses: -p log sigmoid(r - d) - (1-p) log sigmoid(-(r - d))
  Source: Jung et al. 2024, arXiv:2404.04656, section 4. Its density
    ratios (underlying distribution matching) are weights of the data
  Sign: r_w rises, r_l falls
  Tokens: sum; adds the two terms of a pair
  Defaults: beta=0.01, shift='running'
  Elsewhere: TRL's `bco_pair` is shift='none'; its BCO trainer has the shift

  >>> scoring.rounded(bco(scoring.example(), beta=0.1, shift='none'))
  [1.313, 1.463, 0.627]
  """
  reward = beta * scoring.log_ratio(scores)
  if shift == 'running':
    memory = bco_memory(scores, beta=beta, shift=shift)
    reward -= jax.lax.stop_gradient(memory['mean'])
  elif shift != 'none':
    raise ValueError(f"bco: shift is {shift!r}; use 'running' or 'none'")
  good, bad = -jax.nn.log_sigmoid(reward), -jax.nn.log_sigmoid(-reward)
  if reward.shape[-1] == 1:
    return scores.p * good[..., 0] + (1.0 - scores.p) * bad[..., 0]
  return good[..., 0] + bad[..., 1]


def bco_memory(scores, *, beta, shift):
  """`scores.memory` after this batch: mean of all rewards, and how many."""
  if shift == 'none':
    return {}
  reward = beta * scoring.log_ratio(scores)
  mask = jnp.broadcast_to(jnp.asarray(scores.mask)[..., None], reward.shape)
  count = jnp.sum(mask, dtype=jnp.float32)
  before = scores.memory or {'mean': 0.0, 'count': 0.0}
  total = before['count'] + count
  step = scoring.masked_mean(reward, mask) - before['mean']
  mean = before['mean'] + step * count / jnp.maximum(total, 1.0)
  return jax.lax.stop_gradient({'mean': mean, 'count': total})


def sppo(scores, *, eta=1000.0):
  """Self-play preference optimization: regression to the win probabilities.

  Equation: (rho_w - eta (p - 1/2))^2 + (rho_l - eta (1/2 - p))^2, p the
    probability that chosen wins
  Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7; its code halves the sum
  Sign: rho_w rises to eta (p - 1/2), rho_l falls to its negative
  Tokens: sum; adds the two terms
  Defaults: eta=1000.0
  Elsewhere: TRL's `sppo_hard` is p = 1 with its beta = 1/eta

  >>> scoring.rounded(sppo(scoring.example(), eta=10.0))
  [36.25, 66.25, 50.0]
  """
  rho = scoring.log_ratio(scores)
  goal = eta * (scores.p - 0.5)
  return (rho[..., 0] - goal) ** 2 + (rho[..., 1] + goal) ** 2


def apo_zero(scores, *, beta=0.1):
  """Anchored preference optimization, zero: winners up, losers down.

  Equation: 1 - sigmoid(r_w) + sigmoid(r_l), r = beta rho
  Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7
  Sign: r_w rises, r_l falls; for chosen better than the policy's own output
  Tokens: sum
  Defaults: beta=0.1

  >>> scoring.rounded(apo_zero(scoring.example()))
  [0.963, 1.037, 0.538]
  """
  reward = beta * scoring.log_ratio(scores)
  return jax.nn.sigmoid(-reward[..., 0]) + jax.nn.sigmoid(reward[..., 1])


def apo_down(scores, *, beta=0.1):
  """Anchored preference optimization, down: both down, winners less.

  Equation: sigmoid(r_w) + 1 - sigmoid(r_w - r_l), r = beta rho
  Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8
  Sign: r_l falls; r_w falls once it leads; for chosen worse than the policy's
    own output
  Tokens: sum
  Defaults: beta=0.1

  >>> scoring.rounded(apo_down(scoring.example()))
  [0.988, 1.012, 0.85]
  """
  reward = beta * scoring.log_ratio(scores)
  lead = reward[..., 0] - reward[..., 1]
  return jax.nn.sigmoid(reward[..., 0]) + jax.nn.sigmoid(-lead)


def apo_zero_unpaired(
  scores, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
):
  """APO-zero for single responses with a label p.

  Equation: p wd (1 - sigmoid(r)) + (1-p) wu sigmoid(r), r = beta rho
  Source: TRL's KTO trainer, after arXiv:2408.06266: KTO without its KL
  Sign: r rises for desirable responses, falls for undesirable ones
  Tokens: sum
  Defaults: beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
  Elsewhere: `apo_zero_unpaired` in TRL

  >>> rho = jnp.array([[1.0], [0.5]])
  >>> single = scoring.Scores(rho, p=jnp.array([1.0, 0.0]))
  >>> scoring.rounded(apo_zero_unpaired(single))
  [0.475, 0.512]
  """
  reward = beta * scoring.log_ratio(scores)[..., 0]
  good = desirable_weight * jax.nn.sigmoid(-reward)
  bad = undesirable_weight * jax.nn.sigmoid(reward)
  return scores.p * good + (1.0 - scores.p) * bad
