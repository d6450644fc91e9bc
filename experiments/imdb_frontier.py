"""Controlled sentiment on IMDb: the DPO paper's central figure, one command.

  python -m experiments.imdb_frontier --scale=s --source=official \
      --workdir=runs/imdb

From the labelled reviews to reward against KL of six methods (figure 2 left of
arXiv:2305.18290; section 6.1, appendix C.1). Stages, in their order:

  classifier/         a classifier of sentiment, the reward, and a second judge
                      that nothing is trained on
  base/               a small random model and its tokenizer (scales smoke, s)
  sft.jsonl           beginnings of reviews with their rest; prompts.*.jsonl,
                      of which those of test are measured on
  sft/                the model that has learned to write reviews: the reference
  pairs.jsonl         all pairs of completions.jsonl, the more positive chosen
  reward_model/       the learned reward
  runs/NAME/          see `imdb_scales`
  best_of_n.jsonl     scores of many samples of the SFT model
  temperature.json    the best policies against the reviews' own continuations
  results             what `imdb_results` makes of all this

What is there is not made again, and a stage appears whole or goes on where it
was killed; so the same command goes on after anything. --only=NAME,... makes
some stages or runs, and what they need; --all makes all 22 runs; --list shows
what there is. A workdir belongs to one scale and one source.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import re
import signal
import sys
import time
from collections.abc import Callable

import numpy as np
import tokenizers
import tqdm

from dpo_jax import evaluators
from dpo_jax import exports
from dpo_jax import fetch
from dpo_jax import judges
from dpo_jax import metrics
from dpo_jax import names
from dpo_jax import online
from dpo_jax import policies
from dpo_jax import ppo
from dpo_jax import processes
from dpo_jax import reward_models
from dpo_jax import rewards
from dpo_jax import sampling
from dpo_jax import sentiment
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import weights
from dpo_jax import workdirs
from dpo_jax.data import builders
from dpo_jax.data import examples
from dpo_jax.data import subwords
from dpo_jax.data import tokenizers as our_tokenizers
from dpo_jax.models import transformer
from experiments import imdb_results
from experiments import imdb_scales

EOS = '<|endoftext|>'
MISTAKES = (ValueError, FloatingPointError, OSError)
_BREAK = re.compile(r'<br\s*/?>', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of the way: what it is called, and what must be there before.

  kind: stages of one kind take about as long. done: whether its output is
  there. make: makes it.
  """

  name: str
  kind: str
  needs: tuple[str, ...]
  done: Callable[[], bool]
  make: Callable[[], None]


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
      (' '.join(_BREAK.sub(' ', row['text']).split()), row['label'])
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
  from each other and from every prompt that is trained on.
  """
  tokenizer = open_tokenizer(scale, paths)
  low, high = scale.prompt_tokens
  rng = np.random.default_rng(scale.seed)

  def cut(texts):
    lengths = rng.integers(low, high + 1, len(texts))
    halves = [
      cut_review(*x) for x in zip(texts, [tokenizer] * len(texts), lengths)
    ]
    return [half for half in halves if all(half)]

  rows = cut([text for text, _ in reviews['train']])
  unseen = [t for t, _ in reviews['test'] if sentiment.half(t) == 1]
  known = {prompt for prompt, _ in rows}
  tests = {prompt: rest for prompt, rest in cut(unseen) if prompt not in known}
  if not rows or not tests:
    raise ValueError(
      f'{len(rows)} train and {len(tests)} test reviews have a beginning of'
      f' {low} to {high} tokens and a rest; give all reviews as --source'
    )
  trained = list(known)  # a set's order changes from process to process
  trained.sort()
  rng.shuffle(trained)
  chosen = sorted(tests)
  rng.shuffle(chosen)
  online.write_lines(
    str(paths.train_prompts), [{'prompt': p} for p in trained[: scale.prefixes]]
  )
  online.write_lines(
    str(paths.test_prompts),
    [
      {'prompt': p, 'continuation': _cut(tests[p], tokenizer, scale.new_tokens)}
      for p in chosen[: scale.test_prompts]
    ],
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
    (texts [N * number], those of a prompt together; whether each has ended).
  """
  config = settings.Settings(workdirs.read_config(workdir))
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.open_policy(config, mesh, workdir=str(workdir), which=which)
  repeated = [prompt for prompt in prompts for _ in range(number)]
  bar = tqdm.tqdm(total=len(repeated), desc='samples', leave=False)
  with sharding.use(mesh), bar as progress:
    samples = sampling.generate(
      policy.config,
      policy.variables(policy.trained),
      examples.encode_prompts(
        repeated, policy.tokenizer, scale.prompt_tokens[1] + 1
      ),
      key=policies.stream(scale.seed, stream),
      max_new_tokens=scale.new_tokens,
      temperature=temperature,
      top_p=1.0,
      eos_id=policy.tokenizer.eos_ids,
      batch_size=scale.sample_batch,
      on_batch=lambda done: (
        progress.update(done - progress.n),
        processes.poll(),
      ),
    )
  return evaluators.response_texts(samples, policy.tokenizer), samples.ended


