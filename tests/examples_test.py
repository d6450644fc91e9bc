import numpy as np
import pytest

from dpo_jax import rewards
from dpo_jax.data import examples
from dpo_jax.data import forms
from dpo_jax.data import locations
from dpo_jax.data import records
from dpo_jax.data import tokenizers


class _WithBos(tokenizers.ByteTokenizer):
  bos_id = 257
  vocab_size = 258


def _pair(prompt='pq', chosen='abc', rejected='xy', **fields):
  return {
    'id': 'i',
    'prompt': prompt,
    'chosen': chosen,
    'rejected': rejected,
    'weight': 1.0,
    'p': 1.0,
    'chosen_ended': True,
    'rejected_ended': True,
    'chosen_reward': None,
    'rejected_reward': None,
    'chat': False,
    **fields,
  }


def _ranking(*responses, **fields):
  return {
    'id': 'i',
    'prompt': 'pq',
    'responses': list(responses),
    'rewards': [],
    'weight': 1.0,
    'ended': [True] * len(responses),
    'chat': False,
    **fields,
  }


def _tokenize(
  *rows, tokenizer=None, prompt=99, response=99, form='pairs', **keywords
):
  return examples.tokenize(
    rows,
    tokenizer or tokenizers.ByteTokenizer(),
    max_prompt_tokens=prompt,
    max_response_tokens=response,
    form=form,
    **keywords,
  )


def _lists(group):
  return [group.prompt.tolist(), *(r.tolist() for r in group.responses)]


def _bytes(text, *more):
  return [*text.encode(), *more]


def _parse(task, row, name, form):
  file = locations.RawFile(None, name, None)
  example = records.TASKS[task].parse(row, file, 1, form).example
  (made,) = forms.of_form(example, form)
  return made


def test_literal_tokens_of_an_hh_pair():
  row = {
    'chosen': '\n\nHuman: Hi\n\nAssistant: Yes',
    'rejected': '\n\nHuman: Hi\n\nAssistant: No',
  }
  example = _parse('hh', row, 'helpful-base/test.jsonl.gz', 'pairs')
  (group,), _ = _tokenize(example)
  # fmt: off
  assert _lists(group) == [
    [10, 10, 72, 117, 109, 97, 110, 58, 32, 72, 105, 10, 10, 65, 115, 115, 105,
     115, 116, 97, 110, 116, 58],
    [32, 89, 101, 115, 256],
    [32, 78, 111, 256],
  ]
  # fmt: on
  assert group.id == 'helpful-base/test/0'
  assert (group.weight, group.p) == (1.0, 1.0)
  assert group.prompt.dtype == group.responses[0].dtype == np.int32


def test_literal_tokens_of_a_tldr_pair():
  row = {
    'info': {'id': 't3', 'post': 'P', 'title': 'T', 'subreddit': 's'},
    'summaries': [{'text': ' a'}, {'text': ' b'}],
    'choice': 1,
    'split': 'train',
  }
  (group,), _ = _tokenize(_parse('tldr', row, 'batch3.json', 'pairs'))
  # fmt: off
  assert _lists(group) == [
    [83, 85, 66, 82, 69, 68, 68, 73, 84, 58, 32, 114, 47, 115, 10, 10, 84, 73,
     84, 76, 69, 58, 32, 84, 10, 10, 80, 79, 83, 84, 58, 32, 80, 10, 10, 84, 76,
     59, 68, 82, 58],
    [32, 98, 256],
    [32, 97, 256],
  ]
  # fmt: on


def test_literal_tokens_of_an_imdb_review():
  row = {'id': 'train/pos/0', 'text': 'Oh my, good', 'label': 1}
  review = _parse('imdb', row, 'train.jsonl', 'reviews')
  (example,) = forms.of_form(review, 'sft', prompt_words=2)
  (group,), _ = _tokenize(example, form='sft')
  assert _lists(group) == [
    [79, 104, 32, 109, 121, 44],
    [32, 103, 111, 111, 100, 256],
  ]
  assert group.p == 1.0


