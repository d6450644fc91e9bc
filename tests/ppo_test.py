"""PPO runs: what they learn, what they do not look at, and how they resume."""

import functools
import json
import os
import signal
import time
import types

import jax
import numpy as np
import pytest

from configs import ppo as configs
from dpo_jax import conversions
from dpo_jax import evaluators
from dpo_jax import main
from dpo_jax import metrics
from dpo_jax import policies
from dpo_jax import ppo
from dpo_jax import processes
from dpo_jax import rewards
from dpo_jax import rl
from dpo_jax import rollouts
from dpo_jax import sampling
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import weights
from dpo_jax import workdirs
from dpo_jax.data import examples
from dpo_jax.models import heads
from tests import processes_test
from tests import train_test
from tests import worlds

# What a clock decides.
TIMED = ('step_seconds', 'rollout_seconds', 'samples_per_second')


def letters(prompts, responses):
  """Counts the letters from a to z: about a tenth of random bytes."""
  del prompts
  return np.array([sum('a' <= c <= 'z' for c in text) for text in responses])


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  """One device compiles fastest; a test of more says so."""
  use_devices(monkeypatch, 1)
  monkeypatch.setitem(rewards.REWARDS, 'letters', letters)


make_mesh = sharding.make_mesh


def use_devices(monkeypatch, number):
  devices = jax.devices()[:number]
  monkeypatch.setattr(
    sharding, 'make_mesh', functools.partial(make_mesh, devices=devices)
  )


def debug_config(arg='', /, **changes):
  """The debug variant of configs/ppo.py; `changes` are dotted keys."""
  config = configs.get_config(f'debug,{arg}')
  config.data.max_prompt_tokens = 12
  config.eval.samples.num_prompts = 0
  config.update_from_flattened_dict(changes)
  return settings.Settings(config.to_dict())


def values_of(workdir, name):
  return [r[name] for r in metrics.read(workdir) if name in r]


def comparable(workdir):
  return [
    {k: v for k, v in r.items() if k.split('/')[-1] not in TIMED}
    for r in metrics.read(workdir)
  ]


def params_in(workdir, config):
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.open_policy(config, mesh, head=0.0)
  return workdirs.restore(workdir, {'params': policy.trained})


# --- What a rollout teaches ---------------------------------------------------


@pytest.fixture(scope='module')
def pieces():
  """A policy with a head, a reference, and samples of the policy."""
  mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  config = worlds.GEMMA  # windows and a cap on logits
  head = heads.init(jax.random.key(1), config.d_model, scale=1.0)
  variables = {'params': worlds.params_of(config, size=0.5) | {'head': head}}
  ref_variables = {'params': worlds.params_of(config, seed=1, size=0.5)}
  rng = np.random.default_rng(0)
  prompts = [rng.integers(2, 50, n).astype(np.int32) for n in (3, 9, 1, 6) * 4]
  samples = sampling.generate(
    config,
    variables,
    prompts,
    key=jax.random.key(0),
    max_new_tokens=7,
    temperature=1.0,
    top_p=1.0,
    eos_id=np.arange(10),
    batch_size=16,
  )
  groups = [
    examples.Group(prompt, (response,), 1.0, 1.0, '')
    for prompt, response in zip(prompts, samples.responses())
  ]
  return mesh, config, variables, ref_variables, groups, samples


def plan_of(groups, mesh, *, batch_size=8):
  return rollouts.plan(
    groups, max_prompt=9, max_response=7, batch_size=batch_size, mesh=mesh
  )


