"""Why something on a disk failed, by the error that a library made of it.

Orbax, TensorStore and XLA raise errors of their own types, in which the one of
the system is a text, or the error that they came from.
"""

import errno
import os

# The disk, the quota or the size that a file may have.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# No fault of the bytes on disk: servers, rights, memory, open files.
PASSING = {
  *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
  *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET),
  *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
  *(errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK),
}
# The same, as Python, TensorStore and XLA call it.
_PASSING_WORDS = (
  'MemoryError',
  'RESOURCE_EXHAUSTED',
  'UNAVAILABLE',
  'DEADLINE_EXCEEDED',
  'PERMISSION_DENIED',
)


def full(error) -> str:
  """Says how there is no space, if that is why; else ''."""
  return _why(error, FULL, ())


def passing(error) -> str:
  """Says what may be over when it is tried again, if that is why; else ''."""
  return _why(error, PASSING, _PASSING_WORDS)


def _why(error, numbers, words):
  """Says which of these an error, or one that it came from, is; else ''."""
  while error is not None:
    for number in numbers:
      why = os.strerror(number)
      if getattr(error, 'errno', None) == number or why in str(error):
        return why
    for word in words:
      if word in f'{type(error).__name__}: {error}':
        return word
    error = error.__cause__ or error.__context__
  return ''


def line(error) -> str:
  """Returns the first line of an error's text, or its type without one."""
  lines = str(error).strip().splitlines()
  return lines[0][:300] if lines else type(error).__name__
