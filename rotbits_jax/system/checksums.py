"""The checksum of an array that files keep."""

import numpy as np
from zlib_ng import zlib_ng


def of_array(array: np.ndarray, crc: int = 0) -> int:
  """Returns the CRC-32 of an array's bytes in C order, after bytes with another."""
  return zlib_ng.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), crc)
