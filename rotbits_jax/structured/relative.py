"""Leaves for an array that differs little from one that the receiver has, the base.

Each leaf needs one array of the base and stands for the target, in a file only. The
base may have another dtype of floats, and then it is rounded to the target's. It may
have another length of the first axis: rows that it lacks are zeros, and rows that it
has beyond the target's are not used.

All of a leaf, the base too, may be that of the transposed array, which is in C order if
the tensor of a kernel comes from PyTorch.

* `Same`: the target is the base.
* `Patched`: few elements differ. The gaps between them are stored.
* `Relative`: all elements may differ. Each is stored as its difference in ULPs, see
  `ulps.differences`, and differences of one expected size share a frequency table.

`passes.relative` chooses among them. Everything here is exact: integers, and sums of
floats that are rounded once. Shape letters: R rows and C columns of the array taken as
a matrix.
"""

from collections.abc import Iterator
import functools
import math
from typing import Annotated, Any, ClassVar, NamedTuple
import zlib

from flax import struct
import ml_dtypes
import numpy as np

from rotbits_jax.coding import buffers
from rotbits_jax.coding import given
from rotbits_jax.coding import line_sums
from rotbits_jax.coding import pool
from rotbits_jax.coding import tables
from rotbits_jax.structured import division
from rotbits_jax.structured import ulps
from rotbits_jax.structured.base import Origin
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

MOST_CLASSES = 254
DRIFTS = 256
"""The length of a drift."""

LONGEST = (1 << 31) - 1
"""The greatest length of an axis."""

_LANE = 1 << 10  # symbols for which a block of a patch gets one more lane
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
_ROUNDED, _FLOAT64 = tuple(_FLOATS)[:3], np.dtype(np.float64)


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
  dtype, own = np.dtype(dtype), np.dtype(own)
  if not _fits_shape(lengths, shape) or dtype.itemsize > 8:
    return False
  if max(lengths, default=0) > LONGEST:
    return False
  return dtype == own or (dtype in _ROUNDED and own in (*_ROUNDED, _FLOAT64))


