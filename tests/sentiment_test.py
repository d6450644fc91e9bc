"""Sentiment classifiers: laws of n-grams, an optimum by hand, honest halves."""

import functools
import gzip
import io
import json
import math
import tarfile

import numpy as np
import pytest

from dpo_jax import rewards
from dpo_jax import sentiment
from dpo_jax.data import locations

GOOD = 'wonderful great moving superb lovely brilliant'.split()
BAD = 'boring awful dull terrible stupid lifeless'.split()
PLAIN = 'the film has a plot and some actors who speak in rooms'.split()


def make_reviews(number, seed):
  """(text, label) whose label shows in a few words."""
  rng = np.random.default_rng(seed)
  out = []
  for n in range(number):
    words = [*rng.choice(PLAIN, 12), *rng.choice((BAD, GOOD)[n % 2], 2)]
    out.append((f'{" ".join(rng.permutation(words))} {seed}{n}', n % 2))
  return out


def count(text, kind='words'):
  return len(sentiment.grams(text, kind=kind, bits=20))


def test_an_n_gram_counts_once():
  assert count('good') == 1
  assert count('good bad') == 2 + 1
  assert count('good bad good bad') == 2 + 2
  assert count('') == count(' <br /> ') == 0
  # ' ab ' has two triples and one quadruple.
  assert count('ab', 'characters') == 3


@pytest.mark.parametrize('kind', sentiment.KINDS)
def test_line_breaks_and_case_are_no_features(kind):
  one, other = (
    sentiment.grams(text, kind=kind, bits=20)
    for text in ('Not bad.<br /><br />Not GOOD', 'not bad. not good')
  )
  np.testing.assert_array_equal(one, other)
  different = sentiment.grams('not good. not bad', kind=kind, bits=20)
  assert different.tolist() != one.tolist()


@pytest.mark.parametrize('bits', [8, 20])
def test_hashes_stay_in_their_places(bits):
  found = sentiment.grams(' '.join(PLAIN), kind='words', bits=bits)
  assert found.min() >= 0 and found.max() < 2**bits
  # Of different n-grams few meet in many places.
  assert len(found) >= {8: 15, 20: 23}[bits]


def test_the_optimum_is_the_log_odds_of_the_data():
  texts = ['good'] * 4 + ['bad'] * 4
  labels = [1, 1, 1, 0] + [0, 0, 0, 1]
  fitted = sentiment.fit(texts, labels, kind='words', bits=10, penalty=1e-9)
  np.testing.assert_allclose(
    fitted.log_odds(['good', 'bad', 'other']),
    [math.log(3), -math.log(3), 0.0],
    atol=2e-3,
  )
  np.testing.assert_allclose(
    fitted.probability(['good', 'bad']), [0.75, 0.25], atol=1e-3
  )
  assert fitted.accuracy(texts, labels) == 0.75


def test_one_label_alone_teaches_nothing():
  with pytest.raises(ValueError, match='both 0 and 1 must be there'):
    sentiment.fit(['a', 'b'], [1, 1], kind='words', bits=8, penalty=1e-5)


def test_a_classifier_below_its_gate_is_none():
  learned = make_reviews(40, 0)
  flipped = [(text, 1 - label) for text, label in make_reviews(20, 1)]
  with pytest.raises(ValueError, match=r'words gets \d.* % of 20 .* 88.0 %'):
    sentiment.trained('words', learned, flipped, least_accuracy=0.88)


def write_lines(folder, sides):
  folder.mkdir()
  for split, reviews in sides.items():
    with gzip.open(folder / f'{split}.jsonl.gz', 'wt') as f:
      for n, (text, label) in enumerate(reviews):
        f.write(json.dumps({'id': f'{n}', 'text': text, 'label': label}) + '\n')


def write_archive(folder, sides):
  folder.mkdir()
  with tarfile.open(folder / locations.IMDB_ARCHIVE, 'w:gz') as archive:
    for split, reviews in sides.items():
      for n, (text, label) in enumerate(reviews):
        side = ('neg', 'pos')[label]
        entry = tarfile.TarInfo(f'aclImdb/{split}/{side}/{n}_7.txt')
        entry.size = len(text.encode())
        archive.addfile(entry, io.BytesIO(text.encode()))


