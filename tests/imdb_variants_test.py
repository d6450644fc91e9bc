"""Studies of losses at scale `smoke`, and their gates on numbers by hand."""

import json
import math
import os
import pathlib
import shutil
import types

import numpy as np
import pytest

from dpo_jax import judges
from dpo_jax import progress
from dpo_jax import sentiment
from dpo_jax import settings
from dpo_jax import train
from dpo_jax import workdirs
from dpo_jax.data import tokenizers
from experiments import imdb_changes
from experiments import imdb_frontier
from experiments import imdb_lengths
from experiments import imdb_results
from experiments import imdb_scales
from experiments import imdb_tables
from experiments import imdb_texts
from experiments import imdb_variants
from experiments import imdb_verdicts
from experiments import sweep
from tests import imdb_frontier_test

SMOKE = imdb_scales.SCALES['smoke']
DPO = 'method=dpo,lr=0.001,strength=0.1'
NOTE = {'seconds': 1.0, 'status': 0}  # in job.json, besides values


def write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def in_process(jobs, workdir):
  """Does what `sweep.run` does, without a process for each job."""
  for job in jobs:
    folder = os.path.join(workdir, job.name)
    if workdirs.finished(folder):
      continue
    train.train(settings.Settings(job.config), folder)
    workdirs.finish(folder)
    text = json.dumps({'values': job.values} | NOTE)
    workdirs.write(os.path.join(folder, 'job.json'), text)
  return 0


# --- From end to end ---


def write_imdb(root):
  """What `imdb_frontier` leaves at scale smoke, but for its SFT model."""
  paths = imdb_scales.Paths(root)
  reviews = imdb_frontier_test.write_reviews(root.parent / 'reviews')
  root.mkdir()
  data = SMOKE.as_data() | {'source': 'reviews'}
  (root / 'scale.json').write_text(json.dumps(data))
  sentiment.train(
    str(reviews), paths.classifiers, cache_dir=root.parent / 'cache'
  )
  texts = ['the film is good. it is bad. the plot is dull and long.'] * 50
  imdb_texts.write_base(SMOKE, texts, paths.base)
  names = [f'{a} {b}' for a in ('the', 'it') for b in 'abcdefghijkl']
  write_lines(paths.train_prompts, [{'prompt': p} for p in names])
  tests = [{'prompt': f'{p}x', 'continuation': ' is'} for p in names[:6]]
  write_lines(paths.test_prompts, tests)
  rows = [{'prompt': p, 'response': ' is good. a b c d'} for p in names * 2]
  write_lines(paths.sft_rows, rows)
  pairs = [
    {'prompt': p, 'chosen': f' is good{n}.', 'rejected': f' is bad{n}.'}
    for p in names
    for n in range(2)
  ]
  write_lines(paths.pairs, pairs)
  return paths


@pytest.fixture(scope='module')
def imdb(tmp_path_factory):
  paths = write_imdb(tmp_path_factory.mktemp('variants') / 'imdb')
  imdb_frontier.finish_run(
    train.train, imdb_scales.sft_config(SMOKE, paths), paths.sft
  )
  return paths


def call(paths, *more):
  return imdb_variants.main(
    [
      f'--imdb={paths.root}',
      f'--workdir={paths.root.parent / "out"}',
      *more,
      '--traceback',
    ]
  )


