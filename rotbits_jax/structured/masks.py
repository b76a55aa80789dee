"""Floats without their zeros: a mask, the other floats, and perhaps signs of zeros.

A byte of the mask holds eight successive elements of a row, so a coder sees patterns,
such as two zeros in every four. There are signs, 8 in a byte, if a zero is -0.
"""

from collections.abc import Sequence

import numpy as np


def divided(array: np.ndarray) -> list[np.ndarray]:
  """Returns the parts of an array in C order: uint8 `[R, C / 8]`, `[n]`, uint8."""
  rows = array.reshape(-1, array.shape[-1]).view(f'u{array.itemsize}')
  is_set = rows << 1 > 0
  parts = [np.packbits(is_set, axis=1), rows[is_set].view(array.dtype)]
  negative = rows[~is_set] > 0
  return parts + [np.packbits(negative)] * bool(negative.any())


def join(parts: Sequence[np.ndarray], out: np.ndarray) -> None:
  """Writes the array that has these parts, which may be damaged."""
  mask, values, *signs = parts
  bits = out.view(f'u{out.itemsize}').reshape(len(mask), -1)
  bits[...] = 0
  is_set = np.unpackbits(mask, axis=1, count=bits.shape[1]).view(bool)
  if np.count_nonzero(is_set) != values.size:
    raise ValueError(f'the mask does not have {values.size} elements')
  bits[is_set] = values.view(bits.dtype)
  if signs:
    negative = np.unpackbits(signs[0], count=bits.size - values.size)
    bits[~is_set] = negative.astype(bits.dtype) << 8 * out.itemsize - 1
