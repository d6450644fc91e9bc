import gzip
import io
import json
import tarfile

import pytest

from dpo_jax.data import locations
from dpo_jax.data import sources


def _write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wt') as stream:
    stream.write(text)


def _read(
  task, folder, form='pairs', held_out=0.25, prompt_words=None, subsets=None
):
  files = locations.locate(
    task, source=folder, cache_dir=folder, subsets=subsets
  )
  return sources.read(
    task, files, form=form, held_out=held_out, prompt_words=prompt_words
  )


def _pair(prompt, chosen='a', rejected='b', **fields):
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, **fields}


def _dialogue(prompt, chosen, rejected):
  start = f'\n\nHuman: {prompt}\n\nAssistant:'
  return {'chosen': f'{start}{chosen}', 'rejected': f'{start}{rejected}'}


def _prompts(examples):
  return {example['prompt'] for example in examples}


def test_every_row_is_read_once_and_kept_or_counted(tmp_path):
  rows = [
    _pair('same', 'x', 'x'),
    _pair('blank', ' \n', 'x'),
    _pair('', 'a', 'b'),
    _pair('twice', 'a', 'b'),
    _pair('twice', 'a', 'b'),
    _pair('twice', 'b', 'a'),
    _pair('note', 'a', 'b', source='me'),
  ]
  _write(tmp_path / 'f.jsonl', rows)
  splits, report = _read('jsonl', tmp_path, held_out=0)
  counts = report.splits['train']
  assert counts.read == 7
  assert counts.kept == len(splits['train']) == 4
  assert counts.dropped == {
    'identical responses': 1,
    'empty response': 1,
    'empty prompt': 1,
  }
  assert counts.noticed == {'exact duplicate': 1, 'same pair, other label': 1}
  assert report.unused_fields == {'source': 1}
  assert report.rows_per_file == {'f.jsonl': 7}
  printed = str(report)
  assert 'held_out is 0' in printed
  assert 'field not used: source, in 1 rows' in printed
  cells = [line.split() for line in printed.splitlines()]
  assert ['dropped:', 'empty', 'response', '1', '1'] in cells


def test_sft_drops_only_what_sft_cannot_use(tmp_path):
  _write(tmp_path / 'f.jsonl', [_pair('q', 'x', 'x'), _pair('r', 'a', '')])
  splits, report = _read('jsonl', tmp_path, form='sft', held_out=0)
  assert [e['response'] for e in splits['train']] == ['x', 'a']
  assert report.splits['train'].dropped == {}


def test_unpaired_counts_examples_and_files_count_rows(tmp_path):
  rows = [
    _pair('same', 'x', 'x'),
    _pair('half', ' \n', 'x'),
    _pair('q', 'a', 'b', p=0.75),
    _pair('q', 'b', 'c', p=0.5),
    {'prompt': 'q', 'response': 'a', 'label': 1},
    {'prompt': 'q', 'response': 'b', 'label': True},
    {'prompt': '', 'response': 'b', 'label': 1},
    {'prompt': 'r', 'response': 'b', 'label': 0, 'responses': ['a']},
  ]
  _write(tmp_path / 'f.jsonl', rows)
  splits, report = _read('jsonl', tmp_path, form='unpaired', held_out=0)
  assert [(e['id'], e['response'], e['label']) for e in splits['train']] == [
    ('f/1/rejected', 'x', 0.0),
    ('f/2/chosen', 'a', 0.75),
    ('f/2/rejected', 'b', 0.25),
    ('f/3/chosen', 'b', 0.5),
    ('f/3/rejected', 'c', 0.5),
    ('f/4', 'a', 1.0),
    ('f/5', 'b', 1.0),
    ('f/7', 'b', 0.0),
  ]
  counts = report.splits['train']
  assert (counts.read, counts.kept) == (12, 8)
  assert counts.dropped == {
    'identical responses': 2,
    'empty response': 1,
    'empty prompt': 1,
  }
  assert counts.noticed == {
    'desirable': 3,
    'undesirable': 3,
    'exact duplicate': 1,
    'same response, other label': 1,
  }
  assert report.rows_per_file == {'f.jsonl': 8}
  assert report.unused_fields == {'responses': 1}
  lines = str(report).splitlines()
  assert 'file: f.jsonl, 8 rows' in lines
  assert ['examples', 'train', 'total'] in [line.split() for line in lines]


