"""What is compiled ahead of time is what trains; mistakes are one line."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import ppo as ppo_configs
from configs import preference
from dpo_jax import accounting
from dpo_jax import compilations
from dpo_jax import compile_check
from dpo_jax import logps
from dpo_jax import policies
from dpo_jax import ppo
from dpo_jax import programs
from dpo_jax import rollouts
from dpo_jax import sampling
from dpo_jax import settings
from dpo_jax import sharding
from dpo_jax import topologies
from dpo_jax import train
from dpo_jax import updates
from dpo_jax.models import presets
from tests import main_test
from tests import worlds

GIB = 2**30


@pytest.fixture
def cpu_slice(monkeypatch):
  """v5e-8 is the eight CPU devices, and needs no compiler for TPUs."""
  monkeypatch.setattr(topologies, 'devices', lambda _: jax.devices())

  def compile_here(lowered, chip):
    del chip
    return compile_check.Compiled(lowered.compile().as_text(), GIB, 1.0)

  monkeypatch.setattr(compile_check, 'compile_for_tpu', compile_here)


@pytest.fixture
def lowered(monkeypatch):
  """Texts of all steps that are lowered, before any compiler saw them."""
  texts, make = [], updates.make

  class Recorded:
    def __init__(self, step):
      self._step = step

    def lower(self, *args):
      out = self._step.lower(*args)
      texts.append(out.as_text())
      return out

  def recorded(*args, **keywords):
    update = make(*args, **keywords)
    return update._replace(step=Recorded(update.step))

  monkeypatch.setattr(updates, 'make', recorded)
  return texts


def even_pairs(tmp_path):
  """Pairs of 12 prompt, 4 chosen and 6 rejected bytes; each of these ends."""
  return worlds.write_rows(
    tmp_path,
    [
      {'prompt': f'question {i}: ', 'chosen': 'aeio', 'rejected': 'bcdfgh'}
      for i in range(10, 30)
    ],
  )


def config_of(tmp_path, arg='', **changes):
  """A debug config, on `even_pairs`, that computes as a CPU would."""
  config = preference.get_config(f'data=jsonl,debug{arg}')
  config.data.source = str(even_pairs(tmp_path))
  config.data.cache_dir = str(tmp_path / 'data')
  config.data.row_length = 128
  config.model.dtype = 'float32'
  config.eval.samples.num_prompts = 0
  config.update_from_flattened_dict(changes)
  return settings.Settings(config.to_dict())


@pytest.mark.parametrize(
  'arg, changes',
  [
    ('', {'mesh.data': 2, 'mesh.fsdp': 4}),
    (',adapter=lora', {}),
    (',reference=ema,optim=adamw', {'accumulate': 2, 'batch_size': 16}),
  ],
)
def test_the_step_compiled_ahead_is_the_one_that_trains(
  tmp_path, cpu_slice, lowered, arg, changes
):
  del cpu_slice
  config = config_of(tmp_path, arg, **changes)
  train.train(config, tmp_path / 'run')
  config = config_of(tmp_path, arg, **changes)
  compilations.prove(config, 'v5e-8', lengths=(13, 5, 7))
  trained, proven = lowered
  assert trained == proven


def ppo_config_of(arg='', **changes):
  """A debug config of PPO that computes as a CPU would."""
  config = ppo_configs.get_config(f'debug{arg}')
  config.data.max_prompt_tokens = 12
  config.model.dtype = 'float32'
  config.eval.samples.num_prompts = 0
  config.num_steps = 1
  config.update_from_flattened_dict(changes)
  return settings.Settings(config.to_dict())


class EnoughError(Exception):
  """All programs of a loop have been lowered."""


class Lowered:
  """A jitted function that is lowered, not run: what it gives are ones."""

  def __init__(self, function, texts, name):
    self._function, self._texts, self._name = function, texts, name

  def __call__(self, *args, **keywords):
    lowered = self._function.lower(*args, **keywords)
    self._texts[self._name] = lowered.as_text()
    if self._name == 'update':
      raise EnoughError
    return jax.tree.map(lambda x: np.ones(x.shape, x.dtype), lowered.out_info)


def lowered_by_ppo(config, workdir):
  """Returns {name: text} of the programs that `ppo.run` calls."""
  texts, make_update = {}, updates.make
  make_observe = rollouts.make_observe_step

  def observe(*args, **keywords):
    return Lowered(make_observe(*args, **keywords), texts, 'observe')

  def update(*args, **keywords):
    made = make_update(*args, **keywords)
    return made._replace(step=Lowered(made.step, texts, 'update'))

  with pytest.MonkeyPatch.context() as patch, pytest.raises(EnoughError):
    generate = Lowered(sampling._generate, texts, 'sampling')
    patch.setattr(sampling, '_generate', generate)
    patch.setattr(rollouts, 'make_observe_step', observe)
    patch.setattr(updates, 'make', update)
    ppo.run(config, workdir)
  return texts


@pytest.mark.parametrize(
  'arg, changes',
  [('', {}), (',adapter=lora', {'accumulate': 2, 'batch_size': 16})],
)
def test_the_programs_of_ppo_compiled_ahead_are_those_that_run(
  tmp_path, arg, changes
):
  changes = changes | {'mesh.data': 2, 'mesh.fsdp': 4}
  changes |= {'reward.normalize': 'none'}  # all samples will be the same
  ran = lowered_by_ppo(ppo_config_of(arg, **changes), tmp_path / 'run')
  config = ppo_config_of(arg, **changes)
  loop = programs.of_config(config, sharding.make_mesh(**config.mesh))
  proven = {p.name: p.lower().as_text() for p in loop.programs}
  assert list(proven) == ['sampling', 'observe', 'update']
  for name, text in proven.items():
    # An axis of one device is named, or not.
    both = [x.replace('{"tensor"}', '{}') for x in (text, ran[name])]
    assert both[0] == both[1], name


def test_a_proof_adds_up(tmp_path, cpu_slice):
  del cpu_slice
  config = config_of(
    tmp_path, **{'mesh.data': 1, 'mesh.fsdp': 8, 'optim.name': 'rmsprop'}
  )
  proof = compilations.prove(config, 'v5e-8', lengths=(13, 7))
  (step,) = proof.programs
  # Master weights and one moment, whole and in eight parts; a float32 copy.
  parameters = size_of(config)
  assert step.place['trained'] == 4 * parameters / 8
  assert step.place['reference'] == 4 * parameters / 8
  assert step.place['optimizer'] == pytest.approx(4 * parameters / 8, rel=1e-3)
  assert step.needed == proof.needed == GIB
  work = accounting.Work(8 * 27, 8 * 14, 0, 0)
  least = accounting.step_flops(presets.DEBUG['debug-llama'], work, live=True)
  assert least < step.useful < 1.2 * least
  assert step.flops > step.useful / 8
  # Of the loops that the data ends, those of the head are known.
  assert not any(logps.SCOPE in name for name in step.account.unknown)
  assert proof.lengths == (13, 7, 7) and proof.groups == 8
  assert {'all-gather', 'all-reduce'} & set(step.account.collectives)
  seconds = step.estimate
  assert seconds.roofline <= seconds.at_best <= seconds.at_worst
  assert proof.seconds == (seconds.at_best, seconds.at_worst)
  assert step.mfu(step.useful / 8 / 197e12) == pytest.approx(1.0)
  step.account.unknown.add('jit(step)/riddle/while')
  text = str(proof)
  assert 'how often a loop of jit(step)/riddle/while turns' in text
  assert 'v5e:2x4 (v5e-8, 8 chips), mesh data 1 x fsdp 8 x tensor 1' in text
  assert '8 groups of 13 prompt and 7, 7 response tokens' in text


def size_of(config):
  """Parameters of a config's model, without a head."""
  mesh = jax.make_mesh((1, 1, 1), ('data', 'fsdp', 'tensor'))
  trained = policies.abstract_policy(config, mesh).trained
  return sum(x.size for x in jax.tree.leaves(trained))


