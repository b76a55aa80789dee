"""Memory: too much is refused before it is allocated, and large arrays use it again."""

from collections.abc import Iterator
import contextlib
import functools
import math
import mmap
import os
import pathlib
import weakref

import jax
import numpy as np

from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import host

LARGE = 1 << 30
"""Bytes of records beside which no others are held, as those of the widest layers."""

_PAGE = 1 << 21  # bytes of a large page

# Fresh memory costs more time than decoding into it, above all in virtual machines. So
# memory of arrays that are gone is kept, by its size, until the system needs it or an
# array has another size.
_kept: dict[int, list[mmap.mmap]] = {}

# Where a container of Linux finds the bytes of memory that it may use.
_LIMITS = (
  '/sys/fs/cgroup/memory.max',
  '/sys/fs/cgroup/memory/memory.limit_in_bytes',
)


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
    raise ContainerError(
      f'{name}: it decodes to {nbytes:,} bytes, more than memory holds'
    ) from None


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


def empty(shape: tuple[int, ...], dtype: np.dtype | type | str) -> np.ndarray:
  """Returns an array as `host.empty` does; a large one may have kept memory."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  length = -(-size // _PAGE) * _PAGE
  if size < 2 * _PAGE or not hasattr(mmap, 'MADV_HUGEPAGE'):  # other than on Linux
    return host.empty(shape, dtype)
  jax.device_put(0, host.device())  # a call frees the memory of JAX's arrays
  try:
    memory = _kept[length].pop()
  except LookupError:
    _kept.clear()
    try:
      memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
      memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # too little memory, or no large pages
      return host.empty(shape, dtype)

  def keep() -> None:
    memory.madvise(mmap.MADV_FREE)
    _kept.setdefault(length, []).append(memory)

  array = np.frombuffer(memory, np.uint8)
  weakref.finalize(array, keep).atexit = False
  return array[:size].view(dtype).reshape(shape)
