"""Renders chat templates, in a process of its own that may be killed.

A template comes with a model from somebody else and is a program. Jinja's
sandbox keeps it from attributes and functions, but not from `'a' * 10**10` or a
loop in a loop. Here the kernel does: a rendering has so much processor time and
the process so much memory, whatever the template is up to. `chat` talks to it:

    template, names                 -> {"constants": [...]} or {"error": ...}
    [[messages, with prompt], ...]  -> {"texts": [...]} or {"error": ...}

one JSON value a line. The file imports nothing of ours, so it starts fast.
"""

import datetime
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

SECONDS = 1.0  # of processor time for one rendering
MEMORY = 1 << 29  # bytes of addresses
CHARACTERS = 4_000_000  # of a rendered conversation


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  def unsafe_undefined(self, obj, attribute):
    # The usual sandbox prints nothing for ''.__class__, and goes on.
    raise jinja2.sandbox.SecurityError(
      f'it reads {attribute!r} of a {type(obj).__name__}'
    )


class _Undefined(jinja2.Undefined):
  """Nothing, for what a message lacks; an error, for a variable we lack."""

  def __str__(self):
    if self._undefined_obj is jinja2.utils.missing:
      self._fail_with_undefined_error()
    return ''


class _Generation(jinja2.ext.Extension):
  """{% generation %}, which marks the assistant's part for transformers."""

  tags = {'generation'}  # noqa: RUF012, as Jinja has it

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(['name:endgeneration'], drop_needle=True)


def _raise(message):
  raise jinja2.TemplateError(f'it says: {message}')


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def environment() -> jinja2.Environment:
  """Returns Jinja as `transformers` sets it up, but for `_Undefined`."""
  jinja = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=_Undefined,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  now = datetime.datetime.now()  # once: midnight must not part two renderings
  jinja.filters['tojson'] = _to_json
  jinja.globals['raise_exception'] = _raise
  jinja.globals['strftime_now'] = now.strftime
  return jinja


def _render(template, messages, with_prompt, names):
  parts, size = [], 0
  for part in template.generate(
    messages=messages,
    add_generation_prompt=with_prompt,
    tools=None,
    documents=None,
    **names,
  ):
    size += len(part)
    if size > CHARACTERS:
      raise jinja2.TemplateError(f'it writes more than {CHARACTERS:,} letters')
    parts.append(part)
  return ''.join(parts)


def _guarded(function, *arguments) -> dict:
  """Calls within the limits; what goes wrong is said."""
  # Its signal ends the process, also in the middle of one long operation.
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    return function(*arguments)
  except MemoryError:
    return {'error': 'it needs more memory than it may have'}
  except Exception as error:  # A template can raise anything.
    text = ' '.join(str(error).split())
    kind = type(error).__name__
    return {'error': f'{text[:300]} ({kind})' if text else kind}
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
  """Reads and answers line after line."""
  for limit, value in (
    (resource.RLIMIT_AS, MEMORY),
    (resource.RLIMIT_FSIZE, 0),
    (resource.RLIMIT_CORE, 0),
  ):
    resource.setrlimit(limit, (value, value))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends us, as it should
  sys.stdin.reconfigure(encoding='utf-8')
  sys.stdout.reconfigure(encoding='utf-8')
  source, names = json.loads(sys.stdin.readline())
  jinja = environment()
  compiled = None

  def compile_source():
    nonlocal compiled
    tree = jinja.parse(source)
    constants = {
      node.value
      for node in tree.find_all(jinja2.nodes.Const)
      if isinstance(node.value, str)
    }
    compiled = jinja.from_string(source)
    return {'constants': sorted(constants)}

  def answer(value):
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + '\n')
    sys.stdout.flush()

  answer(_guarded(compile_source))
  for line in sys.stdin:
    texts = []
    for messages, with_prompt in json.loads(line):
      reply = _guarded(
        lambda m, p: {'text': _render(compiled, m, p, names)},
        messages,
        with_prompt,
      )
      if 'error' in reply:
        break
      texts.append(reply['text'])
    answer(reply if 'error' in reply else {'texts': texts})


if __name__ == '__main__':
  main()