def test_both_halves_of_a_pair_are_on_one_side(tmp_path):
  files = {
    'hh': ('helpful-base.test.jsonl', lambda q, a: _dialogue(q, a, ' b')),
    'tldr': ('batch3.json', lambda q, a: _comparison(q, None, title=a)),
    'jsonl': ('f.jsonl', lambda q, a: _pair(q, a, 'b')),
  }
  for task, (name, row) in files.items():
    rows = [row(f'q{i % 20}', f' a{i}') for i in range(40)]
    _write(tmp_path / task / name, rows)
    subsets = ('helpful-base',) if task == 'hh' else None
    splits, report = _read(
      task, tmp_path / task, form='unpaired', subsets=subsets
    )
    assert splits['train'] and splits['test']
    assert not _prompts(splits['train']) & _prompts(splits['test'])
    for examples in splits.values():
      sides = [example['id'].rsplit('/', 1) for example in examples]
      for name in {name for name, _ in sides}:
        assert [name, 'chosen'] in sides and [name, 'rejected'] in sides
    assert sum(counts.read for counts in report.splits.values()) == 80
    assert sum(map(len, splits.values())) == 80


def _ranking(prompt, *responses, **fields):
  return {'prompt': prompt, 'responses': list(responses), **fields}


def test_rankings_with_a_repeated_response_are_dropped_whole(tmp_path):
  rows = [
    _ranking('q', 'a', 'b', 'c'),
    _ranking('q', 'a', 'b', 'c', rewards=[3, 2, 1], note=1),
    _ranking('q', 'c', 'b', 'a'),
    _ranking('q', 'a', 'b', 'a'),
    _ranking('q', 'a', 'b', ' '),
    _ranking(' ', 'a', 'b', 'c'),
  ]
  _write(tmp_path / 'f.jsonl', rows)
  splits, report = _read('jsonl', tmp_path, form='rankings', held_out=0)
  assert [e['id'] for e in splits['train']] == ['f/0', 'f/1', 'f/2']
  counts = report.splits['train']
  assert (counts.read, counts.kept) == (6, 3)
  assert counts.dropped == {
    'identical responses': 1,
    'empty response': 1,
    'empty prompt': 1,
  }
  assert counts.noticed == {'exact duplicate': 1}
  assert report.unused_fields == {'note': 1}
  # SFT learns the best response, whatever the others are.
  splits, report = _read('jsonl', tmp_path, form='sft', held_out=0)
  assert [e['response'] for e in splits['train']] == ['a', 'a', 'c', 'a', 'a']


def test_rankings_of_different_lengths_are_one_error(tmp_path):
  rows = [_ranking('q', *'abcd')] * 3 + [_ranking('q', *'ab')] * 2
  _write(tmp_path / 'train.jsonl', rows)
  _write(tmp_path / 'test.jsonl', [_ranking('q', *'abc')])
  with pytest.raises(locations.SourceError) as caught:
    _read('jsonl', tmp_path, form='rankings')
  assert str(caught.value) == (
    'all rankings need the same number of responses, but 2 rows have 2, 1 rows'
    ' have 3, 3 rows have 4; cut each to 2, or make a data set of each number'
  )


