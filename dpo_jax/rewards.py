"""Rewards and statistics of texts: text in, numbers out.

A reward is a function `reward(prompts, responses) -> float array [N]` of two
lists of texts. Add one by writing it and naming it in `REWARDS`. A constraint
score is a reward in [0, 1], 1 where the response breaks the constraint; its
table is `CONSTRAINTS`.
"""

import functools
import re

import numpy as np
from vaderSentiment import vaderSentiment

from dpo_jax import names


@functools.cache
def _analyzer():
  return vaderSentiment.SentimentIntensityAnalyzer()  # reads its lexicon


def _compounds(texts):
  score = _analyzer().polarity_scores
  return np.array([score(text)['compound'] for text in texts])


def vader(prompts, responses):
  """Returns VADER's compound sentiment of prompt + response, in [-1, 1].

  The whole text is scored, as the classifier of arXiv:2305.18290 scores prefix
  and completion: a response may begin in the middle of a sentence or a word.
  With neutral prompts the score is the response's.
  """
  return _compounds(
    prompt + response
    for prompt, response in zip(prompts, responses, strict=True)
  )


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


REWARDS = {'vader': vader, 'length': length}
CONSTRAINTS = {'digits': digits, 'negative': negative}


def get(name):
  """Returns the reward of that name."""
  return names.look_up(REWARDS, 'reward', name)


def get_constraint(name):
  """Returns the constraint score of that name."""
  return names.look_up(CONSTRAINTS, 'constraint', name)


def score(reward, prompts, responses):
  """Returns `reward(prompts, responses)` after checking its numbers."""
  if len(prompts) != len(responses):
    raise ValueError(
      f'{len(prompts)} prompts and {len(responses)} responses; give one'
      ' prompt to every response'
    )
  values = np.asarray(reward(prompts, responses), dtype=float)
  if values.shape != (len(responses),):
    raise ValueError(
      f'the reward returned shape {values.shape} for {len(responses)}'
      f' responses; it must return {(len(responses),)}'
    )
  finite = np.isfinite(values)
  if not finite.all():
    n = int(np.argmin(finite))
    raise ValueError(
      f'the reward of text {n} is {values[n]}; make the reward finite for'
      f'\n  prompt:   {prompts[n]!r}\n  response: {responses[n]!r}'
    )
  return values


def score_constraint(constraint, prompts, responses):
  """Returns `constraint(prompts, responses)` after checking its numbers."""
  values = score(constraint, prompts, responses)
  outside = (values < 0.0) | (values > 1.0)
  if outside.any():
    n = int(np.argmax(outside))
    raise ValueError(
      f'the constraint score of text {n} is {values[n]}; scale the constraint'
      f' into [0, 1]\n  prompt:   {prompts[n]!r}\n  response: {responses[n]!r}'
    )
  return values


def distinct_n(texts, n):
  """Returns the share of different n-grams among all n-grams of the texts.

  N-grams of lower-cased words split at white space, pooled over the texts
  (arXiv:1510.03055). The share falls with the number of texts: compare equal
  numbers. 0 where no text has n words.
  """
  grams = []
  for text in texts:
    words = text.lower().split()
    grams += zip(*(words[i:] for i in range(n)))
  return len(set(grams)) / len(grams) if grams else 0.0
