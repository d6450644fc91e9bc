"""What every verb needs before it can begin: a model, its data, a reference."""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from dpo_jax import evaluators
from dpo_jax import fetch
from dpo_jax import names
from dpo_jax import objectives
from dpo_jax import policies
from dpo_jax import processes
from dpo_jax import ref_cache
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import sharding
from dpo_jax.data import batches
from dpo_jax.data import builders
from dpo_jax.data import conversations
from dpo_jax.data import examples
from dpo_jax.data import locations
from dpo_jax.data import partners
from dpo_jax.data import sources
from dpo_jax.losses import table
from dpo_jax.models import transformer


@dataclasses.dataclass
class Run:
  """The parts that training and evaluating a config share.

  policy: of `policies.open_policy`. sums: of `objectives.make_sums`.
  ref: what `policy.trained` was at the start, where something needs it (a
  frozen reference, the KL of samples), else None; an adapter that is off is
  None too. first_memory: of `objectives.first_memory`, placed.
  groups, ref_values: of each split. evaluate: (params, moving ref or None,
  memory) of `steps.State` -> (values, sample records).
  """

  policy: policies.Policy
  sums: Callable
  ref: Any
  first_memory: dict
  groups: dict
  ref_values: dict
  evaluate: Callable


def set_up(config, mesh, *, splits=('train', 'test')):
  """Builds what training and evaluating share; reads its config sections.

  `splits` are those whose cached reference log-probs are needed.
  """
  # ---------------------------------------------------------------- loss ----
  chunk = head_chunk(config)
  terms = bind_losses(config)
  mode = config.reference.mode

  # --------------------------------------------------------------- model ----
  policy = policies.open_policy(config, mesh, head=head_scale(config))
  model_config = policy.config
  tokenizer = policies.templated(policy.tokenizer, config.data.chat_template)
  policies.check_adapter_off(policy, dict(config.reference))

  # ---------------------------------------------------------------- data ----
  with processes.one_first():  # who downloads and prepares
    groups, report = load_groups(config.data, tokenizer, model_config, terms)
  tqdm.tqdm.write(report, file=sys.stderr)
  everything = [*groups['train'], *groups['test']]
  groups['test'] = groups['test'][: config.eval.max_groups or None]

  batch_size = config.eval.batch_size  # read, if nothing is held out too

  def evaluation_plan(split):
    return batches.evaluation_plan(
      groups[split],
      batch_size=batch_size,
      row_length=config.data.row_length,
      multiple=sharding.row_shards(mesh),
      window=model_config.window,
    )

  # ----------------------------------------------------------- reference ----
  token_logps = objectives.make_token_logps(model_config, chunk=chunk)
  ref_values = dict.fromkeys(groups)
  if mode == 'cached':
    cache_dir = config.reference.cache_dir or fetch.cache_folder() / 'reference'
    for split in splits:
      if groups[split]:
        ref_values[split] = ref_cache.load_or_compute(
          cache_dir,
          token_logps,
          policy.variables(policies.start(policy)),
          model_config,
          evaluation_plan(split),
          mesh,
          name=split,
        )
  start_ref = None  # cached: the weights leave memory, samples have no KL
  if mode == 'frozen' or (mode != 'cached' and config.eval.samples.num_prompts):
    start_ref = frozen_start(policy)

  # ---------------------------------------------------------- evaluators ----
  sums = objectives.make_sums(
    model_config,
    terms,
    chunk=chunk,
    reference=mode,
    responses=max([len(g.responses) for g in everything], default=1),
    form=config.data.form,
    rewards=any(g.rewards is not None for g in everything),
  )
  first_memory = jax.device_put(
    objectives.first_memory(terms), sharding.replicated(mesh)
  )
  evaluate_heldout = None
  if groups['test']:
    evaluate_heldout = evaluators.make_heldout(
      sums, evaluation_plan('test'), mesh, ref_values=ref_values['test']
    )
  prompts = sample_prompts(
    config.eval.samples.prompts,
    config.eval.samples.num_prompts,
    groups['test'],
    tokenizer,
    max_prompt_tokens=config.data.max_prompt_tokens,
  )
  evaluate_samples = sample_evaluator(
    config, prompts, model_config, tokenizer, mesh
  )

  def evaluate(params, ref, memory):
    now = policy.variables(params)
    began = None if mode == 'cached' else policy.variables(start_ref)
    values, samples = {}, []
    if evaluate_heldout:
      against = began if ref is None else policy.variables(ref)
      results = evaluate_heldout(now, against, memory)
      values |= {f'heldout/{name}': x for name, x in results.items()}
    if evaluate_samples:  # their KL is to where training began
      results, samples = evaluate_samples(now, began)
      values |= {f'samples/{name}': x for name, x in results.items()}
    return values, samples

  return Run(
    policy=policy,
    sums=sums,
    ref=start_ref,
    first_memory=first_memory,
    groups=groups,
    ref_values=ref_values,
    evaluate=evaluate,
  )


