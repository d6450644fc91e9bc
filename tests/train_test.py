import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dpo_jax import metrics
from dpo_jax import policies
from dpo_jax import ref_cache
from dpo_jax import runs
from dpo_jax import sharding
from dpo_jax import train
from dpo_jax import workdirs
from dpo_jax.data import batches
from dpo_jax.models import presets
from tests import worlds

ROOT = pathlib.Path(__file__).parents[1]
# What a clock decides; everything else must be equal to the last bit.
TIMED = (
  'step_seconds',
  'pairs_per_second',
  'tokens_per_second',
  'slot_tokens_per_second',
  'mfu',
)


def losses_of(workdir, name='train/loss'):
  return [r[name] for r in metrics.read(workdir) if name in r]


@pytest.mark.parametrize('mode', ['frozen', 'cached', 'ema'])
def test_loss_is_ln_2_before_the_first_update(tmp_path, mode):
  config = worlds.debug_config(
    tmp_path, f'reference={mode}', **{'optim.lr': 1e-3}
  )
  train.train(config, tmp_path / 'run')
  for name in ('train/loss', 'heldout/loss'):
    first = losses_of(tmp_path / 'run', name)[0]
    assert abs(first - math.log(2)) < 1e-6, name


@pytest.mark.parametrize('mode, kept', [('cached', False), ('frozen', True)])
def test_a_cached_reference_leaves_no_weights_in_memory(tmp_path, mode, kept):
  config = worlds.debug_config(
    tmp_path, f'reference={mode}', **{'eval.samples.num_prompts': 2}
  )
  mesh = sharding.make_mesh(**config.mesh)
  with sharding.use(mesh):
    run = runs.set_up(config, mesh)
    assert (run.ref is not None) == kept
    values, samples = run.evaluate(run.policy.trained, None, run.first_memory)
  assert len(samples) == 2 and 'samples/length' in values
  assert ('samples/kl' in values) == kept


def test_what_the_host_writes_makes_no_step_look_faster(tmp_path, monkeypatch):
  write = metrics.Writer.write

  def slow(*args):
    time.sleep(0.2)
    write(*args)

  monkeypatch.setattr(metrics.Writer, 'write', slow)
  config = worlds.debug_config(tmp_path, **{'num_steps': 8, 'eval.every': 8})
  train.train(config, tmp_path / 'run')
  taken = losses_of(tmp_path / 'run', 'train/step_seconds')
  # All but the first step and the last had a record written beside them.
  assert len(taken) == 8 and min(taken[1:-1]) > 0.19


def test_the_window_of_the_model_reaches_every_plan(tmp_path, monkeypatch):
  model = dataclasses.replace(
    presets.DEBUG['debug-llama'], window=20, windowed=(True, True)
  )
  monkeypatch.setitem(presets.DEBUG, 'debug-llama', model)
  plans, plan_steps = [], batches.plan_steps

  def spy(*args, **keywords):
    plans.append(plan_steps(*args, **keywords))
    if len(plans) == 2:  # held-out and training groups
      raise KeyboardInterrupt
    return plans[-1]

  monkeypatch.setattr(batches, 'plan_steps', spy)
  with pytest.raises(KeyboardInterrupt):
    train.train(worlds.debug_config(tmp_path), tmp_path / 'run')
  assert len({len(plan.groups) for plan in plans}) == 2
  assert [plan.window for plan in plans] == [20, 20]


def test_cached_reference_equals_frozen_and_is_reused(tmp_path, monkeypatch):
  # The cache is filled from rows packed otherwise, which rounds otherwise; a
  # larger step than this makes 1e-7 at step 1 more than 1e-5 at step 3.
  changes = {'optim.lr': 3e-3, 'optim.warmup_steps': 0, 'num_steps': 4}
  found = {}
  for mode in ('frozen', 'cached'):
    config = worlds.debug_config(tmp_path, f'reference={mode}', **changes)
    train.train(config, tmp_path / mode)
    found[mode] = losses_of(tmp_path / mode)
  assert found['frozen'][-1] < 0.65
  np.testing.assert_allclose(found['cached'], found['frozen'], atol=1e-5)

  monkeypatch.setattr(ref_cache, 'compute', None)  # a miss would call it
  other = worlds.debug_config(
    tmp_path,
    'loss=ipo_sum,reference=cached',
    **{'optim.lr': 3e-3, 'batch_size': 16},
  )
  train.train(other, tmp_path / 'other')
  assert len(losses_of(tmp_path / 'other')) == 2


