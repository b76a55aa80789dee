"""The leaf for a known array plus what differs from it, in files only.

Invariants of a `Difference`:

* The known array is an array of a base, or a product of arrays of a base, which the
  reader passes to `materialize`; or, if there is a map, the product of the head with
  it, see `tied`. It is rounded to the dtype. Rows that it lacks are zeros, and rows
  that it has beyond those of the leaf are not used.
* Without differences, the array is the known array.
* With gaps, few elements differ, and the differences are theirs, int8. A gap counts the
  elements before the next one that differs; the greatest one, 65535, stands for as many
  elements and none that differs.
* With scales, all elements of some rows may differ, and each has a *class*, which
  both sides compute from the known array. The coder keeps a frequency table and a shift
  for each class, so that elements of one expected size share them.

Classes. The array is taken as a matrix of `width` columns. The expected size of a
difference is the product of a scale of its row and a scale of its column. How many ULPs
these are depends on the exponent of the known number. Logarithms of both give the level
of an element, in quarters of an octave:

    level = (row_scales[i] + column_scales[j] - 8 e) >> 1
    class = min(max(level - LOWEST, 0), n - 1)

e is the biased exponent, at least 1; 0 for integers. A class has a shift s, and its
differences are above -2^(s + 7) and below 2^(s + 7). The number -2^(s + 7) marks an
exception, whose bits are stored apart. Elements of the last class are so far from the
known ones that their own bits take the place of a difference: the sign is moved to the
lowest place, and the highest bit is flipped.

Predictions. If there are factors, the known number b is first replaced by
`b + (left @ right)[i, j] 2^unit`, in float64, where b is finite, rounded to float32 and
then to the dtype. If there is a drift, each normal number then moves away from zero by
the ULPs that the drift has for the top 8 bits of its mantissa. Weight decay makes one:
it moves all numbers of an octave by as many ULPs, or by few others.

Everything here is exact: integers, and sums of floats that are rounded once. Shape
letters: R rows that may differ, C columns.
"""

from collections.abc import Callable, Iterable
import functools
import math
from typing import Annotated, Any, ClassVar, NamedTuple

from flax import struct
import ml_dtypes
import msgspec
import numpy as np

from rotbits_jax.structured import tied
from rotbits_jax.structured import ulps
from rotbits_jax.structured.base import Origin
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import Length
from rotbits_jax.structured.fields import static
from rotbits_jax.system import host
from rotbits_jax.system import schema

LOWEST = -24
"""The level of class 0: differences of 2^-6 ULPs and less share a class."""

MOST_GAP = (1 << 16) - 1
"""The greatest gap, which stands for as many elements and none that differs."""

MOST_SCALE = 8000
"""Bound of the scales, so that sums of them fit int16."""

DRIFTS = 256
"""The length of a drift."""

LONGEST = (1 << 31) - 1
"""The greatest length of an axis."""

FAR = -128
"""The difference that marks an exception among few differences."""

_OCTAVE = 4  # levels
_BITS = 3  # the octaves of a difference that the symbols of a coder tell
_MOST_RANK = 1 << 12
_CHUNK = 1 << 16  # elements that are taken together, so that they fit a cache
_PARTS = 1 << 4  # of a job

_ROUNDED = tuple(ulps.MANTISSA_BITS)[:3]
_FLOAT64 = np.dtype(np.float64)

Run = Callable[[Iterable[Callable[[], Any]]], list[Any]]
"""Runs jobs, perhaps side by side; returns their results."""


def in_turn(jobs: Iterable[Callable[[], Any]]) -> list[Any]:
  """Runs jobs one after the other."""
  return [job() for job in jobs]