def test_the_first_ratio_is_one_and_the_samplers_is_near(pieces):
  mesh, config, variables, ref_variables, groups, samples = pieces
  assert 0 < samples.ended.sum() < 16 and len(set(samples.lengths)) > 3
  observe = rollouts.make_observe(config, mesh, chunk=16)
  seen = observe(variables, ref_variables, plan_of(groups, mesh))
  mask = seen['mask']
  np.testing.assert_array_equal(mask.sum(1), samples.lengths)
  np.testing.assert_allclose(
    seen['logps'][mask], samples.token_logps[mask], atol=1e-4
  )
  arrays = {name: seen[name] for name in ('logps', 'values')}
  arrays |= {'advantages': seen['values'], 'returns': seen['logps']}
  # The rows stand elsewhere in a minibatch than they did before.
  order = np.random.default_rng(0).permutation(16)
  shuffled = plan_of([groups[n] for n in order], mesh)
  read = jax.jit(rollouts.make_read(config, chunk=16))
  for step in range(shuffled.num_steps):
    batch = rollouts.put_minibatch(shuffled, step, order, arrays, mesh)
    logps, values = read(variables, batch)
    real = np.asarray(batch['slot']) >= 0
    ratio = np.exp(np.asarray(logps - batch['logps']))[real]
    assert np.abs(ratio - 1.0).max() < 1e-4
    np.testing.assert_allclose(
      np.asarray(values)[real], np.asarray(batch['values'])[real], atol=1e-5
    )
  sums = jax.jit(
    rollouts.make_sums(
      config, chunk=16, clip=0.2, value_clip=0.2, value_coef=0.1
    )
  )
  means = evaluators.means(sums(variables, None, batch, {})[0])
  assert abs(means['approx_kl']) < 1e-8 and means['ratio_gap'] < 1e-4
  assert means['clip_fraction'] == 0.0 == means['value_clip_fraction']
  # At the old policy the loss is - mean A + c mean (V - R)^2 / 2 over tokens.
  a, v, r = (
    np.asarray(batch[name], np.float64)[real]
    for name in ('advantages', 'values', 'returns')
  )
  expected = -a.mean() + 0.1 * np.mean((v - r) ** 2) / 2
  np.testing.assert_allclose(means['loss'], expected, rtol=1e-4)


def test_padding_rows_and_other_minibatches_have_no_influence(pieces):
  mesh, config, variables, _, groups, _ = pieces
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.normal(size=(16, 7)).astype(np.float32)
    for name in ('logps', 'values', 'advantages', 'returns')
  }
  sums = rollouts.make_sums(
    config, chunk=16, clip=0.2, value_clip=0.2, value_coef=0.1
  )

  def loss(params, batch):
    totals, _ = sums({'params': params}, None, batch, {})
    return totals['loss'][0] / totals['loss'][1], totals

  measure = jax.jit(jax.value_and_grad(loss, has_aux=True))
  found = []
  for rows in (8, 16):  # five samples, and 3 or 11 padding rows
    order = np.arange(4, 9)
    plan = plan_of([groups[n] for n in order], mesh, batch_size=rows)
    batch = rollouts.put_minibatch(plan, 0, order, arrays, mesh)
    assert batch['mask'].shape == (rows, 1) and batch['mask'].sum() == 5
    found.append(jax.device_get(measure(variables['params'], batch)))
    arrays = {name: x.copy() for name, x in arrays.items()}
    for x in arrays.values():
      x[:4] = x[9:] = 1e3  # of samples that are not in this minibatch
      for n in order:  # and what stands after the end of those that are
        x[n, len(groups[n].responses[0]) :] = 3.0
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), *found
  )


def experience(mesh, **changes):
  options = {
    'normalize': 'none',
    'no_eos_penalty': 0.0,
    'kl': {'kind': 'fixed', 'estimator': 'k1'},
    'gamma': 1.0,
    'lam': 0.95,
    'whiten_rewards': False,
    'whiten_advantages': False,
  }
  return rollouts.make_experience(mesh, **options | changes)


