import contextlib
import json
import shutil
import signal
import types

import numpy as np
import pytest

from configs import constrained
from configs import quickstart
from dpo_jax import constraints
from dpo_jax import metrics
from dpo_jax import online
from dpo_jax import processes
from dpo_jax import rewards
from dpo_jax import rounds
from dpo_jax import sampling
from dpo_jax import settings
from dpo_jax import train
from dpo_jax import workdirs
from tests import processes_test


def test_best_and_worst_of_each_prompt_make_its_pair():
  pairs = online.best_and_worst(
    ['p', 'q', 'r'],
    ['p0', 'p1', 'p2', 'q0', 'q1', 'q2', 'r0', 'r1', 'r2'],
    np.array([0, 1, 0, 0, 0, 0, 1, 1, 0], bool),
    np.array([0.1, 0.9, -0.5, 0.2, 0.2, 0.2, -1.0, 1.0, 1.0]),
    samples_per_prompt=3,
    pairs_per_prompt=1,
  )
  assert pairs == [
    {
      'prompt': 'p',
      'chosen': 'p1',
      'rejected': 'p2',
      'chosen_ended': True,
      'rejected_ended': False,
    },
    {
      'prompt': 'r',
      'chosen': 'r1',  # the first of equals
      'rejected': 'r0',
      'chosen_ended': True,
      'rejected_ended': True,
    },
  ]


def test_further_pairs_come_from_the_inner_ranks():
  pairs = online.best_and_worst(
    ['p'],
    list('abcd'),
    np.zeros(4, bool),
    np.array([0.3, -0.2, 0.9, 0.1]),
    samples_per_prompt=4,
    pairs_per_prompt=2,
  )
  assert [(p['chosen'], p['rejected']) for p in pairs] == [
    ('c', 'b'),
    ('a', 'd'),
  ]


def test_prompts_in_train_and_test_are_refused(tmp_path):
  path = tmp_path / 'prompts.json'
  path.write_text(json.dumps({'train': ['a', 'b'], 'test': ['b']}))
  with pytest.raises(ValueError, match='1 prompts are in train and in test'):
    online.read_prompts(str(path))
  path.write_text(json.dumps({'train': ['a']}))
  with pytest.raises(ValueError, match='must hold'):
    online.read_prompts(str(path))


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'is no JSON file'),
    ('["a"]', r"must hold .* it has \['a'\]"),
    ('{"train": [], "test": ["a"]}', 'train must be a list of texts, with one'),
    ('{"train": ["a", ""], "test": ["b"]}', r"train\[1\] is ''; it must be a"),
    ('{"train": ["a"], "test": [3]}', r'test\[0\] is 3; it must be a text'),
  ],
)
def test_bad_prompts_are_named_by_file_and_place(tmp_path, text, message):
  path = tmp_path / 'prompts.json'
  path.write_text(text)
  with pytest.raises(ValueError, match=f'prompts.json:? .*{message}'):
    online.read_prompts(str(path))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'rounds': 0}, 'rounds is 0; use 1 or more'),
    ({'reward': 'lenght'}, "did you mean 'length'"),
    ({'sampling.samples_per_prompt': 1}, 'samples_per_prompt is 1; use 2 or'),
    ({'sampling.top_p': 0.0}, 'sampling.top_p is 0.0; use a number above 0'),
    ({'train.optim.name': 'adam'}, "did you mean 'adamw'"),
    ({'train.checkpoint.keep': 0}, 'keep at least 1'),
  ],
)
def test_bad_configs_stop_before_anything_is_written(
  tmp_path, changes, message
):
  config = quickstart.get_config('debug')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    online.run(settings.Settings(config.to_dict()), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def train_config(**changes):
  config = quickstart.get_config('debug')
  config.train.update_from_flattened_dict(changes)
  return config.train.to_dict()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'loss.dpo.reduction': 'foo'}, "unknown reduction 'foo'"),
    ({'loss.dpo.labels': 'soft'}, "labels 'soft' would change nothing"),
    ({'data.form': 'rankings'}, 'rounds write pairs'),
    ({'data.constraint': 'digits'}, 'no loss looks at costs'),
  ],
)
def test_losses_are_checked_before_anything_is_sampled(
  tmp_path, changes, message
):
  config = quickstart.get_config('debug')
  config.train.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    online.run(settings.Settings(config.to_dict()), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'module, arg',
  [(quickstart, ''), (quickstart, 'adapter=lora'), (constrained, '')],
)
def test_configs_as_they_ship_pass_every_check(
  module, arg, tmp_path, monkeypatch
):
  class PassedError(Exception):
    pass

  def claim(*_):
    raise PassedError

  monkeypatch.setattr(workdirs, 'claim', claim)
  config = settings.Settings(module.get_config(arg).to_dict())
  with pytest.raises(PassedError):  # what comes before it reads no model
    online.run(config, tmp_path / 'run')


