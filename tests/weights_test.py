"""Whatever container a model comes in, the parameters are the same."""

import json
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers as backend

from dpo_jax import policies
from dpo_jax import weights
from dpo_jax.models import transformer

GOLDEN = pathlib.Path(__file__).parent / 'golden'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'


@pytest.fixture
def folder(tmp_path):
  """A copy to break."""
  return pathlib.Path(shutil.copytree(GOLDEN / 'llama_untied', tmp_path / 'm'))


def read_tensors(folder):
  return safetensors.numpy.load_file(folder / WEIGHTS)


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y, err_msg=str(path))


def shard(folder):
  """Splits the weights of a folder over two files and an index."""
  tensors = read_tensors(folder)
  names = sorted(tensors)
  index = {}
  for i, part in enumerate((names[:9], names[9:])):
    file = f'model-0000{i + 1}-of-00002.safetensors'
    safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
    index.update((n, file) for n in part)
  (folder / WEIGHTS).unlink()
  (folder / INDEX).write_text(json.dumps({'weight_map': index}))


# --- Hugging Face folders ----------------------------------------------------


def test_one_file_and_shards_load_alike(folder):
  whole = weights.load(folder)
  assert whole.tokenizer is None
  assert whole.config.d_model == 20
  shard(folder)
  assert_trees_equal(weights.load(folder).params, whole.params)


def test_bfloat16_files_load_as_float32(folder):
  tensors = {
    n: t.astype(ml_dtypes.bfloat16) for n, t in read_tensors(folder).items()
  }
  safetensors.numpy.save_file(tensors, folder / WEIGHTS)
  exact = weights.load(GOLDEN / 'llama_untied').params
  rounded = jax.tree.map(
    lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), exact
  )
  assert_trees_equal(weights.load(folder).params, rounded)


def test_truncated_file_says_download_again(folder):
  content = (folder / WEIGHTS).read_bytes()
  for length in (0, 4, 100, len(content) - 1):
    (folder / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(ValueError, match=r'safetensors is .*download it'):
      weights.load(folder)


def test_missing_shard_is_named(folder):
  shard(folder)
  (folder / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(
    FileNotFoundError,
    match=r'lacks 1 of 2 shards: '
    r'model-00002-of-00002.safetensors; download',
  ):
    weights.load(folder)


def test_all_truncated_shards_are_in_one_error(folder):
  shard(folder)
  for path in folder.glob('*.safetensors'):
    path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r'00001-of.*; model-00002-of'):
    weights.load(folder)


def test_shards_without_an_index_are_named(folder):
  shard(folder)
  (folder / INDEX).unlink()
  with pytest.raises(
    FileNotFoundError, match=r'has model-00001-of.*, but no index. Download'
  ):
    weights.load(folder)


def test_all_that_an_index_says_wrong_is_in_one_error(folder):
  shard(folder)
  index = json.loads((folder / INDEX).read_text())['weight_map']
  first, second, third, *_ = sorted(index)
  other = index[sorted(index)[-1]]
  index[first] = other
  del index[second]
  index['model.nowhere'] = index[third]
  (folder / INDEX).write_text(json.dumps({'weight_map': index}))
  with pytest.raises(ValueError) as error:
    weights.load(folder)
  for part in (
    f'{first} is not in {other}',
    f'model.nowhere is not in {index[third]}',
    f'{first} is in {index[third]}, which the index does not say',
    f'{second} is in {index[third]}, which the index does not say',
    'Download them again',
  ):
    assert part in str(error.value)
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  'index', [{}, {'weight_map': []}, {'weight_map': {'a': '../b'}}]
)
def test_an_index_of_another_kind_is_refused(folder, index):
  shard(folder)
  (folder / INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='has no weight_map from tensors to'):
    weights.load(folder)


def test_what_a_killed_export_left_is_refused(folder):
  left = folder.rename(folder.with_name('m.part-host-123'))
  with pytest.raises(ValueError, match=r'export that was killed.*remove it'):
    weights.load(left)