def _fits_shape(lengths: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  return len(lengths) == len(shape) and lengths[1:] == shape[1:]


class _BesideBase(Structured):
  """An array that is made from one of the base. No rounding changes its integers."""

  origin: ClassVar[Origin] = Origin.KNOWN
  lengths: tuple[int, ...]
  name: str

  @property
  def shape(self) -> tuple[int, ...]:
    return self.lengths[::-1] if self.columns_first else self.lengths

  @property
  def dtype(self) -> Any:
    return dtype_of(self.name)

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    if self.columns_first:
      shapes = tuple(shape[::-1] for shape in shapes)
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
    base = base.T if self.columns_first else base
    if not fits(self.lengths, self.dtype, base.shape, np.dtype(base.dtype)):
      raise ValueError(
        f'an array of {self.name} {self.lengths} cannot be made from {base.dtype} '
        f'{base.shape}'
      )
    return base_bits(np.asarray(base), self.lengths, self.dtype)

  def _check_values(self, values: Any) -> None:
    kind = 'i', self.dtype.itemsize
    if values is not None and (values.dtype.kind, values.dtype.itemsize) != kind:
      raise ValueError(f'values of {self.name} cannot be {values.dtype}')

  def _array(self, bits: np.ndarray) -> np.ndarray:
    array = bits.view(self.dtype).reshape(self.lengths)
    return array.T if self.columns_first else array


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


# NumPy evaluates a part of other texts, such as '(1,2)f4'.
_is_name = lambda x: x.isidentifier() and len(x) < 32
Name = Annotated[str, lambda x: None if _is_name(x) else 'must be the name of a dtype']


@register
@struct.dataclass
class Same(_BesideBase):
  """The base itself.

  Attributes:
    lengths: shape of the array, or of its transpose.
    name: name of its dtype.
  """

  type_name: ClassVar[str] = 'same'

  lengths: tuple[Length, ...] = static()
  name: Name = static()
  columns_first: bool = static(default=False)

  def materialize(self, *needed: Any) -> np.ndarray:
    return self._array(self._base(needed))


@register
@struct.dataclass
class Patched(_BesideBase):
  """The base, of which few elements are changed.

  `coding.given` codes a symbol for each changed element, with the context 0: 128 plus
  its difference, see `ulps.differences`; or 0 for an element of `values`. Then it codes
  how many unchanged elements come before each changed one, with the context 1, whose
  shift is `shift`. The greatest number, `2^(shift + 8) - 1`, stands for as many
  elements without a changed one behind them, and another number follows.

  Attributes:
    coded: uint8, the bytes of `coding.given`.
    values: elements that are far from the base, signed integers with their bits. None
      if there are none.
    lengths: shape of the array, or of its transpose.
    name: name of its dtype.
    changes: the number of changed elements.
    gaps: the number of numbers with the context 1.
    shift: see above.
    parts: how many bytes the tables have, and each block.
  """

  type_name: ClassVar[str] = 'patched'

  coded: Annotated[Any, Array(1, np.dtype(np.uint8))]
  values: Annotated[Any, Array(1, optional=True)]
  lengths: tuple[Length, ...] = static()
  name: Name = static()
  changes: schema.Size = static()
  gaps: schema.Size = static()
  shift: Annotated[int, schema.between(0, given.MOST_SHIFT)] = static()
  parts: tuple[schema.Size, ...] = static()
  columns_first: bool = static(default=False)

  @classmethod
  def of(
    cls, target: np.ndarray, base: np.ndarray, places: np.ndarray, run: pool.Run
  ) -> 'Patched':
    """Makes the leaf.

    Args:
      target: the array.
      base: its base, see `base_bits`.
      places: the indices of the elements that differ, at least one.
      run: runs the jobs of blocks, such as `pool.run`.
    """
    own, dtype = bits_of(target)[places], target.dtype
    far = ulps.differences(own, base[places], dtype)
    far = far.astype(np.promote_types(far.dtype, np.int16), copy=False)
    odd = (far <= -128) | (far > 127)
    numbers = np.where(odd, 0, far + 128).astype(np.uint8)
    gaps = np.diff(places, prepend=-1) - 1
    # The mean of a gap gets a symbol from 4 to 8.
    shift = min(max(int(gaps.mean()).bit_length() - 3, 0), given.MOST_SHIFT)
    most = (given.ALPHABET << shift) - 1
    ends = np.cumsum(gaps // most + 1)
    gaps, left = np.full(ends[-1], most), gaps % most
    gaps[ends - 1] = left
    both = numbers, (gaps >> shift).astype(np.uint8)
    symbols, owners = np.concatenate(both), np.arange(2, dtype=np.uint8)
    counts = [np.bincount(x, minlength=given.ALPHABET) for x in both]
    raw = []
    for part, _ in given.parts(symbols.size):
      some = (max(x - numbers.size, 0) for x in (part.start, part.stop))
      low = gaps[slice(*some)] & (1 << shift) - 1
      raw.append(given.Raw(np.ones(low.size, np.uint8), low.astype(np.uint32)))
    coded = given.encode(
      symbols,
      raw,
      owners.repeat([x.size for x in both]),
      owners,
      tables.quantize(np.stack(counts)),
      (0, shift),
      _LANE,
      run,
    )
    return cls(
      np.concatenate(coded),
      own[odd] if odd.any() else None,
      target.shape,
      dtype.name,
      places.size,
      gaps.size,
      shift,
      tuple(x.size for x in coded),
    )

  def materialize(self, *needed: Any) -> np.ndarray:
    base = self._base(needed)
    contexts = np.repeat(np.arange(2, dtype=np.uint8), (self.changes, self.gaps))
    both = np.empty(contexts.size, np.uint32)

    def job(part: slice, pop: given.Pop) -> None:
      symbols, at, raw = pop(contexts[part])
      own = both[part]
      own[:] = symbols[: own.size]
      own[at] = own[at] << self.shift | raw

    coded = np.asarray(self.coded)
    given.decode(coded, self.parts, contexts.size, (0, self.shift), job, _LANE)
    numbers, gaps = np.split(both, [self.changes])
    is_last = gaps < (given.ALPHABET << self.shift) - 1
    ends = np.cumsum(gaps + is_last, dtype=np.int64)
    places = ends[is_last] - 1
    (odd,) = np.nonzero(numbers == 0)
    values = np.zeros(0, base.dtype) if self.values is None else self.values
    if (places.size, odd.size) != (numbers.size, values.size):
      raise ValueError(
        f'{places.size} changed elements, {odd.size} of them far, have '
        f'{numbers.size} changes and {values.size} values'
      )
    end = int(ends[-1]) if ends.size else 0
    if end > base.size:
      raise ValueError(f'an array of {self.lengths} has no element {end - 1}')
    bits = base.copy()
    far = (numbers.astype(np.int16) - 128).astype(bits.dtype)
    found = ulps.moved(bits[places], far, self.dtype)
    found[odd] = values
    bits[places] = found
    return self._array(bits)

  def check(self) -> None:
    super().check()
    size = math.prod(self.lengths)
    # The greatest number stands for at least 255 elements.
    if self.changes > size or self.gaps > self.changes + size // 255:
      raise ValueError(
        f'an array of {self.lengths} cannot have {self.changes} changes and '
        f'{self.gaps} gaps'
      )
    self._check_values(self.values)


@register
@struct.dataclass
class Relative(_BesideBase):
  """Differences in ULPs, coded with a table for each expected size.

  The array is taken as a matrix of `width` columns. The expected size of a difference
  is the product of a scale of its row and a scale of its column. How many ULPs these
  are depends on the exponent of the base's number. Logarithms of both give the level of
  an element, in quarters of an octave:

      level = (row_scales[i] + column_scales[j] - 8 e) >> 1
      class = min(max(level - first, 0), n - 1)

  e is the biased exponent, at least 1; 0 for integers. n is the number of classes, and
  a band is some neighbouring ones. Each band has a frequency table and a shift s, and
  an element has a number below 2^(s + 8): the difference plus 2^(s + 7). Elements of
  the last band are so far from the base that the number is their own bits, the sign
  moved to the lowest place. The top 8 bits of a number are a symbol, and the others are
  raw. An element whose symbol is 0 is one of `values`.

  Rows of the scale `EQUAL` equal the base; nothing else is stored of them. The elements
  of the others, in C order, are coded by `coding.given`.

  If there are factors, the base's number b is replaced by a prediction before all this:
  `b + (left @ right)[i, j] 2^unit`, in float64, where b is finite, rounded to float32
  and then to the dtype. If there is a drift, each normal number then moves away from
  zero by the ULPs that the drift has for the top 8 bits of its mantissa. Weight decay
  makes one: it moves all numbers of an octave by as many ULPs, or by few others.

  Attributes:
    head: uint8, the scales and the bands, see `Head`.
    left: int16 `[R, k]`, or None.
    right: int16 `[k, C]`, or None.
    drift: int32 `[256]`, or None.
    coded: uint8, the bytes of `coding.given`.
    values: the elements of the symbol 0, signed integers with their bits. None if there
      are none.
    lengths: shape of the array, or of its transpose.
    name: name of its dtype.
    width: C.
    first: the level of class 0.
    parts: how many bytes the tables have, and each block.
    unit: see above.
  """

  type_name: ClassVar[str] = 'relative'

  head: Annotated[Any, Array(1, np.dtype(np.uint8))]
  left: Annotated[Any, Array(2, np.dtype(np.int16), optional=True)]
  right: Annotated[Any, Array(2, np.dtype(np.int16), optional=True)]
  drift: Annotated[Any, Array(1, np.dtype(np.int32), optional=True)]
  coded: Annotated[Any, Array(1, np.dtype(np.uint8))]
  values: Annotated[Any, Array(1, optional=True)]
  lengths: tuple[Length, ...] = static()
  name: Name = static()
  width: Length = static()
  first: Annotated[int, schema.between(-10000, 10000)] = static()
  parts: tuple[schema.Size, ...] = static()
  columns_first: bool = static(default=False)
  unit: Annotated[int, schema.between(-900, 900)] = static(default=0)

  def predicted(
    self, base: np.ndarray, own: np.ndarray | None, run: pool.Run
  ) -> np.ndarray:
    """Returns the bits that predict rows, `[r, C]`.

    Args:
      base: see `base_bits`.
      own: the indices of the rows; None for all.
      run: runs jobs for some rows, such as `pool.run`.
    """
    matrix = base.reshape(-1, max(self.width, 1))
    if own is not None:
      matrix = matrix[own]
    return self._drifted(self._with_factors(matrix, own, run))

  def _drifted(self, matrix: np.ndarray) -> np.ndarray:
    mantissa = mantissa_bits(self.dtype)
    if self.drift is None or mantissa is None:
      return matrix
    found, drift = np.empty_like(matrix), self.drift.astype(matrix.dtype)
    for part in _parts(matrix.shape):
      bits = matrix[part]
      is_normal = bits & np.iinfo(bits.dtype).max >= 1 << mantissa
      is_normal &= ulps.is_finite(bits, self.dtype)
      found[part] = bits + drift[drift_places(bits, mantissa)] * is_normal
    return found

  def _with_factors(
    self, matrix: np.ndarray, own: np.ndarray | None, run: pool.Run
  ) -> np.ndarray:
    if self.left is None or self.right is None:
      return matrix
    found, left = np.empty_like(matrix), self.left if own is None else self.left[own]
    right = self.right.astype(np.float64)

    def job(rows: slice) -> None:
      bits = matrix[rows]
      product = host.small_products(left[rows].astype(np.float64), right)
      with np.errstate(all='ignore'):
        numbers = bits.view(self.dtype).astype(np.float64)
        numbers += np.ldexp(product, self.unit)
        near = numbers.astype(np.float32).astype(self.dtype).view(bits.dtype)
      found[rows] = np.where(ulps.is_finite(bits, self.dtype), near, bits)

    parts = line_sums.row_parts(matrix.shape, _BLOCK)
    run([functools.partial(job, rows) for rows in parts])
    return found

  def materialize(self, *needed: Any) -> np.ndarray:
    base, dtype = self._base(needed), self.dtype
    head = Head.from_bytes(self.head, math.prod(self.lengths), self.width)
    own = head.own_rows
    run = pool.run if base.size > buffers.ROOM else pool.in_turn
    known = self.predicted(base, own, run)
    found, flat = np.empty_like(known), known.reshape(-1)
    bits, kind = found.reshape(-1), division.Kind.of(dtype, mantissa_bits(dtype))
    sums, of_classes = head.sums(dtype, self.first), head.of_classes

    def job(part: slice, pop: given.Pop) -> np.ndarray:
      bits[part], odd = division.join(
        flat[part],
        functools.partial(sums.write, part.start),
        kind,
        of_classes,
        head.shifts,
        pop,
      )
      return odd + part.start

    coded, shifts = np.asarray(self.coded), head.shifts.tolist()
    odd = np.concatenate(
      [np.zeros(0, np.int64), *given.decode(coded, self.parts, bits.size, shifts, job)]
    )
    values = np.zeros(0, known.dtype) if self.values is None else self.values
    if odd.size != values.size:
      raise ValueError(f'{odd.size} elements have no symbol, got {values.size} values')
    bits[odd] = values
    if own is None:
      return self._array(bits)
    whole = base.copy()
    whole.reshape(-1, max(self.width, 1))[own] = found
    return self._array(whole)

  def check(self) -> None:
    super().check()
    dtype = self.dtype
    if dtype.itemsize > 4:
      raise ValueError(f'an array of {self.name} has no differences')
    head = Head.from_bytes(self.head, math.prod(self.lengths), self.width)
    if int(head.shifts.max()) + 8 > 8 * dtype.itemsize:
      raise ValueError(f'differences of {self.name} cannot have {head.shifts.max()=}')
    self._check_values(self.values)
    if (self.left is None) != (self.right is None):
      raise ValueError('one of two factors is missing')
    if self.left is not None and self.right is not None:
      shapes = self.left.shape, self.right.shape
      rank = shapes[0][1]
      if shapes != ((head.rows.size, rank), (rank, self.width)) or rank > 1 << 12:
        raise ValueError(f'factors of shapes {shapes} do not fit {self.lengths}')
      if dtype not in _ROUNDED:
        raise ValueError(f'{self.name} has no factors')
    if self.drift is not None:
      most = 1 << (mantissa_bits(dtype) or 0)
      sizes = abs(self.drift.astype(np.int64))
      if dtype not in _ROUNDED or sizes.size != DRIFTS or sizes.max() >= most:
        raise ValueError(f'{self.name} cannot have this drift')


def _parts(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
  """Yields parts of a matrix that fit a cache."""
  for rows in line_sums.row_parts(shape, _BLOCK):
    for left in range(0, shape[1], _BLOCK):
      yield rows, slice(left, left + _BLOCK)


class Head(NamedTuple):
  """The scales and the bands, see `Relative`.

  Attributes:
    rows: int16 `[R]`, the scales of rows.
    columns: int16 `[C]`, the scales of columns.
    bands: uint8, the number of classes of each band.
    shifts: uint8, the shift of each band.
  """

  rows: np.ndarray
  columns: np.ndarray
  bands: np.ndarray
  shifts: np.ndarray

  @property
  def of_classes(self) -> np.ndarray:
    """The band of each class, uint8."""
    return np.repeat(np.arange(self.bands.size, dtype=np.uint8), self.bands)

  @property
  def own_rows(self) -> np.ndarray | None:
    """The indices of the rows that may differ; None if all may."""
    (own,) = np.nonzero(self.rows != EQUAL)
    return None if own.size == self.rows.size else own

  def sums(self, dtype: np.dtype, first: int) -> division.Sums:
    """Returns the sums of the scales of the rows that may differ, minus `2 first`."""
    rows = self.rows if self.own_rows is None else self.rows[self.own_rows]
    # The least exponent is 1, which integers do not have.
    more = 8 * (mantissa_bits(dtype) is None) - 2 * first
    return division.Sums(rows, self.columns + np.int16(more))

  def to_bytes(self) -> np.ndarray:
    """Returns the bytes, uint8: the inverse of `from_bytes`."""
    both = np.concatenate([self.rows, self.columns]).astype('<i2').view(np.uint8)
    parts = [bytes([self.bands.size]), self.bands.tobytes(), self.shifts.tobytes()]
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_FILTERED)
    plain = b''.join([*parts, both.reshape(-1, 2).T.tobytes()])
    return np.frombuffer(packer.compress(plain) + packer.flush(), np.uint8)

  @classmethod
  def from_bytes(cls, data: np.ndarray, size: int, width: int) -> 'Head':
    """Returns the head of an array of `size` elements.

    The bytes are a zlib stream of: the number of bands, the number of classes and the
    shift of each band, the low bytes of the scales of rows and then of columns, and
    their high bytes.

    Raises:
      ValueError: if the bytes are not such a head.
    """
    rows = size // width if width else 0
    if rows * width != size or width > size:
      raise ValueError(f'{size} elements cannot have rows of {width}')
    unpacker, most = zlib.decompressobj(), 2 * (rows + width) + 512
    try:
      plain = unpacker.decompress(np.asarray(data).tobytes(), most)
    except zlib.error as error:
      raise ValueError(f'the head cannot be read: {error}') from error
    count = plain[0] if plain else 0
    wanted = 1 + 2 * count + 2 * (rows + width)
    if not unpacker.eof or unpacker.unused_data or len(plain) != wanted or not count:
      raise ValueError(f'the head is not that of {rows} rows and {width} columns')
    of_bands = np.frombuffer(plain, np.uint8, 2 * count, 1).reshape(2, -1)
    if not of_bands[0].all() or int(of_bands[0].sum()) > MOST_CLASSES:
      raise ValueError(f'{count} bands cannot have {of_bands[0].sum()} classes')
    both = np.frombuffer(plain, np.uint8, offset=1 + 2 * count).reshape(2, -1)
    scales = both.T.copy().view('<i2').reshape(-1).astype(np.int16)
    sizes = np.abs(scales[scales != EQUAL].astype(np.int32))
    if sizes.max(initial=0) > MOST_SCALE:
      raise ValueError(f'scales must be within {MOST_SCALE}')
    if (scales[rows:] == EQUAL).any():
      raise ValueError('columns cannot be marked')
    return cls(scales[:rows], scales[rows:], *of_bands)


def drift_places(bits: np.ndarray, mantissa: int) -> np.ndarray:
  """Returns the places in a drift, see `Relative`: the mantissa's 8 bits or fewer."""
  return bits >> max(mantissa - 8, 0) & min((1 << mantissa) - 1, DRIFTS - 1)
