"""Looking a name up in a table, with an error that shows the nearest one."""

import difflib


class Unknown(ValueError):
  """A name that a table lacks; `table` is that table."""

  # Libraries that add to an error's text make it anew, of that text alone.
  def __init__(self, text, table=()):
    super().__init__(text)
    self.table = table


def look_up(table, kind, name):
  """Returns `table[name]`; `kind` is what the error calls an entry."""
  if name in table:
    return table[name]
  near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.0)
  hint = f'; did you mean {near[0]!r}?' if near else '.'
  raise Unknown(
    f'unknown {kind} {name!r}{hint} There are {", ".join(table)}', table
  )
