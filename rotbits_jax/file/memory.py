"""The memory that decoding may take: more is refused before it is allocated."""

import contextlib
import functools
import os
import pathlib

from rotbits_jax.file.container import ContainerError


def check(name: str, nbytes: int) -> None:
  """Refuses to decode more than this machine can hold, before it allocates anything.

  The size of a file is no bound, because zeros take hardly any bytes in it.

  Args:
    name: what is decoded, for the error.
    nbytes: the bytes that it takes in memory.

  Raises:
    ContainerError: if memory cannot hold them.
  """
  if nbytes > (_available() or nbytes):
    raise too_large(name, nbytes)


def too_large(name: str, nbytes: int) -> ContainerError:
  """Returns the error for content that memory cannot hold."""
  return ContainerError(
    f'{name}: it decodes to {nbytes:,} bytes, more than memory holds'
  )


# Where a container of Linux finds the bytes of memory that it may use, with the second
# and the first version of control groups.
_LIMITS = (
  '/sys/fs/cgroup/memory.max',
  '/sys/fs/cgroup/memory/memory.limit_in_bytes',
)


@functools.cache
def _available() -> int | None:
  """Returns the bytes of memory for this process; None if the system does not tell."""
  found = []
  with contextlib.suppress(AttributeError, ValueError, OSError):  # not a Unix
    found.append(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))
  for path in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max' stands for no limit
      found.append(int(pathlib.Path(path).read_text()))
  return min(found, default=None)
