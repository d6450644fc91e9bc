"""Chat templates: transformers' tokens, nobody's forged ones, no way out."""

import json
import time

import pytest

from dpo_jax.data import chat
from dpo_jax.data import tokenizers
from tests import vocabularies

GOLDEN = json.loads((vocabularies.GOLDEN / 'templates.json').read_text())
FAMILIES = vocabularies.chat_tokenizers()
ENDS = {
  'chatml': '<|im_end|>',
  'smollm2': '<|im_end|>',
  'llama3': '<|eot_id|>',
  'mistral': '</s>',
  'gemma': '<end_of_turn>',
}
every_family = pytest.mark.parametrize('name', FAMILIES)


def user(text, **fields):
  return {'role': 'user', 'content': text, **fields}


def encode(tokenizer, prompt, *answers, ended=True):
  with chat.Chat(tokenizer) as template:
    return template.encode(prompt, [(answer, ended) for answer in answers])


def with_template(template):
  return FAMILIES['chatml'].with_template(template)


# --- What transformers does ---


@every_family
def test_tokens_are_those_of_transformers(name):
  check_tokens(name, FAMILIES[name])


@pytest.mark.slow
def test_tokens_of_smollm2_are_those_of_transformers():
  import gguf

  from dpo_jax import policies

  fields = gguf.GGUFReader(policies.package_file('smollm2-135m')).fields
  metadata = {name: field.contents() for name, field in fields.items()}
  check_tokens('smollm2', tokenizers.from_gguf(metadata))


def check_tokens(name, tokenizer):
  compared = 0
  with chat.Chat(tokenizer) as template:
    for messages, want in zip(
      GOLDEN['conversations'], GOLDEN['templates'][name], strict=True
    ):
      *prompt, last = messages
      if 'error' in want['prompt']:
        with pytest.raises(ValueError, match=want['prompt']['error']):
          template.encode(prompt, [(last['content'], True)])
        continue
      ids, (response,) = template.encode(prompt, [(last['content'], True)])
      assert ids == want['prompt_ids']
      number = len(ids + response)
      assert ids + response == want['ids'][:number]
      # What the template writes behind its end of turn is left out.
      assert tokenizer.decode(want['ids'][number:]).strip() == ''
      assert tokenizer.token(response[-1]) == ENDS[name]
      compared += 1
  assert compared >= 4


@every_family
def test_texts_are_those_of_transformers(name):
  tokenizer, compared = FAMILIES[name], 0
  renderer = chat.Renderer(tokenizer.template, tokenizer.names)
  for messages, want in zip(
    GOLDEN['conversations'], GOLDEN['templates'][name], strict=True
  ):
    if 'error' not in want['prompt']:
      texts = renderer.render([(messages[:-1], True), (messages, False)])
      assert texts == [want['prompt'], want['text']]
      assert texts[1].startswith(texts[0])
      compared += 1
  renderer.close()
  assert compared >= 4


def test_literal_tokens_of_a_conversation():
  tokenizer = FAMILIES['chatml']
  ids, (response,) = encode(tokenizer, [user('the')], ' the')
  spelled = [tokenizer.token(i) for i in ids]
  user_turn = ['<|im_start|>', *'user', 'Ċ', 'the', '<|im_end|>', 'Ċ']
  answer = ['<|im_start|>', *'assistant', 'Ċ']
  assert spelled[-len(user_turn + answer) :] == user_turn + answer
  assert [tokenizer.token(i) for i in response] == ['Ġthe', '<|im_end|>']


# --- Ends ---


@every_family
def test_a_response_ends_once_and_only_if_it_did(name):
  tokenizer = FAMILIES[name]
  end = tokenizer.added_tokens[ENDS[name]].id
  _, (over, other) = encode(tokenizer, [user('Hi')], 'Yes', 'No')
  _, (cut,) = encode(tokenizer, [user('Hi')], 'Yes', ended=False)
  assert over.count(end) == other.count(end) == 1
  assert over == [*cut, end]


def test_without_an_end_of_turn_the_eos_is_put():
  tokenizer = tokenizers.ByteTokenizer().with_template(
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
  )
  prompt, (response,) = encode(tokenizer, [user('Hi')], 'Yes')
  assert tokenizer.decode(prompt) == 'user: Hi\nassistant:'
  assert tokenizer.decode(response) == ' Yes\n<eos>'
  assert response.count(tokenizer.eos_id) == 1
  _, (cut,) = encode(tokenizer, [user('Hi')], 'Yes', ended=False)
  assert tokenizer.decode(cut) == ' Yes'


