"""Sampling from the policy with a key/value cache.

Prompts are padded on the left, so all rows of a batch end their prompt at the
same slot and every new token is written to the cache at one scalar index. The
padding is invisible: a row attends from its own first slot. Literal example,
prompts `p1 p2 p3` and `q1`, padded to four slots, two new tokens:

  slot       0    1    2    3  | 4    5
  row 0      -    p1   p2   p3 | y1   y2      lo 1
  row 1      -    -    -    q1 | y1   y2      lo 3

Prefill and decoding are one compiled function per shape, which stops as soon
as every row has ended. Tokens after the first may be decoded by layers taken
apart once for all batches (`models/decoding`). A sample depends on the
key, its place in the prompt list and its prompt, never on the batch it was
computed in (up to rounding).

Dimension key: B rows, N prompts, P padded prompt slots, M new tokens, D model,
V vocabulary.
"""

import dataclasses
import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import attention
from dpo_jax.models import decoding
from dpo_jax.models import transformer

# Prompt slots are this number times a power of two: few shapes to compile, and
# at most half of the slots of a longer prompt are padding.
SMALLEST_PROMPT = 8
# Names the loop over new tokens in a compiled program, which does not say how
# often it turns: M - 1 times, or until all have ended.
SCOPE = 'new_tokens'
BLOCK = 256  # near the square root of the usual vocabularies


@dataclasses.dataclass(frozen=True)
class Samples:
  """Sampled responses, in the order of the prompts.

  `token_logps` are log-probabilities of the policy itself, at temperature 1
  and without truncation, whatever distribution was sampled from: this is what
  a KL, an importance ratio or a loss needs. Slots at and past `lengths` hold 0.
  """

  tokens: np.ndarray  # int32 [N, M]
  lengths: np.ndarray  # int32 [N], the EOS counts
  ended: np.ndarray  # bool [N], an EOS was produced
  token_logps: np.ndarray  # float32 [N, M]

  def responses(self):
    """Returns one int32 array per sample, EOS included where produced."""
    return [t[:n] for t, n in zip(self.tokens, self.lengths, strict=True)]


def generate(
  config,
  variables,
  prompts,
  *,
  key,
  max_new_tokens,
  temperature,
  top_p,
  eos_id,
  batch_size,
  places=None,
  apart=None,
  on_batch=None,
):
  """Samples one response to every prompt; repeat a prompt for several.

  Args:
    config: the `TransformerConfig` of the parameters.
    variables: unboxed parameters and perhaps an adapter (`lora.variables`).
    prompts: non-empty list of int32 arrays of any lengths >= 1.
    key: randomness; sample n at step t uses fold_in(fold_in(key, n), t).
    max_new_tokens: M, where an unfinished response is cut.
    temperature: divides the logits; 0 takes the most probable token.
    top_p: mass of the nucleus (arXiv:1904.09751); 1 truncates nothing.
    eos_id: ends a response and is its last token; or an array of several.
    batch_size: rows computed at once; a short batch is filled up.
    places: shardings of the variables to compute with; None: those they have.
    apart: whether tokens are decoded with layers apart, see `models/decoding`;
      None: where that is faster.
    on_batch: called with the number of finished prompts after every batch.

  Returns:
    `Samples`.
  """
  lengths = np.array([len(prompt) for prompt in prompts])
  _check(config, lengths, max_new_tokens, temperature, top_p, batch_size)
  num, shape = len(prompts), (len(prompts), max_new_tokens)
  samples = {
    'tokens': np.zeros(shape, np.int32),
    'lengths': np.zeros(num, np.int32),
    'ended': np.zeros(num, bool),
    'token_logps': np.zeros(shape, np.float32),
  }
  if not same(prepared(config, variables, places=places)[0], variables):
    cast = jax.jit(transformer.cast, static_argnums=1, out_shardings=places)
    variables = cast(variables, config.dtype)
  layers = None
  if decoding.pays(variables) if apart is None else apart:
    shapes = decoding.apart_shapes(config, variables)
    layers = jax.jit(
      decoding.apart,
      static_argnums=0,
      out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )(config, variables)
  order = np.argsort(lengths, kind='stable')  # neighbours share a padded length
  for start in range(0, num, batch_size):
    index = order[start : start + batch_size]
    slots = prompt_slots(lengths[index].max())
    prompts_BP = np.zeros((batch_size, slots), np.int32)
    rows = np.full(batch_size, -1, np.int32)  # -1 fills up the batch
    starts = np.full(batch_size, slots - 1, np.int32)
    rows[: len(index)] = index
    starts[: len(index)] = slots - lengths[index]
    for row, n in enumerate(index):
      prompts_BP[row, starts[row] :] = prompts[n]
    batch = _generate(
      config,
      variables,
      layers,
      prompts_BP,
      starts,
      rows,
      key,
      np.asarray(eos_id),
      max_new_tokens=max_new_tokens,
      temperature=float(temperature),
      top_p=float(top_p),
    )
    for name, value in jax.device_get(batch).items():
      samples[name][index] = value[: len(index)]
    if on_batch is not None:
      on_batch(start + len(index))
  finite = np.isfinite(samples['token_logps']).all(axis=-1)
  if not finite.all():
    raise FloatingPointError(
      f'the log-probabilities of sample {int(finite.argmin())} are not'
      ' finite; the parameters are broken, take an earlier checkpoint'
    )
  return Samples(**samples)


