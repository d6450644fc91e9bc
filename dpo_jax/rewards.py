"""Rewards and statistics of texts: text in, numbers out.

A reward is a function `reward(prompts, responses) -> float array [N]` of two
lists of texts; one that looks at where a response ended is an `EndAware`. Add
one by writing it and naming it in `REWARDS`. A constraint
score is a reward in [0, 1], 1 where the response breaks the constraint; its
table is `CONSTRAINTS`.

Names of rewards, as configs write them:

  length, vader                 of `REWARDS`
  rule:NAME                     1 - a score of `CONSTRAINTS`: 1 where a rule is
                                kept
  sentiment:PATH                log odds of a classifier's file (`sentiment`)
  sentiment_probability:PATH    its probability of a positive text
  python:MODULE.FUNCTION        any function of yours
  model:WORKDIR                 a reward model that `train` trained: that needs
                                devices, so `reward_models.get` has it too
"""

import abc
import collections
import functools
import importlib
import itertools
import re

import numpy as np
from vaderSentiment import vaderSentiment

from dpo_jax import names
from dpo_jax import sentiment


class EndAware(abc.ABC):
  """A reward that looks at which responses ended and which were cut."""

  @abc.abstractmethod
  def __call__(self, prompts, responses, ended=None):
    """Scores; `ended` is bool [N], None if all did."""


@functools.cache
def _analyzer():
  return vaderSentiment.SentimentIntensityAnalyzer()  # reads its lexicon


def _compounds(texts):
  score = _analyzer().polarity_scores
  return np.array([score(text)['compound'] for text in texts])


def _whole(prompts, responses):
  return [
    prompt + response
    for prompt, response in zip(prompts, responses, strict=True)
  ]


def vader(prompts, responses):
  """Returns VADER's compound sentiment of prompt + response, in [-1, 1].

  The whole text is scored, as the classifier of arXiv:2305.18290 scores prefix
  and completion: a response may begin in the middle of a sentence or a word.
  With neutral prompts the score is the response's.
  """
  return _compounds(_whole(prompts, responses))


def length(prompts, responses):
  """Returns the characters of each response: the simplest reward to learn."""
  del prompts
  return np.array([float(len(response)) for response in responses])


def digits(prompts, responses):
  """Returns 1 for each response that contains a digit, else 0."""
  del prompts
  return np.array([float(bool(re.search(r'\d', text))) for text in responses])


def negative(prompts, responses):
  """Returns how negative each response is: (1 - VADER's compound) / 2."""
  del prompts
  return (1.0 - _compounds(responses)) / 2.0


def rule(name):
  """Returns the reward 1 - score of a constraint: 1 where the rule is kept."""
  constraint = get_constraint(name)
  return lambda prompts, responses: (
    1.0 - score_constraint(constraint, prompts, responses)
  )


def log_odds(path):
  """Returns the reward log(P(positive) / P(negative)) of prompt + response.

  `path` is of a file of `sentiment`. This is the logit that TRL's PPO example
  takes, and EXO (arXiv:2402.00856); the whole text is scored, as in `vader`.
  """
  classifier = sentiment.load(path)
  return lambda prompts, responses: classifier.log_odds(
    _whole(prompts, responses)
  )


def probability(path):
  """Returns the reward P(positive | prompt + response), in [0, 1].

  What the DPO paper's frontier has on its axis (arXiv:2305.18290, section 6).
  """
  classifier = sentiment.load(path)
  return lambda prompts, responses: classifier.probability(
    _whole(prompts, responses)
  )


def _parted(path):
  """Returns (MODULE, FUNCTION) of MODULE.FUNCTION."""
  module, _, name = path.rpartition('.')
  if not module or not name:
    raise ValueError(
      f'reward python:{path}: write python:MODULE.FUNCTION, such as'
      ' python:my_rewards.politeness'
    )
  return module, name


def function(path):
  """Returns the function MODULE.FUNCTION, a reward of the user's."""
  module, name = _parted(path)
  try:
    found = importlib.import_module(module)
  except ImportError as error:
    raise ValueError(
      f'reward python:{path}: module {module!r} cannot be imported ({error});'
      ' install it, or put its folder on PYTHONPATH'
    ) from error
  known = {key: value for key, value in vars(found).items() if key[0] != '_'}
  made = names.look_up(known, f'name in module {module}', name)
  if not callable(made):
    raise ValueError(
      f'reward python:{path} is {made!r:.60}, not a function (prompts,'
      ' responses) -> [N]'
    )
  return made


REWARDS = {'vader': vader, 'length': length}
# What stands before the colon of a name -> what makes a reward of the rest.
MAKERS = {
  'rule': rule,
  'sentiment': log_odds,
  'sentiment_probability': probability,
  'python': function,
}
CONSTRAINTS = {'digits': digits, 'negative': negative}
# Kinds of NumPy's arrays that are no numbers: texts, complex ones, dates.
_NO_NUMBERS = 'USMmc'


