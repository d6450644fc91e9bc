"""The table of controlled sentiment is that of `experiments.imdb_compile`."""

import shutil
import sys

import pytest

from experiments import imdb_compile
from experiments import imdb_scales


@pytest.fixture
def copies(tmp_path, monkeypatch):
  """Points the module at copies of the page and of its records."""
  for name in ('RESULTS', 'PAGE'):
    path = getattr(imdb_compile, name)
    shutil.copy(path, tmp_path)
    monkeypatch.setattr(imdb_compile, name, tmp_path / path.name)


def test_the_page_shows_the_records():
  page = imdb_compile.PAGE.read_text()
  assert imdb_compile.page() == page, 'run imdb_compile --render'


def test_every_program_of_the_scale_fits():
  for name, record in imdb_compile.records().items():
    for program in record['programs']:
      # What it takes and what lies beside it, of what the compiler allows.
      needed = sum(program['place'].values())
      assert needed < program['needed'] < program['usable'], name


def test_every_run_is_of_a_config_that_is_compiled():
  """Runs of a method differ in nothing that decides its programs."""
  for run in map(imdb_scales.parse, imdb_scales.FULL):
    name = imdb_compile.SAME.get(run.method, run.method)
    config = imdb_scales.run_config(
      run, imdb_compile.SCALE, imdb_scales.Paths('elsewhere')
    )
    assert imdb_compile.deciding(config) == imdb_compile.asked(name)


@pytest.mark.usefixtures('copies')
def test_missing_records_and_those_of_other_configs_are_named(monkeypatch):
  lines = imdb_compile.RESULTS.read_text().splitlines(keepends=True)
  lines = [line for line in lines if '"name": "dpo"' not in line]
  lines = [
    line.replace('"batch_size": 256', '"batch_size": 8') for line in lines
  ]
  imdb_compile.RESULTS.write_text(''.join(lines))
  page = imdb_compile.PAGE.read_text()
  monkeypatch.setattr(sys, 'argv', ['imdb_compile', '--render'])
  says = r'dpo has no record, .* ppo is of another .*--only dpo ppo$'
  with pytest.raises(SystemExit, match=says):
    imdb_compile.main()
  assert imdb_compile.PAGE.read_text() == page