def test_the_cache_key_covers_what_changes_the_numbers_and_no_more():
  params = worlds.params_of(worlds.LLAMA)
  groups = worlds.make_groups(3)

  def key(*args):
    return ref_cache.key(*args)[0]

  base = key(params, worlds.LLAMA, groups)
  replace = functools.partial(dataclasses.replace, worlds.LLAMA)
  for neutral in ({'remat': 'full'}, {'scan_unroll': 3}):
    assert key(params, replace(**neutral), groups) == base
  nudged = jax.tree.map(np.array, params)
  nudged['final_norm']['scale'][0] += 1e-6
  for changed in (
    key(nudged, worlds.LLAMA, groups),
    key(params, replace(dtype='bfloat16'), groups),
    key(params, replace(norm_eps=1e-6), groups),
    key(params, replace(logit_cap=30.0), groups),
    key(params, replace(window=4, windowed=(True,) * 3), groups),
    key(params, worlds.LLAMA, groups[:2]),
    key(params, worlds.LLAMA, groups[::-1]),
    key(params, worlds.LLAMA, worlds.make_groups(3, seed=1)),
  ):
    assert changed != base


@pytest.mark.parametrize('arg', ['loss=cdpo', 'loss=ipo_mean', 'loss=ipo_sum'])
def test_every_pair_loss_learns(tmp_path, arg):
  config = worlds.debug_config(
    tmp_path,
    arg + ',optim=adamw',
    **{'num_steps': 12, 'optim.lr': 5e-3, 'eval.every': 12},
  )
  train.train(config, tmp_path / 'run')
  for name in ('train/loss', 'heldout/loss'):
    values = losses_of(tmp_path / 'run', name)
    assert values[-1] < 0.9 * values[0], name
  assert losses_of(tmp_path / 'run', 'heldout/rewards/accuracy')[-1] > 0.9


@pytest.mark.parametrize(
  'arg, changes, metric',
  [
    ('loss=kto', {}, 'rewards/desirable'),
    ('loss=bco', {'data.form': 'unpaired'}, 'rewards/desirable'),
    ('loss=tdpo2', {}, 'rewards/margin'),
    ('loss=dpo', {'loss.dpo.weighting': 'wpo'}, 'rewards/margin'),
    (
      'loss=dpo+likelihood_penalty',
      {'data.constraint': 'negative', 'loss.likelihood_penalty.weight': 0.1},
      'rewards/margin',
    ),
  ],
)
def test_other_forms_and_choices_learn(tmp_path, arg, changes, metric):
  config = worlds.debug_config(
    tmp_path,
    arg + ',optim=adamw',
    **changes,
    **{'num_steps': 12, 'optim.lr': 5e-3, 'eval.every': 12},
  )
  train.train(config, tmp_path / 'run')
  loss = losses_of(tmp_path / 'run', 'heldout/loss')
  assert loss[-1] < loss[0] - 1e-3
  reward = losses_of(tmp_path / 'run', f'heldout/{metric}')
  assert reward[-1] > reward[0] + 0.01


def test_a_batch_of_desirable_responses_alone_has_valid_metrics(tmp_path):
  config = worlds.debug_config(tmp_path, 'loss=kto')
  path = worlds.write_pairs(tmp_path)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  worlds.write_rows(
    tmp_path,
    [
      {'prompt': r['prompt'], 'response': r['chosen'], 'label': 1} for r in rows
    ],
  )
  train.train(config, tmp_path / 'run')
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  assert 'NaN' not in text and 'undesirable' not in text
  assert len(losses_of(tmp_path / 'run', 'train/rewards/desirable')) == 2


