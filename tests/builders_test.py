import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from dpo_jax.data import builders
from dpo_jax.data import forms
from dpo_jax.data import locations
from dpo_jax.data import records
from dpo_jax.data import sources

_EXAMPLE = {
  'id': 'é',
  'prompt': 'q\n☃ 0',
  'chosen': ' a',
  'rejected': 'b',
  'weight': 0.5,
  'p': 0.75,
  'chosen_ended': False,
  'rejected_ended': True,
  'chosen_reward': 2.5,
  'rejected_reward': -1.0,
  'chat': False,
}


def _write(folder, rows):
  folder.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (folder / 'f.jsonl').write_text(text)


def _rows(number):
  rows = [{**_EXAMPLE, 'prompt': f'q\n☃ {i}'} for i in range(number)]
  return [*rows, {**_EXAMPLE, 'chosen': 'b'}]


def _load(folder, cache, **keywords):
  keywords = {'form': 'pairs', 'held_out': 0.2, **keywords}
  return builders.load('jsonl', source=folder, cache_dir=cache, **keywords)


def _folders(cache):
  return list((cache / 'jsonl').iterdir())


def test_every_task_is_in_all_tables():
  for table in (locations.PLACES, records.TASKS):
    assert table.keys() == builders.BUILDERS.keys()
  for name, builder in builders.BUILDERS.items():
    assert builder.name == name
    assert set(records.TASKS[name].forms) <= forms.FIELDS.keys()


def test_examples_come_back_as_they_went_in(tmp_path):
  _write(tmp_path / 'in', _rows(50))
  dataset = _load(tmp_path / 'in', tmp_path / 'cache')
  train, test = dataset.splits['train'], dataset.splits['test']
  assert len(train) + len(test) == 50
  expected, report = sources.read(
    'jsonl',
    [locations.RawFile(tmp_path / 'in/f.jsonl', 'f.jsonl', None)],
    form='pairs',
    held_out=0.2,
    prompt_words=None,
  )
  assert list(train) == expected['train']
  assert dataset.report == report
  assert train[0] == train[-len(train)] == train[:1][0] == expected['train'][0]
  assert list(train[0]) == list(_EXAMPLE)
  assert {name: type(value) for name, value in train[0].items()} == {
    name: type(value) for name, value in _EXAMPLE.items()
  }
  with pytest.raises(IndexError):
    train[len(train)]


def test_absent_rewards_come_back_as_none(tmp_path):
  row = {n: v for n, v in _EXAMPLE.items() if not n.endswith('_reward')}
  _write(tmp_path / 'in', [row])
  dataset = _load(tmp_path / 'in', tmp_path / 'cache', held_out=0.0)
  assert dataset.splits['train'][0] == {
    **_EXAMPLE,
    'chosen_reward': None,
    'rejected_reward': None,
  }


def test_rankings_come_back_as_they_went_in(tmp_path):
  row = {
    'id': 'é',
    'prompt': 'q',
    'responses': ['☃', ' b', 'c'],
    'rewards': [1.5, 0.0, -2.0],
    'weight': 0.5,
    'ended': [True, False, True],
    'chat': False,
  }
  plain = {**row, 'id': 'plain', 'rewards': []}
  given = {n: v for n, v in plain.items() if n != 'rewards'}
  _write(tmp_path / 'in', [row, given])
  dataset = _load(
    tmp_path / 'in', tmp_path / 'cache', form='rankings', held_out=0.0
  )
  train = dataset.splits['train']
  assert list(train) == [row, plain]
  for name in ('responses', 'rewards', 'ended'):
    assert type(train[0][name]) is list
    assert {*map(type, train[0][name])} == {type(row[name][0])}


def test_unpaired_examples_come_back_as_they_went_in(tmp_path):
  _write(tmp_path / 'in', [_EXAMPLE])
  dataset = _load(
    tmp_path / 'in', tmp_path / 'cache', form='unpaired', held_out=0.0
  )
  both = {'prompt': 'q\n☃ 0', 'weight': 0.5, 'chat': False}
  assert list(dataset.splits['train']) == [
    {**both, 'id': 'é/chosen', 'response': ' a', 'label': 0.75, 'ended': False},
    {**both, 'id': 'é/rejected', 'response': 'b', 'label': 0.25, 'ended': True},
  ]
  report = str(dataset.report)
  assert 'file: f.jsonl, 1 rows' in report and 'read' in report
  assert dataset.report.splits['train'].read == 2


def test_second_load_reads_the_cache_and_the_report(tmp_path, monkeypatch):
  _write(tmp_path / 'in', _rows(20))
  first = _load(tmp_path / 'in', tmp_path / 'cache')
  monkeypatch.setattr(sources, 'read', None)  # Calling it would raise.
  second = _load(tmp_path / 'in', tmp_path / 'cache')
  assert second.report == first.report
  assert str(second.report) == str(first.report)
  assert len(_folders(tmp_path / 'cache')) == 1
  assert list(second.splits['train']) == list(first.splits['train'])


@pytest.mark.parametrize(
  'keywords',
  [
    {'held_out': 0.3},
    {'form': 'sft'},
    {'form': 'unpaired'},
    {'held_out': 0.0},
  ],
)
def test_other_arguments_are_another_data_set(tmp_path, keywords):
  _write(tmp_path / 'in', _rows(20))
  first = _load(tmp_path / 'in', tmp_path / 'cache')
  other = _load(tmp_path / 'in', tmp_path / 'cache', **keywords)
  assert other.report != first.report
  assert len(_folders(tmp_path / 'cache')) == 2