def prompt_slots(longest):
  """Returns P of a batch whose longest prompt has so many tokens."""
  slots = SMALLEST_PROMPT
  while slots < longest:
    slots *= 2
  return slots


def prepared(config, variables, *, places=None, apart=False):
  """Returns what batches are computed with, of placed shapes: the same.

  (variables that are cast, layers apart or None), see `generate`.
  """
  cast = jax.eval_shape(
    functools.partial(transformer.cast, dtype=config.dtype), variables
  )
  if places is None:
    places = jax.tree.map(lambda x: x.sharding, variables)
  cast = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    cast,
    places,
  )
  return cast, decoding.apart_shapes(config, cast) if apart else None


def same(tree, other):
  """Whether two trees, of arrays or placed shapes, can be the same arrays."""
  sides = (
    [(x.dtype, x.sharding) for x in jax.tree.leaves(side)]
    for side in (tree, other)
  )
  return operator.eq(*sides)


def lower(
  config,
  variables,
  key,
  *,
  longest,
  max_new_tokens,
  temperature,
  top_p,
  batch_size,
  places=None,
  apart=False,
  num_eos=1,
):
  """Lowers what `generate` runs for a batch, of shapes instead of arrays.

  `longest` prompt tokens, `num_eos` tokens that end; the rest is as there.
  """
  _check(
    config, np.array([longest]), max_new_tokens, temperature, top_p, batch_size
  )
  return _generate.lower(
    config,
    *prepared(config, variables, places=places, apart=apart),
    np.zeros((batch_size, prompt_slots(longest)), np.int32),
    np.zeros(batch_size, np.int32),
    np.zeros(batch_size, np.int32),
    key,
    np.zeros(num_eos, np.int32),
    max_new_tokens=max_new_tokens,
    temperature=float(temperature),
    top_p=float(top_p),
  )


def _check(config, lengths, max_new_tokens, temperature, top_p, batch_size):
  """Raises ValueError, naming the fix, for what cannot be sampled."""
  if not len(lengths):
    raise ValueError('no prompts to sample from; pass at least one')
  if lengths.min() < 1:
    raise ValueError(
      f'prompt {int(lengths.argmin())} has no tokens; start it with the BOS'
      ' token or drop it'
    )
  for name, value in [
    ('max_new_tokens', max_new_tokens),
    ('batch_size', batch_size),
  ]:
    if value < 1:
      raise ValueError(f'{name} is {value}; use 1 or more')
  if temperature < 0:
    raise ValueError(f'temperature is {temperature}; use 0 (greedy) or more')
  if not 0 < top_p <= 1:
    raise ValueError(f'top_p is {top_p}; use 0 < top_p <= 1 (1 is the whole)')
  longest = int(lengths.max()) + max_new_tokens
  if config.positions == 'learned' and longest > config.max_positions:
    raise ValueError(
      f'prompt {int(lengths.argmax())} has {lengths.max()} tokens and'
      f' max_new_tokens is {max_new_tokens}, but the model has only'
      f' {config.max_positions} positions; shorten the prompt or use'
      f' max_new_tokens <= {config.max_positions - int(lengths.max())}'
    )