def test_rankings_train(tmp_path):
  config = worlds.debug_config(
    tmp_path,
    'loss=plackett_luce,optim=adamw',
    **{'num_steps': 12, 'optim.lr': 5e-3, 'data.form': 'rankings'},
  )
  worlds.write_rankings(tmp_path)
  train.train(config, tmp_path / 'run')
  loss = losses_of(tmp_path / 'run', 'heldout/loss')
  assert abs(loss[0] - math.log(6)) < 1e-5  # all orders of three alike
  assert loss[-1] < 0.9 * loss[0]
  assert losses_of(tmp_path / 'run', 'heldout/rewards/accuracy')[-1] > 0.9


def test_a_reference_that_never_moves_is_a_frozen_one(tmp_path):
  fast = {'optim.lr': 5e-3, 'optim.warmup_steps': 0, 'num_steps': 5}
  ends = []
  for arg, changes in [
    ('reference=frozen', {}),
    ('reference=ema', {'reference.alpha': 0.0, 'reference.every': 1}),
  ]:
    config = worlds.debug_config(tmp_path, arg, **changes, **fast)
    workdir = tmp_path / arg
    params = jax.device_get(train.train(config, workdir))
    ends.append(
      (params, losses_of(workdir), losses_of(workdir, 'heldout/loss'))
    )
  jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
  assert ends[0][1][-1] < 0.68


def test_a_hard_update_makes_the_reference_the_policy(tmp_path):
  config = worlds.debug_config(
    tmp_path,
    'reference=ema',
    **{'reference.alpha': 1.0, 'reference.every': 2, 'num_steps': 6},
    **{'optim.lr': 5e-3, 'optim.warmup_steps': 0, 'eval.every': 1},
  )
  train.train(config, tmp_path / 'run')
  loss = losses_of(tmp_path / 'run')
  even = [abs(x - math.log(2)) < 1e-6 for x in loss]
  assert even == [True, False] * 3
  distance = losses_of(tmp_path / 'run', 'train/reference_distance')
  assert [d == 0.0 for d in distance] == [False, True] * 3
  # Held-out loss is against the reference that moves, too.
  heldout = losses_of(tmp_path / 'run', 'heldout/loss')
  assert [abs(x - math.log(2)) < 1e-6 for x in heldout] == [True, False] * 3 + [
    True
  ]


def test_rewards_a_loss_could_use_are_used_or_refused(tmp_path):
  config = worlds.debug_config(tmp_path, 'loss=nca')
  worlds.write_pairs(tmp_path, chosen_reward=1.0, rejected_reward=0.0)
  with pytest.raises(ValueError, match='set its reward_temperature above 0'):
    train.train(config, tmp_path / 'run')


def test_weights_a_batch_loss_cannot_apply_are_refused(tmp_path):
  config = worlds.debug_config(tmp_path, 'loss=aot')
  worlds.write_pairs(tmp_path, weight=0.5)
  with pytest.raises(ValueError, match="loss 'aot', a function of the whole"):
    train.train(config, tmp_path / 'run')


def test_sft_learns_and_reports_a_token_mean(tmp_path):
  config = worlds.debug_config(
    tmp_path,
    'loss=sft,optim=adamw',
    **{'num_steps': 12, 'optim.lr': 5e-3, 'eval.every': 12},
  )
  train.train(config, tmp_path / 'run')
  values = losses_of(tmp_path / 'run', 'heldout/token_nll')
  assert abs(values[0] - math.log(257)) < 0.2
  assert values[-1] < values[0] - 1.0