def test_options_of_rewards_and_kl():
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  rng = np.random.default_rng(0)
  mask = np.arange(4) < np.array([[4], [2], [3], [4]])
  seen = {
    name: rng.normal(size=(4, 4)).astype(np.float32)
    for name in ('logps', 'ref_logps', 'values')
  } | {'mask': mask}
  scores, ended = np.float32([1, 2, 4, 5]), np.array([False, True, True, False])
  memory = rollouts.first_memory(kl_coef=0.2)
  kl = np.where(mask, seen['logps'] - seen['ref_logps'], 0.0).sum(1)

  _, after, values = experience(mesh)(memory, seen, scores, ended)
  np.testing.assert_allclose(values['objective'], (scores - 0.2 * kl).mean())
  np.testing.assert_allclose(values['kl'], kl.mean(), rtol=1e-6)
  assert values['ended'] == 0.5 and values['length'] == 3.25
  jax.tree.map(np.testing.assert_array_equal, after, memory)

  penalised = experience(mesh, no_eos_penalty=1.5)
  _, _, values = penalised(memory, seen, scores, ended)
  assert values['score'] == scores.mean() - 0.75 and values['reward'] == 3.0
  # Nothing ends: logged, penalised, and no error.
  _, _, values = penalised(memory, seen, scores, np.zeros(4, bool))
  assert values['ended'] == 0.0 and values['score'] == 1.5

  _, after, values = experience(mesh, normalize='running')(
    memory, seen, scores, ended
  )
  assert abs(values['score']) < 1e-6 and after['reward']['count'] == 4
  _, after, values = experience(mesh, normalize='running')(
    after, seen, scores + 3.0, ended
  )
  np.testing.assert_allclose(
    values['score'], 1.5 / np.std([*scores, *scores + 3.0]), rtol=1e-5
  )

  adaptive = {'kind': 'adaptive', 'estimator': 'k1', 'target': 0.1}
  _, after, _ = experience(mesh, kl=adaptive | {'horizon': 40.0})(
    memory, seen, scores, ended
  )
  expected = 0.2 * (1.0 + np.clip(kl.mean() / 0.1 - 1.0, -0.2, 0.2) * 4 / 40)
  np.testing.assert_allclose(after['kl_coef'], expected, rtol=1e-6)

  arrays, _, _ = experience(mesh, whiten_advantages=True)(
    memory, seen, scores, ended
  )
  real = np.asarray(arrays['advantages'])[mask]
  np.testing.assert_allclose([real.mean(), real.std()], [0.0, 1.0], atol=1e-5)
  plain, _, _ = experience(mesh)(memory, seen, scores, ended)
  white, _, _ = experience(mesh, whiten_rewards=True)(
    memory, seen, scores, ended
  )
  rewards_NM = rl.token_rewards(
    seen['logps'], seen['ref_logps'], scores, mask, kl_coef=0.2, kl='k1'
  )
  expected, _ = rl.generalized_advantages(
    rl.whiten(rewards_NM, mask, keep_mean=True),
    seen['values'],
    mask,
    gamma=1.0,
    lam=0.95,
  )
  np.testing.assert_allclose(white['advantages'], expected, atol=1e-5)
  assert np.abs(plain['advantages'] - white['advantages']).max() > 0.1


# --- Runs ---------------------------------------------------------------------


def test_a_run_learns_its_reward_and_others_read_its_policy(
  tmp_path, capsys, monkeypatch
):
  config = debug_config(
    **{
      'reward.name': 'letters',
      'num_steps': 16,
      'optim.lr': 1e-2,
      'kl.coef': 0.02,
      'eval.every': 0,
      'eval.samples.num_prompts': 8,
      'eval.samples.ranker': 'letters',
    }
  )
  run = tmp_path / 'run'
  ends = jax.device_get(ppo.run(config, run))
  reward = values_of(run, 'train/reward')
  assert len(reward) == 16 and np.mean(reward[-2:]) > 2.0 * reward[0]
  kl, sampled = (values_of(run, f'samples/{n}') for n in ('kl', 'reward'))
  assert kl[0] == 0.0 and kl[-1] > 0.1 and sampled[-1] > 2.0 * sampled[0]
  one, two = (values_of(run, f'samples/best_of_{n}/reward') for n in (1, 2))
  np.testing.assert_allclose(one, sampled)
  assert two[-1] > one[-1]  # of two samples a prompt
  assert max(values_of(run, 'train/first_ratio_gap')) < 1e-4
  value, returns = (values_of(run, f'train/{n}') for n in ('value', 'return'))
  assert abs(value[0]) < 1e-5 and value[-1] > 0.5 * returns[-1] > 0.5
  assert len(metrics.read(run, 'samples.jsonl')) == 2 * 16

  # The policy without its head is what everyone else opens.
  mesh = sharding.make_mesh(**config.mesh)
  same = {'kl.coef': 0.0, 'init': str(run), 'reward.name': 'length'}
  policy = policies.open_policy(debug_config(**same), mesh)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(policy.trained),
    heads.without(ends),
  )
  other = policies.open_policy(
    worlds.debug_config(tmp_path, init=str(run)), mesh
  )
  jax.tree.map(np.testing.assert_array_equal, other.trained, policy.trained)
  conversions.convert(str(run), str(tmp_path / 'out'))
  exported = weights.load(tmp_path / 'out')
  jax.tree.map(
    np.testing.assert_array_equal, exported.params, heads.without(ends)
  )
  newest = types.SimpleNamespace(value='newest')
  monkeypatch.setattr(main, 'CHECKPOINT', newest)  # the flag
  capsys.readouterr()
  main.evaluate(config, str(run))
  values = json.loads(capsys.readouterr().out)
  assert values == metrics.read(run)[-1]


