"""The checksum of an array that files keep."""

from collections.abc import Iterable

import numpy as np
from zlib_ng import zlib_ng


def of_array(array: np.ndarray) -> int:
  """Returns the CRC-32 of an array's bytes in C order."""
  return zlib_ng.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def joined(pieces: Iterable[tuple[int, int]]) -> int:
  """Returns the CRC-32 of pieces one after the other, of each CRC-32 and size."""
  crc = 0
  for piece in pieces:
    crc = zlib_ng.crc32_combine(crc, *piece)
  return crc
