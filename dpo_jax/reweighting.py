"""Policies that are another's samples with new weights.

Two need no training: best-of-N (DPO, appendix D.1, arXiv:2305.18290), and the
tilted policy of DPO's equation 4, pi(y|x) ~ pi_ref(y|x) exp(r(x, y) / beta),
which no policy of the same KL has more reward than. Weights are those of S
samples of the reference for each of N prompts: they sum to 1 over S.

Dimension key: N prompts, S samples of each.
"""

import math

import numpy as np
from scipy import special


def _ranks(scores_NS):
  """Returns how many samples of a prompt each is better than, from 0.

  Of equals the first is the best.
  """
  S = scores_NS.shape[1]
  order_NS = np.argsort(-scores_NS, axis=1, kind='stable')
  ranks_NS = np.empty_like(order_NS)
  np.put_along_axis(
    ranks_NS, order_NS, np.broadcast_to(np.arange(S)[::-1], order_NS.shape), 1
  )
  return ranks_NS


def best_of(n, scores_NS):
  """Returns the weights [N, S] of the best of `n` samples, by their scores.

  A sample's weight is the probability that it is the best of n different ones
  of the S: C(rank, n - 1) / C(S, n), so that means under the weights are
  unbiased and use all samples.
  """
  scores_NS = np.asarray(scores_NS, float)
  S = scores_NS.shape[1]
  if not 1 <= n <= S:
    raise ValueError(
      f'the best of {n} of {S} samples; use 1 to {S}, or more samples'
    )
  ranks_NS = _ranks(scores_NS)

  def log_choose(a, b):
    return (
      special.gammaln(a + 1)
      - special.gammaln(b + 1)
      - special.gammaln(a - b + 1)
    )

  some_NS = ranks_NS >= n - 1
  logs_NS = log_choose(np.where(some_NS, ranks_NS, n - 1), n - 1)
  return np.where(some_NS, np.exp(logs_NS - log_choose(S, n)), 0.0)


def best_of_kl(n, scores_NS):
  """Returns the KL of best-of-n to the reference, estimated, in nats: [N].

  Of the distribution that has the S samples, equals as one: the best of n draws
  of it is among the k worst with probability (k / S)^n. Never more than
  `best_of_kl_bound`.
  """
  out = []
  for scores_S in np.asarray(scores_NS, float):
    _, counts = np.unique(scores_S, return_counts=True)
    reached = np.concatenate([[0.0], np.cumsum(counts)]) / len(scores_S)
    share, base = np.diff(reached**n), np.diff(reached)
    out.append(np.sum(special.xlogy(share, share / base)))
  return np.array(out)


def best_of_kl_bound(n):
  """Returns log n - (n - 1) / n, the KL where no two scores are equal."""
  return math.log(n) - (n - 1) / n


def tilted(rewards_NS, beta):
  """Returns the weights [N, S] of the tilted policy: softmax(r / beta).

  Self-normalized importance weights: a few samples have them all where beta is
  small, so trust no KL near log S.
  """
  return special.softmax(np.asarray(rewards_NS, float) / beta, axis=1)


def kl(weights_NS):
  """Returns the KL of weights to equal ones, in nats: [N], at most log S."""
  S = weights_NS.shape[1]
  return special.xlogy(weights_NS, weights_NS * S).sum(1)
