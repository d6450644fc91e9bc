"""Dual ascent against the constrained optimum of a bandit, and relabelling."""

import itertools
import math

import numpy as np
import pytest

from dpo_jax import constraints
from dpo_jax import online

# Three answers: the best is the costliest.
REF = np.array([0.5, 0.3, 0.2])
REWARDS = np.array([1.0, 0.6, 0.0])
COSTS = np.array([0.9, 0.2, 0.0])
BETA = 0.4


def tilted(multiplier, ref=REF):
  """The optimum of E[r - multiplier cost] - beta KL: DPO, eq. 4."""
  scores = constraints.effective_rewards(REWARDS, COSTS, multiplier)
  policy = ref * np.exp(scores / BETA)
  return policy / policy.sum()


def climb(*, budget, lr, multiplier=0.0, rounds, start='first'):
  """Dual ascent with exact policies: (multiplier, mean cost) of each round."""
  out, ref = [], REF
  for _ in range(rounds):
    policy = tilted(multiplier, ref)
    out.append((multiplier, policy @ COSTS))
    multiplier = constraints.next_multiplier(
      multiplier, out[-1][1], budget=budget, lr=lr
    )
    if start == 'last':
      ref = policy
  return out


def value(policy):
  """Reward less beta KL."""
  return policy @ REWARDS - BETA * np.sum(policy * np.log(policy / REF))


@pytest.mark.parametrize('budget', [0.1, 0.3, 0.5])
def test_dual_ascent_holds_the_budget_where_it_binds(budget):
  assert tilted(0.0) @ COSTS > budget
  rounds = climb(budget=budget, lr=2.0, rounds=300)
  assert abs(rounds[30][1] - budget) < 0.1 * budget
  multiplier, mean_cost = rounds[-1]
  np.testing.assert_allclose(mean_cost, budget, rtol=1e-6)
  assert multiplier > 0.1
  # No policy on a grid keeps the budget and is better.
  best = value(tilted(multiplier))
  steps = np.linspace(0.001, 0.998, 250)
  for a, b in itertools.product(steps, steps):
    policy = np.array([a, b, 1.0 - a - b])
    if policy[2] > 0 and policy @ COSTS <= budget:
      assert value(policy) <= best + 1e-6


@pytest.mark.parametrize('multiplier', [0.0, 0.7, 3.0])
def test_the_multiplier_vanishes_where_the_budget_is_kept_anyway(multiplier):
  assert tilted(0.0) @ COSTS < 0.8
  rounds = climb(budget=0.8, lr=2.0, multiplier=multiplier, rounds=40)
  assert rounds[-1][0] == 0.0  # not nearly: the optimum without a constraint
  assert [m for m, _ in rounds] == sorted((m for m, _ in rounds), reverse=True)


def test_rounds_that_go_on_from_the_last_policy_swing_about_the_budget():
  """Why configs/constrained.py starts every round from the first policy."""
  fixed = climb(budget=0.3, lr=2.0, rounds=60)
  moving = climb(budget=0.3, lr=2.0, rounds=60, start='last')
  late = [[cost for _, cost in rounds[30:]] for rounds in (fixed, moving)]
  assert max(late[0]) - min(late[0]) < 1e-4
  assert max(late[1]) > 0.3 * 1.1 and min(late[1]) < 0.3 * 0.9


def test_one_step_moves_by_lr_times_the_excess_and_stops_at_zero():
  step = constraints.next_multiplier
  assert step(0.5, 0.4, budget=0.1, lr=2.0) == 0.5 + 2.0 * (0.4 - 0.1)
  assert step(0.5, 0.1, budget=0.1, lr=2.0) == 0.5
  assert step(0.5, 0.0, budget=0.3, lr=2.0) == 0.0


@pytest.mark.parametrize(
  'multiplier, chosen',
  # Answer a has reward 1 and cost 0.75, b 0.5 and 0.25: equal at multiplier 1.
  [(0.0, 'a'), (0.999, 'a'), (1.0, None), (1.001, 'b'), (9.0, 'b')],
)
def test_a_pair_turns_exactly_where_the_cost_outweighs(multiplier, chosen):
  scores = constraints.effective_rewards(
    np.array([1.0, 0.5]), np.array([0.75, 0.25]), multiplier
  )
  pairs = online.best_and_worst(
    ['p'],
    ['a', 'b'],
    np.zeros(2, bool),
    scores,
    samples_per_prompt=2,
    pairs_per_prompt=1,
  )
  assert [pair['chosen'] for pair in pairs] == ([chosen] if chosen else [])


@pytest.mark.parametrize(
  'change, message',
  [
    ({'budget': -0.1}, r'budget is -0.1; .* within \[0, 1\)'),
    ({'budget': 1.0}, r'budget is 1.0; .* within \[0, 1\)'),
    ({'budget': math.nan}, 'budget is nan'),
    ({'lr': 0.0}, 'lr is 0.0; .* above 0'),
    ({'lr': math.inf}, 'lr is inf'),
    ({'multiplier': -1.0}, 'multiplier is -1.0; .* 0 or more'),
  ],
)
def test_numbers_without_a_meaning_are_refused(change, message):
  good = {'budget': 0.0, 'lr': 1.0, 'multiplier': 0.0}
  constraints.check(**good)
  with pytest.raises(ValueError, match=message):
    constraints.check(**(good | change))