def test_devices_and_micro_batches_change_nothing(tmp_path, monkeypatch):
  found = []
  for name, devices, changes in [
    ('one', 1, {'accumulate': 4}),
    ('eight', 8, {'mesh.data': 4, 'mesh.fsdp': 2}),
  ]:
    use_devices(monkeypatch, devices)
    config = debug_config(**{'optim.lr': 1e-3}, **changes)
    params = ppo.run(config, tmp_path / name)
    found.append((comparable(tmp_path / name), jax.device_get(params)))
  (records, params), (others, other) = found
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), params, other
  )
  for a, b in zip(records, others, strict=True):
    assert a.keys() == b.keys()
    for key, value in a.items():
      assert abs(value - b[key]) <= 2e-4 * max(1.0, abs(value)), key


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, monkeypatch):
  use_devices(monkeypatch, 8)
  changes = {'optim.lr': 1e-3, 'data.max_prompt_tokens': 12}
  options = [f'--config.{name}={value}' for name, value in changes.items()]
  options += ['--config.eval.samples.num_prompts=0', f'--workdir={tmp_path}/2']
  started = processes_test.launch(
    2, ['ppo', '--config=configs/ppo.py:debug', *options]
  )
  codes, _, errors = processes_test.outcome(started)
  assert codes == [0, 0], errors
  config = debug_config(**changes)
  ppo.run(config, tmp_path / '1')
  for a, b in zip(*(comparable(tmp_path / n) for n in '12'), strict=True):
    assert a.keys() == b.keys()
    for key, value in a.items():
      assert abs(value - b[key]) <= 2e-4 * max(1.0, abs(value)), key
  ends = [params_in(tmp_path / n, config)[1] for n in '12']
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *ends)


RESUMABLE = {
  'num_steps': 8,
  'optim.lr': 3e-3,
  'optim.schedule': 'linear',
  'reward.normalize': 'running',
  'checkpoint.every': 2,
  'eval.every': 3,
  'eval.samples.num_prompts': 2,
  'eval.samples.reward': 'none',
}


def assert_equal_runs(config, one, two):
  assert comparable(one) == comparable(two)
  samples = [metrics.read(w, 'samples.jsonl') for w in (one, two)]
  assert samples[0] == samples[1]
  ends = [params_in(w, config) for w in (one, two)]
  assert ends[0][0] == ends[1][0] == 8
  jax.tree.map(np.testing.assert_array_equal, ends[0][1], ends[1][1])


def test_killed_and_resumed_equals_uninterrupted_bitwise(tmp_path):
  config = debug_config('adapter=lora', **RESUMABLE)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert train_test.command(config, whole, 'ppo.run').wait() == 0
  process = train_test.command(config, killed, 'ppo.run')
  while len(values_of(killed, 'train/loss')) < 3:
    assert process.poll() in (None, 0)
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert len(values_of(killed, 'train/loss')) < 8
  assert train_test.command(config, killed, 'ppo.run').wait() == 0
  assert_equal_runs(config, whole, killed)
  coefs = values_of(whole, 'train/kl_coef')
  assert len(coefs) == 8 == len(set(coefs))
  # The adapter is exported without the head beside it.
  conversions.convert(str(whole), str(tmp_path / 'out'))
  assert (tmp_path / 'out' / 'adapter_model.safetensors').exists()


def test_a_sigterm_saves_the_last_whole_step(tmp_path, monkeypatch):
  calls = 0

  def stopping(prompts, responses):
    nonlocal calls
    calls += 1
    if calls == 4:  # in the fourth rollout
      os.kill(os.getpid(), signal.SIGTERM)
    return letters(prompts, responses)

  config = debug_config(
    **RESUMABLE
    | {
      'reward.name': 'letters',
      'reward.normalize': 'reference',
      'eval.samples.num_prompts': 0,
    }
  )
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  ppo.run(config, whole)
  with monkeypatch.context() as patch:
    patch.setitem(rewards.REWARDS, 'letters', stopping)
    patch.setattr(processes, '_STOP', processes._Stop())  # of a new process
    with pytest.raises(processes.Preempted) as caught:
      ppo.run(config, stopped)
  done = len(values_of(stopped, 'train/loss'))
  assert 3 <= done < 8
  assert caught.value.what == f'SIGTERM after step {done} of 8, which is saved'
  ppo.run(config, stopped)
  assert_equal_runs(config, whole, stopped)


