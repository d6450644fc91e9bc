"""An adapter of PEFT gives PEFT's logits here, ours its logits there."""

import importlib
import json
import math
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import adapters
from dpo_jax import folders
from dpo_jax import weights
from dpo_jax.models import families
from dpo_jax.models import lora
from dpo_jax.models import pefts
from dpo_jax.models import transformer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
FOLDERS = sorted(path.parent for path in GOLDEN.glob('adapters/*/logits.npz'))
MODELS = sorted(path.parent.name for path in GOLDEN.glob('*/logits.npz'))
ALL = lora.Lora(targets='.*', rank=2, alpha=3.0, init='a_zero')

every_folder = pytest.mark.parametrize('path', FOLDERS, ids=lambda p: p.name)
every_model = pytest.mark.parametrize('name', MODELS)


@pytest.fixture(scope='module')
def exporting():
  """The script tests/golden/export_adapters.py as a module."""
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(GOLDEN)
    yield importlib.import_module('export_adapters')


@pytest.fixture
def folder(tmp_path):
  """A copy of PEFT's adapter on every weight of llama_untied."""
  return shutil.copytree(GOLDEN / 'adapters' / 'llama_all', tmp_path / 'copy')


def model(name):
  attributes = json.loads((GOLDEN / name / 'config.json').read_text())
  return (
    families.config_from_hf(attributes),
    families.family_of(attributes['model_type']),
  )


def attributes_of(path):
  return json.loads((path / 'adapter_config.json').read_text())


def tensors_of(path):
  return safetensors.numpy.load_file(path / 'adapter_model.safetensors')


def change(path, **changes):
  attributes = attributes_of(path) | changes
  (path / 'adapter_config.json').write_text(json.dumps(attributes))


def change_tensors(path, tensors):
  safetensors.numpy.save_file(tensors, path / 'adapter_model.safetensors')


def load(path, name=None):
  config, family = model(name or attributes_of(path)['base_model_name_or_path'])
  return adapters.load(path, config, family=family)


def save(path, adapter, kind, name, **options):
  config, family = model(name)
  adapters.save(
    path, adapter, kind, config, family=family, base=name, **options
  )


def logits_of(config, variables, ids_BT):
  B, T = ids_BT.shape
  slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  with jax.default_matmul_precision('highest'):
    hidden_BTD = transformer.Transformer(config).apply(
      variables, ids_BT, slots_BT, jnp.zeros_like(slots_BT), slots_BT + 1
    )
    unembed_VD = transformer.unembedding(variables['params'])
    return np.asarray(jnp.einsum('BTD,VD->BTV', hidden_BTD, unembed_VD))


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape, path
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def changes_of(config, adapter, scale):
  """What an adapter adds to weights of zeros."""
  shapes = nn.unbox(
    jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
  )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  return lora.merge(zeros, adapter, scale)


# --- Numbers of others ---


def test_golden_adapters_are_of_all_kinds():
  names = {path.name for path in FOLDERS}
  assert len(names) == 10
  assert names >= {'llama_all', 'gpt2_all', 'pythia_all', 'ours_gpt2'}


@every_folder
def test_logits_equal_those_of_peft(path):
  name = attributes_of(path)['base_model_name_or_path']
  params = weights.load(GOLDEN / name).params
  config, _ = model(name)
  adapter, kind = load(path)
  golden = np.load(path / 'logits.npz')
  close = dict(rtol=0, atol=2e-5)
  adapted = logits_of(
    config, lora.variables(params, adapter, kind.scale), golden['input_ids']
  )
  np.testing.assert_allclose(adapted, golden['logits'], **close)
  merged = logits_of(
    config,
    {'params': lora.merge(params, adapter, kind.scale)},
    golden['input_ids'],
  )
  np.testing.assert_allclose(merged, golden['merged'], **close)
  plain = logits_of(config, {'params': params}, golden['input_ids'])
  assert np.std(plain - golden['logits']) > 0.2


@pytest.mark.parametrize('name', ['ours_llama', 'ours_gpt2', 'ours_pythia'])
def test_peft_read_what_we_export_now(exporting, tmp_path, name):
  """And gave the logits that our adapter gives, before it was tied."""
  path = GOLDEN / 'adapters' / name
  adapter, kind = exporting.export(name, tmp_path / name)
  assert attributes_of(tmp_path / name) == attributes_of(path)
  assert_same_bits(tensors_of(tmp_path / name), tensors_of(path))
  base = attributes_of(path)['base_model_name_or_path']
  golden = np.load(path / 'logits.npz')
  logits = logits_of(
    model(base)[0],
    lora.variables(weights.load(GOLDEN / base).params, adapter, kind.scale),
    golden['input_ids'],
  )
  np.testing.assert_allclose(logits, golden['logits'], rtol=0, atol=2e-5)


