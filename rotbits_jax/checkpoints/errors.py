"""The errors for checkpoints that cannot be read or written."""

from collections.abc import Iterator
import contextlib
import os

_MOST_SHOWN = 200  # characters


class CheckpointError(ValueError):
  """A file, config or tensor of a checkpoint is missing, damaged or unsupported."""


def cut(text: str) -> str:
  """Returns a text from a file for an error message, at most 200 characters of it."""
  return text if len(text) <= _MOST_SHOWN else f'{text[: _MOST_SHOWN - 3]}...'


@contextlib.contextmanager
def named(path: str | os.PathLike[str], *types: type[Exception]) -> Iterator[None]:
  """Turns errors about a file into a `CheckpointError` that begins with its path."""
  turned: tuple[type[Exception], ...] = (OSError, *types)
  try:
    yield
  except CheckpointError as e:
    is_named = str(e).startswith(f'{path}: ')
    raise e if is_named else type(e)(f'{path}: {e}') from e
  except turned as e:
    text = (isinstance(e, OSError) and e.strerror) or cut(str(e) or repr(e))
    raise CheckpointError(f'{path}: {text}') from e
