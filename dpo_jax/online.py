"""The loop in rounds: sample, score, pair, train; `train` does the training.

A round is an ordinary offline run over a data set that the round wrote, in a
workdir of its own, so it resumes like any other:

    workdir/heldout.jsonl                   prompts that `train` samples from
    workdir/round_1/completions.jsonl       every sample, its reward and cost
    workdir/round_1/pairs.jsonl             better and worse completions
    workdir/round_1/train/                  see `train`
    workdir/round_1/constraint.json         multiplier, mean cost and next one
    workdir/round_1/report.txt, report.json, curves.png, frontier.png

With one round this is DPO on the policy's own samples; with more it is
iterative DPO: a round starts from the last one's policy and takes that as its
reference, and the KL it reports is to that reference. With a constraint,
pairs are ranked by the reward less multiplier * cost, and the multiplier moves
after each round (`constraints`); it follows from the config and the metrics of
the rounds before, so it resumes with them.
"""

import json
import os

import numpy as np

from dpo_jax import constraints
from dpo_jax import evaluators
from dpo_jax import metrics
from dpo_jax import policies
from dpo_jax import processes
from dpo_jax import report
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import rounds
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import workdirs
from dpo_jax.data import examples
from dpo_jax.data import openings

_CURVES = (
  'train/loss',
  'train/rewards/margin',
  'samples/reward',
  'samples/cost',
  'samples/kl',
)
_EXAMPLES = 6  # texts shown in the report


def run(config, workdir):
  """Runs all rounds; returns the text of their reports.

  Args:
    config: `settings.Settings` with the keys of configs/quickstart.py.
      `config.train` is a config of `train` in which the keys of
      `rounds.SET_HERE` are left to the loop.
    workdir: directory of all rounds; what is finished there is not redone.
  """
  with workdirs.held(workdir), processes.heed_sigterm():
    return _run(config, workdir)


def _run(config, workdir):
  # -------------------------------------------------------------- config ----
  rounds.check(config, sharding.make_mesh(**config.train.mesh))
  workdir = os.path.abspath(workdir)  # it is part of each round's config
  prompts = read_prompts(config.prompts)
  seed = config.seed
  how, reward = dict(config.sampling), config.reward
  train_config = config.train.as_dict()
  score = reward_models.get(reward)
  constraint, cost, dual = rounds.read_constraint(
    config.constraint, rounds=config.rounds
  )
  multiplier, start = dual.pop('multiplier'), dual.pop('start')
  config.check_all_read(but='train')  # `train` checks its own part
  workdirs.claim(workdir, config, json.dumps(prompts))
  heldout = os.path.join(workdir, 'heldout.jsonl')
  if processes.first():
    write_lines(heldout, [{'prompt': text} for text in prompts['test']])

  texts = []
  for number in range(1, config.rounds + 1):
    directory = os.path.join(workdir, f'round_{number}')
    pairs = os.path.join(directory, 'pairs.jsonl')
    values = {
      'seed': seed + number - 1,
      'data.source': pairs,
      'eval.samples.prompts': heldout,
      'eval.samples.reward': reward,
      'eval.samples.cost': constraint,
    }
    if number > 1 and start == 'last':
      values['init'] = os.path.join(workdir, f'round_{number - 1}', 'train')
    of_round = settings.Settings(rounds.round_config(train_config, values))

    # ------------------------------------------------ sample, score, pair ----
    if not processes.agreed(os.path.exists(pairs)):
      write_pairs(
        of_round,
        prompts['train'],
        directory,
        score,
        name=reward,
        cost=cost,
        multiplier=multiplier,
        **how,
      )
    processes.wait('pairs')

    # --------------------------------------------------------------- train ----
    train.train(of_round, os.path.join(directory, 'train'))
    processes.poll()

    # -------------------------------------------------- multiplier, report ----
    priced = {}
    if cost:
      if processes.first():
        priced = write_constraint(directory, multiplier, **dual)
      priced = processes.agreed(priced)
      multiplier = priced['next_multiplier']
    if processes.first():
      texts.append(f'round {number}\n{write_report(directory, priced)}')
  return '\n'.join(texts)


