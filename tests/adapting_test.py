"""Training an adapter: what it costs, what it keeps, what it refers to."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import evaluators
from dpo_jax import metrics
from dpo_jax import policies
from dpo_jax import sampling
from dpo_jax import sharding
from dpo_jax import steps
from dpo_jax import train
from dpo_jax import workdirs
from dpo_jax.data import batches
from dpo_jax.models import lora
from dpo_jax.models import transformer
from tests import lora_test
from tests import worlds

LN2 = math.log(2)
FAST = {'optim.lr': 3e-3, 'optim.warmup_steps': 0, 'num_steps': 4}


def losses_of(workdir, name='train/loss'):
  return [r[name] for r in metrics.read(workdir) if name in r]


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
  """Runs of the same seed: {name: (workdir, adapter)}."""
  tmp_path = tmp_path_factory.mktemp('adapted')
  found = {'tmp_path': tmp_path}
  for mode in ('adapter_off', 'frozen', 'cached'):
    config = worlds.debug_config(
      tmp_path, f'adapter=lora,reference={mode}', **FAST
    )
    trained = train.train(config, tmp_path / mode)
    found[mode] = config, tmp_path / mode, jax.device_get(trained)
  return found


def test_the_reference_of_a_new_adapter_is_the_base(adapted):
  config, workdir, _ = adapted['adapter_off']
  auto = worlds.debug_config(adapted['tmp_path'], 'adapter=lora')
  assert auto.reference.mode == config.reference.mode
  losses = losses_of(workdir)
  assert abs(losses[0] - LN2) < 1e-7
  assert abs(losses_of(workdir, 'heldout/loss')[0] - LN2) < 1e-7
  assert losses[-1] < LN2 - 0.01
  for mode in ('frozen', 'cached'):
    np.testing.assert_allclose(losses_of(adapted[mode][1]), losses, atol=1e-5)
    assert abs(losses_of(adapted[mode][1], 'heldout/loss')[0] - LN2) < 1e-7


def test_only_factors_are_trained_and_saved(adapted):
  config, workdir, trained = adapted['adapter_off']
  for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
    assert path[-1].key in 'ab' and np.any(leaf)  # both have moved
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.open_policy(config, mesh, workdir=str(workdir))
  jax.tree.map(np.testing.assert_array_equal, policy.trained, trained)
  step, items = workdirs.restore(workdir, {'params': policy.trained})
  assert step == 4 and set(items) == {'params'}
  _, params, _ = policies.open_model(config.model, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, policy.base, params)


def test_training_goes_on_from_an_adapter_and_refers_to_it(adapted):
  tmp_path = adapted['tmp_path']
  config, first, trained = adapted['adapter_off']
  for mode in ('frozen', 'cached'):
    config = worlds.debug_config(
      tmp_path,
      f'adapter=lora,reference={mode}',
      init=str(first),
      **FAST | {'optim.lr': 0.0},
    )
    workdir = tmp_path / f'after_{mode}'
    after = jax.device_get(train.train(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, after, trained)
    assert all(abs(x - LN2) < 1e-7 for x in losses_of(workdir)), mode


def test_the_reference_is_the_policy_in_bfloat16_at_any_scale(tmp_path):
  odd = {'model.dtype': 'bfloat16', 'adapter.alpha': 24.0}
  first = worlds.debug_config(tmp_path, 'adapter=lora', **FAST, **odd)
  train.train(first, tmp_path / 'first')
  config = worlds.debug_config(
    tmp_path,
    'adapter=lora,reference=frozen',
    init=str(tmp_path / 'first'),
    **FAST | {'optim.lr': 0.0} | odd,
  )
  train.train(config, tmp_path / 'second')
  for name in ('train/loss', 'heldout/loss'):
    losses = losses_of(tmp_path / 'second', name)
    assert all(abs(x - LN2) < 1e-6 for x in losses), name


def refused(tmp_path, message, arg, **changes):
  config = worlds.debug_config(tmp_path, arg, **changes)
  with pytest.raises(ValueError, match=message):
    train.train(config, tmp_path / 'refused')
  assert not (tmp_path / 'refused').exists()


def test_what_an_adapter_cannot_begin_with_is_refused(adapted):
  tmp_path, init = adapted['tmp_path'], str(adapted['adapter_off'][1])
  check = functools.partial(refused, tmp_path)
  check('would not be the policy it begins', 'adapter=lora', init=init)
  check('was trained with adapter', 'loss=dpo', init=init)
  check('it is no run of', 'adapter=lora', init=str(tmp_path / 'nowhere'))
  check(
    "set model.source to it, not to 'debug-gpt2'",
    'adapter=lora,reference=frozen',
    **{'init': init, 'model.source': 'debug-gpt2'},
  )


@pytest.mark.parametrize(
  'arg, changes, message',
  [
    ('reference=adapter_off', {}, 'choose reference=frozen, or adapter=lora'),
    ('adapter=lora,reference=ema', {}, 'set reference.alpha to 1'),
    ('adapter=lora', {'adapter.rank': 0}, 'adapter.rank is 0; use 1 or more'),
    ('adapter=lora', {'adapter.alpha': math.inf}, 'use a positive number'),
    ('adapter=lora', {'adapter.targets': 'q'}, "'q' matches no weight"),
    ('adapter=lora', {'adapter.kind': 'none'}, 'behind the colon'),
    ('', {'adapter.kind': 'laro'}, "did you mean 'lora'"),
  ],
)
def test_bad_settings_name_the_fix(tmp_path, arg, changes, message):
  refused(tmp_path, message, arg or 'loss=dpo', **changes)


def test_a_hard_update_moves_the_adapter_of_the_reference(tmp_path):
  changes = {'reference.alpha': 1.0, 'reference.every': 2}
  config = worlds.debug_config(
    tmp_path, 'adapter=lora,reference=ema', **FAST | changes
  )
  train.train(config, tmp_path / 'run')
  even = [abs(x - LN2) < 1e-6 for x in losses_of(tmp_path / 'run')]
  assert even == [True, False, True, False]


def test_samples_of_an_adapter_equal_those_of_merged_weights():
  config = worlds.LLAMA
  params = worlds.params_of(config)
  adapter = lora_test.random_adapter(config)
  prompts = [np.arange(1, n, dtype=np.int32) for n in (4, 9)]
  samples = [
    sampling.generate(
      config,
      variables,
      prompts,
      key=jax.random.key(0),
      max_new_tokens=6,
      temperature=0,
      top_p=1.0,
      eos_id=50,
      batch_size=2,
    )
    for variables in (
      lora.variables(params, adapter, 2.0),
      {'params': lora.merge(params, adapter, 2.0)},
      {'params': params},
    )
  ]
  np.testing.assert_array_equal(samples[0].tokens, samples[1].tokens)
  assert np.any(samples[0].tokens != samples[2].tokens)
  np.testing.assert_allclose(
    samples[0].token_logps, samples[1].token_logps, atol=1e-5
  )


def test_eight_devices_equal_one():
  config = worlds.LLAMA
  kind = lora_test.make_lora()
  found = []
  for devices, shape in [(1, (1, 1, 1)), (8, (2, 2, 2))]:
    mesh = jax.make_mesh(
      shape,
      sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
      devices=jax.devices()[:devices],
    )
    adapter = lora.init_adapter(config, kind, jax.random.key(0))
    boxed = lora.boxed(config, adapter)
    adapter = jax.device_put(adapter, sharding.parameter_shardings(boxed, mesh))
    base = jax.device_put(worlds.params_of(config), sharding.replicated(mesh))
    tx, schedule = optax.adamw(3e-3), optax.constant_schedule(3e-3)
    sums = worlds.make_sums(config, reference='adapter_off')
    step = jax.jit(
      steps.make_step(sums, tx, schedule, batch_size=16, scale=kind.scale)
    )
    state = steps.init_state(adapter, tx)
    plan = batches.training_plan(
      worlds.make_groups(40),
      seed=0,
      num_steps=5,
      batch_size=16,
      row_length=48,
      multiple=8,
      window=None,
    )
    losses = []
    with sharding.use(mesh):
      for number in range(5):
        batch = evaluators.put_batch(plan, number, mesh)
        state, values = step(state, {'base': base, 'ref': None}, batch)
        losses.append(float(values['loss'][0]))
    found.append((losses, jax.device_get(state.params)))
  assert found[0][0][0] - found[0][0][-1] > 0.01, found
  np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    found[1][1],
    found[0][1],
  )
  assert 'tensor' in state.params['layers']['mlp']['up']['b'].sharding.spec


# --- What a step costs -------------------------------------------------------

# Wide enough for the weights, not the activations, to be what counts.
WIDE = transformer.TransformerConfig(
  vocab_size=2048,
  d_model=512,
  num_layers=2,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  d_ff=2048,
  norm='rms',
  norm_eps=1e-5,
  positions='rotary',
  max_positions=64,
  rope_theta=1e4,
  mlp='swiglu',
  attention_bias=False,
  mlp_bias=False,
  tied=False,
  scan_unroll=2,
)
KIND = lora.Lora(targets='.*', rank=4, alpha=8.0, init='a_zero')


@functools.cache
def compiled(kind, reference, *, chunks=2, **changes):
  """The compiled step, and the bytes of all weights and of what is trained."""
  config = dataclasses.replace(WIDE, **changes)
  params = jax.eval_shape(
    lambda: nn.unbox(transformer.init_params(config, jax.random.key(0)))
  )
  base, trained, scale, ref = None, params, 1.0, None
  if kind is not None:
    base, scale = params, kind.scale
    trained = jax.eval_shape(
      lambda: lora.init_adapter(config, kind, jax.random.key(0))
    )
  elif reference == 'frozen':
    ref = params
  plan = batches.training_plan(
    worlds.make_groups(4, vocab=2048, prompt=1, answer=32),
    seed=0,
    num_steps=1,
    batch_size=4,
    row_length=64,
    multiple=1,
    window=None,
  )
  batch = plan.batch(0)
  rows, scored = batch['target'].shape
  chunk = rows * math.ceil(scored / chunks)
  if reference == 'cached':
    batch['ref_token_logps'] = np.zeros(batch['target'].shape, np.float32)
  sums = worlds.make_sums(config, reference=reference, chunk=chunk)
  tx, schedule = optax.adamw(1e-3), optax.constant_schedule(1e-3)
  step = steps.make_step(sums, tx, schedule, batch_size=4, scale=scale)
  state = steps.State(
    trained,
    jax.eval_shape(tx.init, trained),
    jax.ShapeDtypeStruct((), jnp.int32),
    ref=None,
    memory={},
  )
  lowered = jax.jit(step, donate_argnums=0).lower(
    state, {'base': base, 'ref': ref}, batch
  )
  return lowered.compile(), size_of(params), size_of(trained)


def size_of(tree):
  return sum(x.size * 4 for x in jax.tree.leaves(tree))


def test_no_gradient_and_no_moments_of_the_base_are_kept():
  # What is of one layer is an eighth, and activations are few.
  deep = {'num_layers': 8, 'scan_unroll': 1, 'remat': 'full'}
  full, weights, _ = compiled(None, 'cached', **deep)
  part, _, factors = compiled(KIND, 'cached', **deep)
  full, part = full.memory_analysis(), part.memory_analysis()
  assert factors < 0.05 * weights
  # Weights and two moments of each go in and come out.
  assert full.argument_size_in_bytes > 3 * weights
  assert full.output_size_in_bytes > 3 * weights
  assert part.argument_size_in_bytes < 1.2 * weights
  assert part.output_size_in_bytes < 0.2 * weights
  # Gradients of all weights exist at one time, or of the factors only.
  assert full.temp_size_in_bytes > weights
  assert part.temp_size_in_bytes < 0.3 * weights


def flops(kind, reference):
  """FLOPs of a step by XLA's count, which takes a loop's body once.

  Layers are unrolled; the head's loop over chunks is the difference between
  two numbers of chunks.
  """

  def count(chunks):
    step, _, _ = compiled(kind, reference, chunks=chunks)
    return step.cost_analysis()['flops']

  two, four = count(2), count(4)
  head = (two - four) / (1 / 2 - 1 / 4)
  return two + head / 2


@pytest.mark.parametrize(
  'full, adapter', [('frozen', 'adapter_off'), ('cached', 'cached')]
)
def test_a_step_costs_less_than_three_quarters(full, adapter):
  ratio = flops(KIND, adapter) / flops(None, full)
  assert 0.4 < ratio < 0.75
