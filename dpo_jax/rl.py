"""Equations of PPO on sampled responses.

A sample is an episode: its tokens are the actions, and its score, one number,
comes with its last token. Arrays have one sample a row, whose tokens stand in
front; `mask` says which slots hold one. What stands in the other slots is never
looked at, so it must only be finite.

Sources: Schulman et al. 2017, arXiv:1707.06347 (PPO), and 2016,
arXiv:1506.02438 (advantages); Ziegler et al. 2019, arXiv:1909.08593, with its
code (KL in the rewards, its controller, whitening); Ouyang et al. 2022,
arXiv:2203.02155.

Dimension key: N samples, M most tokens of a sample.
"""

import jax
import jax.numpy as jnp

_EPSILON = 1e-8  # of variances, as in the code of arXiv:1909.08593

# Estimators of the KL at one sampled token, from d = log pi - log pi_ref; both
# have the KL as their mean over the policy's own tokens.
KL_ESTIMATORS = {
  'k1': lambda d: d,
  'k3': lambda d: jnp.expm1(-d) + d,  # >= 0
}

# Kind -> the other keys of a config's kl section, besides coef.
KL_CONTROLLERS = {'fixed': (), 'adaptive': ('target', 'horizon')}
# The most that `adapted` sees of a KL's relative error, either way.
MOST_ERROR = 0.2

# What rewards are shifted and scaled by.
NORMALIZERS = {
  'none': 'nothing',
  'reference': 'the moments of one rollout before the first step',
  'running': 'the moments of all rollouts so far, this one included',
}


# --- Means over real tokens ---------------------------------------------------


def masked_mean(x, mask):
  """Mean over the true entries of `mask`; 0 where there are none."""
  total = jnp.sum(jnp.where(mask, x, 0.0))
  return total / jnp.maximum(jnp.sum(mask), 1)


def masked_variance(x, mask):
  """Variance, divided by the number of true entries."""
  return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x_NM, mask_NM, *, keep_mean):
  """Scales to variance 1 over real tokens; shifts to mean 0 or keeps the mean.

  (x - mean) / sqrt(variance + 1e-8) [+ mean]: advantages lose their mean,
  rewards keep theirs (code of arXiv:1909.08593). 0 at other slots.
  """
  mean = masked_mean(x_NM, mask_NM)
  scale = jax.lax.rsqrt(masked_variance(x_NM, mask_NM) + _EPSILON)
  whitened_NM = (x_NM - mean) * scale + (mean if keep_mean else 0.0)
  return jnp.where(mask_NM, whitened_NM, 0.0)


# --- Scores -------------------------------------------------------------------


def moments(x_N):
  """Returns {'mean', 'variance', 'count'} of numbers, for `normalized`."""
  count = jnp.float32(x_N.size)
  return {'mean': jnp.mean(x_N), 'variance': jnp.var(x_N), 'count': count}


def joined(a, b):
  """Returns the `moments` of two sets of numbers together.

  Chan, Golub and LeVeque 1979: the variance of the parts plus that of their
  means.
  """
  count = a['count'] + b['count']
  share = b['count'] / count
  apart = b['mean'] - a['mean']
  return {
    'mean': a['mean'] + share * apart,
    'variance': (1.0 - share) * a['variance']
    + share * b['variance']
    + share * (1.0 - share) * apart**2,
    'count': count,
  }


def normalized(x_N, by):
  """(x - mean) / sqrt(variance): a gain and a bias under which what the
  moments `by` are of has mean 0 and variance 1 (arXiv:1909.08593, section 2.1).

  Moments of mean 0 and variance 1 change nothing.
  """
  return (x_N - by['mean']) / jnp.sqrt(jnp.maximum(by['variance'], _EPSILON))


def last(mask_NM):
  """Marks the last real token of each sample: bool [N, M]."""
  after_NM = jnp.pad(mask_NM[:, 1:], ((0, 0), (0, 1)))
  return mask_NM & ~after_NM


