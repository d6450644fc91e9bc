import collections
import dataclasses

import numpy as np
import pytest

from dpo_jax import policies
from dpo_jax import weights
from dpo_jax.data import batches
from dpo_jax.data import builders
from dpo_jax.data import examples
from dpo_jax.data import rows
from dpo_jax.data import tokenizers
from tests import worlds


def hh_like(number, *, seed=0):
  """Groups with lengths spread like those of HH harmless-base."""
  rng = np.random.default_rng(seed)

  def tokens(mean, most):
    size = np.clip(rng.lognormal(np.log(mean) - 0.4, 0.9), 1, most)
    return np.zeros(int(size), np.int32)

  return [
    examples.Group(
      tokens(125, 256), (tokens(41, 256), tokens(51, 256)), 1.0, 1.0, str(i)
    )
    for i in range(number)
  ]


def test_order_is_a_function_of_seed_and_step():
  def numbers(seed):
    return [
      batches.shuffled(seed=seed, step=s, batch_size=4, num_groups=10)
      for s in range(5)
    ]

  assert numbers(0) == numbers(0) and numbers(0) != numbers(1)
  # Literal, so that a change that would break resumed runs is seen.
  assert numbers(0)[:3] == LITERAL


LITERAL = [[4, 6, 2, 7], [3, 5, 9, 0], [8, 1, 9, 1]]


