"""The table of docs/scaling.md is that of `experiments.compile_table`."""

import copy
import json
import shutil
import subprocess
import sys

import pytest

from experiments import compile_table

RECORDS = [
  json.loads(line) for line in compile_table.RESULTS.read_text().splitlines()
]


@pytest.fixture
def copies(tmp_path, monkeypatch):
  """Points the module at copies of the page and of its records."""
  for name in ('RESULTS', 'PAGE'):
    path = getattr(compile_table, name)
    shutil.copy(path, tmp_path)
    monkeypatch.setattr(compile_table, name, tmp_path / path.name)


def write(records):
  lines = ''.join(json.dumps(record) + '\n' for record in records)
  compile_table.RESULTS.write_text(lines)


def run(monkeypatch, *options):
  monkeypatch.setattr(sys, 'argv', ['compile_table', *options])
  compile_table.main()


def test_every_row_has_one_record_and_it_is_of_what_the_row_asks():
  for number, record in enumerate(RECORDS):
    asked = compile_table.asked(number)
    assert {name: record[name] for name in asked} == asked
  assert len(RECORDS) == len(compile_table.ROWS)


def test_the_page_shows_the_records():
  page = compile_table.PAGE.read_text()
  assert compile_table.page() == page, 'run compile_table --render'


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('task', 'HH'),
    ('model', 'gpt2-xl'),
    ('slice', 'v5e-16'),
    ('pairs', 64),
    ('mesh', {'data': 8, 'fsdp': 1, 'tensor': 1}),
    ('remat', 'none'),
    ('accumulate', 2),
    ('flags', '--xla_some_option=1'),
  ],
)
@pytest.mark.usefixtures('copies')
def test_records_of_other_programs_are_refused(monkeypatch, name, value):
  records = copy.deepcopy(RECORDS)
  records[0][name] = value
  write(records)
  page = compile_table.PAGE.read_text()
  says = rf'row 0 \(.*\): {name} is .*; run .*compile_table --row 0$'
  with pytest.raises(SystemExit, match=says):
    run(monkeypatch, '--render')
  assert compile_table.PAGE.read_text() == page


@pytest.mark.usefixtures('copies')
def test_rows_without_a_record_are_named(monkeypatch):
  write(RECORDS[:2] + RECORDS[3:5] + RECORDS[6:])
  with pytest.raises(SystemExit, match=r'(?s)row 2 .*row 5 .*--row 2 5$'):
    run(monkeypatch, '--render')


@pytest.mark.usefixtures('copies')
def test_a_compiled_row_takes_the_place_of_its_record(monkeypatch):
  number = 3
  new = RECORDS[number] | {'compile_seconds': 4321}
  asked = []

  def compiled(command, **_):
    asked.append(command[-1])
    return subprocess.CompletedProcess(command, 0, f'said\n{json.dumps(new)}\n')

  monkeypatch.setattr(compile_table.subprocess, 'run', compiled)
  run(monkeypatch, '--row', str(number))
  assert asked == [f'--inside={number}']
  lines = compile_table.RESULTS.read_text().splitlines()
  expected = RECORDS[:number] + [new] + RECORDS[number + 1 :]
  assert [json.loads(line) for line in lines] == expected
  assert '| 4321 s, ' in compile_table.PAGE.read_text()


@pytest.mark.usefixtures('copies')
def test_rows_that_do_not_compile_keep_their_records_and_are_an_error(
  monkeypatch,
):
  before = compile_table.RESULTS.read_text()
  monkeypatch.setattr(
    compile_table.subprocess,
    'run',
    lambda command, **_: subprocess.CompletedProcess(command, 1, ''),
  )
  with pytest.raises(SystemExit, match=r'^not compiled: row 6 .*--row 6 9$'):
    run(monkeypatch, '--row', '6', '9')
  assert compile_table.RESULTS.read_text() == before


def test_rows_that_are_not_there_are_refused(monkeypatch, capsys):
  with pytest.raises(SystemExit):
    run(monkeypatch, '--row', '6', '99')
  assert 'invalid choice: 99' in capsys.readouterr().err
