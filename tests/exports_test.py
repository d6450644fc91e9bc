"""What was imported is exported bit for bit, whole, and loads elsewhere."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import conversions
from dpo_jax import exports
from dpo_jax import fetch
from dpo_jax import weights
from tests import families_test
from tests import weights_test

GOLDEN = families_test.GOLDEN
EXPORTED = GOLDEN / 'exported'
ELSEWHERE = json.loads((GOLDEN / 'exported.json').read_text())


def tensors_of(folder):
  tensors = {}
  for path in sorted(pathlib.Path(folder).glob('*.safetensors')):
    tensors |= safetensors.numpy.load_file(path)
  return tensors


def assert_same_tensors(one, two):
  assert sorted(one) == sorted(two)
  for name, tensor in one.items():
    assert two[name].dtype == tensor.dtype, name
    assert two[name].shape == tensor.shape, name
    assert two[name].tobytes() == tensor.tobytes(), name


# --- Import reversed ---------------------------------------------------------


@pytest.mark.parametrize('shard_size', ['5GB', '9KB'])
@pytest.mark.parametrize('name', families_test.NAMES)
def test_import_then_export_is_bit_identical(tmp_path, name, shard_size):
  conversions.convert(GOLDEN / name, tmp_path / 'out', shard_size=shard_size)
  files = list((tmp_path / 'out').glob('*.safetensors'))
  assert (len(files) > 1) == (shard_size == '9KB')
  assert_same_tensors(tensors_of(GOLDEN / name), tensors_of(tmp_path / 'out'))
  attributes = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert attributes == families_test.attributes_of(name)
  weights_test.assert_trees_equal(
    weights.load(tmp_path / 'out').params, weights.load(GOLDEN / name).params
  )


@pytest.fixture
def mixed(tmp_path):
  """Llama with bfloat16 matrices, one in float16, and float32 norms."""
  folder = tmp_path / 'mixed'
  shutil.copytree(GOLDEN / 'llama_tied', folder)
  tensors = tensors_of(folder)
  half = {
    name: tensor if tensor.ndim == 1 else tensor.astype(weights.DTYPES['BF16'])
    for name, tensor in tensors.items()
  }
  name = 'model.layers.1.mlp.up_proj.weight'
  half[name] = tensors[name].astype(np.float16)
  safetensors.numpy.save_file(half, folder / weights_test.WEIGHTS)
  (folder / 'generation_config.json').write_text('{"temperature": 0.6}')
  return folder


@pytest.mark.parametrize('shard_size', [10**9, 3000])
def test_every_tensor_keeps_its_stored_type(tmp_path, mixed, shard_size):
  text = conversions.convert(mixed, tmp_path / 'out', shard_size=shard_size)
  assert_same_tensors(tensors_of(mixed), tensors_of(tmp_path / 'out'))
  assert 'BF16 (14), F32 (5), F16 (1)' in ' '.join(text.split())
  read = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert read['dtype'] == 'bfloat16'
  kept = (tmp_path / 'out' / 'generation_config.json').read_text()
  assert json.loads(kept) == {'temperature': 0.6}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_another_type_may_be_asked_for(tmp_path, mixed, dtype):
  conversions.convert(mixed, tmp_path / 'out', dtype=dtype)
  kind = weights.dtype_named(dtype)
  expected = {
    name: tensor.astype(np.float32).astype(kind)
    for name, tensor in tensors_of(mixed).items()
  }
  assert_same_tensors(expected, tensors_of(tmp_path / 'out'))
  read = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert read['dtype'] == dtype
  with pytest.raises(ValueError, match=r"dtype is 'int8'; use one of auto, fl"):
    conversions.convert(mixed, tmp_path / 'other', dtype='int8')


@pytest.mark.parametrize('quantization', ['F16', 'Q8_0'])
def test_a_gguf_file_becomes_a_folder(tmp_path, quantization):
  kind = weights_test.gguf.GGMLQuantizationType[quantization]
  weights_test.write_gguf(tmp_path / 'm.gguf', quantization=kind)
  conversions.convert(tmp_path / 'm.gguf', tmp_path / 'out')
  before = weights.load(tmp_path / 'm.gguf')
  after = weights.load(tmp_path / 'out')
  assert after.config == before.config
  weights_test.assert_trees_equal(after.params, before.params)
  text = 'the é <|im_end|>'
  assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
  assert after.tokenizer.eos_ids == before.tokenizer.eos_ids
  stored = {
    str(tensor.dtype) for tensor in tensors_of(tmp_path / 'out').values()
  }
  # What was rounded for good is stored as it was, the rest as numbers.
  assert stored == {'float32'} | ({'float16'} if kind.name == 'F16' else set())


def test_random_models_are_exported_with_their_tokenizer(tmp_path):
  text = conversions.convert('debug-llama', tmp_path / 'out')
  assert 'family      llama' in text and '257 tokens, no chat template' in text
  loaded = weights.load(tmp_path / 'out')
  assert loaded.tokenizer.encode('é') == list('é'.encode())
  assert loaded.tokenizer.eos_id == 256
  weights_test.assert_trees_equal(
    loaded.params, conversions.read('debug-llama').params
  )


# --- Elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize('name', ['gpt2', 'gpt2_lora', 'llama', 'llama_lora'])
def test_trained_models_say_the_same_in_transformers(name):
  loaded, golden = weights.load(EXPORTED / name), ELSEWHERE[name]
  ids = [loaded.tokenizer.encode(text) for text in ELSEWHERE['texts']]
  assert ids == golden['ids']
  assert golden['eos'] == [loaded.tokenizer.eos_id] * 2
  attributes = json.loads((EXPORTED / name / 'config.json').read_text())
  assert attributes['architectures'] == [golden['class']]
  with jax.default_matmul_precision('highest'):
    logits = families_test.logits_of(
      loaded.params, loaded.config, jnp.array([ids[0]])
    )
  np.testing.assert_allclose(logits[0], golden['logits'], rtol=0, atol=2e-5)
  if 'lora' not in name:  # Trained: random ones have less.
    assert np.std(golden['logits']) > 0.1


# --- Whole or not at all -----------------------------------------------------


def listing(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_complete_one(
  tmp_path, monkeypatch
):
  out = tmp_path / 'out'
  conversions.convert(GOLDEN / 'llama_tied', out)
  with pytest.raises(
    ValueError, match=r'out exists; .* --overwrite to replace'
  ):
    conversions.convert(GOLDEN / 'gpt2', out)
  before = tensors_of(out)

  def full(model, folder, shard_size):
    del model, shard_size
    (folder / 'model.safetensors').write_bytes(b'half')
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(exports, '_write_tensors', full)
    with pytest.raises(OSError, match='No space left'):
      conversions.convert(GOLDEN / 'gpt2', out, overwrite=True)
    with pytest.raises(OSError, match='No space left'):
      conversions.convert(GOLDEN / 'gpt2', tmp_path / 'new')
  assert listing(tmp_path) == ['out']
  assert_same_tensors(before, tensors_of(out))
  conversions.convert(GOLDEN / 'gpt2', out, overwrite=True)
  assert_same_tensors(tensors_of(GOLDEN / 'gpt2'), tensors_of(out))
  conversions.convert(out, out, dtype='bfloat16', overwrite=True)  # onto itself
  assert listing(tmp_path) == ['out']


@pytest.mark.parametrize('inside', ['notes.txt', 'config.json', 'sub/x'])
def test_what_is_no_model_is_never_replaced(tmp_path, inside):
  out = tmp_path / 'out'
  (out / inside).parent.mkdir(parents=True)
  (out / inside).write_text('{}')
  with pytest.raises(ValueError, match='is not only a Hugging Face model'):
    conversions.convert(GOLDEN / 'gpt2', out, overwrite=True)
  assert (out / inside).exists()


def test_what_a_killed_export_left_goes_with_the_next(tmp_path):
  code = (
    'import os, sys\n'
    'from dpo_jax import conversions, exports\n'
    'def die(model, folder, shard_size):\n'
    '  (folder / "model.safetensors").write_bytes(b"half")\n'
    '  os._exit(9)\n'
    'exports._write_tensors = die\n'
    'conversions.convert(*sys.argv[1:])\n'
  )
  command = [sys.executable, '-c', code, GOLDEN / 'gpt2', tmp_path / 'out']
  root = pathlib.Path(__file__).parents[1]
  assert subprocess.run(command, cwd=root, check=False).returncode == 9
  (left,) = tmp_path.iterdir()
  assert left.name.startswith('out.part-')
  with pytest.raises(ValueError, match='an export that was killed left behind'):
    conversions.convert(left, tmp_path / 'other')
  conversions.convert(GOLDEN / 'gpt2', tmp_path / 'out')
  assert listing(tmp_path) == ['out']


# --- Sizes -------------------------------------------------------------------


def test_shards_hold_what_fits_and_never_nothing():
  sizes = dict(a=4, b=4, c=9, d=1, e=3)
  assert list(exports.plan_shards(sizes, 8).values()) == [
    ['a', 'b'],
    ['c'],
    ['d', 'e'],
  ]
  assert list(exports.plan_shards(sizes, 8))[1] == (
    'model-00002-of-00003.safetensors'
  )
  assert exports.plan_shards(sizes, 21) == {'model.safetensors': list(sizes)}


@pytest.mark.parametrize(
  'text, size',
  [('5GB', 5 * 10**9), ('500mb', 5 * 10**8), ('1.5 KB', 1500), ('700', 700)],
)
def test_sizes_are_read(text, size):
  assert exports.parse_size(text) == size


@pytest.mark.parametrize('text', ['', 'GB', '5 apples', '0', '-1GB', '1.2.3MB'])
def test_sizes_that_are_none_are_refused(text):
  with pytest.raises(ValueError, match=r'write it as in 5GB or 500MB'):
    exports.parse_size(text)


# --- The Hub -----------------------------------------------------------------


def test_the_hub_is_asked_for_what_a_model_is_loaded_from(
  monkeypatch, tmp_path
):
  asked = []

  def snapshot(repository, *, revision, allow_patterns):
    asked.append((repository, revision))
    assert 'config.json' in allow_patterns
    assert not any('.bin' in pattern for pattern in allow_patterns)
    return str(GOLDEN / 'gpt2')

  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
  conversions.convert('hf:openai-community/gpt2', tmp_path / 'a')
  conversions.convert('hf:a/b.c@v1', tmp_path / 'b')
  assert asked == [('openai-community/gpt2', None), ('a/b.c', 'v1')]
  assert_same_tensors(tensors_of(GOLDEN / 'gpt2'), tensors_of(tmp_path / 'a'))


def test_a_hub_that_does_not_answer_ends_in_one_clear_line(monkeypatch):
  def snapshot(*_, **__):
    raise RuntimeError('401 Client Error.\nmore\nlines')

  monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot)
  with pytest.raises(fetch.FetchError) as error:
    fetch.hub_folder('meta-llama/Llama-3.2-1B')
  text = str(error.value)
  assert '(401 Client Error.)' in text and len(text.splitlines()) == 1
  for fix in ('accept its licence', 'hf auth login', 'path of the folder'):
    assert fix in text
  with pytest.raises(ValueError, match='names no model; write hf:OWNER/NAME'):
    fetch.hub_folder('gpt2')