def test_a_run_starts_from_another_ones_parameters(tmp_path):
  fast = {'optim.lr': 1e-2, 'optim.warmup_steps': 0}
  first = train.train(worlds.debug_config(tmp_path, **fast), tmp_path / 'first')
  first = jax.device_get(first)
  config = worlds.debug_config(
    tmp_path, init=str(tmp_path / 'first'), **fast | {'optim.lr': 0.0}
  )
  second = jax.device_get(train.train(config, tmp_path / 'second'))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  # The reference is the start of this run, not the random model.
  assert abs(losses_of(tmp_path / 'second')[0] - math.log(2)) < 1e-6


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  config = worlds.debug_config(
    tmp_path,
    'optim=adamw',
    **{
      'num_steps': 9,
      'optim.lr': 1e30,
      'optim.schedule': 'constant',
      'optim.warmup_steps': 4,
      'optim.warmup_init': 0.0,
      'checkpoint.every': 1,
      'eval.max_groups': 1,
      'eval.every': 0,
    },
  )
  # Step 2 makes parameters of size 1e29, whose loss at step 3 is not finite.
  with pytest.raises(
    FloatingPointError,
    match='the last good checkpoint is that of step',
  ) as caught:
    train.train(config, tmp_path / 'run')
  mesh = sharding.make_mesh(**config.mesh)
  _, params, _ = policies.open_model(config.model, mesh=mesh)
  step, items = workdirs.restore(tmp_path / 'run', {'params': params})
  assert f'checkpoint is that of step {step}.' in str(caught.value)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(items['params']))


