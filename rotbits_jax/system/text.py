"""Text for terminals."""

import unicodedata


def printable(text: str) -> str:
  """Returns text on one line, with escapes for characters that steer a terminal."""
  escape = lambda c: c.encode('unicode_escape').decode()
  is_plain = lambda c: c.isprintable() or unicodedata.category(c) == 'Zs'  # a space
  return ''.join(c if is_plain(c) else escape(c) for c in text)
