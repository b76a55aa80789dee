r"""Forms: arrays that are coded as other arrays, because these take fewer bytes.

The array is taken as a matrix of R rows and C columns, see `scales.matrix_shape`.

* `Uniform`: floats that are multiples of one unit are coded as the integers k. The unit
  is a small integer times a power of two, because each product is then exact:

      value = k (4 + i) 2^(e - 152)        step = 4 e + i, i < 4

* `Codebook`: few distinct values are listed, and each element is coded as the index of
  its value. The list may be for the whole array, or one for each row or column. It may
  also have only the values that occur often, such as zeros; then one more index stands
  for all *others*, which are coded as an array in the order in which they occur. Short
  indices are packed into bytes, so that a symbol of the coder is a pattern of several
  elements, such as two zeros in every four.
* `Halves`: elements of 64 bits are coded as their low and high 32 bits. Signed ones are
  folded before, as in `layouts.Int`.

Each form tells the dtypes and shapes of the *parts* that are coded, and makes the array
of them. All of this is exact. Shape letters: V values.
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import scales
from rotbits_jax.system import schema

Parts = list[tuple[np.dtype, tuple[int, ...]]]


class Form(abc.ABC):
  """How an array is made of the arrays that are coded."""

  @abc.abstractmethod
  def parts(self, dtype: np.dtype, shape: tuple[int, ...]) -> Parts:
    """Returns the dtype and the shape of each part of an array."""

  @abc.abstractmethod
  def join(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    """Makes an array of its parts.

    Args:
      parts: the parts, contiguous; they may be damaged.
      out: the array to write into, contiguous.

    Raises:
      ValueError: if the parts do not fit each other.
    """


@dataclasses.dataclass(frozen=True)
class Uniform(Form):
  """Multiples of a unit. The part is the integers.

  Attributes:
    step: tells the unit, see the module.
    nbytes: bytes of an integer, 1 or 2.
  """

  as_list: ClassVar[bool] = True

  # The least positive multiple is a normal float32, and the greatest is finite.
  LEAST_STEP: ClassVar[int] = 4 * (152 - 126)
  MOST_STEP: ClassVar[int] = 4 * (152 + 108) + 3

  step: Annotated[int, schema.between(LEAST_STEP, MOST_STEP)]
  nbytes: Literal[1, 2]

  @property
  def unit(self) -> np.float32:
    return np.ldexp(np.float32(4 + self.step % 4), self.step // 4 - 152)

  @property
  def integer_dtype(self) -> np.dtype:
    return np.dtype(f'i{self.nbytes}')

  def parts(self, dtype: np.dtype, shape: tuple[int, ...]) -> Parts:
    del dtype
    return [(self.integer_dtype, shape)]

  def join(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    for part, own in zip(chunks(parts[0]), chunks(out), strict=True):
      own[:] = self.numbers(part, out.dtype)

  def numbers(self, integers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the numbers of integers k."""
    with np.errstate(over='ignore'):  # in a damaged file
      return np.multiply(integers, self.unit, dtype=np.float32).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Halves(Form):
  """The low and the high 32 bits."""

  def parts(self, dtype: np.dtype, shape: tuple[int, ...]) -> Parts:
    return [(np.dtype(np.uint32), shape)] * 2

  def join(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    bits = out.reshape(-1).view(np.uint64)
    bits.view(np.uint32).reshape(-1, 2)[...] = np.stack(
      [part.reshape(-1) for part in parts], axis=1
    )
    if out.dtype.kind == 'i':
      bits[:] = bits >> np.uint64(1) ^ np.uint64(0) - (bits & np.uint64(1))


_WIDTH = 128  # of the rows in which others are stored, because rows are sorted by scale
_MOST_VALUES = 1 << 12


@dataclasses.dataclass(frozen=True)
class Codebook(Form):
  """Few distinct values, or few values that occur often.

  The parts are the codes; the values, `[1, V]`, `[R, V]` or `[C, V]`; and the others,
  as rows `[n // 128, 128]` and a last row `[n % 128]`.

  Codes have b = 1, 2, 4, 8 or 16 bits, the least number for V codes and one for others.
  They are those of the matrix or of its transpose, `[L, N]`. For b < 8, a byte holds
  8 / b successive codes of a line, the first one in the lowest bits.

  Attributes:
    lists: whether the list of values is for all elements, for a row or for a column.
    values: V.
    transposed: whether the codes are those of the transpose.
    others: n, the number of elements that are in no list.
    across: whether the others are in the order of the transpose.
  """

  as_list: ClassVar[bool] = True

  lists: Literal['all', 'row', 'column']
  values: Annotated[int, schema.between(1, _MOST_VALUES)]
  transposed: bool
  others: schema.Size
  across: bool

  def __post_init__(self) -> None:
    if self.across and not self.others:
      raise ValueError('there are no others, which have no order')

  @property
  def bits(self) -> int:
    """The bits of a code."""
    count = self.values + (self.others > 0)
    return next(b for b in (1, 2, 4, 8, 16) if count <= 1 << b)

  def parts(self, dtype: np.dtype, shape: tuple[int, ...]) -> Parts:
    rows, columns = scales.matrix_shape(shape)
    count, length = (columns, rows) if self.transposed else (rows, columns)
    lists = {'all': 1, 'row': rows, 'column': columns}[self.lists]
    code, each = np.dtype(np.uint16 if self.bits > 8 else np.uint8), 8 // self.bits
    packed = count, -(-length // each) if each else length
    others = (self.others // _WIDTH, _WIDTH), (self.others % _WIDTH,)
    return [(code, packed), *((dtype, x) for x in ((lists, self.values), *others))]

  def join(self, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
    shape = scales.matrix_shape(out.shape)
    packed, values, *others = (bit_patterns(part) for part in parts)
    values = values.reshape(-1, self.values)
    count = shape[0] if self.transposed else shape[1]
    codes = _unpacked(packed.reshape(parts[0].shape), count, self.bits)
    codes = codes.T if self.transposed else codes
    if int(codes.max()) >= self.values + (self.others > 0):
      raise ValueError('a code is beyond the codebook')
    # The code of others gets any value first.
    values = np.pad(values, ((0, 0), (0, 1)))
    bits = bit_patterns(out).reshape(shape)
    if self.lists == 'all':
      np.take(values[0], codes, out=bits, mode='clip')
    else:
      by_line, index = (values, codes) if self.lists == 'row' else (values, codes.T)
      found = np.take_along_axis(by_line, index.astype(np.intp), axis=1)
      bits[...] = found if self.lists == 'row' else found.T
    if self.others:
      is_other = codes == self.values
      if np.count_nonzero(is_other) != self.others:
        raise ValueError(f'the codes do not have {self.others} others')
      ordered, is_other = (bits.T, is_other.T) if self.across else (bits, is_other)
      ordered[is_other] = np.concatenate([x.reshape(-1) for x in others])


def bit_patterns(array: np.ndarray) -> np.ndarray:
  """Returns the bit patterns of a contiguous array: a view, unsigned integers `[n]`."""
  return array.reshape(-1).view(f'u{array.dtype.itemsize}')


def chunks(array: np.ndarray) -> Iterator[np.ndarray]:
  """Yields the elements of a contiguous array in parts that fit the CPU's cache."""
  flat = array.reshape(-1)
  return (flat[start : start + (1 << 16)] for start in range(0, flat.size, 1 << 16))


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
  """Packs codes `[L, N]`; see `Codebook`."""
  if bits == 16:
    return np.ascontiguousarray(codes)
  codes, each = codes.astype(np.uint8), 8 // bits
  codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
  packed = codes[:, ::each]
  for k in range(1, each):
    packed = packed | codes[:, k::each] << np.uint8(bits * k)
  return np.ascontiguousarray(packed)


def _unpacked(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
  """Returns codes `[L, count]`: the inverse of `_packed`."""
  if bits >= 8:
    return packed
  each, mask = 8 // bits, np.uint8((1 << bits) - 1)
  codes = np.empty((packed.shape[0], packed.shape[1] * each), np.uint8)
  for k in range(each):
    np.bitwise_and(packed >> np.uint8(bits * k), mask, out=codes[:, k::each])
  return codes[:, :count]


# ---- the choice of a form ------------------------------------------------------------

Candidate = tuple[Form, list[np.ndarray]]
"""A form and the parts of an array, which are contiguous."""

# The scale of multiples is less than 2^12 units, because their integers have 16 bits
# and must hold 8 times the scale. The dtype must also be able to represent every
# multiple near the scale. Otherwise the integers of large elements end in zeros.
_MOST_OCTAVES = 12
_BEYOND_OCTAVES = 2


def uniform(array: np.ndarray, found: layouts.Survey) -> Candidate | None:
  """Returns the form of small multiples of a unit; None if the array has others.

  Args:
    array: floats of a dtype in `layouts.FORMATS`, contiguous.
    found: a survey of all elements.
  """
  form = layouts.FORMATS[array.dtype]
  # All elements are multiples of 2^exponent, and perhaps of an odd number times that.
  exponent = found.lowest + 1 - form.bias - form.mantissa
  octaves = found.scale - form.bias - exponent
  most = min(_MOST_OCTAVES, form.mantissa - _BEYOND_OCTAVES)
  greatest = np.array(found.greatest, f'u{array.dtype.itemsize}').view(array.dtype)
  units = np.ldexp(np.float64(greatest), -exponent)
  if found.negative_zeros or not (octaves < most + 3 and units < 7 << 15):
    return None
  divisor = _divisor(array, exponent)
  largest = int(units) // divisor
  if not (octaves - round(math.log2(divisor)) < most and largest < 1 << 15):
    return None
  # The divisor is written as 4, 5, 6 or 7 times a power of two.
  shift = {1: 2, 3: 1, 5: 0, 7: 0}[divisor]
  step = 4 * (exponent - shift + 152) + (divisor << shift) - 4
  if not Uniform.LEAST_STEP <= step <= Uniform.MOST_STEP:
    return None
  made = Uniform(step, 1 if largest < 1 << 7 else 2)
  integers = np.empty(array.shape, made.integer_dtype)
  for part, out in zip(chunks(array), chunks(integers), strict=True):
    # The quotient is an integer up to the rounding error of the division.
    out[:] = np.rint(np.divide(part, made.unit, dtype=np.float32))
  return made, [integers]


def _divisor(array: np.ndarray, exponent: int) -> int:
  """Returns 7, 5 or 3 if all elements are multiples of that times 2^exponent, else 1.

  Args:
    array: floats, contiguous. The elements are multiples of 2^exponent and less than
      2^23 times that.
    exponent: of a power of two.
  """
  common = [7, 5, 3]
  for part in chunks(array):
    whole = np.ldexp(part.astype(np.float64), -exponent).astype(np.int32)
    common = [d for d in common if not (whole % d).any()]
    if not common:
      return 1
  return common[0]


def halves(array: np.ndarray) -> Candidate:
  """Returns the form of elements of 64 bits."""
  bits = bit_patterns(array)
  if array.dtype.kind == 'i':
    bits = bits << np.uint64(1) ^ (array.reshape(-1) >> 63).view(np.uint64)
  pairs = bits.view(np.uint32).reshape(-1, 2)
  return Halves(), [np.ascontiguousarray(x).reshape(array.shape) for x in pairs.T]


# Codes of few elements cost more than they save.
_LEAST_ELEMENTS = 1 << 12

# A value that occurs in this part of all elements has a code, if such codes may save
# this part of all bits. To save less is not worth the time that they take.
_LEAST_SHARE, _LEAST_SAVED = 0.01, 0.006

# Lines of a sample, and elements of each. A list is tried if it has few values in it.
_LINES, _LENGTH = 64, 256
_FEW_VALUES, _FEW_OF_LINE = 1024, 64
_MOST_LISTS = 1 << 14

# Integers get no codebook if more values occur than there are codes that share a byte,
# and at least this part of all values between the least and the greatest.
_FEW_CODES, _DENSE_SHARE = 1 << 4, 1 / 4

# Indices into a long list take a byte each, as the elements themselves.
_FEW_BYTES = 4


def codebooks(array: np.ndarray) -> Iterator[Candidate]:
  """Yields the codebooks that may suit an array, by the look of a sample.

  Args:
    array: any elements, contiguous.
  """
  if array.size < _LEAST_ELEMENTS:
    return
  bits = bit_patterns(array).reshape(scales.matrix_shape(array.shape))
  sample = _sample(bits, _LINES)
  values, counts = _counted(sample)
  if array.dtype.kind in 'iu' and _is_dense(values.view(array.dtype)):
    return
  few = _FEW_BYTES if array.itemsize == 1 else _FEW_VALUES
  if values.size <= few:
    every = np.unique(bits)
    if every.size <= _MOST_VALUES:
      yield _codebook(array, 'all', every[None])
  if array.itemsize == 1:
    return
  is_often = counts >= _LEAST_SHARE * counts.sum()
  of_codes = np.append(counts[is_often], counts[~is_often].sum())
  bits_saved = 8 * array.itemsize * of_codes[:-1].sum() - tables.entropy_bits(of_codes)
  if not is_often.all() and bits_saved > _LEAST_SAVED * 8 * sample.nbytes:
    yield _codebook(array, 'all', values[is_often][None])
  if values.size <= _FEW_OF_LINE:
    return
  for lists, lines in (('row', bits), ('column', bits.T)):
    if lists == 'column':
      # Neighbours in a column are far apart in memory.
      sample = _sample(lines, _LINES // 8)
    few = min(_FEW_OF_LINE, sample.shape[1] // 4)
    is_few = all(np.unique(line).size <= few for line in sample)
    if is_few and len(lines) <= _MOST_LISTS:
      known = [np.unique(line) for line in lines]
      width = max(x.size for x in known)
      if width <= _MOST_VALUES:
        padded = np.stack([np.pad(x, (0, width - x.size), 'edge') for x in known])
        yield _codebook(array, lists, padded)


def _counted(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the values of unsigned integers in order, and how often each occurs."""
  if sample.itemsize > 2:
    return np.unique(sample, return_counts=True)
  counts = np.bincount(sample.reshape(-1))
  (values,) = np.nonzero(counts)
  return values.astype(sample.dtype), counts[values]


def _is_dense(integers: np.ndarray) -> bool:
  """Returns whether codes of these values say no more than the values themselves."""
  span = int(integers.max()) - int(integers.min()) + 1
  return integers.size > _FEW_CODES and integers.size >= _DENSE_SHARE * span


def _sample(lines: np.ndarray, most: int) -> np.ndarray:
  """Returns runs of neighbours from up to `most` lines."""
  count, length = lines.shape
  rows = np.linspace(0, count - 1, min(count, most)).astype(int)
  size = min(length, most * _LENGTH // rows.size)
  starts = np.arange(rows.size) * 7 * size % (length - size + 1)
  runs = zip(rows.tolist(), starts.tolist(), strict=True)
  return np.concatenate([lines[i, j : j + size] for i, j in runs]).reshape(-1, size)


def _codebook(array: np.ndarray, lists: str, values: np.ndarray) -> Candidate:
  """Returns the codebook of an array with these values, `[., V]`, and its parts."""
  bits = bit_patterns(array).reshape(scales.matrix_shape(array.shape))
  codes = _codes(bits, values, lists)
  is_other = codes == values.shape[1]
  orders = [bits[is_other], bits.T[is_other.T]]
  others = orders[0].size
  across = others > 0 and _spread(orders[1], array) < _spread(orders[0], array)
  made = Codebook(lists, values.shape[1], False, others, across)  # type: ignore[arg-type]
  packed = _packed(codes, made.bits)
  if made.bits < 8:
    # A symbol may stand for a pattern of neighbours in a row or in a column.
    other = _packed(codes.T, made.bits)
    cost = [tables.entropy_bits(np.bincount(x.reshape(-1))) for x in (packed, other)]
    if cost[1] < cost[0]:
      made, packed = dataclasses.replace(made, transposed=True), other
  ordered = orders[across]
  whole = others - others % _WIDTH
  parts = [values, ordered[:whole].reshape(-1, _WIDTH), ordered[whole:]]
  return made, [packed, *(np.ascontiguousarray(x).view(array.dtype) for x in parts)]


def _codes(bits: np.ndarray, values: np.ndarray, lists: str) -> np.ndarray:
  """Returns the code of each element: uint16 `[R, C]`; V if it is in no list."""
  most = values.shape[1]
  if lists == 'all' and bits.itemsize <= 2:
    table = np.full(1 << 8 * bits.itemsize, most, np.uint16)
    table[values[0]] = np.arange(most)
    return table[bits]
  codes = np.empty(bits.shape, np.uint16)
  own: tuple[Iterable[np.ndarray], Iterable[np.ndarray]] = bits, codes
  if lists == 'all':
    own = chunks(bits), chunks(codes)
  elif lists == 'column':
    own = bits.T, codes.T
  for i, (line, out) in enumerate(zip(*own, strict=True)):
    known = values[0 if lists == 'all' else i]
    index = np.minimum(np.searchsorted(known, line), most - 1)
    out[...] = np.where(known[index] == line, index, most)
  return codes


def _spread(others: np.ndarray, array: np.ndarray) -> float:
  """Returns a cost of rows of others: the mean logarithm of their mean squares."""
  if array.dtype not in layouts.FORMATS or others.size < _WIDTH:
    return 0.0
  rows = others[: others.size - others.size % _WIDTH].view(array.dtype)
  wide = rows.astype(np.float32).reshape(-1, _WIDTH)
  with np.errstate(all='ignore'):
    return float(np.nan_to_num(np.log2(np.square(wide).mean(axis=1))).mean())
