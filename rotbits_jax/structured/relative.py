"""Leaves for an array that differs little from one that the receiver has, the base.

Each leaf needs one array of the base and stands for the target, in a file only. The
base may have another dtype of floats, and then it is rounded to the target's. It may
have another length of the first axis: rows that it lacks are zeros, and rows that it
has beyond the target's are not used.

* `Same`: the target is the base.
* `Patched`: few elements differ. A mask tells which.
* `Relative`: all elements may differ. Each is stored as the difference of ULP indices,
  see `ulps`, and differences of one expected size lie together.

`passes.relative` chooses among them. Everything here is exact: integers, and sums of
floats that are rounded once. Shape letters: R rows and C columns of the array taken as
a matrix.
"""

from collections.abc import Callable, Iterator
import itertools
import math
from typing import Annotated, Any, ClassVar, NamedTuple

from flax import struct
import ml_dtypes
import numpy as np

from rotbits_jax.structured import ulps
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import Length
from rotbits_jax.structured.fields import static
from rotbits_jax.system import host
from rotbits_jax.system import schema

EQUAL = -(1 << 15)
"""The scale of a row that equals the base."""

MOST_SCALE = 8000
"""Bound of the other scales, so that sums of them fit int16."""

WIDTH = 512  # columns of the arrays that store residuals and values
MOST_CLASSES = 254
_SINGLE = 1 << 18  # products of numbers for which BLAS takes no threads
_BLOCK = 1 << 16  # elements that are taken together, so that they fit a cache

_FLOATS = {
  np.dtype(getattr(ml_dtypes, name, None) or name): mantissa
  for name, mantissa in {
    'float16': 10,
    'bfloat16': 7,
    'float32': 23,
    'float8_e4m3fn': 3,
    'float8_e5m2': 2,
  }.items()
}
_ROUNDED = tuple(_FLOATS)[:3]


def mantissa_bits(dtype: np.dtype) -> int | None:
  """Returns the bits of the mantissa of floats; None for a dtype without exponents."""
  return _FLOATS.get(dtype)


def fits(
  lengths: tuple[int, ...], dtype: Any, shape: tuple[int, ...], own: Any
) -> bool:
  """Returns whether an array can be stored beside a base of this shape and dtype.

  Args:
    lengths: shape of the array.
    dtype: its dtype.
    shape: shape of the base.
    own: dtype of the base.
  """
  if not _fits_shape(lengths, shape):
    return False
  return dtype == own or (dtype in _ROUNDED and own in (*_ROUNDED, np.float64))