def test_literal_tokens_of_jsonl_rows():
  row = {'prompt': 'é?', 'chosen': 'ja', 'rejected': 'n', 'p': 0.5, 'weight': 3}
  row['rejected_ended'] = False
  (group,), _ = _tokenize(_parse('jsonl', row, 'f.jsonl', 'pairs'))
  assert _lists(group) == [[195, 169, 63], [106, 97, 256], [110]]
  assert (group.weight, group.p) == (3.0, 0.5)
  row = {'prompt': 'a', 'response': 'b', 'ended': False, 'weight': 0.5}
  example = _parse('jsonl', row, 'f.jsonl', 'sft')
  (group,), _ = _tokenize(example, form='sft')
  assert _lists(group) == [[97], [98]]
  assert (group.weight, group.p) == (0.5, 1.0)


def test_literal_tokens_of_both_halves_of_a_pair():
  row = {'prompt': 'é?', 'chosen': 'ja', 'rejected': 'n', 'p': 0.75}
  file = locations.RawFile(None, 'f.jsonl', None)
  pair = records.parse_jsonl(row, file, 1, 'unpaired').example
  groups, report = _tokenize(
    *forms.of_form(pair, 'unpaired'), form='unpaired', response=2
  )
  assert [_lists(group) for group in groups] == [
    [[195, 169, 63], [106, 97]],
    [[195, 169, 63], [110, 256]],
  ]
  assert [(g.id, g.p, g.weight) for g in groups] == [
    ('f/0/chosen', 0.75, 1.0),
    ('f/0/rejected', 0.25, 1.0),
  ]
  assert report.truncated == {'prompt': 0, 'response': 1}
  assert {(g.rewards, g.costs) for g in groups} == {(None, None)}


def test_literal_tokens_of_a_labelled_response():
  row = {'prompt': 'a', 'response': 'b', 'label': False, 'ended': False}
  example = _parse('jsonl', {**row, 'weight': 3}, 'f.jsonl', 'unpaired')
  (group,), _ = _tokenize(example, form='unpaired')
  assert _lists(group) == [[97], [98]]
  assert (group.p, group.weight) == (0.0, 3.0)


def test_literal_tokens_of_a_ranking():
  row = {
    'prompt': 'q',
    'responses': ['c', 'long', 'b'],
    'rewards': [0, -1, 1.5],
    'ended': [True, True, False],
    'weight': 2,
  }
  example = _parse('jsonl', row, 'f.jsonl', 'rankings')
  (group,), report = _tokenize(example, form='rankings', response=3)
  assert _lists(group) == [[113], [98], [99, 256], [108, 111, 110]]
  assert group.rewards == (1.5, 0.0, -1.0)
  assert (group.p, group.weight, group.costs) == (1.0, 2.0, None)
  assert report.truncated == {
    'prompt': 0,
    'response 1': 0,
    'response 2': 0,
    'response 3': 1,
  }
  assert [numbers['max'] for numbers in report.lengths.values()] == [1, 1, 2, 3]


@pytest.mark.parametrize(
  'row, form, expected',
  [
    (_pair(), 'pairs', None),
    (_pair(chosen_reward=0.0, rejected_reward=2.5), 'pairs', (0.0, 2.5)),
    (_ranking('a', 'b', 'c'), 'rankings', None),
    (_ranking('a', 'b', rewards=[1.0, 0.0]), 'rankings', (1.0, 0.0)),
  ],
)
def test_absent_rewards_are_none(row, form, expected):
  (group,), _ = _tokenize(row, form=form)
  assert group.rewards == expected


def test_rankings_with_responses_identical_in_tokens_are_dropped():
  groups, report = _tokenize(
    _ranking('abcd', 'x', 'abce'),
    _ranking('abcd', '', 'x'),
    _ranking('abcd', 'x', 'y', id='kept'),
    form='rankings',
    response=3,
  )
  assert [group.id for group in groups] == ['kept']
  assert report.dropped == {
    'responses identical in tokens': 1,
    'response without tokens': 1,
  }