def test_a_proof_of_ppo_adds_up(cpu_slice):
  del cpu_slice
  changes = {'mesh.data': 1, 'mesh.fsdp': 8, 'rollout.batch_size': 8}
  changes |= {'rollout.size': 32, 'reward.name': 'model:runs/rm'}
  config = ppo_config_of(**changes)
  proof = compilations.prove(config, 'v5e-8', lengths=(12, 5))
  sampling_, observe, update = proof.programs
  # Weights and two moments, whole and in eight parts; a float32 copy of them.
  share = 4 * size_of(config) / 8
  sizes = {'trained': 1, 'optimizer': 2, 'reference': 1, 'reward model': 1}
  for program in proof.programs:
    for name, copies in sizes.items():
      assert program.place[name] == pytest.approx(copies * share, rel=2e-3)
  # What the compiler says, and what lies there besides: samples are computed
  # with a copy that is whole.
  assert 8 * share < sampling_.place['copies'] < 16 * share  # and layers apart
  assert sampling_.needed - GIB == pytest.approx(5 * share, rel=2e-3)
  assert observe.needed - GIB == pytest.approx(3 * share, rel=2e-3)
  assert update.needed - GIB == pytest.approx(2 * share, rel=2e-3)
  assert proof.needed == sampling_.needed
  assert [program.times for program in proof.programs] == [4, 4, 16]
  assert observe.useful == 2 * sampling_.useful
  assert update.useful == 3 * sampling_.useful
  for program in proof.programs:
    assert program.flops > program.useful / 8, program.name
    assert not program.account.unknown, program.name
  for n in range(2):
    assert proof.seconds[n] == pytest.approx(
      sum(
        p.times * (p.estimate.at_best, p.estimate.at_worst)[n]
        for p in proof.programs
      )
    )
  text = str(proof)
  for line in (
    'sampling: 8 samples of 12 prompt tokens in 16 slots, 5 new tokens each',
    'update: 8 samples of 12 prompt and 5 response tokens in 8 rows of 20',
    'a step of 32 samples',
    ' s of 16 runs',
  ):
    assert line in text
  assert text.count('memory of a chip') == 4


