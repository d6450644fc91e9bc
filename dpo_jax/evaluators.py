"""Measurements of a policy: held-out groups, and what it writes.

An evaluator is a function variables -> {'name': number}, where variables are
parameters and perhaps an adapter (`lora.variables`); `train` calls it on a
schedule and `main` on a finished run.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from dpo_jax import judges
from dpo_jax import logps
from dpo_jax import objectives
from dpo_jax import processes
from dpo_jax import rewards
from dpo_jax import reweighting
from dpo_jax import sampling
from dpo_jax import sharding
from dpo_jax import topologies
from dpo_jax.data import batches
from dpo_jax.data import examples
from dpo_jax.models import decoding

# What is measured of a sample by its own name, besides judges.
COLUMNS = (
  'length',
  'ended',
  'kl',
  'kl_sampled',
  'entropy',
  'reward',
  'ranker',
  'cost',
  'distinct_2',
  'prompt',
  'response',
)


def means(totals):
  """{name: (sum, count)} -> {name: mean}; what was never seen has none."""
  return {
    name: float(value) / float(count)
    for name, (value, count) in totals.items()
    if count
  }


def make_heldout(sums, plan, mesh, *, ref_values):
  """Returns the evaluator of the objective on every group of `plan`.

  Args:
    sums: of `objectives.make_sums`.
    plan: an evaluation plan.
    mesh: devices.
    ref_values: cached reference log-probs of `plan.groups`, or None.

  The evaluator takes (variables, ref_variables, memory) and adds
  `rewards/accuracy_se`, the binomial standard error, to the means. What is of a
  whole batch (AOT's ranks, Dr. DPO's mean, KTO's KL, BCO's shift, the reduction
  'batch_mean') is that of evaluation batches.
  """
  step = jax.jit(sums, out_shardings=sharding.replicated(mesh))

  def evaluate(variables, ref_variables, memory):
    totals = {}
    for number in _progress(plan.num_steps, 'held-out groups'):
      batch = put_batch(plan, number, mesh, ref_values=ref_values)
      here, _ = jax.device_get(step(variables, ref_variables, batch, memory))
      for name, pair in here.items():
        totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
    out = means(totals)
    out['groups'] = totals['loss'][1]
    if 'rewards/accuracy' in out:
      accuracy = out['rewards/accuracy']
      out['rewards/accuracy_se'] = np.sqrt(
        accuracy * (1 - accuracy) / out['groups']
      )
    return out

  return evaluate


def _progress(steps, title):
  """Counts the steps of a measurement on a bar that goes when it is done."""
  for step in tqdm.trange(steps, desc=title, leave=False):
    processes.poll()
    yield step


def put_batch(plan, step, mesh, *, ref_values=None):
  """Builds this process's rows of a batch and joins them over processes."""
  count = plan.shape_of(step).rows
  batch = plan.batch(step, own=sharding.own_rows(count, mesh))
  if ref_values is not None:
    batch['ref_token_logps'] = batches.place(ref_values, plan.starts, batch)
  return sharding.put_rows(batch, mesh, count=count)


def make_compare(model_config, mesh, *, chunk):
  """Returns (variables, ref_variables, plan) -> {name: value of each group}.

  Groups hold one sampled response each. `kl`, nats: the sum over its tokens of
  the full-vocabulary KL(policy || reference); on samples of the policy at
  temperature 1 its mean is the Rao-Blackwellized estimator of the sequence KL.
  `kl_sampled`: log pi - log pi_ref of the response, whose mean is the plain
  estimator of the same. `entropy`: nats of a token, the mean over the response.
  """
  scored = objectives.make_scored(model_config)

  def compare(variables, ref_variables, batch):
    G = batch['mask'].shape[1]
    found = logps.token_comparisons(
      *scored(variables, batch),
      *scored(ref_variables, batch),
      objectives.targets(batch),
      chunk=chunk,
      cap=model_config.logit_cap,
    )
    found['tokens'] = jnp.ones_like(found['kl'])
    sums = {
      name: logps.sum_by_slot(values_RS, batch['slot'], num_slots=G)
      for name, values_RS in found.items()
    }
    return {
      'kl': sums['kl'],
      'kl_sampled': sums['log_ratio'],
      'entropy': sums['entropy'] / jnp.maximum(sums['tokens'], 1.0),
    }

  step = jax.jit(compare, out_shardings=sharding.replicated(mesh))

  def of_groups(variables, ref_variables, plan):
    out = {}
    for number in _progress(plan.num_steps, 'KL of samples'):
      batch = put_batch(plan, number, mesh)
      found = jax.device_get(step(variables, ref_variables, batch))
      groups_RG = plan.batch(number)['group']
      real_RG = groups_RG >= 0
      for name, values_RG in found.items():
        values = out.setdefault(name, np.zeros(len(plan.groups)))
        values[groups_RG[real_RG]] = values_RG[real_RG]
    return out

  return of_groups


