"""Data sets on disk: one TFDS builder per task, written as ArrayRecord.

A data set's folder is named by a digest of everything that decides its content
(bytes of the source files, form, split, this code), so a stale one is never
read; it appears under its name only when it is complete, report included.
Numbers are stored as float32, one that is absent (None) as NaN. No TensorFlow.
"""

import collections.abc
import contextlib
import dataclasses
import fcntl
import hashlib
import inspect
import io
import math
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from dpo_jax.data import conversations
from dpo_jax.data import forms
from dpo_jax.data import locations
from dpo_jax.data import records
from dpo_jax.data import reports
from dpo_jax.data import sources

# How each type of `forms.FIELDS` is stored, and how it is read.
_STORED = {
  str: (tfds.features.Text(), bytes.decode),
  float: (tfds.features.Scalar(np.float32), float),
  bool: (tfds.features.Scalar(np.bool_), bool),
  int: (tfds.features.Scalar(np.int64), int),
  float | None: (
    tfds.features.Scalar(np.float32),
    lambda x: None if math.isnan(x) else float(x),
  ),
  list[str]: (
    tfds.features.Sequence(tfds.features.Text()),
    lambda x: [*map(bytes.decode, x)],
  ),
  list[float]: (
    tfds.features.Sequence(np.float32),
    lambda x: [*map(float, x)],
  ),
  list[bool]: (tfds.features.Sequence(np.bool_), lambda x: [*map(bool, x)]),
}
# What a fetch of many rows at once reads.
_READ_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class _Request:
  """What to read into a data set."""

  files: list[locations.RawFile]
  form: str
  held_out: float
  prompt_words: int | None


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """What the tasks share; `load` is the way in."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, request: _Request, **keywords):
    self.request = request
    super().__init__(file_format='array_record', **keywords)

  def _info(self) -> tfds.core.DatasetInfo:
    fields = forms.FIELDS[self.request.form]
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {name: _STORED[kind][0] for name, kind in fields.items()}
      ),
      metadata=tfds.core.MetadataDict(),
      # The files' order; shuffling is the training run's business.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    splits, report = sources.read(
      self.name,
      self.request.files,
      form=self.request.form,
      held_out=self.request.held_out,
      prompt_words=self.request.prompt_words,
    )
    # The report is part of the data set, so it appears with it or not at all.
    self.info.metadata.update(report.to_dict())
    return {
      split: self._generate_examples(split, examples)
      for split, examples in splits.items()
    }

  def _generate_examples(self, split, examples):
    description = f'{self.name}/{split}'
    for n, example in enumerate(tqdm.tqdm(examples, description, leave=False)):
      yield n, {k: math.nan if v is None else v for k, v in example.items()}


class Hh(_Builder):
  """Anthropic's helpful and harmless dialogues, arXiv:2204.05862."""


class Tldr(_Builder):
  """OpenAI's comparisons of Reddit summaries, arXiv:2009.01325."""


class Imdb(_Builder):
  """Large Movie Review Dataset, Maas et al. 2011."""


class Jsonl(_Builder):
  """Plain JSON Lines of the user."""


BUILDERS = {'hh': Hh, 'tldr': Tldr, 'imdb': Imdb, 'jsonl': Jsonl}


class Examples(collections.abc.Sequence):
  """The examples of one split, read from disk when asked for."""

  def __init__(self, source, form: str):
    self._source = source
    self._fields = forms.FIELDS[form]

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self._read(range(*index.indices(len(self))))
    if not -len(self) <= index < len(self):
      raise IndexError(f'example {index} of {len(self)}')
    return self._read([int(index) % len(self)])[0]

  def __iter__(self) -> Iterator[dict]:
    for start in range(0, len(self), _READ_ROWS):
      yield from self[start : start + _READ_ROWS]

  def _read(self, indices) -> list[dict]:
    rows = self._source.__getitems__(list(indices)) if indices else []
    return [
      {name: _STORED[kind][1](row[name]) for name, kind in self._fields.items()}
      for row in rows
    ]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Splits of examples, and their account."""

  splits: dict[str, Examples]
  report: reports.Report


def load(
  task: str,
  *,
  source: str | pathlib.Path,
  form: str,
  cache_dir: str | pathlib.Path,
  held_out: float,
  subsets: tuple[str, ...] | None = None,
  prompt_words: int | None = None,
) -> Dataset:
  """Opens a task's data set, building it first where it is not in the cache.

  task: 'hh', 'tldr', 'imdb' or 'jsonl'. source: 'official', a folder or a file.
  form: one of `records.TASKS[task].forms`. held_out: the fraction of prompts to
  hold out where the source has no split of its own. subsets: HH's subsets, or
  file names without suffix; None for all. prompt_words: the words of an IMDb
  review that make the prompt of its SFT form.
  """
  sources.check_arguments(
    task, form=form, held_out=held_out, prompt_words=prompt_words
  )
  cache = pathlib.Path(cache_dir).expanduser()
  cache.mkdir(parents=True, exist_ok=True)
  # One process at a time: others wait here and then find the data set whole.
  with open(cache / f'{task}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    files = locations.locate(
      task, source=source, cache_dir=cache, subsets=subsets
    )
    request = _Request(files, form, held_out, prompt_words)
    name = f'{form}-{_digest(task, request)[:16]}'
    # What a killed process left; none is at work while we hold the lock.
    for remains in (cache / task / name).glob('incomplete.*'):
      shutil.rmtree(remains)
    with _quiet():
      builder = BUILDERS[task](
        request,
        data_dir=str(cache),
        config=tfds.core.BuilderConfig(name=name),
      )
      builder.download_and_prepare()
      splits = {
        split: Examples(builder.as_data_source(split), form)
        for split in builder.info.splits
      }
  report = reports.Report.from_dict(dict(builder.info.metadata))
  return Dataset(splits, report)


def _digest(task: str, request: _Request) -> str:
  """Hashes all that decides a data set's content, its code included."""
  own = inspect.getmodule(_Builder)
  code = [
    inspect.getsource(module)
    for module in (
      conversations,
      forms,
      locations,
      records,
      reports,
      sources,
      own,
    )
  ]
  parts = (
    task,
    locations.digest(request.files),
    request.form,
    repr(request.held_out),
    repr(request.prompt_words),
    *code,
  )
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


@contextlib.contextmanager
def _quiet():
  """Keeps TFDS from printing; the report says what there is to say."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)
    tfds.enable_progress_bar()
