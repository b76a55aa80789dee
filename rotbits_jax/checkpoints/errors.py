"""The errors for checkpoints that cannot be read or written."""

_MOST_SHOWN = 200  # characters


class CheckpointError(ValueError):
  """A file, config or tensor of a checkpoint is missing, damaged or unsupported."""


class UnsupportedError(CheckpointError):
  """A checkpoint is not of a known family, or has a setting or tensor of its own.

  The files need not be damaged. `open_plain` opens such a checkpoint.
  """


def cut(text: str) -> str:
  """Returns a text from a file for an error message, at most 200 characters of it."""
  return text if len(text) <= _MOST_SHOWN else f'{text[: _MOST_SHOWN - 3]}...'