def _fits_shape(lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  return len(lengths) == len(shape) and lengths[1:] == shape[1:]


class _BesideBase(Structured):
  """An array that is made from one of the base."""

  expands_on_reading: ClassVar[bool] = True
  needs_base: ClassVar[bool] = True
  lengths: tuple[int, ...]
  name: str

  @property
  def shape(self) -> tuple[int, ...]:
    return self.lengths

  @property
  def dtype(self) -> Any:
    return dtype_of(self.name)

  def map_arrays(self, function: Callable[[Any], Any]) -> Any:
    """Returns the leaf unchanged, because it stands for bits of one dtype."""
    return self

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    if not all(_fits_shape(self.lengths, shape) for shape in shapes):
      raise ValueError(f'an array of {self.lengths} cannot be made from {shapes}')

  def check(self) -> None:
    dtype = self.dtype
    if len(self.lengths) > 32 or math.prod(n for n in self.lengths if n) > 1 << 48:
      raise ValueError(f'an array of {self.lengths!r:.80} is too large')
    if dtype.itemsize > 8 or dtype.kind in 'cOSUMm':
      raise ValueError(f'arrays of {self.name!r:.40} are not stored beside a base')

  def _base(self, needed: tuple[Any, ...]) -> np.ndarray:
    """Returns the base as the bits of the target's dtype: signed integers `[n]`."""
    (base,) = needed
    if not fits(self.lengths, self.dtype, base.shape, np.dtype(base.dtype)):
      raise ValueError(
        f'an array of {self.name} {self.lengths} cannot be made from {base.dtype} '
        f'{base.shape}'
      )
    return base_bits(np.asarray(base), self.lengths, self.dtype)

  def _array(self, bits: np.ndarray) -> np.ndarray:
    return bits.view(self.dtype).reshape(self.lengths)


def dtype_of(name: str) -> np.dtype:
  """Returns the dtype of a name.

  Raises:
    ValueError: if there is none.
  """
  try:
    return np.dtype(getattr(ml_dtypes, name, None) or name)
  except TypeError:
    raise ValueError(f'{name!r:.40} is not the name of a dtype') from None


def bits_of(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array in C order, as signed integers `[n]`."""
  return host.contiguous(array).reshape(-1).view(f'i{array.dtype.itemsize}')


def base_bits(
  base: np.ndarray, lengths: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
  """Returns the bits of the base, rounded and cut or filled to the target's shape."""
  size = math.prod(lengths)
  flat = host.contiguous(base).reshape(-1)[:size]
  with np.errstate(over='ignore', invalid='ignore'):
    bits = bits_of(flat.astype(dtype, copy=False))
  if bits.size == size:
    return bits
  return np.concatenate([bits, np.zeros(size - bits.size, bits.dtype)])


Name = Annotated[str, lambda x: None if len(x) < 32 else 'must be the name of a dtype']


@register
@struct.dataclass
class Same(_BesideBase):
  """The base itself.

  Attributes:
    lengths: shape of the array.
    name: name of its dtype.
  """

  type_name: ClassVar[str] = 'same'

  lengths: tuple[Length, ...] = static()
  name: Name = static()

  def materialize(self, *needed: Any) -> np.ndarray:
    return self._array(self._base(needed))


@register
@struct.dataclass
class Patched(_BesideBase):
  """The base, of which few elements are changed.

  Attributes:
    mask: uint8 `[ceil(n / 8)]`; a bit for each element in C order, low bits first.
    changes: int8, int16, int32 or int64 `[m]`: the difference of ULP indices of each
      element whose bit is set, in C order. They add up modulo 2^w for a dtype of w
      bits.
    lengths: shape of the array.
    name: name of its dtype.
  """

  type_name: ClassVar[str] = 'patched'

  mask: Annotated[Any, Array(1, np.dtype(np.uint8))]
  changes: Annotated[Any, Array(1)]
  lengths: tuple[Length, ...] = static()
  name: Name = static()

  @classmethod
  def of(cls, target: np.ndarray, base: np.ndarray) -> 'Patched':
    """Makes the leaf.

    Args:
      target: the array.
      base: its base, see `base_bits`.
    """
    bits = bits_of(target)
    changed = bits != base
    (places,) = np.nonzero(changed)
    dtype = target.dtype
    far = indices(bits[places], dtype) - indices(base[places], dtype)
    return cls(
      np.packbits(changed, bitorder='little'),
      _shortest(far),
      target.shape,
      dtype.name,
    )

  def materialize(self, *needed: Any) -> np.ndarray:
    bits = self._base(needed).copy()
    mask = np.unpackbits(np.asarray(self.mask), count=bits.size, bitorder='little')
    (places,) = np.nonzero(mask.view(bool))
    if places.size != self.changes.size:
      raise ValueError(
        f'{places.size} changed elements have {self.changes.size} changes'
      )
    found = indices(bits[places], self.dtype) + self.changes.astype(bits.dtype)
    bits[places] = _bits(found, self.dtype)
    return self._array(bits)

  def check(self) -> None:
    super().check()
    size, changes = math.prod(self.lengths), self.changes
    if self.mask.size != -(-size // 8) or changes.size > size:
      raise ValueError(
        f'an array of {self.lengths} cannot have a mask of {self.mask.size} bytes'
      )
    if changes.dtype.kind != 'i' or changes.dtype.itemsize > self.dtype.itemsize:
      raise ValueError(f'changes of {self.name} cannot be {changes.dtype}')


@register
@struct.dataclass
class Relative(_BesideBase):
  """Differences of ULP indices, sorted by their expected size.

  The array is taken as a matrix of `width` columns. The expected size of a difference
  is the product of a scale of its row and a scale of its column. How many ULPs these
  are depends on the exponent of the base's number. Logarithms of both give the level of
  an element, in steps of 2^(step - 3) octaves:

      level = (row_scales[i] + column_scales[j] - 8 e) >> step
      class = min(max(level - first, 0), n)

  e is the biased exponent, at least 1, and n the sum of `bands`.

  e is 0 for integers. Elements are sorted by class, and stay in C order within a class.
  Elements of class n are so far from the base that their own values are stored. Those
  of the first `bands[0]` classes have their differences in `residuals_0`, those of the
  next `bands[1]` in `residuals_1`, and so on. Rows of the scale `EQUAL` equal the base;
  nothing else is stored of them.

  If there are factors, the base's number b is replaced by a prediction before all this:
  `b + (left @ right)[i, j] 2^unit`, in float64, where b is finite, rounded to float32
  and then to the dtype.

  Attributes:
    row_scales: int16 `[R]`, the scales of rows.
    column_scales: int16 `[C]`, the scales of columns; None for zeros.
    left: int16 `[R, k]`, or None.
    right: int16 `[k, C]`, or None.
    residuals: for each band, int8, int16 or int32 `[m, 512]` in the order of the
      classes, filled with zeros. The least integer of a dtype that is narrower than
      that of the array marks an exception.
    exceptions: `[m]`, the differences of exceptions, in this order; integers as wide as
      the dtype. None if there are none.
    values: `[m, 512]`, the elements of class n, filled with zeros. None if there are
      none.
    lengths: shape of the array.
    name: name of its dtype.
    width: C.
    step: see above.
    first: the level of class 0.
    bands: the number of classes of each band.
    unit: see above.
  """

  type_name: ClassVar[str] = 'relative'

  row_scales: Annotated[Any, Array(1, np.dtype(np.int16))]
  column_scales: Annotated[Any, Array(1, np.dtype(np.int16), optional=True)]
  left: Annotated[Any, Array(2, np.dtype(np.int16), optional=True)]
  right: Annotated[Any, Array(2, np.dtype(np.int16), optional=True)]
  residuals: Annotated[Any, Array(2, several=True)]
  exceptions: Annotated[Any, Array(1, optional=True)]
  values: Annotated[Any, Array(2, optional=True)]
  lengths: tuple[Length, ...] = static()
  name: Name = static()
  width: Length = static()
  step: Annotated[int, schema.between(0, 3)] = static()
  first: Annotated[schema.Integer, schema.between(-10000, 10000)] = static()
  bands: tuple[Annotated[int, schema.between(1, MOST_CLASSES)], ...] = static()
  unit: Annotated[schema.Integer, schema.between(-900, 900)] = static(default=0)

  def prediction(self, base: np.ndarray) -> Iterator['Block']:
    """Yields the rows that differ in blocks, in C order, with their predictions.

    Args:
      base: see `base_bits`.
    """
    matrix = base.reshape(-1, max(self.width, 1))
    (own,) = np.nonzero(np.asarray(self.row_scales) != EQUAL)
    whole = own.size == len(matrix)
    count = max(_BLOCK // max(self.width, 1), 1)
    for start in range(0, own.size, count):
      rows: Any = own[start : start + count]
      if whole:
        rows = slice(start, start + count)
      for left in range(0, self.width, _BLOCK):
        columns = slice(left, left + _BLOCK)
        bits = np.ascontiguousarray(matrix[rows, columns])
        yield Block(rows, columns, self._predicted(bits, rows, columns))

  def _predicted(self, bits: np.ndarray, rows: Any, columns: slice) -> np.ndarray:
    if self.left is None or self.right is None:
      return bits
    base = bits.view(self.dtype)
    left, right = self.left[rows], self.right[:, columns]
    product = small_products(left.astype(np.float64), right.astype(np.float64))
    with np.errstate(all='ignore'):
      numbers = base.astype(np.float64)
      numbers += np.ldexp(product, self.unit)
      found = numbers.astype(np.float32).astype(self.dtype).view(bits.dtype)
    return np.where(_is_finite(bits, self.dtype), found, bits)

  def classes(self, block: 'Block') -> np.ndarray:
    """Returns the classes of the elements of a block, uint8 `[n]`."""
    level = levels(
      block.bits,
      self.row_scales[block.rows],
      None if self.column_scales is None else self.column_scales[block.columns],
      self.dtype,
      self.step,
    )
    level -= np.int16(self.first)
    return np.clip(level, 0, sum(self.bands)).astype(np.uint8).reshape(-1)

  def materialize(self, *needed: Any) -> np.ndarray:
    base = self._base(needed)
    count = sum(self.bands)
    sizes = [np.zeros(count + 1, np.int64)]
    blocks, classes = list(self.prediction(base)), []
    for block in blocks:
      classes.append(self.classes(block))
      sizes.append(np.bincount(classes[-1], minlength=count + 1))
    begins = np.cumsum(sizes, axis=0)
    stream = self._stream(begins[-1])
    begins = begins + np.concatenate([[0], np.cumsum(begins[-1])[:-1]])
    found = base.copy()
    matrix = found.reshape(-1, max(self.width, 1))
    values = None if self.values is None else bits_of(np.asarray(self.values))
    taken = 0
    for i, (block, own) in enumerate(zip(blocks, classes, strict=True)):
      order = np.argsort(own, kind='stable')
      ends = begins[i + 1]
      parts = [stream[a:b] for a, b in zip(begins[i], ends, strict=True) if a < b]
      far = np.empty(own.size, stream.dtype)
      far[order] = np.concatenate(parts)
      own_bits = _bits(indices(block.bits.reshape(-1), self.dtype) + far, self.dtype)
      if absolute := int(sizes[i + 1][-1]):
        assert values is not None
        own_bits[order[-absolute:]] = values[taken : taken + absolute]
        taken += absolute
      matrix[block.rows, block.columns] = own_bits.reshape(block.bits.shape)
    return self._array(found)

  def _stream(self, sizes: np.ndarray) -> np.ndarray:
    """Returns the differences of all elements by class; zeros for those of class n.

    Args:
      sizes: the number of elements of each class.

    Raises:
      ValueError: if the arrays have other sizes.
    """
    wide = np.dtype(f'i{self.dtype.itemsize}')
    stream, place, edge = np.zeros(sizes.sum(), wide), 0, 0
    marked = []
    for array, band in zip(self.residuals, self.bands, strict=True):
      size = int(sizes[edge : edge + band].sum())
      edge += band
      flat = _unfilled(array, size, 'residuals')
      stream[place : place + size] = flat
      if array.dtype != wide:
        marked.append(place + np.flatnonzero(flat == np.iinfo(array.dtype).min))
      place += size
    places = np.concatenate([np.zeros(0, np.int64), *marked])
    exceptions = np.zeros(0, wide) if self.exceptions is None else self.exceptions
    if places.size != exceptions.size:
      raise ValueError(f'{places.size} exceptions are marked, got {exceptions.size}')
    stream[places] = exceptions
    values = np.zeros((0, WIDTH)) if self.values is None else self.values
    _unfilled(values, int(sizes[-1]), 'values')
    return stream

  def check(self) -> None:
    super().check()
    size, width, dtype = math.prod(self.lengths), self.width, self.dtype
    if dtype.itemsize > 4 or self.row_scales.size * width != size:
      raise ValueError(
        f'an array of {self.name} {self.lengths} cannot have '
        f'{self.row_scales.size} rows of {width}'
      )
    if self.column_scales is not None and self.column_scales.size != width:
      raise ValueError(f'{width} columns cannot have {self.column_scales.size} scales')
    for scales in (self.row_scales, self.column_scales):
      if scales is not None and _greatest(scales[scales != EQUAL]) > MOST_SCALE:
        raise ValueError(f'scales must be within {MOST_SCALE}')
    if self.column_scales is not None and (self.column_scales == EQUAL).any():
      raise ValueError('columns cannot be marked')
    if sum(self.bands) > MOST_CLASSES or len(self.bands) != len(self.residuals):
      raise ValueError(f'{len(self.residuals)} bands cannot have {self.bands} classes')
    self._check_arrays()

  def _check_arrays(self) -> None:
    size, dtype = math.prod(self.lengths), self.dtype
    for array in self.residuals:
      if array.dtype.kind != 'i' or array.dtype.itemsize > dtype.itemsize:
        raise ValueError(f'residuals of {self.name} cannot be {array.dtype}')
    wide = np.dtype(f'i{dtype.itemsize}')
    if self.exceptions is not None and self.exceptions.dtype != wide:
      raise ValueError(f'exceptions of {self.name} cannot be {self.exceptions.dtype}')
    stored = stored_dtype(dtype)
    if self.values is not None and self.values.dtype != stored:
      raise ValueError(f'values of {self.name} cannot be {self.values.dtype}')
    arrays = [*self.residuals, *(() if self.values is None else (self.values,))]
    if any(x.shape[1] != WIDTH for x in arrays):
      raise ValueError(f'residuals and values must have {WIDTH} columns')
    if sum(x.size for x in arrays) >= size + WIDTH * (len(arrays) + 1):
      raise ValueError(f'an array of {self.lengths} has too many residuals')
    if (self.left is None) != (self.right is None):
      raise ValueError('one of two factors is missing')
    if self.left is not None and self.right is not None:
      shapes = self.left.shape, self.right.shape
      rank = shapes[0][1]
      if shapes != ((self.row_scales.size, rank), (rank, self.width)) or rank > 1 << 12:
        raise ValueError(f'factors of shapes {shapes} do not fit {self.lengths}')
      if dtype not in _ROUNDED:
        raise ValueError(f'{self.name} has no factors')


class Block(NamedTuple):
  """A block of a matrix.

  Attributes:
    rows: a slice, or the indices of rows.
    columns: a slice.
    bits: the bits of the predicted numbers, `[r, c]`.
  """

  rows: Any
  columns: slice
  bits: np.ndarray


def small_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Returns the product of matrices, a few rows at a time.

  BLAS computes so small products on one thread. Its threads would wait for those that
  code blocks.
  """
  found = np.empty((len(left), right.shape[1]), left.dtype)
  step = max(_SINGLE // max(right.size, 1), 1)
  for start in range(0, len(left), step):
    rows = slice(start, start + step)
    np.matmul(left[rows], right, out=found[rows])
  return found


def levels(
  bits: np.ndarray,
  rows: np.ndarray,
  columns: np.ndarray | None,
  dtype: np.dtype,
  step: int,
) -> np.ndarray:
  """Returns the levels of elements, int16 `[r, c]`, see `Relative`.

  Args:
    bits: bits of the predicted numbers, `[r, c]`.
    rows: int16 `[r]`.
    columns: int16 `[c]`, or None for zeros.
    dtype: dtype of the numbers.
    step: see `Relative`.
  """
  found = np.empty(bits.shape, np.int16)
  found[...] = np.asarray(rows)[:, None]
  if columns is not None:
    found += np.asarray(columns)
  mantissa = mantissa_bits(dtype)
  if mantissa is not None:
    exponents = (bits & np.iinfo(bits.dtype).max) >> mantissa
    exponents = np.maximum(exponents, 1, out=exponents).astype(np.int16, copy=False)
    exponents <<= 3
    found -= exponents
  found >>= step
  return found


def stored_dtype(dtype: np.dtype) -> np.dtype:
  """Returns the dtype of stored values: bit patterns where coders have no floats."""
  return dtype if dtype in _ROUNDED else np.dtype(f'i{dtype.itemsize}')


def indices(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the ULP indices of bits; integers stand for themselves."""
  return bits if dtype.kind in 'iub' else ulps.index(bits)


def _bits(found: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns the bits of ULP indices: the inverse of `indices`."""
  return found if dtype.kind in 'iub' else ulps.number(found, found.dtype)


def filled(flat: np.ndarray) -> np.ndarray:
  """Returns an array with zeros at its end as rows of `WIDTH`."""
  zeros = np.zeros(-flat.size % WIDTH, flat.dtype)
  return np.concatenate([flat, zeros]).reshape(-1, WIDTH)


def _unfilled(array: Any, size: int, noun: str) -> np.ndarray:
  """Returns the first elements of rows: the inverse of `filled`."""
  flat = np.asarray(array).reshape(-1)
  if flat.size != size + -size % WIDTH:
    raise ValueError(f'{size} {noun} cannot be in an array of {flat.size}')
  return flat[:size]


def _shortest(far: np.ndarray) -> np.ndarray:
  """Returns integers in the shortest dtype that holds them all."""
  most, least = int(far.max(initial=0)), int(far.min(initial=0))
  for width in (1, 2, 4):
    info = np.iinfo(f'i{width}')
    if width < far.dtype.itemsize and info.min <= least and most <= info.max:
      return far.astype(info.dtype)
  return far


def _is_finite(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  infinite = np.array(np.inf, dtype).view(bits.dtype)
  return bits & np.iinfo(bits.dtype).max < infinite


def _greatest(scales: Any) -> int:
  return int(np.abs(np.asarray(scales, np.int32)).max(initial=0))


def edges_of(bands: tuple[int, ...]) -> list[int]:
  """Returns the first class of each band, and the class after the last."""
  return [0, *itertools.accumulate(bands)]
