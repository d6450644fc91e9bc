"""Rows of messages: what they become, and what is said of bad ones."""

import json

import pytest

from dpo_jax.data import examples
from dpo_jax.data import forms
from dpo_jax.data import tokenizers
from tests import vocabularies

_USER = {'role': 'user', 'content': 'Hi'}
_YES = {'role': 'assistant', 'content': 'Yes'}
_NO = {'role': 'assistant', 'content': 'No'}
_PROMPT = '[{"role": "user", "content": "Hi"}]'


def _make(row, form):
  return forms.of_form({'id': 'i', **forms.read(row, form)}, form)


@pytest.mark.parametrize(
  'row',
  [
    {'chosen': [_USER, _YES], 'rejected': [_USER, _NO]},
    {'prompt': [_USER], 'chosen': [_YES], 'rejected': [_NO]},
    {'prompt': [_USER], 'chosen': 'Yes', 'rejected': [_NO]},
    {'prompt': _PROMPT, 'chosen': 'Yes', 'rejected': 'No', 'chat': True},
  ],
)
def test_every_way_to_write_a_pair_is_one_example(row):
  (example,) = _make({**row, 'weight': 2}, 'pairs')
  assert example == {
    'id': 'i',
    'prompt': _PROMPT,
    'chosen': 'Yes',
    'rejected': 'No',
    'weight': 2.0,
    'p': 1.0,
    'chosen_ended': True,
    'rejected_ended': True,
    'chosen_reward': None,
    'rejected_reward': None,
    'chat': True,
  }
  assert example.keys() == forms.FIELDS['pairs'].keys()
  (sft,) = _make(row, 'sft')
  assert (sft['prompt'], sft['response'], sft['chat']) == (_PROMPT, 'Yes', True)
  unpaired = _make(row, 'unpaired')
  assert [e['response'] for e in unpaired] == ['Yes', 'No']
  assert all(e['chat'] for e in unpaired)


def test_single_responses_and_rankings():
  row = {'messages': [_USER, _YES], 'label': 0.75, 'ended': False}
  (example,) = _make(row, 'unpaired')
  assert (example['prompt'], example['response']) == (_PROMPT, 'Yes')
  assert (example['label'], example['ended'], example['chat']) == (
    0.75,
    False,
    True,
  )
  (sft,) = _make({'prompt': [_USER], 'response': [_YES]}, 'sft')
  assert (sft['prompt'], sft['response']) == (_PROMPT, 'Yes')
  row = {'prompt': [_USER], 'responses': ['a', [_YES]], 'rewards': [0, 1]}
  (ranking,) = _make(row, 'rankings')
  assert (ranking['responses'], ranking['chat']) == (['Yes', 'a'], True)


def test_plain_text_stays_plain_even_if_it_looks_like_messages():
  (example,) = _make({'prompt': _PROMPT, 'response': 'a'}, 'sft')
  assert (example['prompt'], example['chat']) == (_PROMPT, False)


@pytest.mark.parametrize(
  'row, form, message',
  [
    ({'messages': []}, 'sft', "'messages' must be a list of messages"),
    ({'messages': [_YES]}, 'sft', 'must hold a prompt and an answer'),
    (
      {'messages': [_USER, _USER]},
      'sft',
      r'\[1\]: the answer must be the assis',
    ),
    ({'messages': [3, _YES]}, 'sft', r'messages\[0\] must be an object'),
    (
      {'messages': [{'role': 'bot', 'content': 'a'}, _YES]},
      'sft',
      r"messages\[0\]: role 'bot' is none of system, developer, user",
    ),
    (
      {'messages': [{'role': ['user'], 'content': 'a'}, _YES]},
      'sft',
      r'role \[.user.\] is none of',
    ),
    (
      {'messages': [{'from': 'human', 'value': 'a'}, _YES]},
      'sft',
      "rename 'from', 'value' to 'role', 'content'",
    ),
    (
      {'messages': [{'role': 'user', 'content': 3}, _YES]},
      'sft',
      'content must be text, not 3',
    ),
    (
      {'messages': [{'role': 'user'}, _YES]},
      'sft',
      'content must be text, not None',
    ),
    (
      {'messages': [{'role': 'user', 'content': [{'text': 'a'}]}, _YES]},
      'sft',
      "join its parts' texts",
    ),
    (
      {'messages': [{'role': 'user', 'content': '\ud800'}, _YES]},
      'sft',
      'half a surrogate pair',
    ),
    (
      {'messages': [_USER, {**_YES, 'tool_calls': [1]}]},
      'sft',
      "cannot have 'tool_calls'",
    ),
    ({'messages': [_USER, _YES], 'prompt': 'a'}, 'sft', "give 'prompt' or 'me"),
    ({'messages': [_USER, _YES]}, 'pairs', "use form 'sft', or 'unpaired'"),
    (
      {'chosen': [_USER, _YES], 'rejected': [_YES, _NO]},
      'pairs',
      'must have the same messages before the last one',
    ),
    (
      {'chosen': [_USER, _YES], 'rejected': 'No'},
      'pairs',
      "'chosen' is messages, so 'prompt' must be, too",
    ),
    (
      {'prompt': 'Hi', 'chosen': [_YES], 'rejected': 'No'},
      'pairs',
      "'chosen' is messages but 'prompt' is not",
    ),
    (
      {'prompt': [_USER, _YES], 'chosen': 'a', 'rejected': 'b'},
      'pairs',
      "'prompt' ends with an assistant's message",
    ),
    (
      {'prompt': [_USER], 'chosen': [_USER, _YES], 'rejected': 'b'},
      'pairs',
      "'chosen' holds 2 messages beside a prompt",
    ),
    (
      {'prompt': [_USER], 'chosen': 3, 'rejected': 'b'},
      'pairs',
      'must be text',
    ),
    (
      {'prompt': 'Hi', 'response': 'a', 'chat': True},
      'sft',
      "with 'chat', field 'prompt' must be messages as JSON",
    ),
    ({'prompt': 'Hi', 'response': 'a', 'chat': 1}, 'sft', 'true or false'),
  ],
)
def test_bad_messages_are_named(row, form, message):
  with pytest.raises(forms.BadRow, match=message) as caught:
    forms.read(row, form)
  assert '\n' not in str(caught.value)


