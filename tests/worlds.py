"""Tiny models and groups that several tests use."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import preference
from dpo_jax import attention
from dpo_jax import objectives
from dpo_jax import settings
from dpo_jax.data import examples
from dpo_jax.losses import table
from dpo_jax.models import transformer

LLAMA = transformer.TransformerConfig(
  vocab_size=50,
  d_model=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm='rms',
  norm_eps=1e-5,
  positions='rotary',
  max_positions=64,
  rope_theta=10000.0,
  mlp='swiglu',
  attention_bias=False,
  mlp_bias=False,
  tied=True,
)
GPT2 = dataclasses.replace(
  LLAMA,
  num_kv_heads=4,
  norm='layer',
  positions='learned',
  mlp='gelu',
  attention_bias=True,
  mlp_bias=True,
  tied=False,
)
# All that Gemma 1, 2 and 3 have, with a window shorter than most sequences.
GEMMA = dataclasses.replace(
  LLAMA,
  head_dim=6,
  mlp='geglu',
  norm_offset=True,
  qk_norm=True,
  post_norms=True,
  embed_scale=True,
  rope_scaling='linear',
  rope_factor=2.0,
  window=5,
  windowed=(True, False, True),
  local_rope_theta=100.0,
  query_scalar=3.0,
  attention_cap=2.0,
  logit_cap=3.0,
)
FAMILIES = {'llama': LLAMA, 'gpt2': GPT2, 'gemma': GEMMA}


def params_of(config, seed=0, *, size=0.1):
  """Random weights of that size; no bias and no scale is neutral."""
  shapes = nn.unbox(
    jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  )
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    is_scale = jax.tree_util.keystr(path).endswith("['scale']")
    center = 1.0 if is_scale and not config.norm_offset else 0.0
    return jnp.array(rng.normal(center, size, leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def plain_log_probs(config, params, tokens):
  """All log-probabilities [T, V] of one plain sequence [1, T]."""
  positions = jnp.arange(tokens.shape[1])[None]
  hidden = transformer.Transformer(config).apply(
    {'params': params}, tokens, positions, 0 * positions, positions + 1
  )
  logits = hidden @ transformer.unembedding(params).T
  return jax.nn.log_softmax(attention.soft_cap(logits, config.logit_cap))[0]


def make_sums(config, loss='dpo', *, reference='frozen', **more):
  """`objectives.make_sums` of losses written as behind the colon of a config.

  `more` replaces the other arguments: chunk 16, pairs without rewards.
  """
  arguments = {'chunk': 16, 'responses': 2, 'form': 'pairs', 'rewards': False}
  section = loss if isinstance(loss, dict) else table.section(loss)
  return objectives.make_sums(
    config,
    table.bind(section),
    reference=reference,
    **(arguments | more),
  )


def make_groups(number, *, responses=2, seed=0, vocab=50, prompt=9, answer=7):
  """Groups of random tokens and ragged lengths."""
  rng = np.random.default_rng(seed)

  def tokens(longest):
    size = rng.integers(1, longest + 1)
    return rng.integers(0, vocab, size).astype(np.int32)

  return [
    examples.Group(
      prompt=tokens(prompt),
      responses=tuple(tokens(answer) for _ in range(responses)),
      weight=1.0,
      p=1.0,
      id=str(i),
    )
    for i in range(number)
  ]


def write_pairs(folder, number=40, **extra):
  """Writes a small pairs file (chosen has more vowels); returns its path."""
  rng = np.random.default_rng(0)
  rows = []
  for i in range(number):
    good, bad = (
      ''.join(rng.choice(list(letters), rng.integers(3, 12)))
      for letters in ('aeiou ', 'bcdfg ')
    )
    prompt = f'question {i}: '
    rows.append({'prompt': prompt, 'chosen': good, 'rejected': bad} | extra)
  return write_rows(folder, rows)


def write_rankings(folder, number=40):
  """Writes rankings (more vowels are better) where `write_pairs` did."""
  rng = np.random.default_rng(0)
  rows = [
    {
      'prompt': f'question {i}: ',
      'responses': [
        ''.join(rng.choice(list(letters), rng.integers(3, 12)))
        for letters in ('aeiou ', 'aeibcd ', 'bcdfg ')
      ],
    }
    for i in range(number)
  ]
  return write_rows(folder, rows)


def write_rows(folder, rows):
  """Writes the JSON Lines that `debug_config` reads; returns their path."""
  path = folder / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def debug_config(tmp_path, arg='loss=dpo', /, **changes):
  """The debug variant of configs/preference.py on `write_pairs`, as Settings.

  `changes` are dotted keys: {'optim.lr': 1e-3}.
  """
  config = preference.get_config(f'data=jsonl,debug,{arg}')
  config.data.source = str(write_pairs(tmp_path))
  config.data.cache_dir = str(tmp_path / 'data')
  config.data.row_length = 128
  if config.reference.mode == 'cached':
    config.reference.cache_dir = str(tmp_path / 'reference')
  config.eval.samples.num_prompts = 0
  config.update_from_flattened_dict(changes)
  return settings.Settings(config.to_dict())
