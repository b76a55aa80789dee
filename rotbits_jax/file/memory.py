"""The memory for decoded records: too much is refused before it is allocated."""

from collections.abc import Sequence
import contextlib
import functools
import os
import pathlib

import numpy as np

from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import host

LARGE = 1 << 30
"""Bytes of records beside which no others are held, as those of the widest layers."""


def allocate(
  entries: Sequence[manifest_lib.RecordEntry],
  *,
  stacked: int | None = None,
  integers: bool = False,
) -> dict[str, list[np.ndarray]]:
  """Makes the memory for the leaves of a record, or of several in a stack.

  Args:
    entries: the manifest's entries of the records, which have equal stack keys.
    stacked: the length of the leading axis of the arrays; None if there is none.
    integers: whether multiples of one step get memory for integers.

  Returns:
    The arrays for each leaf, by its path within a record. A leaf that is stored as
    arrays of different shapes in different records has none, and neither has one that
    the reader makes a new array of, unless it is in a stack.

  Raises:
    ContainerError: if memory cannot hold them.
  """
  lead = () if stacked is None else (stacked,)
  specs = [{x.inner(leaf.path): y for leaf, y in x.leaf_specs()} for x in entries]
  found: dict[str, list[np.ndarray]] = {}
  for leaf in entries[0].leaves:
    path = entries[0].inner(leaf.path)
    if stacked is None and leaf.is_made_anew:
      continue
    wanted = [(x.shape, x.dtype) for x in specs[0][path]]
    if leaf.is_array or (leaf.is_multiples and not integers):
      wanted = [(leaf.shape, leaf.dtype)]
    elif any([(x.shape, x.dtype) for x in own[path]] != wanted for own in specs):
      continue
    try:
      found[path] = [host.empty((*lead, *shape), dtype) for shape, dtype in wanted]
    except MemoryError:
      raise too_large(leaf.path, sum(x.decoded_bytes for x in entries)) from None
  return found


def check(name: str, nbytes: int) -> None:
  """Refuses to decode more than this machine can hold, before it allocates anything.

  The size of a file is no bound, because zeros take hardly any bytes in it.

  Args:
    name: name of the content, for the error.
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