def read_prompts(source):
  """Reads {'train': [text], 'test': [text]}.

  `source` is 'openings' (the movie-review openings that ship with us) or a
  JSON file of that form.
  """
  if source == 'openings':
    return openings.openings()
  with open(source, 'rb') as f:
    try:
      prompts = json.load(f)
    except ValueError as error:
      raise ValueError(f'{source} is no JSON file: {error}') from error
  if not isinstance(prompts, dict) or set(prompts) != {'train', 'test'}:
    raise ValueError(
      f"{source} must hold {{'train': [...], 'test': [...]}}, it has"
      f' {[*prompts] if isinstance(prompts, dict) else prompts!r:.60}'
    )
  for split, texts in prompts.items():
    if not isinstance(texts, list) or not texts:
      raise ValueError(f'{source}: {split} must be a list of texts, with one')
    for number, text in enumerate(texts):
      if not isinstance(text, str) or not text:
        raise ValueError(
          f'{source}: {split}[{number}] is {text!r:.40}; it must be a text, not'
          ' an empty one'
        )
  both = set(prompts['train']) & set(prompts['test'])
  if both:
    raise ValueError(
      f'{source}: {len(both)} prompts are in train and in test, such as'
      f' {min(both)!r}; take them out of one'
    )
  return prompts


def write_pairs(
  config,
  prompts,
  directory,
  reward,
  *,
  name,
  cost,
  multiplier,
  samples_per_prompt,
  pairs_per_prompt,
  max_new_tokens,
  temperature,
  top_p,
  batch_size,
):
  """Samples with the round's first policy; writes completions and pairs.

  The best and the worst completion of a prompt become its pair; a prompt whose
  completions all score the same has none, and is counted. pairs.jsonl appears
  under its name only when it is whole. The score is the reward, whose name is
  `name`, less multiplier times cost where there is a `cost`.
  """
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.open_policy(config, mesh)
  tokenizer = policy.tokenizer
  repeated = [text for text in prompts for _ in range(samples_per_prompt)]
  with sharding.use(mesh):
    samples = evaluators.sample(
      policy.config,
      tokenizer,
      policy.variables(policy.trained),
      examples.encode_prompts(
        repeated, tokenizer, config.data.max_prompt_tokens
      ),
      title='sample',
      leave=True,
      key=policies.stream(config.seed, 'rollout'),
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      batch_size=batch_size,
    )
  responses = evaluators.response_texts(samples, tokenizer)
  values = rewards.score(
    reward, repeated, responses, name=name, ended=samples.ended
  )
  columns = {'reward': values}
  if cost:
    columns['cost'] = rewards.score_constraint(cost, repeated, responses)
    values = constraints.effective_rewards(values, columns['cost'], multiplier)
  pairs = best_and_worst(
    prompts,
    responses,
    samples.ended,
    values,
    samples_per_prompt=samples_per_prompt,
    pairs_per_prompt=pairs_per_prompt,
  )
  ties = len(prompts) * pairs_per_prompt - len(pairs)
  means = [f'mean {name} {x.mean():.3f}' for name, x in columns.items()]
  if cost:
    means.append(f'multiplier {multiplier:.3f}')
  print(
    f'{len(repeated)} completions of {len(prompts)} prompts,'
    f' {", ".join(means)}; {len(pairs)} pairs, {ties} left out as ties'
  )
  if not pairs:
    raise ValueError(
      'every prompt got completions of one and the same reward, so there are no'
      ' pairs; use another reward or more sampling.samples_per_prompt'
    )
  if not processes.first():
    return
  os.makedirs(directory, exist_ok=True)
  write_lines(
    os.path.join(directory, 'completions.jsonl'),
    [
      {'prompt': prompt, 'response': response}
      | {name: column[i] for name, column in columns.items()}
      for i, (prompt, response) in enumerate(zip(repeated, responses))
    ],
  )
  write_lines(os.path.join(directory, 'pairs.jsonl'), pairs)


