import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import attention
from dpo_jax import objectives
from dpo_jax.data import examples
from dpo_jax.data import partners
from dpo_jax.data import rows
from dpo_jax.models import transformer
from tests import worlds

P1, P2, P3, C1, C2, R1, R2, E = 11, 12, 13, 21, 22, 31, 32, 99
# What the model sees of a batch.
INPUTS = ('tokens', 'positions', 'lo', 'hi', 'source', 'target', 'slot')


def group(prompt, *responses, **fields):
  return examples.Group(
    np.array(prompt, np.int32),
    tuple(np.array(r, np.int32) for r in responses),
    1.0,
    1.0,
    'x',
    **fields,
  )


def layout(groups, members, *, T, S, G, K, window=None):
  return rows.fill(
    groups,
    members,
    row_length=T,
    row_scored=S,
    row_groups=G,
    responses=K,
    window=window,
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
  assert row['at'] == [5, 6, 7, 1, 0, 0]
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
  assert rows.slots_needed(three, window=None) == 6


def literal(groups, members, **shape):
  batch = layout(groups, members, **shape)
  return {name: array.tolist() for name, array in batch.items()}


def test_an_odd_last_block_has_no_left_side():
  three = group([P1, P2], [C1, C2, E], [R1, E], [R2])
  row = literal([three], [[0]], T=12, S=7, G=2, K=3)
  assert row['tokens'] == [[E, R1, P1, P2, C1, C2, E, P1, P2, R2, 0, 0]]
  assert row['positions'] == [[3, 2, 0, 1, 2, 3, 4, 0, 1, 2, 0, 0]]
  assert row['lo'] == [[0, 1, 2, 2, 2, 2, 2, 7, 7, 7, 10, 11]]
  assert row['hi'] == [[4, 4, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
  assert row['source'] == [[3, 4, 5, 3, 1, 8, 0]]
  assert row['target'] == [[C1, C2, E, R1, E, R2, 0]]
  assert row['slot'] == [[0, 0, 0, 1, 1, 2, -1]]
  assert row['mask'] == [[True, False]] and row['group'] == [[0, -1]]
  assert rows.slots_needed(three, window=None) == 10


def test_four_responses_are_two_whole_blocks():
  four = group([P1, P2], [C1], [R1, E], [C2, E], [R2])
  row = literal([four], [[0]], T=10, S=6, G=1, K=4)
  assert row['tokens'] == [[E, R1, P1, P2, C1, R2, P1, P2, C2, E]]
  assert row['positions'] == [[3, 2, 0, 1, 2, 2, 0, 1, 2, 3]]
  assert row['lo'] == [[0, 1, 2, 2, 2, 5, 6, 6, 6, 6]]
  assert row['hi'] == [[4, 4, 3, 4, 5, 8, 7, 8, 9, 10]]
  assert row['source'] == [[3, 3, 1, 7, 8, 7]]
  assert row['target'] == [[C1, R1, E, C2, E, R2]]
  assert row['slot'] == [[0, 1, 1, 2, 2, 3]]
  assert rows.slots_needed(four, window=None) == 10


def test_rankings_share_a_row_with_their_rewards_and_costs():
  groups = [
    group([P1], [C1], [R1], [E], rewards=(2.0, 1.0, -1.5)),
    group([P2], [C2], [R2], [E], rewards=(0.5, 0.25, 0.0)),
    group([P3], [C1], [C2], [E], costs=(0.0, 1.0, 0.5)),
  ]
  row = literal(groups, [[2, 0], [1]], T=11, S=7, G=2, K=3)
  assert row['tokens'] == [
    [C2, P3, C1, P3, E, R1, P1, C1, P1, E, 0],
    [R2, P2, C2, P2, E, 0, 0, 0, 0, 0, 0],
  ]
  assert row['lo'][0] == [0, 1, 1, 3, 3, 5, 6, 6, 8, 8, 10]
  assert row['hi'][0] == [2, 2, 3, 4, 5, 7, 7, 8, 9, 10, 11]
  assert row['source'] == [[1, 1, 3, 6, 6, 8, 0], [1, 1, 3, 0, 0, 0, 0]]
  assert row['target'][0] == [C1, C2, E, C1, R1, E, 0]
  assert row['slot'] == [[0, 1, 2, 3, 4, 5, -1], [0, 1, 2, -1, -1, -1, -1]]
  assert row['group'] == [[2, 0], [1, -1]]
  zeros = [0.0, 0.0, 0.0]
  assert row['rewards'] == [[zeros, [2.0, 1.0, -1.5]], [[0.5, 0.25, 0], zeros]]
  assert row['costs'] == [[[0.0, 1.0, 0.5], zeros], [zeros, zeros]]


def test_a_mismatched_response_costs_no_second_prompt():
  singles = [group([P1, P2], [C1, E]), group([P3], [R1, R2, E])]
  made = partners.mismatched(singles)
  row = literal(made, [[0]], T=7, S=5, G=1, K=2)
  assert row['tokens'] == [[E, R2, R1, P1, P2, C1, E]]
  assert row['hi'] == [[5, 5, 5, 4, 5, 6, 7]]
  assert row['target'] == [[C1, E, R1, R2, E]]
  assert row['slot'] == [[0, 0, 1, 1, 1]]
  assert (
    rows.slots_needed(made[0], window=None)
    == rows.slots_needed(singles[0], window=None) + 3
  )


def test_a_left_response_beyond_the_window_gets_a_prompt_of_its_own():
  pair = group([P1, P2, P3], [C1, C2, E], [R1, E])
  fits = literal([pair], [[0]], T=12, S=6, G=1, K=2, window=5)
  assert fits == literal([pair], [[0]], T=12, S=6, G=1, K=2)
  assert rows.slots_needed(pair, window=5) == 8
  row = literal([pair], [[0]], T=12, S=6, G=1, K=2, window=4)
  assert row['tokens'] == [[P1, P2, P3, C1, C2, E, P1, P2, P3, R1, E, 0]]
  assert row['positions'] == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0]]
  assert row['lo'] == [[0, 0, 0, 0, 0, 0, 6, 6, 6, 6, 6, 11]]
  assert row['hi'] == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
  assert row['source'] == [[2, 3, 4, 8, 9, 0]]
  assert row['target'] == [[C1, C2, E, R1, E, 0]]
  assert row['slot'] == [[0, 0, 0, 1, 1, -1]]
  assert rows.slots_needed(pair, window=4) == 11


@pytest.mark.parametrize('window', [None, 8])
@pytest.mark.parametrize('K', [1, 2, 3, 4, 5])
def test_a_scored_token_is_predicted_from_what_came_before(K, window):
  groups = worlds.make_groups(12, responses=K, seed=K)
  members = rows.assign(
    [rows.slots_needed(g, window=window) for g in groups],
    [rows.scored_tokens(g) for g in groups],
    row_length=120,
    row_scored=80,
  )
  most = max(map(len, members))
  assert most > 1
  batch = layout(groups, members, T=120, S=80, G=most, K=K, window=window)
  seen = 0
  for r, s in np.argwhere(batch['slot'] >= 0):
    g, k = divmod(int(batch['slot'][r, s]), K)
    of = groups[batch['group'][r, g]]
    t = int(np.sum(batch['slot'][r, :s] == batch['slot'][r, s]))
    assert batch['target'][r, s] == of.responses[k][t]
    at = batch['at'][r, s]
    assert batch['tokens'][r, at] == of.responses[k][t]
    assert batch['positions'][r, at] == len(of.prompt) + t
    source = batch['source'][r, s]
    lo, hi = batch['lo'][r, source], batch['hi'][r, source]
    assert lo <= source < hi
    positions = batch['positions'][r, lo:hi]
    order = np.argsort(positions)
    np.testing.assert_array_equal(
      positions[order], np.arange(len(of.prompt) + t)
    )
    assert batch['positions'][r, source] == len(of.prompt) + t - 1
    np.testing.assert_array_equal(
      batch['tokens'][r, lo:hi][order],
      np.concatenate([of.prompt, of.responses[k][:t]]),
    )
    seen += 1
  assert seen == sum(map(rows.scored_tokens, groups))


@functools.partial(jax.jit, static_argnums=0)
def rows_values_and_grads(config, params, batch, weight_RS):
  """Token log-probs of a batch, and gradients of their weighted sum."""
  token_logps = objectives.make_token_logps(config, chunk=16)

  def total(params):
    values_RS = token_logps({'params': params}, batch)
    return jnp.sum(weight_RS * values_RS), values_RS

  grads, values_RS = jax.grad(total, has_aux=True)(params)
  return values_RS, grads


@functools.partial(jax.jit, static_argnums=0)
def plain_values_and_grads(config, params, tokens_NT, weight_NT):
  """The same of every token but the first of plain causal sequences."""

  def total(params):
    positions_NT = jnp.broadcast_to(
      jnp.arange(tokens_NT.shape[1]), tokens_NT.shape
    )
    hidden_NTD = transformer.Transformer(config).apply(
      {'params': params},
      tokens_NT,
      positions_NT,
      0 * positions_NT,
      positions_NT + 1,
    )
    logits_NTV = hidden_NTD[:, :-1] @ transformer.unembedding(params).T
    logits_NTV = attention.soft_cap(logits_NTV, config.logit_cap)
    values_NT = jnp.take_along_axis(
      jax.nn.log_softmax(logits_NTV), tokens_NT[:, 1:, None], -1
    )[..., 0]
    return jnp.sum(weight_NT * values_NT), values_NT

  grads, values_NT = jax.grad(total, has_aux=True)(params)
  return values_NT, grads


@pytest.mark.parametrize('family', ['llama', 'gpt2'])
@pytest.mark.parametrize('K', [1, 2, 3])
def test_rows_equal_separate_sequences(family, K):
  assert_rows_equal_sequences(worlds.FAMILIES[family], K)


# Prompt and left response have 6 to 13 tokens, in some groups 9 and 13.
@pytest.mark.parametrize(
  'K, window, fits',
  [
    (2, 5, {False}),
    (2, 9, {False, True}),
    (2, 13, {True}),
    (2, 40, {True}),
    (3, 12, {False, True}),
  ],
)
def test_rows_with_windows_equal_separate_sequences(K, window, fits):
  config = dataclasses.replace(worlds.GEMMA, window=window)
  groups = assert_rows_equal_sequences(config, K)
  lengths = {len(g.prompt) + len(g.responses[1]) for g in groups}
  assert {length <= window for length in lengths} == fits
  assert window in lengths or (K, window) not in [(2, 9), (2, 13)]


def test_prompts_shared_beyond_the_window_would_be_wrong():
  with pytest.raises(AssertionError, match='Mismatched elements'):
    assert_rows_equal_sequences(worlds.GEMMA, 2, fall_back=False)


def assert_rows_equal_sequences(config, K, *, fall_back=True):
  """Compares values and gradients; returns the groups."""
  params = worlds.params_of(config)
  # Up to 15 sequences of up to 16 tokens, and shapes that all K share.
  groups = worlds.make_groups(15 // K, responses=K)
  window = config.window if fall_back else None
  members = rows.assign(
    [rows.slots_needed(g, window=window) for g in groups],
    [rows.scored_tokens(g) for g in groups],
    row_length=72,
    row_scored=30,
    rows=4,
  )
  assert len(members) == 4 and max(map(len, members)) > 1
  G = max(map(len, members))
  batch = layout(groups, members, T=72, S=30, G=G, K=K, window=window)

  sequences = [
    np.concatenate([g.prompt, response])
    for g in groups
    for response in g.responses
  ]
  tokens_NT = np.zeros((15, 16), np.int32)
  for n, sequence in enumerate(sequences):
    tokens_NT[n, : len(sequence)] = sequence
  # Where in [N, T] each scored token of the rows is.
  scored_RS = batch['slot'] >= 0
  places = []
  for r, s in np.argwhere(scored_RS):
    slot = batch['slot'][r, s]
    number = batch['group'][r, slot // K]
    before = np.sum(batch['slot'][r, :s] == slot)
    places.append(
      (number * K + slot % K, len(groups[number].prompt) - 1 + before)
    )
  assert len(set(places)) == sum(len(r) for g in groups for r in g.responses)
  places = tuple(np.transpose(places))

  weight_RS = np.zeros(scored_RS.shape, np.float32)
  weight_RS[scored_RS] = np.random.default_rng(5).normal(size=len(places[0]))
  weight_NT = np.zeros((15, 15), np.float32)
  weight_NT[places] = weight_RS[scored_RS]
  values_RS, grads = rows_values_and_grads(
    config,
    params,
    {name: batch[name] for name in INPUTS},
    weight_RS,
  )
  values_NT, plain_grads = plain_values_and_grads(
    config, params, tokens_NT, weight_NT
  )
  np.testing.assert_allclose(
    np.asarray(values_RS)[scored_RS],
    np.asarray(values_NT)[places],
    rtol=0,
    atol=1e-5,
  )
  # The absolute 1e-7 is for k_bias of GPT-2, whose gradient is rounding only.
  for (path, grad), plain in zip(
    jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(plain_grads)
  ):
    np.testing.assert_allclose(
      grad,
      plain,
      rtol=0,
      atol=1e-7 + 1e-5 * np.abs(plain).max(),
      err_msg=jax.tree_util.keystr(path),
    )
  return groups


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


def test_packing_needs_fewer_rows_than_one_greedy_order():
  rng = np.random.default_rng(4)
  saved = 0
  for _ in range(40):
    slots = rng.integers(5, 30, 24).tolist()
    scored = [int(n) for n in rng.integers(1, slots)]
    greedy = rows.assign(slots, scored, row_length=64, row_scored=64)
    least = -(-sum(slots) // 64)
    members = rows.pack(slots, scored, row_length=64, rows=least)
    if members is None:
      continue
    assert sorted(g for row in members for g in row) == list(range(24))
    assert len(members) == least
    for row in members:
      assert sum(slots[g] for g in row) <= 64
    saved += len(greedy) > least
  assert saved > 0


def test_packing_evens_out_scored_tokens():
  slots = [10, 9, 8, 7, 6, 5, 4, 3] * 4
  scored = [9, 1, 7, 1, 5, 1, 3, 1] * 4
  members = rows.pack(slots, scored, row_length=64, rows=4)
  most = max(sum(scored[g] for g in row) for row in members)
  assert most <= 1.1 * sum(scored) / 4 + 1
  again = rows.pack(slots, scored, row_length=64, rows=4)
  assert members == again


def test_what_cannot_fit_is_not_packed():
  assert rows.pack([33, 33, 33], [1, 1, 1], row_length=64, rows=2) is None
  assert rows.pack([65], [1], row_length=64, rows=2) is None