# --- Round trips ---


@every_folder
def test_what_was_imported_is_exported_bit_for_bit(path, tmp_path):
  """Of fused weights too: the one A comes back as one."""
  adapter, kind = load(path)
  base = attributes_of(path)['base_model_name_or_path']
  save(tmp_path / 'again', adapter, kind, base)
  content, again = (
    (place / 'adapter_model.safetensors').read_bytes()
    for place in (path, tmp_path / 'again')
  )
  assert again == content
  loaded, its_kind = load(tmp_path / 'again')
  assert_same_bits(loaded, adapter)
  assert its_kind == kind


@every_model
def test_what_was_exported_is_imported(exporting, tmp_path, name):
  """Bit for bit where no weight is fused, else with the same products."""
  config, family = model(name)
  adapter = exporting.random_adapter(config, ALL, {'v': 3}, seed=1)
  save(tmp_path / 'x', adapter, ALL, name)
  loaded, kind = load(tmp_path / 'x')
  assert kind.scale == ALL.scale and kind.rank == ALL.rank
  linears = pefts.linears(config, family=family)
  assert len(ALL.names(adapter['layers'])) == sum(len(x.names) for x in linears)
  fused = {name for x in linears if len(x.names) > 1 for name in x.names}
  assert bool(fused) == (name in ('gpt2', 'pythia', 'pythia_serial'))
  for group, pairs in adapter['layers'].items():
    for last, pair in pairs.items():
      its = loaded['layers'][group][last]
      if f'{group}/{last}' in fused:
        assert its['a'].shape[-1] == 2 + 2 + 3
      else:
        assert_same_bits(its, pair)
  for wanted, got in zip(
    jax.tree.leaves(changes_of(config, adapter, ALL.scale)),
    jax.tree.leaves(changes_of(config, loaded, kind.scale)),
    strict=True,
  ):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_the_models_are_of_all_families():
  types = {
    json.loads((GOLDEN / name / 'config.json').read_text())['model_type']
    for name in MODELS
  }
  assert types == set(families.FAMILIES)


@pytest.mark.parametrize('name', ['gpt2', 'pythia'])
def test_fused_weights_of_one_a_keep_their_rank(exporting, tmp_path, name):
  config, _ = model(name)
  adapter = exporting.random_adapter(config, ALL, {})
  attention = adapter['layers']['attention']
  for last in 'qkv':
    attention[last]['a'] = np.zeros_like(attention[last]['a'])
  save(tmp_path / 'x', adapter, ALL, name)
  loaded, kind = load(tmp_path / 'x')
  assert attributes_of(tmp_path / 'x')['rank_pattern'] == {}
  assert_same_bits(loaded, adapter)
  assert kind.rank == 2
  # A zero of the other sign is another number.
  attention['k']['a'] = -attention['k']['a']
  save(tmp_path / 'y', adapter, ALL, name)
  assert [*attributes_of(tmp_path / 'y')['rank_pattern'].values()] == [6]


def test_fused_weights_without_an_adapter_get_zeros(exporting, tmp_path):
  config, _ = model('pythia')
  kind = lora.Lora(targets='attention/k', rank=2, alpha=3.0, init='a_zero')
  adapter = exporting.random_adapter(config, kind, {})
  save(tmp_path / 'x', adapter, kind, 'pythia')
  loaded, its_kind = load(tmp_path / 'x')
  assert its_kind.targets == 'attention/q|attention/k|attention/v'
  attention = loaded['layers']['attention']
  assert_same_bits(attention['k'], adapter['layers']['attention']['k'])
  assert not attention['q']['b'].any() and not attention['v']['b'].any()


def test_bfloat16_is_loaded_and_saved_as_float32(folder, tmp_path):
  tensors = {
    name: tensor.astype(ml_dtypes.bfloat16)
    for name, tensor in tensors_of(folder).items()
  }
  change_tensors(folder, tensors)
  adapter, kind = load(folder)
  halves = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), adapter)
  save(tmp_path / 'x', halves, kind, 'llama_untied')
  for name, tensor in tensors_of(tmp_path / 'x').items():
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32))