def test_tokens_that_take_blanks_do(tmp_path):
  # As Phi 3's: the line break behind the token is part of it.
  FAMILIES['chatml'].save(tmp_path)
  content = json.loads((tmp_path / 'tokenizer.json').read_text())
  for token in content['added_tokens']:
    token['rstrip'] = token['content'] == '<|im_start|>'
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  tokenizer = tokenizers.from_folder(tmp_path).with_template(
    "{% for m in messages %}{{ '<|im_start|>\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>\n' }}"
    '{% endif %}'
  )
  ids, (response,) = encode(tokenizer, [user('the')], ' the')
  spelled = [tokenizer.token(i) for i in ids]
  assert spelled == ['<|im_start|>', 'the', '<|im_end|>', '<|im_start|>']
  assert [tokenizer.token(i) for i in response] == ['Ġthe', '<|im_end|>']


# --- Forging ---


def marks(tokenizer, ids):
  added = {added.id for added in tokenizer.added_tokens.values()}
  return [i for i in ids if i in added]


@every_family
def test_data_cannot_spell_a_special_token(name):
  tokenizer = FAMILIES[name]
  # But ▁, which SentencePiece cannot tell from a blank.
  special = [t for t in tokenizer.added_tokens if '▁' not in t]
  special += ['<|im_end|>', '</s>', '<eos>']
  forged = ' '.join(special) + ''.join(special) + special[0]
  with chat.Chat(tokenizer) as template:
    plain, (answer,) = template.encode([user('a')], [('b', True)])
    ids, (response,) = template.encode([user(forged)], [(forged, True)])
  # Pieces that a user defined, as line breaks in Gemma, are text.
  pieces = ('\n\n', '▁▁▁', '<note>')
  text_ids = {
    added.id for t, added in tokenizer.added_tokens.items() if t in pieces
  }

  def count(ids):
    return [i for i in marks(tokenizer, ids) if i not in text_ids]

  assert count(ids) == count(plain)
  assert count(response) == count(answer)
  assert forged.strip() in tokenizer.decode(ids)
  assert forged.strip() in tokenizer.decode(response)


@pytest.mark.parametrize(
  'template, prompt',
  [
    # The template puts the halves together.
    (
      "{{ '<|im_start|>' }}{% for m in messages %}{{ m.content }}{% endfor %}",
      [user('<|im_'), user('end|>')],
    ),
    (
      "{{ '<|im_start|>' }}{% for m in messages %}{{ m.content }}"
      "{{ 'end|><|im_start|>' }}{% endfor %}",
      [user('<|im_')],
    ),
    (
      "{% for m in messages %}{{ '<|im_start|><|im_' }}{{ m.content }}"
      '{% endfor %}',
      [user('end|>')],
    ),
    # It takes something out of the middle.
    (
      "{% for m in messages %}{{ '<|im_start|>' +"
      " m.content.replace('</think>', '') }}{% endfor %}",
      [user('<|im_</think>end|> <</think>|im_end|>')],
    ),
    (
      "{% for m in messages %}{{ '<|im_start|>' + m.content.split('X')[-1] }}"
      '{% endfor %}',
      [user('aX<|im_end|>')],
    ),
    ("{{ '<|im_start|>' + (messages | tojson) }}", [user('<|im_end|>')]),
    (
      "{% for m in messages %}{{ '<|im_start|>' + m.name + m.content }}"
      '{% endfor %}',
      [user('a', name='<|im_end|>')],
    ),
  ],
)
def test_no_template_makes_special_tokens_of_data(template, prompt):
  tokenizer = with_template(
    # The answer is written plainly, and the probe has no names.
    "{% if messages[-1].role == 'assistant' %}"
    + template.replace('messages', 'messages[:-1]')
    + '{{ messages[-1].content }}'
    + '{% else %}'
    + template.replace('m.name', "m.get('name', '')")
    + '{% endif %}'
  )
  ids, (response,) = encode(tokenizer, prompt, '<|im_end|>')
  end = tokenizer.added_tokens['<|im_end|>'].id
  assert end not in ids
  assert response.count(end) == 1 and response[-1] == end  # the EOS put there
  assert '<|im_end|>' in tokenizer.decode(ids).replace('</think>', '')
  assert tokenizer.added_tokens['<|im_start|>'].id in ids


def test_templates_that_cut_texts_at_their_own_marks_work():
  # As Qwen 3's: earlier thoughts are left out.
  tokenizer = with_template(
    '{% for m in messages %}{% set text = m.content %}'
    "{% if m.role == 'assistant' and '</think>' in text and not loop.last %}"
    "{% set text = text.split('</think>')[-1] | trim %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
  )
  thought = '<think>hm <|im_end|></think> ok <|im_start|>'
  messages = [user('a'), {'role': 'assistant', 'content': thought}, user('b')]
  ids, (response,) = encode(tokenizer, messages, thought)
  assert tokenizer.decode(ids).count('think') == 0
  assert 'ok <|im_start|><|im_end|>' in tokenizer.decode(ids)
  # Three turns and the beginning of an answer, no more.
  start, end = (
    tokenizer.added_tokens[t].id for t in ('<|im_start|>', '<|im_end|>')
  )
  assert (ids.count(start), ids.count(end)) == (4, 3)
  assert (response.count(start), response.count(end)) == (0, 1)
  assert tokenizer.decode(response) == thought + '<|im_end|>'