def test_displacement_is_that_of_the_logs(imdb, monkeypatch, capsys):
  monkeypatch.setattr(sweep, 'run', in_process)
  assert call(imdb, '--study=displacement', '--only=dpo') == 0
  folder = imdb.root.parent / 'out' / 'displacement'
  text = (folder / 'results.md').read_text()
  assert text in capsys.readouterr().out
  assert '| A12 | void | there is no run of apo_down, nca,' in text
  for name in ('curves.png', 'sweep.csv', 'table.md', 'verdict.json'):
    assert (folder / name).stat().st_size > 100
  monkeypatch.delattr(sweep, 'run')
  assert call(imdb, '--study=displacement', '--only=dpo', '--collect') == 0
  assert (folder / 'results.md').read_text() == text
  (dpo,) = imdb_tables.read(folder)
  assert dpo.values == {'method': 'dpo', 'lr': '0.001', 'strength': '0.1'}
  # Every prompt has two pairs, so that both means are the same.
  name = 'heldout/logps/chosen'
  moved = dpo.number(name) - dpo.number(name, last=False)
  assert abs(moved) > 0.01
  assert dpo.changes.mean() == pytest.approx(moved, abs=1e-3)
  assert len(dpo.changes) == dpo.number('heldout/groups') / 2
  assert dpo.number('samples/kl', last=False) == pytest.approx(0.0, abs=1e-5)
  assert dpo.column('reward').shape == (6,)
  assert [step for step, found in dpo.records if name in found] == [0, 1, 2]


def pretended(imdb, done):
  """Does what `sweep.run` does with what others trained; notes the jobs."""

  def run(jobs, workdir):
    for job in jobs:
      folder = pathlib.Path(workdir, job.name)
      done[job.name] = job
      if job.name == 'short_sft':
        shutil.copytree(imdb.sft, folder)
      else:
        folder.mkdir(parents=True)
        prompts = imdb_results.read_lines(imdb.test_prompts)
        rows = [
          {'step': step, 'prompt': row['prompt'], 'reward': 0.5, 'length': 9.0}
          for step in (0, 2)
          for row in prompts
        ]
        write_lines(folder / 'samples.jsonl', rows)
        write_lines(folder / 'metrics.jsonl', [{'step': 2, 'samples/kl': 1.0}])
      (folder / 'job.json').write_text(
        json.dumps({'values': job.values} | NOTE)
      )
      workdirs.finish(folder)
    return 0

  return run


def test_labels_like_length_and_runs_begin_at_what_ends(imdb, monkeypatch):
  done = {}
  monkeypatch.setattr(sweep, 'run', pretended(imdb, done))
  short = imdb.root.parent / 'out' / 'short'
  short.mkdir(parents=True)
  # A model of two steps ends by chance alone.
  names = [row['prompt'] for row in imdb_results.read_lines(imdb.train_prompts)]
  write_lines(
    short / 'completions.jsonl',
    [
      {'prompt': p, 'response': text, 'ended': ended, 'probability': value}
      for p in names
      for text, ended, value in [
        (' is good.', True, 0.5),
        (' is bad. it is the film.', True, 0.49),
        (' is', False, 0.9),
      ]
    ],
  )
  assert call(imdb, '--study=length_strong', '--only=dpo') == 0
  rows = imdb_results.read_lines(short / 'short.jsonl')
  assert {row['response'] for row in rows} == {' is good.'}
  pairs = imdb_results.read_lines(short / 'pairs_0.02.jsonl')
  # 0.01 of P(positive) is less than what 0.02 a token gives the longer one.
  assert len(pairs) == len(names)
  assert {p['chosen'] for p in pairs} == {' is bad. it is the film.'}
  account = json.loads((short / 'pairs_0.02.json').read_text())
  assert account['turned'] == len(names)
  assert account['ended'] == 2 * len(names)
  sft, dpo = (done[name].config for name in ('short_sft', DPO))
  assert sft['init'] == str(imdb.sft) and sft['optim']['name'] == 'adamw'
  assert sft['data']['source'] == str(short / 'short.jsonl')
  assert dpo['init'] == str(short / 'short_sft')
  assert dpo['data']['source'] == str(short / 'pairs_0.02.jsonl')
  assert dpo['eval']['samples']['max_new_tokens'] == 2 * SMOKE.new_tokens
  prompts = imdb_results.read_lines(imdb.test_prompts)
  baseline = imdb_results.read_lines(short / 'baseline.jsonl')
  assert [row['prompt'] for row in baseline] == [r['prompt'] for r in prompts]
  assert all(row['length'] > 0 for row in baseline)
  text = (imdb.root.parent / 'out' / 'length_strong' / 'results.md').read_text()
  assert '| A13 | void | there is no run of r_dpo, ld_dpo, simpo' in text
  assert 'dpo: length +0.0 ± 0.0 %, reward +0.000 ± 0.000 over SFT' in text