# --- Names ---


def test_layouts_follow_from_the_key_table():
  found = {
    linear.module: (linear.a, linear.b, linear.inputs_first)
    for name in ('llama_tied', 'gpt2', 'pythia')
    for linear in pefts.linears(*model(name)[:1], family=model(name)[1])
  }
  layer = 'model.layers.{}'
  assert found[f'{layer}.self_attn.k_proj'] == ('RD->DR', '(KH)R->RKH', False)
  assert found[f'{layer}.self_attn.o_proj'] == ('R(NH)->NHR', 'DR->RD', False)
  assert found[f'{layer}.mlp.down_proj'] == ('RF->FR', 'DR->RD', False)
  layer = 'transformer.h.{}'
  assert found[f'{layer}.attn.c_attn'] == ('RD->DR', '(CNH)R->CRNH', True)
  assert found[f'{layer}.attn.c_proj'] == ('R(NH)->NHR', 'DR->RD', True)
  assert found[f'{layer}.mlp.c_proj'] == ('RF->FR', 'DR->RD', True)
  layer = 'gpt_neox.layers.{}.attention'
  assert found[f'{layer}.query_key_value'] == ('RD->DR', '(NCH)R->CRNH', False)
  assert len(found) == 7 + 4 + 4


@pytest.mark.parametrize(
  'targets, modules',
  [
    ('attention/out', ['attn.c_proj']),
    ('mlp/.*|attention/q', ['c_attn', 'c_fc', 'mlp.c_proj']),
    ('.*', ['c_attn', 'c_fc', 'c_proj']),
  ],
)
def test_targets_are_short_where_they_are_clear(
  exporting, tmp_path, targets, modules
):
  config, _ = model('gpt2')
  kind = lora.Lora(targets=targets, rank=2, alpha=3.5, init='a_zero')
  save(
    tmp_path / 'x',
    exporting.random_adapter(config, kind, {}),
    kind,
    'gpt2',
  )
  attributes = attributes_of(tmp_path / 'x')
  assert attributes['target_modules'] == modules
  assert attributes['fan_in_fan_out'] is True
  assert attributes['lora_alpha'] == 3.5
  assert load(tmp_path / 'x')[1].alpha == 3.5


def test_targets_are_those_of_peft():
  assert load(GOLDEN / 'adapters' / 'llama_all')[1] == lora.Lora(
    targets='attention/q|attention/k|attention/v|attention/out|mlp/gate|mlp/up'
    '|mlp/down',
    rank=3,
    alpha=5.0,
    init='b_zero',
  )
  adapter, kind = load(GOLDEN / 'adapters' / 'llama_rslora')
  assert kind.targets == 'attention/out|mlp/gate'
  assert kind.scale == pytest.approx(5 / math.sqrt(3))
  adapter, kind = load(GOLDEN / 'adapters' / 'llama_ranks')
  assert (kind.rank, kind.alpha) == (3, 5.0)
  assert adapter['layers']['attention']['v']['a'].shape == (2, 20, 6)


def test_the_first_pattern_counts_and_the_default_need_not(tmp_path):
  path = shutil.copytree(GOLDEN / 'adapters' / 'llama_ranks', tmp_path / 'x')
  adapter, kind = load(path)
  change(
    path,
    r=7,
    lora_alpha=1,
    rank_pattern={'v_proj': 6, '.*': 3},
    alpha_pattern={'v_proj': 10, '.*': 5},
  )
  again, its_kind = load(path)
  assert_same_bits(again, adapter)
  assert its_kind.rank == 7
  assert its_kind.scale == pytest.approx(kind.scale, rel=1e-12)


# --- Bad input ---


