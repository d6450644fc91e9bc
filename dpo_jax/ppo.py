"""The on-policy loop: PPO on rewards of whole responses.

A step is a rollout and what is learned of it:

    sample a response to each prompt         the policy, at temperature 1
    score them                               reward.name, from their texts
    log-probs of policy and reference, values    the training forward pass
    rewards of tokens, advantages, the next KL coefficient    `rl`
    ppo.epochs passes over the rollout in minibatches of batch_size

Prompts, samples and minibatches are functions of (seed, step), and the state
holds everything else, so a killed run resumes to the same bits. The values are
those of a scalar head on the policy itself (`heads`), which whoever else reads
the policy leaves out.
"""

import dataclasses
import functools
import json
import math
import os
import sys
import time

import jax
import numpy as np
import tqdm

from dpo_jax import checks
from dpo_jax import evaluators
from dpo_jax import names
from dpo_jax import policies
from dpo_jax import processes
from dpo_jax import progress
from dpo_jax import reward_models
from dpo_jax import rl
from dpo_jax import rollouts
from dpo_jax import runs
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax import updates
from dpo_jax.data import batches
from dpo_jax.data import examples

# The references that PPO can have, which stay where training began, and the
# other keys of their section.
REFERENCES = {'frozen': (), 'adapter_off': ()}

# What a run must share with the one whose state it goes on with. The state has
# the KL coefficient, so another kl.coef would not be heeded.
RESUMED = (
  'init',
  'model',
  'adapter',
  'reference',
  'data',
  'reward',
  'rollout',
  'kl',
)


def run(config, workdir):
  """Trains as `config` says; returns the final parameters and their head.

  Args:
    config: `settings.Settings` with the keys of configs/ppo.py; every key is
      read or the run does not start.
    workdir: as of `train.train`; a run found there is resumed.
  """
  workdir = os.fspath(workdir)
  with progress.begun(config, workdir) as mesh:
    return _run(config, workdir, mesh)


# --- Set-up -------------------------------------------------------------------


# Numbers that this loop has besides those of `checks`.
_NUMBERS = {
  'num_steps': '1 or more',
  'rollout.size': '1 or more',
  'rollout.batch_size': '1 or more',
  'reward.no_eos_penalty': '0 or more',
  'kl.coef': '0 or more',
  'ppo.epochs': '1 or more',
  'ppo.gamma': 'a number from 0 to 1',
  'ppo.lam': 'a number from 0 to 1',
  'ppo.clip': 'a number above 0',
  'ppo.value_clip': 'a number above 0',
  'ppo.value_coef': '0 or more',
}


def check(config, mesh):
  """Refuses what is wrong with a config whatever its data and its model are.

  All of it, a line each. `mesh` may be an abstract one.
  """
  config = settings.Settings(config.as_dict())  # to check is not to use
  normalize, estimator = config.reward.normalize, config.kl.estimator
  checks.call(
    [
      *checks.of_training(config, mesh, reward=config.reward.name),
      checks.numbers(config, _NUMBERS),
      lambda: check_rollout(config.rollout, config.batch_size),
      lambda: check_reward(config.reward.name),
      lambda: check_kl(dict(config.kl), config.rollout.size),
      lambda: rollouts.check_source(config.data),
      lambda: names.look_up(rl.NORMALIZERS, 'reward.normalize', normalize),
      lambda: names.look_up(rl.KL_ESTIMATORS, 'kl.estimator', estimator),
      lambda: names.look_up(
        REFERENCES, 'reference of PPO', config.reference.mode
      ),
    ]
  )