# --- Jobs ---


def flat(config, prefix=''):
  out = {}
  for name, value in config.items():
    if isinstance(value, dict):
      out |= flat(value, f'{prefix}{name}.')
    else:
      out[f'{prefix}{name}'] = value
  return out


def jobs_of(study, tmp_path, scale='s', **how):
  paths = imdb_scales.Paths(tmp_path)
  return imdb_variants.make_jobs(
    imdb_variants.STUDIES[study],
    imdb_scales.SCALES[scale],
    imdb_variants.SIZES[scale],
    paths,
    **how,
  )


def test_a_job_is_the_frontier_s_run_but_for_its_steps(tmp_path):
  (job,) = jobs_of('displacement', tmp_path, only=('dpo',), rates=(1e-4,))
  run = imdb_scales.parse('dpo_0.1')
  theirs = imdb_scales.run_config(
    run, imdb_scales.SCALES['s'], imdb_scales.Paths(tmp_path)
  )
  ours, theirs = flat(job.config), flat(theirs.to_dict())
  assert {name for name in ours if ours[name] != theirs[name]} == {
    'num_steps',
    'epochs',
    'optim.warmup_steps',
    'optim.warmup_init',
    'eval.every',
    'checkpoint.every',
    'checkpoint.best',
  }
  assert (job.config['num_steps'], job.config['epochs']) == (112, 0.0)
  assert job.name == 'method=dpo,lr=0.0001,strength=0.1'


def test_the_bake_off_has_two_rates_and_two_strengths_of_all(tmp_path):
  jobs = jobs_of('bakeoff', tmp_path)
  assert len({job.name for job in jobs}) == len(jobs) == 88
  by_method = {}
  for job in jobs:
    by_method.setdefault(job.values['method'], []).append(job)
  for method, found in by_method.items():
    for name in ('lr', 'strength'):
      assert len({job.values[name] for job in found}) == 2, method
    configs = {json.dumps(job.config, sort_keys=True) for job in found}
    assert len(configs) == 4, method
  options = {
    name: (found[0].config['loss'], found[0].config['reference'])
    for name, found in by_method.items()
  }
  assert options['f_dpo'][0]['dpo']['link'] == 'forward_kl'
  assert options['ld_dpo'][0]['dpo']['reduction'] == 'ld:0.5'
  assert options['wpo'][0]['dpo']['weighting'] == 'wpo'
  assert options['dpo_kls'][0]['tdpo2']['alpha'] == 0.0
  assert options['tr_dpo'][1] == {'mode': 'ema', 'alpha': 0.6, 'every': 16}
  assert options['simpo'][1] == {'mode': 'none'}
  kto, dpo = (by_method[name][0].config for name in ('kto', 'dpo'))
  assert kto['data']['form'] == 'unpaired'
  assert kto['batch_size'] == 2 * dpo['batch_size'] == 128


def test_displacement_has_slow_runs_of_two(tmp_path):
  jobs = jobs_of('displacement', tmp_path, rates=(1e-3,))
  slow = [j.values['method'] for j in jobs if j.values['lr'] == '0.0001']
  assert slow == ['nca', 'apo_zero'] and len(jobs) == 9


# --- Parts ---