def test_sft_leaves_undesirable_responses_out_and_counts_them(tmp_path):
  rows = [
    {'prompt': 'q', 'response': 'a', 'label': 1},
    {'prompt': 'q', 'response': 'b', 'label': 0},
    {'prompt': 'q', 'response': 'c'},
  ]
  _write(tmp_path / 'f.jsonl', rows)
  splits, report = _read('jsonl', tmp_path, form='sft', held_out=0)
  assert [e['response'] for e in splits['train']] == ['a', 'c']
  counts = report.splits['train']
  assert (counts.read, counts.kept) == (3, 2)
  assert counts.dropped == {'undesirable response': 1}


def test_rewards_that_contradict_the_label_are_noticed(tmp_path):
  rows = [
    _pair(f'{n}', chosen_reward=reward, rejected_reward=1)
    for n, reward in enumerate([0, 1, 2])
  ]
  _write(tmp_path / 'f.jsonl', [*rows, _pair('none')])
  _, report = _read('jsonl', tmp_path, held_out=0)
  counts = report.splits['train']
  assert counts.noticed == {'rejected has the higher reward': 1}
  assert counts.kept == 4 and report.unused_fields == {}


def test_own_split_is_by_prompt_and_does_not_move(tmp_path):
  rows = [_pair(f'q{i % 40}', f'a{i}') for i in range(120)]
  _write(tmp_path / 'one' / 'f.jsonl', rows)
  splits, report = _read('jsonl', tmp_path / 'one')
  train, test = _prompts(splits['train']), _prompts(splits['test'])
  assert not train & test
  assert train | test == {f'q{i}' for i in range(40)}
  assert 4 <= len(test) <= 16
  assert 'not an official protocol' in report.split_rule
  # More rows in another order: a prompt stays on its side.
  more = [_pair(f'r{i}') for i in range(40)] + rows[::-1]
  _write(tmp_path / 'two' / 'f.jsonl', more)
  splits, _ = _read('jsonl', tmp_path / 'two')
  assert _prompts(splits['test']) & (train | test) == test


def test_own_split_is_never_empty_on_a_side(tmp_path):
  _write(tmp_path / 'f.jsonl', [_pair('a'), _pair('b')])
  for held_out in (1e-9, 1 - 1e-9):
    splits, _ = _read('jsonl', tmp_path, held_out=held_out)
    assert [len(splits[name]) for name in ('train', 'test')] == [1, 1]
  _write(tmp_path / 'f.jsonl', [_pair('a')])
  with pytest.raises(locations.SourceError, match='set held_out to 0'):
    _read('jsonl', tmp_path)


def test_train_and_test_files_are_the_split(tmp_path):
  _write(tmp_path / 'train.jsonl', [_pair('a'), _pair('b')])
  _write(tmp_path / 'test.jsonl.gz', [_pair('b'), _pair('c')])
  splits, report = _read('jsonl', tmp_path)
  assert _prompts(splits['train']) == {'a', 'b'}
  assert _prompts(splits['test']) == {'b', 'c'}
  assert report.splits['test'].noticed == {'prompt also in train': 1}


def test_hh_official_files_keep_their_split(tmp_path):
  for split in ('train', 'test'):
    _write(
      tmp_path / 'helpful-base' / f'{split}.jsonl.gz',
      [_dialogue(split, ' good', ' bad')],
    )
  splits, report = _read('hh', tmp_path, subsets=('helpful-base',))
  assert splits['train'][0]['prompt'] == '\n\nHuman: train\n\nAssistant:'
  assert splits['test'][0]['id'] == 'helpful-base/test/0'
  assert report.split_rule == 'as the files say'


def test_hh_conversation_stays_on_one_side(tmp_path):
  rows = []
  for i in range(60):
    rows.append(_dialogue(f'{i}', ' a', ' b'))
    rows.append(_dialogue(f'{i}\n\nAssistant: a\n\nHuman: go on', ' c', ' d'))
  rows.append(_dialogue('cut', ' x\n\nHuman: 1\n\nAssistant: y', ' z'))
  _write(tmp_path / 'helpful-base.test.jsonl', rows)
  splits, report = _read('hh', tmp_path, subsets=('helpful-base',))
  openings = [
    {e['prompt'].split('\n\nAssistant:')[0] for e in splits[name]}
    for name in ('train', 'test')
  ]
  assert not openings[0] & openings[1]
  assert len(openings[0] | openings[1]) == 61
  noticed = [c.noticed for c in report.splits.values()]
  assert {'response holds further turns': 1} in noticed
  assert '121 test' in report.split_rule


