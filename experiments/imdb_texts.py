"""Controlled sentiment: the texts, and what is sampled from policies.

`imdb_frontier` calls this in its order; every file appears whole or not at all.
"""

import itertools
import json

import numpy as np
import tokenizers

from dpo_jax import evaluators
from dpo_jax import exports
from dpo_jax import fetch
from dpo_jax import judges
from dpo_jax import online
from dpo_jax import policies
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import sentiment
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import weights
from dpo_jax import workdirs
from dpo_jax.data import builders
from dpo_jax.data import examples
from dpo_jax.data import subwords
from dpo_jax.data import tokenizers as our_tokenizers
from dpo_jax.models import transformer
from experiments import imdb_results

EOS = '<|endoftext|>'


# --- Reviews, base model, prompts ---------------------------------------------


def read_reviews(source):
  """Returns {'train': [(text, label)], 'test': ...} without HTML breaks.

  White space is one space; what both sides have has left train.
  """
  reviews = builders.load(
    'imdb',
    source=source,
    form='reviews',
    held_out=0.0,
    cache_dir=fetch.cache_folder() / 'data',
  )
  return {
    split: [
      (' '.join(sentiment.without_breaks(row['text']).split()), row['label'])
      for row in rows
    ]
    for split, rows in reviews.splits.items()
  }


def write_base(scale, texts, folder):
  """Writes a random model and a tokenizer of `texts`, as a model's folder."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = subwords.byte_level()
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=scale.vocabulary,
    special_tokens=[EOS],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  own = folder.with_name('tokenizer')
  own.mkdir(exist_ok=True)
  backend.save(str(own / 'tokenizer.json'))
  (own / 'tokenizer_config.json').write_text(json.dumps({'eos_token': EOS}))
  shape = dict(scale.shape)
  model_config = transformer.TransformerConfig(
    vocab_size=backend.get_vocab_size(),
    num_kv_heads=shape['num_heads'],
    head_dim=shape['d_model'] // shape['num_heads'],
    norm='rms',
    norm_eps=1e-5,
    positions='rotary',
    max_positions=1024,
    rope_theta=10000.0,
    mlp='swiglu',
    attention_bias=False,
    mlp_bias=False,
    tied=True,
    **shape,
  )
  checkpoint = weights.random(
    model_config,
    source='random',
    tokenizer=our_tokenizers.from_folder(own),
  )
  model = exports.with_parameters(checkpoint, weights.assemble(checkpoint))
  exports.write(model, folder, shard_size=5 * 10**9)


def open_tokenizer(scale, paths):
  """Returns the base model's tokenizer."""
  return policies.open_source(scale.source or str(paths.base)).tokenizer


def cut_review(text, tokenizer, tokens):
  """Cuts a review: (as many whole words as fit `tokens`, at least one; rest).

  The rest keeps its space, so that both together are the review.
  """
  words, prompt = text.split(' '), ''
  for number in range(1, len(words) + 1):
    longer = ' '.join(words[:number])
    if number > 1 and len(tokenizer.encode(longer, start=True)) > tokens:
      break
    prompt = longer
  return prompt, text[len(prompt) :]


