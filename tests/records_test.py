import pathlib

import pytest

from dpo_jax.data import forms
from dpo_jax.data import locations
from dpo_jax.data import records

_FILE = locations.RawFile(pathlib.Path('f'), 'helpful-base/test.jsonl', 'test')


def _parse(task, row, form='pairs'):
  return records.TASKS[task].parse(row, _FILE, 3, form)


def _examples(task, row, form):
  return forms.of_form(_parse(task, row, form).example, form)


@pytest.mark.parametrize(
  'chosen, rejected, expected',
  [
    ('Human: a\n\nAssistant: x', 'Human: a\n\nAssistant: y', (' x', ' y')),
    # A shared beginning belongs to the responses.
    ('H\n\nAssistant: so x', 'H\n\nAssistant: so y', (' so x', ' so y')),
    # Early divergence: the cut is at the last marker that both have.
    (
      'H\n\nAssistant: a\n\nHuman: x\n\nAssistant: 1',
      'H\n\nAssistant: a\n\nHuman: y\n\nAssistant: 2',
      (' a\n\nHuman: x\n\nAssistant: 1', ' a\n\nHuman: y\n\nAssistant: 2'),
    ),
    # One dialogue ends where the other goes on.
    ('H\n\nAssistant:', 'H\n\nAssistant: y', ('', ' y')),
    (
      'H\n\nAssistant: y\n\nAssistant: z',
      'H\n\nAssistant: y',
      (' y\n\nAssistant: z', ' y'),
    ),
    # Identical dialogues are cut at their last marker.
    ('H\n\nAssistant: a\n\nAssistant: b',) * 2 + ((' b', ' b'),),
  ],
)
def test_dialogues_part_at_the_last_shared_marker(chosen, rejected, expected):
  prompt, *responses = records.split_dialogues(chosen, rejected)
  assert prompt.endswith('\n\nAssistant:')
  assert tuple(responses) == expected
  assert (prompt + responses[0], prompt + responses[1]) == (chosen, rejected)


def test_dialogues_without_a_shared_marker_are_bad():
  with pytest.raises(forms.BadRow, match='share no'):
    records.split_dialogues('\n\nHuman: a\n\nAssistant: b', 'other')


def test_hh_dialogues_and_split_rows_give_the_same_example():
  full = {
    'chosen': '\n\nHuman: Hi\n\nAssistant: Yes',
    'rejected': '\n\nHuman: Hi\n\nAssistant: No',
  }
  split = {
    'prompt': '\n\nHuman: Hi\n\nAssistant:',
    'chosen': ' Yes',
    'rejected': ' No',
    'turns': 1,
  }
  assert _parse('hh', full) == _parse('hh', split)
  assert _parse('hh', full).example == {
    'id': 'helpful-base/test/2',
    'prompt': '\n\nHuman: Hi\n\nAssistant:',
    'chosen': ' Yes',
    'rejected': ' No',
    'weight': 1.0,
    'p': 1.0,
    'chosen_ended': True,
    'rejected_ended': True,
    'chosen_reward': None,
    'rejected_reward': None,
    'chat': False,
  }
  yes = {
    'id': 'helpful-base/test/2',
    'prompt': '\n\nHuman: Hi\n\nAssistant:',
    'response': ' Yes',
    'weight': 1.0,
    'ended': True,
    'chat': False,
  }
  assert _examples('hh', full, 'sft') == [yes]
  assert _examples('hh', full, 'unpaired') == [
    {**yes, 'id': 'helpful-base/test/2/chosen', 'label': 1.0},
    {
      **yes,
      'id': 'helpful-base/test/2/rejected',
      'response': ' No',
      'label': 0.0,
    },
  ]


def _comparison(**changes):
  return {
    'info': {'id': 't3_a', 'post': 'Long.', 'title': 'T', 'subreddit': 'AskR'},
    'summaries': [{'text': ' one', 'policy': 'a'}, {'text': 'two '}],
    'choice': 1,
    'split': 'valid1',
    **changes,
  }


