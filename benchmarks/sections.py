"""Writing of single sections of RESULTS.md, for benchmarks that own a section."""

import os
import pathlib
import platform
import re

import jax


def write(path: str | pathlib.Path, title: str, body: str) -> None:
  """Replaces the section with this title, or appends it to the file."""
  file = pathlib.Path(path)
  text = file.read_text() if file.exists() else '# Results\n'
  section = f'## {title}\n\n{body.strip()}\n'
  pattern = rf'^## {re.escape(title)}\n.*?(?=^## |\Z)'
  found = re.search(pattern, text, re.DOTALL | re.MULTILINE)
  if found is None:
    text = f'{text.rstrip()}\n\n{section}'
  else:
    after = text[found.end() :]
    text = text[: found.start()] + section + ('\n' if after else '') + after
  file.write_text(text)


def with_table(about: str, table: str) -> str:
  """Returns the body of a section: a paragraph, and a table of plain text."""
  return f'{about}\n\n```\n{table}\n```'


def machine() -> str:
  """Returns a description of this machine."""
  device = jax.devices()[0].device_kind
  return f'{os.cpu_count()} cores of {_processor()}, {device}, jax {jax.__version__}'


def _processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  found = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
  return found[1] if found else platform.machine()