def test_a_reference_that_round_2_would_refuse_is_refused_at_once(tmp_path):
  config = quickstart.get_config('debug,adapter=lora')
  config.rounds = 2
  with config.unlocked():
    config.train.reference = {'mode': 'adapter_off'}
  with pytest.raises(ValueError, match='choose another reference'):
    online.run(settings.Settings(config.to_dict()), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'seed': 3}, 'train.seed is set by the loop'),
    ({'data.source': 'x.jsonl'}, 'train.data.source is set by the loop'),
    ({'eval.samples.reward': 'length'}, 'reward is set by the loop'),
    ({'eval.samples.cost': 'digits'}, 'cost is set by the loop'),
    ({'eval.samples.temperature': 0.7}, 'temperature 1'),
    ({'eval.samples.num_prompts': 0}, 'num_prompts'),
    ({'data.max_response_tokens': 4}, 'would cut; raise that above it'),
  ],
)
def test_what_would_fail_late_is_refused_at_the_start(changes, message):
  with pytest.raises(ValueError, match=message):
    rounds.check_train_config(train_config(**changes), max_new_tokens=4)
  rounds.check_train_config(train_config(), max_new_tokens=4)


# --- Constraints ---


@pytest.mark.parametrize(
  'section, number, message',
  [
    ({'name': 'none', 'budget': 0.1}, 2, 'constraint.budget would do nothing'),
    ({'name': 'digits'}, 2, 'takes budget, .* use configs/constrained.py'),
    ({'name': 'digit'}, 2, "did you mean 'digits'"),
    ({'budget': 1.5}, 2, 'budget is 1.5'),
    ({'lr': 0.0}, 2, 'lr is 0.0'),
    ({'start': 'new'}, 2, "start is 'new'; use 'first' or 'last'"),
    ({}, 1, 'rounds is 1; set rounds to 2 or more'),
  ],
)
def test_constraints_that_make_no_sense_are_refused(section, number, message):
  good = constrained.get_config().constraint.to_dict()
  rounds.read_constraint(good, rounds=2)
  section = section if 'name' in section else good | section
  with pytest.raises(ValueError, match=message):
    rounds.read_constraint(section, rounds=number)


@pytest.mark.parametrize(
  'make, start, inits',
  [
    (quickstart, None, ['', 'round_1', 'round_2']),
    (constrained, 'last', ['', 'round_1', 'round_2']),
    (constrained, 'first', ['', '', '']),
  ],
)
def test_rounds_start_and_price_the_cost_as_the_config_says(
  monkeypatch, tmp_path, make, start, inits
):
  seen = []

  def write_pairs(config, prompts, directory, reward, *, cost, multiplier, **_):
    del prompts, directory, reward
    init = config.init and config.init.split('/')[-2]
    seen.append((init, config.eval.samples.cost, cost, multiplier))

  def write_constraint(directory, multiplier, *, budget, lr):
    del directory, budget, lr
    return {'next_multiplier': multiplier + 1.5}

  monkeypatch.setattr(online, 'write_pairs', write_pairs)
  monkeypatch.setattr(online, 'write_constraint', write_constraint)
  monkeypatch.setattr(online, 'write_report', lambda *_: '')
  monkeypatch.setattr(online.train, 'train', lambda *_: None)
  config = make.get_config('debug')
  config.rounds = 3
  name, cost, multipliers = 'none', None, [0.0, 0.0, 0.0]
  if start:
    name, cost, multipliers = 'digits', rewards.digits, [0.25, 1.75, 3.25]
    config.constraint.start, config.constraint.multiplier = start, 0.25
  online.run(settings.Settings(config.to_dict()), str(tmp_path))
  assert seen == [(i, name, cost, m) for i, m in zip(inits, multipliers)]


BUDGET, LR = 0.25, 40.0


def long(prompts, responses):
  """A constraint that contradicts the reward `length`."""
  del prompts
  return np.array([min(1.0, len(text) / 4) for text in responses])