@pytest.mark.parametrize(
  'choice, chosen, rejected', [(0, ' one', ' two'), (1, ' two', ' one')]
)
def test_tldr_comparison_becomes_a_prompt_and_two_summaries(
  choice, chosen, rejected
):
  record = _parse('tldr', _comparison(choice=choice))
  assert record.split == 'test'
  assert record.example['prompt'] == (
    'SUBREDDIT: r/AskR\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:'
  )
  assert record.example['chosen'] == chosen
  assert record.example['rejected'] == rejected


def test_tldr_post_is_the_same_with_and_without_subreddit_and_id():
  plain = {
    'prompt': 'TITLE: T\n\nPOST: Long.\n\nTL;DR:',
    'chosen': ' x',
    'rejected': ' y',
    'post_id': None,
  }
  official = _parse('tldr', _comparison()).keys
  assert set(_parse('tldr', plain).keys) & set(official)
  assert len(official) == 2


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'choice': 2}, "'choice' must be one of"),
    ({'choice': True}, "'choice' must be one of"),
    ({'summaries': [{'text': 'a'}]}, "'summaries' must hold two"),
    ({'summaries': [{'text': 'a'}, {}]}, "'text' is missing"),
    ({'info': []}, "'info' must be an object"),
    ({'info': {}}, "'subreddit' is missing"),
    ({'split': 'valid3'}, "'split' must be one of"),
  ],
)
def test_tldr_comparison_errors_name_the_field(changes, message):
  with pytest.raises(forms.BadRow, match=message):
    _parse('tldr', _comparison(**changes))


def test_jsonl_row_keeps_all_it_says():
  row = {
    'id': 7,
    'prompt': 'q',
    'chosen': 'a',
    'rejected': 'b',
    'weight': 2,
    'p': 0.75,
    'chosen_ended': False,
    'rejected_ended': True,
    'chosen_reward': -1,
    'rejected_reward': 2.5,
    'chat': False,
  }
  assert _parse('jsonl', row).example == {**row, 'id': '7', 'weight': 2.0}
  assert _examples('jsonl', row, 'sft') == [
    {
      'id': '7',
      'prompt': 'q',
      'response': 'a',
      'weight': 2.0,
      'ended': False,
      'chat': False,
    }
  ]
  direct = {'prompt': 'q', 'response': 'a', 'weight': 0.5, 'ended': False}
  assert _examples('jsonl', direct, 'sft') == [
    {'id': 'helpful-base/test/2', **direct, 'chat': False}
  ]


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'prompt': None}, "'prompt' must be text"),
    ({'chosen': 3}, "'chosen' must be text"),
    ({'rejected': '\ud800'}, "'rejected' holds half a surrogate"),
    ({'p': 1.5}, r"'p' must lie in \[0, 1\]"),
    ({'p': -0.1}, r"'p' must lie in \[0, 1\]"),
    ({'p': '1'}, "'p' must be a number"),
    ({'weight': -1}, r"'weight' must lie in \[0, inf\]"),
    ({'weight': float('nan')}, "'weight' must lie"),
    ({'weight': float('inf')}, "'weight' must lie"),
    ({'weight': 10**400}, "'weight' must lie"),
    ({'weight': True}, "'weight' must be a number"),
    ({'chosen_ended': 1}, "'chosen_ended' must be true or false"),
    ({'id': [1]}, "'id' must be text or an integer"),
    ({'chosen_reward': 1}, "'rejected_reward' is missing; give both"),
    ({'rejected_reward': 1}, "'chosen_reward' is missing; give both"),
    (
      {'chosen_reward': 1e39, 'rejected_reward': 0},
      "'chosen_reward' must be finite in float32",
    ),
    (
      {'chosen_reward': 0, 'rejected_reward': None},
      "'rejected_reward' must be a number",
    ),
  ],
)
def test_jsonl_errors_name_the_field(changes, message):
  row = {'prompt': 'q', 'chosen': 'a', 'rejected': 'b', **changes}
  with pytest.raises(forms.BadRow, match=message):
    _parse('jsonl', row)