def test_unknown_attributes_are_named_with_the_folder(folder):
  attributes = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(attributes | {'moe': 8}))
  with pytest.raises(ValueError, match=r'moe = 8 \(unknown attribute\)'):
    weights.load(folder)


def test_missing_tensor_names_the_folder(folder):
  tensors = read_tensors(folder)
  del tensors['lm_head.weight']
  safetensors.numpy.save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError, match=r'm: 1 tensors .*\n.*lm_head.weight'):
    weights.load(folder)


def test_integer_weights_are_refused(folder):
  tensors = read_tensors(folder)
  tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(np.int8)
  safetensors.numpy.save_file(tensors, folder / WEIGHTS)
  with pytest.raises(ValueError, match=r'stored as I8 \(lm_head.weight\)'):
    weights.load(folder)


@pytest.mark.parametrize(
  'remove, error',
  [
    ('config.json', 'config.json does not exist'),
    (WEIGHTS, 'neither model.safetensors nor'),
  ],
)
def test_incomplete_folder_says_what_it_lacks(folder, remove, error):
  (folder / remove).unlink()
  with pytest.raises(FileNotFoundError, match=error):
    weights.load(folder)


def test_broken_config_is_named(folder):
  (folder / 'config.json').write_text('{')
  with pytest.raises(ValueError, match=r'config.json is not JSON'):
    weights.load(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='give a Hugging Face folder'):
    weights.load(tmp_path / 'nothing')
  (tmp_path / 'model.bin').write_bytes(b'x')
  with pytest.raises(ValueError, match=r'neither a folder nor a .gguf file'):
    weights.load(tmp_path / 'model.bin')


def byte_vocabulary(size):
  symbols = sorted(backend.pre_tokenizers.ByteLevel.alphabet())
  specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
  return (specials + symbols + [f'<unused{i}>' for i in range(size)])[:size]


