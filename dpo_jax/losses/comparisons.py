"""Losses of a reward model's scores: what its head gives at the last token.

Here r(x, y) stands in the place of log pi(y|x), and there is no reference. Only
differences within a prompt are learned, but for what `centering` does.
"""

import jax.numpy as jnp
import numpy as np

from dpo_jax.losses import margins
from dpo_jax.losses import scoring


def bradley_terry(
  scores, *, margin_scale=0.0, centering=0.0, label_smoothing=0.0
):
  """Reward modelling: the better of two responses has the higher score.

  With K responses, best first, the mean over all K(K-1)/2 pairs of a prompt, as
  in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, eq. 1). The margin is
  Llama 2's, of the data's rewards; Llama 3 has none.

  Equation: -(1-e) log sigmoid(z) - e log sigmoid(-z) + centering (r_w + r_l)^2,
    z = r_w - r_l - margin_scale (reward_w - reward_l), e = label_smoothing
  Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 2; margin: Touvron et al.
    2023, arXiv:2307.09288, eq. 2; centering: Eisenstein et al. 2023,
    arXiv:2312.09244, for which TRL recommends 0.01
  Sign: falls as r_w - r_l grows
  Tokens: last, where r is read
  Defaults: margin_scale=0.0, centering=0.0, label_smoothing=0.0
  Elsewhere: TRL's `RewardTrainer`; centering is its
    `center_rewards_coefficient`

  >>> r = scoring.Scores(jnp.array([[1.0, -0.5], [0.2, 0.6]]))
  >>> scoring.rounded(bradley_terry(r, centering=0.01))
  [0.204, 0.919]
  """
  score = scores.policy
  better, worse = np.triu_indices(score.shape[-1], 1)
  z = score[..., better] - score[..., worse]
  if margin_scale:
    gap = scores.rewards[..., better] - scores.rewards[..., worse]
    z -= margin_scale * gap
  losses = scoring.soft_logistic(z, 1.0 - label_smoothing)
  return jnp.mean(losses, -1) + _center(scores, centering)


def reward_plackett_luce(scores, *, top=0, centering=0.0):
  """Reward modelling on rankings of K responses; K = 2 is `bradley_terry`.

  Equation: -sum_{k<K} log(exp(r_k) / sum_{j>=k} exp(r_j)) + centering times the
    mean of (r_i + r_j)^2 over all pairs
  Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 18 (appendix A.3);
    centering as in `bradley_terry`
  Sign: falls as better responses outgrow worse ones
  Tokens: last, where r is read
  Defaults: top=0, centering=0.0

  >>> three = scoring.Scores(jnp.array([[1.0, 0.2, -0.5]]))
  >>> scoring.rounded(reward_plackett_luce(three))
  [0.917]
  """
  alone = scores._replace(ref=0.0)
  losses = margins.plackett_luce(alone, beta=1.0, top=top)
  return losses + _center(scores, centering)


def _center(scores, centering):
  """Pulls scores towards 0, which no difference does."""
  score = scores.policy
  better, worse = np.triu_indices(score.shape[-1], 1)
  total = score[..., better] + score[..., worse]
  return centering * jnp.mean(total**2, -1)
