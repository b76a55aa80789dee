"""Tensors of a sliced model as products of those of its base with bases of subspaces.

They take tensors of the base in this order, and bases V_s, see `subspaces`:

    reads      V_s^T diag(scale) kernel   a kernel that reads it; `[D, n]`, `[D]`
    writes     centred(kernel) V_s        a kernel or table `[n, D]`, or a bias `[D]`
    shortcut   V_s^T V_{s+1}
    bias       offset @ kernel + bias     of a linear layer that reads a LayerNorm:
                                           `[D, n]`, `[D]`, and `[n]` if there is one

Products are sums of integers, see `structured.exact`: vectors of the dense model are
rounded to integers of so many bits that their norms are below 2^26. Arrays that do not
fit together, and numbers that are not finite, raise a ValueError.

Shape letters: D hidden size, d width of a segment, n any other length.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from rotbits_jax import models
from rotbits_jax.relative import entries
from rotbits_jax.structured import exact
from rotbits_jax.structured.subspaces import UNIT
from rotbits_jax.system import schema

_BLOCK = 1 << 22  # numbers of a tensor that are taken together
# How many segments, and arrays of the base, each kind takes.
_COUNTS = {
  'reads': (1, (2,)),
  'writes': (1, (1,)),
  'shortcut': (2, (0,)),
  'bias': (0, (2, 3)),
}


class Product(schema.Object):
  """How a tensor of a sliced model is made of tensors of its base.

  It is an entry of the manifest.
  """

  kind: Literal['reads', 'writes', 'shortcut', 'bias']  # see the module
  segments: tuple[models.config.Count, ...] = ()  # whose bases are needed
  transposed: bool = False  # whether the kernel is the transposed tied embedding
  centred: bool = False  # whether the mean is subtracted from each row of 'writes'
  # Whether tensors of the base are rounded to the dtype, and again after they are
  # scaled or centred. SliceGPT does so.
  rounded: bool = False
  arrays: tuple[entries.BaseArray, ...] = ()  # of the base

  def __post_init__(self) -> None:
    segments, arrays = _COUNTS[self.kind]
    if len(self.segments) != segments or len(self.arrays) not in arrays:
      raise ValueError(
        f'a product {self.kind!r} cannot be made of {len(self.segments)} segments and '
        f'{len(self.arrays)} arrays'
      )

  def vectors(
    self, dense: Sequence[np.ndarray], dtype: np.dtype
  ) -> Iterator[np.ndarray]:
    """Yields blocks of the n vectors that a basis is multiplied with, float64 `[., D]`.

    It takes the tensors of the base, and the dtype of that of the sliced model.
    """
    matrix = np.atleast_2d(dense[0])
    if self.kind in ('reads', 'bias') and not self.transposed:
      matrix = matrix.T
    step = max(_BLOCK // max(matrix.shape[1], 1), 1)
    for start in range(0, len(matrix), step):
      rows = self._rounded(matrix[start : start + step], dtype)
      if self.kind == 'reads':
        rows = self._rounded(rows * self._rounded(dense[1], dtype), dtype)
      elif self.centred:
        # A sum of integers, because a mean of floats may depend on the machine.
        width = rows.shape[1]
        integers, powers = exact.integers(rows, 52 - (width - 1).bit_length())
        integers -= integers.sum(axis=1, keepdims=True) / width
        rows = self._rounded(np.ldexp(integers, -powers), dtype)
      yield rows

  def tensor(
    self,
    dense: Sequence[np.ndarray],
    bases: Sequence[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype,
  ) -> np.ndarray:
    """Returns a tensor of a sliced model, the same on every machine.

    It takes the tensors of the base; a basis for each segment, int32 `[D, d]` in units
    of 2^-25; and shape and dtype of the tensor. Numbers are rounded to float32 first.
    """
    try:
      columns = [np.ldexp(x.T, -UNIT) for x in bases]
      if self.kind == 'shortcut':
        product = exact.times(*columns)
      elif self.kind == 'bias':
        offset, *biases = (self._rounded(x, dtype) for x in dense[1:])
        times = lambda rows: exact.times(rows, offset[None])[:, 0]
        product = np.concatenate([times(rows) for rows in self.vectors(dense, dtype)])
        product = sum(biases, product)
      else:
        blocks = (exact.times(x, columns[0]) for x in self.vectors(dense, dtype))
        product = np.concatenate([exact.rounded(block, dtype) for block in blocks])
        if self.kind == 'reads':
          product = np.ascontiguousarray(product.T)
        elif dense[0].ndim == 1:
          product = product[0]
    except (IndexError, MemoryError) as error:
      raise ValueError(f'a product of these tensors cannot be made: {error}') from error
    if product.shape != shape:
      raise ValueError(f'a product must have the shape {shape}, got {product.shape}')
    return exact.rounded(product, dtype)

  def _rounded(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns an array in float64, rounded to a dtype if the slicer did so."""
    numbers = exact.rounded(array, dtype) if self.rounded else np.asarray(array)
    return numbers.astype(np.float64)

  def equations(
    self, dense: Sequence[np.ndarray], target: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of vectors `[n, D]` and of a tensor `[n, d]`, see `slicing.fit`."""
    left = np.atleast_2d(target.T if self.kind == 'reads' else target)
    for rows in self.vectors(dense, target.dtype):
      yield rows, left[: len(rows)].astype(np.float64)
      left = left[len(rows) :]