def check(name):
  """Refuses a name that no reward has, as far as the name alone tells."""
  kind, colon, rest = str(name).partition(':')
  if not colon:
    names.look_up(REWARDS, 'reward', name)
    return
  names.look_up(MAKERS, 'kind of reward', kind)
  if not rest:
    raise ValueError(f'reward {name!r} names nothing behind its colon')
  if kind in _READERS:
    _READERS[kind](rest)


def get(name):
  """Returns the reward of that name, but for those of `reward_models`."""
  check(name)
  kind, colon, rest = str(name).partition(':')
  return MAKERS[kind](rest) if colon else REWARDS[name]


def get_constraint(name):
  """Returns the constraint score of that name."""
  return names.look_up(CONSTRAINTS, 'constraint', name)


# Kind -> what refuses its rest without a file or an import, where that can be.
_READERS = {'rule': get_constraint, 'python': _parted}


def score(reward, prompts, responses, *, name='', ended=None):
  """Returns `reward(prompts, responses)` after checking its numbers.

  They are float64 [N], and finite in float32, in which they are learned from.
  `name` is what errors call the reward. `ended`, bool [N], is for who looks at
  it; None: all responses did.
  """
  if len(prompts) != len(responses):
    raise ValueError(
      f'{len(prompts)} prompts and {len(responses)} responses; give one'
      ' prompt to every response'
    )
  more = {'ended': ended} if isinstance(reward, EndAware) else {}
  returned = reward(prompts, responses, **more)
  name = f'reward {name!r}' if name else 'reward'
  values = _numbers(returned, name)
  if values.shape != (len(responses),):
    # The first text without a number, where it is one number a text.
    n = len(values) if values.ndim == 1 else 0
    raise ValueError(
      f'the {name} returned shape {values.shape} for {len(responses)}'
      f' responses; it must return {(len(responses),)}, so a number also for'
      + _shown(prompts, responses, min(n, len(responses) - 1))
    )
  with np.errstate(over='ignore'):
    finite = np.isfinite(np.float32(values))
  if not finite.all():
    n = int(np.argmin(finite))
    large = ', too large for float32' if np.isfinite(values[n]) else ''
    raise ValueError(
      f'the {name} of text {n} is {values[n]}{large}; make the reward finite'
      f' for{_shown(prompts, responses, n)}'
    )
  return values


def _numbers(returned, name):
  """Returns what a reward returned as float64; raises where that is none."""
  try:
    values = np.asarray(returned)
    if values.dtype.kind not in _NO_NUMBERS:
      return values.astype(np.float64)
  except (TypeError, ValueError):  # ragged, or of anything
    pass
  shown = ' '.join(f'{returned!r:.80}'.split())
  raise ValueError(
    f'the {name} returned {shown}, which are no numbers; it must return one'
    ' number for every response'
  )


def _shown(prompts, responses, n):
  """Shows text `n` at the end of an error."""
  if not responses:
    return ' no text'
  return f'\n  prompt:   {prompts[n]!r}\n  response: {responses[n]!r}'


def score_constraint(constraint, prompts, responses):
  """Returns `constraint(prompts, responses)` after checking its numbers."""
  values = score(constraint, prompts, responses)
  outside = (values < 0.0) | (values > 1.0)
  if outside.any():
    n = int(np.argmax(outside))
    raise ValueError(
      f'the constraint score of text {n} is {values[n]}; scale the constraint'
      f' into [0, 1]{_shown(prompts, responses, n)}'
    )
  return values


def distinct_n(texts, n):
  """Returns the share of different n-grams among all n-grams of the texts.

  N-grams of lower-cased words split at white space, pooled over the texts
  (arXiv:1510.03055). The share falls with the number of texts: compare equal
  numbers. 0 where no text has n words.
  """
  grams = _grams(texts, n)
  return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_error(texts, n, *, per_prompt):
  """Returns the standard error of `distinct_n` over prompts: the jackknife's.

  sqrt((N - 1) / N sum (x_i - mean x)^2), where x_i is the share without the
  texts of prompt i; in expectation no less than the true one of N - 1 prompts
  (Efron and Stein 1981, Annals of Statistics 9). No bootstrap: a prompt that is
  drawn twice brings the same n-grams again, which lowers the share as much as
  texts that repeat each other do.

  Args:
    texts: those of a prompt stand side by side.
    n: words of an n-gram.
    per_prompt: texts of each prompt.
  """
  found = [
    _grams(texts[at : at + per_prompt], n)
    for at in range(0, len(texts), per_prompt)
  ]
  own = [set(grams) for grams in found]
  holders = collections.Counter(itertools.chain.from_iterable(own))
  alone = np.array([sum(holders[gram] == 1 for gram in grams) for grams in own])
  sizes = np.array([len(grams) for grams in found])
  shares = (len(holders) - alone) / np.maximum(sizes.sum() - sizes, 1)
  return float(shares.std() * (len(shares) - 1) ** 0.5)


def _grams(texts, n):
  """Lists the n-grams of each text, one text after another."""
  grams = []
  for text in texts:
    words = text.lower().split()
    grams += zip(*(words[i:] for i in range(n)))
  return grams
