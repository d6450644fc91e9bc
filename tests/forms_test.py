"""Rows of each form, read literally, turned into others, or refused."""

import pytest

from dpo_jax.data import forms

_PAIR = {'prompt': 'q', 'chosen': 'a', 'rejected': 'b'}
_SINGLE = {'prompt': 'q', 'response': 'a', 'label': 1}
_RANKING = {'prompt': 'q', 'responses': ['a', 'b', 'c']}


def _make(row, form):
  return forms.of_form({'id': 'i', **forms.read(row, form)}, form)


@pytest.mark.parametrize(
  'label, value', [(True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (0.25, 0.25)]
)
def test_a_labelled_response_is_an_unpaired_example(label, value):
  row = {**_SINGLE, 'label': label, 'weight': 3, 'ended': False}
  (example,) = _make(row, 'unpaired')
  assert example == {
    'id': 'i',
    'prompt': 'q',
    'response': 'a',
    'label': value,
    'weight': 3.0,
    'ended': False,
    'chat': False,
  }
  assert type(example['label']) is float


def test_a_pair_is_two_unpaired_examples():
  row = {**_PAIR, 'p': 0.75, 'weight': 2, 'rejected_ended': False}
  both = {'prompt': 'q', 'weight': 2.0, 'chat': False}
  assert _make(row, 'unpaired') == [
    {**both, 'id': 'i/chosen', 'response': 'a', 'label': 0.75, 'ended': True},
    {
      **both,
      'id': 'i/rejected',
      'response': 'b',
      'label': 0.25,
      'ended': False,
    },
  ]


@pytest.mark.parametrize(
  'p, response, ended', [(0.75, 'a', True), (0.5, 'a', True), (0.1, 'b', False)]
)
def test_of_a_pair_sft_takes_the_response_likelier_preferred(
  p, response, ended
):
  row = {**_PAIR, 'p': p, 'rejected_ended': False}
  (example,) = _make(row, 'sft')
  assert (example['response'], example['ended']) == (response, ended)


def test_rewards_count_as_read_only_where_they_are_kept():
  for form, kept in [('pairs', True), ('unpaired', False), ('sft', False)]:
    assert ('chosen_reward' in forms.fields_read(form)) == kept
  assert 'rewards' in forms.fields_read('rankings')
  assert 'rewards' not in forms.fields_read('sft')


def test_a_ranking_without_rewards_stays_in_order():
  assert _make({**_RANKING, 'ended': False}, 'rankings') == [
    {
      'id': 'i',
      'prompt': 'q',
      'responses': ['a', 'b', 'c'],
      'rewards': [],
      'weight': 1.0,
      'ended': [False, False, False],
      'chat': False,
    }
  ]


def test_rewards_sort_a_ranking_and_equals_keep_their_order():
  row = {
    'prompt': 'q',
    'responses': ['a', 'b', 'c', 'd'],
    'rewards': [1, -2.5, 3, 1.0],
    'ended': [True, False, True, False],
    'weight': 0.5,
  }
  assert _make(row, 'rankings') == [
    {
      'id': 'i',
      'prompt': 'q',
      'responses': ['c', 'a', 'd', 'b'],
      'rewards': [3.0, 1.0, 1.0, -2.5],
      'weight': 0.5,
      'ended': [True, True, False, False],
      'chat': False,
    }
  ]


def test_sft_takes_the_best_response_there_is():
  def sft(row):
    return [(e['response'], e['ended']) for e in _make(row, 'sft')]

  assert sft({**_PAIR, 'chosen_ended': False}) == [('a', False)]
  row = {**_RANKING, 'rewards': [0, 1, 2], 'ended': [True, True, False]}
  assert sft(row) == [('c', False)]
  # With a label, an undesirable response is none.
  assert sft(_SINGLE) == sft({**_SINGLE, 'label': 0.5}) == [('a', True)]
  assert sft({**_SINGLE, 'label': 0.25}) == sft({**_SINGLE, 'label': False})
  assert sft({**_SINGLE, 'label': False}) == []
  (example,) = _make(_SINGLE, 'sft')
  assert example.keys() == forms.FIELDS['sft'].keys()


@pytest.mark.parametrize('form', ['pairs', 'sft', 'unpaired', 'rankings'])
def test_examples_have_the_fields_of_their_form(form):
  made = 0
  for row in (_PAIR, _SINGLE, _RANKING):
    try:
      examples = _make(row, form)
    except forms.BadRow:
      continue
    for example in examples:
      assert example.keys() == forms.FIELDS[form].keys()
      made += 1
  assert made == {'pairs': 1, 'sft': 3, 'unpaired': 3, 'rankings': 1}[form]


@pytest.mark.parametrize(
  'row, form, message',
  [
    (_SINGLE, 'pairs', "use form 'sft', or 'unpaired' with a 'label'"),
    (_SINGLE, 'rankings', "use form 'sft', or 'unpaired' with a 'label'"),
    (_RANKING, 'pairs', "use form 'rankings' or 'sft'"),
    (_RANKING, 'unpaired', "use form 'rankings' or 'sft'"),
    (_PAIR, 'rankings', "use form 'pairs', 'unpaired' or 'sft'"),
    ({'prompt': 'q'}, 'rankings', "'responses' is missing"),
    ({'prompt': 'q'}, 'unpaired', "'chosen' is missing"),
  ],
)
def test_a_row_of_another_form_says_which(row, form, message):
  with pytest.raises(forms.BadRow, match=message):
    forms.read(row, form)


@pytest.mark.parametrize(
  'label, message',
  [
    (1.5, r"'label' must lie in \[0, 1\]"),
    (-1, r"'label' must lie in \[0, 1\]"),
    (float('nan'), r"'label' must lie in \[0, 1\]"),
    ('good', "'label' must be a number"),
    (None, "'label' must be a number"),
  ],
)
def test_labels_are_checked(label, message):
  for form in ('unpaired', 'sft'):
    with pytest.raises(forms.BadRow, match=message):
      forms.read({**_SINGLE, 'label': label}, form)


def test_a_response_without_a_label_is_not_unpaired():
  row = {'prompt': 'q', 'response': 'a'}
  with pytest.raises(forms.BadRow, match='1 for a desirable response, 0 for'):
    forms.read(row, 'unpaired')
  assert _make(row, 'sft')[0]['response'] == 'a'


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'prompt': None}, "'prompt' must be text"),
    ({'responses': 'abc'}, "'responses' must be a list"),
    ({'responses': []}, 'at least 2 texts, best first, not 0'),
    ({'responses': ['a']}, 'at least 2 texts, best first, not 1'),
    ({'responses': ['a', 1, 'c']}, r"'responses\[1\]' must be text"),
    ({'rewards': [1, 2]}, '2 values for 3 responses; give one to each'),
    ({'rewards': 3}, "'rewards' must be a list"),
    ({'rewards': [1, None, 2]}, r"'rewards\[1\]' must be a number"),
    ({'rewards': [1, 2, True]}, r"'rewards\[2\]' must be a number"),
    ({'rewards': [1, 2, float('inf')]}, r"'rewards\[2\]' must be finite"),
    ({'rewards': [1, float('nan'), 2]}, r"'rewards\[1\]' must be finite"),
    ({'rewards': [-(10**400), 1, 2]}, r"'rewards\[0\]' must be finite"),
    ({'ended': [True]}, '1 values for 3 responses; give one to each'),
    ({'ended': [True, 1, True]}, r"'ended\[1\]' must be true or false"),
    ({'ended': 1}, "'ended' must be true or false"),
    ({'weight': -1}, "'weight' must lie"),
  ],
)
def test_ranking_errors_name_the_field_and_the_place(changes, message):
  for form in ('rankings', 'sft'):
    with pytest.raises(forms.BadRow, match=message):
      forms.read({**_RANKING, **changes}, form)


@pytest.mark.parametrize(
  'text, words, prompt',
  [
    ('One two  three', 2, 'One two'),
    (' One\ttwo three', 1, ' One'),
    ('One two', 2, 'One two'),
    ('One', 2, 'One'),
  ],
)
def test_review_is_prompt_plus_response(text, words, prompt):
  review = {'id': 'x', 'text': text, 'label': 1}
  example = forms.review_to_sft(review, prompt_words=words)
  assert example['prompt'] == prompt
  assert example['prompt'] + example['response'] == text