def test_a_review_is_cut_at_the_end_of_a_sentence():
  byte = tokenizers.ByteTokenizer()
  text = ' is "good." It is 3.5 long! Really?... And more'

  def cut(tokens, sentences):
    return imdb_lengths.cut_sentences(text, byte, tokens, sentences)

  assert cut(99, 1) == ' is "good."'
  assert cut(99, 2) == ' is "good." It is 3.5 long!'
  assert cut(len(cut(99, 2)), 2) == cut(99, 1)  # there is no room for an EOS
  assert cut(len(cut(99, 2)) + 1, 2) == cut(99, 2)
  assert cut(11, 3) == ''
  assert imdb_lengths.cut_sentences('no end', byte, 99, 3) == ''


def completion(probability, length, ended=True):
  return {
    'prompt': 'A',
    'response': f'{probability} {length}',
    'ended': ended,
    'probability': probability,
    'length': length,
  }


def test_labels_are_turned_by_length():
  rows = [
    completion(0.50, 10),
    completion(0.45, 20),
    completion(0.60, 10),
    completion(0.99, 40, ended=False),
  ]
  pairs, account = imdb_lengths.biased_pairs(rows, 0.0)
  assert {(p['chosen'][:3], p['rejected'][:4]) for p in pairs} == {
    ('0.5', '0.45'),
    ('0.6', '0.5 '),
    ('0.6', '0.45'),
  }
  assert (account['turned'], account['ended']) == (0, 3)
  assert account['longer_by'] == pytest.approx(-20 / 3)
  pairs, account = imdb_lengths.biased_pairs(rows, 0.01)  # 0.1 for ten tokens
  assert account['turned'] == 1
  assert pairs[0]['chosen'] == '0.45 20'
  tie = [completion(0.5, 10), completion(0.25, 20)]
  pairs, account = imdb_lengths.biased_pairs(tie, 0.025)
  assert (pairs, account['ties']) == ([], 1)


def test_pairs_of_a_prompt_count_as_one():
  class Group:
    def __init__(self, *prompt):
      self.prompt = np.array(prompt)

  groups = [Group(1, 2), Group(3), Group(1, 2)]
  found = imdb_changes.by_prompt(groups, [1.0, 5.0, 2.0])
  assert found == {(1, 2): 1.5, (3,): 5.0}


# --- Gates ---

FALL = np.array([-2.0, -1.0, -1.5, -1.5])
CHANGES = {
  'dpo': FALL,
  'apo_down': FALL - 1.0,
  'nca': FALL + 1.0,
  'apo_zero': FALL + 3.0,
  'rpo': FALL + 0.5,
  'orpo': FALL + 2.0,
  'cpo': FALL + 2.0,
}
SLOW = {'nca': FALL + 2.0, 'apo_zero': FALL + 1.6}


def test_gate_of_displacement():
  def gate(changes, slow=SLOW, accuracy=(0.7, 0.02)):
    return imdb_verdicts.gate_a12(changes, slow, accuracy=accuracy)

  said = gate(CHANGES)
  assert said['verdict'] == 'met' and len(said['parts']) == 9
  assert 'dpo -1.50 ± 0.20' in said['text']
  assert 'over DPO: nca +1.00 ± 0.00' in said['text']  # of the same prompts
  for wrong, part in [
    ({'dpo': FALL + 1.6}, 'dpo < 0'),
    ({'apo_down': -FALL}, 'apo_down < 0'),
    ({'orpo': FALL - 0.1}, 'orpo > dpo'),
  ]:
    said = gate(CHANGES | wrong)
    assert said['verdict'] == 'not met' and not said['parts'][part]
    assert said['text'].startswith('fails: ') and part in said['text']
  said = gate(CHANGES, SLOW | {'nca': FALL})
  assert said['parts']['nca >= 0 slowly'] is False
  said = gate(CHANGES, accuracy=(0.55, 0.02))
  assert said['verdict'] == 'void' and 'by chance' in said['text']
  said = gate({m: x for m, x in CHANGES.items() if m != 'cpo'}, {})
  assert said['verdict'] == 'void' and 'no run of cpo, nca at a' in said['text']


