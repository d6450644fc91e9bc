import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import logps
from dpo_jax import objectives
from dpo_jax.data import examples
from dpo_jax.data import rows
from dpo_jax.models import transformer
from tests import worlds

P1, P2, P3, C1, C2, R1, E = 11, 12, 13, 21, 22, 31, 99


def group(prompt, *responses):
  return examples.Group(
    np.array(prompt, np.int32),
    tuple(np.array(r, np.int32) for r in responses),
    1.0,
    1.0,
    'x',
  )


def layout(groups, members, *, T, S, G, K):
  return rows.fill(
    groups,
    members,
    row_length=T,
    row_scored=S,
    row_groups=G,
    responses=K,
  )


def test_a_pair_is_laid_out_as_documented():
  pair = group([P1, P2, P3], [C1, C2, E], [R1, E])
  row = layout([pair], [[0]], T=10, S=6, G=1, K=2)
  row = {name: array[0].tolist() for name, array in row.items()}
  assert row['tokens'] == [E, R1, P1, P2, P3, C1, C2, E, 0, 0]
  assert row['positions'] == [4, 3, 0, 1, 2, 3, 4, 5, 0, 0]
  assert row['lo'] == [0, 1, 2, 2, 2, 2, 2, 2, 8, 9]
  assert row['hi'] == [5, 5, 3, 4, 5, 6, 7, 8, 9, 10]
  assert row['source'] == [4, 5, 6, 4, 1, 0]
  assert row['target'] == [C1, C2, E, R1, E, 0]
  assert row['slot'] == [0, 0, 0, 1, 1, -1]
  assert row['mask'] == [True] and row['group'] == [0]


def test_a_single_response_is_prompt_then_response():
  one = group([P1, P2], [C1, E])
  row = layout([one], [[0]], T=4, S=2, G=1, K=1)
  assert row['tokens'].tolist() == [[P1, P2, C1, E]]
  assert row['lo'].tolist() == [[0, 0, 0, 0]]
  assert row['hi'].tolist() == [[1, 2, 3, 4]]
  assert row['source'].tolist() == [[1, 2]]


def test_three_responses_are_two_blocks():
  three = group([P1], [C1], [R1], [C2, E])
  row = layout([three], [[0]], T=6, S=4, G=1, K=3)
  assert row['tokens'].tolist() == [[R1, P1, C1, P1, C2, E]]
  assert row['positions'].tolist() == [[1, 0, 1, 0, 1, 2]]
  assert row['lo'].tolist() == [[0, 1, 1, 3, 3, 3]]
  assert row['hi'].tolist() == [[2, 2, 3, 4, 5, 6]]
  assert row['source'].tolist() == [[1, 1, 3, 4]]
  assert row['slot'].tolist() == [[0, 1, 2, 2]]
  assert rows.slots_needed(three) == 6


def separate_logps(config, params, groups):
  """Log-probs of each response as a causal row of its own: [groups, K]."""
  pairs = [(g.prompt, r) for g in groups for r in g.responses]
  T = max(len(p) + len(r) for p, r in pairs)
  tokens = np.zeros((len(pairs), T), np.int32)
  scored = np.zeros((len(pairs), T - 1), bool)
  for i, (prompt, response) in enumerate(pairs):
    both = np.concatenate([prompt, response])
    tokens[i, : len(both)] = both
    scored[i, len(prompt) - 1 : len(both) - 1] = True
  positions = np.tile(np.arange(T), (len(pairs), 1))
  hidden = transformer.Transformer(config).apply(
    {'params': params}, tokens, positions, 0 * positions, positions + 1
  )
  logits = hidden[:, :-1] @ transformer.unembedding(params).T
  log_probs = jnp.take_along_axis(
    jax.nn.log_softmax(logits), tokens[:, 1:, None], -1
  )[..., 0]
  return jnp.sum(log_probs * scored, 1).reshape(len(groups), -1)


@pytest.mark.parametrize('family', worlds.FAMILIES)
@pytest.mark.parametrize('K', [1, 2, 3])
def test_rows_equal_separate_sequences(family, K):
  config = worlds.FAMILIES[family]
  params = worlds.params_of(config)
  groups = worlds.make_groups(5, responses=K)
  T = 20 * K
  members = rows.assign(
    [rows.slots_needed(g) for g in groups],
    [rows.scored_tokens(g) for g in groups],
    row_length=T,
    row_scored=40,
  )
  assert 1 < len(members) < 5  # several groups share a row
  G = max(map(len, members))
  batch = layout(groups, members, T=T, S=40, G=G, K=K)
  token_logps = objectives.make_token_logps(config, chunk=16)
  weight = jax.random.normal(jax.random.key(5), (5, K))

  def from_rows(params):
    values = token_logps(params, batch)
    sums = logps.sum_by_slot(values, batch['slot'], num_slots=G * K)
    sums = sums.reshape(-1, K)
    order = batch['group'].reshape(-1)
    return (
      jnp.zeros((5, K)).at[order].add(jnp.where(order[:, None] >= 0, sums, 0.0))
    )

  def from_sequences(params):
    return separate_logps(config, params, groups)

  np.testing.assert_allclose(
    jax.jit(from_rows)(params),
    jax.jit(from_sequences)(params),
    rtol=1e-5,
    atol=1e-5,
  )
  grads = [
    jax.jit(jax.grad(lambda p, f=f: jnp.sum(weight * f(p))))(params)
    for f in (from_rows, from_sequences)
  ]
  largest = max(np.abs(x).max() for x in jax.tree.leaves(grads[1]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
    *grads,
  )


def test_assignment_respects_both_capacities():
  rng = np.random.default_rng(0)
  slots = rng.integers(5, 60, 40)
  scored = np.minimum(slots - 1, rng.integers(1, 50, 40))
  members = rows.assign(slots, scored, row_length=64, row_scored=50)
  assert sorted(g for row in members for g in row) == list(range(40))
  for row in members:
    assert sum(slots[row]) <= 64 and sum(scored[row]) <= 50


def test_a_group_longer_than_a_row_is_refused():
  with pytest.raises(ValueError, match='raise data'):
    rows.assign([65], [3], row_length=64, row_scored=50)
