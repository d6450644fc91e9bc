"""Files and folders that appear whole or not at all.

They are written in a folder beside them and moved when they are complete, so
nobody ever finds half of one under its final name. What a killed process left
is removed by the next one that writes there; but what it was about to replace,
NAME.old.part-..., is left to its owner.
"""

import contextlib
import glob
import os
import pathlib
import platform
import shutil
from collections.abc import Callable
from collections.abc import Iterator


def check_target(folder, *, overwrite: bool, what: str, is_ours: Callable):
  """Refuses to write a folder where something is, unless it may be replaced.

  Args:
    folder: to write.
    overwrite: replace what is there, if it is `what` and nothing else.
    what: the kind of folder, for the error.
    is_ours: path -> whether a folder is of that kind.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
    return
  if not overwrite:
    raise ValueError(
      f'{folder} exists; give another folder, or --overwrite to replace it'
    )
  # Anything but its files would be lost with it.
  if (
    not folder.is_dir()
    or not is_ours(folder)
    or any(path.is_dir() for path in folder.iterdir())
  ):
    raise ValueError(
      f'{folder} is not only {what}, so it is not replaced; give another folder'
    )


def part_folder(path: pathlib.Path, pid) -> pathlib.Path:
  """Returns where a process keeps what is not yet whole of `path`."""
  # The host, because machines may share the folder but not their process ids.
  return path.with_name(f'{path.name}.part-{platform.node()}-{pid}')


def is_part(path: pathlib.Path) -> bool:
  """Whether a folder is one of `part_folder`."""
  return '.part-' in path.name


def write_file(path: pathlib.Path, fill: Callable) -> None:
  """Lets `fill` write in a folder of its own, then moves the file to `path`.

  Its bytes are on the disk before its name is there.
  """
  with _part(path) as folder:
    fill(folder / path.name)
    with open(folder / path.name, 'rb') as f:
      os.fsync(f.fileno())
    os.replace(folder / path.name, path)


@contextlib.contextmanager
def whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty folder to fill, which then takes the place of `folder`."""
  folder = folder.absolute()
  remove_stale(folder)
  with _part(folder) as partial:
    yield partial
    if not folder.exists():
      partial.rename(folder)
      return
    old = part_folder(folder.with_name(f'{folder.name}.old'), os.getpid())
    folder.rename(old)
    try:
      partial.rename(folder)
    except OSError:
      old.rename(folder)
      raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _part(path: pathlib.Path) -> Iterator[pathlib.Path]:
  folder = part_folder(path, os.getpid())
  folder.mkdir(parents=True)
  try:
    yield folder
  finally:  # Also when the user interrupts.
    shutil.rmtree(folder, ignore_errors=True)


def remove_stale(path: pathlib.Path) -> None:
  """Removes what processes that are no more have left of `path`."""
  pattern = part_folder(pathlib.Path(glob.escape(path.name)), '*').name
  for folder in path.parent.glob(pattern):
    if not _is_another_alive(int(folder.name.rpartition('-')[2])):
      shutil.rmtree(folder, ignore_errors=True)


def _is_another_alive(pid: int) -> bool:
  # Our own id on a folder that we find is that of a dead process before us.
  if pid == os.getpid():
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # Somebody else's process.
    pass
  return True