def variant(
  method, *, status='finished', lr='0.001', strength='0.1', **columns
):
  """A run of 40 prompts; columns: (before, after), means or [40] numbers."""
  prompts = [f'{n:02}' for n in range(40)]
  noise = np.random.default_rng(0).normal(0.0, 0.02, 40)
  columns = {'reward': (0.4, 0.6), 'length': (20.0, 20.0)} | columns
  samples = {
    step: {
      p: {name: float(x[i] + noise[n]) for name, x in wide.items()}
      for n, p in enumerate(prompts)
    }
    for i, step in enumerate((0, 5))
    for wide in [columns]
  }
  records = [
    (step, {f'samples/{name}': float(x[i]) for name, x in columns.items()})
    for i, step in enumerate((0, 5))
  ]
  values = {'method': method, 'lr': lr, 'strength': strength}
  return imdb_verdicts.Variant(values, status, records, samples)


BASELINE = {f'{n:02}': {'reward': 0.45, 'length': 20.0} for n in range(40)}


def gate_a13(**changes):
  runs = {'dpo': variant('dpo', length=(20.0, 26.0))}
  for method in ('r_dpo', 'ld_dpo', 'simpo', 'dpo_norm'):
    runs[method] = variant(method, length=(20.0, 20.5), reward=(0.4, 0.58))
  return imdb_verdicts.gate_a13(runs | changes, BASELINE, 0.02)


def test_gate_of_length():
  said = gate_a13()
  assert said['parts']['dpo grows']
  assert all(said['parts'][f'{m} keeps its length'] for m in ('r_dpo', 'simpo'))
  assert 'dpo: length +30.0' in said['text']
  for run, part in [
    (variant('dpo', length=(20.0, 23.0)), 'dpo grows'),
    (variant('r_dpo', length=(20.0, 17.0)), 'r_dpo keeps its length'),
    (variant('simpo', reward=(0.4, 0.5)), 'simpo has the reward'),
  ]:
    said = gate_a13(**{run.method: run})
    assert said['verdict'] == 'not met' and not said['parts'][part], part
  said = gate_a13(dpo=variant('dpo', reward=(0.4, 0.4)))
  assert said['verdict'] == 'void' and 'does not rise' in said['text']
  runs = {'dpo': variant('dpo')}
  said = imdb_verdicts.gate_a13(runs, BASELINE, 0.02)
  assert said['verdict'] == 'void' and 'no run of r_dpo,' in said['text']


def test_a_ratio_of_means_has_the_error_of_its_prompts():
  before, now = np.array([10.0, 30.0]), np.array([11.0, 33.0])
  assert imdb_verdicts.growth(now, before) == (pytest.approx(0.1), 0.0)
  mean, error = imdb_verdicts.growth(np.array([14.0, 34.0]), before)
  # 14 - 1.2 x 10 = 2 and 34 - 1.2 x 30 = -2, of a mean of 20.
  assert (mean, error) == (pytest.approx(0.2), pytest.approx(2.0 / 20))


def test_a_win_rate_at_equal_length_takes_length_out():
  rng = np.random.default_rng(0)
  longer = rng.normal(4.0, 4.0, 4000)
  gap = np.tanh(longer / longer.std())

  def rate(theta, phi):
    chance = 1.0 / (1.0 + np.exp(-(theta + phi * gap)))
    wins = (rng.random(4000) < chance).astype(float)
    found, _ = imdb_verdicts.controlled_win_rate(wins, longer)
    return wins.mean(), found

  raw, controlled = rate(0.0, 2.0)
  assert raw > 0.7 and controlled == pytest.approx(0.5, abs=0.03)
  raw, controlled = rate(1.0, 0.0)
  assert controlled == pytest.approx(0.731, abs=0.03)
  wins = (longer > 3.0).astype(float)
  one, _ = imdb_verdicts.controlled_win_rate(wins, longer)
  other, _ = imdb_verdicts.controlled_win_rate(1.0 - wins, -longer)
  assert one + other == pytest.approx(1.0, abs=1e-4)