def command(config, workdir, call='train.train'):
  """Calls a loop with a saved config in a process of its own, on one device."""
  path = workdir.with_suffix('.config.json')
  path.write_text(json.dumps(config.as_dict()))
  code = (
    'import json, sys\n'
    f'from dpo_jax import settings, {call.partition(".")[0]}\n'
    'config = settings.Settings(json.load(open(sys.argv[1])))\n'
    f'{call}(config, sys.argv[2])\n'
  )
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  env['XLA_FLAGS'] = env['XLA_FLAGS'].replace('_count=8', '_count=1')
  return subprocess.Popen(
    [sys.executable, '-c', code, str(path), str(workdir)],
    env=env,
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


@pytest.mark.parametrize(
  'arg, kill_at',
  [
    ('reference=cached', 5),
    ('reference=ema,loss=dpo+bco', 6),
    ('adapter=lora', 7),
  ],
)
def test_killed_and_resumed_equals_uninterrupted_bitwise(
  tmp_path, arg, kill_at
):
  config = worlds.debug_config(
    tmp_path,
    f'optim=adamw,{arg}',
    **({'reference.every': 4} if 'ema' in arg else {}),
    **{
      'num_steps': 24,
      'optim.lr': 1e-3,
      'checkpoint.every': 3,
      'eval.every': 5,
      'eval.samples.num_prompts': 2,
    },
  )
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  assert command(config, whole).wait() == 0

  process = command(config, killed)
  while len(losses_of(killed)) < kill_at:
    assert process.poll() in (None, 0)
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert kill_at <= len(losses_of(killed)) < 24
  assert command(config, killed).wait() == 0

  def comparable(workdir):
    return [
      {k: v for k, v in r.items() if k.split('/')[-1] not in TIMED}
      for r in metrics.read(workdir)
    ]

  assert len(losses_of(whole)) == 24
  assert comparable(killed) == comparable(whole)
  assert metrics.read(killed, 'samples.jsonl') == metrics.read(
    whole, 'samples.jsonl'
  )
  mesh = sharding.make_mesh(**config.mesh)
  params = policies.open_policy(config, mesh).trained
  ends = [
    workdirs.restore(workdir, {'params': params}) for workdir in (whole, killed)
  ]
  assert ends[0][0] == ends[1][0] == 24
  jax.tree.map(np.testing.assert_array_equal, ends[0][1], ends[1][1])


def test_a_workdir_of_another_config_is_refused(tmp_path):
  train.train(worlds.debug_config(tmp_path), tmp_path / 'run')
  before = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  with pytest.raises(ValueError, match=r'another config \(optim.lr: 1e-06 ->'):
    config = worlds.debug_config(tmp_path, **{'optim.lr': 2e-6})
    train.train(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == before


@pytest.mark.parametrize(
  'arg, changes, message',
  [
    ('', {'batch_size': 30}, 'use 24 or 32'),
    ('', {'eval.batch_size': 4}, 'eval.batch_size 4 .* use 8'),
    ('reference=none', {}, 'needs a reference'),
    ('loss=sft,reference=frozen', {}, 'uses no reference'),
    ('', {'reference.mode': 'emma'}, "did you mean 'ema'"),
    ('', {'reference.mode': 'cached'}, 'behind the colon'),
    ('reference=ema', {'reference.every': 0}, 'reference.every be 1 or more'),
    ('reference=ema', {'reference.every': 3}, 'would never move'),
    ('loss=tdpo1,reference=cached', {}, 'is not cached'),
    ('loss=nca', {'loss.nca.reward_temperature': 1.0}, 'the data lacks'),
    ('loss=kto', {'data.form': 'pairs'}, 'learn from unpaired'),
    ('', {'loss.dpo.labels': 'soft'}, "labels 'soft' would change nothing"),
    ('', {'loss.dpo.reduction': 'ld'}, 'number behind a colon'),
    ('loss=likelihood_penalty', {}, 'set data.constraint'),
    ('', {'data.constraint': 'digits'}, 'no loss looks at costs'),
    ('', {'data.row_length': 20}, 'raise it to at least'),
    ('', {'model.remat': 'all'}, 'model.remat'),
    ('', {'model.source': 'debug-lama'}, "did you mean 'debug-llama'"),
    ('', {'num_steps': 0}, 'set one of num_steps and epochs'),
    ('', {'epochs': 1.0}, 'set one of num_steps and epochs'),
    ('', {'num_steps': -1}, 'set one of num_steps and epochs'),
    ('', {'checkpoint.keep': 0}, 'keep at least 1'),
    ('', {'logps_chunk': 0}, 'use 1 or more'),
    ('', {'model.scan_unroll': 0}, 'use 1 or more'),
    ('', {'model.dtype': 'float33'}, 'model.dtype'),
    ('', {'optim.name': 'adam'}, "did you mean 'adamw'"),
    ('', {'optim.schedule': 'step'}, "optim.schedule is 'step'"),
    ('', {'optim.lr': -1.0}, 'optim.lr is -1.0; use 0 or more'),
    ('', {'data.task': 'jsnl'}, "did you mean 'jsonl'"),
    ('', {'data.source': 'official'}, 'jsonl has no official files'),
    ('', {'eval.samples.reward': 'vadr'}, "did you mean 'vader'"),
    ('', {'eval.samples.cost': 'digts'}, "did you mean 'digits'"),
    ('', {'eval.samples.judges': ('length',)}, 'as another column'),
    ('', {'eval.samples.ranker': 'length'}, 'samples_per_prompt is 1; set it'),
    ('', {'mesh.fsdp': 3}, 'make 3, which does not divide the 8 devices'),
    ('', {'data.source': 'nowhere'}, 'nowhere'),
    (
      '',
      {'eval.samples.num_prompts': 2, 'data.held_out': 0.0},
      'raise data.held_out',
    ),
  ],
)
def test_bad_settings_name_the_fix(tmp_path, arg, changes, message):
  config = worlds.debug_config(tmp_path, arg or 'loss=dpo', **changes)
  with pytest.raises((ValueError, OSError), match=message):
    train.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_key_that_nothing_reads_is_refused(tmp_path):
  values = worlds.debug_config(tmp_path).as_dict()
  values['optim']['momentum'] = 0.9
  config = worlds.settings.Settings(values)
  with pytest.raises(ValueError, match=r'nothing reads: optim\.momentum'):
    train.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_soft_labels_are_used_or_refused(tmp_path):
  config = worlds.debug_config(tmp_path)
  worlds.write_pairs(tmp_path, p=0.7)
  with pytest.raises(ValueError, match="loss 'dpo' ignores"):
    train.train(config, tmp_path / 'run')
  config = worlds.debug_config(
    tmp_path,
    'loss=soft,optim=adamw',
    **{'num_steps': 40, 'optim.lr': 1e-2, 'loss.soft.beta': 1.0},
  )
  worlds.write_pairs(tmp_path, p=0.7)
  train.train(config, tmp_path / 'run')
  # The optimum is sigmoid(margin) = p.
  margins = losses_of(tmp_path / 'run', 'train/rewards/margin')[-5:]
  assert abs(np.mean(margins) - math.log(0.7 / 0.3)) < 0.35


def test_weights_scale_the_loss(tmp_path):
  fast = {'optim.lr': 0.0}
  config = worlds.debug_config(tmp_path, **fast)
  train.train(config, tmp_path / 'one')
  config = worlds.debug_config(tmp_path, **fast)
  worlds.write_pairs(tmp_path, weight=0.25)
  train.train(config, tmp_path / 'quarter')
  np.testing.assert_allclose(
    losses_of(tmp_path / 'quarter'),
    0.25 * np.array(losses_of(tmp_path / 'one')),
    rtol=1e-5,
  )


def test_parameters_that_overflow_in_the_last_update_are_not_saved(tmp_path):
  config = worlds.debug_config(
    tmp_path,
    'optim=adamw',
    **{
      'num_steps': 2,
      'optim.lr': 1e39,  # infinite in float32
      'optim.warmup_steps': 0,
      'optim.schedule': 'linear',
      'eval.max_groups': 1,
    },
  )
  with pytest.raises(FloatingPointError, match='param_norm is'):
    train.train(config, tmp_path / 'run')
  assert not list((tmp_path / 'run' / 'checkpoints').glob('[0-9]*'))


def test_a_whole_state_goes_on_in_a_new_workdir(tmp_path):
  changes = {'num_steps': 6, 'optim.lr': 1e-3, 'eval.every': 0}
  changes['checkpoint.every'] = 3
  config = worlds.debug_config(tmp_path, 'optim=adamw', **changes)
  whole = jax.device_get(train.train(config, tmp_path / 'whole'))

  first = worlds.debug_config(
    tmp_path, 'optim=adamw', **changes | {'num_steps': 3}
  )
  train.train(first, tmp_path / 'first')
  config = worlds.debug_config(
    tmp_path, 'optim=adamw', resume=str(tmp_path / 'first'), **changes
  )
  second = jax.device_get(train.train(config, tmp_path / 'second'))
  jax.tree.map(np.testing.assert_array_equal, whole, second)

  other = worlds.debug_config(
    tmp_path, 'loss=ipo_sum', resume=str(tmp_path / 'first'), **changes
  )
  with pytest.raises(ValueError, match=r'loss.dpo|loss.ipo_sum'):
    train.train(other, tmp_path / 'third')
  other = worlds.debug_config(
    tmp_path, 'optim=rmsprop', resume=str(tmp_path / 'first'), **changes
  )
  with pytest.raises(ValueError, match='another optimizer than this config'):
    train.train(other, tmp_path / 'fourth')


def test_data_that_changed_under_a_run_is_refused(tmp_path):
  config = worlds.debug_config(tmp_path, **{'checkpoint.every': 1})
  train.train(config, tmp_path / 'run')
  worlds.write_pairs(tmp_path, number=41)
  config = worlds.settings.Settings(config.as_dict())
  with pytest.raises(ValueError, match='the training data changed'):
    train.train(config, tmp_path / 'run')


def test_a_run_compiles_its_step_at_most_twice_and_before_all(
  tmp_path, capsys, caplog
):
  config = worlds.debug_config(tmp_path, **{'num_steps': 10, 'log_every': 5})
  with jax.log_compiles():
    train.train(config, tmp_path / 'run')
  lines = capsys.readouterr().out.splitlines()
  said = sum(line.startswith('compiled for ') for line in lines)
  first = next(i for i, line in enumerate(lines) if line.startswith('step 0'))
  assert not any(line.startswith('compiled for ') for line in lines[first:])
  told = 'Finished XLA compilation of jit(step)'
  assert 1 <= said <= 2
  assert sum(text.startswith(told) for text in caplog.messages) == said
  records = metrics.read(tmp_path / 'run')
  assert [r['step'] for r in records if 'train/loss' in r] == [5, 10]
