"""Arrays without their zeros.

Shape letters: an array is taken as a matrix of R rows and C columns, n of whose
elements are not zero and z of whose elements are.
"""

from collections.abc import Sequence

import numpy as np

from rotbits_jax.coding import contexts
from rotbits_jax.coding import statistics
from rotbits_jax.coding import tables
from rotbits_jax.system import schema

Parts = list[tuple[np.dtype, tuple[int, ...]]]
"""The dtypes and shapes of the arrays as which an array is coded."""

_WIDTH = 128  # of the rows in which elements are stored, because rows have scales
_LEAST_ELEMENTS = 1 << 12  # masks of fewer cost more than they save
# Fewer zeros are exceptions, or, where numbers were rounded to a step, like others.
_LEAST, _LEAST_ROUNDED = 1 / 1024, 1 / 32
_SAMPLE = 1 << 14  # elements that tell the share of zeros


class Sparse(schema.Row):
  """An array without its zeros.

  The parts are a mask; the signs of the zeros, if one is -0; and the elements that are
  not zero, as rows. A byte of the mask holds eight successive elements of a line, so
  the coder sees patterns, such as two zeros in every four.
  """

  values: schema.Size  # n
  negative: bool  # whether a zero is -0
  transposed: bool  # whether the order is that of the transpose

  def parts(self, dtype: np.dtype, shape: tuple[int, ...]) -> Parts:
    """Returns the dtype and the shape of each part of an array."""
    lines, length = contexts.matrix_shape(shape)[:: -1 if self.transposed else 1]
    rows = (self.values // _WIDTH, _WIDTH), (self.values % _WIDTH,)
    signs = -(-(lines * length - self.values) // 8) if self.negative else 0
    masks = [(np.dtype(np.uint8), x) for x in ((lines, -(-length // 8)), (signs,))]
    return masks + [(dtype, row) for row in rows]

  def join(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Makes an array of its parts, which may be damaged."""
    mask, signs, *rows = parts
    bits = bit_patterns(out).reshape(contexts.matrix_shape(out.shape))
    bits[...] = 0
    bits = bits.T if self.transposed else bits
    is_set = np.unpackbits(mask, axis=1, count=bits.shape[1]).view(bool)
    if np.count_nonzero(is_set) != self.values:
      raise ValueError(f'the mask does not have {self.values} elements')
    bits[is_set] = np.concatenate([bit_patterns(x) for x in rows])
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
  bits = bit_patterns(array).reshape(contexts.matrix_shape(array.shape))
  magnitude = bits.dtype.type((1 << 8 * array.itemsize - 1) - 1)
  flat = bits.reshape(-1)
  sample = np.concatenate([flat[run] for run in statistics.runs(flat.size, _SAMPLE)])
  share = 1 - np.count_nonzero(sample & magnitude) / sample.size
  if share <= (_LEAST_ROUNDED if shares_step else _LEAST):
    return None
  is_set = bits & magnitude > 0
  masks = [np.packbits(x, axis=1) for x in (is_set, is_set.T)]
  costs = [_cost(x) for x in masks]
  transposed = costs[1] < costs[0]
  ordered, is_set = (bits.T, is_set.T) if transposed else (bits, is_set)
  values, negative = ordered[is_set], ordered[~is_set] > 0
  whole = values.size - values.size % _WIDTH
  rows = values[:whole].reshape(-1, _WIDTH), values[whole:]
  form = Sparse(values.size, bool(negative.any()), transposed)
  signs = np.packbits(negative[: negative.size if form.negative else 0])
  return form, [masks[transposed], signs, *(x.view(array.dtype) for x in rows)]


def _cost(mask: np.ndarray) -> float:
  """Returns about the bits of a mask, whose rows have scales."""
  levels, _ = statistics.densities(mask)
  counts = np.bincount((levels[:, None] << 8 | mask).reshape(-1), minlength=1 << 13)
  lines = tables.entropy_bits(np.bincount(levels))
  return float(tables.entropy_bits(counts.reshape(-1, 256)).sum() + lines)
