"""A whole run of PPO against the optimum that is known in closed form.

Reward less beta times the KL has one best policy (arXiv:2305.18290, eq. 4),

    pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x)

and with four tokens and two of them a response it can be written down. A run
comes there only if the score, the KL, the advantages and the updates all have
the right sign and stand at the right tokens.
"""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np

from configs import ppo as configs
from dpo_jax import policies
from dpo_jax import ppo
from dpo_jax import rewards
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import weights
from dpo_jax.data import tokenizers
from dpo_jax.models import heads
from tests import worlds

LETTERS, EOS = 'abc', 3
MODEL = dataclasses.replace(worlds.LLAMA, vocab_size=4, num_layers=1)
BETA = 0.7
# All begin with another letter than the one that is asked for: a model without
# positions of its own cannot tell 'a' from 'aa'.
PROMPTS = ('ca', 'cb')


class Letters(tokenizers.ByteTokenizer):
  """Three letters, and a token to end a response."""

  eos_id, eos_ids, vocab_size = EOS, (EOS,), 4

  def encode(self, text, *, start=False):
    del start
    return [*map(LETTERS.index, text)]

  def decode(self, ids, *, start=False):
    del start
    return ''.join(LETTERS[i] for i in ids)


def repeats(prompts, responses):
  """Counts the prompt's last letter in each response."""
  return [y.count(x[-1]) for x, y in zip(prompts, responses, strict=True)]


# All responses of at most two tokens: a cut one has no EOS.
RESPONSES = [(EOS,), *itertools.product(range(3), range(4))]


def distribution(params, prompt):
  """Returns the probabilities of `RESPONSES` after a prompt."""
  out, encoded = [], Letters().encode(prompt)
  for response in RESPONSES:
    tokens = np.array([[*encoded, *response, 0][: len(encoded) + 2]])
    logps = worlds.plain_log_probs(MODEL, params, tokens)[len(encoded) - 1 :]
    out.append(sum(logps[t, token] for t, token in enumerate(response)))
  return np.exp(np.array(out, np.float64))


def kl(p, q):
  return np.sum(p * np.log(p / q))


def test_a_run_comes_to_the_tilted_reference(tmp_path, monkeypatch):
  monkeypatch.setattr(
    sharding,
    'make_mesh',
    functools.partial(sharding.make_mesh, devices=jax.devices()[:1]),
  )
  monkeypatch.setattr(
    policies,
    'open_source',
    lambda source: weights.random(MODEL, source=source, tokenizer=Letters()),
  )
  monkeypatch.setitem(rewards.REWARDS, 'repeats', repeats)
  path = tmp_path / 'prompts.jsonl'
  path.write_text(''.join(json.dumps({'prompt': x}) + '\n' for x in PROMPTS))
  config = configs.get_config('debug,kl=fixed')
  config.update_from_flattened_dict(
    {
      'data.source': str(path),
      'data.max_response_tokens': 2,
      'reward.name': 'repeats',
      'reward.normalize': 'none',
      'kl.coef': BETA,
      'num_steps': 80,
      'rollout.size': 128,
      'batch_size': 128,
      'ppo.epochs': 4,
      'ppo.lam': 1.0,
      'ppo.value_coef': 1.0,
      'ppo.value_clip': 9.0,
      # At the optimum all advantages are 0: nothing is to be made larger.
      'ppo.whiten_advantages': False,
      'optim.lr': 0.03,
      'optim.schedule': 'linear',
      'eval.samples.num_prompts': 0,
      'eval.every': 0,
      'checkpoint.every': 0,
      'log_every': 0,
    }
  )
  config = settings.Settings(config.to_dict())
  start = policies.open_policy(config, sharding.make_mesh(**config.mesh))
  start = jax.device_get(start.trained)
  trained = heads.without(jax.device_get(ppo.run(config, tmp_path / 'run')))
  texts = [Letters().decode(y[: len(y) - (EOS in y)]) for y in RESPONSES]
  for prompt in PROMPTS:
    ref, found = (distribution(x, prompt) for x in (start, trained))
    np.testing.assert_allclose([ref.sum(), found.sum()], 1.0, atol=1e-5)
    reward = np.array(repeats([prompt] * len(texts), texts))
    tilted = ref * np.exp(reward / BETA)
    tilted /= tilted.sum()
    # The objective lacks beta times this KL of its best value.
    assert kl(ref, tilted) > 0.5
    assert kl(found, tilted) < 0.02
