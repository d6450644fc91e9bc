"""A budget for a cost: rewards that pay for it, and the price that holds it.

Reward as high as possible, E[r] - beta KL(pi || ref), subject to
E[cost] <= budget, has the Lagrangian

    E[r - multiplier cost] - beta KL(pi || ref) + multiplier budget

Preferences by r - multiplier * cost train its policy; E[cost] - budget of that
policy is the gradient of the dual, which the multiplier climbs. C-DPO, Liu et
al. 2024, arXiv:2403.02475, which calls the multiplier lambda.
"""

import math


def effective_rewards(rewards, costs, multiplier):
  """Returns r - multiplier * cost, by which responses are ranked."""
  return rewards - multiplier * costs


def next_multiplier(multiplier, mean_cost, *, budget, lr):
  """Returns max(0, multiplier + lr (mean_cost - budget)): dual ascent.

  Args:
    multiplier: that the policy was trained with.
    mean_cost: of the policy's samples.
    budget: the mean cost allowed.
    lr: step of the multiplier, in rewards per cost and excess.
  """
  return max(0.0, multiplier + lr * (mean_cost - budget))


def check(*, budget, lr, multiplier):
  """Refuses numbers that dual ascent makes no sense of."""
  if not 0.0 <= budget < 1.0:
    raise ValueError(
      f'constraint.budget is {budget}; costs lie in [0, 1], so set the mean'
      ' cost allowed within [0, 1), such as 0.05'
    )
  if not 0.0 < lr < math.inf:
    raise ValueError(
      f'constraint.lr is {lr}; the multiplier moves by lr times the excess, so'
      ' set it above 0, such as 1.0'
    )
  if not 0.0 <= multiplier < math.inf:
    raise ValueError(
      f'constraint.multiplier is {multiplier}; the first round prices the cost'
      ' with it, so set it to 0 or more'
    )
