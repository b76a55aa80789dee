"""Text for terminals."""


def printable(text: str) -> str:
  """Returns text on one line, with escapes for characters that steer a terminal."""
  if text.isprintable():
    return text
  escape = lambda c: c.encode('unicode_escape').decode()
  return ''.join(c if c.isprintable() else escape(c) for c in text)