def write_prompts(scale, reviews, paths):
  """Writes sft.jsonl and the prompts of both sides.

  Test prompts are of reviews that the judge has not learned from; they differ
  from each other and from every prompt that is trained on. Temperatures have
  some of their own: by the others the best checkpoints are chosen.
  """
  tokenizer = open_tokenizer(scale, paths)
  low, high = scale.prompt_tokens
  rng = np.random.default_rng(scale.seed)

  def cut(texts):
    lengths = rng.integers(low, high + 1, len(texts))
    halves = [cut_review(t, tokenizer, n) for t, n in zip(texts, lengths)]
    return [
      (prompt, rest)
      for prompt, rest in halves
      # A first word of more tokens would lose its beginning as a prompt.
      if rest and len(tokenizer.encode(prompt, start=True)) <= high
    ]

  rows = cut([text for text, _ in reviews['train']])
  unseen = [t for t, _ in reviews['test'] if sentiment.half(t) == 1]
  known = {prompt for prompt, _ in rows}
  tests = {prompt: rest for prompt, rest in cut(unseen) if prompt not in known}
  first, more = scale.test_prompts, scale.temperature_prompts
  if not rows or len(tests) < first + more:
    raise ValueError(
      f'{len(rows)} train and {len(tests)} test reviews have a beginning of'
      f' {low} to {high} tokens of their own and a rest, and {first + more} of'
      ' test are needed; give all reviews as --source'
    )
  trained = list(known)  # a set's order changes from process to process
  trained.sort()
  rng.shuffle(trained)
  chosen = sorted(tests)
  rng.shuffle(chosen)
  online.write_lines(
    str(paths.train_prompts), [{'prompt': p} for p in trained[: scale.prefixes]]
  )
  for path, part in [
    (paths.test_prompts, chosen[:first]),
    (paths.temperature_prompts, chosen[first : first + more]),
  ]:
    rests = [_cut(tests[p], tokenizer, scale.new_tokens) for p in part]
    online.write_lines(
      str(path),
      [{'prompt': p, 'continuation': r} for p, r in zip(part, rests)],
    )
  online.write_lines(
    str(paths.sft_rows),
    [{'prompt': prompt, 'response': rest} for prompt, rest in rows],
  )


def _cut(text, tokenizer, tokens):
  """The first tokens of a text, as text."""
  return tokenizer.decode(tokenizer.encode(text)[:tokens]).rstrip('\ufffd')


# --- Samples, pairs -----------------------------------------------------------


def sample(
  scale, prompts, *, number, workdir, which='newest', temperature=1.0, stream
):
  """Samples from what a run trained, `number` responses to every prompt.

  Args:
    scale: sizes.
    prompts: N texts.
    number: of responses to each.
    workdir: of the run.
    which: its checkpoint.
    temperature: 0 takes the most probable token.
    stream: name of the randomness.

  Returns:
    (texts [N * number], those of a prompt together; the `Samples` they are of).
  """
  config = settings.Settings(workdirs.read_config(workdir))
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.open_policy(config, mesh, workdir=str(workdir), which=which)
  repeated = [prompt for prompt in prompts for _ in range(number)]
  with sharding.use(mesh):
    samples = evaluators.sample(
      policy.config,
      policy.tokenizer,
      policy.variables(policy.trained),
      examples.encode_prompts(
        repeated, policy.tokenizer, scale.prompt_tokens[1] + 1
      ),
      title='samples',
      key=policies.stream(scale.seed, stream),
      max_new_tokens=scale.new_tokens,
      temperature=temperature,
      top_p=1.0,
      batch_size=scale.sample_batch,
    )
  return evaluators.response_texts(samples, policy.tokenizer), samples


def write_completions(scale, paths):
  """Samples completions of train prompts from the SFT model and labels them."""
  prompts = _texts(paths.train_prompts, 'prompt')
  responses, samples = sample(
    scale,
    prompts,
    number=scale.completions,
    workdir=paths.sft,
    stream='completions',
  )
  repeated = [p for p in prompts for _ in range(scale.completions)]
  odds = rewards.score(
    rewards.get(f'sentiment:{paths.classifier}'), repeated, responses
  )
  online.write_lines(
    str(paths.completions),
    [
      {
        'prompt': prompt,
        'response': response,
        'ended': bool(end),
        'log_odds': float(value),
        'probability': float(1.0 / (1.0 + np.exp(-value))),
      }
      for prompt, response, end, value in zip(
        repeated, responses, samples.ended, odds
      )
    ],
  )


def all_pairs(completions):
  """Pairs all completions of a prompt: (pairs, ties left out).

  The one of the higher log odds is chosen; neighbours of one prompt belong
  together.
  """
  pairs, ties = [], 0
  for prompt, group in itertools.groupby(completions, lambda x: x['prompt']):
    for one, other in itertools.combinations(group, 2):
      if one['log_odds'] == other['log_odds']:
        ties += 1
        continue
      if one['log_odds'] < other['log_odds']:
        one, other = other, one
      pairs.append(
        {
          'prompt': prompt,
          'chosen': one['response'],
          'rejected': other['response'],
          'chosen_ended': one['ended'],
          'rejected_ended': other['ended'],
        }
      )
  return pairs, ties


