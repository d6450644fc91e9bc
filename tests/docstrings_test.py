"""The docstring of every loss: its examples, its lines, its defaults."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

from dpo_jax import losses
from dpo_jax.losses import table

every_loss = pytest.mark.parametrize('name', table.LOSSES)

MODULES = [
  importlib.import_module(f'{losses.__name__}.{module.name}')
  for module in pkgutil.iter_modules(losses.__path__)
]
LABELS = ('Equation', 'Source', 'Sign', 'Tokens', 'Defaults')


@pytest.mark.parametrize('module', MODULES, ids=lambda m: m.__name__)
def test_examples_in_docstrings_are_true(module):
  runner = doctest.DocTestRunner()
  for test in doctest.DocTestFinder().find(module):
    runner.run(test)
  assert runner.summarize().failed == 0


def labelled(name):
  """{label: text} of a loss's docstring."""
  doc = inspect.getdoc(table.get(name).function)
  text = doc.partition('>>>')[0]
  parts = re.split(r'^([A-Z][a-z]+): ', text, flags=re.MULTILINE)
  return {
    label: ' '.join(body.split())
    for label, body in zip(parts[1::2], parts[2::2])
  }


@every_loss
def test_docstrings_have_every_label_and_an_example(name):
  lines = labelled(name)
  assert [label for label in lines if label in LABELS] == list(LABELS)
  assert all(lines[label] for label in LABELS)
  examples = doctest.DocTestParser().get_examples(
    inspect.getdoc(table.get(name).function)
  )
  assert any(example.want for example in examples)


@every_loss
def test_docstrings_name_the_signatures_defaults(name):
  defaults = [
    f'{k}={v.__name__ if callable(v) else repr(v)}'
    for k, v in (
      (parameter.name, parameter.default)
      for parameter in inspect.signature(
        table.get(name).function
      ).parameters.values()
      if parameter.kind is parameter.KEYWORD_ONLY
    )
  ]
  assert labelled(name)['Defaults'] == (', '.join(defaults) or 'none')


@every_loss
def test_docstrings_name_the_usual_reduction(name):
  usual = table.get(name).reductions[0]
  assert re.match(rf'{usual}\b', labelled(name)['Tokens'])


@pytest.mark.parametrize('name', table.ELSEWHERE)
def test_docstrings_say_what_a_loss_is_called_elsewhere(name):
  here, _ = table.ELSEWHERE[name]
  assert f'`{name}`' in labelled(here).get('Elsewhere', '')