def small_config(make, folder):
  """A debug config with few, short prompts and a single update a round."""
  path = folder / 'prompts.json'
  prompts = {'train': [f'{i}:' for i in range(16)], 'test': ['a:', 'b:']}
  path.write_text(json.dumps(prompts))
  config = make.get_config('debug')
  config.prompts = str(path)
  config.train.num_steps = 1
  config.train.data.row_length = 128
  config.train.data.cache_dir = str(folder / 'data')
  return config


def constrained_config(folder):
  config = small_config(constrained, folder)
  config.constraint.name = 'long'
  config.constraint.budget, config.constraint.lr = BUDGET, LR
  return settings.Settings(config.to_dict())


@pytest.fixture(scope='module')
def constrained_run(tmp_path_factory):
  """(folder, text) of two rounds under the constraint `long`."""
  folder = tmp_path_factory.mktemp('constrained')
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(rewards.CONSTRAINTS, 'long', long)
    text = online.run(constrained_config(folder), str(folder / 'run'))
    yield folder, text


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def priced(folder, number):
  path = folder / 'run' / f'round_{number}' / 'constraint.json'
  return json.loads(path.read_text())


def test_the_multiplier_moves_by_lr_times_the_final_samples_excess(
  constrained_run,
):
  folder, _ = constrained_run
  multiplier = 0.0
  for number in (1, 2):
    samples = lines(
      folder / 'run' / f'round_{number}' / 'train' / 'samples.jsonl'
    )
    last = [s for s in samples if s['step'] == samples[-1]['step']]
    costs = long(None, [s['response'] for s in last])
    assert [s['cost'] for s in last] == costs.tolist()
    found = priced(folder, number)
    assert found == {
      'multiplier': multiplier,
      'mean_cost': pytest.approx(costs.mean(), rel=1e-12),
      'budget': BUDGET,
      'lr': LR,
      'next_multiplier': pytest.approx(
        max(0.0, multiplier + LR * (costs.mean() - BUDGET)), rel=1e-12
      ),
    }
    multiplier = found['next_multiplier']
  assert priced(folder, 2)['multiplier'] > 4.0  # from here on short is better


def test_pairs_are_ranked_by_the_reward_less_the_priced_cost(constrained_run):
  folder, _ = constrained_run
  longer = []
  for number in (1, 2):
    directory = folder / 'run' / f'round_{number}'
    multiplier = priced(folder, number)['multiplier']
    completions = lines(directory / 'completions.jsonl')
    assert [c['cost'] for c in completions] == long(
      None, [c['response'] for c in completions]
    ).tolist()
    scores = {
      (c['prompt'], c['response']): constraints.effective_rewards(
        c['reward'], c['cost'], multiplier
      )
      for c in completions
    }
    pairs = lines(directory / 'pairs.jsonl')
    for pair in pairs:
      chosen, rejected = (
        (pair['prompt'], pair['chosen']),
        (
          pair['prompt'],
          pair['rejected'],
        ),
      )
      assert scores[chosen] > scores[rejected]
    longer.append({len(p['chosen']) > len(p['rejected']) for p in pairs})
  assert longer == [{True}, {False}]


def test_the_report_has_the_cost_and_the_multiplier(constrained_run):
  folder, text = constrained_run
  assert text.count('mean cost') == 2
  found = priced(folder, 2)
  assert (
    f'multiplier of the cost {found["multiplier"]:.3f}, next'
    f' {found["next_multiplier"]:.3f}; budget 0.250'
  ) in text
  report = json.loads((folder / 'run' / 'round_2' / 'report.json').read_text())
  assert report['constraint'] == found
  assert report['after']['cost'] == found['mean_cost']
  assert 'cost_se' in report['before']


def test_a_killed_run_finds_the_same_multipliers_and_pairs(constrained_run):
  folder, text = constrained_run
  files = [
    path
    for name in ('constraint.json', 'pairs.jsonl', 'completions.jsonl')
    for path in (folder / 'run').glob(f'round_*/{name}')
  ]
  assert len(files) == 6
  before = [path.read_bytes() for path in files]
  # Killed after the first round was trained, before anything said so.
  shutil.rmtree(folder / 'run' / 'round_2')
  for name in ('constraint.json', 'report.txt', 'report.json'):
    (folder / 'run' / 'round_1' / name).unlink()
  assert online.run(constrained_config(folder), str(folder / 'run')) == text
  assert [path.read_bytes() for path in files] == before