def write_completions(scale, paths):
  """Samples completions of train prompts from the SFT model and labels them."""
  prompts = _texts(paths.train_prompts, 'prompt')
  responses, ended = sample(
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
      for prompt, response, end, value in zip(repeated, responses, ended, odds)
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


# --- Training -----------------------------------------------------------------


def finish_run(loop, config, folder, *, may_diverge=False):
  """Trains in a folder, or goes on there; marks it as finished.

  Where it `may_diverge`, numbers that are not finite end it, and the mark says
  so.
  """
  stopped = ''
  try:
    loop(settings.Settings(config.to_dict()), str(folder))
  except FloatingPointError as error:
    if not may_diverge:
      raise
    stopped = str(error)
    print(f'{folder.name} ends here: {stopped}')
  workdirs.write(
    str(folder / imdb_results.FINISHED), json.dumps({'stopped': stopped})
  )


def make_run(run, scale, paths):
  """Trains a run of a scale."""
  finish_run(
    ppo.run if imdb_scales.is_ppo(run) else train.train,
    imdb_scales.run_config(run, scale, paths),
    paths.runs / run.name,
    may_diverge=run.method == 'unlikelihood',  # it has no minimum
  )


def make_reward_model(scale, paths):
  """Trains the learned reward, and tells its accuracy."""
  config = imdb_scales.reward_model_config(scale, paths)
  finish_run(train.train, config, paths.reward_model)
  gate = imdb_results.gate_a15(metrics.read(paths.reward_model))
  print(f'reward model: {gate["text"]}')


# --- Best of N, temperatures --------------------------------------------------


def write_best_of_n(scale, paths):
  """Samples often from the SFT model; writes both rewards of all samples."""
  prompts = _texts(paths.test_prompts, 'prompt')[: scale.best_of_prompts]
  number = max(*scale.best_of, scale.tilted)
  responses, _ = sample(
    scale, prompts, number=number, workdir=paths.sft, stream='best_of_n'
  )
  repeated = [prompt for prompt in prompts for _ in range(number)]
  columns = {
    name: rewards.score(reward_models.get(reward), repeated, responses)
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


def write_temperature(scale, paths):
  """Asks how often policies beat the reviews' own continuations.

  The best checkpoints of DPO and of PPO with the learned reward, and the SFT
  model; the classifier judges, in both orders.
  """
  rows = imdb_results.read_lines(paths.test_prompts)
  rows = rows[: scale.temperature_prompts]
  prompts, truths = ([r[k] for r in rows] for k in ('prompt', 'continuation'))
  runs = imdb_results.read_runs(paths.runs)
  chosen = {'sft': (paths.sft, 'newest')}
  for method in ('dpo', 'ppo'):
    best = imdb_results.best_run(runs, method)
    chosen[method] = (paths.runs / best, 'best')
  judge = judges.by_reward(rewards.get(paths.reward))
  out = []
  for policy, (folder, which) in chosen.items():
    for temperature in scale.temperatures:
      responses, ended = sample(
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
        | {name: x for name, x in asked.items() if name != 'wins'}
        | {
          'distinct_2': rewards.distinct_n(responses, 2),
          'ended': float(np.mean(ended)),
          'wins': asked['wins'].tolist(),
        }
      )
  workdirs.write(str(paths.temperature), json.dumps(out, indent=1))


# --- Order, progress ----------------------------------------------------------


def make_stages(scale, paths, source, runs):
  """Returns the stages in their order.

  Args:
    scale: sizes.
    paths: of the workdir.
    source: of the reviews.
    runs: names of runs.
  """
  reviews = {}  # read when they are needed, once

  def get_reviews():
    if not reviews:
      reviews.update(read_reviews(source))
    return reviews

  def classify():
    made = sentiment.train(
      source, paths.classifiers, cache_dir=fetch.cache_folder() / 'data'
    )
    print(sentiment.account(made))

  def make_base():
    texts = [text for text, _ in get_reviews()['train']]
    write_base(scale, texts, paths.base)

  def make_sft():
    config = imdb_scales.sft_config(scale, paths)
    finish_run(train.train, config, paths.sft)

  def stage(name, needs, output, make, *, kind=None):
    return Stage(name, kind or name, needs, output.exists, make)

  finished = imdb_results.FINISHED
  out = [
    stage('classifier', (), paths.judge, classify),  # written last
    stage(
      'sft_rows',
      () if scale.source else ('base',),
      paths.sft_rows,  # written last
      lambda: write_prompts(scale, get_reviews(), paths),
    ),
    stage('sft', ('sft_rows',), paths.sft / finished, make_sft),
    stage(
      'completions',
      ('classifier', 'sft'),
      paths.completions,
      lambda: write_completions(scale, paths),
    ),
    stage('pairs', ('completions',), paths.pairs, lambda: write_pairs(paths)),
    stage(
      'reward_model',
      ('pairs',),
      paths.reward_model / finished,
      lambda: make_reward_model(scale, paths),
    ),
  ]
  if not scale.source:
    out.insert(1, stage('base', (), paths.base, make_base))
  for run in map(imdb_scales.parse, runs):
    out.append(
      stage(
        run.name,
        ('reward_model',) if run.method == 'ppo' else ('pairs',),
        paths.runs / run.name / finished,
        lambda run=run: make_run(run, scale, paths),
        kind=run.method,
      )
    )
  compared = [r for r in runs if imdb_scales.parse(r).method in ('dpo', 'ppo')]
  out += [
    stage(
      'best_of_n',
      ('reward_model',),
      paths.best_of_n,
      lambda: write_best_of_n(scale, paths),
    ),
    stage(
      'temperature',
      tuple(compared),
      paths.temperature,
      lambda: write_temperature(scale, paths),
    ),
    Stage(
      'results',
      'results',
      (),
      lambda: imdb_results.is_current(paths),
      lambda: print(imdb_results.write(scale, paths)),
    ),
  ]
  return out


def needed(stages, wanted):
  """Returns the stages of those names and those that they need, in order."""
  by_name = {stage.name: stage for stage in stages}
  found, open_ = set(), list(wanted)
  while open_:
    stage = names.look_up(by_name, 'stage or run', open_.pop())
    if stage.name not in found:
      found.add(stage.name)
      open_ += stage.needs
  return [stage for stage in stages if stage.name in found]


def remaining(left, times):
  """Tells the time that stages will take, by finished ones of their kind.

  Args:
    left: stages.
    times: {name: {'kind', 'seconds'}} of finished ones.
  """
  known = collections.defaultdict(list)
  for entry in times.values():
    known[entry['kind']].append(entry['seconds'])
  seconds = sum(np.mean(known[s.kind]) for s in left if s.kind in known)
  new = sum(s.kind not in known for s in left)
  if new == len(left):
    return 'nobody knows how long'
  text = f'about {seconds / 60:.1f} min'
  return f'{text}, and {new} of kinds not seen yet' if new else text


def run(scale, paths, source, *, runs, only):
  """Makes what is not there yet, and tells how far it is.

  Args:
    scale: of `imdb_scales.SCALES`.
    paths: `imdb_scales.Paths`.
    source: of the reviews: official, or a folder.
    runs: names of runs.
    only: names of stages and runs; (): all.
  """
  stages = make_stages(scale, paths, source, runs)
  if only:
    stages = needed(stages, only)
  claim(scale, paths, source)
  with processes.heed_sigterm():
    for number, stage in enumerate(stages, start=1):
      if stage.done():
        continue
      processes.poll()
      times = read_times(paths)
      left = [s for s in stages[number - 1 :] if not s.done()]
      print(
        f'[{number}/{len(stages)}] {stage.name}; {len(left)} stages left,'
        f' {remaining(left, times)}',
        flush=True,
      )
      start = time.perf_counter()
      try:
        stage.make()
      finally:  # what a stage took before it was stopped counts too
        times = read_times(paths)
        before = times.get(stage.name, {'seconds': 0.0})['seconds']
        seconds = time.perf_counter() - start + before
        times[stage.name] = {'kind': stage.kind, 'seconds': seconds}
        if not stage.done():
          times[stage.name]['kind'] = 'unfinished'
        workdirs.write(str(paths.times), json.dumps(times, indent=1))
      print(f'[{number}/{len(stages)}] {stage.name} took {seconds:.1f} s')


def read_times(paths):
  """Returns {stage: {'kind', 'seconds'}}; `unfinished` is a kind too."""
  return json.loads(paths.times.read_text()) if paths.times.exists() else {}


def claim(scale, paths, source):
  """Refuses a workdir whose data are of another scale or source."""
  paths.root.mkdir(parents=True, exist_ok=True)
  path = paths.root / 'scale.json'
  if source != 'official':
    source = str(pathlib.Path(source).expanduser().absolute())
  now = json.loads(json.dumps(scale.as_data() | {'source': source}))
  if path.exists():
    before = json.loads(path.read_text())
    changed = [
      f'{name}: {before.get(name)!r} -> {value!r}'
      for name, value in now.items()
      if before.get(name) != value
    ]
    if changed:
      raise ValueError(
        f'{paths.root} has data of another scale or source'
        f' ({", ".join(changed)}); use another --workdir'
      )
  else:
    workdirs.write(str(path), json.dumps(now, indent=1))


def main(arguments=None):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  add('--scale', choices=imdb_scales.SCALES, required=True)
  add('--source', default='official', help='of the reviews, or a folder')
  add('--workdir', required=True)
  add('--only', default='', help='stages and runs, with commas between')
  add('--all', action='store_true', help='all 22 runs')
  add('--traceback', action='store_true', help='show where an error arose')
  add('--list', action='store_true', help='show stages, make nothing')
  options = parser.parse_args(arguments)
  scale = imdb_scales.SCALES[options.scale]
  paths = imdb_scales.Paths(options.workdir)
  only = [name for name in options.only.split(',') if name]
  runs = list(scale.runs)
  if options.all:
    runs += [name for name in imdb_scales.FULL if name not in runs]
  try:
    known = {s.name for s in make_stages(scale, paths, options.source, runs)}
    runs += [x for x in only if x not in known and imdb_scales.parse(x)]
    if options.list:
      for stage in make_stages(scale, paths, options.source, runs):
        print('done' if stage.done() else 'left', stage.name)
      return
    run(scale, paths, options.source, runs=runs, only=only)
  except processes.Preempted as stop:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f'imdb_frontier: {stop.what}; start it again', file=sys.stderr)
    raise
  except MISTAKES as error:
    if options.traceback:
      raise
    sys.exit(f'imdb_frontier: {error}  (--traceback shows where)')


if __name__ == '__main__':
  main()