def head_chunk(config):
  """Returns how many scored tokens of a device have logits at one time."""
  if config.logps_chunk < 1:
    raise ValueError(f'logps_chunk is {config.logps_chunk}; use 1 or more')
  return config.logps_chunk


def frozen_start(policy):
  """Returns a copy, to be the reference, of what is trained; see `start`."""
  start = policies.start(policy)
  return jax.jit(
    lambda tree: frozen_copy(jax.tree.map(jnp.copy, tree), policy),
    out_shardings=jax.tree.map(lambda x: x.sharding, start),
  )(start)


def head_scale(config):
  """Returns the scale of a new head, None where the losses need no head."""
  return 1.0 if table.of_head(config.loss) else None


def frozen_copy(tree, policy):
  """Casts what is to be the reference to the dtype that it is used in.

  An adapter stays in float32: its scale is multiplied in before a cast.
  """
  dtype = 'float32' if policy.base is not None else policy.config.dtype
  return transformer.cast(tree, dtype)


def bind_losses(config):
  """Reads a config's losses and their reference: the terms of `table.bind`."""
  terms = table.bind({name: dict(config.loss[name]) for name in config.loss})
  objectives.check_reference(terms, dict(config.reference))
  return terms


def load_groups(data, tokenizer, model_config, terms):
  """Reads, splits and tokenizes: ({'train': groups, 'test': groups}, report).

  Args:
    data: the config's data section.
    tokenizer: of the model.
    model_config: its vocabulary and positions must hold the data.
    terms: of `table.bind`; they decide which forms of data will do.
  """
  examples.check_vocabulary(tokenizer, model_config.vocab_size)
  longest = data.max_prompt_tokens + data.max_response_tokens
  if model_config.positions == 'learned' and (
    longest > model_config.max_positions
  ):
    raise ValueError(
      f'data.max_prompt_tokens + data.max_response_tokens is {longest}, but'
      f' the model has {model_config.max_positions} positions'
    )
  check_source(data, terms)
  form, cost = data.form, constraint(data.constraint, terms)
  dataset = builders.load(
    data.task,
    source=data.source,
    form=form,
    cache_dir=data.cache_dir or fetch.cache_folder() / 'data',
    subsets=tuple(data.subsets) or None,
    held_out=data.held_out,
    prompt_words=data.prompt_words or None,
  )
  groups = {'train': [], 'test': []}
  texts = [str(dataset.report)]
  for split, stored in dataset.splits.items():
    groups[split], report = examples.tokenize(
      stored,
      tokenizer,
      max_prompt_tokens=data.max_prompt_tokens,
      max_response_tokens=data.max_response_tokens,
      form=form,
      cost=cost,
    )
    texts.append(f'{split}, in tokens\n{report}')
    if any(term.loss.ordered for term in terms):
      groups[split], ties = examples.drop_ties(groups[split])
      texts.append(f'{split}: {ties:,} {form} with ties dropped')
      if ties and not groups[split]:
        raise ValueError(
          f'all {ties:,} {form} of the {split} split have ties, which a loss'
          ' of orders cannot learn from; use infonca with a reward_temperature'
        )
    if groups[split] and any(term.loss.mismatched for term in terms):
      groups[split] = partners.mismatched(groups[split])
  check_data([*groups['train'], *groups['test']], terms, form)
  return groups, '\n\n'.join(texts)


def check_source(data, terms):
  """Refuses data that there cannot be, or that the losses cannot learn from.

  That is what a config's section says; no file is looked for.
  """
  forms = table.common_forms([term.name for term in terms])
  if data.form not in forms:
    raise ValueError(
      f'data.form is {data.form!r}, but the losses learn from'
      f' {" or ".join(forms)}'
    )
  names.look_up(builders.BUILDERS, 'data.task', data.task)
  sources.check_arguments(
    data.task,
    form=data.form,
    held_out=data.held_out,
    prompt_words=data.prompt_words or None,
  )
  if data.source == 'official':
    locations.official_urls(data.task, subsets=tuple(data.subsets) or None)


def constraint(name, terms):
  """Returns the cost function that the losses need, or None."""
  needy = [term.name for term in terms if 'costs' in term.needs]
  if name == 'none' and needy:
    raise ValueError(
      f'loss {needy[0]!r} needs costs; set data.constraint to one of'
      f' {", ".join(rewards.CONSTRAINTS)}'
    )
  if name != 'none' and not needy:
    raise ValueError(
      f'data.constraint is {name!r}, but no loss looks at costs; add'
      ' likelihood_penalty to the losses, or set it to "none"'
    )
  if name == 'none':
    return None
  return rewards.get_constraint(name)


def sample_prompts(source, number, groups, tokenizer, *, max_prompt_tokens):
  """Returns `number` prompts to sample from, as int32 arrays.

  Those of `source`, JSON Lines with a `prompt` each, or, where that is '', the
  first different ones of the held-out groups.
  """
  if not number:
    return []
  if source:
    texts = read_prompts(source)
    prompts = examples.encode_prompts(texts, tokenizer, max_prompt_tokens)
  else:
    prompts = {tuple(g.prompt.tolist()): g.prompt for g in groups}.values()
  if not prompts:
    raise ValueError(
      'eval.samples needs held-out prompts and there are none; raise'
      ' data.held_out, give a file of them as eval.samples.prompts, or set'
      ' eval.samples.num_prompts to 0'
    )
  return list(prompts)[:number]


