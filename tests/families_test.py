"""A foreign checkpoint gives its own logits here, or an error: never others."""

import dataclasses
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import attention
from dpo_jax.models import families
from dpo_jax.models import layouts
from dpo_jax.models import presets
from dpo_jax.models import transformer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
NAMES = sorted(path.parent.name for path in GOLDEN.glob('*/logits.npz'))


def read(name, **changes):
  """Returns (family, config, tensors) of a golden folder."""
  folder = GOLDEN / name
  attributes = json.loads((folder / 'config.json').read_text()) | changes
  return (
    families.family_of(attributes['model_type']),
    families.config_from_hf(attributes),
    safetensors.numpy.load_file(folder / 'model.safetensors'),
  )


def attributes_of(name):
  return json.loads((GOLDEN / name / 'config.json').read_text())


def logits_of(params, config, ids_BT):
  B, T = ids_BT.shape
  slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  hidden_BTD = transformer.Transformer(config).apply(
    {'params': params}, ids_BT, slots_BT, jnp.zeros_like(slots_BT), slots_BT + 1
  )
  unembed_VD = transformer.unembedding(params)
  with jax.default_matmul_precision('highest'):
    logits_BTV = jnp.einsum('BTD,VD->BTV', hidden_BTD, unembed_VD)
    return np.asarray(attention.soft_cap(logits_BTV, config.logit_cap))


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_those_of_transformers(name):
  family, config, tensors = read(name)
  params = families.from_hf(tensors, config, family=family)
  golden = np.load(GOLDEN / name / 'logits.npz')
  with jax.default_matmul_precision('highest'):
    logits = logits_of(params, config, golden['input_ids'])
  np.testing.assert_allclose(logits, golden['logits'], rtol=0, atol=2e-5)
  assert np.std(golden['logits']) > 0.5  # Else the tolerance says little.


ORACLES = (
  'gemma gemma2 gemma3 gpt2 llama llama3_rope mistral_window pythia qwen2 qwen3'
  ' smollm2'
)


@pytest.mark.parametrize('name', ORACLES.split())
def test_logits_equal_the_shared_oracle(shared, name):
  folder = shared / 'oracles' / 'hf' / name
  attributes = json.loads((folder / 'config.json').read_text())
  config = families.config_from_hf(attributes)
  params = families.from_hf(
    safetensors.numpy.load_file(folder / 'model.safetensors'),
    config,
    family=families.family_of(attributes['model_type']),
  )
  golden = np.load(folder / 'logits.npz')
  with jax.default_matmul_precision('highest'):
    logits = logits_of(params, config, golden['input_ids'])
  np.testing.assert_allclose(logits, golden['logits'], rtol=0, atol=2e-5)


def test_every_family_has_a_golden_folder():
  types = {attributes_of(name)['model_type'] for name in NAMES}
  assert types == set(families.FAMILIES)


@pytest.mark.parametrize(
  'model_type', ['gemma3', 'gemma3n_text', 'phi3', 'olmo2']
)
def test_unknown_families_are_refused_by_name(model_type):
  with pytest.raises(ValueError, match=f"unknown model_type '{model_type}'"):
    families.config_from_hf(
      attributes_of('llama_tied') | {'model_type': model_type}
    )


def test_unknown_family_names_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'llama'"):
    families.family_of('lama')
  with pytest.raises(ValueError, match="did you mean 'gpt2'"):
    families.family_of('gpt_2')


@pytest.mark.parametrize('name', NAMES)
def test_export_is_import_reversed_bit_for_bit(name):
  family, config, tensors = read(name)
  params = families.from_hf(tensors, config, family=family)
  back = dict(families.to_hf(params, config, family=family))
  assert sorted(back) == sorted(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype
    assert back[key].shape == tensor.shape
    assert back[key].tobytes() == tensor.tobytes(), key


@pytest.mark.parametrize('name', NAMES)
def test_parameters_are_those_the_model_declares(name):
  family, config, tensors = read(name)
  params = families.from_hf(tensors, config, family=family)
  slots = jnp.zeros((1, 1), jnp.int32)
  declared = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    slots,
    slots,
    slots,
    slots + 1,
  )['params']
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    np.shape, nn.unbox(declared)
  )


def test_all_tensors_that_do_not_fit_are_in_one_error():
  family, config, tensors = read('llama_tied')
  del tensors['model.norm.weight']
  tensors['model.layers.7.mlp.up_proj.weight'] = np.zeros((2, 3))
  name = 'model.layers.1.self_attn.k_proj.weight'
  tensors[name] = tensors[name][:-1]
  with pytest.raises(ValueError) as error:
    families.from_hf(tensors, config, family=family)
  for part in (
    '3 tensors',
    'missing: model.norm.weight (20,)',
    'extra: model.layers.7.mlp.up_proj.weight (2, 3)',
    'misshapen: model.layers.1.self_attn.k_proj.weight is (11, 20), '
    'the config says (12, 20)',
  ):
    assert part in str(error.value)


def test_a_tied_model_may_carry_its_embedding_twice_but_not_another():
  family, config, tensors = read('llama_tied')
  params = families.from_hf(tensors, config, family=family)
  embed = tensors['model.embed_tokens.weight']
  again = families.from_hf(
    tensors | {'lm_head.weight': embed}, config, family=family
  )
  assert jax.tree.structure(again) == jax.tree.structure(params)
  with pytest.raises(ValueError, match=r'lm_head.weight differs'):
    families.from_hf(
      tensors | {'lm_head.weight': embed + 1}, config, family=family
    )