@pytest.mark.parametrize(
  'changes, reason',
  [
    ({'peft_type': 'LOHA'}, "peft_type = 'LOHA'"),
    ({'task_type': 'SEQ_CLS'}, "task_type = 'SEQ_CLS'"),
    ({'bias': 'lora_only'}, "bias = 'lora_only'"),
    ({'use_dora': True}, 'use_dora = True'),
    ({'lora_bias': True}, 'lora_bias = True'),
    ({'modules_to_save': ['lm_head']}, r"modules_to_save = \['lm_head'\]"),
    ({'layers_to_transform': [0]}, r'layers_to_transform = \[0\]'),
    ({'layers_to_transform': 0}, r'layers_to_transform = 0'),
    ({'layer_replication': [[0, 2]]}, 'layer_replication'),
    ({'init_lora_weights': 'pissa'}, "init_lora_weights = 'pissa'"),
    ({'init_lora_weights': 'pissa_niter_4'}, 'pissa_niter_4'),
    ({'init_lora_weights': 'loftq'}, "init_lora_weights = 'loftq'"),
    ({'trainable_token_indices': [1]}, 'trainable_token_indices'),
    ({'alora_invocation_tokens': [1]}, 'alora_invocation_tokens'),
    ({'wings': 2}, r'wings = 2 \(unknown\)'),
    ({'r': 0}, r'r = 0 \(not a positive integer\)'),
    ({'r': True}, 'r = True'),
    ({'lora_alpha': None}, r'lora_alpha = None \(not a positive number\)'),
    ({'rank_pattern': {'(': 4}}, 'rank_pattern'),
    ({'alpha_pattern': {'q_proj': '4'}}, 'alpha_pattern'),
    ({'use_rslora': 'yes'}, "use_rslora = 'yes'"),
    ({'target_modules': None}, 'target_modules = None'),
    ({'target_modules': ['c_attn']}, 'matches none of self_attn.q_proj, '),
    ({'target_modules': ['proj']}, 'matches none of'),
    ({'target_modules': 'q_proj'}, 'matches none of'),
    ({'rank_pattern': {'v_proj': 6}}, r'alpha / rank is 0.8.* and 1.6'),
    (
      {'rank_pattern': {r'1\.self_attn\.q_proj': 6}},
      r'rank_pattern gives self_attn.q_proj the ranks \[3, 6\]',
    ),
    (
      {'target_modules': ['model.layers.1.mlp.up_proj', 'q_proj']},
      '1 of 2 layers of mlp.up_proj',
    ),
  ],
)
def test_attributes_we_do_not_implement_are_refused(folder, changes, reason):
  change(folder, **changes)
  with pytest.raises(ValueError, match=reason) as error:
    load(folder, 'llama_untied')
  assert str(error.value).startswith(str(folder))


def test_all_refused_attributes_are_in_one_error(folder):
  attributes = attributes_of(folder) | {'use_dora': True, 'wings': 2}
  del attributes['peft_type']
  (folder / 'adapter_config.json').write_text(json.dumps(attributes))
  with pytest.raises(ValueError) as error:
    load(folder)
  for part in ('use_dora', 'wings', 'peft_type is missing'):
    assert part in str(error.value)


@pytest.mark.parametrize(
  'changes',
  [
    {'lora_dropout': 0.1, 'fan_in_fan_out': True, 'revision': 'main'},
    {'init_lora_weights': 'gaussian', 'task_type': None},
    {'wings': None},
    {'target_modules': 'all-linear'},
    {'target_modules': r'.*_proj'},
    {
      'target_modules': 'c_attn q_proj k_proj v_proj o_proj gate_proj up_proj'
      ' down_proj'.split()
    },
  ],
)
def test_harmless_attributes_change_nothing(folder, changes):
  adapter, kind = load(folder)
  change(folder, **changes)
  again, its_kind = load(folder)
  assert_same_bits(again, adapter)
  assert its_kind == kind


def test_excluded_modules_are_not_adapted(folder):
  change(folder, exclude_modules=['q_proj'])
  with pytest.raises(ValueError, match=r'extra: .*q_proj.lora_A'):
    load(folder)
  tensors = tensors_of(folder)
  change_tensors(folder, {k: v for k, v in tensors.items() if '.q_' not in k})
  adapter, _ = load(folder)
  assert 'q' not in adapter['layers']['attention']


def test_all_tensors_that_do_not_fit_are_in_one_error(folder):
  start = 'base_model.model.'
  tensors = tensors_of(folder)
  del tensors[f'{start}model.layers.0.mlp.up_proj.lora_B.weight']
  name = f'{start}model.layers.1.self_attn.k_proj.lora_A.weight'
  tensors[name] = tensors[name][:2]
  tensors[f'{start}lm_head.lora_A.weight'] = np.ones((3, 20), np.float32)
  embed = f'{start}model.embed_tokens.lora_embedding_A'
  tensors[embed] = np.ones((3, 67), np.float32)
  change_tensors(folder, tensors)
  with pytest.raises(ValueError) as error:
    load(folder)
  for part in (
    f'{folder}: 4 tensors',
    f'missing: {start}model.layers.0.mlp.up_proj.lora_B.weight (28, 3)',
    f'misshapen: {name} is (2, 20), the config says (3, 20)',
    f'extra: {start}lm_head.lora_A.weight (3, 20)',
    f'extra: {embed} (3, 67)',
  ):
    assert part in str(error.value)


