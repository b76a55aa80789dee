"""The checksum of an array that files keep."""

from collections.abc import Iterable
import functools

import numpy as np
from zlib_ng import zlib_ng


def of_array(array: np.ndarray, crc: int = 0) -> int:
  """Returns the CRC-32 of an array's bytes in C order, after bytes with another."""
  return zlib_ng.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), crc)


def joined(pieces: Iterable[tuple[int, int]]) -> int:
  """Returns the CRC-32 of pieces one after the other, of each CRC-32 and size."""
  return functools.reduce(lambda crc, x: zlib_ng.crc32_combine(crc, *x), pieces, 0)
