"""Rewards: known sentiments, clear errors, statistics by hand."""

import numpy as np
import pytest

from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax.data import openings


def test_vader_scores_prompt_and_response_together():
  prompts = ['The film is ', 'The film is ', 'The plot', 'The plot is not ']
  responses = ['wonderful!', 'horrible.', ' has three acts.', 'good']
  values = rewards.vader(prompts, responses)
  # 'good' alone is 0.4404; the negation stands in the prompt.
  np.testing.assert_allclose(values, [0.6114, -0.5423, 0.0, -0.3412])


def test_an_empty_response_scores_zero():
  assert rewards.vader(['The opening scene'], ['']).tolist() == [0.0]


def test_an_unknown_reward_names_the_nearest():
  assert rewards.get('vader') is rewards.vader
  with pytest.raises(ValueError, match="'vade'; did you mean 'vader'"):
    rewards.get('vade')


def test_any_function_is_a_reward_by_its_name():
  assert rewards.get('python:dpo_jax.rewards.length') is rewards.length


@pytest.mark.parametrize(
  'name, message',
  [
    ('python:no_such_module.x', "'no_such_module' cannot be imported .*PYTHON"),
    ('python:dpo_jax.rewards.lenght', "'lenght'; did you mean 'length'"),
    ('python:dpo_jax.rewards.REWARDS', 'not a function'),
    ('pyton:dpo_jax.rewards.length', "reward 'pyton'; did you mean 'python'"),
  ],
)
def test_a_function_that_is_none_says_so(name, message):
  with pytest.raises(ValueError, match=message):
    rewards.get(name)


@pytest.mark.parametrize(
  'response, value',
  [('call 911', 1.0), ('x\n2', 1.0), ('nine', 0.0), ('', 0.0), ('²', 0.0)],
)
def test_digits_break_the_digits_constraint(response, value):
  assert rewards.digits(['in 1984'], [response]).tolist() == [value]


def test_negative_is_vader_of_the_response_turned_around():
  prompts = ['It is horrible. '] * 3
  responses = ['wonderful!', 'horrible.', '']
  values = rewards.negative(prompts, responses)
  alone = rewards.vader([''] * 3, responses)
  np.testing.assert_allclose(values, (1.0 - alone) / 2.0)
  # VADER's compounds are 0.6114, -0.5423 and 0.
  np.testing.assert_allclose(values, [0.1943, 0.77115, 0.5])


def test_constraints_are_found_by_name():
  assert rewards.get_constraint('digits') is rewards.digits
  with pytest.raises(ValueError, match="constraint 'digit'; did you mean"):
    rewards.get_constraint('digit')


def test_constraint_scores_lie_in_the_unit_interval():
  texts = ['good', 'bad 7', 'x']
  for constraint in rewards.CONSTRAINTS.values():
    values = rewards.score_constraint(constraint, texts, texts)
    assert ((0.0 <= values) & (values <= 1.0)).all()
  edges = rewards.score_constraint(lambda *_: [0.0, 1.0, 0.5], texts, texts)
  assert edges.tolist() == [0.0, 1.0, 0.5]
  with pytest.raises(ValueError, match=r"text 1 is 1.1; scale[^?]*'bad 7'"):
    rewards.score_constraint(lambda *_: [0.0, 1.1, -1.0], texts, texts)


def test_score_returns_the_rewards():
  values = rewards.score(rewards.vader, ['It is '], ['good'])
  np.testing.assert_allclose(values, [0.4404])


PROMPTS, RESPONSES = ['p0', 'p1'], ['r0', 'r1']


def score(*values):
  return rewards.score(
    lambda *_: list(values), PROMPTS, RESPONSES, name='python:my.own'
  )


@pytest.mark.parametrize(
  'values, message',
  [
    ((0.0, float('nan')), 'of text 1 is nan; make'),
    ((0.0, float('-inf')), 'of text 1 is -inf; make'),
    ((3e38, 1e39), r'of text 1 is 1e\+39, too large for float32; make'),
    ((0.0, None), 'of text 1 is nan; make'),
    ((1.0,), r'returned shape \(1,\) for 2 .* return \(2,\), so'),
    ((1.0, 2.0, 3.0), r'returned shape \(3,\) for 2'),
  ],
)
def test_bad_rewards_are_named_and_show_their_text(values, message):
  text = r"\n  prompt:   'p1'\n  response: 'r1'$"
  with pytest.raises(
    ValueError, match=rf"^the reward 'python:my.own' {message}[^?]*{text}"
  ):
    score(*values)


def test_a_reward_of_another_shape_shows_a_text():
  with pytest.raises(ValueError, match=r"shape \(2, 1\) for 2 [^?]*'p0'"):
    score([1.0], [2.0])
  with pytest.raises(ValueError, match=r"shape \(\) for 2 [^?]*'p0'"):
    rewards.score(lambda *_: 1.0, PROMPTS, RESPONSES)


@pytest.mark.parametrize(
  'values',
  [
    ('good', 'bad'),
    ('1.0', '2.0'),
    (1.0, 'bad'),
    ([1.0], [1.0, 2.0]),
    ({'score': 1.0}, {'score': 2.0}),
    (1j, 2.0),
  ],
)
def test_rewards_that_are_no_numbers_end_in_one_line(values):
  with pytest.raises(ValueError) as caught:
    score(*values)
  text = str(caught.value)
  assert text.startswith("the reward 'python:my.own' returned [")
  assert 'no numbers' in text and '\n' not in text


