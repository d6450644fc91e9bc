"""Controlled sentiment end to end at scale `smoke`, and its gates by hand."""

import gzip
import json
import os
import signal

import numpy as np
import pytest

from dpo_jax import metrics
from dpo_jax import settings
from dpo_jax.data import tokenizers
from experiments import imdb_frontier
from experiments import imdb_results
from experiments import imdb_scales
from experiments import imdb_texts

GOOD = 'wonderful great moving superb lovely brilliant'.split()
BAD = 'boring awful dull terrible stupid lifeless'.split()
PLAIN = 'the film has a plot and some actors who speak in rooms'.split()


def write_reviews(folder, *, train=60, test=60, flip=False):
  """Reviews whose label shows in a few words; each begins differently.

  `flip` turns the labels of the test side.
  """
  folder.mkdir()
  rng = np.random.default_rng(0)
  for split, number in (('train', train), ('test', test)):
    with gzip.open(folder / f'{split}.jsonl.gz', 'wt') as f:
      for n in range(number):
        words = [*rng.choice(PLAIN, 9), *rng.choice((BAD, GOOD)[n % 2], 3)]
        text = f'{split[1]}{n} {" ".join(rng.permutation(words))}<br /><br />.'
        row = {'id': f'{split}{n}', 'text': text, 'label': n % 2}
        if flip and split == 'test':
          row['label'] = 1 - n % 2
        f.write(json.dumps(row) + '\n')
  return folder


def call(folder, *more, scale='smoke'):
  imdb_frontier.main(
    [
      f'--scale={scale}',
      f'--source={folder / "reviews"}',
      f'--workdir={folder / "imdb"}',
      '--traceback',
      *more,
    ]
  )