def check_rollout(rollout, batch_size):
  """Refuses sizes of a rollout and of its minibatches that do not fit."""
  if batch_size > 0 and rollout.size % batch_size:
    near = max(rollout.size // batch_size, 1) * batch_size
    raise ValueError(
      f'rollout.size {rollout.size} is not a multiple of batch_size'
      f' {batch_size}, the samples of a minibatch; use {near}'
    )
  if rollout.temperature != 1.0:
    raise ValueError(
      f'rollout.temperature is {rollout.temperature}: its samples would be of'
      ' another policy than the one whose log-probabilities and KL are trained;'
      ' set it to 1'
    )


def check_reward(name):
  """Refuses what is no name of a reward."""
  if not name:
    raise ValueError(
      'reward.name is empty; set it to the name of a reward, such as'
      ' model:WORKDIR of a reward model'
    )
  reward_models.check(name)


def check_kl(kl, samples):
  """Refuses a section `kl` whose keys and numbers do not fit its kind.

  `samples` are those of a rollout.
  """
  keys = names.look_up(rl.KL_CONTROLLERS, 'kl.kind', kl['kind'])
  if set(kl) != {'kind', 'coef', 'estimator', *keys}:
    raise ValueError(
      f'kl.kind {kl["kind"]!r} takes {", ".join(("coef", "estimator", *keys))},'
      f' got {sorted(set(kl) - {"kind"})}; choose it behind the colon of'
      f' --config (kl={kl["kind"]}), which brings its keys'
    )
  for name in keys:
    if not 0.0 < kl[name] < math.inf:
      raise ValueError(f'kl.{name} is {kl[name]}; use a number above 0')
  if keys and not kl['coef']:
    raise ValueError(
      f'kl.coef is 0, which {kl["kind"]} control, that multiplies it, never'
      ' changes; set it above 0, or choose kl=fixed behind the colon of'
      ' --config'
    )
  least = rl.MOST_ERROR * samples
  if 'horizon' in keys and kl['horizon'] <= least:
    raise ValueError(
      f'kl.horizon {kl["horizon"]} is too short for rollout.size {samples}: one'
      ' rollout could make the KL coefficient 0 or negative; set kl.horizon'
      f' above {least:g}, or make rollout.size smaller'
    )


def set_up(config, mesh):
  """Builds what training and evaluating share: (runs.Run, reward function).

  Reads the config's sections of it. The `groups` are prompts.
  """
  # ------------------------------------------------ model, prompts, reward ----
  # A head that was trained before, of values or of a reward model, goes on;
  # a new one knows nothing.
  policy = policies.open_policy(config, mesh, head=0.0)
  tokenizer = policies.templated(policy.tokenizer, config.data.chat_template)
  policy = dataclasses.replace(policy, tokenizer=tokenizer)
  policies.check_adapter_off(policy, dict(config.reference))
  with processes.one_first():  # who downloads and prepares
    prompts, report = rollouts.load_prompts(
      config.data, tokenizer, policy.config
    )
  if not prompts['train']:
    raise ValueError('there are no prompts to train on; see data.source')
  reward = reward_models.get(config.reward.name, mesh=mesh)

  # ------------------------------------------------------------ evaluator ----
  heldout = runs.sample_prompts(
    config.eval.samples.prompts,
    config.eval.samples.num_prompts,
    [examples.Group(p, (), 1.0, 1.0, '') for p in prompts['test']],
    tokenizer,
    max_prompt_tokens=config.data.max_prompt_tokens,
  )
  known = {tuple(prompt) for prompt in prompts['train']}
  both = sum(tuple(prompt) in known for prompt in heldout)
  if both:  # first words of reviews may well be the same
    report += f'\n{both} of {len(heldout)} held-out prompts are trained on too'
  tqdm.tqdm.write(report, file=sys.stderr)
  sample = runs.sample_evaluator(
    config,
    heldout,
    policy.config,
    tokenizer,
    mesh,
    reward=(config.reward.name, reward),
  )
  began = runs.frozen_start(policy)  # None: the model without its adapter

  def evaluate(params, ref, memory):
    del ref, memory  # they are of losses
    if sample is None:
      return {}, []
    values, samples = sample(policy.variables(params), policy.variables(began))
    return {f'samples/{name}': x for name, x in values.items()}, samples

  parts = runs.Run(
    policy=policy,
    sums=make_sums(config, policy.config),
    ref=began,
    first_memory=jax.device_put(
      rollouts.first_memory(kl_coef=config.kl.coef), sharding.replicated(mesh)
    ),
    groups=prompts,
    ref_values={},
    evaluate=evaluate,
  )
  return parts, reward


def make_sums(config, model_config):
  """Returns `rollouts.make_sums` of a config."""
  return rollouts.make_sums(
    model_config,
    chunk=runs.head_chunk(config),
    clip=config.ppo.clip,
    value_clip=config.ppo.value_clip,
    value_coef=config.ppo.value_coef,
  )


def make_experience(config, mesh):
  """Returns `rollouts.make_experience` of a config."""
  return rollouts.make_experience(
    mesh,
    normalize=config.reward.normalize,
    no_eos_penalty=config.reward.no_eos_penalty,
    kl=dict(config.kl),
    gamma=config.ppo.gamma,
    lam=config.ppo.lam,
    whiten_rewards=config.ppo.whiten_rewards,
    whiten_advantages=config.ppo.whiten_advantages,
  )


def updates_a_step(config):
  """Returns how many updates learn from a rollout."""
  return config.ppo.epochs * (config.rollout.size // config.batch_size)


# --- The run ------------------------------------------------------------------


def _run(config, workdir, mesh):
  # --------------------------------------- model, prompts, reward, sizes ----
  check(config, mesh)
  base, reward = set_up(config, mesh)
  policy, prompts = base.policy, base.groups['train']
  seed, size = config.seed, config.rollout.size
  frozen = {'base': policy.base, 'ref': None}  # the KL is in the rewards
  ref_variables = policy.variables(base.ref)
  epochs, num_steps = config.ppo.epochs, config.num_steps
  per_step = updates_a_step(config)

  plan = functools.partial(
    rollouts.plan,
    max_prompt=max(map(len, prompts)),
    max_response=config.data.max_response_tokens,
    batch_size=config.batch_size,
    mesh=mesh,
  )
  collect = rollouts.make_collect(
    policy.config,
    policy.tokenizer,
    reward,
    name=config.reward.name,
    temperature=config.rollout.temperature,
    max_new_tokens=config.data.max_response_tokens,
    batch_size=config.rollout.batch_size,
  )
  observe = rollouts.make_observe(
    policy.config, mesh, chunk=runs.head_chunk(config)
  )
  experience = make_experience(config, mesh)

  def roll(params, number, name):
    """Samples what step `number` learns from."""
    chosen = batches.shuffled(
      seed=seed, step=number - 1, batch_size=size, num_groups=len(prompts)
    )
    return collect(
      policy.variables(params),
      [prompts[n] for n in chosen],
      jax.random.fold_in(policies.stream(seed, name), number),
    )

  # ----------------------------------------------------- optimizer, step ----
  update = updates.make(
    config,
    policy,
    base.sums,
    base.first_memory,
    mesh,
    num_steps=num_steps * per_step,
  )
  tqdm.tqdm.write(
    f'ppo: {num_steps} steps of {size} samples and {per_step} updates, from'
    f' {len(prompts):,} prompts'
  )
  tqdm.tqdm.write(update.table(frozen | {'ref': base.ref}))

  # ------------------------------------------------------------- restore ----
  here = progress.Progress(
    config,
    workdir,
    data=json.dumps([prompt.tolist() for prompt in prompts]),
    resumed=RESUMED,
  )
  if here.fresh:
    memory = base.first_memory
    if config.reward.normalize == 'reference':
      rollout = roll(policy.trained, 1, 'normalizer')
      memory = memory | {'reward': moments(rollout, mesh)}
    state = steps.init_state(policy.trained, update.tx, memory=memory)
  else:
    items = here.restore(steps.saved(update.shapes))
    state = steps.restored_state(update.shapes, here.first * per_step, items)
  policy.trained = None  # donated, or not needed

  # ---------------------------------------------------------------- loop ----
  def evaluate():
    return base.evaluate(state.params, state.ref, state.memory)

  def saved():
    return steps.saved(state)

  with here.open(num_steps, evaluate=evaluate, saved=saved):
    for number in here.steps('ppo'):
      here.check_saves()
      # ------------------------------------------- rollout, advantages ----
      start = time.perf_counter()
      rollout = roll(state.params, number, 'rollout')
      sampled = time.perf_counter()
      seen = observe(
        policy.variables(state.params), ref_variables, plan(rollout.groups)
      )
      arrays, memory, values = jax.device_get(
        experience(
          state.memory, seen, np.float32(rollout.rewards), rollout.ended
        )
      )
      # ------------------------------------------------------- updates ----
      totals = []
      for epoch in range(epochs):
        rng = np.random.default_rng([seed, number, epoch])
        order = rng.permutation(size)
        samples = plan([rollout.groups[n] for n in order])
        for n in range(samples.num_steps):
          batch = rollouts.put_minibatch(samples, n, order, arrays, mesh)
          state, total = update.step(state, frozen, batch)
          totals.append(total)
      totals = jax.device_get(totals)
      state = state.replace(
        memory=jax.tree.map(
          lambda x, like: sharding.put(x, like.sharding),
          memory,
          update.shapes.memory,
        )
      )
      here.did(number)
      # ------------------------------------------------------ log, save ----
      seconds = time.perf_counter() - start
      values |= evaluators.means(
        jax.tree.map(lambda *parts: sum(parts), *totals)
      )
      values |= {
        'first_ratio_gap': evaluators.means(totals[0])['ratio_gap'],
        'step_seconds': seconds,
        'rollout_seconds': sampled - start,
        'samples_per_second': size / seconds,
      }
      here.check_finite(values, number)
      if here.due('log', number):
        here.log(number, values)
      here.settle(number)
  return state.params


def moments(rollout, mesh):
  """Returns the moments of a rollout's rewards, to normalize others by."""
  if np.ptp(rollout.rewards) == 0.0:
    raise ValueError(
      f'all {len(rollout.rewards)} samples of the first policy have the reward'
      f' {rollout.rewards[0]}, so there is no variance to normalize by; use'
      ' another reward, or set reward.normalize to none'
    )
  whole = sharding.replicated(mesh)
  found = jax.device_get(rl.moments(np.float32(rollout.rewards)))
  return jax.tree.map(lambda x: sharding.put(x, whole), found)
