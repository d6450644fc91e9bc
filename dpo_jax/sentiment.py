"""Sentiment of texts: linear classifiers of n-grams, trained on movie reviews.

  log odds(positive | text) = bias + sum over the text's n-grams of their
                              weights / sqrt(number of different n-grams)

An n-gram's weight stands at the hash of its units, so there is no vocabulary;
a text counts each of its n-grams once. Two classifiers come of the 50,000
labelled IMDb reviews, and have neither reviews nor features in common:

  classifier.npz   n-grams of words; learns from the train side, and is tested
                   on all of the test side: a reward
  judge.npz        n-grams of characters; learns from one half of the test side,
                   and is tested on the other: nothing may be trained on it

The halves are of texts, not of rows, and a text of both sides has left train
(`data.sources`). A file holds numbers and JSON, no pickle.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import time
import zlib

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

from dpo_jax import folders
from dpo_jax import names
from dpo_jax.data import builders

CLASSIFIER, JUDGE = 'classifier.npz', 'judge.npz'
# Words of a test review whose sentiment is asked for, besides the whole one's:
# what is scored as a reward is about as short.
PREFIX_WORDS = 40
# Places of an n-gram's weight, and how much weights cost, see `fit`.
_BITS, _PENALTY = 20, 1e-5

_BREAK = re.compile(r'<br\s*/?>', re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[!?]")
# Odd numbers of 64 bits: of the polynomial of a gram, and of its hash (Knuth,
# The Art of Computer Programming, volume 3, section 6.4).
_BASE = np.uint64(0xD6E8FEB86659FD93)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


# --- Features ---


def without_breaks(text: str) -> str:
  """Returns a text with spaces for its HTML line breaks."""
  return _BREAK.sub(' ', text)


def cleaned(text: str) -> str:
  """Returns a text in lower case, without HTML line breaks."""
  return without_breaks(text).lower()


def _words(text: str) -> np.ndarray:
  words = _WORD.findall(cleaned(text))
  return np.array([zlib.crc32(word.encode()) for word in words], np.uint64)


def _characters(text: str) -> np.ndarray:
  plain = ' '.join(['', *cleaned(text).split(), ''])
  return np.frombuffer(plain.encode(), np.uint8).astype(np.uint64)


# Kind of features -> (units of a text as numbers, lengths of n-grams).
KINDS = {'words': (_words, (1, 2)), 'characters': (_characters, (3, 4, 5))}


def grams(text: str, *, kind: str, bits: int) -> np.ndarray:
  """Returns the different n-grams of a text, hashed into 2^bits places."""
  units_of, orders = names.look_up(KINDS, 'kind of features', kind)
  units, found = units_of(text), []
  for order in orders:
    number = max(len(units) - order + 1, 0)
    key = np.full(number, order, np.uint64)
    for start in range(order):
      key = key * _BASE + units[start : start + number] + np.uint64(1)
    key ^= key >> np.uint64(29)
    found.append((key * _SPREAD) >> np.uint64(64 - bits))
  return np.unique(np.concatenate(found)).astype(np.int64)


# --- Classifiers ---


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A trained classifier.

  weights: float32 [2^bits]. about: what it was trained on, and its accuracies.
  """

  kind: str
  weights: np.ndarray
  bias: float
  about: dict

  @property
  def bits(self) -> int:
    return len(self.weights).bit_length() - 1

  def log_odds(self, texts) -> np.ndarray:
    """Returns log(P(positive) / P(negative)) of each text, float64 [N]."""
    out = []
    for text in texts:
      found = grams(text, kind=self.kind, bits=self.bits)
      total = self.weights[found].sum(dtype=np.float64)
      out.append(self.bias + total / max(len(found), 1) ** 0.5)
    return np.array(out)

  def probability(self, texts) -> np.ndarray:
    """Returns P(positive) of each text, [N]."""
    return scipy.special.expit(self.log_odds(texts))

  def accuracy(self, texts, labels) -> float:
    """Returns the share of texts on the side that their labels (0, 1) say."""
    return float(np.mean((self.log_odds(texts) > 0.0) == np.asarray(labels)))

  def save(self, path) -> None:
    """Writes a file that appears whole."""
    path = pathlib.Path(path)
    settings = {'kind': self.kind, 'bias': self.bias, 'about': self.about}

    def fill(part):
      with open(part, 'wb') as f:
        np.savez_compressed(
          f, weights=self.weights, settings=json.dumps(settings)
        )

    folders.remove_stale(path)
    folders.write_file(path, fill)


def load(path) -> Classifier:
  """Reads what `Classifier.save` wrote."""
  try:
    with np.load(path, allow_pickle=False) as file:
      settings = json.loads(str(file['settings']))
      weights = file['weights']
    loaded = Classifier(weights=weights, **settings)
    names.look_up(KINDS, 'kind of features', loaded.kind)
    if weights.shape != (2**loaded.bits,):
      raise ValueError(f'its weights have shape {weights.shape}')
  except Exception as error:  # damaged bytes can be anything, and so raise it
    raise ValueError(
      f'{str(path)!r} is no sentiment classifier ({error}); write one with'
      ' `dpo-jax sentiment SOURCE FOLDER`'
    ) from error
  return loaded


