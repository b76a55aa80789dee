"""The checksum of an array that files keep."""

from collections.abc import Iterable

import numpy as np
from zlib_ng import zlib_ng


def of_array(array: np.ndarray) -> int:
  """Returns the CRC-32 of an array's bytes in C order."""
  return of_parts([array])


def of_parts(parts: Iterable[np.ndarray]) -> int:
  """Returns the checksum of an array that comes in parts, one after the other."""
  crc = 0
  for part in parts:
    crc = zlib_ng.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8), crc)
  return crc
