"""Judges against numbers worked out by hand."""

import numpy as np
import pytest

from dpo_jax import judges
from dpo_jax import rewards

PROMPTS = ['p'] * 4
A = ['xxx', 'x', 'xx', 'xxxx']
B = ['x', 'xxx', 'xx', 'xx']


def test_the_higher_reward_wins_and_equals_tie():
  wins = judges.by_reward(rewards.length)(PROMPTS, A, B)
  assert wins.tolist() == [1.0, 0.0, 0.5, 1.0]


def test_a_judge_that_likes_the_first_place_says_nothing():
  result = judges.win_rate(
    lambda prompts, *_: np.ones(len(prompts)), PROMPTS, A, B
  )
  assert result['win_rate'] == 0.5
  assert result['consistent'] == 0.0
  assert result['wins'].tolist() == [0.5] * 4


def test_a_win_rate_counts_ties_one_half_and_has_its_error():
  result = judges.win_rate(judges.by_reward(rewards.length), PROMPTS, A, B)
  assert result['win_rate'] == pytest.approx(2.5 / 4)
  assert result['win_rate_se'] == pytest.approx(
    np.std([1, 0, 0.5, 1], ddof=1) / 2
  )
  assert result['consistent'] == 1.0
  # Swapping the sides swaps the answer.
  back = judges.win_rate(judges.by_reward(rewards.length), PROMPTS, B, A)
  assert back['win_rate'] == pytest.approx(1.5 / 4)


@pytest.mark.parametrize('share, count', [(0.8, 10), (0.0, 10), (0.5, 256)])
def test_wilson_bounds_are_as_far_away_as_the_normal_test_allows(share, count):
  # The bounds are the p of (share - p)^2 = z^2 p (1 - p) / count.
  for p in judges.wilson(share, count, z=2.0):
    assert (share - p) ** 2 == pytest.approx(4.0 * p * (1 - p) / count)
  low, high = judges.wilson(share, count)
  assert low < share < high or share == low == 0.0


def test_a_noisy_judge_turns_its_share_of_answers():
  many = 20_000
  judge = judges.noisy(judges.by_reward(rewards.length), rate=0.1, seed=0)
  wins = judge(['p'] * many, ['xx'] * many, ['x'] * many)
  assert np.mean(wins) == pytest.approx(0.9, abs=4 * (0.09 / many) ** 0.5)
  with pytest.raises(ValueError, match='rate is 2; use a share'):
    judges.noisy(judge, rate=2, seed=0)


@pytest.mark.parametrize(
  'answer, message',
  [
    ([0.5] * 3, r'shape \(3,\) for 4 questions; it must return \(4,\)'),
    ([0.5, np.nan, 0, 1], "said nan of question 1.*prompt: 'p'"),
    ([0.5, 0.5, 1.5, 1], 'said 1.5 of question 2'),
  ],
)
def test_a_judge_that_says_no_probability_is_refused(answer, message):
  with pytest.raises(ValueError, match=f'(?s){message}'):
    judges.win_rate(lambda *_: answer, PROMPTS, A, B)


def test_questions_have_two_answers():
  with pytest.raises(ValueError, match='4 prompts, 3 and 4 responses'):
    judges.win_rate(judges.by_reward(rewards.length), PROMPTS, A[:3], B)