def times_of(folder):
  """{file: when it was changed}, but for what runs hold while they run."""
  return {
    str(path.relative_to(folder)): path.stat().st_mtime_ns
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


# --- From end to end ---


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """All stages of `smoke`, stopped once in the middle of PPO."""
  folder = tmp_path_factory.mktemp('imdb')
  write_reviews(folder / 'reviews')
  make_run, before = imdb_frontier.make_run, {}

  def stopped(run, scale, paths):
    if run.method == 'ppo' and not before:
      before.update(times_of(folder / 'imdb'))
      os.kill(os.getpid(), signal.SIGTERM)
    make_run(run, scale, paths)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(imdb_frontier, 'make_run', stopped)
    with pytest.raises(SystemExit) as stop:
      call(folder)
  assert stop.value.code == 75
  assert not (folder / 'imdb' / 'runs' / 'ppo_6' / 'finished.json').exists()
  call(folder)
  return folder, before


def test_a_stopped_command_goes_on_where_it_was(made):
  folder, before = made
  now = times_of(folder / 'imdb')
  kept = {n: t for n, t in before.items() if n != 'times.json'}
  assert 'runs/dpo_0.1/finished.json' in kept
  assert {name: now[name] for name in kept} == kept
  assert (folder / 'imdb' / 'runs' / 'ppo_6' / 'finished.json').exists()


def test_a_second_call_makes_nothing(made, capsys):
  folder, _ = made
  before = times_of(folder / 'imdb')
  call(folder)
  assert times_of(folder / 'imdb') == before
  call(folder, '--list')
  said = capsys.readouterr().out.split()
  assert 'left' not in said and said.count('done') == 13


def test_every_file_is_there(made):
  root = made[0] / 'imdb'
  for name in (
    'classifier/classifier.npz',
    'classifier/judge.npz',
    'base/tokenizer.json',
    'sft/metrics.jsonl',
    'points.csv',
    'runs.csv',
    'frontier.png',
    'curves.png',
    'best_of_n.png',
    'temperature.png',
    'results.md',
  ):
    assert (root / name).stat().st_size > 100, name
  points = (root / 'points.csv').read_text().splitlines()
  # Before the first step and after each of two, of three runs.
  assert len(points) == 1 + 3 * 3
  assert points[0].startswith('run,method,value,seed,step,kl,kl_se,reward')
  assert {'A1', 'A2', 'A3', 'A15'} == set(
    json.loads((root / 'results.json').read_text())['gates']
  )
  times = json.loads((root / 'times.json').read_text())
  assert times['ppo_6']['kind'] == 'ppo' and len(times) == 13


def test_prompts_and_rests_are_the_reviews(made):
  root = made[0] / 'imdb'
  rows = imdb_results.read_lines(root / 'sft.jsonl')
  assert len(rows) == 60
  tokenizer = tokenizers.from_folder(root / 'base')
  texts = {
    ' '.join(text.split())
    for text, _ in imdb_texts.read_reviews(made[0] / 'reviews')['train']
  }
  assert not any('<br' in text for text in texts)
  for row in rows:
    assert row['prompt'] + row['response'] in texts
    assert row['response'].startswith(' ')
    assert 1 <= len(tokenizer.encode(row['prompt'])) <= 8
  tests = imdb_results.read_lines(root / 'prompts.test.jsonl')
  train = {row['prompt'] for row in rows}
  assert len({row['prompt'] for row in tests}) == len(tests) == 8
  assert not train & {row['prompt'] for row in tests}
  for row in tests:
    assert len(tokenizer.encode(row['continuation'])) == 6


def test_runs_are_measured_by_the_classifier_and_a_second_judge(made):
  records = metrics.read(made[0] / 'imdb' / 'runs' / 'ppo_6')
  (first, *_, last) = [r for r in records if 'samples/kl' in r]
  assert first['samples/kl'] == pytest.approx(0.0, abs=1e-5)
  assert last['samples/kl'] > 0.0
  for name in ('reward', 'judge', 'vader', 'entropy', 'distinct_2'):
    assert np.isfinite(last[f'samples/{name}'])
  assert 0.0 <= last['samples/reward'] <= 1.0


# --- Parts ---


def completion(value, text, ended=False, prompt='A'):
  return {
    'prompt': prompt,
    'response': text,
    'ended': ended,
    'log_odds': value,
  }


def test_four_completions_are_six_pairs_and_ties_are_counted():
  four = [
    completion(0.5, ' b', ended=True),
    completion(-1.0, ' d'),
    completion(2.0, ' a'),
    completion(0.0, ' c'),
  ]
  pairs, ties = imdb_texts.all_pairs(four)
  found = sorted((p['chosen'] + p['rejected']).replace(' ', '') for p in pairs)
  assert found == ['ab', 'ac', 'ad', 'bc', 'bd', 'cd'] and ties == 0
  (pair,) = [p for p in pairs if p['chosen'] + p['rejected'] == ' b c']
  assert (pair['chosen_ended'], pair['rejected_ended']) == (True, False)
  equal = [*four, completion(1.0, ' x', prompt='B')]
  equal.append(completion(1.0, ' y', prompt='B'))
  pairs, ties = imdb_texts.all_pairs(equal)
  assert (len(pairs), ties) == (6, 1)


def test_a_prompt_is_whole_words_that_fit_and_at_least_one():
  byte = tokenizers.ByteTokenizer()
  text = 'It is a long film.'
  assert imdb_texts.cut_review(text, byte, 1) == ('It', text[2:])
  assert imdb_texts.cut_review(text, byte, 6) == ('It is', text[5:])
  assert imdb_texts.cut_review(text, byte, 7) == ('It is a', text[7:])
  assert imdb_texts.cut_review(text, byte, 99) == (text, '')


def test_remaining_time_is_that_of_finished_ones_of_a_kind():
  def stage(kind):
    return imdb_frontier.Stage(kind, kind, (), lambda: False, lambda: None)

  times = {
    'dpo_1': {'kind': 'dpo', 'seconds': 100.0},
    'dpo_5': {'kind': 'dpo', 'seconds': 140.0},
    'ppo_3': {'kind': 'unfinished', 'seconds': 9.0},
  }
  left = [stage('dpo'), stage('dpo'), stage('ppo')]
  assert imdb_frontier.remaining(left[:2], times) == 'about 4.0 min'
  said = imdb_frontier.remaining(left, times)
  assert said == 'about 4.0 min, and 1 of kinds not seen yet'
  assert imdb_frontier.remaining(left[2:], times) == 'nobody knows how long'


def test_what_is_asked_for_brings_what_it_needs(tmp_path):
  paths = imdb_scales.Paths(tmp_path)
  stages = imdb_frontier.make_stages(
    imdb_scales.SCALES['smoke'], paths, 'official', ['dpo_0.1', 'ppo_6']
  )

  def closure(*wanted):
    return [s.name for s in imdb_frontier.needed(stages, wanted)]

  before = ['classifier', 'base', 'sft_rows', 'sft', 'completions', 'pairs']
  assert closure('dpo_0.1') == [*before, 'dpo_0.1']
  assert closure('ppo_6') == [*before, 'reward_model', 'ppo_6']
  assert closure('sft_rows') == ['base', 'sft_rows']
  assert closure('temperature')[-3:] == ['dpo_0.1', 'ppo_6', 'temperature']


# --- Scales ---


def keys_of(values, prefix=''):
  for name, value in values.items():
    if isinstance(value, dict):
      yield from keys_of(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}'


def value_of(config, key):
  for part in key.split('.'):
    config = config[part]
  return config


@pytest.mark.parametrize('name', imdb_scales.SCALES)
def test_every_config_of_a_scale_has_its_settings(name, tmp_path):
  scale, paths = imdb_scales.SCALES[name], imdb_scales.Paths(tmp_path)
  configs = {
    'sft': imdb_scales.sft_config(scale, paths),
    'reward_model': imdb_scales.reward_model_config(scale, paths),
  }
  runs = {*scale.runs, *imdb_scales.FULL}
  known = {*imdb_scales.FAMILIES, *imdb_scales.METHODS}
  assert scale.settings.keys() <= known
  for run in map(imdb_scales.parse, runs):
    configs[run.name] = imdb_scales.run_config(run, scale, paths)
    method = imdb_scales.METHODS[run.method]
    flat = settings.Settings(configs[run.name].to_dict())
    assert value_of(flat, method.key) == run.value
    assert flat.seed == (
      run.value if run.method == 'preferred_ft' else run.seed
    )
    family = 'ppo_all' if method.preset else 'offline'
    said = scale.settings[family] | scale.settings.get(run.method, {})
    flat = configs[run.name].to_dict()
    assert said.keys() <= set(keys_of(flat))
    assert all(value_of(flat, key) == value for key, value in said.items())
  for config in configs.values():
    assert config.checkpoint.every == config.eval.every > 0
    assert config.model.source == (scale.source or str(paths.base))
    if 'rollout' in config:
      assert config.rollout.size % config.batch_size == 0
    else:
      assert bool(config.num_steps) != bool(config.epochs)
    if 'row_length' in config.data:
      longest = (
        config.data.max_prompt_tokens + 2 * config.data.max_response_tokens
      )
      assert config.data.row_length >= longest or config.data.form == 'sft'


def test_the_full_sweep_is_the_paper_s_22_runs():
  runs = [imdb_scales.parse(name) for name in imdb_scales.FULL]
  assert len({run.name for run in runs}) == 22
  count = {m: sum(r.method == m for r in runs) for m in imdb_scales.METHODS}
  assert count == dict.fromkeys(imdb_scales.METHODS, 4) | {'preferred_ft': 2}
  subset = [imdb_scales.parse(name) for name in imdb_scales.SUBSET]
  assert len(subset) == 10
  assert {run.method for run in subset} == set(imdb_scales.METHODS)
  for method in ('dpo', 'ppo'):
    assert {r.seed for r in subset if r.method == method} == {0, 1, 2}


# --- Gates ---


def checkpoint(kl, reward):
  """Of two prompts around the means."""
  return {
    'kl': np.array([kl - 0.1, kl + 0.1]),
    'reward': np.array([reward - 0.01, reward + 0.01]),
  }


def gate_a1(dpo, ppo, others, *, sft=0.5):
  first = checkpoint(0.15, 0.5)
  return imdb_results.gate_a1(
    dpo, [first, *ppo], ppo, others, sft=sft, resamples=50
  )


def test_gate_of_the_frontier():
  dpo = [checkpoint(*x) for x in [(0.2, 0.5), (2.0, 0.9), (5.0, 0.95)]]
  ppo = [checkpoint(*x) for x in [(3.0, 0.7), (6.0, 0.8), (1.0, 0.55)]]
  others = {'unlikelihood': [checkpoint(2.5, 0.6), checkpoint(7.0, 0.4)]}
  said = gate_a1(dpo, ppo, others)
  # (3, .7) and (6, .8) are below (2, .9); nothing is before (1, .55), and the
  # first of a run is not asked.
  assert said['dominated'] == pytest.approx(2 / 3)
  # Areas to 12 nats: .5 to 2 nats, .9 to 5, .95; PPO .5, from 1 .55, from 3 .7.
  assert said['areas']['ours'] == pytest.approx(
    (2 * 0.5 + 3 * 0.9 + 7 * 0.95) / 12
  )
  assert said['areas']['theirs'] == pytest.approx(
    (1 * 0.5 + 2 * 0.55 + 3 * 0.7 + 6 * 0.8) / 12
  )
  assert said['areas']['p'] == pytest.approx(1 / 51)
  assert said['others']['unlikelihood']['dpo'] == pytest.approx(0.9)
  assert said['rise'] == pytest.approx(0.3)
  assert said['verdict'] == 'not met'
  assert said['parts'] == {'dominated': False, 'area': True, 'others': True}
  assert gate_a1(dpo, ppo[:2], others)['verdict'] == 'met'
  void = gate_a1(dpo, ppo[:2], others, sft=0.7)
  assert void['verdict'] == 'void'  # PPO rises by .1
  above = {'preferred_ft': [checkpoint(0.1, 0.52)]}
  assert gate_a1(dpo, ppo[:2], above)['parts']['others'] is False


def curve(values):
  return [
    {'n': n, 'reward': value, 'reward_se': 0.0, 'kl': 0.1, 'bound': 0.2}
    for n, value in values.items()
  ]


def test_gate_of_best_of_n():
  good = {1: 0.5, 4: 0.7, 16: 0.8, 64: 0.84, 128: 0.88}
  assert imdb_results.gate_a2(curve(good))['verdict'] == 'met'
  for wrong, part in [
    (good | {128: 0.9}, 'plateau'),  # .06 is more than a quarter of .2
    (good | {16: 0.69}, 'rises'),
  ]:
    said = imdb_results.gate_a2(curve(wrong))
    assert said['verdict'] == 'not met' and not said['parts'][part]
  beyond = curve(good)
  beyond[2]['kl'] = 0.3
  assert imdb_results.gate_a2(beyond)['parts']['bound'] is False
  assert imdb_results.gate_a2(curve({1: 0.5, 2: 0.6}))['verdict'] == 'not asked'


def test_best_of_n_is_chosen_by_one_reward_and_measured_by_another():
  learned, measured = [[1.0, 2.0, 3.0]], [[0.9, 0.6, 0.3]]
  one, two, three = imdb_results.best_of_curve(learned, measured, (1, 2, 3))
  assert one['reward'] == pytest.approx(0.6)
  # Of the three pairs two have the third sample, one the second.
  assert two['reward'] == pytest.approx((2 * 0.3 + 0.6) / 3)
  assert three['reward'] == pytest.approx(0.3)
  assert one['kl'] == pytest.approx(0.0) and three['kl'] <= three['bound']


def rows(policy, rates):
  return [
    {
      'policy': policy,
      'temperature': t,
      'win_rate': rate,
      'distinct_2': 0.5,
    }
    for t, rate in rates.items()
  ]


def test_gate_of_temperatures():
  dpo = rows('dpo', {0.0: 0.7, 0.5: 0.8, 1.0: 0.75})
  for ppo, verdict in [
    ({0.0: 0.8, 0.5: 0.7, 1.0: 0.6}, 'met'),  # as good, but loses .2, not .05
    ({0.0: 0.9, 0.5: 0.7, 1.0: 0.6}, 'not met'),  # wins more
    ({0.0: 0.8, 0.5: 0.7, 1.0: 0.78}, 'not met'),  # loses less
  ]:
    said = imdb_results.gate_a3([*dpo, *rows('ppo', ppo)])
    assert said['verdict'] == verdict, said


def test_gate_of_the_reward_model_takes_its_best_checkpoint():
  def record(step, accuracy):
    name = 'heldout/rewards/accuracy'
    return {'step': step, name: accuracy, f'{name}_se': 0.01} | {
      'heldout/groups': 500.0
    }

  records = [record(0, 0.5), record(10, 0.91), record(20, 0.9), {'step': 20}]
  said = imdb_results.gate_a15(records)
  assert said['verdict'] == 'met' and 'at step 10' in said['text']
  assert imdb_results.gate_a15(records[:1])['verdict'] == 'not met'


def test_the_curve_of_eq_4_begins_with_the_samples_and_rises():
  rng = np.random.default_rng(0)
  kls, values = imdb_results.tilted_curve(rng.random((50, 64)))
  assert kls[0] < 1e-4 and values[0] == pytest.approx(0.5, abs=0.02)
  assert np.all(np.diff(values) > 0.0) and np.all(np.diff(kls) > 0.0)
  assert 2.5 < kls[-1] <= imdb_results.CURVE


def test_evaluations_are_joined_by_prompt():
  records = [
    {'step': 0, 'samples/kl': 0.0, 'samples/reward': 0.4},
    {'step': 5, 'train/loss': 1.0},
    {'step': 5, 'samples/kl': float('nan'), 'samples/reward': 0.4},
  ]
  samples = [
    {'step': step, 'prompt': prompt, 'kl': 1.0, 'reward': reward}
    for step in (0, 5)
    for prompt, reward in [('a', 0.2), ('a', 0.4), ('b', 0.5)]
  ]
  points, checkpoints = imdb_results.evaluations(records, samples)
  assert points == [{'step': 0, 'kl': 0.0, 'reward': 0.4}]
  np.testing.assert_allclose(checkpoints[0]['reward'], [0.3, 0.5])


# --- Bad input ---


@pytest.mark.parametrize(
  'name, message',
  [
    ('dop_0.1', "did you mean 'dpo'"),
    ('dpo', 'write METHOD_VALUE, such as dpo_1'),
    ('preferred_ft_0_seed1', 'write the seed alone'),
  ],
)
def test_a_wrong_run_says_what_is_right(name, message):
  with pytest.raises(ValueError, match=message):
    imdb_scales.parse(name)


def test_a_name_that_is_neither_run_nor_stage_shows_both(tmp_path):
  with pytest.raises(ValueError, match=r'dpo, unlik.*; stages are classifier'):
    call(tmp_path, '--only=piars')
  assert not (tmp_path / 'imdb').exists()


def test_a_workdir_keeps_its_scale_and_source(made):
  with pytest.raises(ValueError, match='of another scale or source'):
    call(made[0], scale='s')


def test_a_classifier_below_its_gate_stops(tmp_path):
  write_reviews(tmp_path / 'reviews', test=40, flip=True)
  with pytest.raises(ValueError, match=r'words gets .* % of 40 test reviews'):
    call(tmp_path)
  assert not (tmp_path / 'imdb' / 'base').exists()


def test_no_reviews_are_one_clear_line(tmp_path):
  write_reviews(tmp_path / 'reviews', test=0)
  with pytest.raises(ValueError, match='the file is empty'):
    call(tmp_path)


def test_what_diverges_ends_its_run_and_no_other(tmp_path):
  def diverges(config, workdir):
    assert (config.a, workdir) == (1, str(tmp_path))
    raise FloatingPointError('train/loss is nan at step 3')

  class Config:
    def to_dict(self):
      return {'a': 1}

  with pytest.raises(FloatingPointError):
    imdb_frontier.finish_run(diverges, Config(), tmp_path)
  assert not (tmp_path / 'finished.json').exists()
  imdb_frontier.finish_run(diverges, Config(), tmp_path, may_diverge=True)
  mark = json.loads((tmp_path / 'finished.json').read_text())
  assert mark == {'stopped': 'train/loss is nan at step 3'}
