"""The leaf for an array that differs little from a known one, in files only.

The known array is an array of a base, or a product of arrays of a base, which the
reader passes to `materialize`; or, if there is a map, the product of the head with it,
see `tied`. It is rounded to the dtype, and cut or filled with zeros in the first axis.
The coder codes the elements relative to it. `docs/format_leaves.md` has the rules.

Factors predict the update of a merged adapter. A drift predicts weight decay, which
moves all elements of an octave by as many ULPs, or by few others.

Everything here is exact: integers, and sums of floats that are rounded once. Shape
letters: R rows, C columns. What does not fit raises a ValueError.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from rotbits_jax import pool
from rotbits_jax.structured import base
from rotbits_jax.structured import exact
from rotbits_jax.structured import fields
from rotbits_jax.structured import tied
from rotbits_jax.structured import ulps
from rotbits_jax.system import host
from rotbits_jax.system import schema

BLOCK = 1 << 16  # elements with a bit of `changed`, which fit a cache
LONGEST = (1 << 31) - 1  # length of an axis
DRIFTS = 256  # length of a drift
ROUNDED = tuple(ulps.FORMATS)[:3]  # dtypes of arrays that may be predicted

_MOST_RANK = 1 << 12


def in_parts(job: Callable[[slice], Any], rows: int, width: int) -> list[Any]:
  """Runs a job for slices of rows that fit a cache; returns the results in order."""
  step = max(BLOCK // max(width, 1), 1)
  return pool.each(job, [slice(i, min(i + step, rows)) for i in range(0, rows, step)])


# NumPy evaluates a part of other texts, such as '(1,2)f4'.
_Name = Annotated[str, msgspec.Meta(pattern=r'\A\w{1,32}\Z')]
_some = functools.partial(fields.Array, optional=True)


@base.register
@dataclasses.dataclass(frozen=True)
class Difference(base.Structured):
  """An array near a known one; the module's docstring has the rules."""

  type_name: ClassVar[str] = 'difference'
  is_exact: ClassVar[bool] = True
  is_in_files: ClassVar[bool] = True

  lengths: tuple[fields.Length, ...] = fields.static()  # its shape
  name: _Name = fields.static()  # of the dtype
  elements: Annotated[Any, _some(None)] = None  # all, or those of changed blocks
  changed: Annotated[Any, _some('b', np.uint8)] = None
  left: Annotated[Any, _some('Rk', np.int16)] = None
  right: Annotated[Any, _some('kC', np.int16)] = None
  drift: Annotated[Any, _some('i', np.int32)] = None
  map: Annotated[Any, _some('Dd', np.int16)] = None  # see `tied.product`
  unit: Annotated[int, schema.between(-900, 900)] = fields.static(default=0)
  scale: Annotated[int, schema.between(-64, 64)] = fields.static(default=0)  # of `map`

  @property
  def needs(self) -> tuple[str, ...]:  # type: ignore[override]
    return () if self.map is None else ('head/kernel',)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.lengths

  @property
  def dtype(self) -> Any:
    return np.dtype(self.name)

  @property
  def width(self) -> int:
    """The columns C of the array as a matrix."""
    return self.lengths[-1] if len(self.lengths) > 1 else 1

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    sizes = super().stored_sizes()
    if self.elements is None:
      return sizes
    # The coder takes their other bits from the known array.
    return [(np.dtype(np.int8), sizes[0][1]), *sizes[1:]]

  def materialize(self, *needed: Any) -> np.ndarray:
    return self.joined(self.known(*needed))

  def joined(self, known: np.ndarray) -> np.ndarray:
    """Returns the array, given the result of `known`."""
    if self.elements is not None and self.changed is None:
      return self.elements.view(self.dtype).reshape(self.lengths)
    bits, start = known.copy(), 0
    if self.elements is not None:
      elements = self.elements.view(bits.dtype)
      for span in self.spans():
        bits[span] = elements[start : start + span.stop - span.start]
        start += span.stop - span.start
    return bits.view(self.dtype).reshape(self.lengths)

  def known(self, needed: Any) -> np.ndarray:
    """Returns the known array: bits `[n]`, perhaps those of the base itself."""
    known = np.asarray(needed)
    if self.map is not None:
      self.check_needed(known.shape)
      known = tied.product(known, self.map, self.scale, self.dtype)
    bits = known_bits(known, self.lengths, self.dtype)
    if bits is None:
      form = f'{known.dtype} {known.shape}'
      raise ValueError(f'{self.name} {self.lengths} cannot be made from {form}')
    return self.predicted_bits(bits)

  def spans(self) -> list[slice]:
    """Returns the runs of elements in changed blocks."""
    size = math.prod(self.lengths)
    if self.changed is None:
      return [slice(0, size)]
    flags = np.unpackbits(self.changed, bitorder='little').view(np.int8)
    ends = BLOCK * np.flatnonzero(np.diff(flags, prepend=0, append=0))
    return [slice(*x) for x in np.minimum(ends, size).reshape(-1, 2).tolist()]

  def changed_part(self, elements: np.ndarray) -> np.ndarray:
    """Returns the elements in changed blocks, of all, `[n]`."""
    parts = [elements[span] for span in self.spans()]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  def predicted_bits(self, known: np.ndarray) -> np.ndarray:
    """Returns the `bits` of the prediction for a known array; both are bits `[R C]`."""
    if self.left is None and self.drift is None:
      return known
    matrix = known.reshape(-1, self.width)
    bits = np.empty_like(matrix)

    def job(rows: slice) -> None:
      bits[rows] = self._predicted(matrix[rows], rows)

    in_parts(job, *matrix.shape)
    return bits.reshape(-1)

  def _predicted(self, bits: np.ndarray, rows: slice) -> np.ndarray:
    """Returns the bits of rows, with their part of the factors and then the drift."""
    if self.left is not None:
      left, right = self.left[rows].astype(np.float64), self.right.astype(np.float64)
      with np.errstate(all='ignore'):
        numbers = bits.view(self.dtype).astype(np.float64)
        numbers += np.ldexp(exact.small_products(left, right), self.unit)
        near = numbers.astype(np.float32).astype(self.dtype).view(bits.dtype)
      bits = np.where(ulps.is_finite(bits, self.dtype), near, bits)
    if self.drift is not None:
      mantissa = ulps.FORMATS[self.dtype].nmant
      is_normal = bits & np.iinfo(bits.dtype).max >= 1 << mantissa
      is_normal &= ulps.is_finite(bits, self.dtype)
      drift = self.drift.astype(bits.dtype)
      bits = bits + drift.take(drift_places(bits, mantissa)) * is_normal
    return bits

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    if self.map is not None:
      tied.Tied(self.map, self.lengths[0]).check_needed(*shapes)

  def check(self) -> None:
    dtype, lengths, size = self.dtype, self.lengths, math.prod(self.lengths)
    rows, names, axes = size // max(self.width, 1), set[str](), dict[str, int]()
    for name, form, array in fields.arrays_of(self):
      names.add(name)
      axes |= zip(form.axes or '', array.shape, strict=False)
    blocks = -(-size // (8 * BLOCK))
    expected = {'R': rows, 'C': self.width, 'i': DRIFTS, 'b': blocks}
    fits = axes.get('k', 0) <= _MOST_RANK
    fits &= all(axes.get(axis, length) == length for axis, length in expected.items())
    fits &= ('left' in names) == ('right' in names)
    fits &= dtype in ROUNDED or names.isdisjoint(('left', 'drift', 'map'))
    fits &= self.map is None or lengths[1:] == self.map.shape[1:]
    fits &= self.changed is None or 'elements' in names
    if self.elements is not None and fits:
      count = sum(x.stop - x.start for x in self.spans())
      shape = lengths if self.changed is None else (count,)
      fits = (self.elements.shape, self.elements.dtype) == (shape, coded_dtype(dtype))
    if not fits:
      raise ValueError(f'what is stored of {self.name} {lengths!r:.80} does not fit')


def coded_dtype(dtype: np.dtype) -> np.dtype | None:
  """Returns the dtype in which the coder gets elements; None if it cannot code them.

  All but some floats are signed integers.
  """
  if dtype in ulps.FORMATS:
    return dtype
  return np.dtype(f'i{dtype.itemsize}') if dtype.itemsize <= 4 else None


# ---- known arrays --------------------------------------------------------------------


def known_bits(
  known: np.ndarray, lengths: tuple[int, ...], dtype: np.dtype
) -> np.ndarray | None:
  """Returns the bits of a known array, rounded, cut or filled with zeros.

  The result is None if an array of this shape and dtype cannot be stored beside it.
  """
  is_rounded = dtype in ROUNDED and known.dtype in (*ROUNDED, np.float64)
  is_same = len(lengths) == known.ndim and lengths[1:] == known.shape[1:]
  is_same &= dtype.itemsize <= 8 and max(lengths, default=0) <= LONGEST
  if not is_same or not (dtype == known.dtype or is_rounded):
    return None
  size = math.prod(lengths)
  flat = host.contiguous(known).reshape(-1)[:size]
  with np.errstate(over='ignore', invalid='ignore'):
    bits = ulps.bits_of(flat.astype(dtype, copy=False))
  return np.pad(bits, (0, size - bits.size)) if bits.size < size else bits


def drift_places(bits: np.ndarray, mantissa: int) -> np.ndarray:
  """Returns the places in a drift: the mantissa's highest 8 bits, or fewer."""
  return bits >> max(mantissa - 8, 0) & min((1 << mantissa) - 1, DRIFTS - 1)