def measured(how, reward=''):
  """Returns {column: name} of the rewards that config.eval.samples measures.

  `reward` is what its reward is where that is ''.
  """
  columns = {'reward': how['reward'] or reward, 'ranker': how['ranker']}
  columns = {column: x for column, x in columns.items() if x != 'none'}
  if 'ranker' in columns and how['samples_per_prompt'] < 2:
    raise ValueError(
      'eval.samples.ranker takes the best of the samples of a prompt, and'
      f' eval.samples.samples_per_prompt is {how["samples_per_prompt"]}; set it'
      ' to 2 or more, or the ranker to none'
    )
  return columns | reward_models.titles(how['judges'])


def sample_evaluator(
  config, prompts, model_config, tokenizer, mesh, *, reward=None
):
  """Returns `evaluators.make_samples` of a config, None without `prompts`.

  `reward` is (name, the reward of that name): it is measured where
  eval.samples.reward names none by being ''.
  """
  how = dict(config.eval.samples)
  opened = dict([reward] if reward else [])
  columns = measured(how, *opened)
  for name in ('prompts', 'num_prompts', 'reward', 'ranker', 'judges'):
    del how[name]  # `prompts` and `columns` are of them
  if not prompts:
    return None
  for name in columns.values():
    if name not in opened:
      opened[name] = reward_models.get(name, mesh=mesh)
  return evaluators.make_samples(
    model_config,
    tokenizer,
    prompts,
    mesh,
    chunk=head_chunk(config),
    key=policies.stream(config.seed, 'evaluation'),
    scorers={column: (name, opened[name]) for column, name in columns.items()},
    **how,
  )


def read_prompts(source):
  """Reads JSON Lines with a `prompt` each: a list of texts or messages."""
  prompts = []
  with open(source, 'rb') as f:
    for number, line in enumerate(f, start=1):
      try:
        prompt = json.loads(line)['prompt']
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f'{source}:{number}: not a JSON object with a "prompt"'
        ) from error
      check_prompt(prompt, f'{source}:{number}')
      prompts.append(prompt)
  if not prompts:
    raise ValueError(
      f'{source}:1: no prompts, the file is empty; write a JSON object with a'
      ' "prompt" on every line'
    )
  return prompts


def check_prompt(prompt, place):
  """Refuses what is neither a text nor messages; `place` is where it stands."""
  if isinstance(prompt, list):
    try:
      conversations.checked(prompt)
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from error
  elif not isinstance(prompt, str) or not prompt:
    raise ValueError(
      f'{place}: the prompt is {prompt!r:.40}; it must be a text, not an empty'
      ' one, or a list of messages'
    )


def check_data(groups, terms, form):
  """Refuses data that a loss would ignore, and losses without their data."""
  if len({group.rewards is None for group in groups}) > 1:
    raise ValueError(
      'some of the data has rewards and some, perhaps the other split, has'
      ' none; give them to all examples or to none'
    )
  labelled = any(group.p != 1.0 for group in groups)
  weighted = any(group.weight != 1.0 for group in groups)
  rewarded = any(group.rewards is not None for group in groups)
  heeding = [term for term in terms if 'p' in term.needs or term.soft]
  for term in terms:
    name, loss = term.name, term.loss
    if term.soft and not (form == 'pairs' and labelled):
      raise ValueError(
        f"loss {name!r}: labels 'soft' would change nothing, because the data"
        " has no soft labels p of pairs; set labels to 'hard'"
      )
    # One that looks at no preference may stand beside one that heeds p.
    ignores = term not in heeding and (loss.preference or not heeding)
    if form == 'pairs' and labelled and ignores:
      raise ValueError(
        f'the data has soft labels p, which loss {name!r} ignores; set its'
        " labels to 'soft', use loss 'soft', or leave p out"
      )
    if loss.batchwise and weighted:
      raise ValueError(
        f'the data has weights, which loss {name!r}, a function of the whole'
        ' batch, cannot apply; leave weight out'
      )
    if term.of_pairs and form != 'pairs':
      raise ValueError(
        f'loss {name!r}: reduction {term.reduction!r} compares the lengths of a'
        f' pair; data.form is {form!r}'
      )
    could = {'p', 'rewards'} <= set(loss.needs)  # one of them is the target
    if could and rewarded and 'rewards' not in term.needs:
      raise ValueError(
        f'the data has rewards, which loss {name!r} ignores; set its'
        ' reward_temperature above 0, or leave the rewards out'
      )
    if 'rewards' in term.needs and not rewarded:
      raise ValueError(
        f'loss {name!r} needs rewards, which the data lacks; add them, or set'
        f' its {"margin_scale" if loss.head else "reward_temperature"} to 0'
      )
