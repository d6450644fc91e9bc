"""Controlled sentiment end to end at scale `smoke`, and its gates by hand."""

import dataclasses
import gzip
import json
import os
import pathlib
import shutil
import signal
import types

import numpy as np
import pytest

from dpo_jax import evaluators
from dpo_jax import metrics
from dpo_jax import processes
from dpo_jax import report
from dpo_jax import settings
from dpo_jax import workdirs
from dpo_jax.data import tokenizers
from experiments import imdb_frontier
from experiments import imdb_pictures
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
    if path.is_file() and path.name != 'lock'
  }


# --- From end to end ---


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """All stages of `smoke`, stopped once while PPO samples for its second step.

  Returns the folder, what was there then, and what the stop was called.
  """
  folder = tmp_path_factory.mktemp('imdb')
  write_reviews(folder / 'reviews')
  run = folder / 'imdb' / 'runs' / 'ppo_6'
  sample, before = evaluators.sample, {}

  def stopped(*args, title, **how):
    if title == 'rollout' and steps_of(run) == [1]:
      before.update(times_of(folder / 'imdb'))
      os.kill(os.getpid(), signal.SIGTERM)
    return sample(*args, title=title, **how)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluators, 'sample', stopped)
    with pytest.raises(processes.Preempted) as stop:
      call(folder)
  assert stop.value.code == 75 and not (run / 'finished.json').exists()
  call(folder)
  return folder, before, stop.value.what


def steps_of(run):
  """Returns the steps of PPO that are in the log of a run."""
  return [r['step'] for r in metrics.read(run) if 'train/loss' in r]


def test_a_stopped_command_goes_on_where_it_was(made):
  folder, before, what = made
  assert what == 'SIGTERM after step 1 of 2, which is saved'
  now = times_of(folder / 'imdb')
  kept = {
    name: time
    for name, time in before.items()
    if name != 'times.json' and not name.startswith('runs/ppo_6/')
  }
  assert 'runs/dpo_0.1/finished.json' in kept
  assert {name: now[name] for name in kept} == kept
  assert (folder / 'imdb' / 'runs' / 'ppo_6' / 'finished.json').exists()
  assert steps_of(folder / 'imdb' / 'runs' / 'ppo_6') == [1, 2]


def test_a_second_call_makes_nothing(made, capsys):
  folder = made[0]
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
    assert settings.at(flat, method.key) == run.value
    assert flat.seed == (
      run.value if run.method == 'preferred_ft' else run.seed
    )
    family = 'ppo_all' if method.preset else 'offline'
    said = scale.settings[family] | scale.settings.get(run.method, {})
    flat = configs[run.name].to_dict()
    assert said.keys() <= set(keys_of(flat))
    assert all(settings.at(flat, key) == value for key, value in said.items())
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


# --- Results ---


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
  points = imdb_results.read_points(records)
  checkpoints = imdb_results.by_prompt(points, samples)
  assert points == [{'step': 0, 'kl': 0.0, 'reward': 0.4}]
  np.testing.assert_allclose(checkpoints[0]['reward'], [0.3, 0.5])


@pytest.fixture
def copied(made, tmp_path):
  """The workdir of `made`, to be changed."""
  shutil.copytree(made[0] / 'imdb', tmp_path / 'imdb')
  (tmp_path / 'reviews').symlink_to(made[0] / 'reviews')
  path = tmp_path / 'imdb' / 'scale.json'
  claimed = json.loads(path.read_text())
  claimed['source'] = str(tmp_path / 'reviews')
  path.write_text(json.dumps(claimed))
  return tmp_path


def test_the_tables_say_what_was_measured(made):
  root = made[0] / 'imdb'
  runs = imdb_results.read_runs(root / 'runs')
  points = {
    name: [r for r in metrics.read(root / 'runs' / name) if 'samples/kl' in r]
    for name in runs
  }
  rows = {row['run']: row for row in imdb_results.runs_table(runs)}
  assert (
    rows.keys() == points.keys() == {'dpo_0.1', 'ppo_6', 'unlikelihood_0.1'}
  )
  for name, row in rows.items():
    best = max(points[name], key=lambda r: r['samples/reward'])
    assert row['best_reward'] == best['samples/reward']
    assert row['best_kl'] == best['samples/kl']
    assert row['last_reward_se'] == points[name][-1]['samples/reward_se']
  start = points['dpo_0.1'][0]
  assert imdb_results.sft_point(runs)['judge'] == start['samples/judge']
  text = (root / 'results.md').read_text()
  for line in (
    f'| SFT | {start["samples/reward"]:.3f} |',
    f'| dpo_0.1 | {rows["dpo_0.1"]["best_reward"]:.3f} ± ',
    '| A2 | not asked | reward of the best of N 1: ',
  ):
    assert line in text


