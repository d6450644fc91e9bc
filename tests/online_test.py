import json

import numpy as np
import pytest

from configs import quickstart
from dpo_jax import online


def test_best_and_worst_of_each_prompt_make_its_pair():
  pairs = online.best_and_worst(
    ['p', 'q', 'r'],
    ['p0', 'p1', 'p2', 'q0', 'q1', 'q2', 'r0', 'r1', 'r2'],
    np.array([0, 1, 0, 0, 0, 0, 1, 1, 0], bool),
    np.array([0.1, 0.9, -0.5, 0.2, 0.2, 0.2, -1.0, 1.0, 1.0]),
    samples_per_prompt=3,
    pairs_per_prompt=1,
  )
  assert pairs == [
    {
      'prompt': 'p',
      'chosen': 'p1',
      'rejected': 'p2',
      'chosen_ended': True,
      'rejected_ended': False,
    },
    {
      'prompt': 'r',
      'chosen': 'r1',  # the first of equals
      'rejected': 'r0',
      'chosen_ended': True,
      'rejected_ended': True,
    },
  ]


def test_further_pairs_come_from_the_inner_ranks():
  pairs = online.best_and_worst(
    ['p'],
    list('abcd'),
    np.zeros(4, bool),
    np.array([0.3, -0.2, 0.9, 0.1]),
    samples_per_prompt=4,
    pairs_per_prompt=2,
  )
  assert [(p['chosen'], p['rejected']) for p in pairs] == [
    ('c', 'b'),
    ('a', 'd'),
  ]


def test_prompts_in_train_and_test_are_refused(tmp_path):
  path = tmp_path / 'prompts.json'
  path.write_text(json.dumps({'train': ['a', 'b'], 'test': ['b']}))
  with pytest.raises(ValueError, match='1 prompts are in train and in test'):
    online.read_prompts(str(path))
  path.write_text(json.dumps({'train': ['a']}))
  with pytest.raises(ValueError, match='must hold'):
    online.read_prompts(str(path))


def train_config(**changes):
  config = quickstart.get_config('debug')
  config.train.update_from_flattened_dict(changes)
  return config.train.to_dict()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'seed': 3}, 'train.seed is set by the loop'),
    ({'data.source': 'x.jsonl'}, 'train.data.source is set by the loop'),
    ({'eval.samples.reward': 'length'}, 'reward is set by the loop'),
    ({'eval.samples.temperature': 0.7}, 'temperature 1'),
    ({'eval.samples.num_prompts': 0}, 'num_prompts'),
    ({'data.max_response_tokens': 4}, 'would cut; raise that above it'),
  ],
)
def test_what_would_fail_late_is_refused_at_the_start(changes, message):
  with pytest.raises(ValueError, match=message):
    online.check_train_config(train_config(**changes), max_new_tokens=4)
  online.check_train_config(train_config(), max_new_tokens=4)