def test_errors_of_win_rates_are_binomial_where_lengths_are_equal():
  wins = np.repeat([1.0, 0.0], [30, 70])
  rate, influences = imdb_verdicts.controlled_win_rate(wins, np.zeros(100))
  assert rate == pytest.approx(0.3, abs=2e-3)
  error = judges.standard_error(influences)
  assert error == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.02)
  rate, influences = imdb_verdicts.controlled_win_rate(
    np.full(9, 0.5), np.zeros(9)
  )
  assert rate == pytest.approx(0.5) and not np.abs(influences).max() > 1e-6


def test_who_made_the_labels_judges():
  run = variant('dpo', reward=(0.4, 0.45), length=(20.0, 21.0))
  for row in run.samples[5].values():
    row |= {'reward': 0.45, 'length': 21.0}
  wins, longer = imdb_verdicts.against(run, BASELINE, 0.002)
  assert set(wins) == {1.0} and set(longer) == {1.0}
  assert set(imdb_verdicts.against(run, BASELINE, 0.0)[0]) == {0.5}
  assert set(imdb_verdicts.against(run, BASELINE, -1.0)[0]) == {0.0}


def bake(**kinds):
  """Runs of the bake-off at two strengths."""
  return [
    variant(method, strength=strength, **columns)
    for method, columns in kinds.items()
    for strength in ('0.1', '0.05')
  ]


def test_gate_of_the_bake_off():
  names = ('dpo', 'f_dpo', 'tr_dpo', 'tdpo2', 'dpo_kls')
  kinds = {name: {'entropy': (4.0, 3.0)} for name in names}
  kinds['f_dpo'] = {'entropy': (4.0, 3.5)}
  kinds['tr_dpo'] |= {'reward': (0.4, 0.61)}

  def gate(kinds, kls=(1.0, 2.0), more=(), at=0.6, rates=(0.001,)):
    runs = [*bake(**kinds), *more]
    for run in runs:
      if run.method in ('tdpo2', 'dpo_kls'):
        ours = run.method == 'tdpo2'
        # At reward 0.5 DPO has half of its forward KL.
        for step, found in run.records:
          found['heldout/kl/rejected'] = kls[not ours] * (step > 0)
          if ours and step:
            found['samples/reward'] = at
    expected = [
      (name, lr, strength)
      for name in names
      for lr in rates
      for strength in (0.1, 0.05)
    ]
    return imdb_verdicts.gate_a11(runs, expected)

  said = gate(kinds)
  assert said['verdict'] == 'met', said
  assert 'entropy of f_dpo over dpo +0.500' in said['text']
  assert 'at equal reward -1.000 nats' in said['text']
  half = gate(kinds, at=0.5)
  assert 'at equal reward +0.000 nats' in half['text']
  assert half['verdict'] == 'not met'
  assert gate(kinds, at=0.7)['verdict'] == 'void'  # where DPO never is
  for wrong, part in [
    ({'f_dpo': {'entropy': (4.0, 2.9)}}, 'entropy of f_dpo over dpo'),
    ({'tr_dpo': {'reward': (0.4, 0.55)}}, 'reward of tr_dpo over dpo'),
    ({'dpo': {'reward': (0.4, 0.4), 'entropy': (4.0, 3.0)}}, 'dpo learns'),
  ]:
    assert gate(kinds | wrong)['parts'][part] is False
  nan = variant('dpo', status='diverged', strength='0.2')
  assert gate(kinds, more=[nan])['parts']['dpo is finite'] is False
  killed = variant('dpo', status='failed', strength='0.2')
  assert gate(kinds, more=[killed])['verdict'] == 'met'
  # Runs at another rate are to come: they may learn what these did not.
  part = gate(kinds, rates=(0.001, 0.01))
  assert part['verdict'] == 'incomplete' and '10 of 20 runs' in part['text']
  flat = kinds | {'tr_dpo': {'reward': (0.4, 0.4), 'entropy': (4.0, 3.0)}}
  assert gate(flat)['parts']['tr_dpo learns'] is False
  assert 'tr_dpo learns' not in gate(flat, rates=(0.001, 0.01))['parts']
  del kinds['tr_dpo']
  said = gate(kinds)
  assert said['verdict'] == 'void' and 'nothing of tr_dpo' in said['text']


