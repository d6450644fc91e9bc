"""Losses of the margin h: what counts is chosen against rejected.

Adding the same number to the log-probabilities of all responses of a prompt
changes none of them (but for `rpo` and `dpop`, which also look at the level,
and for reductions by length). See `scoring` for the conventions.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import choices
from dpo_jax.losses import scoring


def dpo(scores, *, beta=0.1, link=choices.reverse_kl):
  """Direct preference optimization: logistic loss of the margin.

  Equation: -log sigmoid(beta h)
  Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; links: f-DPO
  Sign: falls as h grows; ln 2 at h = 0
  Tokens: sum
  Defaults: beta=0.1, link=reverse_kl
  Elsewhere: `sigmoid` in TRL

  >>> scoring.rounded(dpo(scoring.example()))
  [0.621, 0.771, 0.127]
  """
  return -jax.nn.log_sigmoid(beta * scoring.margin(scores, link))


def dpo_norm(scores, *, beta=5.0):
  """Length-normalized DPO: the margin of per-token means.

  Equation: -log sigmoid(beta (rho_w/|yw| - rho_l/|yl|))
  Source: Tulu 3, Lambert et al. 2024, arXiv:2411.15124, eq. 6
  Sign: falls as the chosen response's mean log-ratio grows
  Tokens: mean; beta is not comparable with DPO's
  Defaults: beta=5.0
  Elsewhere: `sigmoid_norm` in TRL, `dpo_norm` in open-instruct

  >>> scoring.rounded(dpo_norm(scoring.example('mean')))
  [0.276, 1.156, 0.001]
  """
  return dpo(scores, beta=beta)


def cdpo(scores, *, beta=0.1, label_smoothing=0.1, link=choices.reverse_kl):
  """Conservative DPO: labels flipped with probability e = label_smoothing.

  Equation: -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h)
  Source: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3
  Sign: least where sigmoid(beta h) = 1 - e; rises beyond
  Tokens: sum
  Defaults: beta=0.1, label_smoothing=0.1, link=reverse_kl
  Elsewhere: `sigmoid` with label_smoothing in TRL up to 0.24, where later
    versions ignore it

  >>> scoring.rounded(cdpo(scoring.example()))
  [0.636, 0.756, 0.327]
  """
  z = beta * scoring.margin(scores, link)
  return scoring.soft_logistic(z, 1.0 - label_smoothing)


def soft(scores, *, beta=0.1, link=choices.reverse_kl):
  """Soft-label DPO: the data's p is the probability of the preference.

  Equation: -p log sigmoid(beta h) - (1-p) log sigmoid(-beta h)
  Source: cross-entropy of eq. 6 of arXiv:2305.18290 with a label p; cDPO is
    p = 1 - e for every pair
  Sign: least where sigmoid(beta h) = p
  Tokens: sum
  Defaults: beta=0.1, link=reverse_kl

  >>> scoring.rounded(soft(scoring.example()._replace(p=0.8)))
  [0.651, 0.741, 0.527]
  """
  return scoring.soft_logistic(beta * scoring.margin(scores, link), scores.p)


def robust(scores, *, beta=0.1, label_smoothing=0.1, link=choices.reverse_kl):
  """Robust DPO: unbiased where labels are flipped with probability e.

  The mean over flips of this loss is DPO's on the clean labels. A pair's own
  loss falls without bound as h grows.

  Equation: (-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)
  Source: Chowdhury et al. 2024, arXiv:2403.00409, section 3.1
  Sign: falls as h grows, with slope -e beta/(1-2e) at last
  Tokens: sum
  Defaults: beta=0.1, label_smoothing=0.1, link=reverse_kl

  >>> scoring.rounded(robust(scoring.example()))
  [0.602, 0.79, -0.123]
  """
  e = label_smoothing
  if not 0.0 <= e < 0.5:
    raise ValueError(f'robust: label_smoothing {e} must lie in [0, 0.5)')
  # A label beyond 1, which the flips bring back to 1 on average.
  return scoring.soft_logistic(
    beta * scoring.margin(scores, link), (1.0 - e) / (1.0 - 2.0 * e)
  )


def ipo_sum(scores, *, beta=0.1, link=choices.reverse_kl):
  """Identity preference optimization: squared distance to a fixed margin.

  Equation: (h - 1/(2 beta))^2
  Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; beta is its tau
  Sign: falls until h = 1/(2 beta), then rises
  Tokens: sum, as in the paper and the DPO authors' code
  Defaults: beta=0.1, link=reverse_kl
  Elsewhere: TRL's and HALOs' `ipo` is `ipo_mean`; TRL's online trainer and
    EasyLM sum

  >>> scoring.rounded(ipo_sum(scoring.example()))
  [12.25, 42.25, 225.0]
  """
  return (scoring.margin(scores, link) - 1.0 / (2.0 * beta)) ** 2


def ipo_mean(scores, *, beta=0.1):
  """IPO on per-token means of each response's log-ratio.

  Equation: (rho_w/|yw| - rho_l/|yl| - 1/(2 beta))^2
  Source: Azar et al. 2023, arXiv:2310.12036, eq. 17, with the means that its
    authors told TRL they had used
  Sign: falls until the margin is 1/(2 beta) per token, then rises
  Tokens: mean; beta is not comparable with `ipo_sum`'s
  Defaults: beta=0.1
  Elsewhere: `ipo` in TRL and HALOs

  >>> scoring.rounded(ipo_mean(scoring.example('mean')))
  [22.761, 26.58, 13.444]
  """
  return ipo_sum(scores, beta=beta)


def hinge(scores, *, beta=0.05, link=choices.reverse_kl):
  """Hinge loss of the margin: RSO's hinge-norm.

  Equation: max(0, 1 - beta h)
  Source: Liu et al. 2023, arXiv:2309.06657; beta is its gamma
  Sign: falls until h = 1/beta, then 0
  Tokens: sum
  Defaults: beta=0.05, link=reverse_kl
  Elsewhere: `hinge` in TRL, `rso`; SLiC-HF's own loss, without a reference,
    is `slic`

  >>> scoring.rounded(hinge(scoring.example(), beta=0.1))
  [0.85, 1.15, 0.0]
  """
  return jax.nn.relu(1.0 - beta * scoring.margin(scores, link))


def discopop(scores, *, beta=0.05, tau=0.05, link=choices.reverse_kl):
  """DiscoPOP: a blend of logistic and exponential loss, found by search.

  Not convex: near h = 0 from below the gradient points the wrong way.

  Equation: (1-s)(-log sigmoid(z)) + s exp(-z), z = beta h, s = sigmoid(z/tau)
  Source: Lu et al. 2024, arXiv:2406.08414, eq. 5 (log-ratio modulated loss)
  Sign: falls as h grows, but for a bump below 0
  Tokens: sum
  Defaults: beta=0.05, tau=0.05, link=reverse_kl

  >>> scoring.rounded(discopop(scoring.example(), beta=0.1))
  [0.849, 0.789, 0.135]
  """
  z = beta * scoring.margin(scores, link)
  # s exp(-z) in the log domain, because exp(-z) alone overflows.
  return jax.nn.sigmoid(-z / tau) * -jax.nn.log_sigmoid(z) + scoring.exp(
    jax.nn.log_sigmoid(z / tau) - z
  )


def r_dpo(scores, *, beta=0.1, alpha=0.01, link=choices.reverse_kl):
  """Length-regularized DPO: a long chosen response needs less margin.

  Equation: -log sigmoid(beta h + alpha (|yw| - |yl|))
  Source: Park et al. 2024, arXiv:2403.19159
  Sign: falls as h grows; alpha > 0 makes responses shorter
  Tokens: sum
  Defaults: beta=0.1, alpha=0.01, link=reverse_kl

  >>> scoring.rounded(r_dpo(scoring.example()))
  [0.63, 0.766, 0.137]
  """
  excess = scores.lengths[..., 0] - scores.lengths[..., 1]
  z = beta * scoring.margin(scores, link) + alpha * excess
  return -jax.nn.log_sigmoid(z)


def dpop(scores, *, beta=0.1, penalty=50.0):
  """DPO-positive: a chosen response likelier under the reference costs.

  Equation: -log sigmoid(beta (h - penalty max(0, -rho_w)))
  Source: Pal et al. 2024, arXiv:2402.13228; penalty is its lambda, which stands
    inside the sigmoid
  Sign: falls as h grows, and as rho_w rises to 0
  Tokens: sum
  Defaults: beta=0.1, penalty=50.0

  >>> scoring.rounded(dpop(scoring.example()))
  [0.621, 5.156, 0.127]
  """
  rho = scoring.log_ratio(scores)
  fall = jax.nn.relu(-rho[..., 0])
  return -jax.nn.log_sigmoid(
    beta * (rho[..., 0] - rho[..., 1] - penalty * fall)
  )


def rpo(scores, *, beta=0.01, eta=0.005, nll='sum'):
  """DPO plus the negative log-likelihood of the chosen response.

  Equation: -log sigmoid(beta h) + eta NLL(yw); NLL is the sum over yw's tokens
    or, with nll='mean', their mean
  Source: Liu et al. 2024, arXiv:2405.16436. Iterative RPO (Pang et al. 2024,
    arXiv:2404.19733, eq. 1) is beta=0.1, eta=1, nll='mean'; Llama 3
    (arXiv:2407.21783) has eta=0.2
  Sign: falls as h grows, and as log pi(yw) grows
  Tokens: sum
  Defaults: beta=0.01, eta=0.005, nll='sum'
  Elsewhere: TRL's `rpo_alpha` (gone in 1.0) is eta with nll='mean'; not
    Nemotron's reward-aware RPO

  >>> scoring.rounded(rpo(scoring.example(), beta=0.1, eta=1.0, nll='mean'))
  [2.621, 2.771, 2.627]
  """
  return dpo(scores, beta=beta) + eta * chosen_nll(scores, nll)


def chosen_nll(scores, how):
  """-log pi(yw), [...]: the 'sum' over its tokens or their 'mean'.

  For losses whose reduction is the sum.
  """
  if how not in ('sum', 'mean'):
    raise ValueError(f"nll is {how!r}; use 'sum' or 'mean'")
  total = -scores.policy[..., 0]
  return total / scores.lengths[..., 0] if how == 'mean' else total


def tdpo1(scores, *, beta=0.1):
  """Token-level DPO, first form: the margin less the sequential KLs' own.

  Equation: -log sigmoid(beta (h - (D_l - D_w))), D the sum over a response's
    tokens of KL(pi_ref || pi) over the whole vocabulary
  Source: Zeng et al. 2024, arXiv:2404.11999
  Sign: falls as h grows
  Tokens: sum; needs the reference's distribution, so no cached one
  Defaults: beta=0.1

  >>> kls = jnp.array([[1.0, 2.0], [1.0, 1.0], [4.0, 3.0]])
  >>> scoring.rounded(tdpo1(scoring.example()._replace(kls=kls)))
  [0.668, 0.771, 0.116]
  """
  extra = scores.kls[..., 1] - scores.kls[..., 0]
  return -jax.nn.log_sigmoid(beta * (scoring.margin(scores) - extra))


def tdpo2(scores, *, beta=0.1, alpha=0.5):
  """Token-level DPO, second form: no gradient through the chosen one's KL.

  Equation: -log sigmoid(beta (h - alpha (D_l - stop_gradient(D_w)))), D as in
    `tdpo1`
  Source: Zeng et al. 2024, arXiv:2404.11999
  Sign: falls as h grows; alpha = 0 is DPO
  Tokens: sum; needs the reference's distribution, so no cached one
  Defaults: beta=0.1, alpha=0.5

  >>> kls = jnp.array([[1.0, 2.0], [1.0, 1.0], [4.0, 3.0]])
  >>> scoring.rounded(tdpo2(scoring.example()._replace(kls=kls)))
  [0.644, 0.771, 0.121]
  """
  extra = scores.kls[..., 1] - jax.lax.stop_gradient(scores.kls[..., 0])
  return -jax.nn.log_sigmoid(beta * (scoring.margin(scores) - alpha * extra))


# --- K responses ---


def target_distribution(scores, reward_temperature):
  """The distribution over the K responses that the data asks for, [..., K].

  Temperature 0: p for the first response, the rest for the others alike.
  Above 0: softmax(rewards / temperature).
  """
  K = scores.policy.shape[-1]
  if reward_temperature > 0.0:
    if scores.rewards is None:
      raise ValueError(
        f'reward_temperature is {reward_temperature} but the data has no'
        ' rewards; set it to 0 for one-hot targets'
      )
    return jax.nn.softmax(scores.rewards / reward_temperature, axis=-1)
  first = jnp.broadcast_to(scores.p, scores.policy.shape[:-1])[..., None]
  return jnp.where(jnp.arange(K) == 0, first, (1.0 - first) / (K - 1))


def plackett_luce(scores, *, beta=0.1, top=0, link=choices.reverse_kl):
  """DPO on rankings of K responses, best first; K = 2 is DPO, bit for bit.

  Equation: -sum_{k<K} log(exp(r_k) / sum_{j>=k} exp(r_j)), r = beta rho
  Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 20 (appendix A.3)
  Sign: falls as better responses outgrow worse ones
  Tokens: sum; sums the ranking's first `top` factors, all K - 1 with 0
  Defaults: beta=0.1, top=0, link=reverse_kl

  >>> three = scoring.Scores(jnp.array([[1.0, 0.2, -0.5]]))
  >>> scoring.rounded(plackett_luce(three, beta=1.0))
  [0.917]
  """
  score = scoring.log_ratio(scores, link)
  K = score.shape[-1]
  factors = top or K - 1
  if not 0 <= top < K:
    raise ValueError(f'top is {top}; {K} responses have factors 1 to {K - 1}')
  total = 0.0
  for k in range(factors):
    # Differences first, as in DPO, and no sum over one: K = 2 has DPO's bits.
    lead = beta * (score[..., k : k + 1] - score[..., k + 1 :])
    if k == K - 2:
      total -= jax.nn.log_sigmoid(lead[..., 0])
    else:
      rest = jax.nn.logsumexp(-lead, axis=-1)
      total -= jax.nn.log_sigmoid(-rest)
  return total


def infonca(scores, *, beta=0.01, reward_temperature=0.0):
  """InfoNCA: cross-entropy of a distribution over the K responses.

  Equation: -sum_k t_k log softmax(beta rho)_k, t = softmax(rewards /
    reward_temperature), or one-hot (p of a pair) at temperature 0
  Source: Chen et al. 2024, arXiv:2402.05369, section 4
  Sign: falls as responses with large t outgrow the others; a pair with p = 1
    is DPO
  Tokens: sum
  Defaults: beta=0.01, reward_temperature=0.0

  >>> scoring.rounded(infonca(scoring.example(), beta=0.1))
  [0.621, 0.771, 0.127]
  """
  target = target_distribution(scores, reward_temperature)
  logits = beta * scoring.log_ratio(scores)
  return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def exo(
  scores,
  *,
  beta=0.1,
  label_smoothing=1e-3,
  reward_temperature=0.0,
  link=choices.reverse_kl,
):
  """Efficient exact optimization: reverse KL to the target; DPO's is forward.

  Equation: sum_k q_k (log q_k - log t_k), q = softmax(beta rho), t = (1-e, e)
    of a pair, or softmax(rewards / reward_temperature); targets are smoothed
    by e = label_smoothing
  Source: Ji et al. 2024, arXiv:2402.00856, eq. 16
  Sign: least where q = t
  Tokens: sum
  Defaults: beta=0.1, label_smoothing=0.001, reward_temperature=0.0,
    link=reverse_kl
  Elsewhere: `exo_pair` in TRL

  >>> scoring.rounded(exo(scoring.example()))
  [2.506, 3.023, 0.459]
  """
  e, K = label_smoothing, scores.policy.shape[-1]
  if not 0.0 <= e < 1.0 or (e == 0.0 and reward_temperature == 0.0):
    raise ValueError(
      f'exo: label_smoothing {e} must lie in (0, 1); 0 only with a'
      ' reward_temperature'
    )
  target = target_distribution(scores, reward_temperature)
  target = (1.0 - e) * target + e * (1.0 - target) / (K - 1)
  score = scoring.log_ratio(scores, link)
  # Differences before beta: a fused beta * score - max would round apart.
  lead = score - jax.lax.stop_gradient(jnp.max(score, -1, keepdims=True))
  log_q = jax.nn.log_softmax(beta * lead, axis=-1)
  log_target = jnp.log(jnp.maximum(target, 1e-30))
  return jnp.sum(jnp.exp(log_q) * (log_q - log_target), axis=-1)


# --- The paper's own signature ---


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
  scores = scoring.Scores(pi_logps[pairs], ref_logps[pairs])
  everything = scoring.Scores(pi_logps, ref_logps)
  return (
    dpo(scores, beta=beta),
    scoring.implicit_rewards(everything, beta=beta),
  )