def test_weights_are_gathered_before_sampling_where_they_fit(
  cpu_slice, monkeypatch
):
  """Once, or, where copies take too much of a device, for every token."""
  del cpu_slice
  changes = {'mesh.data': 1, 'mesh.fsdp': 8, 'rollout.batch_size': 8}
  config = ppo_config_of(**changes)
  # No embeddings: of them rows are gathered, not the table.
  whole = 4 * size_of(config) - 4 * 2 * 64 * 512

  def gathered(config):
    sampling_ = compilations.prove(config, 'v5e-8', lengths=(12, 5)).programs[0]
    found = sampling_.account.collectives.get('all-gather')
    return found.payload if found else 0

  assert gathered(config) < 0.1 * whole
  # A quarter of it is less than a copy.
  monkeypatch.setattr(topologies, 'memory', lambda _: 9 * size_of(config))
  assert gathered(config) > 4 * whole
  config = ppo_config_of(**changes | {'model.gather_share': 1.0})
  assert gathered(config) < 0.1 * whole
  monkeypatch.setattr(topologies, 'memory', lambda _: None)
  config = ppo_config_of(**changes | {'model.gather_share': 0.0})
  assert gathered(config) > 4 * whole


def test_what_fits_alone_may_not_fit_beside_the_rest(cpu_slice, monkeypatch):
  del cpu_slice
  usable = topologies.CHIPS['v5e'].usable

  def full(lowered, chip):
    del lowered, chip
    return compile_check.Compiled('', usable, 1.0)

  monkeypatch.setattr(compile_check, 'compile_for_tpu', full)
  with pytest.raises(compile_check.DoesNotFitError) as error:
    compilations.prove(ppo_config_of(), 'v5e-8')
  assert error.value.needed > usable
  for part in (
    'on v5e:2x4 the sampling needs 15.7',
    'of arguments and what lies beside, in GiB',
    'rollout.batch_size=32',
  ):
    assert part in str(error.value)
  assert 'reference=cached' not in str(error.value)  # PPO has none