@pytest.mark.parametrize('batch_size', [1, 3, 10, 25])
def test_every_epoch_sees_every_group_once(batch_size):
  seen = [
    g
    for s in range(60 // batch_size)
    for g in batches.shuffled(
      seed=3, step=s, batch_size=batch_size, num_groups=10
    )
  ]
  for start in range(0, len(seen) - 9, 10):
    assert sorted(seen[start : start + 10]) == list(range(10))


def test_rows_are_full_and_shapes_are_few():
  groups = hh_like(2000)
  plan = batches.training_plan(
    groups,
    seed=0,
    num_steps=31,
    batch_size=64,
    row_length=1024,
    multiple=1,
    window=None,
  )
  shapes = collections.Counter()
  for step in range(plan.num_steps):
    batch = plan.batch(step)
    shapes[tuple(batch['tokens'].shape), tuple(batch['target'].shape)] += 1
    assert batch['mask'].sum() == 64
    used = sorted(batch['group'][batch['mask']].tolist())
    assert used == sorted(plan.steps[step])
  assert len(shapes) <= 2
  assert plan.fill() >= 0.88
  # The report tells the truth.
  slots = sum(n * shape[0][0] * shape[0][1] for shape, n in shapes.items())
  assert plan.slots() == slots


@pytest.mark.parametrize('batch_size, multiple', [(8, 1), (16, 8), (64, 8)])
def test_shorter_rows_fill_what_fewer_rows_cannot(batch_size, multiple):
  groups = [g for g in hh_like(800) if rows.slots_needed(g, window=None) <= 640]

  def plan(row_length):
    return batches.training_plan(
      groups,
      seed=0,
      num_steps=8,
      batch_size=batch_size,
      row_length=row_length,
      multiple=multiple,
      window=None,
    )

  # 1,025 slots are no multiple of an attention block: only rows so long.
  whole, free = plan(1025), plan(1024)
  assert {shape.length for shape in whole.shapes} == {1025}
  assert len(free.shapes) <= 2
  for shape in free.shapes:
    assert shape.length % 128 == 0 and shape.length <= 1024
    assert shape.rows % multiple == 0
  assert free.fill() > whole.fill() + 0.02
  for step in range(8):
    batch = free.batch(step)
    assert batch['mask'].sum() == batch_size
    assert batch['tokens'].shape == free.shape_of(step)[:2]
    real = np.sum(batch['hi'] - batch['lo'] > 1)
    assert real <= free.tokens(step) <= free.slots_of(step)


def check_harmless_base(folder, tokenizer, cache_dir):
  """The layout's promise on real pairs: at most 245 slots a pair, 2 shapes."""
  dataset = builders.load(
    'hh',
    source=folder / 'data' / 'hh',
    form='pairs',
    cache_dir=cache_dir,
    held_out=0.0,
    subsets=('harmless-base',),
  )
  # With the limits of the design, and with those of the configs.
  for limits, most_slots, fill in [
    ((600, 300), 245, 0.88),
    ((256, 256), 225, 0.92),
  ]:
    groups, _ = examples.tokenize(
      dataset.splits['train'],
      tokenizer,
      max_prompt_tokens=limits[0],
      max_response_tokens=limits[1],
      form='pairs',
    )
    groups = [g for g in groups if rows.slots_needed(g, window=None) <= 1024]
    assert len(groups) > 2290
    plan = batches.training_plan(
      groups,
      seed=0,
      num_steps=-(-len(groups) // 64),
      batch_size=64,
      row_length=1024,
      multiple=1,
      window=None,
    )
    shapes = {plan.batch(s)['tokens'].shape for s in range(plan.num_steps)}
    assert len(shapes) <= 2
    assert plan.slots() / (64 * plan.num_steps) <= most_slots
    assert plan.fill() >= fill


def test_harmless_base_fills_its_rows(shared, tmp_path):
  folder = shared / 'data' / 'tokenizers' / 'gpt2'
  tokenizer = tokenizers.from_gpt2_files(
    folder / 'vocab.json', folder / 'merges.txt'
  )
  check_harmless_base(shared, tokenizer, tmp_path)


@pytest.mark.slow
def test_harmless_base_fills_its_rows_with_smollm2(shared, tmp_path):
  tokenizer = weights.load(policies.package_file('smollm2-135m')).tokenizer
  check_harmless_base(shared, tokenizer, tmp_path)


def test_rows_can_be_laid_out_in_parts():
  plan = batches.training_plan(
    worlds.make_groups(24),
    seed=0,
    num_steps=3,
    batch_size=12,
    row_length=48,
    multiple=4,
    window=None,
  )
  assert all(shape.rows % 4 == 0 for shape in plan.shapes)
  for step in range(3):
    whole = plan.batch(step)
    count = plan.shape_of(step).rows
    parts = [
      plan.batch(step, own=range(i * count // 4, (i + 1) * count // 4))
      for i in range(4)
    ]
    for name, array in whole.items():
      joined = np.concatenate([part[name] for part in parts])
      np.testing.assert_array_equal(joined, array)


def test_evaluation_drops_no_tail():
  groups = worlds.make_groups(11)
  plan = batches.evaluation_plan(
    groups, batch_size=4, row_length=48, multiple=2, window=None
  )
  seen = []
  for step in range(plan.num_steps):
    batch = plan.batch(step)
    seen += batch['group'][batch['mask']].tolist()
  assert sorted(seen) == list(range(11))


def test_uniform_plan_has_one_shape_whatever_the_lengths():
  shapes = set()
  for seed in range(3):
    groups = worlds.make_groups(7, responses=1, seed=seed)
    plan = batches.uniform_plan(
      groups,
      max_prompt=9,
      max_response=7,
      row_groups=2,
      batch_rows=3,
      multiple=2,
    )
    seen = []
    for step in range(plan.num_steps):
      batch = plan.batch(step)
      shapes.add((batch['tokens'].shape, batch['target'].shape))
      seen += batch['group'][batch['mask']].tolist()
    assert sorted(seen) == list(range(7))
  assert shapes == {((4, 32), (4, 14))}


@pytest.mark.parametrize(
  'responses, window',
  [(1, None), (2, None), (3, None), (4, None), (2, 10), (3, 10)],
)
def test_flat_values_lie_where_their_tokens_do_and_come_back(responses, window):
  groups = worlds.make_groups(9, responses=responses)
  plan = batches.training_plan(
    groups,
    seed=0,
    num_steps=2,
    batch_size=6,
    row_length=60,
    multiple=1,
    window=window,
  )
  assert plan.responses == responses
  starts = plan.starts
  # The value of a token is the token, so placing must reproduce `target`.
  flat = np.concatenate([r for g in groups for r in g.responses])
  returned = np.full(len(flat), -1.0)
  for step in range(2):
    batch = plan.batch(step)
    placed = batches.place(flat.astype(np.float32), starts, batch)
    scored = batch['slot'] >= 0
    np.testing.assert_array_equal(placed[scored], batch['target'][scored])
    assert not placed[~scored].any()
    batches.collect(placed, starts, batch, returned)
  for g in {g for numbers in plan.steps for g in numbers}:
    span = slice(starts[g], starts[g + 1])
    np.testing.assert_array_equal(returned[span], flat[span])


def test_a_pair_longer_than_a_row_says_what_to_change():
  groups = worlds.make_groups(3, prompt=90)
  need = max(rows.slots_needed(g, window=None) for g in groups)
  with pytest.raises(ValueError, match=f'raise it to at least {need}'):
    batches.evaluation_plan(
      groups, batch_size=2, row_length=20, multiple=1, window=None
    )


@pytest.mark.parametrize('multiple', [1, 8])
def test_a_row_that_holds_one_group_alone_is_enough(multiple):
  # 60 of 64 groups have 80 slots of a row of 105: nothing goes beside them.
  groups = []
  for number in range(64):
    response = np.zeros(2 if number % 16 == 0 else 36, np.int32)
    prompt = np.zeros(8, np.int32)
    groups.append(
      examples.Group(prompt, (response, response), 1.0, 1.0, str(number))
    )
  plan = batches.training_plan(
    groups,
    seed=0,
    num_steps=2,
    batch_size=64,
    row_length=105,
    multiple=multiple,
    window=None,
  )
  assert plan.shapes[-1].rows == -(-60 // multiple) * multiple
  for members in plan.members:
    assert sorted(g for row in members for g in row) == list(range(64))


def test_no_groups_is_an_error():
  with pytest.raises(ValueError, match='no examples are left'):
    batches.evaluation_plan(
      [], batch_size=2, row_length=20, multiple=1, window=None
    )


@pytest.mark.parametrize('responses', [1, 3, 4])
def test_rewards_and_costs_follow_their_groups(responses):
  groups = [
    dataclasses.replace(
      group,
      rewards=tuple(n - 0.25 * k for k in range(responses)),
      costs=tuple(k / responses for k in range(responses)),
    )
    for n, group in enumerate(worlds.make_groups(11, responses=responses))
  ]
  plan = batches.evaluation_plan(
    groups, batch_size=4, row_length=90, multiple=2, window=None
  )
  seen = 0
  for step in range(plan.num_steps):
    batch = plan.batch(step)
    for name in ('rewards', 'costs'):
      values = batch[name]
      assert values.dtype == np.float32
      assert values.shape == (*batch['mask'].shape, responses)
      assert not values[~batch['mask']].any()
      for r, g in np.argwhere(batch['mask']):
        group = groups[batch['group'][r, g]]
        expected = np.float32(getattr(group, name))
        np.testing.assert_array_equal(values[r, g], expected)
        seen += 1
  assert seen == 2 * 11


@pytest.mark.parametrize('name', ['rewards', 'costs'])
def test_some_groups_with_rewards_and_some_without_are_refused(name):
  groups = worlds.make_groups(3)
  groups[0] = dataclasses.replace(groups[0], **{name: (1.0, 0.0)})
  with pytest.raises(ValueError, match=f"2 of 3 .* no {name}, such as '1'"):
    batches.evaluation_plan(
      groups, batch_size=2, row_length=99, multiple=1, window=None
    )


def test_mixed_numbers_of_responses_are_refused():
  groups = worlds.make_groups(2) + worlds.make_groups(1, responses=1)
  with pytest.raises(ValueError, match=r'\[1, 2\] responses'):
    batches.evaluation_plan(
      groups, batch_size=2, row_length=99, multiple=1, window=None
    )
