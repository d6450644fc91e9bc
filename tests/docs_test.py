"""docs/losses.md: it is current, and what it shows is true."""

import doctest
import importlib
import json
import pathlib
import re
import shlex
import sys

import ml_collections.config_flags
import numpy as np
import pytest
from absl import flags

from dpo_jax import metrics
from dpo_jax import settings
from dpo_jax import train
from dpo_jax.losses import comparisons
from dpo_jax.losses import table
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'docs' / 'losses.md').read_text()


@pytest.fixture(scope='module')
def make_losses():
  """The script docs/make_losses.py as a module, which finds its neighbour."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / 'docs')
    yield importlib.import_module('make_losses')


@pytest.fixture
def curves(make_losses):
  return make_losses.loss_curves


# --- The files ---


def test_page_is_current(make_losses):
  assert make_losses.stale_page() == [], 'run docs/make_losses.py'


def test_pictures_are_current(make_losses):
  stale = '\n'.join(make_losses.stale_pictures())
  assert not stale, f'run docs/make_losses.py:\n{stale}'


def test_rows_of_a_module_stand_together(make_losses, monkeypatch):
  rows = {n: row for n, row in table.LOSSES.items() if n != 'dpo'}
  last = rows | {'dpo': table.LOSSES['dpo']}
  monkeypatch.setattr(table, 'LOSSES', last)
  with pytest.raises(ValueError, match=r"do not stand together.*'dpo'"):
    make_losses.sections()


def test_new_and_removed_losses_are_noticed(make_losses, monkeypatch):
  stored = json.loads(make_losses.CURVES.read_text())
  monkeypatch.setattr(
    make_losses.loss_curves, 'samples', lambda: stored | {'extra': {}}
  )
  rows = {n: row for n, row in table.LOSSES.items() if n != 'orpo'}
  rows['extra'] = table.Loss(comparisons.bradley_terry)  # of the last module
  monkeypatch.setattr(table, 'LOSSES', rows)
  assert make_losses.stale_page()
  assert make_losses.stale_pictures() == [
    'extra.svg is missing',
    'orpo.svg is left over',
    'the curves of extra are not those of curves.json',
  ]


def test_moved_curves_are_noticed(curves):
  stored = {'a': {'loss': {'': [1.0, 2.0]}}, 'b': {'loss': {'': [0.0, 1.0]}}}
  assert curves.differing(stored, {'a': stored['a']}) == ['b']
  for value, differ in ((2.01, ['a']), (2.0001, [])):
    moved = stored | {'a': {'loss': {'': [1.0, value]}}}
    assert curves.differing(stored, moved) == differ
  assert curves.differing(stored, stored | {'a': {'weight': {}}}) == ['a']
  tiny = stored | {'b': {'loss': {'': [1e-9, 1.0]}}}
  assert curves.differing(stored, tiny) == []


# --- The code ---


def blocks(language):
  return re.findall(rf'^```{language}\n(.*?)^```$', TEXT, re.M | re.S)


def test_every_python_block_runs_by_itself_and_gives_what_it_shows():
  assert len(blocks('python')) == len(table.LOSSES) + 3
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  for number, block in enumerate(blocks('python')):
    test = doctest.DocTestParser().get_doctest(
      block, {}, f'block {number}', 'losses.md', None
    )
    assert test.examples
    runner.run(test)
  assert runner.summarize().failed == 0


def test_the_command_trains_with_its_options(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  (command,) = blocks('bash')
  program, verb, *arguments = shlex.split(command.replace('\\\n', ''))
  assert (program, verb) == ('dpo-jax', 'train')
  values = flags.FlagValues()
  ml_collections.config_flags.DEFINE_config_file('config', flag_values=values)
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  small = [x.replace('loss=', 'debug,loss=') for x in arguments]
  monkeypatch.setattr(sys, 'argv', [program, *small])  # read for --config.KEY
  assert values(sys.argv) == [program]
  config = values.config
  config.data.source = str(worlds.write_pairs(tmp_path))
  config.data.cache_dir = str(tmp_path / 'data')
  config.eval.samples.num_prompts = 0
  train.train(settings.Settings(config.to_dict()), tmp_path / 'run')
  assert config.loss.dpo.link == 'forward_kl'
  record = metrics.read(tmp_path / 'run')[1]
  np.testing.assert_allclose(
    record['train/loss'],
    record['train/loss/dpo'] + 0.2 * record['train/loss/sft'],
    rtol=1e-6,
  )


def test_links_lead_somewhere():
  headings = re.findall(r'^#+ (.*)$', TEXT, re.M)
  anchors = {heading.lower().replace(' ', '-') for heading in headings}
  links = set(re.findall(r'\]\(#([^)]*)\)', TEXT))
  assert links >= set(table.LOSSES) and links <= anchors
  pictures = re.findall(r'!\[.*\]\(([^)]*)\)', TEXT)
  assert len(pictures) == len(table.LOSSES) + 1
  assert all((ROOT / 'docs' / path).exists() for path in pictures)


# --- The docstrings ---

REGULAR = """Summary: of one line.

