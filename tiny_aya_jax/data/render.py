"""A process of its own that renders one foreign chat template; template.py starts it and asks it.

Never imported. A chat template is a program of strangers. Jinja's sandbox keeps it from Python's
insides, but not from taking hours or all memory: 'a' * 10**10, a filter that pads, loops in loops,
and some of it already when the template is compiled. No list of forbidden words holds that; a
process with limits of the kernel's does. Nor can it open a file or a socket once it has begun.

Reads lines of JSON: first {"source", "variables", "seconds", "memory", "characters"}, then
{"messages", "add_generation_prompt"} each. Answers each with {"text"} or {"why"}, or dies of its limit.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
  """{% generation %}...{% endgeneration %}, which says what is trained on: rendered as it stands."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def main():
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
  given = json.loads(sys.stdin.readline())
  _open_all()
  resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
  resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
  template = None

  def compiled():
    nonlocal template
    template = _environment().from_string(given["source"], given["variables"])
    return ""

  _answer(compiled, given)
  for line in sys.stdin:
    asked = json.loads(line)
    _answer(lambda: template.render(tools=None, documents=None, **asked), given)


def _open_all():
  """Reads the files that Python and jinja read at their first use."""
  datetime.datetime.now().astimezone()
  with contextlib.suppress(jinja2.TemplateError):
    _environment().from_string("{{ 'a\\n' }}{{ raise_exception('') }}").render()


def _answer(compute, given):
  """Prints what `compute` returns; this process ends if it takes longer, whatever it is doing."""
  signal.setitimer(signal.ITIMER_PROF, given["seconds"])  # of this process's own, not the clock's
  try:
    text = compute()
    found = dict(text=text) if len(text) <= given["characters"] else dict(
        why=f"it renders {len(text):,} characters, expected at most {given['characters']:,}")
  except Exception as error:  # a template may fail in any way
    found = dict(why=_why(error))
  signal.setitimer(signal.ITIMER_PROF, 0)
  print(json.dumps(found), flush=True)


def _why(error):
  said = " ".join(str(error)[:1000].split())[:300]
  return said if type(error) is jinja2.TemplateError else f"{type(error).__name__}: {said}"


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """What is not safe is an error; jinja's own renders it as nothing until something is done with it."""

  def unsafe_undefined(self, obj, attribute):
    raise jinja2.sandbox.SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


def _environment():
  """As transformers renders: its options, its functions."""
  environment = Sandbox(
      trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation])
  environment.filters["tojson"] = _to_json
  environment.globals.update(raise_exception=_raise, strftime_now=_now)
  return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  """Without jinja's escapes for HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                    sort_keys=sort_keys)


def _raise(why):
  raise jinja2.TemplateError(why)


def _now(form):
  return datetime.datetime.now().strftime(form)


if __name__ == "__main__":
  main()
