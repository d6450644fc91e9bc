"""What a loss may look at, and the few quantities that all losses share.

Conventions (all losses are minimised):
  log pi(y|x)  sum over the tokens of y, EOS included, prompt excluded, unless
               another reduction was chosen (`choices.REDUCTIONS`)
  rho          log pi(y|x) - log pi_ref(y|x)
  h            rho(chosen) - rho(rejected)
A loss maps `Scores` with leading dims [...] to losses [...]: no mean over the
batch, no config, no mesh.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Scores(NamedTuple):
  """Scores of K responses to each prompt; float32, leading dims [...].

  Pairs keep chosen at [..., 0] and rejected at [..., 1], rankings the best
  first, KTO's single responses their mismatched partner at [..., 1]. Fields
  that are None are not known; a loss that needs one says so in the table.
  """

  policy: Any  # [..., K] log pi, reduced
  ref: Any = 0.0  # [..., K] log pi_ref, reduced alike; 0 without a reference
  lengths: Any = 1.0  # [..., K] scored tokens, EOS included
  # [...] label in [0, 1]: probability that chosen is really preferred, or, of
  # a single response, that it is desirable
  p: Any = 1.0
  mask: Any = True  # [...] False: padding, which no statistic may count
  rewards: Any = None  # [..., K] given by somebody
  costs: Any = None  # [..., K] constraint scores in [0, 1]
  kls: Any = None  # [..., K] sum over tokens of KL(pi_ref || pi)
  complements: Any = None  # [..., K] sum over tokens of log(1 - pi(token))
  confidences: Any = None  # [..., K] see `choices.wpo`
  memory: Any = None  # dict of scalars that outlive a batch, see the table


# The fields with one number a response, [..., K].
OF_RESPONSES = (
  'policy',
  'ref',
  'lengths',
  'rewards',
  'costs',
  'kls',
  'complements',
  'confidences',
)


def log_ratio(scores, link=None):
  """rho, or link(rho), [..., K]."""
  rho = scores.policy - scores.ref
  return rho if link is None else link(rho)


def margin(scores, link=None):
  """h of chosen over rejected, [...]; with a link, the difference of scores."""
  rho = log_ratio(scores, link)
  return rho[..., 0] - rho[..., 1]


def implicit_rewards(scores, *, beta):
  """beta * rho, [..., K]: the reward DPO's policy stands for (eq. 5)."""
  return jax.lax.stop_gradient(beta * (scores.policy - scores.ref))


def masked_mean(values, mask):
  """Mean over all real entries of the whole batch: a scalar."""
  mask = jnp.broadcast_to(mask, values.shape)
  count = jnp.maximum(jnp.sum(mask), 1)
  return jnp.sum(jnp.where(mask, values, 0.0)) / count


def log_complement(logp):
  """log(1 - exp(logp)) for logp < 0, without cancellation near 0 and -inf.

  Log-probabilities above -1e-6, which stand for certainty, count as -1e-6 and
  get no gradient.
  """
  logp = jnp.minimum(logp, -1e-6)
  near = logp > -0.6931472  # of two accurate forms, the one for this half
  return jnp.where(
    near,
    jnp.log(-jnp.expm1(jnp.where(near, logp, -1.0))),
    jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp))),
  )


def soft_logistic(z, p):
  """-p log sigmoid(z) - (1-p) log sigmoid(-z): cross-entropy with a label p."""
  return -(p * jax.nn.log_sigmoid(z) + (1.0 - p) * jax.nn.log_sigmoid(-z))


def take_responses(scores, index):
  """The same scores of each group's responses [..., index] alone."""
  return scores._replace(
    **{
      field: value[..., index]
      for field, value in scores._asdict().items()
      if field in OF_RESPONSES and value is not None and jnp.ndim(value)
    }
  )


def exp(x):
  """exp(x), continued by its tangent above 30.

  float32 ends at exp(88), and squares and products of this must not overflow.
  """
  low = jnp.minimum(x, 30.0)
  return jnp.exp(low) * (1.0 + (x - low))


def expm1(x):
  """exp(x) - 1, exact near 0; continued like `exp`."""
  low = jnp.minimum(x, 30.0)
  return jnp.expm1(low) + jnp.exp(low) * (x - low)


def example(reduction='sum'):
  """Returns three pairs by hand, which docstrings and tests evaluate.

  h is 1.5, -1.5 and 20 in sums of 6 and 8, 10 and 9, 12 and 20 tokens.
  """
  policy = np.array([[-12.0, -15.0], [-20.0, -18.0], [-30.0, -45.0]])
  ref = np.array([[-13.0, -14.5], [-19.0, -18.5], [-40.0, -35.0]])
  lengths = np.array([[6.0, 8.0], [10.0, 9.0], [12.0, 20.0]])
  per = {'sum': 1.0, 'mean': lengths}[reduction]
  return Scores(
    *(jnp.asarray(x, jnp.float32) for x in (policy / per, ref / per, lengths))
  )


def rounded(values):
  """Nested lists of numbers with three decimals, for examples in docstrings."""
  return np.round(np.asarray(values, np.float64), 3).tolist()