def test_a_run_that_is_killed_has_not_diverged(tmp_path):
  checkpoints = types.SimpleNamespace(latest=lambda: 3)
  with pytest.raises(FloatingPointError) as error:
    progress.check_finite({'train/loss': math.nan}, 4, checkpoints)
  log = tmp_path / 'log.txt'
  log.write_text(f'step 3\ndpo-jax: {error.value}\n\n')
  assert imdb_tables.diverged(tmp_path)
  log.write_text('step 3\nMemoryError\n')
  assert not imdb_tables.diverged(tmp_path)


def test_tables_show_what_there_is():
  run = variant('dpo', length=(20.0, 26.0))
  run.records[-1][1]['samples/length_se'] = 0.5
  begun = imdb_verdicts.Variant(run.values, 'unfinished', [], {})
  first, _, whole, empty = imdb_tables.arms([run, begun]).splitlines()
  assert '26.000 ± 0.500' in whole and '0.600' in whole and 'nan' not in whole
  assert 'dpo (unfinished)' in empty and 'nan' not in empty
  assert empty.count(' - ') == first.count('|') - 4
  assert imdb_tables.curves([run, begun]) == {
    'reward': {'dpo, lr 0.001, 0.1': [(0, 0.4, None), (5, 0.6, None)]},
    'length, tokens': {'dpo, lr 0.001, 0.1': [(0, 20.0, None), (5, 26.0, 0.5)]},
  }


# --- Bad input ---


def refused(root, *more):
  text = imdb_variants.main(
    [f'--imdb={root}', f'--workdir={root / "out"}', *more]
  )
  assert '\n' not in text and text.startswith('imdb_variants: ')
  assert not (root / 'out').exists()
  return text


def test_wrong_names_and_workdirs_are_one_clear_line(tmp_path):
  root = tmp_path / 'imdb'
  text = refused(root, '--study=lengths')
  assert "unknown study 'lengths'; did you mean 'length'" in text
  text = refused(root, '--study=length')
  assert 'is no workdir of imdb_frontier; make it with python -m' in text
  root.mkdir()
  data = SMOKE.as_data() | {'source': 'official'}
  (root / 'scale.json').write_text(json.dumps(data))
  text = refused(root, '--study=length')
  assert f'{root / "sft" / "finished.json"} is not there; make it' in text
  (root / 'scale.json').write_text(json.dumps(data | {'vocabulary': 7}))
  assert 'is of none of the scales smoke, s' in refused(root, '--study=length')


def test_a_wrong_method_or_path_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"method of this study 'ncca'.*'nca'"):
    jobs_of('displacement', tmp_path, only=('ncca',))
  with pytest.raises(ValueError, match='use a path without a comma'):
    jobs_of('displacement', pathlib.Path('/a,b'))


def test_reviews_without_a_short_sentence_are_refused(tmp_path):
  paths = imdb_scales.Paths(tmp_path)
  imdb_texts.write_base(SMOKE, ['a b'], paths.base)
  write_lines(paths.sft_rows, [{'prompt': 'a', 'response': ' b c'}])
  with pytest.raises(ValueError, match='a sentence that ends within 24 tokens'):
    imdb_lengths.write_rows(SMOKE, paths, paths.sft_rows, 4)
