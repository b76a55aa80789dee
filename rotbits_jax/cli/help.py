"""The help of a command: its docstring and its flags, as wide as the terminal."""

from collections.abc import Iterable, Sequence
import inspect
import os
import re
import shutil
import textwrap
import types

from absl import flags

WIDTH = 80
"""The greatest width, unless COLUMNS says another one."""

COMMON = 'flags of every command'

_OWN = re.compile(r'Only for --preset=([\w|]+): (.*)', re.DOTALL)
_ITEM = re.compile(r'( +\S+(?: \S+)*?  +)(\S.*)')


def text(
  module: types.ModuleType, values: flags.FlagValues, required: Sequence[str]
) -> str:
  """Returns the help of a command.

  Args:
    module: the module of the command, whose docstring is the help.
    values: its flags.
    required: names of the flags that it cannot do without.
  """
  given = os.environ.get('COLUMNS', '')
  width = int(given) if re.fullmatch(r'[1-9]\d{0,3}', given, re.ASCII) else None
  width = width or min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
  doc, mark, fields = (inspect.getdoc(module) or '').partition('\n\nJSON:\n\n')
  parts = [_paragraph(own, width) for own in doc.split('\n\n')]
  for heading, own in _sections(values, required).items():
    lines = [line for flag in own for line in _flag(flag, width)]
    parts.append('\n'.join([f'{heading}:', *lines]))
  if mark:
    parts += ['JSON:', _paragraph(fields, width)]
  return '\n\n'.join(parts)


def _sections(
  values: flags.FlagValues, required: Sequence[str]
) -> dict[str, list[flags.Flag]]:
  """Returns flags by their headings: required ones, own ones, those of presets."""
  found: dict[str, list[flags.Flag]] = {'required': [], 'flags': []}
  modules = values.flags_by_module_dict()
  for module in sorted(modules, key=lambda x: x == COMMON):
    for flag in sorted(modules[module], key=lambda x: x.name):
      own = _OWN.match(_purpose(flag))
      heading = 'flags'
      if flag.name in required:
        heading = 'required'
      elif module == COMMON:
        heading = COMMON
      elif own is not None:
        heading = f'only with --preset={own[1]}'
      found.setdefault(heading, []).append(flag)
  return {heading: own for heading, own in found.items() if own}


def _flag(flag: flags.Flag, width: int) -> list[str]:
  """Returns the lines of a flag."""
  words = getattr(flag.parser, 'enum_values', None)
  kind = '|'.join(words) if words else flag.flag_type().split()[-1].upper()
  kind = {'STRING': '...', 'INT': 'N', 'FLOAT': 'X'}.get(kind, kind)
  name = f'--{flag.name}' if flag.boolean else f'--{flag.name}={kind}'
  if flag.flag_type() == 'config object':
    name = f'--{flag.name}=NAME|FILE'
  if flag.short_name:
    name = f'-{flag.short_name}, {name}'
  help = _purpose(flag)
  if own := _OWN.match(help):
    help = f'{own[2][0].upper()}{own[2][1:]}'
  if flag.default not in (None, False) and not words:
    help += f' [{flag.default}]'
  indent = ' ' * 22
  lines = textwrap.wrap(help, width, initial_indent=indent, subsequent_indent=indent)
  if lines and len(name) <= 18:
    lines[0] = f'  {name:20}{lines[0].strip()}'
    return lines
  return [f'  {name}', *lines]


def _purpose(flag: flags.Flag) -> str:
  """Returns the help of a flag without the parts that absl adds."""
  help = re.sub(r'^<\S+>: ', '', flag.help or '')
  return help.partition(';\n')[0]


def _paragraph(paragraph: str, width: int) -> str:
  """Returns a paragraph, or a list of items, in lines of this width."""
  lines = paragraph.split('\n')
  if all(len(line) <= width for line in lines):
    return paragraph
  if not any(line.startswith(' ') for line in lines):
    return _filled(' '.join(lines), width)
  if lines[0].startswith('  rotbits') or not any(map(_ITEM.fullmatch, lines)):
    commands = re.sub(r'\n    +', ' ', paragraph).split('\n')
    return '\n'.join(_filled(line, width, '  ', '    ') for line in commands)
  found: list[str] = []
  for item in _items(lines):
    match = _ITEM.fullmatch(item)
    head, tail = ('', item) if match is None else (match[1], match[2])
    found.append(_filled(tail, width, head, ' ' * len(head)))
  return '\n'.join(found)


def _items(lines: Iterable[str]) -> list[str]:
  """Joins the lines of each item of a list."""
  found: list[str] = []
  for line in lines:
    if found and not _ITEM.fullmatch(line):
      found[-1] += f' {line.strip()}'
    else:
      found.append(line)
  return found


def _filled(text: str, width: int, first: str = '', others: str = '') -> str:
  return textwrap.fill(
    text.strip(),
    width,
    initial_indent=first,
    subsequent_indent=others,
    break_long_words=False,
    break_on_hyphens=False,
  )
