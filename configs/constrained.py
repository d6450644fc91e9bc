"""The quickstart with a budget for a cost: constrained DPO, arXiv:2403.02475.

    dpo-jax online --config=configs/constrained.py --workdir=runs/constrained

Completions are ranked by reward - multiplier * cost. After each round the
multiplier rises by lr * (mean cost of held-out samples - budget), but never
below 0; `round_N/constraint.json` has both. A round takes as long as the
quickstart. Argument `debug`: a tiny random model, seconds.
"""

from configs import common
from configs import quickstart


def get_config(arg=''):
  arg = common.parse(arg, debug=False)
  config = quickstart.get_config('debug' if arg['debug'] else '')
  config.rounds = 2 if arg['debug'] else 4
  with config.unlocked():
    config.constraint = dict(
      name='digits',  # a name of rewards.CONSTRAINTS: costs in [0, 1]
      budget=0.05,  # mean cost allowed, in [0, 1)
      lr=5.0,  # of the multiplier: reward per unit of cost, and of excess
      multiplier=0.0,  # of the first round: 0 ranks by the reward alone
      # Whose policy a round starts from and refers to: first (every round is
      # DPO of the model itself, under a better multiplier) | last (as without
      # a constraint; what rounds learn adds up, and the multiplier swings).
      start='first',
    )
  return config.lock()
