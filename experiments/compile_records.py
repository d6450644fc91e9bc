"""What was compiled, in a file of docs/, and its table on a page.

<!-- NAME -->
| ... |                    from the records, by whoever wrote them
<!-- /NAME -->
"""

import json

from dpo_jax import report


def read(path, key):
  """Returns {its `key`: record} of the records of a file, {} without one."""
  if not path.exists():
    return {}
  found = map(json.loads, path.read_text().splitlines())
  return {record[key]: record for record in found}


def keep(path, key, record, order):
  """Writes a record in the place of the one that its `key` had.

  order: all keys there may be; records of others are left out.
  """
  found = read(path, key) | {record[key]: record}
  lines = [json.dumps(found[name]) + '\n' for name in order if name in found]
  path.write_text(''.join(lines))


def on_page(path, name, rows):
  """Returns the text of a page with rows of texts as its table of a name."""
  begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
  before, rest = path.read_text().split(begin)
  _, after = rest.split(end)
  table = report.markdown_table(rows, aligned=False)
  return f'{before}{begin}\n{table}{end}{after}'
