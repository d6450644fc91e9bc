"""Sampling: the cache against full forwards, the distribution, the books."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import attention
from dpo_jax import sampling
from dpo_jax.models import transformer
from tests import worlds

NO_EOS = -1
# Learned positions that the longest prompt and 12 new tokens use up.
FAMILIES = worlds.FAMILIES | {
  'gpt2': dataclasses.replace(worlds.GPT2, max_positions=32)
}
# Ragged, out of order, and one longer than the smallest padded length.
PROMPTS = [
  np.arange(n, dtype=np.int32) * 7 % 50 for n in (3, 1, 20, 16, 7, 2, 5)
]


choose = jax.jit(sampling.choose, static_argnames=('temperature', 'top_p'))


@functools.cache
def random_params(family):
  """Weights large enough that the distribution is far from uniform."""
  return worlds.params_of(FAMILIES[family], size=0.3)


def sample(family, prompts=PROMPTS, **changes):
  keywords = {
    'key': jax.random.key(2),
    'max_new_tokens': 6,
    'temperature': 1.0,
    'top_p': 1.0,
    'eos_id': NO_EOS,
    'batch_size': 8,  # one batch, hence one shape to compile
  }
  keywords.update(changes)
  return sampling.generate(
    FAMILIES[family], {'params': random_params(family)}, prompts, **keywords
  )


@functools.cache
def padded_logps(family):
  """One compiled causal forward of 32 slots; what is padded comes last."""
  config = FAMILIES[family]

  @jax.jit
  def logps(params, tokens_BT):
    slots_BT = jnp.arange(32)[None]
    hidden_BTD = transformer.Transformer(config).apply(
      {'params': params}, tokens_BT, slots_BT, slots_BT * 0, slots_BT + 1
    )
    logits_TV = hidden_BTD[0] @ transformer.unembedding(params).T
    return jax.nn.log_softmax(attention.soft_cap(logits_TV, config.logit_cap))

  return logps


def full_logps(family, tokens):
  """Log-probabilities [T, V] of what follows each token, without a cache."""
  tokens_BT = np.zeros((1, 32), np.int32)
  tokens_BT[0, : len(tokens)] = tokens
  logps_TV = padded_logps(family)(random_params(family), tokens_BT)
  return np.array(logps_TV)[: len(tokens)]


def response_logps(family, prompt, response):
  """Log-probabilities [M, V] of what could follow at every response token."""
  return full_logps(family, np.concatenate([prompt, response]))[
    len(prompt) - 1 : -1
  ]


@pytest.mark.parametrize(
  ('family', 'temperature', 'top_p'),
  [
    ('llama', 1.0, 1.0),
    ('gpt2', 1.0, 1.0),
    ('gemma', 1.0, 1.0),
    ('llama', 0.7, 0.8),
  ],
)
def test_token_logps_are_the_plain_policy_teacher_forced(
  family, temperature, top_p
):
  samples = sample(family, temperature=temperature, top_p=top_p)
  for prompt, response, logps in zip(
    PROMPTS, samples.responses(), samples.token_logps, strict=True
  ):
    expected = response_logps(family, prompt, response)
    expected = expected[np.arange(len(response)), response]
    np.testing.assert_allclose(logps, expected, atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_greedy_is_the_argmax_of_full_forwards(family):
  samples = sample(family, temperature=0)
  for prompt, response in zip(PROMPTS, samples.responses(), strict=True):
    expected = list(prompt)
    for _ in response:
      expected.append(full_logps(family, expected)[-1].argmax())
    assert expected[len(prompt) :] == response.tolist()


def test_any_of_several_ends_a_response():
  free = sample('llama')
  first, other = int(free.tokens[0, 1]), int(free.tokens[4, 2])
  samples = sample('llama', eos_id=(other, first))
  for tokens, number, ended in zip(
    free.tokens.tolist(), samples.lengths, samples.ended
  ):
    places = [n for n, token in enumerate(tokens) if token in (first, other)]
    assert ended == bool(places)
    assert number == (places[0] + 1 if places else len(tokens))
  assert samples.lengths[0] <= 2 and samples.lengths[4] <= 3


def test_eos_ends_a_response_and_counts():
  free = sample('llama')
  eos = int(free.tokens[4, 2])  # an EOS that some rows meet and some do not
  samples = sample('llama', eos_id=eos)
  assert samples.ended.any()
  assert not samples.ended.all()
  for n, tokens in enumerate(free.tokens.tolist()):
    ended = eos in tokens
    length = tokens.index(eos) + 1 if ended else len(tokens)
    assert samples.ended[n] == ended
    assert samples.lengths[n] == length
    assert samples.responses()[n].tolist() == tokens[:length]
    np.testing.assert_allclose(
      samples.token_logps[n, :length], free.token_logps[n, :length], atol=1e-6
    )
    assert not samples.token_logps[n, length:].any()
    assert not samples.tokens[n, length:].any()


def test_decoding_stops_when_every_row_has_ended(monkeypatch):
  steps = []

  def always_eos(logits_BV, *_, **__):
    jax.debug.callback(lambda: steps.append(1))
    return jnp.zeros(len(logits_BV), jnp.int32)

  monkeypatch.setattr(sampling, 'choose', always_eos)
  # A shape that no other test compiles, so that this one traces its `choose`.
  samples = sample('llama', eos_id=0, max_new_tokens=11, batch_size=9)
  jax.effects_barrier()
  assert len(steps) == 1
  assert samples.ended.all()
  assert (samples.lengths == 1).all()


def test_a_sample_does_not_depend_on_its_batch():
  few, all_at_once = sample('llama', batch_size=4), sample('llama')
  np.testing.assert_array_equal(few.tokens, all_at_once.tokens)
  np.testing.assert_allclose(
    few.token_logps, all_at_once.token_logps, atol=1e-5
  )


def test_layers_in_a_stack_give_the_samples_of_layers_apart():
  apart, stacked = (sample('llama', apart=apart) for apart in (True, False))
  np.testing.assert_array_equal(stacked.tokens, apart.tokens)
  np.testing.assert_allclose(stacked.token_logps, apart.token_logps, atol=1e-5)


def test_weights_that_are_as_they_are_computed_with_are_not_copied():
  variables = {'params': random_params('llama')}
  for dtype, copied in [('float32', False), ('bfloat16', True)]:
    config = dataclasses.replace(FAMILIES['llama'], dtype=dtype)
    computed, _ = sampling.prepared(config, variables)
    assert sampling.same(computed, variables) != copied


def test_a_longer_budget_only_appends():
  short, long = sample('llama'), sample('llama', max_new_tokens=9)
  np.testing.assert_array_equal(short.tokens, long.tokens[:, :6])


def test_repeats_of_a_prompt_and_other_keys_give_other_samples():
  repeated = sample('llama', [PROMPTS[2]] * 4)
  assert len({tuple(tokens) for tokens in repeated.tokens.tolist()}) == 4
  other = sample('llama', [PROMPTS[2]] * 4, key=jax.random.key(3))
  assert (repeated.tokens != other.tokens).any()


def test_progress_counts_every_prompt_once():
  done = []
  sample('llama', batch_size=4, on_batch=done.append)
  assert done == [4, 7]


@pytest.mark.parametrize(
  ('top_p', 'kept'),
  [
    (0.2, [0, 1, 0, 0, 0]),
    (0.4, [0, 1, 0, 0, 0]),
    (0.41, [0, 1, 0, 1, 0]),
    (0.7, [0, 1, 0, 1, 0]),
    (0.8, [1, 1, 1, 1, 0]),  # 0 and 2 are equally likely: both stay
    (0.97, [1, 1, 1, 1, 1]),
  ],
)
def test_nucleus_is_the_smallest_likeliest_set(top_p, kept):
  probs_BV = jnp.array([[0.125, 0.40625, 0.125, 0.3125, 0.03125]])
  if top_p == 0.4:  # exactly the mass of the first: nothing more is needed
    top_p = 0.40625
  mask_BV = sampling.nucleus(probs_BV, top_p)
  assert mask_BV[0].astype(int).tolist() == kept


def test_nucleus_agrees_with_sorting_on_many_rows():
  logits_BV = 3 * jax.random.normal(jax.random.key(0), (64, 999))
  probs_BV = np.array(jax.nn.softmax(logits_BV))
  mask_BV = np.array(sampling.nucleus(jnp.array(probs_BV), 0.9))
  for probs, mask in zip(probs_BV, mask_BV, strict=True):
    descending = np.sort(probs)[::-1]
    needed = np.searchsorted(np.cumsum(descending, dtype=float), 0.9) + 1
    assert mask.sum() == needed
    assert probs[mask].min() >= probs[~mask].max()


@pytest.mark.parametrize('temperature', [1.0, 0.5])
@pytest.mark.parametrize('vocab', [5, 600])  # below one block, several blocks
def test_frequencies_match_the_softmax(temperature, vocab):
  draws = 10_000
  logits = 1.5 * jax.random.normal(jax.random.key(3), (vocab,))
  tokens = choose(
    jnp.broadcast_to(logits, (draws, vocab)),
    jax.random.split(jax.random.key(4), draws),
    temperature=temperature,
    top_p=1.0,
  )
  expected = draws * np.array(jax.nn.softmax(logits / temperature))
  observed = np.bincount(tokens, minlength=vocab)
  # Rare tokens are pooled, the usual condition of the chi-square test.
  rare = expected < 10
  if rare.any():
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
  chi_square = ((observed - expected) ** 2 / expected).sum()
  freedom = len(expected) - 1
  assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_truncated_and_impossible_tokens_are_never_drawn():
  draws, vocab = 2_000, 600
  logits = (
    jnp.full(vocab, -jnp.inf)
    .at[jnp.array([3, 299, 599])]
    .set(jnp.array([0.0, 1.0, 2.0]))
  )
  logits_BV = jnp.broadcast_to(logits, (draws, vocab))
  keys = jax.random.split(jax.random.key(0), draws)
  for top_p, drawn in [(1.0, {3, 299, 599}), (0.8, {299, 599}), (0.1, {599})]:
    tokens = choose(logits_BV, keys, temperature=1.0, top_p=top_p)
    assert set(tokens.tolist()) == drawn


@pytest.mark.parametrize(
  ('family', 'prompts', 'changes', 'message'),
  [
    ('llama', [], {}, 'no prompts'),
    ('llama', [PROMPTS[0], PROMPTS[0][:0]], {}, 'prompt 1 has no tokens'),
    ('gpt2', PROMPTS, {'max_new_tokens': 13}, 'max_new_tokens <= 12'),
    ('llama', PROMPTS, {'temperature': -1.0}, 'temperature is -1.0'),
    ('llama', PROMPTS, {'top_p': 0.0}, 'top_p is 0.0'),
    ('llama', PROMPTS, {'batch_size': 0}, 'batch_size is 0'),
  ],
)
def test_what_cannot_be_sampled_is_a_clear_error(
  family, prompts, changes, message
):
  with pytest.raises(ValueError, match=message):
    sample(family, prompts, **changes)


def test_broken_parameters_are_an_error_not_a_text():
  params = jax.tree.map(lambda x: x * np.nan, random_params('llama'))
  with pytest.raises(FloatingPointError, match='sample 0 are not finite'):
    sampling.generate(
      FAMILIES['llama'],
      {'params': params},
      PROMPTS,
      key=jax.random.key(2),
      max_new_tokens=6,
      temperature=1.0,
      top_p=1.0,
      eos_id=NO_EOS,
      batch_size=8,
    )


def test_learned_positions_may_be_used_to_the_last():
  samples = sample('gpt2', max_new_tokens=12)
  expected = response_logps('gpt2', PROMPTS[2], samples.tokens[2])
  np.testing.assert_allclose(
    samples.token_logps[2],
    expected[np.arange(12), samples.tokens[2]],
    atol=1e-5,
  )
