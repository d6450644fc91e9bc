"""Rollouts of PPO: samples, their rewards, and what is to be learned of them.

A sample is a group of one response, laid out in a row of its own, so that all
arrays of tokens are [N, M] in the order of the prompts and every rollout of a
run has the same shapes. Log-probabilities and values are always those of the
training forward pass: the sampler's, which come through a cache, differ in the
last bits and would make a first ratio other than 1.

Dimension key: N samples, M most tokens of a response, R rows, S scored tokens
of a row (S is M).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import evaluators
from dpo_jax import logps
from dpo_jax import names
from dpo_jax import objectives
from dpo_jax import processes
from dpo_jax import rewards
from dpo_jax import rl
from dpo_jax import runs
from dpo_jax import sharding
from dpo_jax.data import batches
from dpo_jax.data import builders
from dpo_jax.data import examples
from dpo_jax.data import openings
from dpo_jax.losses import table
from dpo_jax.models import heads


class Rollout(NamedTuple):
  """What a policy wrote, in the order of the prompts."""

  groups: list  # of examples.Group: prompt and response
  ended: np.ndarray  # bool [N], an EOS was produced
  rewards: np.ndarray  # float [N], as the reward gave them


# --- Prompts, samples, rewards ------------------------------------------------


_FILE = 'prompts'  # the task of a file of them


def _terms():
  """Terms that any text with a prompt will do for."""
  return table.bind(table.section('sft'))


def check_source(data):
  """Refuses prompts that there cannot be; no file is looked for."""
  names.look_up({_FILE: None} | builders.BUILDERS, 'data.task', data.task)
  if data.task != _FILE:
    runs.check_source(data, _terms())
    runs.constraint(data.constraint, _terms())
  elif not data.source:
    raise ValueError(
      'data.source is empty; set it to a file of prompts, or to openings'
    )


def load_prompts(data, tokenizer, model_config):
  """Reads a config's data: ({'train': prompts, 'test': prompts}, report).

  Prompts are int32 arrays. They are those of a data set, each once, or of a
  file of prompts, which has no held-out ones; 'openings' has.
  """
  if data.task == _FILE:
    examples.check_vocabulary(tokenizer, model_config.vocab_size)
    if data.source == 'openings':
      texts = openings.openings()
    else:
      texts = {'train': runs.read_prompts(data.source), 'test': []}
    prompts = {
      split: examples.encode_prompts(part, tokenizer, data.max_prompt_tokens)
      for split, part in texts.items()
    }
    sizes = ', '.join(f'{split} {len(p):,}' for split, p in prompts.items())
    return prompts, f'prompts of {data.source}: {sizes}'
  groups, report = runs.load_groups(data, tokenizer, model_config, _terms())
  prompts = {
    split: list({tuple(g.prompt.tolist()): g.prompt for g in part}.values())
    for split, part in groups.items()
  }
  return prompts, report


def make_collect(
  model_config,
  tokenizer,
  reward,
  *,
  name,
  max_new_tokens,
  temperature,
  batch_size,
):
  """Returns (variables, prompts, key) -> Rollout.

  Nothing is truncated, and at temperature 1 samples are of the policy itself:
  its log-probabilities are those that PPO's ratio and KL are made of.

  Args:
    model_config: of the policy.
    tokenizer: of the model.
    reward: of `rewards`; of several processes all compute it, and take what
      process 0 got.
    name: of the reward, for its errors.
    max_new_tokens: M, where a response is cut.
    temperature: of the samples.
    batch_size: samples computed at once.
  """

  def collect(variables, prompts, key):
    samples = evaluators.sample(
      model_config,
      tokenizer,
      variables,
      prompts,
      title='rollout',
      key=key,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=1.0,
      batch_size=batch_size,
    )
    values = rewards.score(
      reward,
      evaluators.prompt_texts(prompts, tokenizer),
      evaluators.response_texts(samples, tokenizer),
      name=name,
      ended=samples.ended,
    )
    return Rollout(
      groups=[
        examples.Group(prompt, (response,), 1.0, 1.0, '')
        for prompt, response in zip(prompts, samples.responses())
      ],
      ended=samples.ended,
      rewards=np.array(processes.agreed(values.tolist())),
    )

  return collect


def plan(groups, *, max_prompt, max_response, batch_size, mesh):
  """Plans a pass over samples in their order, `batch_size` rows a step."""
  return batches.uniform_plan(
    groups,
    max_prompt=max_prompt,
    max_response=max_response,
    row_groups=1,
    batch_rows=batch_size,
    multiple=sharding.row_shards(mesh),
  )


# --- What the model says of samples -------------------------------------------


def make_read(model_config, *, chunk):
  """Returns (variables, batch) -> (log-probs, values) of scored tokens, [R, S].

  The value of a token is that of the state before it: the head reads the same
  hidden state that predicts the token. Padding holds finite numbers.
  """
  scored = objectives.make_scored(model_config)

  def read(variables, batch):
    hidden_RSD, unembed_VD = scored(variables, batch)
    logps_RS = logps.token_logps(
      hidden_RSD,
      unembed_VD,
      objectives.targets(batch),
      chunk,
      cap=model_config.logit_cap,
    )
    return logps_RS, heads.apply(variables['params']['head'], hidden_RSD)

  return read


def make_observe_step(model_config, mesh, *, chunk):
  """Returns the jitted step of `make_observe`, of one batch."""
  read = make_read(model_config, chunk=chunk)
  ref_logps = objectives.make_token_logps(model_config, chunk=chunk)

  def one_batch(variables, ref_variables, batch):
    logps_RS, values_RS = read(variables, batch)
    return {
      'logps': logps_RS,
      'ref_logps': ref_logps(ref_variables, batch),
      'values': values_RS,
      'mask': batch['slot'] >= 0,
    }

  return jax.jit(one_batch, out_shardings=sharding.replicated(mesh))


def make_observe(model_config, mesh, *, chunk):
  """Returns (variables, ref_variables, plan) -> what is known before learning.

  {'logps', 'ref_logps', 'values', 'mask'}, [N, M] each, on the host.
  """
  step = make_observe_step(model_config, mesh, chunk=chunk)

  def observe(variables, ref_variables, samples):
    parts = [
      jax.device_get(
        step(
          variables, ref_variables, evaluators.put_batch(samples, number, mesh)
        )
      )
      for number in range(samples.num_steps)
    ]
    count = len(samples.groups)  # rows after them are padding
    return {
      name: np.concatenate([part[name] for part in parts])[:count]
      for name in parts[0]
    }

  return observe


# --- Rewards and advantages ---------------------------------------------------


def first_memory(*, kl_coef):
  """What PPO remembers between rollouts, before the first one.

  The KL coefficient, and the moments by which rewards are normalized.
  """
  numbers = {'mean': 0.0, 'variance': 1.0, 'count': 0.0}
  return {
    'kl_coef': jnp.float32(kl_coef),
    'reward': {name: jnp.float32(x) for name, x in numbers.items()},
  }


def scores(rewards_N, ended_N, moments, *, normalize, no_eos_penalty):
  """Returns what rewards count, and the moments that they were normalized by.

  Args:
    rewards_N: as the reward gave them.
    ended_N: which responses have an EOS.
    moments: of `rl.moments`, so far.
    normalize: of `rl.NORMALIZERS`; 'running' takes in these rewards first.
    no_eos_penalty: taken off the normalized score of a response without EOS.
  """
  if normalize == 'running':
    moments = rl.joined(moments, rl.moments(rewards_N))
  scores_N = rl.normalized(rewards_N, moments)
  return scores_N - jnp.where(ended_N, 0.0, no_eos_penalty), moments


def next_coefficient(coef, kl_N, kl):
  """Returns the KL coefficient after samples with the KLs `kl_N`, in nats.

  `kl` is the config's section, see `rl.KL_CONTROLLERS`.
  """
  if kl['kind'] == 'fixed':
    return coef
  return rl.adapted(
    coef,
    jnp.mean(kl_N),
    target=kl['target'],
    horizon=kl['horizon'],
    samples=len(kl_N),
  )


def make_experience(
  mesh,
  *,
  normalize,
  no_eos_penalty,
  kl,
  gamma,
  lam,
  whiten_rewards,
  whiten_advantages,
):
  """Returns (memory, seen, rewards, ended) -> (arrays, memory, metrics).

  `seen` is of `make_observe`; `arrays` {'logps', 'values', 'advantages',
  'returns'} [N, M] are what minibatches learn from. The controller has moved
  the KL coefficient of the new memory; this rollout's rewards have the old one.

  Args:
    mesh: devices.
    normalize: of `scores`.
    no_eos_penalty: of the same.
    kl: {'kind', 'estimator'} and the keys of `rl.KL_CONTROLLERS`.
    gamma: of `rl.generalized_advantages`.
    lam: of the same.
    whiten_rewards: to variance 1 over all real tokens of the rollout.
    whiten_advantages: to mean 0 and variance 1.
  """

  def experience(memory, seen, rewards_N, ended_N):
    logps_NM, ref_NM = seen['logps'], seen['ref_logps']
    values_NM, mask_NM = seen['values'], seen['mask']
    # -------------------------------------------------------- scores, KL ----
    coef = memory['kl_coef']
    scores_N, moments = scores(
      rewards_N,
      ended_N,
      memory['reward'],
      normalize=normalize,
      no_eos_penalty=no_eos_penalty,
    )
    kl_N = jnp.sum(jnp.where(mask_NM, logps_NM - ref_NM, 0.0), axis=1)
    memory = {
      'kl_coef': next_coefficient(coef, kl_N, kl),
      'reward': moments,
    }
    # -------------------------------------------------------- advantages ----
    rewards_NM = rl.token_rewards(
      logps_NM,
      ref_NM,
      scores_N,
      mask_NM,
      kl_coef=coef,
      kl=kl['estimator'],
    )
    if whiten_rewards:
      rewards_NM = rl.whiten(rewards_NM, mask_NM, keep_mean=True)
    advantages_NM, returns_NM = rl.generalized_advantages(
      rewards_NM, values_NM, mask_NM, gamma=gamma, lam=lam
    )
    metrics = {
      'reward': jnp.mean(rewards_N),
      'reward_std': jnp.std(rewards_N),
      'score': jnp.mean(scores_N),
      'objective': jnp.mean(scores_N - coef * kl_N),
      'kl': jnp.mean(kl_N),
      'kl_coef': coef,
      'entropy': -rl.masked_mean(logps_NM, mask_NM),
      'value': rl.masked_mean(values_NM, mask_NM),
      'return': rl.masked_mean(returns_NM, mask_NM),
      'explained_variance': rl.explained_variance(
        values_NM, returns_NM, mask_NM
      ),
      'length': jnp.mean(jnp.sum(mask_NM, axis=1)),
      'ended': jnp.mean(ended_N),
    }
    if whiten_advantages:
      advantages_NM = rl.whiten(advantages_NM, mask_NM, keep_mean=False)
    arrays = {
      'logps': logps_NM,
      'values': values_NM,
      'advantages': advantages_NM,
      'returns': returns_NM,
    }
    return arrays, memory, metrics

  return jax.jit(experience, out_shardings=sharding.replicated(mesh))


# --- The objective ------------------------------------------------------------


def put_minibatch(samples, step, order, arrays, mesh):
  """Builds this process's rows of a `minibatch` and joins them over all."""
  count = samples.shape_of(step).rows
  own = sharding.own_rows(count, mesh)
  batch = minibatch(samples, step, order, arrays, own=own)
  return sharding.put_rows(batch, mesh, count=count)


