"""Arrays without their zeros.

Shape letters: an array is taken as a matrix of R rows and C columns, n of whose
elements are not zero and z of whose elements are.
"""

from collections.abc import Sequence
import math

import numpy as np

from rotbits_jax.coding import statistics
from rotbits_jax.system import schema

Parts = list[tuple[np.dtype, tuple[int, ...]]]
"""The dtypes and shapes of the arrays as which an array is coded."""

PARTS = 3
"""The number of these arrays: the mask, the signs and the values."""

_LEAST_ELEMENTS = 1 << 12  # masks of fewer cost more than they save
# Fewer zeros are exceptions, or, where numbers were rounded to a step, like others.
_LEAST, _LEAST_ROUNDED = 1 / 1024, 1 / 32
_SAMPLE = 1 << 14  # elements that tell the share of zeros


class Sparse(schema.Row):
  """An array without its zeros.

  The parts are a mask; the signs of the zeros, if one is -0; and the elements that are
  not zero. A byte of the mask holds eight successive elements of a row, so the coder
  sees patterns, such as two zeros in every four.
  """

  values: schema.Size  # n
  negative: bool  # whether a zero is -0

  def parts(self, dtype: np.dtype, shape: tuple[int, ...]) -> Parts:
    """Returns the dtype and the shape of each part of an array."""
    signs = -(-(math.prod(shape) - self.values) // 8) if self.negative else 0
    mask = math.prod(shape[:-1]), -(-math.prod(shape[-1:]) // 8)
    uint8 = np.dtype(np.uint8)
    return [(uint8, mask), (uint8, (signs,)), (dtype, (self.values,))]

  def join(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Makes an array of its parts, which may be damaged."""
    mask, signs, values = parts
    bits = bit_patterns(out).reshape(len(mask), -1)
    bits[...] = 0
    is_set = np.unpackbits(mask, axis=1, count=bits.shape[1]).view(bool)
    if np.count_nonzero(is_set) != self.values:
      raise ValueError(f'the mask does not have {self.values} elements')
    bits[is_set] = bit_patterns(values)
    if self.negative:
      negative = np.unpackbits(signs, count=bits.size - self.values)
      bits[~is_set] = negative.astype(bits.dtype) << 8 * bits.itemsize - 1


def bit_patterns(array: np.ndarray) -> np.ndarray:
  """Returns the bit patterns of a contiguous array: a view, unsigned integers `[n]`."""
  return array.reshape(-1).view(f'u{array.dtype.itemsize}')


def without_zeros(
  array: np.ndarray, shares_step: bool
) -> tuple[Sparse, list[np.ndarray]] | None:
  """Returns the form of floats with many zeros, and its parts; None for others."""
  if array.size < _LEAST_ELEMENTS:
    return None
  bits = bit_patterns(array).reshape(-1, array.shape[-1])
  magnitude = bits.dtype.type((1 << 8 * array.itemsize - 1) - 1)
  flat = bits.reshape(-1)
  sample = np.concatenate([flat[run] for run in statistics.runs(flat.size, _SAMPLE)])
  share = 1 - np.count_nonzero(sample & magnitude) / sample.size
  if share <= (_LEAST_ROUNDED if shares_step else _LEAST):
    return None
  is_set = bits & magnitude > 0
  values, negative = bits[is_set], bits[~is_set] > 0
  form = Sparse(values.size, bool(negative.any()))
  signs = np.packbits(negative[: negative.size if form.negative else 0])
  mask = np.packbits(is_set, axis=1)
  return form, [mask, signs, values.view(array.dtype)]