def test_the_best_run_is_that_of_the_highest_trained_point():
  def run(name, *rewards):
    points = [{'step': n, 'reward': r} for n, r in enumerate(rewards)]
    return imdb_results.Evaluated(imdb_scales.parse(name), points, [], '')

  runs = [
    run('dpo_0.1', 0.9, 0.5, 0.6),  # the .9 is the SFT model's
    run('dpo_1', 0.5, 0.7, 0.4),
    run('dpo_5', 0.8),
    run('ppo_6', 0.5),
  ]
  found = {x.run.name: x for x in runs}
  assert imdb_results.compared(found) == {'dpo': 'dpo_1', 'ppo': None}


def test_seeds_are_told_together():
  def run(name, reward):
    points = [{'step': 9, 'reward': reward, 'kl': 2.0, 'judge': 0.5}]
    return imdb_results.Evaluated(imdb_scales.parse(name), points, [], '')

  runs = [run('dpo_0.1', 0.6), run('dpo_0.1_seed1', 0.8), run('ppo_6', 0.5)]
  said = imdb_results.seeds_markdown({x.run.name: x for x in runs})
  assert said == (
    '- dpo 0.1, 2 seeds, last: reward 0.700 ± 0.100, kl 2.000 ± 0.000, judge'
    ' 0.500 ± 0.000\n'
  )


# --- Samples of what is compared ---


def fake_samples(calls):
  """Samples that tell what they were asked for."""

  def sample(scale, prompts, *, number, workdir, which='newest', **more):
    del scale
    calls.append((workdir.name, which, more.get('temperature', 1.0), number))
    texts = [
      f'{workdir.name} {which} {n}' for _ in prompts for n in range(number)
    ]
    ended = np.arange(len(texts)) % 2 == 0
    return texts, types.SimpleNamespace(ended=ended)

  return sample


def test_temperatures_are_asked_of_the_best_on_prompts_of_their_own(
  copied, monkeypatch
):
  scale = imdb_scales.SCALES['smoke']
  paths = imdb_scales.Paths(copied / 'imdb')
  calls, asked = [], []
  monkeypatch.setattr(imdb_texts, 'sample', fake_samples(calls))

  def win_rate(judge, prompts, a, b):
    del judge
    asked.append((prompts, a, b))
    return {'win_rate': 0.5, 'win_rate_se': 0.1, 'wins': np.zeros(len(a))}

  monkeypatch.setattr(imdb_texts.judges, 'win_rate', win_rate)
  imdb_texts.write_temperature(scale, paths)
  assert calls == [
    (name, which, temperature, 1)
    for name, which in [
      ('sft', 'newest'),
      ('dpo_0.1', 'best'),
      ('ppo_6', 'best'),
    ]
    for temperature in scale.temperatures
  ]
  own = imdb_results.read_lines(paths.temperature_prompts)
  assert len(own) == scale.temperature_prompts
  others = {r['prompt'] for r in imdb_results.read_lines(paths.test_prompts)}
  for prompts, ours, theirs in asked:
    assert prompts == [row['prompt'] for row in own]
    assert not others & set(prompts)
    assert theirs == [row['continuation'] for row in own]
    assert all(text.split()[0] in ('sft', 'dpo_0.1', 'ppo_6') for text in ours)
  assert imdb_texts.temperature_is_current(paths)
  # The same run is made again: it is another one.
  finished = paths.runs / 'dpo_0.1' / imdb_results.FINISHED
  made = finished.stat().st_mtime_ns
  os.utime(finished, ns=(made, made + 1))
  assert not imdb_texts.temperature_is_current(paths)
  os.utime(finished, ns=(made, made))
  assert imdb_texts.temperature_is_current(paths)
  # A better run comes: it is to be asked.
  better = paths.runs / 'dpo_1'
  shutil.copytree(paths.runs / 'dpo_0.1', better)
  text = (better / 'metrics.jsonl').read_text()
  records = [json.loads(line) for line in text.splitlines()]
  for record in records:
    if 'samples/reward' in record:
      record['samples/reward'] += 1.0
  (better / 'metrics.jsonl').write_text(
    ''.join(json.dumps(record) + '\n' for record in records)
  )
  assert not imdb_texts.temperature_is_current(paths)


