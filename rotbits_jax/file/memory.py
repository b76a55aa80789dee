"""Memory: too much is refused before it is allocated."""

from collections.abc import Iterator
import contextlib
import functools
import os
import pathlib

from rotbits_jax.file.container import ContainerError

LARGE = 1 << 30
"""Bytes of records beside which no others are held, as those of the widest layers."""

# Where a container of Linux finds the bytes of memory that it may use.
_LIMITS = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'


@contextlib.contextmanager
def bounded(name: str, nbytes: int) -> Iterator[None]:
  """Refuses content that decodes to more bytes than this machine can hold.

  The size of a file is no bound, because zeros take hardly any bytes in it.
  """
  try:
    if nbytes > (_available() or nbytes):
      raise MemoryError
    yield
  except MemoryError:
    text = f'it decodes to {nbytes:,} bytes, more than memory holds'
    raise ContainerError(f'{name}: {text}') from None


@functools.cache
def _available() -> int | None:
  """Returns the bytes of memory for this process; None if the system does not tell."""
  limits = []
  with contextlib.suppress(AttributeError, ValueError, OSError):  # not a Unix
    limits.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
  for path in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max' stands for no limit
      limits.append(int(pathlib.Path(path).read_text()))
  return min(limits, default=None)
