"""Losses of the policy's own likelihood: no reference.

See `scoring` for the conventions; here log pi stands for the reduced
log-probability.
"""

import jax
import jax.numpy as jnp

from dpo_jax.losses import margins
from dpo_jax.losses import scoring


def sft(scores):
  """Supervised fine-tuning; on the chosen side of pairs, Preferred-FT.

  Equation: -log pi(y|x) of the first response
  Source: Rafailov et al. 2023, arXiv:2305.18290, section 6
  Sign: falls as log pi grows
  Tokens: sum, the DPO authors' form; 'mean' by the response's own length;
    'batch_mean' by all tokens of the batch
  Defaults: none
  Elsewhere: TRL's `sft` is 'batch_mean' over a micro-batch

  >>> scoring.rounded(sft(scoring.example()))
  [12.0, 20.0, 30.0]
  """
  return -scores.policy[..., 0]


def unlikelihood(scores, *, alpha=0.5):
  """The DPO paper's baseline: chosen up, rejected down, linearly.

  Has no minimum: it diverges by design.

  Equation: -log pi(yw) + alpha log pi(yl)
  Source: Rafailov et al. 2023, arXiv:2305.18290, appendix C.3
  Sign: log pi(yw) rises, log pi(yl) falls without bound
  Tokens: sum
  Defaults: alpha=0.5
  Elsewhere: Welleck's token form is `token_unlikelihood`

  >>> scoring.rounded(unlikelihood(scoring.example()))
  [4.5, 11.0, 7.5]
  """
  return -scores.policy[..., 0] + alpha * scores.policy[..., 1]


def token_unlikelihood(scores, *, alpha=1.0):
  """Unlikelihood of every token of the rejected response; bounded below.

  Equation: -log pi(yw) - alpha sum_t log(1 - pi(yl_t))
  Source: Welleck et al. 2019, arXiv:1908.04319, with the rejected response as
    negative candidates
  Sign: log pi(yw) rises, the probability of yl's tokens falls
  Tokens: sum
  Defaults: alpha=1.0

  >>> complements = jnp.array([[-3.0, -2.0], [-1.0, -2.0], [-4.0, -0.5]])
  >>> scores = scoring.example()._replace(complements=complements)
  >>> scoring.rounded(token_unlikelihood(scores))
  [14.0, 22.0, 30.5]
  """
  return -scores.policy[..., 0] - alpha * scores.complements[..., 1]


def slic(scores, *, delta=1.0, nll_weight=0.1):
  """SLiC-HF: hinge loss of the log-probabilities, and a pull to the target.

  Equation: max(0, delta - log pi(yw) + log pi(yl)) + nll_weight (-log pi(yw))
  Source: Zhao et al. 2023, arXiv:2305.10425, section 2; its target is here
    yw, and delta and nll_weight (its lambda) are those of HALOs
  Sign: falls until log pi(yw) leads by delta
  Tokens: sum
  Defaults: delta=1.0, nll_weight=0.1
  Elsewhere: what TRL calls `hinge` after SLiC has a reference: `hinge`

  >>> scoring.rounded(slic(scoring.example(), nll_weight=0.0))
  [0.0, 3.0, 0.0]
  """
  lead = scores.policy[..., 0] - scores.policy[..., 1]
  return jax.nn.relu(delta - lead) - nll_weight * scores.policy[..., 0]


def simpo(scores, *, beta=2.0, gamma=1.0):
  """Simple preference optimization: mean log-probs with a margin to reach.

  Equation: -log sigmoid(beta (log pi(yw)/|yw| - log pi(yl)/|yl|) - gamma)
  Source: Meng et al. 2024, arXiv:2405.14734, eq. 6; tuned there as
    gamma/beta, 0.3 to 0.8
  Sign: falls as the chosen response's mean log-probability grows
  Tokens: mean
  Defaults: beta=2.0, gamma=1.0
  Elsewhere: `simpo` of TRL's CPO trainer with cpo_alpha=0

  >>> scoring.rounded(simpo(scoring.example('mean')))
  [1.502, 1.313, 1.701]
  """
  lead = scores.policy[..., 0] - scores.policy[..., 1]
  return -jax.nn.log_sigmoid(beta * lead - gamma)


def orpo(scores, *, alpha=0.1):
  """Odds ratio preference optimization: SFT and the odds of the two.

  Equation: NLL(yw) - alpha log sigmoid(log odds(yw) - log odds(yl)), odds =
    P/(1-P), P = exp(log pi(y)/|y|), NLL the mean over yw's tokens
  Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; alpha is its
    lambda
  Sign: log pi(yw) rises, the odds of yl fall
  Tokens: mean
  Defaults: alpha=0.1
  Elsewhere: TRL's `beta` is alpha; its NLL takes in the prompt

  >>> scoring.rounded(orpo(scoring.example('mean')))
  [2.077, 2.069, 2.584]
  """
  odds = scores.policy - scoring.log_complement(scores.policy)
  return -scores.policy[..., 0] - alpha * jax.nn.log_sigmoid(
    odds[..., 0] - odds[..., 1]
  )


def cpo(scores, *, beta=0.1, alpha=1.0, nll='mean'):
  """Contrastive preference optimization: DPO with a uniform reference.

  Equation: -log sigmoid(beta (log pi(yw) - log pi(yl))) + alpha NLL(yw), NLL
    the mean over yw's tokens or their sum
  Source: Xu et al. 2024, arXiv:2401.08417, eq. 5
  Sign: log pi(yw) rises, log pi(yl) falls
  Tokens: sum
  Defaults: beta=0.1, alpha=1.0, nll='mean'
  Elsewhere: alpha is `cpo_alpha` in TRL, whose NLL, like the authors', is a
    mean over all tokens of a micro-batch: alpha=0 plus `sft` by 'batch_mean'

  >>> scoring.rounded(cpo(scoring.example(), alpha=0.0))
  [0.554, 0.798, 0.201]
  """
  lead = scores.policy[..., 0] - scores.policy[..., 1]
  preference = -jax.nn.log_sigmoid(beta * lead)
  return preference + alpha * margins.chosen_nll(scores, nll)


def likelihood_penalty(scores, *, threshold=0.5):
  """Constraint: responses with a cost above the threshold lose likelihood.

  The cost of a text does not depend on the parameters, so a term that is the
  cost itself would change nothing; here it weighs the likelihood, which has
  the gradient. A term to add to a preference loss.

  Equation: mean over responses of max(0, cost - threshold) exp(log pi(y)/|y|)
  Source: a differentiable reading of constitutional constraints on DPO
  Sign: log pi falls where the cost is above the threshold
  Tokens: mean
  Defaults: threshold=0.5

  >>> costs = jnp.array([[0.0, 1.0], [0.7, 0.2], [0.5, 0.9]])
  >>> scores = scoring.example('mean')._replace(costs=costs)
  >>> scoring.rounded(likelihood_penalty(scores))
  [0.038, 0.014, 0.021]
  """
  excess = jax.nn.relu(scores.costs - threshold)
  likelihood = jnp.exp(jnp.minimum(scores.policy, 0.0))
  return jnp.mean(excess * likelihood, axis=-1)