def how_to_sample(model_config, variables):
  """Returns `places` and `apart` of `sampling.generate`.

  All weights are needed for every token. So they are gathered from the fsdp
  axis before the first one, and, where that is faster, layers are taken apart,
  a second copy: as far as copies take `model_config.gather_share` of a device's
  memory at most, or that is not known (a CPU).

  Args:
    model_config: of the policy.
    variables: see `sampling.generate`; arrays or placed shapes.
  """
  places = sharding.gathered(variables)
  whole, _ = sampling.prepared(model_config, variables, places=places)
  devices = list(jax.tree.leaves(whole)[0].sharding.device_set)
  memory = processes.agreed(topologies.memory(devices))
  room = math.inf if memory is None else model_config.gather_share * memory

  def fits(copies):
    needed = copies * sharding.bytes_per_device(whole)
    return model_config.gather_share > 0 and needed <= room

  if not fits(1):
    places = jax.tree.map(lambda x: x.sharding, variables)
  return {'places': places, 'apart': decoding.pays(variables) and fits(2)}


def sample(
  model_config, tokenizer, variables, prompts, *, title, leave=False, **how
):
  """Samples on a bar, and heeds a SIGTERM after every batch.

  Args:
    model_config: of the policy.
    tokenizer: of the model; its EOS ends a response.
    variables: see `sampling.generate`.
    prompts: see the same.
    title: of the bar.
    leave: whether the bar stays when it is done.
    **how: the other keywords of `sampling.generate`.
  """
  with tqdm.tqdm(total=len(prompts), desc=title, leave=leave) as bar:
    return sampling.generate(
      model_config,
      variables,
      prompts,
      eos_id=tokenizer.eos_ids,
      **how_to_sample(model_config, variables),
      on_batch=lambda done: (bar.update(done - bar.n), processes.poll()),
      **how,
    )


def response_texts(samples, tokenizer):
  """Decodes `sampling.Samples`, without the EOS that ended a response.

  A response cut within a character of several tokens loses that character.
  """
  texts = []
  for response, ended in zip(samples.responses(), samples.ended):
    text = tokenizer.decode(response[: len(response) - ended])
    texts.append(text if ended else text.rstrip('\ufffd'))
  return texts


def prompt_texts(prompts, tokenizer):
  """Decodes prompts, without the BOS that the model wants before them."""
  return [
    tokenizer.decode(prompt[int(prompt[0] == tokenizer.bos_id) :], start=True)
    for prompt in prompts
  ]


