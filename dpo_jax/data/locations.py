"""Which files hold a task's raw data, here or after a download.

Sources are 'official' (downloaded once into the cache) or a local file or
folder. A folder may have the official layout or our plain one:

    hh      harmless-base/train.jsonl.gz   or  harmless-base.test.jsonl.gz
    tldr    batch3.json ...                or  any *.jsonl.gz
    imdb    aclImdb_v1.tar.gz              or  train.jsonl.gz, test.jsonl.gz
    jsonl   train.jsonl, test.jsonl        or  one or more files by any name
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

from dpo_jax import fetch
from dpo_jax import names

SPLITS = ('train', 'test')
HH_SUBSETS = (
  'harmless-base',
  'helpful-base',
  'helpful-online',
  'helpful-rejection-sampled',
)
TLDR_BATCHES = (
  *(f'batch{n}' for n in range(3, 21)),
  'batch22',
  'edit_b2_eval_test',
)
IMDB_ARCHIVE = 'aclImdb_v1.tar.gz'
_HH_URL = 'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main'
_TLDR_URL = (
  'https://openaipublic.blob.core.windows.net/summarize-from-feedback'
  '/datasets/comparisons'
)
_IMDB_URL = 'https://ai.stanford.edu/~amaas/data/sentiment'
_GZIP = b'\x1f\x8b'
_SUFFIXES = ('.jsonl.gz', '.jsonl', '.json.gz', '.json')


class SourceError(ValueError):
  """Raw data that cannot be used, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class RawFile:
  """A file to read; `split` is set where the file's name decides it."""

  path: pathlib.Path
  name: str
  split: str | None

  @property
  def stem(self) -> str:
    return stem(self.name)


def stem(name: str) -> str:
  """Cuts the suffix of a data file off; any other file gives ''."""
  for suffix in _SUFFIXES:
    if name.endswith(suffix):
      return name[: -len(suffix)]
  return ''


def digest(files: list[RawFile]) -> str:
  """Hashes names and bytes of the files."""
  total = hashlib.sha256()
  for file in files:
    with open(file.path, 'rb') as stream:
      content = hashlib.file_digest(stream, 'sha256').hexdigest()
    total.update(f'{file.name}:{content};'.encode())
  return total.hexdigest()


def locate(
  task: str,
  *,
  source: str | pathlib.Path,
  cache_dir: str | pathlib.Path,
  subsets: tuple[str, ...] | None,
) -> list[RawFile]:
  """Finds the files of a task; source 'official' downloads them first.

  `subsets` names HH's subsets or, for tldr and jsonl, files without suffix;
  None takes all there are.
  """
  place = names.look_up(PLACES, 'task', task)
  if source == 'official':
    folder = pathlib.Path(cache_dir) / 'downloads' / task
    for name, url in official_urls(task, subsets=subsets).items():
      # What is there is whole, and is not fetched again.
      begins = _GZIP if name.endswith('.gz') else b'{'
      fetch.download(url, folder / name, begins=begins)
  else:
    folder = pathlib.Path(source).expanduser()
  if not folder.exists():
    raise SourceError(
      f'no file or folder {folder}: give {task} a source that exists'
      + (", or 'official' to download it" if place.urls else '')
    )
  return place.find(folder, subsets)


def official_urls(
  task: str, *, subsets: tuple[str, ...] | None
) -> dict[str, str]:
  """Returns file name -> address of a task's official files."""
  place = names.look_up(PLACES, 'task', task)
  if place.urls is None:
    raise SourceError(f'{task} has no official files; give a file or a folder')
  return place.urls(subsets)


def _check_subsets(kind: str, subsets, known) -> None:
  for subset in subsets or ():
    names.look_up(dict.fromkeys(known), kind, subset)


def _no_subsets(what, subsets) -> None:
  if subsets:
    raise SourceError(f'{what} has no subsets; leave subsets out')


def _first(folder, candidates: list[str], split: str) -> RawFile | None:
  for name in candidates:
    if (folder / name).is_file():
      return RawFile(folder / name, name, split)
  return None


# --- Anthropic HH ---


def _hh_urls(subsets) -> dict[str, str]:
  _check_subsets('HH subset', subsets, HH_SUBSETS)
  paths = [
    f'{subset}/{split}.jsonl.gz'
    for subset in subsets or HH_SUBSETS
    for split in SPLITS
  ]
  return {path: f'{_HH_URL}/{path}' for path in paths}