def test_folder_brings_its_tokenizer_unless_it_is_too_large(folder):
  model = backend.models.BPE(
    {t: i for i, t in enumerate(byte_vocabulary(67))}, []
  )
  tokenizer = backend.Tokenizer(model)
  tokenizer.add_special_tokens(['<|im_end|>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  loaded = weights.load(folder)
  assert (loaded.tokenizer.vocab_size, loaded.tokenizer.eos_id) == (67, 2)
  tokenizer.add_tokens(['<one too many>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  with pytest.raises(ValueError, match=r'has 68 tokens but .* only 67 rows'):
    weights.load(folder)


# --- GGUF --------------------------------------------------------------------

GGUF_NAMES = {
  'embed_tokens': 'token_embd',
  'input_layernorm': 'attn_norm',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'model.norm': 'output_norm',
  'lm_head': 'output',
}


# What a family has more than Llama.
MORE = {
  'qwen2': {
    f'model.layers.0.self_attn.{name}_proj.bias': (size,)
    for name, size in dict(q=64, k=32, v=32).items()
  },
  'qwen3': {
    f'model.layers.0.self_attn.{name}_norm.weight': (16,) for name in 'qk'
  },
}


def write_gguf(
  path,
  *,
  vocab_size=300,
  tokens=300,
  architecture='llama',
  quantization=gguf.GGMLQuantizationType.F32,
  permute=True,
  pre='smollm',
):
  """Writes a random one-layer model; returns its Hugging Face tensors."""
  shapes = {
    'model.embed_tokens.weight': (vocab_size, 64),
    'model.norm.weight': (64,),
    'model.layers.0.input_layernorm.weight': (64,),
    'model.layers.0.post_attention_layernorm.weight': (64,),
    'model.layers.0.self_attn.q_proj.weight': (64, 64),
    'model.layers.0.self_attn.k_proj.weight': (32, 64),
    'model.layers.0.self_attn.v_proj.weight': (32, 64),
    'model.layers.0.self_attn.o_proj.weight': (64, 64),
    'model.layers.0.mlp.gate_proj.weight': (96, 64),
    'model.layers.0.mlp.up_proj.weight': (96, 64),
    'model.layers.0.mlp.down_proj.weight': (64, 96),
    **MORE.get(architecture, {}),
  }
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_embedding_length(64)
  writer.add_block_count(1)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_feed_forward_length(96)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_context_length(64)
  writer.add_rope_freq_base(1e4)
  if architecture == 'qwen3':
    writer.add_key_length(16)
    writer.add_value_length(16)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(byte_vocabulary(tokens - 1) + ['th'])
  writer.add_token_types([3] * 3 + [1] * (tokens - 3))
  writer.add_token_merges(['t h'])
  writer.add_eos_token_id(2)
  tensors = {}
  for name, shape in shapes.items():
    tensor = rng.normal(size=shape, scale=0.2).astype(np.float32)
    kind = quantization if len(shape) == 2 else gguf.GGMLQuantizationType.F32
    if kind == gguf.GGMLQuantizationType.I8:
      stored = tensor.astype(np.int8)
    else:
      stored = gguf.quants.quantize(tensor, kind)
      tensors[name] = gguf.quants.dequantize(stored, kind)
    heads = {'q_p': 4, 'k_p': 2}.get(name.split('self_attn.')[-1][:3])
    if permute and 'self_attn' in name and heads:
      stored = (
        stored.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(stored.shape)
      )
    for theirs, short in GGUF_NAMES.items():
      name = name.replace(theirs, short)
    name = name.replace('model.layers.', 'blk.').removeprefix('model.')
    writer.add_tensor(name, stored, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tensors


def hugging_face_twin(folder, tensors, model_type='llama'):
  folder.mkdir()
  (folder / 'config.json').write_text(
    json.dumps(
      dict(
        model_type=model_type,
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        rope_theta=1e4,
        tie_word_embeddings=True,
      )
    )
  )
  safetensors.numpy.save_file(tensors, folder / WEIGHTS)
  return weights.load(folder)


@pytest.mark.parametrize('quantization', ['F32', 'F16', 'Q8_0', 'Q4_1'])
def test_gguf_equals_its_hugging_face_twin(tmp_path, quantization):
  tensors = write_gguf(
    tmp_path / 'm.gguf', quantization=gguf.GGMLQuantizationType[quantization]
  )
  loaded = weights.load(tmp_path / 'm.gguf')
  twin = hugging_face_twin(tmp_path / 'twin', tensors)
  assert loaded.config == twin.config
  assert_trees_equal(loaded.params, twin.params)
  assert loaded.tokenizer.vocab_size == 300
  assert loaded.tokenizer.decode(loaded.tokenizer.encode('the é')) == 'the é'


@pytest.mark.parametrize('architecture', ['qwen2', 'qwen3'])
def test_gguf_of_qwen_keeps_the_order_of_rows(tmp_path, architecture):
  tensors = write_gguf(
    tmp_path / 'm.gguf', architecture=architecture, permute=False
  )
  loaded = weights.load(tmp_path / 'm.gguf')
  twin = hugging_face_twin(tmp_path / 'twin', tensors, architecture)
  assert loaded.config == twin.config
  assert_trees_equal(loaded.params, twin.params)


def test_gguf_without_the_permutation_is_another_model(tmp_path):
  tensors = write_gguf(tmp_path / 'm.gguf', permute=False)
  loaded = weights.load(tmp_path / 'm.gguf')
  twin = hugging_face_twin(tmp_path / 'twin', tensors)
  q, k = (loaded.params['layers']['attention'][n] for n in 'qk')
  assert not np.array_equal(q, twin.params['layers']['attention']['q'])
  assert not np.array_equal(k, twin.params['layers']['attention']['k'])


@pytest.mark.parametrize(
  'keywords, error',
  [
    (dict(architecture='gemma'), "architecture 'gemma' is not supported"),
    (dict(pre='tekken'), "pre 'tekken' is not supported"),
    (dict(vocab_size=280), 'has 300 tokens but the embedding only 280 rows'),
    (
      dict(quantization=gguf.GGMLQuantizationType.I8),
      r'I8 \(model.embed_tokens.weight, .* and 5 more\)',
    ),
  ],
)
def test_gguf_we_would_misread_is_refused(tmp_path, keywords, error):
  write_gguf(tmp_path / 'm.gguf', **keywords)
  with pytest.raises(ValueError, match=error):
    weights.load(tmp_path / 'm.gguf')


def test_truncated_gguf_says_download_again(tmp_path):
  write_gguf(tmp_path / 'm.gguf')
  content = (tmp_path / 'm.gguf').read_bytes()
  for length in (0, 10, 500, len(content) // 2):
    (tmp_path / 'm.gguf').write_bytes(content[:length])
    with pytest.raises(ValueError, match=r'm.gguf is truncated.*again'):
      weights.load(tmp_path / 'm.gguf')


# --- SmolLM2-135M-Instruct: needs 98 MB, once --------------------------------


@pytest.fixture(scope='module')
def smollm2():
  return weights.load(policies.package_file('smollm2-135m'))


@pytest.fixture(scope='module')
def golden():
  return json.loads((GOLDEN / 'smollm2.json').read_text())


def last_logits(config):
  """Returns a compiled function (params, padded tokens, length) -> logits."""

  @jax.jit
  def function(params, tokens_T, length):
    slots_BT = jnp.arange(tokens_T.size)[None]
    hidden_BTD = transformer.Transformer(config).apply(
      {'params': params},
      tokens_T[None],
      slots_BT,
      jnp.zeros_like(slots_BT),
      slots_BT + 1,
    )
    return transformer.unembedding(params) @ hidden_BTD[0, length - 1]

  return function


def greedy(logits_of, params, case):
  """Returns the logits after the prompt, and 24 tokens."""
  tokens = np.zeros(48, np.int32)
  start = length = len(case['ids'])
  tokens[:length] = case['ids']
  first = logits = logits_of(params, tokens, length)
  for _ in case['continuation']:
    tokens[length] = int(jnp.argmax(logits))
    length += 1
    logits = logits_of(params, tokens, length)
  return first, tokens[start:length].tolist()


@pytest.mark.slow
def test_smollm2_says_what_transformers_says(smollm2, golden):
  logits_of = last_logits(smollm2.config)
  params = jax.device_put(smollm2.params)
  for case in golden['greedy']:
    first, continuation = greedy(logits_of, params, case)
    np.testing.assert_allclose(
      first[:64], case['first_logits'], rtol=0, atol=2e-4
    )
    assert continuation == case['continuation'], smollm2.tokenizer.decode(
      continuation
    )


@pytest.mark.slow
def test_smollm2_is_another_model_if_rows_stay_permuted(smollm2, golden):
  H = smollm2.config.head_dim
  # Undo our undoing: back to the order of the file.
  stored = np.arange(H).reshape(2, H // 2).T.ravel()
  attention = dict(smollm2.params['layers']['attention'])
  attention |= {name: attention[name][..., stored] for name in 'qk'}
  layers = smollm2.params['layers'] | {'attention': attention}
  params = jax.device_put(smollm2.params | {'layers': layers})
  case = golden['greedy'][0]
  first, continuation = greedy(last_logits(smollm2.config), params, case)
  assert np.abs(first[:64] - np.array(case['first_logits'])).max() > 0.5
  assert continuation != case['continuation']


@pytest.mark.slow
def test_smollm2_tokenizer_equals_plain_byte_pair_encoding(smollm2, golden):
  tokenizer = smollm2.tokenizer
  assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (
    49152,
    2,
    None,
  )
  for text, ids in golden['tokens']:
    assert tokenizer.encode(text) == ids, text
    assert tokenizer.decode(ids) == text
