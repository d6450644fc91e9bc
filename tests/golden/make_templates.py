"""Write what transformers makes of conversations with each chat template.

Needs transformers, which nothing else here does:
  pip install 'transformers==5.*'
  PYTHONPATH=. python tests/golden/make_templates.py [SmolLM2.gguf]
The templates in `templates/` are ours, in the manner of their families; with
a SmolLM2 file its own is there, too.
"""

import json
import pathlib
import sys
import tempfile

import jinja2
import tokenizers as backend
import transformers

from dpo_jax.data import tokenizers
from tests import vocabularies

HERE = pathlib.Path(__file__).parent


def turns(*texts, system=None):
  roles = ['user', 'assistant'] * len(texts)
  messages = [
    {'role': role, 'content': text} for role, text in zip(roles, texts)
  ]
  if system is not None:
    messages.insert(0, {'role': 'system', 'content': system})
  return messages


CONVERSATIONS = [
  turns('Hi', 'Yes'),
  turns('the question', 'the answer', 'again?', 'the the 12'),
  turns('Hi', 'Yes', system='Be brief.'),
  turns('  blanks \n', ' and\n\nlines '),
  turns('étude 你好 "quotes" \\n {{ x }} {% y %}', "🤖 <b> & 'c' [INST"),
]


def render(tokenizer, messages, **keywords):
  try:
    return tokenizer.apply_chat_template(messages, **keywords)
  except jinja2.TemplateError as error:
    return {'error': str(error)}


def main():
  golden = {
    'versions': {
      module.__name__: module.__version__
      for module in (jinja2, transformers, backend)
    },
    'conversations': CONVERSATIONS,
    'templates': {},
  }
  family = vocabularies.chat_tokenizers()
  if sys.argv[1:]:
    import gguf

    fields = gguf.GGUFReader(sys.argv[1]).fields
    family['smollm2'] = tokenizers.from_gguf(
      {name: field.contents() for name, field in fields.items()}
    )
  for name, tokenizer in family.items():
    with tempfile.TemporaryDirectory() as folder:
      tokenizer.save(folder)
      theirs = transformers.AutoTokenizer.from_pretrained(folder)
    golden['templates'][name] = [
      {
        'prompt': render(
          theirs, messages[:-1], tokenize=False, add_generation_prompt=True
        ),
        'text': render(theirs, messages, tokenize=False),
        'prompt_ids': render(
          theirs,
          messages[:-1],
          tokenize=True,
          add_generation_prompt=True,
          return_dict=False,
        ),
        'ids': render(theirs, messages, tokenize=True, return_dict=False),
      }
      for messages in CONVERSATIONS
    ]
  text = json.dumps(golden, indent=1)
  (HERE / 'templates.json').write_text(text + '\n')


if __name__ == '__main__':
  main()