def token_rewards(logps_NM, ref_logps_NM, scores_N, mask_NM, *, kl_coef, kl):
  """R_t = -kl_coef KL_t + 1[t is last] score, where KL_t estimates the KL.

  With the estimator 'k1', KL_t = log pi_old(y_t) - log pi_ref(y_t), the sum of
  the rewards is the objective r(x, y) - kl_coef log(pi(y|x) / pi_ref(y|x)) of
  arXiv:1909.08593, equation 2. 0 at slots without a token.

  Args:
    logps_NM: of the policy that sampled.
    ref_logps_NM: of the reference.
    scores_N: of whole responses.
    mask_NM: real tokens.
    kl_coef: weight of the KL.
    kl: a name of `KL_ESTIMATORS`.
  """
  rewards_NM = -kl_coef * KL_ESTIMATORS[kl](logps_NM - ref_logps_NM)
  rewards_NM += jnp.where(last(mask_NM), scores_N[:, None], 0.0)
  return jnp.where(mask_NM, rewards_NM, 0.0)


# --- Advantages ---------------------------------------------------------------


def generalized_advantages(rewards_NM, values_NM, mask_NM, *, gamma, lam):
  """Returns advantages and the returns that values learn, [N, M] each.

  delta_t = R_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},
  return_t = A_t + V_t (arXiv:1506.02438, equations 11 to 16). After the last
  token of a sample V and A are 0, also where it was cut: a reward for all of it
  was given. 0 at slots without a token.
  """

  def step(after, inputs):
    next_value_N, next_advantage_N = after
    reward_N, value_N, mask_N = inputs
    delta_N = reward_N + gamma * next_value_N - value_N
    advantage_N = delta_N + gamma * lam * next_advantage_N
    here = jax.tree.map(
      lambda x: jnp.where(mask_N, x, 0.0), (value_N, advantage_N)
    )
    return here, here[1]

  zeros_N = jnp.zeros_like(values_NM[:, 0])
  _, advantages_MN = jax.lax.scan(
    step,
    (zeros_N, zeros_N),
    (rewards_NM.T, values_NM.T, mask_NM.T),
    reverse=True,
  )
  advantages_NM = advantages_MN.T
  return advantages_NM, jnp.where(mask_NM, advantages_NM + values_NM, 0.0)


# --- Losses -------------------------------------------------------------------


def policy_losses(logps, old_logps, advantages, *, clip):
  """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) of each token.

  rho = pi / pi_old. The negative of arXiv:1707.06347, equation 7. Also returns
  where the clipped term is the larger, which has no gradient.
  """
  ratio = jnp.exp(logps - old_logps)
  free = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
  return jnp.maximum(free, clipped), clipped > free


def value_losses(values, old_values, returns, *, clip):
  """max((V - R)^2, (V_clip - R)^2) / 2 of each token.

  V_clip is V within `clip` of the value when the sample was made (code of
  arXiv:1909.08593). Also returns where the clipped term is the larger.
  """
  moved = values - old_values
  near = old_values + jnp.clip(moved, -clip, clip)
  free, clipped = (values - returns) ** 2, (near - returns) ** 2
  larger = (jnp.abs(moved) > clip) & (clipped > free)  # not by rounding alone
  return 0.5 * jnp.maximum(free, clipped), larger


# --- Control and health -------------------------------------------------------


def adapted(coef, kl, *, target, horizon, samples):
  """The next KL coefficient: coef (1 + clip(kl / target - 1, -.2, .2) n / h).

  arXiv:1909.08593, section 2.2, with n samples and the horizon of its code. It
  stays above 0 where horizon > `MOST_ERROR` * samples.

  Args:
    coef: of this rollout.
    kl: mean KL of whole responses, in nats.
    target: the KL that is wanted.
    horizon: samples after which an error of 1 would have doubled it.
    samples: of the rollout.
  """
  error = jnp.clip(kl / target - 1.0, -MOST_ERROR, MOST_ERROR)
  return coef * (1.0 + error * samples / horizon)


def explained_variance(values_NM, returns_NM, mask_NM):
  """1 - variance(R - V) / variance(R) over real tokens; 0 of equal returns."""
  whole = masked_variance(returns_NM, mask_NM)
  left = masked_variance(returns_NM - values_NM, mask_NM)
  return jnp.where(whole > 0.0, 1.0 - left / jnp.maximum(whole, 1e-30), 0.0)