CONFIGS = {name: families.config_from_hf(attributes_of(name)) for name in NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_a_config_written_is_the_config_read(name):
  family = families.family_of(attributes_of(name)['model_type'])
  written = families.config_to_hf(CONFIGS[name], family=family)
  assert families.config_from_hf(written) == CONFIGS[name]
  golden = attributes_of(name)
  assert written['architectures'] == golden['architectures']
  # transformers, which wrote the golden ones, refuses 256.0 for an integer.
  for key in written.keys() & golden.keys():
    assert type(written[key]) is type(golden[key]), key


@pytest.mark.parametrize('name', presets.MODELS | presets.DEBUG)
def test_every_shape_has_a_family_that_says_it(name):
  config = (presets.MODELS | presets.DEBUG)[name]
  family = families.family_like(config)
  written = families.config_to_hf(config, family=family)
  assert families.config_from_hf(written) == config
  start = name.removeprefix('debug-')[:4]
  assert family.name[:4] in (start, {'pyth': 'gpt_', 'smol': 'llam'}.get(start))
  computed = dataclasses.replace(config, dtype='bfloat16', scan_unroll=2)
  assert families.config_to_hf(computed, family=family) == written


def test_what_no_family_can_say_is_refused():
  config = dataclasses.replace(CONFIGS['gpt2'], qk_norm=True)
  with pytest.raises(ValueError, match='a gpt2 config cannot say all of'):
    families.config_to_hf(config, family=families.family_of('gpt2'))
  with pytest.raises(ValueError, match='no family of gemma, gemma2'):
    families.family_like(config)


def test_gpt2_tensors_may_lack_the_prefix_and_carry_masks():
  family, config, tensors = read('gpt2')
  params = families.from_hf(tensors, config, family=family)
  bare = {
    name.removeprefix('transformer.'): value for name, value in tensors.items()
  }
  bare['h.0.attn.bias'] = np.ones((1, 1, 24, 24))
  again = families.from_hf(bare, config, family=family)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


GGUF_SHAPES = {'token_embd.weight': (67, 20), 'blk.0.attn_q.bias': (24,)}


def gguf_metadata(**changes):
  """Metadata of llama_untied."""
  metadata = {
    'general.architecture': 'llama',
    'general.name': 'anything',
    'llama.embedding_length': 20,
    'llama.block_count': 2,
    'llama.attention.head_count': 4,
    'llama.attention.head_count_kv': 2,
    'llama.attention.key_length': 6,
    'llama.rope.dimension_count': 6,
    'llama.rope.freq_base': 10000.0,
    'llama.feed_forward_length': 28,
    'llama.attention.layer_norm_rms_epsilon': float(np.float32(1e-5)),
    'llama.context_length': 40,
  }
  metadata.update(changes)
  return metadata


def test_gguf_config_equals_the_hugging_face_one():
  config = families.config_from_gguf(
    gguf_metadata(), GGUF_SHAPES | {'output.weight': (67, 20)}
  )
  assert config == read('llama_untied')[1]
  tied = families.config_from_gguf(gguf_metadata(), GGUF_SHAPES)
  assert tied.tied


@pytest.mark.parametrize(
  'changes, reason',
  [
    ({'general.architecture': 'gemma'}, "architecture 'gemma'"),
    ({'llama.rope.scaling.type': 'linear'}, "scaling.type = 'linear'"),
    ({'llama.rope.dimension_count': 4}, 'another attribute says 6'),
    ({'llama.attention.sliding_window': 8}, 'sliding_window = 8'),
    ({'llama.expert_count': 4}, 'expert_count = 4'),
    ({'llama.attention.head_count': [4, 2]}, r'head_count = \[4, 2\]'),
    ({'split.count': 2}, 'split.count = 2'),
  ],
)
def test_gguf_metadata_we_do_not_implement_is_refused(changes, reason):
  with pytest.raises(ValueError, match=reason):
    families.config_from_gguf(gguf_metadata(**changes), GGUF_SHAPES)


def test_gguf_tensors_undo_the_interleaving():
  """llama.cpp stores row (half, j) of a head as row (j, half)."""
  family, config, tensors = read('llama_untied')
  params = families.from_hf(tensors, config, family=family)
  stored = {}
  for key in family.keys:
    if not key.when(config):
      continue
    for layer in range(config.num_layers if '{}' in key.hf else 1):
      tensor = tensors[key.hf.format(layer)]
      heads = {'q_': config.num_heads, 'k_': config.num_kv_heads}.get(
        key.hf.split('self_attn.')[-1][:2]
      )
      if heads:
        halves = tensor.reshape(heads, 2, 3, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
      stored[key.gguf.format(layer)] = tensor
  found = families.gguf_tensors(stored, config, family=family)
  loaded = layouts.assemble(
    families.gguf_pieces(found, config, family=family),
    families.parameter_shapes(config, family=family),
  )
  for (path, a), b in zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(loaded), strict=True
  ):
    np.testing.assert_array_equal(a, b, err_msg=str(path))
  assert not np.array_equal(
    stored['blk.0.attn_q.weight'],
    tensors['model.layers.0.self_attn.q_proj.weight'],
  )