def test_a_run_goes_on_with_the_state_of_another(tmp_path):
  changes = {'optim.lr': 1e-3, 'kl.horizon': 100.0}
  ppo.run(debug_config(**changes), tmp_path / 'first')
  config = debug_config(
    resume=str(tmp_path / 'first'), **changes | {'num_steps': 3}
  )
  ppo.run(config, tmp_path / 'second')
  first, second = (
    values_of(tmp_path / w, 'train/kl_coef') for w in ('first', 'second')
  )
  assert len(second) == 1 and second[0] != first[-1] != first[0]
  assert metrics.read(tmp_path / 'second')[0]['step'] == 3
  # The state has the coefficient, so another one would not be heeded.
  other = debug_config(
    resume=str(tmp_path / 'first'), **changes | {'kl.coef': 0.3}
  )
  with pytest.raises(ValueError, match=r'kl.coef: 0.15 -> 0.3\); set them as'):
    ppo.run(other, tmp_path / 'third')
  assert not (tmp_path / 'third').exists()


# --- Bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
  'arg, changes, message',
  [
    ('', {'rollout.size': 12}, 'not a multiple of batch_size 8'),
    ('', {'rollout.size': 0}, 'rollout.size is 0; use 1 or more'),
    ('', {'rollout.batch_size': 0}, 'rollout.batch_size is 0; use 1 or more'),
    ('', {'accumulate': 3}, '3 micro-batches; use 6 or 9'),
    ('', {'rollout.temperature': 0.7}, 'set it to 1'),
    ('', {'ppo.epochs': 0}, 'ppo.epochs is 0'),
    ('', {'ppo.gamma': 1.1}, 'ppo.gamma is 1.1; use a number from 0 to 1'),
    ('', {'ppo.lam': -0.1}, 'ppo.lam is -0.1; use a number from 0 to 1'),
    ('', {'ppo.clip': 0.0}, 'ppo.clip is 0.0; use a number above 0'),
    (
      '',
      {'ppo.value_clip': -1.0},
      'ppo.value_clip is -1.0; use',
    ),
    ('', {'ppo.value_coef': -1.0}, 'ppo.value_coef is -1.0; use 0 or more'),
    ('', {'reward.no_eos_penalty': -1.0}, 'no_eos_penalty is -1.0; use 0'),
    ('kl=fixed', {'kl.coef': -1.0}, 'kl.coef is -1.0; use 0 or more'),
    ('kl=fixed', {'kl.coef': float('nan')}, 'kl.coef is nan; use 0 or more'),
    ('', {'kl.coef': 0.0}, 'kl.coef is 0, .* choose kl=fixed'),
    ('', {'kl.kind': 'fixed'}, 'behind the colon'),
    ('', {'kl.horizon': 3.2}, 'for rollout.size 16: .* kl.horizon above 3.2'),
    ('', {'kl.target': 0.0}, 'kl.target is 0.0; use a number above 0'),
    ('', {'kl.estimator': 'k2'}, "did you mean 'k"),
    ('', {'reference.mode': 'ema'}, "unknown reference of PPO 'ema'"),
    ('', {'reference.mode': 'adapter_off'}, 'all weights are trained'),
    ('', {'reward.name': ''}, 'model:WORKDIR'),
    ('', {'reward.name': 'lenght'}, "did you mean 'length'"),
    ('', {'reward.normalize': 'refrence'}, "did you mean 'reference'"),
    ('', {'eval.samples.judges': ('vadr',)}, "did you mean 'vader'"),
    ('', {'data.source': 'nowhere.jsonl'}, 'nowhere.jsonl'),
    ('', {'data.source': ''}, 'data.source is empty'),
    ('', {'data.task': 'prompt'}, "did you mean 'prompts'"),
  ],
)
def test_bad_configs_stop_before_anything_is_written(
  tmp_path, arg, changes, message
):
  with pytest.raises((ValueError, OSError), match=message):
    ppo.run(debug_config(arg, **changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_all_that_is_wrong_is_told_at_once():
  config = debug_config(
    **{'ppo.lam': 7.0, 'optim.name': 'adam', 'reward.name': 'lenght'}
  )
  with pytest.raises(ValueError) as caught:
    ppo.check(config, sharding.make_mesh(**config.mesh))
  text = str(caught.value)
  assert text.startswith('ppo.lam is 7.0') or '\nppo.lam is 7.0' in text
  assert "unknown optimizer 'adam'" in text and "reward 'lenght'" in text
  assert len(text.split('\n')) == 3
  # What a check alone has read is still unread.
  assert set(config.unread()) >= {'ppo.lam', 'optim.name', 'rollout.size'}


@pytest.mark.parametrize(
  'changes, line, message',
  [
    ({'data.source': 'FILE'}, '', r':1: no prompts'),
    ({'data.source': 'FILE'}, '{"prompt": "a"}\n{"prompt": ""}', ':2: the pro'),
    ({'data.source': 'FILE'}, '{"prompt": 3}', ':1: the prompt is 3'),
    (
      {'eval.samples.prompts': 'FILE', 'eval.samples.num_prompts': 1},
      '{"prompt": 3}',
      ':1: the prompt is 3',
    ),
  ],
)
def test_bad_prompts_stop_before_anything_is_written(
  tmp_path, changes, line, message
):
  path = tmp_path / 'prompts.jsonl'
  path.write_text(line)
  changes = {k: str(path) if v == 'FILE' else v for k, v in changes.items()}
  with pytest.raises(ValueError, match=f'prompts.jsonl{message}'):
    ppo.run(debug_config(**changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'values, message',
  [
    (
      [np.nan] * 16,
      "'bad' of text 0 is nan[^?]*prompt: .*\n  response: ",
    ),
    ([1e39] * 16, r'1e\+39, too large for float32[^?]*prompt: '),
    ([0.0] * 3, r'shape \(3,\) for 16 responses[^?]*prompt: .*\n  response: '),
    (['good'] * 16, "reward 'bad' returned .'good'.*no numbers"),
    ([1.0] * 16, 'no variance to normalize by'),
  ],
)
def test_bad_rewards_stop_the_run(tmp_path, monkeypatch, values, message):
  monkeypatch.setitem(rewards.REWARDS, 'bad', lambda *_: values)
  with pytest.raises(ValueError, match=message):
    ppo.run(debug_config(**{'reward.name': 'bad'}), tmp_path / 'run')


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  one_update = {'rollout.size': 8, 'ppo.epochs': 1, 'checkpoint.every': 1}
  config = debug_config(
    **one_update,
    **{'num_steps': 6, 'optim.lr': 1e30, 'optim.clip_norm': 0.0},
    **{'optim.warmup_steps': 9, 'optim.warmup_init': 0.0, 'eval.every': 0},
  )
  # The first update has a learning rate of 0, the second one of 1e29.
  with pytest.raises(FloatingPointError, match='checkpoint is that of step 1'):
    ppo.run(config, tmp_path / 'run')
  step, items = params_in(tmp_path / 'run', debug_config())
  assert step == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(items['params']))


def test_prompts_come_from_files_and_data_sets(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('{"prompt": "One."}\n{"prompt": "Two?"}\n')
  policy = policies.open_source('debug-llama')
  load = functools.partial(
    rollouts.load_prompts,
    tokenizer=policy.tokenizer,
    model_config=policy.config,
  )
  found, _ = load(debug_config(**{'data.source': str(path)}).data)
  texts = evaluators.prompt_texts(found['train'], policy.tokenizer)
  assert texts == ['One.', 'Two?'] and found['test'] == []
  config = debug_config(
    'data=jsonl',
    **{
      'data.source': str(worlds.write_pairs(tmp_path)),
      'data.cache_dir': str(tmp_path / 'data'),
      'data.max_prompt_tokens': 64,
    },
  )
  found, report = load(config.data)
  texts = evaluators.prompt_texts(found['train'], policy.tokenizer)
  assert all(text.startswith('question ') for text in texts)
  assert len(set(texts)) == len(texts) == 40 - len(found['test'])
  assert 'kept' in report and found['test']