def in_parts(
  job: Callable[[slice], Any], rows: int, width: int, run: Run = in_turn
) -> list[Any]:
  """Runs a job for parts of some rows that fit a cache; returns the results in order.

  Args:
    job: takes a part.
    rows: the number of rows.
    width: the elements of a row.
    run: runs jobs, each of many parts.
  """
  step = max(_CHUNK // max(width, 1), 1)
  many = step * _PARTS

  def parts(start: int) -> list[Any]:
    end = min(start + many, rows)
    return [job(slice(i, min(i + step, end))) for i in range(start, end, step)]

  results = run([functools.partial(parts, i) for i in range(0, rows, many)])
  return [result for several in results for result in several]


class Prediction(NamedTuple):
  """What both sides know before the differences are coded.

  Attributes:
    bits: signed integers `[R, C]`, the bits of the elements without differences.
    classes: uint8 `[R C]`, the class of each element.
  """

  bits: np.ndarray
  classes: np.ndarray


# NumPy evaluates a part of other texts, such as '(1,2)f4'.
_Name = Annotated[str, msgspec.Meta(pattern=r'\A\w{1,32}\Z')]
_Int16 = np.dtype(np.int16)


@register
@struct.dataclass
class Difference(Structured):
  """A known array plus what differs from it; the module's docstring has the rules.

  Attributes:
    differences: signed integers `[n]`, or None.
    exceptions: the bits of exceptions, signed integers, or None.
    gaps: uint16, or None.
    row_scales: int16 `[R]`, or `[1]` if they are equal; None if there are no classes.
    column_scales: int16 `[C]`, or `[1]`; likewise.
    equal: uint8, a bit for each row, low bits first: whether it is that of the known
      array. None if all rows may differ.
    left: int16 `[rows, k]`, or None.
    right: int16 `[k, C]`, or None.
    drift: int32 `[256]`, or None.
    map: int32 `[D, d]`, or None, see `tied.product`.
    shifts: int16 `[D]`, or None.
    lengths: shape of the array, or of its transpose.
    name: name of its dtype.
    width: C.
    unit: see the module's docstring.
    scale: see `tied.product`.
    columns_first: whether `lengths` is the transposed shape, and the known array is
      transposed, too.
  """

  type_name: ClassVar[str] = 'difference'
  origin: ClassVar[Origin] = Origin.KNOWN

  lengths: tuple[Length, ...] = static()
  name: _Name = static()
  differences: Annotated[Any, Array(1, optional=True)] = None
  exceptions: Annotated[Any, Array(1, optional=True)] = None
  gaps: Annotated[Any, Array(1, np.dtype(np.uint16), optional=True)] = None
  row_scales: Annotated[Any, Array(1, _Int16, optional=True)] = None
  column_scales: Annotated[Any, Array(1, _Int16, optional=True)] = None
  equal: Annotated[Any, Array(1, np.dtype(np.uint8), optional=True)] = None
  left: Annotated[Any, Array(2, _Int16, optional=True)] = None
  right: Annotated[Any, Array(2, _Int16, optional=True)] = None
  drift: Annotated[Any, Array(1, np.dtype(np.int32), optional=True)] = None
  map: Annotated[Any, Array(2, np.dtype(np.int32), optional=True)] = None
  shifts: Annotated[Any, Array(1, _Int16, optional=True)] = None
  width: Length = static(default=0)
  unit: Annotated[int, schema.between(-900, 900)] = static(default=0)
  scale: Annotated[int, schema.between(-1000, 2000)] = static(default=0)
  columns_first: bool = static(default=False)

  @property
  def needs(self) -> tuple[str, ...]:  # type: ignore[override]
    return () if self.map is None else ('head/kernel',)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.lengths[::-1] if self.columns_first else self.lengths

  @property
  def dtype(self) -> Any:
    return dtype_of(self.name)

  @property
  def has_classes(self) -> bool:
    """Whether the differences have classes."""
    return self.column_scales is not None

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    sizes = super().stored_sizes()
    # The coder takes their other bits from the known array's precision.
    return [(np.dtype(np.int8), sizes[0][1]), *sizes[1:]] if self.has_classes else sizes

  def map_arrays(self, function: Callable[[Any], Any]) -> 'Difference':
    """Returns the leaf unchanged, because it stands for bits of one dtype."""
    return self

  # ---- the array

  def materialize(self, *needed: Any) -> np.ndarray:
    if self.has_classes:
      return self.joined(*self.predict(*needed))
    known = self._known_bits(*needed)
    if self.differences is not None:
      self._change_few(known)
    return self._array(known)

  def predict(self, *needed: Any, run: Run = in_turn) -> tuple[np.ndarray, Prediction]:
    """Returns the bits of the known array, `[n]`, and the prediction for `joined`."""
    known = self._known_bits(*needed)
    bits = self.predicted_bits(known, run)
    return known, Prediction(bits, self.classes(bits, run))

  def _known_bits(self, known: Any) -> np.ndarray:
    """Returns a copy of the known array: bits of the leaf's dtype, `[n]`."""
    if self.map is not None:
      self.check_needed(known.shape)
      made = tied.product(
        np.asarray(known), self.map, self.shifts, self.scale, self.dtype
      )
      return ulps.bits_of(made)
    known = known.T if self.columns_first else known
    if not fits(self.lengths, self.dtype, known.shape, known.dtype):
      raise ValueError(
        f'an array of {self.name} {self.lengths} cannot be made from {known.dtype} '
        f'{known.shape}'
      )
    return known_bits(np.asarray(known), self.lengths, self.dtype)

  def _array(self, bits: np.ndarray) -> np.ndarray:
    """Returns the array of some bits."""
    array = bits.view(self.dtype).reshape(self.lengths)
    return array.T if self.columns_first else array

  def _change_few(self, bits: np.ndarray) -> None:
    """Adds the differences of few elements to the bits of the known array."""
    is_last = self.gaps < MOST_GAP
    ends = np.cumsum(self.gaps + is_last, dtype=np.int64)
    places = ends[is_last] - 1
    (far,) = np.nonzero(self.differences == FAR)
    if places.size != self.differences.size or far.size != _size(self.exceptions):
      raise ValueError(
        f'{places.size} places and {far.size} exceptions, got '
        f'{self.differences.size} differences and {_size(self.exceptions)} exceptions'
      )
    if ends[-1] > bits.size:
      raise ValueError(f'an array of {self.lengths} has no element {ends[-1] - 1}')
    made = ulps.moved(bits[places], self.differences.astype(bits.dtype), self.dtype)
    if far.size:
      made[far] = self.exceptions
    bits[places] = made

  # ---- the prediction

  @property
  def _places(self) -> np.ndarray | slice:
    """The indices of the rows that may differ, or a slice of all."""
    if self.equal is None:
      return slice(None)
    count = math.prod(self.lengths) // self.width
    return np.flatnonzero(~_unpacked(self.equal, count))

  def predicted_bits(self, known: np.ndarray, run: Run = in_turn) -> np.ndarray:
    """Returns the `bits` of the prediction; `known` are bits `[n]`."""
    matrix = known.reshape(-1, self.width)[self._places]
    if self.left is None and self.drift is None:
      return matrix.copy() if self.equal is None else matrix
    left = None if self.left is None else self.left[self._places].astype(np.float64)
    bits = np.empty_like(matrix)

    def job(part: slice) -> None:
      bits[part] = self._drifted(self._with_factors(matrix[part], left, part))

    in_parts(job, len(matrix), matrix.shape[1], run)
    return bits

  def classes(self, bits: np.ndarray, run: Run = in_turn) -> np.ndarray:
    """Returns the `classes` of the prediction, given its bits."""
    classes = np.empty(bits.shape, np.uint8)

    def job(part: slice) -> None:
      self._write_classes(bits[part], part, classes[part])

    in_parts(job, len(bits), bits.shape[1], run)
    return classes.reshape(-1)

  def _with_factors(
    self, bits: np.ndarray, left: np.ndarray | None, rows: slice
  ) -> np.ndarray:
    """Returns the bits of rows plus their part of the product of the factors."""
    if left is None:
      return bits
    product = host.small_products(left[rows], self.right.astype(np.float64))
    with np.errstate(all='ignore'):
      numbers = bits.view(self.dtype).astype(np.float64)
      numbers += np.ldexp(product, self.unit)
      near = numbers.astype(np.float32).astype(self.dtype).view(bits.dtype)
    return np.where(ulps.is_finite(bits, self.dtype), near, bits)

  def _drifted(self, bits: np.ndarray) -> np.ndarray:
    """Returns the bits of normal numbers moved by the drift."""
    if self.drift is None:
      return bits
    mantissa = ulps.MANTISSA_BITS[self.dtype]
    is_normal = bits & np.iinfo(bits.dtype).max >= 1 << mantissa
    is_normal &= ulps.is_finite(bits, self.dtype)
    drift = self.drift.astype(bits.dtype)
    return bits + drift.take(drift_places(bits, mantissa)) * is_normal

  def _write_classes(self, bits: np.ndarray, rows: slice, out: np.ndarray) -> None:
    """Writes the classes of rows, uint8."""
    mantissa = ulps.MANTISSA_BITS.get(self.dtype)
    of_rows = self.row_scales[rows] if self.row_scales.size > 1 else self.row_scales
    levels = np.empty(bits.shape, np.int16)
    np.add(of_rows[:, None], self.column_scales, out=levels)
    if mantissa is not None:
      exponents = (bits & np.iinfo(bits.dtype).max) >> mantissa
      exponents = np.maximum(exponents, 1, out=exponents).astype(np.int16, copy=False)
      exponents *= 8
      levels -= exponents
    levels >>= 1
    levels -= LOWEST
    np.clip(levels, 0, len(class_shifts(self.dtype)) - 1, out=levels)
    out[...] = levels

  def joined(
    self, known: np.ndarray, made: Prediction, run: Run = in_turn
  ) -> np.ndarray:
    """Returns the array, given the result of `predict` and the decoded differences."""
    bits, dtype, marks = made.bits.reshape(-1), self.dtype, _marks(self.dtype)
    last = len(marks) - 1

    def job(part: slice) -> np.ndarray:
      classes, differences = made.classes[part], self.differences[part]
      bits[part] = ulps.moved(bits[part], differences, dtype)
      (places,) = np.nonzero(classes == last)
      bits[part][places] = _rotated_back(differences[places])
      if self.exceptions is None:
        return places[:0]
      is_mark = differences == marks.take(classes)
      return np.flatnonzero(is_mark & (classes < last)) + part.start

    far = np.concatenate([np.zeros(0, np.int64), *in_parts(job, bits.size, 1, run)])
    if far.size != _size(self.exceptions):
      raise ValueError(f'{far.size} exceptions, got {_size(self.exceptions)}')
    if far.size:
      bits[far] = self.exceptions
    if self.equal is None:
      return self._array(bits)
    known.reshape(-1, self.width)[self._places] = made.bits
    return self._array(known)

  # ---- untrusted input

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    if self.map is not None:
      tied.Tied(self.map, self.lengths[0]).check_needed(*shapes)
      return
    if self.columns_first:
      shapes = tuple(shape[::-1] for shape in shapes)
    if not all(_fits_shape(self.lengths, shape) for shape in shapes):
      raise ValueError(f'an array of {self.lengths} cannot be made from {shapes}')

  def check(self) -> None:
    dtype, size = self.dtype, math.prod(self.lengths)
    if len(self.lengths) > 32 or math.prod(n for n in self.lengths if n) > 1 << 48:
      raise ValueError(f'an array of {self.lengths!r:.80} is too large')
    if dtype.itemsize > 8 or dtype.kind in 'cOSUMm':
      raise ValueError(f'arrays of {self.name!r:.40} are not stored beside a base')
    signed = np.dtype(f'i{dtype.itemsize}')
    if self.exceptions is not None and self.exceptions.dtype != signed:
      raise ValueError(f'exceptions of {self.name} cannot be {self.exceptions.dtype}')
    if (self.map is None) != (self.shifts is None):
      raise ValueError('a map and its shifts belong together')
    if self.map is not None:
      map_shape = self.shifts.size, *self.lengths[1:]
      if self.map.shape != map_shape or dtype not in _ROUNDED:
        raise ValueError(f'an embedding {self.name} {self.lengths} has another map')
    if self.has_classes:
      self._check_classes(size, signed)
      return
    others = self.row_scales, self.equal, self.left, self.right, self.drift, self.map
    if any(x is not None for x in others) or self.width:
      raise ValueError('only differences with classes have scales and predictions')
    few = self.differences, self.gaps
    if (few[0] is None) != (few[1] is None) or (
      few[0] is None and self.exceptions is not None
    ):
      raise ValueError('gaps, differences and exceptions belong together')
    if self.gaps is not None:
      # The greatest gap stands for many elements.
      if self.gaps.size > self.differences.size + size // MOST_GAP:
        raise ValueError(
          f'an array of {self.lengths} cannot have {self.gaps.size} gaps'
        )
      if self.differences.size > size or self.differences.dtype != np.int8:
        raise ValueError('few differences must be int8')

  def _check_classes(self, size: int, signed: np.dtype) -> None:
    """Checks the fields of differences with classes."""
    dtype, width = self.dtype, self.width
    rows = size // width if width else 0
    if rows * width != size or self.gaps is not None or dtype.itemsize > 4:
      raise ValueError(f'{self.name} {self.lengths} has no differences in {width=}')
    places = rows
    if self.equal is not None:
      if self.equal.size != -(-rows // 8):
        raise ValueError(f'{rows} rows cannot have {self.equal.size} bytes of bits')
      places = rows - int(np.count_nonzero(_unpacked(self.equal, rows)))
    if _size(self.differences) != places * width or self.differences.dtype != signed:
      raise ValueError(f'{places} rows of {width} {signed} have other differences')
    for scales, count in ((self.row_scales, places), (self.column_scales, width)):
      if scales is None or scales.size not in (1, count):
        raise ValueError(f'{count} rows or columns cannot have {_size(scales)} scales')
      if np.abs(scales.astype(np.int32)).max() > MOST_SCALE:
        raise ValueError(f'scales must be within {MOST_SCALE}')
    if (self.left is None) != (self.right is None):
      raise ValueError('one of two factors is missing')
    if self.left is not None:
      shapes = self.left.shape, self.right.shape
      rank = shapes[0][1]
      if shapes != ((rows, rank), (rank, width)) or rank > _MOST_RANK:
        raise ValueError(f'factors of shapes {shapes} do not fit {self.lengths}')
    if self.drift is not None:
      sizes_of_drift = np.abs(self.drift.astype(np.int64))
      most = 1 << ulps.MANTISSA_BITS.get(dtype, 0)
      if sizes_of_drift.size != DRIFTS or sizes_of_drift.max() >= most:
        raise ValueError(f'{self.name} cannot have this drift')
    if dtype not in _ROUNDED and (self.left is not None or self.drift is not None):
      raise ValueError(f'{self.name} has no predictions')


# ---- known arrays --------------------------------------------------------------------


def fits(
  lengths: tuple[int, ...], dtype: Any, known_shape: tuple[int, ...], known_dtype: Any
) -> bool:
  """Returns whether an array can be stored beside a known one.

  Args:
    lengths: shape of the array.
    dtype: its dtype.
    known_shape: shape of the known array.
    known_dtype: its dtype.
  """
  dtype, known_dtype = np.dtype(dtype), np.dtype(known_dtype)
  if not _fits_shape(lengths, known_shape) or dtype.itemsize > 8:
    return False
  if max(lengths, default=0) > LONGEST:
    return False
  is_rounded = dtype in _ROUNDED and known_dtype in (*_ROUNDED, _FLOAT64)
  return dtype == known_dtype or is_rounded


def _fits_shape(lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  return len(lengths) == len(shape) and lengths[1:] == shape[1:]


def dtype_of(name: str) -> np.dtype:
  """Returns the dtype of a name.

  Raises:
    ValueError: if there is none.
  """
  try:
    return np.dtype(getattr(ml_dtypes, name, None) or name)
  except TypeError:
    raise ValueError(f'{name!r:.40} is not the name of a dtype') from None


def known_bits(
  known: np.ndarray, lengths: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
  """Returns a copy of a known array: rounded, cut or filled with zeros, its bits."""
  size = math.prod(lengths)
  bits = np.zeros(size, f'i{dtype.itemsize}')
  flat = host.contiguous(known).reshape(-1)[:size]
  with np.errstate(over='ignore', invalid='ignore'):
    bits[: flat.size] = ulps.bits_of(flat.astype(dtype, copy=False))
  return bits


# ---- classes -------------------------------------------------------------------------


def class_shifts(dtype: np.dtype) -> tuple[int, ...]:
  """Returns the shift of each class of a dtype, ascending."""
  width = 8 * dtype.itemsize
  highest = ulps.MANTISSA_BITS.get(dtype, width + 1) - 1
  levels = np.arange(LOWEST, highest * _OCTAVE)
  shifts = ((levels // _OCTAVE) - _BITS).clip(0, width - 8)
  return (*shifts.tolist(), width - 8)


def _marks(dtype: np.dtype) -> np.ndarray:
  """Returns the difference that marks an exception of each class."""
  shifts = np.array(class_shifts(dtype), np.int64)
  return (-1 << shifts + 7).astype(f'i{dtype.itemsize}')


def divided(
  bits: np.ndarray, made: Prediction, dtype: np.dtype, run: Run = in_turn
) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns the differences and the exceptions: the inverse of `Difference.joined`.

  Args:
    bits: the bits of the elements that may differ, `[n]`.
    made: their prediction.
    dtype: their dtype.
    run: runs jobs for parts of them.
  """
  known, marks = made.bits.reshape(-1), _marks(dtype)
  differences, last = np.empty_like(bits), len(marks) - 1
  # The differences of a class are from its mark + 1 on, and so many.
  counts = (-2 * marks - 1).view(f'u{bits.itemsize}')

  def job(part: slice) -> np.ndarray:
    classes = made.classes[part]
    part_differences = ulps.differences(bits[part], known[part], dtype)
    mark = marks.take(classes)
    above = (part_differences - mark - 1).view(counts.dtype)
    is_far = above >= counts.take(classes)
    (places,) = np.nonzero(classes == last)
    is_far[places] = False
    far = bits[part][is_far]
    if far.size:
      part_differences[is_far] = mark[is_far]
    part_differences[places] = _rotated(bits[part][places])
    differences[part] = part_differences
    return far

  exceptions = np.concatenate([bits[:0], *in_parts(job, bits.size, 1, run)])
  return differences, exceptions if exceptions.size else None


def drift_places(bits: np.ndarray, mantissa: int) -> np.ndarray:
  """Returns the places in a drift: the mantissa's highest 8 bits, or fewer."""
  return bits >> max(mantissa - 8, 0) & min((1 << mantissa) - 1, DRIFTS - 1)


def _rotated(bits: np.ndarray) -> np.ndarray:
  """Moves the sign to the lowest place, and flips the highest bit."""
  own = bits.view(f'u{bits.itemsize}')
  found = own << 1 | own >> 8 * bits.itemsize - 1
  return found.view(bits.dtype) ^ np.iinfo(bits.dtype).min


def _rotated_back(numbers: np.ndarray) -> np.ndarray:
  """Returns the bits of numbers: the inverse of `_rotated`."""
  own = (numbers ^ np.iinfo(numbers.dtype).min).view(f'u{numbers.itemsize}')
  return (own >> 1 | own << 8 * numbers.itemsize - 1).view(numbers.dtype)


def _unpacked(bits: np.ndarray, count: int) -> np.ndarray:
  return np.unpackbits(bits, count=count, bitorder='little').astype(bool)


def _size(array: np.ndarray | None) -> int:
  return 0 if array is None else int(array.size)