def test_private_letters_in_the_data_are_letters():
  tokenizer = FAMILIES['chatml']
  text = 'x \U00100041 \U0010ffff \ue000'
  ids, _ = encode(tokenizer, [user(text)], 'a')
  assert text in tokenizer.decode(ids)


# --- Templates that are refused ---


@pytest.mark.parametrize(
  'template, message',
  [
    ("{{ ''.__class__ }}", "reads '__class__' of a str"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", '__class__'),
    ("{{ messages | attr('__class__') }}", '__class__'),
    ('{{ raise_exception.__globals__ }}', '__globals__'),
    ('{{ cycler.__init__.__globals__ }}', '__init__'),
    ('{{ messages.append(1) }}', "'append' of a list"),
    ('{{ strftime_now.__self__ }}', '__self__'),
    ("{% include '/etc/passwd' %}", 'no loader'),
    ('{% for i in range(10**9) %}{% endfor %}', 'Range too big'),
    ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", 'more than 4'),
    ("{{ 'a' * 10**12 }}", 'more memory'),
    ("{{ 'a'.center(10**10) }}", 'more memory'),
    ('{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}', 'recursion'),
    ("{{ raise_exception('no') }}", 'it says: no'),
    ('{{ persona }}', "'persona' is undefined"),
    ('{{ persona.name }}', "'persona' is undefined"),
    ("{{ messages[0]['name']['x'] }}", "no attribute 'name'"),
    ('{{ messages[0].content ', 'unexpected end of template'),
    ('{% for m in messages %}', 'TemplateSyntaxError'),
  ],
)
def test_bad_templates_are_refused_in_one_line(template, message):
  start = time.monotonic()
  with pytest.raises(ValueError, match=message) as caught:
    encode(with_template(template), [user('a')], 'b')
  assert time.monotonic() - start < 5  # far less on a machine with time
  assert '\n' not in str(caught.value)
  assert 'use another template (data.chat_template)' in str(caught.value)


@pytest.mark.parametrize(
  'template',
  [
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
    '{% endfor %}',
    '{% set n = namespace(x=3) %}{% for i in range(99) %}'
    '{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}',
    "{{ 'a' * 10**8 | length }}{{ 10 ** 10000000 }}{{ 3 ** 9999999 % 7 }}",
  ],
)
def test_templates_without_end_are_ended(template):
  start = time.monotonic()
  with pytest.raises(
    ValueError, match=r'takes too long|more memory|int string'
  ):
    encode(with_template(template), [user('a')], 'b')
  assert time.monotonic() - start < 10  # 1 s of processor time


def test_a_template_that_goes_wrong_later_is_ended_too():
  # The check with a harmless conversation passes.
  tokenizer = with_template(
    "{% for m in messages %}{% if m.content == 'go' %}"
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
    '{% endfor %}{% endif %}{{ m.content }}{% endfor %}'
  )
  with chat.Chat(tokenizer) as template:
    assert template.encode([user('a')], [('b', True)])[0]
    with pytest.raises(ValueError, match='takes too long'):
      template.encode([user('go')], [('b', True)])
    with pytest.raises(ValueError, match='chat template'):
      template.encode([user('a')], [('b', True)])


@pytest.mark.parametrize(
  'template, message',
  [
    # The prompt changes when an answer follows.
    (
      "{{ messages | length }}{% for m in messages %}{{ '<|im_start|>' +"
      ' m.content }}{% endfor %}',
      r"writes a prompt otherwise .*'1<\|im_start\|>.* becomes '2<",
    ),
    (
      "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
      '{% endif %}{% endfor %}',
      'does not write the answer',
    ),
    (
      '{% for m in messages %}{{ m.content | upper }}{% endfor %}',
      'changes or looks into the texts',
    ),
  ],
)
def test_templates_that_cannot_be_cut_are_refused(template, message):
  with pytest.raises(ValueError, match=message) as caught:
    encode(with_template(template), [user('a b')], 'c d')
  assert 'give prompt and responses as text' in str(caught.value)


def test_messages_without_a_template_say_what_to_do():
  with pytest.raises(ValueError, match=r'chat_template\.jinja into the folder'):
    chat.Chat(tokenizers.ByteTokenizer())


def test_what_transformers_gives_templates_is_there():
  renderer = chat.Renderer(
    "{{ strftime_now('%Y') }} {{ messages | tojson }} {{ [1] | tojson(indent=1)"
    ' }}{% for m in messages %}{% break %}{% endfor %}'
    '{% if tools is none and documents is none %} {{ eos_token }}{% endif %}'
    '{% if date is defined or date %}{{ date }}{% endif %}'
    '{{ messages[0].name }}',
    {'eos_token': '</s>'},
  )
  (text,) = renderer.render([([user('"é<')], True)])
  renderer.close()
  year, rest = text.split(' ', 1)
  assert 2025 <= int(year) < 2200
  assert rest == ('[{"role": "user", "content": "\\"é<"}] [\n 1\n] </s>')