def write_lines(path, records):
  """Writes JSON Lines; the file appears whole or not at all."""
  workdirs.write(path, ''.join(json.dumps(r) + '\n' for r in records))


def best_and_worst(
  prompts, responses, ended, values, *, samples_per_prompt, pairs_per_prompt
):
  """Returns pair records of the best and the worst response of each prompt.

  Args:
    prompts: N texts.
    responses: N * samples_per_prompt texts, those of a prompt together.
    ended: whether each response ended by itself.
    values: score of each response; ties go to the first.
    samples_per_prompt: responses of a prompt.
    pairs_per_prompt: 1 for best and worst only; 2 adds second best and second
      worst, and so on. A pair of equal values is left out.
  """
  pairs = []
  for n, prompt in enumerate(prompts):
    first = n * samples_per_prompt
    span = values[first : first + samples_per_prompt]
    best = first + np.argsort(-span, kind='stable')
    worst = first + np.argsort(span, kind='stable')
    for i, j in zip(best[:pairs_per_prompt], worst[:pairs_per_prompt]):
      if values[i] > values[j]:
        pairs.append(
          {
            'prompt': prompt,
            'chosen': responses[i],
            'rejected': responses[j],
            'chosen_ended': bool(ended[i]),
            'rejected_ended': bool(ended[j]),
          }
        )
  return pairs


def sampled_points(records):
  """Returns what was measured on held-out samples, first to last."""
  return [
    {
      name.removeprefix('samples/'): value
      for name, value in record.items()
      if name.startswith('samples/')
    }
    for record in records
    if 'samples/reward' in record
  ]


def write_constraint(directory, multiplier, *, budget, lr):
  """Moves the multiplier by the final policy's cost; writes and returns it."""
  records = metrics.read(os.path.join(directory, 'train'))
  mean_cost = sampled_points(records)[-1]['cost']
  priced = {
    'multiplier': multiplier,
    'mean_cost': mean_cost,
    'budget': budget,
    'lr': lr,
    'next_multiplier': constraints.next_multiplier(
      multiplier, mean_cost, budget=budget, lr=lr
    ),
  }
  text = json.dumps(priced, indent=2)
  workdirs.write(os.path.join(directory, 'constraint.json'), text)
  return priced


def write_report(directory, priced):
  """Writes a round's numbers, example texts and pictures; returns the text.

  `priced` is of `write_constraint`, {} without a constraint.
  """
  workdir = os.path.join(directory, 'train')
  records = metrics.read(workdir)
  samples = metrics.read(workdir, 'samples.jsonl')
  points = sampled_points(records)
  first = [s for s in samples if s['step'] == samples[0]['step']]
  last = [s for s in samples if s['step'] == samples[-1]['step']]
  pairs = list(zip(first, last))
  table = report.text_table(
    [
      {
        'prompt': before['prompt'],
        'before': before['response'],
        'before_reward': before['reward'],
        'after': after['response'],
        'after_reward': after['reward'],
      }
      for before, after in pairs[:: max(1, len(pairs) // _EXAMPLES)][:_EXAMPLES]
    ]
  )
  text = f'{table}\n{report.summary(points[0], points[-1])}'
  numbers = {'before': points[0], 'after': points[-1]}
  if priced:
    numbers['constraint'] = priced
    text += (
      f'multiplier of the cost {priced["multiplier"]:.3f}, next'
      f' {priced["next_multiplier"]:.3f}; budget {priced["budget"]:.3f}\n'
    )

  def path(name):
    return os.path.join(directory, name)

  report.curves_png(records, path('curves.png'), keys=_CURVES)
  report.frontier_png(points, path('frontier.png'))
  with open(path('report.txt'), 'w', encoding='utf-8') as f:
    f.write(text)
  with open(path('report.json'), 'w') as f:
    json.dump(numbers, f, indent=2)
  return text
