"""A config that knows which of its keys were read.

Loops read configs through `Settings`. After set-up, `check_all_read` refuses a
config with a key that nothing looked at: an option that does nothing is a lie.
"""

import math
from collections.abc import Mapping

# What a number may be, in words -> whether it is; NaN is nothing.
NUMBERS = {
  '0 or more': lambda x: 0 <= x < math.inf,
  '1 or more': lambda x: 1 <= x < math.inf,
  '2 or more': lambda x: 2 <= x < math.inf,
  'a number above 0': lambda x: 0 < x < math.inf,
  'a number from 0 to 1': lambda x: 0 <= x <= 1,
  'a number above 0, at most 1': lambda x: 0 < x <= 1,
}


class Settings(Mapping):
  """Read-only view of nested dicts; attribute or item access, `**` works."""

  def __init__(self, values):
    self._values = {
      name: Settings(value) if isinstance(value, Mapping) else value
      for name, value in values.items()
    }
    self._read = set()

  def __getitem__(self, name):
    value = self._values[name]
    self._read.add(name)
    return value

  def __getattr__(self, name):
    try:
      return self[name]
    except KeyError:
      raise AttributeError(
        f'config has no key {name!r} here; it has {sorted(self._values)}'
      ) from None

  def __iter__(self):
    return iter(self._values)

  def __len__(self):
    return len(self._values)

  def as_dict(self):
    """Returns plain nested dicts; does not count as reading."""
    return {
      name: value.as_dict() if isinstance(value, Settings) else value
      for name, value in self._values.items()
    }

  def unread(self, prefix=''):
    """Returns the dotted names of leaves that nobody read."""
    names = []
    for name, value in self._values.items():
      if isinstance(value, Settings):
        names += value.unread(f'{prefix}{name}.')
      elif name not in self._read:
        names.append(prefix + name)
    return names

  def check_all_read(self, *, but=None):
    """Raises if a key, outside the section `but`, was read by nothing."""
    names = [name for name in self.unread() if name.split('.')[0] != but]
    if names:
      raise ValueError(
        f'config keys that nothing reads: {", ".join(names)}; remove them'
      )


def at(config, name):
  """Returns the value of a dotted name, in nested mappings of any kind."""
  for part in name.split('.'):
    config = config[part]
  return config


def check_numbers(config, ranges):
  """Refuses all numbers of a config that are not what they must be.

  `ranges` has {dotted name: words of `NUMBERS`}.
  """
  found = {name: at(config, name) for name in ranges}
  problems = [
    f'{name} is {value}; use {ranges[name]}'
    for name, value in found.items()
    if not NUMBERS[ranges[name]](value)
  ]
  if problems:
    raise ValueError('\n'.join(problems))
