"""Text for terminals."""


def printable(text: str) -> str:
  """Returns text on one line, with escapes for characters that steer a terminal."""
  if text.isprintable():
    return text
  escape = lambda c: c.encode('unicode_escape').decode()
  return ''.join(c if c.isprintable() else escape(c) for c in text)


def of_bytes(count: float) -> str:
  """Returns a number of bytes in three digits.

  >>> of_bytes(9_659_280)
  '9.66 MB'
  """
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 999.5:
      return f'{count:.3g} {unit}'
    count /= 1000
  return f'{count:,.3g} TB'