def test_rankings_of_different_lengths_are_refused():
  with pytest.raises(ValueError, match=r"'2' has 2 responses.* cut all to one"):
    _tokenize(_ranking(*'abc'), _ranking(*'ab', id='2'), form='rankings')


def test_costs_are_of_whole_texts_and_stay_with_their_responses():
  seen = []

  def cost(prompts, responses):
    seen.extend(zip(prompts, responses))
    return np.array([len(text) / 10 for text in responses])

  rows = [
    _ranking('abcdefgh', 'ab', 'x', prompt=f'p{n}', id=f'{n}')
    for n in range(1500)
  ]
  rows[700]['responses'][1] = ''
  groups, _ = _tokenize(*rows, form='rankings', cost=cost, response=3)
  assert len(groups) == 1499
  assert {group.costs for group in groups} == {(0.8, 0.2, 0.1)}
  assert len(seen) == 4500 and ('p1200', 'abcdefgh') in seen
  (pair,), _ = _tokenize(
    _pair(chosen='1 good', rejected='bad'), cost=rewards.digits
  )
  assert pair.costs == (1.0, 0.0)
  (single,), _ = _tokenize(
    {**_ranking(), 'response': 'a2', 'ended': True, 'label': 0.5},
    form='unpaired',
    cost=rewards.digits,
  )
  assert single.costs == (1.0,) and single.p == 0.5


@pytest.mark.parametrize(
  'value, message',
  [
    (1.5, r"text 0 is 1.5; scale .* into \[0, 1\][^?]*'abc'"),
    (-1e-9, r'scale the constraint into \[0, 1\]'),
    (float('nan'), 'text 0 is nan'),
    (float('inf'), 'text 0 is inf'),
  ],
)
def test_costs_outside_the_unit_interval_are_refused(value, message):
  with pytest.raises(ValueError, match=message):
    _tokenize(_pair(), cost=lambda prompts, _: [value] * len(prompts))


def test_groups_with_two_equal_rewards_are_ties():
  def group(*values):
    return examples.Group(
      np.array([1]), (), 1.0, 1.0, '', rewards=values or None
    )

  groups = [
    group(2.0, 1.0, 0.0),
    group(2.0, 2.0, 0.0),
    group(0.0, 1.0, 0.0),
    group(),
    group(0.0, -0.0),
    group(16777217.0, 16777216.0),  # equal in float32
    group(1.0, 2.0),
  ]
  kept, dropped = examples.drop_ties(groups)
  assert kept == [groups[0], groups[3], groups[6]]
  assert dropped == 4


@pytest.mark.parametrize(
  'bos, limit, expected, truncated',
  [
    (False, 5, _bytes('12345'), 0),
    (False, 3, _bytes('345'), 1),
    (True, 6, [257, *_bytes('12345')], 0),
    (True, 5, [257, *_bytes('2345')], 1),
    (True, 1, [257], 1),
  ],
)
def test_long_prompt_keeps_its_tail_and_bos(bos, limit, expected, truncated):
  tokenizer = _WithBos() if bos else tokenizers.ByteTokenizer()
  (group,), report = _tokenize(
    _pair(prompt='12345'), tokenizer=tokenizer, prompt=limit
  )
  assert group.prompt.tolist() == expected
  assert report.truncated['prompt'] == truncated
  # Prompts to sample from are cut in the same way.
  tokens = _bytes('12345')
  cut = examples.fit_prompt(tokens, tokenizer, limit)
  assert cut == (expected, bool(truncated))
  assert tokens == _bytes('12345')
  # BOS nowhere else.
  assert all(257 not in response for response in group.responses)


@pytest.mark.parametrize(
  'ended, limit, expected, truncated',
  [
    (True, 4, _bytes('abc', 256), 0),
    (True, 3, _bytes('abc'), 1),
    (True, 2, _bytes('ab'), 1),
    (False, 4, _bytes('abc'), 0),
    (False, 3, _bytes('abc'), 0),
    (False, 2, _bytes('ab'), 1),
  ],
)
def test_eos_ends_only_what_really_ended(ended, limit, expected, truncated):
  (group,), report = _tokenize(_pair(chosen_ended=ended), response=limit)
  assert group.responses[0].tolist() == expected
  assert report.truncated['chosen'] == truncated
  assert report.truncated['rejected'] == (limit < 3)


