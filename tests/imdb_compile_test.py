"""The table of controlled sentiment is that of `experiments.imdb_compile`."""

import json
import sys

import pytest

from experiments import imdb_compile
from experiments import imdb_scales

GIB = 2**30


def record(name):
  """A record of a config: a second or two a step, 3 of 15.75 GiB."""
  program = {
    'name': 'step',
    'what': 'some groups',
    'times': 1,
    'needed': 3 * GIB,
    'usable': 15.75 * GIB,
    'at_best': 1.0,
  }
  return {
    'name': name,
    'asked': imdb_compile.asked(name),
    'step': [1.0, 2.0],
    'programs': [program] * (3 if name.startswith('ppo') else 1),
  }


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes records to a copy of the folder, whose page has a place for them."""
  page, results = tmp_path / 'page.md', tmp_path / 'records.jsonl'
  page.write_text(
    'before\n<!-- imdb_compile -->\n<!-- /imdb_compile -->\nafter\n'
  )
  monkeypatch.setattr(imdb_compile, 'PAGE', page)
  monkeypatch.setattr(imdb_compile, 'RESULTS', results)
  monkeypatch.setattr(sys, 'argv', ['imdb_compile', '--render'])

  def written(records):
    results.write_text(''.join(json.dumps(r) + '\n' for r in records))
    return page

  return written


def test_the_page_shows_the_records_and_every_program_fits():
  page = imdb_compile.PAGE.read_text()
  assert imdb_compile.page() == page, 'run imdb_compile --render'
  found, _ = imdb_compile.records()
  assert found
  for name, one in found.items():
    for program in one['programs']:
      # What it takes and what lies beside it, of what the compiler allows.
      least = sum(program['place'].values())
      assert least < program['needed'] < program['usable'], name


def test_every_run_is_of_a_config_that_is_compiled():
  """Runs of a method differ in nothing that decides its programs."""
  for run in map(imdb_scales.parse, imdb_scales.FULL):
    name = imdb_compile.SAME.get(run.method, run.method)
    paths = imdb_scales.Paths('elsewhere')
    config = imdb_scales.run_config(run, imdb_compile.SCALE, paths)
    assert imdb_compile.deciding(config) == imdb_compile.asked(name)


def test_the_table_adds_up(write):
  page = write(map(record, imdb_compile.NAMES))
  imdb_compile.main()
  text = page.read_text()
  assert text.startswith('before\n') and text.endswith('\nafter\n')
  # Twelve runs of PPO of 800 steps, ten offline of one epoch of 150,000 pairs.
  hours = (12 * 800 + 10 * 2344) / 3600
  assert f'| all 22 runs |  |  |  |  | {hours:.1f} to {2 * hours:.1f} |' in text
  assert '| ppo, ppo_gt_ours: 8 runs | step x 1, step x 1, step x 1 |' in text
  assert '| GiB needed, of 15.75 |' in text


def test_missing_records_and_those_of_other_configs_are_named(write):
  records = [record(name) for name in imdb_compile.NAMES if name != 'dpo']
  for found in records:
    if found['name'] == 'ppo':
      found['asked']['batch_size'] = 8
  page = write(records)
  says = r'dpo has no record, .* ppo is of another .*--only dpo ppo$'
  with pytest.raises(SystemExit, match=says):
    imdb_compile.main()
  text = page.read_text()
  assert '| sft |' in text and '| ppo_gt_trl: 4 runs |' in text
  for absent in ('| dpo', '| ppo,', 'all 22 runs'):
    assert absent not in text