def write_pairs(paths):
  """Writes pairs.jsonl; training holds out whole prompts of it."""
  completions = imdb_results.read_lines(paths.completions)
  pairs, ties = all_pairs(completions)
  mean = np.mean([row['probability'] for row in completions])
  print(
    f'{len(completions):,} completions, mean P(positive) {mean:.3f};'
    f' {len(pairs):,} pairs, {ties:,} ties left out'
  )
  if not pairs:
    raise ValueError(
      'all completions of every prompt are equally positive, so there are no'
      ' pairs; train the SFT model longer'
    )
  online.write_lines(str(paths.pairs), pairs)


def _texts(path, name):
  return [row[name] for row in imdb_results.read_lines(path)]


# --- Best of N, temperatures --------------------------------------------------


def write_best_of_n(scale, paths):
  """Samples often from the SFT model; writes both rewards of all samples."""
  prompts = _texts(paths.test_prompts, 'prompt')[: scale.best_of_prompts]
  number = max(*scale.best_of, scale.tilted)
  responses, samples = sample(
    scale, prompts, number=number, workdir=paths.sft, stream='best_of_n'
  )
  repeated = [prompt for prompt in prompts for _ in range(number)]
  columns = {
    name: rewards.score(
      reward_models.get(reward), repeated, responses, ended=samples.ended
    )
    for name, reward in [('learned', paths.learned), ('reward', paths.reward)]
  }
  by_prompt = {
    name: np.reshape(values, (-1, number)).tolist()
    for name, values in columns.items()
  }
  online.write_lines(
    str(paths.best_of_n),
    [
      {'prompt': prompt} | {name: x[n] for name, x in by_prompt.items()}
      for n, prompt in enumerate(prompts)
    ],
  )


def temperature_is_current(paths):
  """Whether temperatures were asked of the runs that are the best now."""
  if not paths.temperature.exists():
    return False
  rows = json.loads(paths.temperature.read_text())
  asked = {
    row['policy']: (row['run'], row.get('made'))
    for row in rows
    if row['policy'] != 'sft'
  }
  runs = imdb_results.read_runs(paths.runs, texts=False)
  return asked == {
    policy: (best, best and _made(paths.runs / best))
    for policy, best in imdb_results.compared(runs).items()
  }


def _made(folder):
  """Returns when a run was finished, 0 of another model."""
  path = folder / imdb_results.FINISHED
  return path.stat().st_mtime_ns if path.exists() else 0


def write_temperature(scale, paths):
  """Asks how often policies beat the reviews' own continuations.

  The best checkpoints of DPO and of PPO with the learned reward, and the SFT
  model; the classifier judges, in both orders.
  """
  rows = imdb_results.read_lines(paths.temperature_prompts)
  prompts, truths = ([r[k] for r in rows] for k in ('prompt', 'continuation'))
  runs = imdb_results.read_runs(paths.runs, texts=False)
  chosen = {'sft': (paths.sft, 'newest')}
  for method, best in imdb_results.compared(runs).items():
    if not best:
      raise ValueError(f'no run of {method} is finished, so none is the best')
    chosen[method] = (paths.runs / best, 'best')
  judge = judges.by_reward(rewards.get(paths.reward))
  out = []
  for policy, (folder, which) in chosen.items():
    made = _made(folder)  # before it is asked
    for temperature in scale.temperatures:
      responses, samples = sample(
        scale,
        prompts,
        number=1,
        workdir=folder,
        which=which,
        temperature=temperature,
        stream='temperature',
      )
      asked = judges.win_rate(judge, prompts, responses, truths)
      out.append(
        {'policy': policy, 'run': folder.name, 'temperature': temperature}
        | {'made': made}
        | {name: x for name, x in asked.items() if name != 'wins'}
        | {
          'distinct_2': rewards.distinct_n(responses, 2),
          'ended': float(np.mean(samples.ended)),
          'wins': asked['wins'].tolist(),
        }
      )
  workdirs.write(str(paths.temperature), json.dumps(out, indent=1))