def test_without_a_constraint_pairs_are_those_of_multiplier_zero(
  constrained_run, tmp_path
):
  folder, _ = constrained_run
  config = small_config(quickstart, tmp_path)
  config.train.seed = 0  # of the first round
  online.write_pairs(
    settings.Settings(config.train.to_dict()),
    online.read_prompts(config.prompts)['train'],
    str(tmp_path),
    rewards.get(config.reward),
    name=config.reward,
    cost=None,
    multiplier=0.0,
    **config.sampling,
  )
  first = folder / 'run' / 'round_1'
  pairs = (tmp_path / 'pairs.jsonl').read_bytes()
  assert pairs == (first / 'pairs.jsonl').read_bytes()
  costly = lines(first / 'completions.jsonl')
  assert lines(tmp_path / 'completions.jsonl') == [
    {name: value for name, value in row.items() if name != 'cost'}
    for row in costly
  ]


def assert_close(a, b):
  """Numbers of two nested dicts to 1e-6."""
  assert a.keys() == b.keys()
  for name, value in a.items():
    if isinstance(value, dict):
      assert_close(value, b[name])
    else:
      assert b[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.mark.slow
def test_two_processes_write_the_pairs_and_the_report_of_one(tmp_path):
  config = small_config(quickstart, tmp_path)
  config.rounds = 2
  online.run(settings.Settings(config.to_dict()), str(tmp_path / 'one'))
  given = {
    'rounds': 2,
    'prompts': config.prompts,
    'train.num_steps': config.train.num_steps,
    'train.data.row_length': config.train.data.row_length,
    'train.data.cache_dir': config.train.data.cache_dir,
  }
  started = processes_test.launch(
    2,
    [
      *('online', '--config=configs/quickstart.py:debug'),
      *(f'--config.{name}={value}' for name, value in given.items()),
      f'--workdir={tmp_path / "two"}',
    ],
  )
  codes, outs, errors = processes_test.outcome(started)
  assert codes == [0, 0], errors
  assert 'round 2' in outs[0] and 'round' not in outs[1]
  for number in (1, 2):
    one, two = (tmp_path / run / f'round_{number}' for run in ('one', 'two'))
    for name in ('completions.jsonl', 'pairs.jsonl'):
      assert (one / name).read_bytes() == (two / name).read_bytes()
    reports = [json.loads((r / 'report.json').read_text()) for r in (one, two)]
    assert set(reports[0]) == {'before', 'after'}
    assert_close(*reports)


def swallowed_sigterm():
  """A SIGTERM whose exception is lost, as in a callback of C++."""
  assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
  with contextlib.suppress(processes.Preempted):
    signal.raise_signal(signal.SIGTERM)


def test_a_sigterm_ends_the_rounds_wherever_it_comes_and_loses_nothing(
  constrained_run, monkeypatch
):
  folder, text = constrained_run
  generate, write = sampling.generate, metrics.Writer.write
  second = folder / 'run' / 'round_2'
  pairs = (second / 'pairs.jsonl').read_bytes()
  shutil.rmtree(second)

  def train_and_signal(*args):
    train.train(*args)
    swallowed_sigterm()

  def generate_and_signal(*args, on_batch, **keywords):
    def signal_first(done):
      swallowed_sigterm()
      on_batch(done)

    return generate(*args, on_batch=signal_first, **keywords)

  def write_and_signal(*args):
    swallowed_sigterm()
    write(*args)

  def preempted(owner, name, value):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, value)
      with pytest.raises(processes.Preempted) as stop:
        online.run(constrained_config(folder), str(folder / 'run'))
    assert stop.value.code == processes.PREEMPTED
    return stop.value.what

  # After the training of round 1, in the sampling of round 2, in its training.
  fake = types.SimpleNamespace
  preempted(online, 'train', fake(train=train_and_signal))
  assert not second.exists()
  preempted(sampling, 'generate', generate_and_signal)
  assert not second.exists()
  what = preempted(metrics.Writer, 'write', write_and_signal)
  assert 'SIGTERM after step 0 of 1' in what
  assert (second / 'pairs.jsonl').read_bytes() == pairs
  assert online.run(constrained_config(folder), str(folder / 'run')) == text
  assert (second / 'train' / 'metrics.jsonl').exists()