def test_numbers_of_any_kind_are_rewards():
  for values in ((1, 2), (np.float16(1), True + 1), (np.array(1), 2.0)):
    assert score(*values).tolist() == [1.0, 2.0]
  assert score(-3e38, 3e38).tolist() == [-3e38, 3e38]
  assert rewards.score(lambda *_: [], [], []).tolist() == []


def test_prompts_and_responses_of_different_numbers_are_refused():
  with pytest.raises(ValueError, match='2 prompts and 1 responses'):
    rewards.score(rewards.vader, ['a', 'b'], ['c'])


def test_a_rule_is_a_reward_that_is_highest_where_it_is_kept():
  reward = rewards.get('rule:digits')
  texts = ['in 1984'] * 2, ['call 911', 'call me']
  assert rewards.score(reward, *texts).tolist() == [0.0, 1.0]
  for name, constraint in rewards.CONSTRAINTS.items():
    kept = rewards.score(rewards.get(f'rule:{name}'), *texts)
    np.testing.assert_array_equal(kept, 1.0 - constraint(*texts))


@pytest.mark.parametrize('check', [rewards.check, reward_models.check])
def test_names_are_checked_without_their_files(check):
  get = {rewards.check: rewards.get}.get(check, reward_models.get)
  for name in ('vader', 'rule:digits', 'sentiment:no.npz', 'python:no.such'):
    check(name)
  for name, message in [
    ('vadr', "did you mean 'vader'"),
    ('rule:digts', "constraint 'digts'; did you mean 'digits'"),
    ('sentimant:x', "did you mean 'sentiment'"),
    ('sentiment:', 'names nothing behind its colon'),
    ('python:length', 'write python:MODULE.FUNCTION'),
    ('python:.length', 'write python:MODULE.FUNCTION'),
    ('python:dpo_jax.', 'write python:MODULE.FUNCTION'),
  ]:
    for refuse in (check, get):  # before anything runs as when it is opened
      with pytest.raises(ValueError, match=message):
        refuse(name)


@pytest.mark.parametrize(
  ('texts', 'n', 'share'),
  [
    (['a b a b'], 1, 2 / 4),
    (['a b a b'], 2, 2 / 3),
    (['a b', 'A  b\n', 'b a'], 2, 2 / 3),  # pooled; no gram spans texts
    (['a', ''], 2, 0.0),
  ],
)
def test_distinct_n_counts_different_word_grams(texts, n, share):
  assert rewards.distinct_n(texts, n) == pytest.approx(share)


def made_up(rng, number):
  """Texts of 12 words, of which some are of one text and others of many."""
  return [
    ' '.join(map(str, np.append(rng.zipf(1.3, 10), rng.integers(1000, size=2))))
    for _ in range(number)
  ]


@pytest.mark.parametrize('per_prompt', [1, 3])
def test_the_error_of_distinct_n_leaves_one_prompt_out(per_prompt):
  texts = made_up(np.random.default_rng(0), 5 * per_prompt)
  texts[0] = 'two words'
  shares = []
  for n in range(5):
    left = texts[: n * per_prompt] + texts[(n + 1) * per_prompt :]
    shares.append(rewards.distinct_n(left, 2))
  expected = np.sqrt(4 / 5 * np.sum((shares - np.mean(shares)) ** 2))
  found = rewards.distinct_n_error(texts, 2, per_prompt=per_prompt)
  assert found == pytest.approx(expected) and found > 0.0
  for same in (['a', ''], ['a b'] * 4, ['a b', 'c d']):
    assert rewards.distinct_n_error(same, 2, per_prompt=1) == 0.0


def test_the_error_of_distinct_n_is_the_spread_over_other_prompts():
  rng = np.random.default_rng(0)
  sets = [made_up(rng, 32) for _ in range(150)]
  spread = np.std([rewards.distinct_n(texts, 2) for texts in sets], ddof=1)
  found = [rewards.distinct_n_error(x, 2, per_prompt=1) for x in sets]
  np.testing.assert_allclose(np.mean(found), spread, rtol=0.2)


def test_the_openings_are_many_short_neutral_and_different():
  texts = openings.openings()
  assert {split: len(t) for split, t in texts.items()} == {
    'train': 64,
    'test': 32,
  }
  both = texts['train'] + texts['test']
  assert len({text.lower() for text in both}) == len(both)
  for text in both:
    assert 4 <= len(text.split()) <= 9, text
    assert text == text.strip(), text
  sentiments = rewards.vader(both, [''] * len(both))
  assert {text: s for text, s in zip(both, sentiments) if abs(s) >= 0.05} == {}


def test_no_held_out_opening_starts_as_a_training_one_does():
  texts = openings.openings()
  starts = {' '.join(text.lower().split()[:4]) for text in texts['train']}
  for text in texts['test']:
    assert ' '.join(text.lower().split()[:4]) not in starts, text


def test_only_a_reward_that_looks_at_ends_is_told_of_them():
  class Ends(rewards.EndAware):
    def __call__(self, prompts, responses, ended=None):
      assert len(prompts) == len(responses)
      return [float(end) for end in ended]

  found = rewards.score(Ends(), ['p', 'p'], ['a', 'b'], ended=[True, False])
  assert found.tolist() == [1.0, 0.0]
  found = rewards.score(rewards.length, ['p'], ['abc'], ended=[False])
  assert found.tolist() == [3.0]