def make_samples(
  model_config,
  tokenizer,
  prompts,
  mesh,
  *,
  chunk,
  key,
  samples_per_prompt,
  max_new_tokens,
  temperature,
  top_p,
  batch_size,
  scorers,
  cost,
):
  """Returns the evaluator that samples from held-out prompts and scores.

  Args:
    model_config: of the policy.
    tokenizer: of the model.
    prompts: int32 arrays.
    mesh: devices.
    chunk: see `logps.token_comparisons`.
    key: of the samples; the same at every call, so that two policies are
      compared on the same randomness.
    samples_per_prompt: samples of each.
    max_new_tokens: where a sample is cut.
    temperature: 1 with top_p 1 samples the policy itself; only then is `kl`
      reported.
    top_p: nucleus.
    batch_size: samples computed at once.
    scorers: {column: (name, reward)}, what is measured of the texts: perhaps
      'reward', and 'ranker', by which `best_of_n` takes the best; judges.
    cost: name of a constraint score, or 'none'.

  The evaluator maps (variables, ref_variables) to (values, records): means
  over samples with standard errors over prompts, `distinct_2` with the
  jackknife's (`rewards.distinct_n_error`), and every text; without
  `ref_variables` (None) there is no `kl`.
  """
  repeated = [p for p in prompts for _ in range(samples_per_prompt)]
  constraint = None if cost == 'none' else rewards.get_constraint(cost)
  honest = temperature == 1.0 and top_p == 1.0
  compare = make_compare(model_config, mesh, chunk=chunk)
  longest = max(map(len, prompts))

  def evaluate(variables, ref_variables):
    samples = sample(
      model_config,
      tokenizer,
      variables,
      repeated,
      title='samples',
      key=key,
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      batch_size=batch_size,
    )
    responses = samples.responses()
    columns = {'length': samples.lengths, 'ended': samples.ended}
    if honest and ref_variables is not None:
      plan = batches.uniform_plan(
        [
          examples.Group(prompt, (response,), 1.0, 1.0, '')
          for prompt, response in zip(repeated, responses)
        ],
        max_prompt=longest,
        max_response=max_new_tokens,
        row_groups=1,
        batch_rows=batch_size,
        multiple=sharding.row_shards(mesh),
      )
      columns |= compare(variables, ref_variables, plan)
    texts = response_texts(samples, tokenizer)
    begun = prompt_texts(repeated, tokenizer)
    scores = {}
    for column, (name, reward) in scorers.items():
      if name not in scores:  # the ranker may be the reward
        scores[name] = rewards.score(
          reward, begun, texts, name=name, ended=samples.ended
        )
      columns[column] = scores[name]
    if constraint:
      columns['cost'] = rewards.score_constraint(constraint, begun, texts)
    values = {'distinct_2': rewards.distinct_n(texts, 2)}
    if len(prompts) > 1:
      values['distinct_2_se'] = rewards.distinct_n_error(
        texts, 2, per_prompt=samples_per_prompt
      )
    columns_NS = {
      name: np.reshape(column, (len(prompts), samples_per_prompt))
      for name, column in columns.items()
    }
    for name, column_NS in columns_NS.items():
      values |= over_prompts(name, column_NS.mean(1))
    if 'ranker' in scorers:
      judged = [name for name in columns if name in (*scorers, 'cost')]
      values |= best_of_n(
        columns_NS['ranker'], {name: columns_NS[name] for name in judged}
      )
    records = [
      {'prompt': prompt, 'response': text}
      | {name: float(column[i]) for name, column in columns.items()}
      for i, (prompt, text) in enumerate(zip(begun, texts))
    ]
    return values, records

  return evaluate


def over_prompts(name, values_N):
  """Returns a mean and, of more prompts than one, its standard error."""
  out = {name: values_N.mean()}
  if len(values_N) > 1:
    out[f'{name}_se'] = judges.standard_error(values_N)
  return out


def best_of_n(ranker_NS, columns_NS):
  """Returns what the best of n samples is expected to have.

  {'best_of_4/reward': ..., 'best_of_4/reward_se': ...} for n = 1, 2, 4, ... and
  S: means over prompts of `reweighting.best_of` all S samples of each, with
  their standard errors. `best_of_4/kl` is the KL, in nats, of choosing the best
  of 4 to the policy that sampled (`reweighting.best_of_kl`).

  Args:
    ranker_NS: scores of S samples of N prompts, of which the highest is best.
    columns_NS: {name: what else is known of them}.
  """
  most, values = ranker_NS.shape[1], {}
  for n in [*(2**k for k in range(most.bit_length()) if 2**k < most), most]:
    weights_NS = reweighting.best_of(n, ranker_NS)
    for name, column_NS in columns_NS.items():
      mean_N = (weights_NS * column_NS).sum(1)
      values |= over_prompts(f'best_of_{n}/{name}', mean_N)
    kl_N = reweighting.best_of_kl(n, ranker_NS)
    values |= over_prompts(f'best_of_{n}/kl', kl_N)
  return values
