"""The gates of controlled sentiment, on points worked out by hand."""

import numpy as np
import pytest

from experiments import imdb_gates
from experiments import imdb_results
from experiments import imdb_scales


def checkpoint(kl, reward):
  """Of two prompts around the means."""
  return {
    'kl': np.array([kl - 0.1, kl + 0.1]),
    'reward': np.array([reward - 0.01, reward + 0.01]),
  }


def runs_of(name, *points):
  """A run that begins at (0, .5) and has been at these (KL, reward)."""
  points = [(0.0, 0.5), *points]
  return imdb_results.Evaluated(
    imdb_scales.parse(name),
    [{'step': n, 'kl': k, 'reward': r} for n, (k, r) in enumerate(points)],
    [checkpoint(*point) for point in points],
    '',
  )


def a1(dpo, ppo, *, sft=0.5, **others):
  found = {'dpo': [runs_of('dpo_1', *dpo)], 'ppo': [runs_of('ppo_6', *ppo)]}
  for method, points in others.items():
    found[method] = [runs_of(f'{method}_1', *points)]
  return imdb_gates.a1(found, sft=sft, resamples=50)


DPO = [(2.0, 0.9), (5.0, 0.95)]
OTHERS = {'unlikelihood': [(2.5, 0.6), (7.0, 0.4)], 'preferred_ft': [(1, 0.6)]}


def test_gate_of_the_frontier():
  said = a1(DPO, [(1.0, 0.55), (3.0, 0.7), (6.0, 0.8)], **OTHERS)
  # (3, .7) and (6, .8) are below (2, .9); nothing is before (1, .55), and the
  # first of a run is not asked.
  assert said['dominated'] == pytest.approx(2 / 3)
  assert '(1 have less KL than any checkpoint of DPO)' in said['text']
  # But the line from (0, .5) to (2, .9) is above it.
  assert said['under'] == 1.0
  # Areas to 12 nats: up to .9 at 2 and .95 at 5; PPO up to .8 at 6, over .7.
  assert said['areas']['ours'] == pytest.approx(
    (2 * 0.7 + 3 * 0.925 + 7 * 0.95) / 12
  )
  assert said['areas']['theirs'] == pytest.approx(
    (3 * 0.6 + 3 * 0.75 + 6 * 0.8) / 12
  )
  assert said['areas']['p'] == pytest.approx(1 / 51)
  assert said['others']['unlikelihood']['dpo'] == pytest.approx(0.9 + 0.05 / 6)
  assert said['others']['preferred_ft']['dpo'] == pytest.approx(0.7)
  assert said['rise'] == pytest.approx(0.3)
  assert said['verdict'] == 'not met'
  assert said['parts'] == {
    'dominated': False,
    'area': True,
    'unlikelihood': True,
    'preferred_ft': True,
  }


def test_the_gate_is_met_by_all_its_parts_alone():
  ppo = [(3.0, 0.7), (6.0, 0.8)]
  assert a1(DPO, ppo, **OTHERS)['verdict'] == 'met'
  above = OTHERS | {'preferred_ft': [(1.0, 0.75)]}
  assert a1(DPO, ppo, **above)['verdict'] == 'not met'
  # One that never rises above the SFT model is below whatever DPO has.
  level = a1(DPO, ppo, **OTHERS | {'preferred_ft': [(1.0, 0.5), (2.0, 0.4)]})
  # Of three the best is below DPO's .95, the first above its line to (2, .9).
  some = a1(DPO, ppo, **OTHERS | {'unlikelihood': [(0.5, 0.7), (6.0, 0.8)]})
  found = some['others']['unlikelihood']
  assert found['below'] and (found['above'], found['checkpoints']) == (1, 2)
  assert found['lead']['difference'] == pytest.approx(0.15)
  assert '1 of 2 checkpoints are above DPO' in some['text']
  assert level['verdict'] == 'met' and 'no gain on SFT' in level['text']
  assert a1(DPO, ppo)['verdict'] == 'incomplete'
  assert a1(DPO, ppo, unlikelihood=[(1, 0.6)])['verdict'] == 'incomplete'