def test_eos_is_not_doubled():
  class Ends(tokenizers.ByteTokenizer):
    def encode(self, text):
      return [self.eos_id if i == ord('$') else i for i in text.encode()]

  (group,), _ = _tokenize(_pair(chosen='ab$', rejected='$a'), tokenizer=Ends())
  assert _lists(group)[1:] == [[97, 98, 256], [256, 97, 256]]


def test_unusable_groups_are_dropped_and_counted():
  groups, report = _tokenize(
    _pair(id='kept'),
    _pair(chosen='same 1', rejected='same 2'),
    _pair(chosen=''),
    _pair(rejected=''),
    _pair(prompt=''),
    response=5,
  )
  assert [group.id for group in groups] == ['kept']
  assert (report.read, report.kept) == (5, 1)
  assert report.dropped == {
    'responses identical in tokens': 1,
    'response without tokens': 2,
    'prompt without tokens': 1,
  }
  # What was dropped was not truncated, as far as training is concerned.
  assert report.truncated == {'prompt': 0, 'chosen': 0, 'rejected': 0}


def test_same_text_with_and_without_an_end_is_a_pair():
  groups, _ = _tokenize(_pair(chosen='a', rejected='a', rejected_ended=False))
  assert _lists(groups[0])[1:] == [[97, 256], [97]]


def test_bos_makes_a_prompt_of_nothing():
  groups, report = _tokenize(_pair(prompt=''), tokenizer=_WithBos())
  assert groups[0].prompt.tolist() == [257]
  assert report.dropped == {}


def test_report_has_the_lengths_of_what_was_kept():
  rows = [_pair(prompt='p' * n, rejected='') for n in (50, 60)]
  rows += [_pair(prompt='p' * n) for n in range(1, 102)]
  groups, report = _tokenize(*rows, prompt=100)
  assert len(groups) == 101
  assert report.lengths['prompt'] == pytest.approx(
    {'mean': 5150 / 101, 'median': 51.0, 'p95': 96.0, 'max': 100.0}
  )
  assert report.lengths['chosen']['mean'] == 4.0
  assert report.lengths['rejected']['max'] == 3.0
  printed = str(report).splitlines()
  assert printed[-3].split() == ['prompt', '51.0', '51.0', '96.0', '100.0', '1']
  assert len({line.rindex(line.split()[-1][-1]) for line in printed[-4:]}) == 1


def test_chunks_do_not_show():
  rows = [_pair(prompt=f'p{i}', id=f'{i}') for i in range(2500)]
  groups, report = _tokenize(*rows)
  assert [group.id for group in groups] == [f'{i}' for i in range(2500)]
  assert groups[2100].prompt.tolist() == _bytes('p2100')
  assert report.kept == 2500


def test_nothing_to_read_gives_an_empty_report():
  groups, report = _tokenize()
  assert groups == []
  assert report.lengths['chosen']['max'] == 0.0
  groups, report = _tokenize(form='rankings')
  assert groups == []
  assert report.lengths.keys() == {'prompt'} and 'kept' in str(report)


def test_vocabulary_must_fit_the_model():
  examples.check_vocabulary(tokenizers.ByteTokenizer(), 257)
  with pytest.raises(ValueError, match='257 tokens, the model only 256'):
    examples.check_vocabulary(tokenizers.ByteTokenizer(), 256)


@pytest.mark.parametrize(
  'keywords, message',
  [
    ({'prompt': 0}, 'max_prompt_tokens is 0'),
    ({'response': -1}, 'max_response_tokens is -1'),
    ({'form': 'reviews'}, "form 'reviews' has no tokens"),
  ],
)
def test_limits_and_form_are_checked(keywords, message):
  with pytest.raises(ValueError, match=message):
    _tokenize(_pair(), **keywords)
