import gzip

import pytest

from dpo_jax import fetch
from dpo_jax.data import locations


def _touch(folder, *names):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b'{}\n')


def _locate(task, folder, subsets=None):
  return locations.locate(
    task, source=folder, cache_dir=folder / 'cache', subsets=subsets
  )


def _names(files):
  return [(file.name, file.split) for file in files]


def test_hh_reads_the_official_and_the_flat_layout(tmp_path):
  _touch(tmp_path / 'harmless-base', 'train.jsonl.gz', 'test.jsonl.gz')
  _touch(tmp_path, 'helpful-base.train.jsonl', 'helpful-base.test.jsonl')
  files = _locate('hh', tmp_path, ('helpful-base', 'harmless-base'))
  assert _names(files) == [
    ('helpful-base.train.jsonl', 'train'),
    ('helpful-base.test.jsonl', 'test'),
    ('harmless-base/train.jsonl.gz', 'train'),
    ('harmless-base/test.jsonl.gz', 'test'),
  ]


def test_hh_subsets_must_have_the_same_splits(tmp_path):
  _touch(tmp_path / 'harmless-base', 'train.jsonl.gz', 'test.jsonl.gz')
  _touch(tmp_path, 'helpful-base/test.jsonl.gz')
  with pytest.raises(locations.SourceError, match="'helpful-base': 'test'"):
    _locate('hh', tmp_path, ('harmless-base', 'helpful-base'))


@pytest.mark.parametrize(
  'task, subsets, message',
  [
    ('hh', None, 'looked for harmless-base/test.jsonl.gz'),
    ('hh', ('harmles-base',), "did you mean 'harmless-base'"),
    ('tldr', None, r'no file \*.jsonl.gz'),
    ('imdb', None, 'aclImdb_v1.tar.gz'),
    ('imdb', ('train',), 'no subsets'),
    ('jsonl', None, r'no file \*.jsonl.gz'),
    ('jsonl', ('a',), r'no file \*.jsonl.gz'),
    ('jsnol', None, "unknown task 'jsnol'; did you mean 'jsonl'"),
  ],
)
def test_what_is_not_there_is_named(tmp_path, task, subsets, message):
  with pytest.raises(ValueError, match=message):
    _locate(task, tmp_path, subsets)


@pytest.mark.parametrize('task', locations.PLACES)
def test_missing_folder_is_named(tmp_path, task):
  with pytest.raises(locations.SourceError, match=r'no file or folder .*gone'):
    _locate(task, tmp_path / 'gone')


def test_jsonl_takes_a_file_a_folder_or_named_splits(tmp_path):
  _touch(tmp_path, 'a.jsonl', 'b.jsonl.gz', 'README.md')
  assert _names(_locate('jsonl', tmp_path)) == [
    ('a.jsonl', None),
    ('b.jsonl.gz', None),
  ]
  assert _names(_locate('jsonl', tmp_path, ('b',))) == [('b.jsonl.gz', None)]
  assert _names(_locate('jsonl', tmp_path / 'a.jsonl')) == [('a.jsonl', None)]
  with pytest.raises(ValueError, match=r"unknown file in .* 'c'; did you mean"):
    _locate('jsonl', tmp_path, ('c',))
  with pytest.raises(locations.SourceError, match='leave subsets out'):
    _locate('jsonl', tmp_path / 'a.jsonl', ('a',))
  # A test file must not end up in training because another file lies beside it.
  _touch(tmp_path, 'train.jsonl', 'test.jsonl')
  with pytest.raises(locations.SourceError, match=r"subsets=.'test', 'train'"):
    _locate('jsonl', tmp_path)
  assert _names(_locate('jsonl', tmp_path, ('train', 'test'))) == [
    ('train.jsonl', 'train'),
    ('test.jsonl', 'test'),
  ]


def test_two_files_of_one_name_are_an_error(tmp_path):
  _touch(tmp_path, 'a.jsonl', 'a.jsonl.gz')
  with pytest.raises(locations.SourceError, match=r'a\.jsonl and a\.jsonl\.gz'):
    _locate('jsonl', tmp_path)


def test_digest_follows_every_byte_and_name(tmp_path):
  _touch(tmp_path, 'a.jsonl', 'b.jsonl')
  first = locations.digest(_locate('jsonl', tmp_path, ('a',)))
  assert locations.digest(_locate('jsonl', tmp_path, ('a',))) == first
  assert locations.digest(_locate('jsonl', tmp_path, ('b',))) != first
  (tmp_path / 'a.jsonl').write_bytes(b'{ }\n')
  assert locations.digest(_locate('jsonl', tmp_path, ('a',))) != first


def test_official_files_are_downloaded_into_the_cache(tmp_path, monkeypatch):
  calls = []

  def download(url, path, *, begins):
    assert begins == b'\x1f\x8b'
    calls.append(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(b'{}\n', mtime=0))

  monkeypatch.setattr(fetch, 'download', download)
  files = locations.locate(
    'hh', source='official', cache_dir=tmp_path, subsets=('helpful-base',)
  )
  base = 'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main'
  assert calls == [
    f'{base}/helpful-base/train.jsonl.gz',
    f'{base}/helpful-base/test.jsonl.gz',
  ]
  assert [file.path for file in files] == [
    tmp_path / 'downloads/hh/helpful-base' / name
    for name in ('train.jsonl.gz', 'test.jsonl.gz')
  ]


@pytest.mark.parametrize(
  'task, name, right',
  [
    ('hh', 'helpful-base/train.jsonl.gz', gzip.compress(b'{}', mtime=0)),
    ('tldr', 'batch3.json', b'{"info": {}}\n'),
    ('imdb', 'aclImdb_v1.tar.gz', gzip.compress(b'tar', mtime=0)),
  ],
)
def test_a_login_page_is_never_taken_for_data(
  tmp_path, monkeypatch, task, name, right
):
  subsets = {'hh': ('helpful-base',), 'tldr': ('batch3',), 'imdb': None}[task]
  sent = [b'<!DOCTYPE html><html>Please log in</html>']
  monkeypatch.setattr(
    fetch, '_copy_url', lambda _, partial: partial.write_bytes(sent[-1])
  )
  path = tmp_path / 'downloads' / task / name

  def locate():
    return locations.locate(
      task, source='official', cache_dir=tmp_path, subsets=subsets
    )

  with pytest.raises(fetch.FetchError, match='login page'):
    locate()
  assert not path.exists()
  # Nor is one that an earlier version let through.
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(sent[-1])
  sent.append(right)
  assert path in [file.path for file in locate()]
  assert path.read_bytes() == right


def test_official_addresses_of_the_other_tasks():
  tldr = locations.official_urls('tldr', subsets=None)
  assert len(tldr) == 20
  assert tldr['batch3.json'] == (
    'https://openaipublic.blob.core.windows.net/summarize-from-feedback'
    '/datasets/comparisons/batch3.json'
  )
  assert list(tldr)[-2:] == ['batch22.json', 'edit_b2_eval_test.json']
  assert locations.official_urls('imdb', subsets=None) == {
    'aclImdb_v1.tar.gz': (
      'https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz'
    )
  }
  with pytest.raises(ValueError, match="unknown TL;DR batch 'batch21'"):
    locations.official_urls('tldr', subsets=('batch21',))
  with pytest.raises(locations.SourceError, match='no subsets'):
    locations.official_urls('imdb', subsets=('train',))
  with pytest.raises(locations.SourceError, match='no official files'):
    locations.official_urls('jsonl', subsets=None)
