"""The choices that are orthogonal to the loss: reduction, link, weighting.

Each is a small table of pure functions. In a config a choice is a name, with
its number behind a colon where it takes one: 'sum', 'ld:0.5', 'alpha:0.3'.
"""

import functools
import inspect

import jax
import jax.numpy as jnp

from dpo_jax import names
from dpo_jax.losses import scoring

# --- Reductions: the weight of each token in its response's score ---
#
# Arguments broadcast: index (of the token in its response, from 0), length (of
# its response), shortest (response of its group), mean_length (over the batch,
# of the responses in the same place).


def sum_tokens(index, length, shortest, mean_length):
  """The log-probability of the response: weight 1. The DPO paper's."""
  del length, shortest, mean_length
  return jnp.ones_like(index, jnp.float32)


def mean_tokens(index, length, shortest, mean_length):
  """Mean over the tokens of the response: weight 1/|y|."""
  del shortest, mean_length
  return jnp.ones_like(index, jnp.float32) / length


def batch_mean_tokens(index, length, shortest, mean_length):
  """Mean over the tokens of the whole batch, up to the batch's mean.

  Weight 1/(mean |y| over the global batch): the loss's mean over the batch
  then is a mean over tokens, in which long responses count more. What TRL's
  `sft` term does (there over a micro-batch of one device).
  """
  del length, shortest
  return jnp.ones_like(index, jnp.float32) / mean_length


def ld(index, length, shortest, mean_length, *, alpha):
  """LD-DPO: tokens beyond the shorter response's length count alpha.

  Weight 1 for t <= min(|yw|, |yl|), alpha after it, for policy and reference;
  alpha 1 is 'sum'. Liu et al. 2024, arXiv:2409.06411.
  """
  del length, mean_length
  return jnp.where(index < shortest, 1.0, alpha)


def ld_mean(index, length, shortest, mean_length, *, alpha):
  """`ld` divided by the response's full length; alpha 1 is 'mean'."""
  return ld(index, length, shortest, mean_length, alpha=alpha) / length


def last_token(index, length, shortest, mean_length):
  """The number at the last token alone: the score of a reward model's head."""
  del shortest, mean_length
  return jnp.where(index == length - 1, 1.0, 0.0)


REDUCTIONS = {
  'sum': sum_tokens,
  'mean': mean_tokens,
  'batch_mean': batch_mean_tokens,
  'ld': ld,
  'ld_mean': ld_mean,
  'last': last_token,
}


# Those that compare the lengths of a pair, and those that divide by a length.
OF_PAIRS = ('ld', 'ld_mean')
PER_TOKEN = ('mean', 'batch_mean', 'ld_mean')


# --- Links: from log-ratio to score, one per f-divergence ---
#
# With u = pi/pi_ref = exp(rho), the score is f'(u) up to a constant; margins
# are differences of scores. f-DPO, Wang et al. 2023, arXiv:2309.16240.


def reverse_kl(rho):
  """f'(u) = log u: the score is rho, as in DPO."""
  return rho


def forward_kl(rho):
  """f'(u) = 1 - 1/u."""
  return -scoring.expm1(-rho)


def jensen_shannon(rho):
  """f'(u) = log(2u / (1 + u))."""
  return jnp.log(2.0) + jax.nn.log_sigmoid(rho)


def alpha_divergence(rho, *, alpha):
  """f'(u) = (1 - u^-alpha) / alpha, 0 < alpha <= 1; alpha 1 is forward KL.

  alpha -> 0 is reverse KL. TRL's `f_alpha_divergence_coef` is 1 - alpha.
  """
  if not 0.0 < alpha <= 1.0:
    raise ValueError(
      f'link alpha:{alpha}: alpha lies in (0, 1]; its limit 0 is reverse_kl'
    )
  return -scoring.expm1(-alpha * rho) / alpha


LINKS = {
  'reverse_kl': reverse_kl,
  'forward_kl': forward_kl,
  'js': jensen_shannon,
  'alpha': alpha_divergence,
}


# --- Weightings: the factor of a group's loss ---
#
# Argument: confidences [..., K], the mean over tokens of
# log pi(y_t) - log sum_v pi(v)^2. No gradient passes through a weight. The
# data's own `weight` of a group always applies, besides.


def equal(confidences):
  """1 for every group."""
  del confidences
  return 1.0


def wpo(confidences):
  """Product over the responses of exp(confidence). WPO, Zhou et al. 2024.

  Simulates on-policy data: near 0 for responses the policy would not write, 1
  under a uniform policy; above 1 where tokens are likelier than the policy's
  own average token. arXiv:2406.11827, eq. 2; as in TRL 1.16.
  """
  return jnp.exp(jnp.sum(confidences, axis=-1))


def wpo_clamped(confidences):
  """`wpo`, but at most 1: the authors' code, and TRL up to 0.24."""
  return jnp.exp(jnp.minimum(jnp.sum(confidences, axis=-1), 0.0))


WEIGHTINGS = {'none': equal, 'wpo': wpo, 'wpo_clamped': wpo_clamped}


# Whether the data's p, the probability that chosen is really preferred, mixes
# the losses of a pair in both orders: p f(chosen, rejected) + (1-p) f(rejected,
# chosen).
LABELS = {'hard': False, 'soft': True}


def keywords(function):
  """Returns the keyword-only parameters of a function, its options."""
  parameters = inspect.signature(function).parameters.values()
  return [p for p in parameters if p.kind is p.KEYWORD_ONLY]


def choose(table, kind, text):
  """Returns the function that 'name' or 'name:number' stands for."""
  name, colon, number = str(text).partition(':')
  function = names.look_up(table, kind, name)
  alone = keywords(function)
  if not alone:
    if colon:
      raise ValueError(f'{kind} {name!r} takes no number; write {name!r}')
    return function
  try:
    value = float(number)
  except ValueError:
    raise ValueError(
      f'{kind} {name!r} takes its {alone[0].name} as a number behind a colon,'
      f" such as '{name}:0.5'; got {text!r}"
    ) from None
  if not 0.0 <= value <= 1.0:
    raise ValueError(f'{kind} {text!r}: {alone[0].name} must lie in [0, 1]')
  return functools.partial(function, **{alone[0].name: value})