def _comparison(name, split, **info):
  return {
    'info': {'id': name, 'post': name, 'title': 't', 'subreddit': 's', **info},
    'summaries': [{'text': ' a'}, {'text': ' b'}],
    'choice': 0,
    'split': split,
  }


def test_tldr_splits_by_post_whatever_names_it(tmp_path):
  # Each post: with an id; edited under the same id; and without an id.
  rows = []
  for i in range(30):
    rows.append(_comparison(f'p{i}', None))
    rows.append(_comparison(f'p{i}', None, post=f'p{i} edited'))
    rows.append(_pair(f'TITLE: t\n\nPOST: p{i} edited\n\nTL;DR:'))
  _write(tmp_path / 'batch3.json', rows)
  splits, _ = _read('tldr', tmp_path)
  posts = [
    [e['prompt'].split('POST: ')[1].split()[0] for e in splits[name]]
    for name in ('train', 'test')
  ]
  assert not set(posts[0]) & set(posts[1])
  assert all(side.count(p) == 3 for side in posts for p in side)


def test_tldr_labels_are_the_split_where_every_row_has_one(tmp_path):
  rows = [_comparison('a', 'train'), _comparison('b', 'valid2')]
  _write(tmp_path / 'batch3.json', rows)
  splits, report = _read('tldr', tmp_path)
  assert [len(splits[name]) for name in ('train', 'test')] == [1, 1]
  assert 'POST: b' in splits['test'][0]['prompt']
  _write(tmp_path / 'batch4.json', [_comparison('c', 'valid1')])
  splits, report = _read('tldr', tmp_path, subsets=('batch4', 'batch3'))
  assert report.split_rule == 'as the files say'
  _write(tmp_path / 'more.jsonl', [_pair('x')])
  _, report = _read('tldr', tmp_path)
  assert 'the files have 1 train, 2 test, 1 unlabelled' in report.split_rule


def _archive(path, reviews):
  with tarfile.open(path, 'w:gz') as archive:
    for name, text in reviews.items():
      member = tarfile.TarInfo(f'aclImdb/{name}')
      member.size = len(text.encode())
      archive.addfile(member, io.BytesIO(text.encode()))


def test_imdb_archive_and_lines_agree_and_share_no_text(tmp_path):
  _archive(
    tmp_path / 'aclImdb_v1.tar.gz',
    {
      'README': 'not a review',
      'train/unsup/0_0.txt': 'not labelled',
      'train/pos/10_9.txt': 'Great film it was',
      'train/pos/2_8.txt': 'Shared café text here',
      'train/neg/0_1.txt': 'Bad film it was',
      'test/neg/0_2.txt': 'Shared café text here',
      'test/pos/0_2.txt': 'Four words it has',
    },
  )
  splits, report = _read('imdb', tmp_path, form='reviews')
  assert splits['train'] == [
    {'id': 'train/neg/0', 'text': 'Bad film it was', 'label': 0},
    {'id': 'train/pos/10', 'text': 'Great film it was', 'label': 1},
  ]
  assert len(splits['test']) == 2
  assert report.splits['train'].dropped == {'text also in test': 1}
  lines = tmp_path / 'lines'
  shared = {'id': 'train/pos/2', 'text': 'Shared café text here', 'label': 1}
  _write(lines / 'train.jsonl.gz', [*splits['train'], shared])
  _write(lines / 'test.jsonl.gz', splits['test'])
  again, report_again = _read('imdb', lines, form='reviews')
  assert again == splits
  assert report_again.splits == report.splits
  sft, report = _read('imdb', tmp_path, form='sft', prompt_words=3)
  assert sft['train'][0]['prompt'] == 'Bad film it'
  assert sft['train'][0]['response'] == ' was'
  _, report = _read('imdb', lines, form='sft', prompt_words=3)
  with pytest.raises(locations.SourceError, match="'empty response': 2"):
    _read('imdb', lines, form='sft', prompt_words=4)