Equation: x
  + y
Source: s
Sign: -
Tokens: sum
Defaults: none

>>> 1
1
"""


def documented(text):
  def example():
    pass

  example.__doc__ = text
  return example


def test_docstrings_are_taken_apart(make_losses):
  text = REGULAR.replace('\nEq', '\nA note\nof two lines.\n\nEq')
  assert make_losses.read_docstring(documented(text)) == {
    'summary': 'Summary: of one line.',
    'notes': ['A note of two lines.'],
    'Equation': 'x + y',
    'Source': 's',
    'Sign': '-',
    'Tokens': 'sum',
    'Defaults': 'none',
    'example': '>>> 1\n1',
  }


@pytest.mark.parametrize(
  'old, new, message',
  [
    ('one line.', 'one\nline.', 'summary of one line'),
    ('>>> 1\n1\n', '1', 'must end with'),
    ('  + y', '+ y', "'\\+ y' is no labelled line"),
    ('  + y', '    + y', 'is no labelled line'),
    ('Source', 'Sources', 'is no labelled line'),
    ('Sign: -', 'Sign:', 'is no labelled line'),
    ('Tokens: sum', 'Sign: -', 'is no labelled line'),
    ('Sign: -\n', '', "needs .*'Sign'"),
    ('Sign: -\nTokens: sum', 'Tokens: sum\nSign: -', 'needs'),
  ],
)
def test_irregular_docstrings_are_refused(make_losses, old, new, message):
  assert old in REGULAR
  with pytest.raises(ValueError, match=message):
    make_losses.read_docstring(documented(REGULAR.replace(old, new)))


# --- The pictures ---


def test_curves_of_dpo_are_its_equation(curves):
  h = np.array([-50.0, -3.0, 0.0, 20.0])
  both = curves.curves('dpo', h)
  np.testing.assert_allclose(both['loss'][''], np.logaddexp(0.0, -0.1 * h))
  weight = 0.1 / (1.0 + np.exp(0.1 * h))
  for side in ('chosen', 'rejected'):
    np.testing.assert_allclose(both['weight'][side], weight)


def test_weights_are_by_sums_of_log_probs_even_of_means(curves):
  h = np.array([-50.0, -3.0, 0.0, 20.0])
  z = 2.0 * h / curves.TOKENS - 1.0  # SimPO's beta and gamma
  np.testing.assert_allclose(
    curves.curves('simpo', h)['weight']['chosen'],
    2.0 / curves.TOKENS / (1.0 + np.exp(z)),
    rtol=1e-6,  # 1/|y| is a float32
  )


@pytest.mark.parametrize(
  'name', ['dpo', 'orpo', 'token_unlikelihood', 'dr_dpo', 'aot', 'aot_unpaired']
)
def test_weights_are_the_slope_of_the_loss(curves, name):
  h = np.array([7.0, 7.0 + 1e-4])
  (low, high), weights = curves.trace(name, h)
  # A batch's mean moves by a share of what its sum does.
  pairs = 1 + table.get(name).batchwise * len(curves.OTHERS)
  weight = (weights[0, 0] - weights[0, 1]) / 2
  np.testing.assert_allclose((low - high) / 1e-4, weight / pairs, rtol=1e-4)


def test_overview_puts_dpos_twins_on_one_line(curves, monkeypatch):
  names = ['dpo', 'ipo_sum', 'orpo', 'rpo', 'bco', 'plackett_luce', 'cdpo']
  monkeypatch.setattr(
    table, 'LOSSES', {name: table.LOSSES[name] for name in names}
  )
  groups = curves.alike()
  assert list(groups) == [('ipo_sum',), ('dpo', 'plackett_luce'), ('cdpo',)]
  for loss, weight in groups.values():
    middle = len(curves.MARGINS) // 2
    assert loss[middle] == 0.0 and weight[middle] == 1.0


def test_readme_lists_every_loss():
  text = (ROOT / 'README.md').read_text()
  (listed,) = re.findall(r'what other\nlibraries call them: `([^`]+)`', text)
  assert sorted(listed.split()) == sorted(table.LOSSES)