# --- As tokens ---


def _tokenize(rows, tokenizer, form='pairs', prompt=99, response=99):
  made = [
    {**example, 'id': str(n)}
    for n, row in enumerate(rows)
    for example in _make(row, form)
  ]
  return examples.tokenize(
    made,
    tokenizer,
    max_prompt_tokens=prompt,
    max_response_tokens=response,
    form=form,
  )


def _texts(tokenizer, group):
  parts = (group.prompt, *group.responses)
  return [tokenizer.decode(part.tolist()) for part in parts]


def test_messages_and_text_may_be_in_one_data_set():
  tokenizer = vocabularies.chat_tokenizers()['mistral']
  rows = [
    {'chosen': [_USER, _YES], 'rejected': [_USER, _NO]},
    {'prompt': 'Hi', 'chosen': 'Yes', 'rejected': 'No', 'chosen_ended': False},
  ]
  (first, second), report = _tokenize(rows, tokenizer)
  assert _texts(tokenizer, first) == [
    '<s> [INST] Hi [/INST]',
    ' Yes</s>',
    ' No</s>',
  ]
  assert _texts(tokenizer, second) == ['<s> Hi', 'Yes', 'No</s>']
  assert (report.read, report.kept) == (2, 2)
  for group in (first, second):
    assert group.prompt.tolist().count(tokenizer.bos_id) == 1
    for response in group.responses:
      assert response.tolist().count(tokenizer.eos_id) <= 1


def test_a_long_prompt_keeps_bos_and_tail_and_says_so():
  tokenizer = vocabularies.chat_tokenizers()['mistral']
  row = {'prompt': [_USER], 'chosen': 'Yes', 'rejected': 'No'}
  (whole,), _ = _tokenize([row], tokenizer)
  (group,), report = _tokenize([row], tokenizer, prompt=4, response=2)
  assert group.prompt.tolist() == [
    tokenizer.bos_id,
    *whole.prompt.tolist()[-3:],
  ]
  assert [len(r) for r in group.responses] == [2, 2]
  assert report.truncated == {'prompt': 1, 'chosen': 1, 'rejected': 1}


def test_no_bos_where_the_template_writes_none():
  tokenizer = vocabularies.chat_tokenizers()['mistral'].with_template(
    '{% for m in messages %}{{ m.content }}{% endfor %}'
  )
  row = {'prompt': [_USER], 'chosen': 'Yes', 'rejected': 'No'}
  (group,), _ = _tokenize([row], tokenizer)
  assert _texts(tokenizer, group) == [' Hi', 'Yes</s>', 'No</s>']


def test_prompts_to_sample_from_are_those_of_training():
  tokenizer = vocabularies.chat_tokenizers()['gemma']
  row = {'prompt': [_USER], 'chosen': 'Yes', 'rejected': 'No'}
  (group,), _ = _tokenize([row], tokenizer)
  (prompt,) = examples.encode_prompts([[_USER]], tokenizer, 99)
  assert prompt.tolist() == group.prompt.tolist()
  with pytest.raises(ValueError, match="role 'x'"):
    examples.encode_prompts([[{'role': 'x'}]], tokenizer, 99)


def test_errors_of_a_template_name_the_example():
  tokenizer = vocabularies.chat_tokenizers()['gemma']
  system = {'role': 'system', 'content': 'a'}
  rows = [
    {'messages': [_USER, _YES]},
    {'messages': [system, _USER, _YES]},
  ]
  with pytest.raises(ValueError, match=r"example '1': .*System role not supp"):
    _tokenize(rows, tokenizer, 'sft')
  with pytest.raises(ValueError, match=r"example '0': .*no chat template"):
    _tokenize(rows, tokenizers.ByteTokenizer(), 'sft')


def test_stored_prompts_are_json_that_people_can_read():
  row = {'messages': [{'role': 'user', 'content': 'é☃'}, _YES]}
  (example,) = _make(row, 'sft')
  assert 'é☃' in example['prompt']
  assert json.loads(example['prompt']) == row['messages'][:1]
