"""Which files hold a task's raw data, here or after a download.

Sources are 'official' (downloaded once into the cache) or a local file or
folder. A folder may have the official layout or our plain one:

    hh      harmless-base/train.jsonl.gz   or  harmless-base.test.jsonl.gz
    tldr    batch3.json ...                or  any *.jsonl.gz
    imdb    aclImdb_v1.tar.gz              or  train.jsonl.gz, test.jsonl.gz
    jsonl   train.jsonl, test.jsonl        or  one or more files by any name
"""

import dataclasses
import difflib
import hashlib
import pathlib

from dpo_jax import fetch

TASKS = ('hh', 'tldr', 'imdb', 'jsonl')
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
  """Cut the suffix of a data file off; any other file gives ''."""
  for suffix in _SUFFIXES:
    if name.endswith(suffix):
      return name[: -len(suffix)]
  return ''


def check_name(what: str, name: str, names) -> None:
  """Raise unless `name` is one of `names`, and offer the nearest."""
  if name not in names:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f', did you mean {near[0]!r}?' if near else ''
    raise SourceError(f'unknown {what} {name!r}{hint} (of {", ".join(names)})')


def digest(files: list[RawFile]) -> str:
  """Hash names and bytes of the files."""
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
  """Find the files of a task; source 'official' downloads them first.

  `subsets` names HH's subsets or, for tldr and jsonl, files without suffix;
  None takes all there are.
  """
  check_name('task', task, TASKS)
  if task == 'imdb' and subsets:
    raise SourceError('imdb has no subsets; leave subsets out')
  if task == 'hh':
    subsets = tuple(subsets or HH_SUBSETS)
    for subset in subsets:
      check_name('HH subset', subset, HH_SUBSETS)
  if source == 'official':
    folder = pathlib.Path(cache_dir) / 'downloads' / task
    for name, url in official_urls(task, subsets=subsets).items():
      # What is there is whole, and is not fetched again.
      fetch.download(url, folder / name)
  else:
    folder = pathlib.Path(source).expanduser()
  if not folder.exists():
    raise SourceError(
      f'no file or folder {folder}: give {task} a source that exists'
      + ('' if task == 'jsonl' else ", or 'official' to download it")
    )
  if task == 'hh':
    return _locate_hh(folder, subsets)
  if task == 'imdb':
    return _locate_imdb(folder)
  return _locate_any(task, folder, subsets)


def official_urls(
  task: str, *, subsets: tuple[str, ...] | None
) -> dict[str, str]:
  """Return file name -> address of a task's official files."""
  if task == 'jsonl':
    raise SourceError('jsonl has no official files; give a file or a folder')
  if task == 'hh':
    names = [f'{s}/{split}.jsonl.gz' for s in subsets for split in SPLITS]
    return {name: f'{_HH_URL}/{name}' for name in names}
  if task == 'tldr':
    for subset in subsets or ():
      check_name('TL;DR batch', subset, TLDR_BATCHES)
    names = [f'{batch}.json' for batch in subsets or TLDR_BATCHES]
    return {name: f'{_TLDR_URL}/{name}' for name in names}
  return {IMDB_ARCHIVE: f'{_IMDB_URL}/{IMDB_ARCHIVE}'}


def _first(folder, names: list[str], split: str) -> RawFile | None:
  for name in names:
    if (folder / name).is_file():
      return RawFile(folder / name, name, split)
  return None


def _locate_hh(folder, subsets) -> list[RawFile]:
  found = {}
  for subset in subsets:
    names = {
      split: [
        f'{subset}{joint}{split}{suffix}'
        for joint in '/.'
        for suffix in _SUFFIXES[:2]
      ]
      for split in SPLITS
    }
    files = [_first(folder, names[split], split) for split in SPLITS]
    found[subset] = [file for file in files if file]
    if not found[subset]:
      raise SourceError(
        f'nothing of HH subset {subset!r} in {folder}: looked for '
        f'{", ".join(names["test"])} and the same for train; add a file, or '
        f'choose other subsets'
      )
  # Else a run would train on some subsets and be judged on others.
  kinds = {s: '+'.join(f.split for f in files) for s, files in found.items()}
  if len(set(kinds.values())) > 1:
    raise SourceError(
      f'the HH subsets in {folder} have different splits, {kinds}: add the '
      f'missing files, or choose subsets with the same splits'
    )
  return [file for files in found.values() for file in files]


def _locate_imdb(folder) -> list[RawFile]:
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


def _locate_any(task, folder, subsets) -> list[RawFile]:
  if folder.is_file():
    if subsets:
      raise SourceError(f'{folder} is one file; leave subsets out')
    return [RawFile(folder, folder.name, None)]
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
  for subset in subsets or ():
    check_name(f'file in {folder}', subset, found)
  chosen = {name: found[name] for name in subsets or found}
  if task == 'tldr':
    return [RawFile(path, path.name, None) for path in chosen.values()]
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