def _find_hh(folder, subsets) -> list[RawFile]:
  _check_subsets('HH subset', subsets, HH_SUBSETS)
  found = {}
  for subset in subsets or HH_SUBSETS:
    candidates = {
      split: [
        f'{subset}{joint}{split}{suffix}'
        for joint in '/.'
        for suffix in _SUFFIXES[:2]
      ]
      for split in SPLITS
    }
    files = [_first(folder, candidates[split], split) for split in SPLITS]
    found[subset] = [file for file in files if file]
    if not found[subset]:
      raise SourceError(
        f'nothing of HH subset {subset!r} in {folder}: looked for '
        f'{", ".join(candidates["test"])} and the same for train; add a file, '
        f'or choose other subsets'
      )
  # Else a run would train on some subsets and be judged on others.
  kinds = {s: '+'.join(f.split for f in files) for s, files in found.items()}
  if len(set(kinds.values())) > 1:
    raise SourceError(
      f'the HH subsets in {folder} have different splits, {kinds}: add the '
      f'missing files, or choose subsets with the same splits'
    )
  return [file for files in found.values() for file in files]


# --- IMDb ---


def _imdb_urls(subsets) -> dict[str, str]:
  _no_subsets('imdb', subsets)
  return {IMDB_ARCHIVE: f'{_IMDB_URL}/{IMDB_ARCHIVE}'}


def _find_imdb(folder, subsets) -> list[RawFile]:
  _no_subsets('imdb', subsets)
  if folder.is_file():
    return [RawFile(folder, folder.name, None)]
  if (folder / IMDB_ARCHIVE).is_file():
    return [RawFile(folder / IMDB_ARCHIVE, IMDB_ARCHIVE, None)]
  files = [
    _first(folder, [f'{split}.jsonl.gz', f'{split}.jsonl'], split)
    for split in SPLITS
  ]
  if None in files:
    raise SourceError(
      f'no IMDb in {folder}: looked for {IMDB_ARCHIVE}, or for train.jsonl.gz '
      f'and test.jsonl.gz (or .jsonl)'
    )
  return files


# --- TL;DR comparisons ---


def _tldr_urls(subsets) -> dict[str, str]:
  _check_subsets('TL;DR batch', subsets, TLDR_BATCHES)
  return {
    f'{batch}.json': f'{_TLDR_URL}/{batch}.json'
    for batch in subsets or TLDR_BATCHES
  }


def _find_tldr(folder, subsets) -> list[RawFile]:
  chosen = _choose(folder, subsets)
  return [RawFile(path, path.name, None) for path in chosen.values()]


# --- JSON Lines ---


def _find_jsonl(folder, subsets) -> list[RawFile]:
  chosen = _choose(folder, subsets)
  named = [name for name in chosen if name in SPLITS]
  others = [name for name in chosen if name not in SPLITS]
  if named and others:
    raise SourceError(
      f'{folder} holds {", ".join(named)} and also {", ".join(others)}: say '
      f'which to read, for instance subsets={tuple(named)}'
    )
  return [
    RawFile(path, path.name, name if name in SPLITS else None)
    for name, path in chosen.items()
  ]


def _choose(folder, subsets) -> dict[str, pathlib.Path]:
  """Returns stem -> path of the chosen data files of a folder, or the file."""
  if folder.is_file():
    _no_subsets(f'the file {folder}', subsets)
    return {stem(folder.name): folder}
  found = {}
  for path in sorted(folder.iterdir()):
    name = stem(path.name)
    if name in found:
      raise SourceError(
        f'{folder} holds both {found[name].name} and {path.name}: remove one'
      )
    if name and path.is_file():
      found[name] = path
  if not found:
    raise SourceError(f'no file *{", *".join(_SUFFIXES)} in {folder}')
  _check_subsets(f'file in {folder}', subsets, found)
  return {name: found[name] for name in subsets or found}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the files of a task are.

  find: (a folder or file, subsets or None) -> the raw files.
  urls: (subsets or None) -> official file name: address; None: there are none.
  """

  find: Callable[..., list[RawFile]]
  urls: Callable[..., dict[str, str]] | None


PLACES = {
  'hh': Place(_find_hh, _hh_urls),
  'tldr': Place(_find_tldr, _tldr_urls),
  'imdb': Place(_find_imdb, _imdb_urls),
  'jsonl': Place(_find_jsonl, None),
}