def minibatch(samples, step, order, arrays, *, own=None):
  """Builds a step of `samples`, a plan, with what is to be learned of it.

  Args:
    samples: plan over the rollout's groups in `order`.
    step: of the plan.
    order: int [N], number in the rollout of each of the plan's groups.
    arrays: of `make_experience`, on the host.
    own: numbers of the rows that are built; None: all.

  The batch's `weight` is one over the mean length of the minibatch's responses,
  so that a mean over groups of sums over tokens is a mean over tokens.
  """
  batch = samples.batch(step, own=own)
  index = order[batch['group'][:, 0]]  # padding rows: any, they score nothing
  batch |= {name: array[index] for name, array in arrays.items()}
  members = samples.steps[step]
  tokens = sum(len(samples.groups[g].responses[0]) for g in members)
  batch['weight'] *= np.float32(len(members) / tokens)
  return batch


def make_sums(model_config, *, chunk, clip, value_clip, value_coef):
  """Returns (variables, _, batch, memory) -> (totals, memory), for `steps`.

  totals is {name: (sum, count to divide by)}; `loss` is that of the policy plus
  value_coef times that of the values (arXiv:1707.06347, equation 9), a mean
  over the tokens of the minibatch.

  Args:
    model_config: of the policy.
    chunk: see `logps.token_logps`.
    clip: of the ratio.
    value_clip: of the values.
    value_coef: weight of the value loss.
  """
  read = make_read(model_config, chunk=chunk)

  def sums(variables, ref_variables, batch, memory):
    del ref_variables  # the KL is in the rewards
    mask_RS = batch['slot'] >= 0
    logps_RS, values_RS = read(variables, batch)
    policy_RS, policy_clipped_RS = rl.policy_losses(
      logps_RS, batch['logps'], batch['advantages'], clip=clip
    )
    value_RS, value_clipped_RS = rl.value_losses(
      values_RS, batch['values'], batch['returns'], clip=value_clip
    )
    losses_RS = batch['weight'] * (policy_RS + value_coef * value_RS)
    log_ratio_RS = logps_RS - batch['logps']
    tokens = jnp.sum(mask_RS)
    per_token = {
      'policy_loss': policy_RS,
      'value_loss': value_RS,
      'clip_fraction': policy_clipped_RS,
      'value_clip_fraction': value_clipped_RS,
      'approx_kl': rl.KL_ESTIMATORS['k3'](-log_ratio_RS),
      'ratio_gap': jnp.abs(jnp.expm1(log_ratio_RS)),
    }

    def total(x_RS):
      return jnp.sum(jnp.where(mask_RS, x_RS, 0.0))

    totals = {name: (total(x_RS), tokens) for name, x_RS in per_token.items()}
    return {'loss': (total(losses_RS), jnp.sum(batch['mask']))} | totals, memory

  return sums