def test_an_adapter_of_another_model_is_refused(folder, exporting, tmp_path):
  with pytest.raises(ValueError, match=r'matches none of attn.c_attn'):
    load(folder, 'gpt2')
  with pytest.raises(ValueError, match='misshapen: '):
    load(folder, 'llama3')
  adapter = exporting.random_adapter(model('gemma')[0], ALL, {})
  with pytest.raises(ValueError, match='has mlp/gate, which this family'):
    save(tmp_path / 'x', adapter, ALL, 'gpt2')
  assert not list(tmp_path.glob('*x*'))


def test_truncated_files_say_so(folder):
  place = folder / 'adapter_model.safetensors'
  content = place.read_bytes()
  for length in (0, 4, 100, len(content) - 1):
    place.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r'safetensors is truncated'):
      load(folder)
  change(folder, r=3)
  (folder / 'adapter_config.json').write_text('{"r": 3')
  with pytest.raises(ValueError, match=r'adapter_config.json is not JSON'):
    load(folder, 'llama_untied')
  (folder / 'adapter_config.json').write_text('[]')
  with pytest.raises(
    ValueError, match=r'adapter_config.json is not a JSON object'
  ):
    load(folder, 'llama_untied')


@pytest.mark.parametrize(
  'name', ['adapter_config.json', 'adapter_model.safetensors']
)
def test_a_missing_file_is_named(folder, name):
  (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match=f'copy has no {name}; ') as error:
    load(folder, 'llama_untied')
  assert '\n' not in str(error.value)


def test_types_that_cannot_be_read_are_refused(folder):
  place = folder / 'adapter_model.safetensors'
  tensors = safetensors.numpy.load_file(place)
  name = min(tensors)
  tensors[name] = tensors[name].astype(np.int64)
  safetensors.numpy.save_file(tensors, place)
  with pytest.raises(ValueError, match=r'stored as I64 .*cannot be read'):
    load(folder)


# --- Folders ---


def test_what_is_there_stays_unless_overwritten(folder, tmp_path):
  adapter, kind = load(folder)
  (folder / 'README.md').write_text('old')
  with pytest.raises(ValueError, match='copy exists; give another folder'):
    save(folder, adapter, kind, 'llama_untied')
  assert (folder / 'README.md').exists()
  save(folder, adapter, kind, 'llama_untied', overwrite=True)
  assert not (folder / 'README.md').exists()
  assert_same_bits(load(folder)[0], adapter)
  (tmp_path / 'thesis').mkdir()
  (tmp_path / 'thesis' / 'text').write_text('mine')
  (folder / 'checkpoint-5').mkdir()
  with pytest.raises(ValueError, match='not only an adapter of PEFT'):
    save(folder, adapter, kind, 'llama_untied', overwrite=True)
  (folder / 'checkpoint-5').rmdir()
  with pytest.raises(ValueError, match='not only an adapter of PEFT'):
    save(tmp_path / 'thesis', adapter, kind, 'llama_untied', overwrite=True)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['copy', 'thesis']


@pytest.mark.parametrize('exists', [False, True])
def test_a_failed_export_leaves_everything_as_it_was(
  folder, tmp_path, monkeypatch, exists
):
  adapter, kind = load(folder)

  def fail(_, path, **options):
    del options
    path.write_bytes(b'half')
    raise OSError('no space left')

  monkeypatch.setattr(safetensors.numpy, 'save_file', fail)
  place = folder if exists else tmp_path / 'new'
  with pytest.raises(OSError, match='no space'):
    save(place, adapter, kind, 'llama_untied', overwrite=exists)
  assert [p.name for p in tmp_path.iterdir()] == ['copy']
  assert_same_bits(load(folder)[0], adapter)


def test_a_failed_move_puts_the_old_folder_back(folder, tmp_path, monkeypatch):
  adapter, kind = load(folder)
  rename = pathlib.Path.rename

  def fail(self, target):
    if folders.is_part(self) and '.old' not in self.name:
      raise OSError('no rename')
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, 'rename', fail)
  with pytest.raises(OSError, match='no rename'):
    save(folder, adapter, kind, 'llama_untied', overwrite=True)
  assert [p.name for p in tmp_path.iterdir()] == ['copy']
  assert_same_bits(load(folder)[0], adapter)
