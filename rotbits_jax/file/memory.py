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

# Fresh memory costs more time than decoding into it, above all from a host of virtual
# machines. So memory of arrays that are gone is kept, by its size, until the system
# needs it or an array has another size. Large pages cost less than small ones.
_PAGE = 1 << 21  # bytes of a large page
_CAN_KEEP = hasattr(mmap, 'MADV_HUGEPAGE') and hasattr(mmap, 'MADV_FREE')
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
  if not _CAN_KEEP or size < 2 * _PAGE:
    return host.empty(shape, dtype)
  length = -(-size // _PAGE) * _PAGE
  jax.device_put(
    0, host.device()
  )  # JAX drops its arrays that are gone when it is called
  try:
    memory = _kept[length].pop()
  except LookupError:
    _kept.clear()
    try:
      memory = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
      memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # too little memory, or no large pages
      return host.empty(shape, dtype)
  array = np.frombuffer(memory, np.uint8)
  weakref.finalize(array, _keep, memory).atexit = False
  return array[:size].view(dtype).reshape(shape)


def _keep(memory: mmap.mmap) -> None:
  """Keeps the memory of an array that is gone."""
  with contextlib.suppress(OSError):
    memory.madvise(mmap.MADV_FREE)
    _kept.setdefault(len(memory), []).append(memory)