def fit(texts, labels, *, kind, bits, penalty) -> Classifier:
  """Fits a classifier: logistic regression, to its optimum by L-BFGS.

  Args:
    texts: N of them.
    labels: 1 for positive, 0 for negative, and both must be there.
    kind: of features, of `KINDS`.
    bits: of the hash.
    penalty: lambda of the minimized mean loss + lambda/2 |weights|^2.
  """
  labels = np.asarray(labels, np.float64)
  if set(labels) != {0.0, 1.0}:
    raise ValueError(
      f'the labels are {sorted(set(labels))}; both 0 and 1 must be there'
    )
  found = [grams(text, kind=kind, bits=bits) for text in texts]
  sizes = np.array([len(columns) for columns in found])
  matrix = scipy.sparse.csr_array(
    (
      np.repeat(np.maximum(sizes, 1) ** -0.5, sizes),
      np.concatenate(found),
      np.concatenate([[0], np.cumsum(sizes)]),
    ),
    shape=(len(found), 2**bits),
  )
  # Most n-grams are of one text alone, and say nothing of others.
  kept = np.flatnonzero(np.bincount(matrix.indices, minlength=2**bits) > 1)
  matrix = matrix[:, kept]
  transposed = matrix.T.tocsr()  # twice as fast as the view

  def loss(values):
    weights, bias = values[:-1], values[-1]
    z = matrix @ weights + bias
    error = (scipy.special.expit(z) - labels) / len(labels)
    value = np.mean(np.logaddexp(0.0, z) - labels * z)
    slope = transposed @ error + penalty * weights
    return (
      value + penalty / 2 * weights @ weights,
      np.append(slope, error.sum()),
    )

  best = scipy.optimize.minimize(
    loss,
    np.zeros(len(kept) + 1),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': 500, 'ftol': 1e-7, 'gtol': 1e-6},
  )
  weights = np.zeros(2**bits, np.float32)
  weights[kept] = best.x[:-1]
  return Classifier(kind, weights, float(best.x[-1]), {})


# --- From reviews to files ---


def train(
  source, folder, *, cache_dir, least_accuracy=0.88, least_of_judge=0.8
) -> dict[str, Classifier]:
  """Trains classifier and judge on IMDb reviews, and writes their files.

  Nothing is written of one that is less accurate than it must be.

  Args:
    source: of the reviews, see `data.builders.load`; official and plain
      layouts will do.
    folder: to write to.
    cache_dir: of prepared data.
    least_accuracy: of the classifier, on the test side.
    least_of_judge: of the judge, on the half that it has not seen.

  Returns:
    {file name: Classifier}.
  """
  reviews = builders.load(
    'imdb', source=source, form='reviews', held_out=0.0, cache_dir=cache_dir
  )
  if set(reviews.splits) != {'train', 'test'}:
    raise ValueError(
      f'{str(source)!r} has the sides {sorted(reviews.splits)}; classifiers'
      ' need train and test'
    )
  train_side, test_side = (
    [(review['text'], review['label']) for review in reviews.splits[split]]
    for split in ('train', 'test')
  )
  halves = [[], []]
  for review in test_side:
    halves[half(review[0])].append(review)
  out = {}
  for name, kind, learned, tested, least in [
    (CLASSIFIER, 'words', train_side, test_side, least_accuracy),
    (JUDGE, 'characters', *halves, least_of_judge),
  ]:
    out[name] = trained(kind, learned, tested, least_accuracy=least)
    out[name].save(pathlib.Path(folder) / name)
  return out


def half(text) -> int:
  """Which half a text belongs to, the same for texts that look the same."""
  plain = ' '.join(cleaned(text).split())
  return hashlib.sha256(plain.encode()).digest()[0] % 2


def trained(kind, learned, tested, *, least_accuracy) -> Classifier:
  """Fits a classifier to reviews, and tests it: with accuracies in `about`.

  Args:
    kind: of features.
    learned: (text, label) of the reviews that it learns from.
    tested: those that it is tested on.
    least_accuracy: below it there is none.
  """
  start = time.perf_counter()
  texts, labels = zip(*learned)
  fitted = fit(texts, labels, kind=kind, bits=_BITS, penalty=_PENALTY)
  seconds = time.perf_counter() - start
  texts, labels = zip(*tested)
  accuracy = fitted.accuracy(texts, labels)
  if not accuracy >= least_accuracy:
    raise ValueError(
      f'the classifier of {kind} gets {100 * accuracy:.1f} % of'
      f' {len(tested):,} test reviews right, which is less than the'
      f' {100 * least_accuracy:.1f} % that it must; see that the labels are'
      ' right and that the reviews are all there'
    )
  short = [' '.join(text.split()[:PREFIX_WORDS]) for text in texts]
  about = {
    'learned_from': len(learned),
    'tested_on': len(tested),
    'accuracy': accuracy,
    f'accuracy_of_{PREFIX_WORDS}_words': fitted.accuracy(short, labels),
    'seconds': round(seconds, 1),
  }
  return dataclasses.replace(fitted, about=about)


def account(classifiers) -> str:
  """Returns a line of each of {file name: Classifier}."""
  return '\n'.join(
    f'{name}: n-grams of {x.kind}; '
    + ', '.join(
      f'{key.replace("_", " ")} {value:,.6g}' for key, value in x.about.items()
    )
    for name, x in classifiers.items()
  )