def test_best_of_n_is_scored_by_both_rewards(copied, monkeypatch):
  scale = imdb_scales.SCALES['smoke']
  paths = imdb_scales.Paths(copied / 'imdb')
  calls = []
  monkeypatch.setattr(imdb_texts, 'sample', fake_samples(calls))

  class Reward:
    def __init__(self, sign):
      self.sign = sign

    def __call__(self, prompts, responses):
      del prompts
      return [self.sign * int(text.split()[-1]) for text in responses]

  monkeypatch.setattr(
    imdb_texts.reward_models,
    'get',
    lambda name: Reward({paths.learned: 1, paths.reward: -1}[name]),
  )
  imdb_texts.write_best_of_n(scale, paths)
  assert calls == [('sft', 'newest', 1.0, 4)]
  rows = imdb_results.read_lines(paths.best_of_n)
  assert len(rows) == scale.best_of_prompts
  for row in rows:
    assert row['learned'] == [0, 1, 2, 3] and row['reward'] == [0, -1, -2, -3]


def test_results_of_a_run_made_anew_are_made_anew(copied):
  paths = imdb_scales.Paths(copied / 'imdb')
  imdb_results.write(imdb_scales.SCALES['smoke'], paths)
  assert imdb_results.is_current(paths)
  os.utime(paths.runs / 'dpo_0.1' / 'finished.json', ns=(1, 1))
  assert not imdb_results.is_current(paths)


# --- Bad input ---


@pytest.mark.parametrize(
  'name, message',
  [
    ('dop_0.1', "did you mean 'dpo'"),
    ('dpo', 'write METHOD_VALUE, such as dpo_1'),
    ('preferred_ft_0_seed1', 'write the seed alone'),
    # A run of two names would be two seeds.
    ('dpo_0.10', 'write it as dpo_0.1$'),
    ('ppo_06_seed1', 'write it as ppo_6_seed1$'),
    ('ppo_6_seed0', 'write it as ppo_6$'),
  ],
)
def test_a_wrong_run_says_what_is_right(name, message):
  with pytest.raises(ValueError, match=message):
    imdb_scales.parse(name)


def test_a_setting_of_a_scale_that_no_config_has_is_refused(tmp_path):
  scale = imdb_scales.SCALES['smoke']
  scale = dataclasses.replace(
    scale, settings=scale.settings | {'all': {'model.remta': 'dots'}}
  )
  with pytest.raises(KeyError, match='remta'):
    imdb_scales.sft_config(scale, imdb_scales.Paths(tmp_path))


def test_the_picture_has_all_points(tmp_path, monkeypatch):
  run = imdb_results.Evaluated(
    imdb_scales.parse('dpo_0.05'),
    [{'step': 1, 'kl': 40.0, 'reward': 0.9}],
    [],
    '',
  )
  limits = []
  made = report.axes_of

  def axes_of(*args, **keywords):
    figure, axes = made(*args, **keywords)
    monkeypatch.setattr(
      figure, 'savefig', lambda _: limits.append(axes[0].get_xlim())
    )
    return figure, axes

  monkeypatch.setattr(imdb_pictures.report, 'axes_of', axes_of)
  imdb_pictures.frontier_png({'dpo': [run]}, ([], []), tmp_path / 'a.png')
  assert limits[0][1] > 40.0


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


def test_what_diverges_ends_its_run_and_no_other(tmp_path, monkeypatch):
  scale = imdb_scales.SCALES['smoke']
  paths = imdb_scales.Paths(tmp_path)

  def diverges(config, workdir):
    del config
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    raise FloatingPointError('train/loss is nan at step 3')

  for loop in (imdb_frontier.ppo, imdb_frontier.train):
    monkeypatch.setattr(
      loop, 'run' if loop is imdb_frontier.ppo else 'train', diverges
    )
  for name in ('dpo_0.1', 'ppo_6'):
    imdb_frontier.make_run(imdb_scales.parse(name), scale, paths)
    mark = json.loads((paths.runs / name / 'finished.json').read_text())
    assert mark['stopped'] == 'train/loss is nan at step 3'
  # Nothing can go on without the learned reward.
  with pytest.raises(FloatingPointError):
    imdb_frontier.make_reward_model(scale, paths)
  assert not (paths.reward_model / 'finished.json').exists()


def test_finished_runs_of_other_settings_are_not_taken(copied, monkeypatch):
  scale = imdb_scales.SCALES['smoke']
  other = dict(scale.settings, dpo={'optim.lr': 1.0})
  changed = dataclasses.replace(scale, settings=other)
  monkeypatch.setitem(imdb_scales.SCALES, 'smoke', changed)
  with pytest.raises(
    ValueError,
    match=r'dpo_0.1 was made with other settings \(optim.lr: 0.001 -> 1.0\)',
  ):
    call(copied)


def test_a_stage_is_made_by_one_command_at_a_time(copied):
  paths = imdb_scales.Paths(copied / 'imdb')
  paths.best_of_n.unlink()
  with workdirs.held(str(paths.making / 'best_of_n')):
    with pytest.raises(ValueError, match='in use by another run'):
      call(copied, '--only=best_of_n')
    call(copied, '--only=pairs')  # which is there
  assert not paths.best_of_n.exists()
