"""A word on the terminal about work whose end is not known: the next output covers it.

A dumb terminal keeps each word on a line of its own. Nothing is shown in a pipe or a
log. This module imports nothing slow, because a command shows its first word before JAX
is imported.
"""

import contextlib
import os
import sys

_shown = False


def is_terminal() -> bool:
  """Returns whether stderr is a terminal whose lines can be overwritten."""
  return _has_terminal() and os.environ.get('TERM') != 'dumb'


def _has_terminal() -> bool:
  return sys.stderr is not None and sys.stderr.isatty()


def show(text: str) -> None:
  """Shows a line, in place of the one before if the terminal can."""
  global _shown
  if not _has_terminal():
    return
  with contextlib.suppress(OSError):  # the terminal is gone; the work goes on
    if is_terminal():
      _shown = True
      width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
      print(f'\r\x1b[K{text[: width - 1]}', end='', file=sys.stderr, flush=True)
    else:
      print(text, file=sys.stderr, flush=True)


def clear() -> None:
  """Removes the line."""
  global _shown
  if _shown:
    _shown = False
    with contextlib.suppress(OSError):
      print('\r\x1b[K', end='', file=sys.stderr, flush=True)