def test_what_does_not_fit_says_by_how_much_and_what_helps(
  tmp_path, cpu_slice, monkeypatch
):
  del cpu_slice

  def too_large(lowered, chip):
    del lowered
    raise compile_check.DoesNotFitError(
      chip.usable + 2 * GIB, chip.usable, 'the step needs 17.75 GiB'
    )

  monkeypatch.setattr(compile_check, 'compile_for_tpu', too_large)
  with pytest.raises(compile_check.DoesNotFitError) as error:
    compilations.prove(config_of(tmp_path), 'v5e-8', lengths=(13, 7))
  for part in (
    'on v5e:2x4 the step needs 17.75 GiB of a chip that has 15.75: 2.00 GiB'
    ' too much',
    'mesh.data=1 mesh.fsdp=-1',
    'model.remat=dots',
    'accumulate=2',
    'reference=cached',
    'adapter=lora',
    'a larger slice',
  ):
    assert part in str(error.value)
  turned = {
    'mesh.data': 1,
    'mesh.fsdp': 8,
    'model.remat': 'full',
    'logps_chunk': 512,
  }
  config = config_of(tmp_path, ',reference=cached', **turned)
  with pytest.raises(compile_check.DoesNotFitError) as error:
    compilations.prove(config, 'v5e-8', lengths=(13, 7))
  for part in ('mesh.data', 'model.remat', 'reference=cached'):
    assert part not in str(error.value)
  assert 'logps_chunk=256' in str(error.value)


def test_a_compiler_that_reports_no_memory_is_one_clear_line(monkeypatch):
  monkeypatch.setattr(compile_check, '_reported', lambda _: None)
  lowered = jax.jit(lambda x: x + 1).lower(1.0)
  with pytest.raises(ValueError, match='no report of the memory') as error:
    compile_check.compile_for_tpu(lowered, topologies.CHIPS['v5e'])
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes, lengths, message',
  [
    ({'mesh.data': 16}, (), 'has 16 places for 8 devices'),
    ({'batch_size': 12}, (), 'batch_size 12 is not divisible'),
    ({'mesh.data': 2, 'mesh.tensor': 4}, (), 'takes mesh.tensor=1 only'),
    ({'mesh.data': 2, 'mesh.fsdp': 4, 'accumulate': 3}, (), 'micro-batches'),
    ({}, (4, 4, 4, 4), 'a group of pairs has a prompt and 2 responses'),
    ({}, (100, 100), 'data.row_length is 128'),
  ],
)
def test_what_no_slice_can_hold_is_refused(
  tmp_path, cpu_slice, changes, lengths, message
):
  del cpu_slice
  config = config_of(tmp_path, **changes)
  with pytest.raises(ValueError, match=message) as error:
    compilations.prove(config, 'v5e-8', lengths=lengths)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes, lengths, message',
  [
    ({'rollout.size': 12}, (), 'rollout.size 12 is not a multiple'),
    ({'batch_size': 4, 'mesh.data': 8}, (), 'batch_size 4 is not divisible'),
    ({}, (4, 4, 4), 'a sample has a prompt and one response'),
    ({}, (4, 9), 'at most data.max_response_tokens 8'),
    ({'reward.name': ''}, (), 'reward.name is empty'),
    (
      {'model.source': 'debug-gpt2', 'data.max_prompt_tokens': 9999},
      (),
      'positions; shorten the prompt',
    ),
  ],
)
def test_what_ppo_cannot_run_is_refused(cpu_slice, changes, lengths, message):
  del cpu_slice
  config = ppo_config_of(**changes)
  with pytest.raises(ValueError, match=message) as error:
    compilations.prove(config, 'v5e-8', lengths=lengths)
  assert '\n' not in str(error.value)