def test_the_gate_is_void_where_ppo_does_not_end_above_the_sft_model():
  ppo = [(3.0, 0.75), (6.0, 0.65)]  # a lucky checkpoint does not help
  said = a1(DPO, ppo, **OTHERS)
  assert said['rise'] == pytest.approx(0.15) and said['verdict'] == 'void'
  assert a1(DPO, ppo, sft=0.44, **OTHERS)['verdict'] == 'met'


def curve(values):
  return [
    {'n': n, 'reward': value, 'gain_se': 0.01, 'kl': 0.1, 'bound': 0.2}
    for n, value in values.items()
  ]


def test_gate_of_best_of_n():
  good = {1: 0.5, 4: 0.7, 16: 0.8, 64: 0.84, 128: 0.88}
  assert imdb_gates.a2(curve(good))['verdict'] == 'met'
  doublings = (
    '1 to 4 +0.1000, 4 to 16 +0.0500, 16 to 64 +0.0200, 64 to 128 +0.0'
  )
  assert doublings in imdb_gates.a2(curve(good))['text']
  for wrong, part in [
    (good | {128: 0.9}, 'plateau'),  # .06 is more than a quarter of .2
    (good | {16: 0.69}, 'rises'),
  ]:
    said = imdb_gates.a2(curve(wrong))
    assert said['verdict'] == 'not met' and not said['parts'][part]
  beyond = curve(good)
  beyond[2]['kl'] = 0.3
  assert imdb_gates.a2(beyond)['parts']['bound'] is False
  assert imdb_gates.a2(curve({1: 0.5, 2: 0.6}))['verdict'] == 'not asked'


def test_best_of_n_is_chosen_by_one_reward_and_measured_by_another():
  learned, measured = [[1.0, 2.0, 3.0]], [[0.9, 0.6, 0.3]]
  one, two, three = imdb_gates.best_of_curve(learned, measured, (1, 2, 3))
  assert one['reward'] == pytest.approx(0.6)
  # Of the three pairs two have the third sample, one the second.
  assert two['reward'] == pytest.approx((2 * 0.3 + 0.6) / 3)
  assert three['reward'] == pytest.approx(0.3)
  assert one['kl'] == pytest.approx(0.0) and three['kl'] <= three['bound']
  # What two gain on one is +.3 and -.2 of two prompts.
  of_two = imdb_gates.best_of_curve(
    [[1, 2], [1, 2]], [[0, 0.6], [0.4, 0]], (1, 2)
  )
  assert of_two[1]['gain_se'] == pytest.approx(0.25)


def rows(policy, rates):
  return [
    {
      'policy': policy,
      'temperature': t,
      'win_rate': rate,
      'win_rate_se': 0.02,
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
    said = imdb_gates.a3([*dpo, *rows('ppo', ppo)])
    assert said['verdict'] == verdict, said


def test_gate_of_the_reward_model_is_of_the_checkpoint_that_is_used():
  def record(step, accuracy):
    name = 'heldout/rewards/accuracy'
    return {'step': step, name: accuracy, f'{name}_se': 0.01} | {
      'heldout/groups': 500.0
    }

  records = [record(0, 0.95), record(10, 0.91), record(20, 0.89), {'step': 20}]
  said = imdb_gates.a15(records, 10)
  assert said['verdict'] == 'met' and 'at step 10' in said['text']
  assert imdb_gates.a15(records, 20)['verdict'] == 'not met'


def test_the_curve_of_eq_4_begins_with_the_samples_and_rises():
  rng = np.random.default_rng(0)
  kls, values = imdb_gates.tilted_curve(rng.random((50, 64)))
  assert kls[0] < 1e-4 and values[0] == pytest.approx(0.5, abs=0.02)
  assert np.all(np.diff(values) > 0.0) and np.all(np.diff(kls) > 0.0)
  assert 2.5 < kls[-1] <= imdb_gates.CURVE