def test_all_bad_rows_are_listed_with_file_and_line(tmp_path):
  lines = [json.dumps(_pair('ok')), '{"prompt": ', '[1]', '', '{"prompt": "q"}']
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'b.jsonl').write_bytes(b'{"prompt": "\xff"}\n')
  (tmp_path / 'c.jsonl').write_text('\n \n')
  whole = gzip.compress(json.dumps(_pair('ok')).encode() * 99)
  (tmp_path / 'd.jsonl.gz').write_bytes(whole[:-9])
  with pytest.raises(locations.SourceError) as caught:
    _read('jsonl', tmp_path)
  message = str(caught.value)
  for expected in (
    '6 bad rows, nothing was written',
    'a.jsonl:2: malformed JSON',
    'a.jsonl:3: no JSON object',
    "a.jsonl:5: field 'chosen' is missing",
    'b.jsonl:1: malformed JSON',
    'c.jsonl: the file is empty',
    f'{tmp_path}/d.jsonl.gz:1: broken gzip file',
  ):
    assert expected in message, message
  assert 'a.jsonl:1' not in message


def test_every_one_of_many_bad_rows_is_listed(tmp_path):
  _write(tmp_path / 'f.jsonl', [{}] * 1234)
  with pytest.raises(locations.SourceError) as caught:
    _read('jsonl', tmp_path)
  headline, *lines = str(caught.value).splitlines()
  assert headline.startswith('1,234 bad rows')
  assert lines == [
    f"  {tmp_path}/f.jsonl:{number}: field 'prompt' is missing"
    for number in range(1, 1235)
  ]


def test_broken_archive_is_an_error(tmp_path):
  path = tmp_path / 'aclImdb_v1.tar.gz'
  _archive(path, {f'train/pos/{i}_9.txt': f'{i} x' * 99 for i in range(50)})
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(
    locations.SourceError, match=rf'{path}:\d+: broken archive .*fetch it again'
  ):
    _read('imdb', tmp_path, form='reviews')


@pytest.mark.parametrize(
  'task, keywords, message',
  [
    ('jsnol', {}, "unknown task 'jsnol'; did you mean 'jsonl'"),
    ('jsonl', {'form': 'pair'}, "did you mean 'pairs'"),
    ('imdb', {'form': 'pairs'}, 'unknown form of imdb'),
    ('hh', {'form': 'rankings'}, 'unknown form of hh'),
    ('jsonl', {'held_out': 1.0}, r'must lie in \[0, 1\)'),
    ('imdb', {'form': 'sft'}, 'needs prompt_words'),
    ('jsonl', {'prompt_words': 3}, 'only for IMDb'),
  ],
)
def test_arguments_without_sense_are_errors(task, keywords, message):
  with pytest.raises(ValueError, match=message):
    usual = {'form': 'pairs', 'held_out': 0.1, 'prompt_words': None}
    sources.check_arguments(task, **{**usual, **keywords})


def test_real_hh_counts(shared):
  splits, report = _read('hh', shared / 'data' / 'hh', held_out=0.1)
  counts = report.splits.values()
  assert sum(c.read for c in counts) == 8552
  for reason, number in (('identical responses', 36), ('empty response', 11)):
    assert sum(c.dropped[reason] for c in counts) == number
  assert sum(map(len, splits.values())) == 8505
  assert not _prompts(splits['train']) & _prompts(splits['test'])