def test_changed_source_is_read_again(tmp_path):
  _write(tmp_path / 'in', _rows(20))
  assert _load(tmp_path / 'in', tmp_path / 'cache').report.splits['train'].kept
  _write(tmp_path / 'in', [{**row, 'chosen': 'new'} for row in _rows(20)])
  dataset = _load(tmp_path / 'in', tmp_path / 'cache')
  assert {e['chosen'] for e in dataset.splits['train']} == {'new'}


def _files(folder):
  return [p for p in folder.rglob('*') if p.is_file() and p.suffix != '.lock']


def test_bad_rows_write_nothing(tmp_path):
  _write(tmp_path / 'in', [*_rows(20), {'prompt': 'q'}])
  with pytest.raises(locations.SourceError, match=r'22: field .chosen'):
    _load(tmp_path / 'in', tmp_path / 'cache')
  assert _files(tmp_path / 'cache') == []


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
  _write(tmp_path / 'in', _rows(20))

  def fail(*arguments):
    yield 0, arguments[-1][0]
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(builders.Jsonl, '_generate_examples', fail)
    with pytest.raises(OSError, match='disk full'):
      _load(tmp_path / 'in', tmp_path / 'cache')
  assert _files(tmp_path / 'cache') == []
  dataset = _load(tmp_path / 'in', tmp_path / 'cache')
  assert sum(map(len, dataset.splits.values())) == 20


def test_killed_while_writing_is_as_if_never_begun(tmp_path):
  _write(tmp_path / 'in', _rows(20))
  program = textwrap.dedent("""
    import os, signal, sys
    from dpo_jax.data import builders
    generate = builders.Jsonl._generate_examples
    def kill(self, split, examples):
      yield from generate(self, split, examples)
      if split == 'test':
        os.kill(os.getpid(), signal.SIGKILL)
    builders.Jsonl._generate_examples = kill
    builders.load('jsonl', source=sys.argv[1], cache_dir=sys.argv[2],
                  form='pairs', held_out=0.2)
  """)
  folders = [str(tmp_path / 'in'), str(tmp_path / 'cache')]
  root = str(pathlib.Path(builders.__file__).parents[2])
  killed = subprocess.run(
    [sys.executable, '-c', program, *folders],
    env={**os.environ, 'PYTHONPATH': root},
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL
  assert list((tmp_path / 'cache').glob('jsonl/*/incomplete.*'))
  dataset = _load(*folders)
  assert sum(map(len, dataset.splits.values())) == 20
  assert not list((tmp_path / 'cache').glob('jsonl/*/incomplete.*'))


def test_loading_prints_nothing_and_needs_no_tensorflow_and_no_jax(tmp_path):
  _write(tmp_path / 'in', _rows(20))
  program = textwrap.dedent(
    """
    import sys
    from dpo_jax.data import builders
    for _ in range(2):
      dataset = builders.load(
          'jsonl', source=sys.argv[1], cache_dir=sys.argv[2], form='sft',
          held_out=0.2)
    print(sum(len(list(e)) for e in dataset.splits.values()))
    print({'tensorflow', 'jax'} & set(sys.modules))
  """
    ''
  )
  root = str(pathlib.Path(builders.__file__).parents[2])
  done = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path / 'in'), str(tmp_path / 'c')],
    env={**os.environ, 'PYTHONPATH': root},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == '21\nset()\n'
  assert 'WARNING' not in done.stderr


@pytest.mark.parametrize(
  'task, name, rows, form, kept',
  [
    (
      'hh',
      'helpful-base.test.jsonl',
      [
        {
          'chosen': f'\n\nHuman: {i}\n\nAssistant: y',
          'rejected': f'\n\nHuman: {i}\n\nAssistant: n',
        }
        for i in range(9)
      ],
      'pairs',
      9,
    ),
    (
      'tldr',
      'batch3.json',
      [
        {
          'info': {'id': f'{i}', 'post': f'{i}', 'title': '', 'subreddit': 's'},
          'summaries': [{'text': 'a'}, {'text': 'b'}],
          'choice': 0,
          'split': 'train',
        }
        for i in range(9)
      ],
      'pairs',
      9,
    ),
  ],
)
def test_tasks_have_builders(tmp_path, task, name, rows, form, kept):
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / name).write_text(text)
  dataset = builders.load(
    task,
    source=tmp_path,
    form=form,
    cache_dir=tmp_path / 'cache',
    held_out=0.3,
    subsets=(name.split('.')[0],),
  )
  assert sum(map(len, dataset.splits.values())) == kept
  assert dataset.report.task == task


def test_imdb_reviews_keep_label_and_text(tmp_path):
  for split in ('train', 'test'):
    row = {'id': f'{split}/pos/0', 'text': f'{split} é', 'label': 1}
    (tmp_path / f'{split}.jsonl').write_text(json.dumps(row) + '\n')
  dataset = builders.load(
    'imdb',
    source=tmp_path,
    form='reviews',
    cache_dir=tmp_path / 'cache',
    held_out=0.0,
  )
  assert dataset.splits['test'][0] == row
