"""Sections of RESULTS.md that are written anew, without the other sections."""

import pathlib
import re


def write(path: pathlib.Path, heading: str, about: str, table: str) -> None:
  """Writes a section, in place of the one of this heading or at the end.

  Args:
    path: of the Markdown file.
    heading: of the section.
    about: a paragraph.
    table: plain text.
  """
  section = f'## {heading}\n\n{about}\n\n```\n{table}\n```\n'
  text = path.read_text() if path.exists() else ''
  old = re.compile(rf'^## {re.escape(heading)}\n.*?(?=^## |\Z)', re.M | re.S)
  if old.search(text):
    text = old.sub(lambda found: section + '\n' * (found.end() < len(text)), text, 1)
  else:
    text = f'{text.rstrip()}\n\n{section}'
  path.write_text(text)