@functools.partial(
  jax.jit,
  static_argnames=('config', 'max_new_tokens', 'temperature', 'top_p'),
)
def _generate(
  config,
  variables,
  layers,
  prompts_BP,
  starts,
  rows,
  key,
  eos_id,
  *,
  max_new_tokens,
  temperature,
  top_p,
):
  """Prefills and decodes one batch; rows < 0 have ended before they start."""
  (B, P), M = prompts_BP.shape, max_new_tokens
  unembed_VD = transformer.unembedding(variables['params'])
  apply = functools.partial(transformer.Transformer(config).apply)
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

  def sample(state, hidden_BD):
    """Appends one token to every row that has not ended."""
    step, ended = state['step'], state['ended']
    logits_BV = jnp.einsum(
      'BD,VD->BV', hidden_BD, unembed_VD, preferred_element_type=jnp.float32
    )
    logits_BV = attention.soft_cap(logits_BV, config.logit_cap)
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
    chosen = choose(logits_BV, keys, temperature=temperature, top_p=top_p)
    logps = jnp.take_along_axis(logits_BV, chosen[:, None], axis=-1)[:, 0]
    logps -= jax.nn.logsumexp(logits_BV, axis=-1)
    write = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1
    )
    return {
      'step': step + 1,
      'tokens': write(state['tokens'], jnp.where(ended, 0, chosen)[:, None]),
      'token_logps': write(
        state['token_logps'], jnp.where(ended, 0.0, logps)[:, None]
      ),
      'lengths': state['lengths'] + ~ended,
      'ended': ended | jnp.isin(chosen, eos_id),
    }

  def decode(carry):
    state, cache = carry
    slot = P + state['step'] - 1
    last_B1 = jax.lax.dynamic_slice_in_dim(
      state['tokens'], state['step'] - 1, 1, axis=1
    )
    starts_B1 = starts[:, None]
    hi_B1 = jnp.broadcast_to(slot + 1, (B, 1))
    slots = last_B1, slot - starts_B1, starts_B1, hi_B1
    if layers is None:
      hidden_B1D, cache = apply(
        variables, *slots, cache=cache, cache_index=slot
      )
    else:
      hidden_B1D, cache = decoding.apply(
        config,
        variables['params'],
        layers,
        *slots,
        caches=cache,
        cache_index=slot,
      )
    return sample(state, hidden_B1D[:, 0]), cache

  slots_BP = jnp.broadcast_to(jnp.arange(P), (B, P))
  hidden_BPD, cache = apply(
    variables,
    prompts_BP,
    jnp.maximum(slots_BP - starts[:, None], 0),
    jnp.minimum(starts[:, None], slots_BP),  # padding: itself
    slots_BP + 1,
    cache=transformer.init_cache(config, rows=B, slots=P + M),
    cache_index=0,
  )
  if layers is not None:
    cache = decoding.cache_apart(cache)
  state = {
    'step': jnp.int32(0),
    'tokens': jnp.zeros((B, M), jnp.int32),
    'token_logps': jnp.zeros((B, M), jnp.float32),
    'lengths': jnp.zeros(B, jnp.int32),
    'ended': rows < 0,
  }
  carry = sample(state, hidden_BPD[:, -1]), cache
  with jax.named_scope(SCOPE):
    state, _ = jax.lax.while_loop(
      lambda carry: (carry[0]['step'] < M) & ~jnp.all(carry[0]['ended']),
      decode,
      carry,
    )
  del state['step']
  # Whole on every device: a process reads no other one's.
  return jax.tree.map(
    lambda x: nn.with_logical_constraint(x, (None,) * x.ndim), state
  )


def choose(logits_BV, keys, *, temperature, top_p):
  """Returns one token id per row, drawn with the row's own key.

  The nucleus is taken after the temperature.
  """
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  probs_BV = jax.nn.softmax(logits_BV / temperature, axis=-1)
  if top_p < 1:
    probs_BV = jnp.where(nucleus(probs_BV, top_p), probs_BV, 0.0)
  return draw(probs_BV, keys)


def nucleus(probs_BV, top_p):
  """Returns the mask of the smallest set of likeliest tokens of mass >= top_p.

  Tokens as likely as the last one needed are all kept. The least probability
  kept is found by bisection, which needs no sort of the vocabulary. Floats
  >= 0 are ordered as their bits are, so 31 halvings find it exactly.
  """
  bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    kept_BV = bits_BV >= middle[:, None]
    enough = jnp.sum(probs_BV, axis=-1, where=kept_BV) >= top_p
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
  bounds = jnp.zeros_like(bits_BV[:, 0]), jnp.full_like(bits_BV[:, 0], one + 1)
  least, _ = jax.lax.fori_loop(0, 31, halve, bounds)
  return bits_BV >= least[:, None]


def draw(probs_BV, keys):
  """Draws a token per row: first a block of the vocabulary, then inside it.

  Two uniforms a row instead of a Gumbel per token of the vocabulary, which on
  a CPU cost as much as half of the model. Never draws a probability of 0.
  """
  B, V = probs_BV.shape
  probs_BV = jnp.pad(probs_BV, ((0, 0), (0, -V % BLOCK)))
  blocks = probs_BV.reshape(B, -1, BLOCK)
  uniforms_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
  block = _invert(jnp.sum(blocks, axis=-1), uniforms_B2[:, 0])
  inside = _invert(blocks[jnp.arange(B), block], uniforms_B2[:, 1])
  return (block * BLOCK + inside).astype(jnp.int32)


def _invert(mass_BX, uniforms):
  """Inverts the cumulative mass; uniforms lie in [0, 1)."""
  total_BX = jnp.cumsum(mass_BX, axis=-1)
  reached_BX = total_BX > uniforms[:, None] * total_BX[:, -1:]
  reached_BX &= mass_BX > 0  # a cumsum in floats may rise where nothing is
  return jnp.where(
    jnp.any(reached_BX, axis=-1),
    jnp.argmax(reached_BX, axis=-1),
    jnp.argmax(mass_BX, axis=-1),
  )