@pytest.mark.parametrize('write', [write_lines, write_archive])
def test_reviews_make_a_classifier_and_a_judge(tmp_path, write):
  shared = make_reviews(2, 7)
  sides = {
    'train': make_reviews(60, 0) + shared,
    'test': make_reviews(80, 1) + shared,
  }
  write(tmp_path / 'reviews', sides)
  made = sentiment.train(
    tmp_path / 'reviews', tmp_path / 'out', cache_dir=tmp_path / 'cache'
  )
  classifier, judge = made[sentiment.CLASSIFIER], made[sentiment.JUDGE]
  # A text of both sides has left train; the judge has seen no train text.
  assert classifier.about['learned_from'] == 60
  assert classifier.about['tested_on'] == 82
  assert judge.about['learned_from'] + judge.about['tested_on'] == 82
  assert min(judge.about['learned_from'], judge.about['tested_on']) > 20
  assert classifier.about['accuracy'] >= 0.88
  assert (classifier.kind, judge.kind) == ('words', 'characters')
  lines = sentiment.account(made).splitlines()
  assert lines[0].startswith(
    'classifier.npz: n-grams of words; learned from 60'
  )
  texts = ['a superb film', 'an awful film', 'a film']
  for name, one in made.items():
    read = sentiment.load(tmp_path / 'out' / name)
    np.testing.assert_array_equal(read.log_odds(texts), one.log_odds(texts))
    assert read.about == one.about
  path = tmp_path / 'out' / sentiment.CLASSIFIER
  odds = rewards.get(f'sentiment:{path}')(['a ', 'an '], ['superb', 'awful'])
  np.testing.assert_array_equal(
    odds, classifier.log_odds(['a superb', 'an awful'])
  )
  assert odds[0] > 0 > odds[1]
  np.testing.assert_allclose(
    rewards.get(f'sentiment_probability:{path}')(['a '], ['superb']),
    1 / (1 + np.exp(-odds[0])),
  )


def test_texts_that_look_the_same_are_of_one_half():
  texts = [text for text, _ in make_reviews(50, 3)]
  halves = [sentiment.half(text) for text in texts]
  assert 10 < sum(halves) < 40
  assert halves == [
    sentiment.half(text.upper().replace(' ', '<br /> ')) for text in texts
  ]


def cut(data, size):
  return data[: int(size * len(data)) if 0 < size < 1 else size]


def flipped(data, place):
  return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
  'damaged',
  [
    *(functools.partial(cut, size=size) for size in (0, 3, 100, 0.5, -5)),
    lambda data: flipped(data, len(data) // 2),  # within the numbers
    # In the directory of the archive: encrypted; compressed in another way.
    lambda data: flipped(data, data.rindex(b'PK\1\2') + 8),
    lambda data: flipped(data, data.rindex(b'PK\1\2') + 10),
  ],
)
def test_a_damaged_classifier_says_so_in_a_line(tmp_path, damaged):
  weights = np.random.default_rng(0).normal(size=256).astype(np.float32)
  path = tmp_path / 'x.npz'
  sentiment.Classifier('words', weights, 0.5, {}).save(path)
  assert [p.name for p in tmp_path.iterdir()] == ['x.npz']
  path.write_bytes(damaged(path.read_bytes()))
  assert_is_none(path)


ABOUT = {'kind': 'words', 'bias': 0.5, 'about': {}}


@pytest.mark.parametrize(
  'settings, shape',
  [
    ([1], 8),
    ({'kind': 'words'}, 8),
    (ABOUT | {'kind': 'letters'}, 8),
    (ABOUT, 9),
    (ABOUT, (8, 2)),
  ],
)
def test_what_is_laid_out_as_a_classifier_may_be_none(
  tmp_path, settings, shape
):
  path = tmp_path / 'x.npz'
  np.savez(path, settings=json.dumps(settings), weights=np.zeros(shape))
  assert_is_none(path)


def assert_is_none(path):
  with pytest.raises(ValueError, match='is no sentiment classifier') as caught:
    rewards.get(f'sentiment:{path}')
  assert '\n' not in str(caught.value)


def test_a_classifier_that_is_not_there_is_none(tmp_path):
  with pytest.raises(ValueError, match=r'is no sentiment classifier .*No such'):
    rewards.get(f'sentiment:{tmp_path / "none.npz"}')


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'x.npz'
  old = sentiment.Classifier('words', np.zeros(8, np.float32), 0.5, {})
  old.save(path)

  def full(file, **_):
    file.write(b'PK')
    raise OSError('No space left on device')

  monkeypatch.setattr(np, 'savez_compressed', full)
  with pytest.raises(OSError, match='No space left'):
    old.save(path)
  assert sentiment.load(path).bias == 0.5
  assert [p.name for p in tmp_path.iterdir()] == ['x.npz']


def test_no_reviews_are_one_clear_line(tmp_path):
  write_lines(tmp_path / 'r', {'train': [], 'test': make_reviews(4, 0)})
  with pytest.raises(ValueError, match='the file is empty'):
    sentiment.train(tmp_path / 'r', tmp_path, cache_dir=tmp_path / 'cache')


@pytest.mark.slow
def test_a_tenth_of_the_real_reviews_are_enough_for_four_fifths(
  shared, tmp_path
):
  sides = {}
  for split in ('train', 'test'):
    with gzip.open(shared / 'data' / 'imdb' / f'{split}.jsonl.gz') as f:
      rows = [json.loads(line) for line in f][::10]
    sides[split] = [(row['text'], row['label']) for row in rows]
  write_lines(tmp_path / 'reviews', sides)
  made = sentiment.train(
    tmp_path / 'reviews',
    tmp_path,
    cache_dir=tmp_path / 'cache',
    least_accuracy=0.8,
    least_of_judge=0.7,
  )
  assert made[sentiment.CLASSIFIER].about['accuracy'] >= 0.8
