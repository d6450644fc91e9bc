"""Write docs/losses.md and its pictures from the losses themselves.

  python docs/make_losses.py          writes them
  python docs/make_losses.py --check  says what is not current

losses.template.md is filled with the table's rows and with the docstrings,
which must be as regular as `read_docstring` asks. losses/curves.json holds the
numbers behind the pictures at a few points, because pictures differ by version
of Matplotlib.
"""

import inspect
import itertools
import json
import pathlib
import re
import string
import sys
import textwrap

import loss_curves

from dpo_jax.losses import choices
from dpo_jax.losses import scoring
from dpo_jax.losses import table

HERE = pathlib.Path(__file__).parent
TEMPLATE = HERE / 'losses.template.md'
PAGE = HERE / 'losses.md'
FOLDER = HERE / 'losses'
CURVES = FOLDER / 'curves.json'
OVERVIEW = 'overview'

LABELS = ('Equation', 'Source', 'Sign', 'Tokens', 'Defaults', 'Elsewhere')
OPTIONAL = ('Elsewhere',)


def read_docstring(function):
  """Returns the parts of a loss's docstring, or raises where it is irregular.

  Its paragraphs are a summary of one line, any notes, the labelled lines
  (`Label: text` in the order of LABELS, continued by lines indented by two)
  and an example.

  Returns:
    dict of summary, notes (a list), example, and the label lines by label.
  """
  name = function.__name__
  paragraphs = inspect.getdoc(function).split('\n\n')
  if len(paragraphs) < 3 or '\n' in paragraphs[0]:
    raise ValueError(
      f'{name}: its docstring needs a summary of one line, labelled lines and'
      ' an example, with blank lines between'
    )
  summary, *notes, labelled, example = paragraphs
  if not example.startswith('>>> '):
    raise ValueError(f"{name}: its docstring must end with a '>>>' example")
  lines = {}
  for line in labelled.splitlines():
    label, _, text = line.partition(': ')
    if label in LABELS and label not in lines and text:
      lines[label] = text
    elif lines and re.match(r'  \S', line):
      lines[list(lines)[-1]] += ' ' + line.strip()
    else:
      raise ValueError(f'{name}: {line!r} is no labelled line of {LABELS}')
  wanted = [x for x in LABELS if x in lines or x not in OPTIONAL]
  if list(lines) != wanted:
    raise ValueError(f'{name}: has the lines {list(lines)}, needs {wanted}')
  notes = [' '.join(note.split()) for note in notes]
  return {'summary': summary, 'notes': notes, 'example': example} | lines


def markdown_table(header, lines):
  """Returns a table; a bar would end a cell even inside backticks."""
  lines = [header, ['---'] * len(header), *lines]
  return '\n'.join(
    '| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |'
    for line in lines
  )


def code(names):
  """Lists names as code; a dash if there are none."""
  return ', '.join(f'`{name}`' for name in names) or '–'


def loss_cells(name):
  """Returns a loss's cells in the table of all losses, by column."""
  loss = table.get(name)
  doc = read_docstring(loss.function)
  try:
    soft = 'yes' if table.make(name, labels='soft') else ''
  except ValueError:
    soft = 'uses p' if 'p' in loss.needs else '–'
  return {
    'loss': f'[`{name}`](#{name})',
    'what': doc['summary'],
    'equation': '`' + doc['Equation'].replace('`', '') + '`',
    'data': ', '.join(loss.forms),
    'reference': 'yes' if loss.reference else '–',
    'reductions': code(loss.reductions),
    'link': 'yes' if 'link' in table.options(name) else '–',
    'weightings': code(loss.weightings),
    'soft': soft,
    'defaults': doc['Defaults'],
    'other names': code(
      k for k, (here, _) in table.ELSEWHERE.items() if here == name
    ),
  }


def all_losses():
  """Returns the table of all losses."""
  lines = [loss_cells(name) for name in table.LOSSES]
  return markdown_table(list(lines[0]), [line.values() for line in lines])


def loss_section(name):
  """Returns the section of one loss; its example runs as it stands there."""
  function = table.get(name).function
  doc = read_docstring(function)
  package, _, module = function.__module__.rpartition('.')
  imports = {
    'jnp.': 'import jax.numpy as jnp',
    'scoring.': f'from {package} import scoring',
    function.__name__: f'from {package}.{module} import {function.__name__}',
  }
  example = [f'>>> {v}' for k, v in imports.items() if k in doc['example']]
  equation = textwrap.fill(
    doc['Equation'], 80, break_long_words=False, break_on_hyphens=False
  )
  return '\n\n'.join(
    [
      f'### {name}',
      doc['summary'],
      *doc['notes'],
      f'```text\n{equation}\n```',
      '\n'.join(f'- {x}: {doc[x]}' for x in LABELS[1:] if x in doc),
      '\n'.join(['```python', *example, doc['example'], '```']),
      f'![{name}]({FOLDER.name}/{name}.svg)',
    ]
  )


