"""Mismatched responses: of another prompt, each used once if possible."""

import collections

import numpy as np
import pytest

from dpo_jax.data import examples
from dpo_jax.data import partners


def _groups(prompts, **fields):
  """One group a prompt; the response is the group's number."""
  return [
    examples.Group(
      np.array(prompt, np.int32),
      (np.array([n], np.int32),),
      weight=2.0,
      p=float(n % 2),
      id=str(n),
      **fields,
    )
    for n, prompt in enumerate(prompts)
  ]


def _partners(groups):
  return [int(g.responses[1][0]) for g in partners.mismatched(groups)]


def _prompts(sizes):
  """Prompts with so many groups each, side by side as halves of pairs are."""
  return [[7] * (n + 1) for n, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize(
  'sizes',
  [
    [1, 1],
    [1] * 9,
    [2] * 8,
    [2, 1, 1],
    [3, 3],
    [3, 1, 2],
    [5, 2, 2, 1],
    [1, 1, 1, 6, 1, 1, 1],
    [4, 1, 7, 2, 2],
  ],
)
def test_every_response_is_partner_once_of_another_prompt(sizes):
  prompts = _prompts(sizes)
  found = _partners(_groups(prompts))
  assert sorted(found) == list(range(len(prompts)))
  for n, partner in enumerate(found):
    assert prompts[n] != prompts[partner]


@pytest.mark.parametrize('sizes', [[5, 1], [1, 9, 3], [20, 2, 1], [4, 3]])
def test_a_prompt_with_most_groups_takes_turns_with_the_others(sizes):
  prompts = _prompts(sizes)
  found = _partners(_groups(prompts))
  most = [7] * (sizes.index(max(sizes)) + 1)
  for n, partner in enumerate(found):
    assert prompts[n] != prompts[partner]
  served = collections.Counter(
    partner for n, partner in enumerate(found) if prompts[n] == most
  )
  others = len(prompts) - max(sizes)
  assert len(served) == others
  assert max(served.values()) - min(served.values()) <= 1
  # The others have each a partner of its own.
  rest = [p for n, p in enumerate(found) if prompts[n] != most]
  assert len(set(rest)) == len(rest) == others


def test_partners_are_the_same_each_time_and_not_the_neighbours():
  prompts = _prompts([2] * 200)
  found = _partners(_groups(prompts))
  assert found == _partners(_groups(prompts))
  distances = [(partner - n) % 400 for n, partner in enumerate(found)]
  assert len(set(distances)) > 100
  near = sum(min(d, 400 - d) <= 3 for d in distances)
  assert near < 20
  # Chosen and rejected serve both sides, so labels stay as they were mixed.
  assert (
    150 < sum(n % 2 == partner % 2 for n, partner in enumerate(found)) < 250
  )


def test_the_rest_of_a_group_stays_as_it_is():
  groups = _groups([[1], [2, 2]], rewards=(0.5,), costs=(0.25,))
  made = partners.mismatched(groups)
  for before, after, other in zip(groups, made, groups[::-1]):
    np.testing.assert_array_equal(after.prompt, before.prompt)
    assert [r.tolist() for r in after.responses] == [
      before.responses[0].tolist(),
      other.responses[0].tolist(),
    ]
    assert (after.weight, after.p, after.id) == (2.0, before.p, before.id)
    assert (after.rewards, after.costs) == ((0.5, 0.0), (0.25, 0.0))
  assert partners.mismatched(_groups([[1], [2]]))[0].rewards is None
  assert partners.mismatched([]) == []


def test_groups_of_equal_text_still_part_by_prompt():
  same = np.array([3], np.int32)
  groups = [
    examples.Group(np.array([n % 3], np.int32), (same,), 1.0, 1.0, str(n))
    for n in range(12)
  ]
  made = partners.mismatched(groups)
  assert [g.id for g in made] == [g.id for g in groups]
  assert {len(g.responses) for g in made} == {2}


def test_one_prompt_alone_has_no_mismatched_responses():
  with pytest.raises(ValueError, match='all 3 groups have the same prompt'):
    partners.mismatched(_groups([[1]] * 3))


def test_only_single_responses_get_partners():
  made = partners.mismatched(_groups([[1], [2]]))
  with pytest.raises(ValueError, match="the form 'unpaired'"):
    partners.mismatched(made)