def test_shapes_are_known_without_weights(tmp_path):
  assert policies.model_shape('random:gpt2') == presets.MODELS['gpt2']
  assert policies.model_shape('debug-gpt2') == presets.DEBUG['debug-gpt2']
  for name, source in presets.SOURCES.items():
    assert policies.model_shape(source) == presets.MODELS[name]
  pinned = 'hf:meta-llama/Llama-2-7b-hf@main'
  assert policies.model_shape(pinned) == presets.MODELS['llama2-7b']
  folder = tmp_path / 'shape'
  folder.mkdir()
  (folder / 'config.json').write_text(
    '{"model_type": "llama", "vocab_size": 8, "hidden_size": 8,'
    ' "num_hidden_layers": 1, "num_attention_heads": 2,'
    ' "intermediate_size": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,'
    ' "max_position_embeddings": 16, "tie_word_embeddings": true}'
  )
  assert policies.model_shape(folder).d_model == 8


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], 'add --topology='),
    (['--topology=v5e-9'], "no topology 'v5e-9'"),
    (['--topology=v5e-8', '--lengths=a'], '--lengths are numbers'),
    (['--topology=v5e-8'], 'libtpu'),
  ],
)
def test_mistakes_of_the_verb_end_in_one_clear_line(
  tmp_path, arguments, message
):
  if message == 'libtpu':  # one that is too old stands before any other
    info = tmp_path / 'libtpu-0.0.1.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(
      'Metadata-Version: 2.1\nName: libtpu\nVersion: 0.0.1\n'
    )
    message = 'libtpu 0.0.1 is installed, but this JAX was made for'
  path = f'{tmp_path}{os.pathsep}{main_test.ROOT}'
  result = subprocess.run(
    [sys.executable, '-m', 'dpo_jax.main', 'compile', *arguments]
    + ['--config=configs/preference.py:data=jsonl,debug'],
    capture_output=True,
    text=True,
    cwd=main_test.ROOT,
    env=os.environ | {'PYTHONPATH': path},
    check=False,
  )
  assert result.returncode != 0
  assert message in result.stderr, result.stderr
  assert 'Traceback' not in result.stderr


@pytest.mark.slow
def test_a_step_compiles_for_a_tpu_that_is_not_there(tmp_path):
  pytest.importorskip('libtpu', reason='no TPU compiler')
  changes = {'mesh.data': 2, 'mesh.fsdp': 4, 'data.row_length': 256}
  config = config_of(tmp_path, **changes, **{'model.dtype': 'bfloat16'})
  proof = compilations.prove(config, 'v5e-8', lengths=(100, 50))
  (step,) = proof.programs
  layers = 2
  # Forward of policy and reference, once for each backward kernel.
  assert step.account.kernels == {
    'interval_attention': 2 * layers,
    'interval_attention_dquery': layers,
    'interval_attention_dkey': layers,
  }
  assert 0 < step.kernel_flops < step.flops
  assert sum(step.place.values()) < step.needed < 0.1 * GIB
  assert step.account.cycles > 0 and not step.account.unknown
  assert {'all-gather', 'all-reduce'} <= set(step.account.collectives)


@pytest.mark.slow
def test_ppo_compiles_for_a_tpu_that_is_not_there():
  pytest.importorskip('libtpu', reason='no TPU compiler')
  changes = {'mesh.data': 2, 'mesh.fsdp': 4, 'model.dtype': 'bfloat16'}
  changes |= {'data.max_prompt_tokens': 130}
  proof = compilations.prove(ppo_config_of(**changes), 'v5e-8')
  sampling_, observe, update = proof.programs
  layers = 2
  # Of prompts alone; of policy and reference; of the policy, with gradients.
  assert sampling_.account.kernels == {'interval_attention': layers}
  assert observe.account.kernels == {'interval_attention': 2 * layers}
  assert update.account.kernels['interval_attention_dkey'] == layers
  for program in proof.programs:
    assert sum(program.place.values()) < program.needed < 0.1 * GIB
    assert program.account.cycles > 0 and not program.account.unknown
    assert program.flops > program.kernel_flops > 0


@pytest.mark.slow
def test_a_model_too_large_for_a_slice_is_refused_by_the_compiler():
  pytest.importorskip('libtpu', reason='no TPU compiler')
  config = preference.get_config('data=hh,model=llama2-7b')
  config.mesh.data, config.mesh.fsdp = 1, 8
  config.batch_size = 8
  with pytest.raises(compile_check.DoesNotFitError, match='GiB too much'):
    compilations.prove(settings.Settings(config.to_dict()), 'v5e-8')