def sections():
  """Returns the sections of all losses, one heading a module."""
  modules = itertools.groupby(
    table.LOSSES, lambda name: inspect.getmodule(table.get(name).function)
  )
  parts = []
  seen = set()
  for module, names in modules:
    title = module.__name__.rpartition('.')[2].capitalize()
    if title in seen:
      raise ValueError(
        f'the rows of {module.__name__} do not stand together in table.LOSSES,'
        f' see {next(names)!r}; move it to the others'
      )
    seen.add(title)
    parts += [f'## {title}', inspect.getdoc(module), *map(loss_section, names)]
  return '\n\n'.join(parts)


def choice_lines(choice_table):
  """Returns a table of choices: what a config writes, and the docstring."""
  lines = []
  for name, function in choice_table.items():
    parameters = inspect.signature(function).parameters.values()
    number = [x.name.upper() for x in parameters if x.kind is x.KEYWORD_ONLY]
    about = ' '.join(inspect.getdoc(function).split())
    lines.append([code([':'.join([name, *number])]), about])
  return markdown_table(['name', 'what'], lines)


def with_options(name, options):
  """Writes a loss and what is set of it."""
  text = ', '.join(f'{k}={v!r}' for k, v in options.items())
  return f'`{name}`' + (f' with `{text}`' if text else '')


def page():
  """Returns the text of losses.md."""
  sums = [
    [f'`{name}`', ' + '.join(with_options(*term) for term in terms.items())]
    for name, terms in table.SUMS.items()
  ]
  elsewhere = [[f'`{k}`', with_options(*v)] for k, v in table.ELSEWHERE.items()]
  instead = [[f'`{k}`', v] for k, v in table.INSTEAD.items()]
  soft = (f', but {p} for `{name}`' for name, p in loss_curves.SOFT.items())
  return string.Template(TEMPLATE.read_text()).substitute(
    all_losses=all_losses(),
    symbols=inspect.getdoc(scoring),
    tokens=loss_curves.TOKENS,
    typical=f'{loss_curves.TYPICAL:.0f}',
    others=str(loss_curves.OTHERS)[1:-1],
    others_ref=str(loss_curves.OTHERS_REF)[1:-1],
    soft=''.join(soft),
    overview=f'{FOLDER.name}/{OVERVIEW}.svg',
    sections=sections(),
    choices=inspect.getdoc(choices),
    reductions=choice_lines(choices.REDUCTIONS),
    links=choice_lines(choices.LINKS),
    weightings=choice_lines(choices.WEIGHTINGS),
    sums=markdown_table(['name', 'here'], sums),
    elsewhere=markdown_table(['name there', 'here'], elsewhere),
    instead=markdown_table(['name there', 'here'], instead),
  )


def stale_page():
  """Returns a line if losses.md is not what it would be."""
  if PAGE.exists() and PAGE.read_text() == page():
    return []
  return [f'{PAGE.name} is not what the docstrings say']


def stale_pictures():
  """Returns a line for every picture that is missing, left over or old."""
  drawn = {path.name for path in FOLDER.glob('*')} - {CURVES.name}
  wanted = {f'{name}.svg' for name in (*table.LOSSES, OVERVIEW)}
  stored = json.loads(CURVES.read_text()) if CURVES.exists() else {}
  moved = loss_curves.differing(stored, loss_curves.samples())
  return (
    [f'{name} is missing' for name in sorted(wanted - drawn)]
    + [f'{name} is left over' for name in sorted(drawn - wanted)]
    + [f'the curves of {name} are not those of {CURVES.name}' for name in moved]
  )


def main(arguments):
  """Writes everything, or only checks it."""
  if arguments == ['--check']:
    lines = stale_page() + stale_pictures()
    sys.exit('\n'.join(lines) + '\nRun docs/make_losses.py' if lines else 0)
  if arguments:
    sys.exit(__doc__)
  text = page()  # raises where a docstring does not fit, before a file goes
  FOLDER.mkdir(exist_ok=True)
  for path in FOLDER.glob('*.svg'):
    path.unlink()
  for name in table.LOSSES:
    defaults = read_docstring(table.get(name).function)['Defaults']
    title = f'{name}, defaults: {defaults}'
    loss_curves.draw(name, title, FOLDER / f'{name}.svg')
  loss_curves.draw_overview(FOLDER / f'{OVERVIEW}.svg')
  CURVES.write_text(json.dumps(loss_curves.samples(), indent=1) + '\n')
  PAGE.write_text(text)


if __name__ == '__main__':
  main(sys.argv[1:])
