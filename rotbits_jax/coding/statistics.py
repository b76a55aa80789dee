"""Statistics of arrays: the layout of floats, and the scales of rows and columns.

The *level* of elements is the mean of their log2 magnitudes, in octaves. The bits of a
float approximate it well, with the bias of its exponent. The level of a column is that
of its elements divided by the scales of their rows. A sample of each row and column is
measured. What is chosen here affects only the size of a file.

Shape letters: R rows, C columns.
"""

import numpy as np

from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables
from rotbits_jax.coding import units as units_lib
from rotbits_jax.structured import ulps

STEPS = 4
"""The number of classes for a factor of 2."""

DENSITIES = 32
"""The number of scales of the rows of masks."""

_COLUMNS, _RUNS = 1 << 8, 4  # by which rows are measured, in so many runs
_ROWS = 1 << 7  # by which columns are measured
_CHUNK = 1 << 17  # elements that are looked at at once, so that they fit the cache

Lines = tuple[np.ndarray, np.ndarray]
"""The scales of rows and of columns, or one for all: integers of any size."""

# If the scales of normal numbers vary so little that the logarithms of all vary by q
# times as much, a table for each scale saves 1.3 / q bits.
_SAVED = 1.3

# Logarithms are limited to this many octaves around the median. The lower ones tell
# little of the scale, and much of chance.
_BELOW, _ABOVE = 3, 8

# A minimum exponent that is further below the scale saves less than 0.03 bits.
_MOST_BELOW, _MOST_ABOVE = 6, 2
# Fewer elements save less than the program for them takes to compile.
_LEAST_RAISED = 1 << 10

_TAILS = 1e-3, 1 - 1e-3  # shares of int8 below and above which they may have no bin
_MOST_SPREAD = 3  # of the scales of rows and columns of int8 in wide bins

_ONE = 127  # the biased exponent of 1, in the scales of integers
_FLOATS = 1 << 14  # elements that are looked at at once, so that they fit the cache

# Masks of fewer elements cost more than they save. Fewer zeros are exceptions.
_LEAST_MASK = 1 << 12
_LEAST_ZEROS, _LEAST_ZERO_CODES = 1 / 1024, 1 / 8


def runs(size: int, most: int, count: int = 16) -> list[slice]:
  """Returns the places of a sample: all elements, or runs that have about `most`."""
  if size <= most:
    return [slice(0, size)]
  length = most // count
  starts = np.linspace(0, size - length, count).astype(int).tolist()
  return [slice(start, start + length) for start in starts]


def has_zeros(array: np.ndarray) -> bool:
  """Returns whether elements have zeros that a mask is for."""
  if array.size < _LEAST_MASK or array.dtype not in (*ulps.FORMATS, np.int8):
    return False
  bits = _some(array.reshape(-1).view(f'u{array.itemsize}'))
  if array.dtype != np.int8:
    return bool(np.count_nonzero(bits << 1) < (1 - _LEAST_ZEROS) * bits.size)
  counts = np.bincount(bits, minlength=256)  # of codes, with far more zeros than ones
  is_wide = counts[units_lib.BINS // 2 : -units_lib.BINS // 2].any()
  least = max(_LEAST_ZERO_CODES * bits.size, 2 * counts[[1, 2, -2, -1]].sum())
  return bool(is_wide and counts[0] > least)


def of_codes(numbers: np.ndarray, lines: Lines) -> layouts.Pairs | None:
  """Chooses the layout of codes, int8 `[n]`, by their range; None for others."""
  several = _some(numbers)
  least, most = np.quantile(several, _TAILS).astype(int).tolist()
  raw_bits = ((most - least) // units_lib.BINS).bit_length()
  layout = layouts.Pairs(numbers.dtype, raw_bits, 'codes')
  counts = np.unique(several >> raw_bits, return_counts=True)[1]
  is_even = np.max(counts) < layout.most_share * several.size
  # Bins that are right for some lines are too wide for others.
  fits = not raw_bits or np.std(lines[0]) + np.std(lines[1]) <= _MOST_SPREAD
  return layout if is_even and fits else None


def of_floats(array: np.ndarray) -> tuple[layouts.Pairs, int]:
  """Chooses the layout of floats by the bits that they use.

  Returns the layout, without low bits that are zero in all elements; and the highest
  minimum exponent that these allow, 0 if small ones share no step.
  """
  dtype, bits = array.dtype, array.reshape(-1).view(f'u{array.itemsize}')
  form, most, unsigned = ulps.FORMATS[dtype], ulps.FORMATS[dtype].nmant, bits.dtype.type
  mask, leading = unsigned((1 << form.bits - 1) - 1), unsigned(1 << most)
  sample = _some(bits) & mask
  exponents = np.maximum(sample[sample > 0] >> most, 1)
  # For a normal distribution the mean of log2 |x| is 0.92 less than log2 of the
  # standard deviation, and the exponent is on average 0.5 less than log2.
  scale = int(np.mean(exponents if exponents.size else 1) + 1.42)
  useless = max(scale - _MOST_BELOW, 1)
  used, lowest = 1 << most, 1 << 30
  for start in range(0, bits.size, _FLOATS):
    magnitude = bits[start : start + _FLOATS] & mask
    magnitude = magnitude[magnitude > 0]
    exponent = np.maximum(magnitude >> most, 1).astype(np.int32)
    significand = magnitude & leading - 1 | (magnitude >= leading) * leading
    zeros = np.bitwise_count(~significand & significand - 1)
    lowest = int((exponent + zeros).min(initial=lowest))
    used |= int(np.bitwise_or.reduce(magnitude))  # type: ignore[call-overload]
    if used & 1 and lowest <= useless:
      break
  zeros = min((used & -used).bit_length(), most) - 1
  # All elements are multiples of the step of the minimum exponent `lowest`. Those above
  # the minimum exponent end in so many zeros, so those below must. With a higher one
  # too few symbols would be left for the elements below it. NaN must stay above it.
  least = min(lowest - zeros, scale + _MOST_ABOVE, (1 << form.nexp) - 2)
  if least > useless and bits.size >= _LEAST_RAISED:
    return layouts.Pairs(dtype, max(most - zeros - 1, 1), 'raised'), least
  return layouts.Pairs(dtype, most - zeros), 0


def _some(flat: np.ndarray) -> np.ndarray:
  """Returns a sample of elements `[n]`."""
  return np.concatenate([flat[run] for run in runs(flat.size, _FLOATS)])


def measure(array: np.ndarray, shared: int) -> Lines:
  """Measures the rows of floats or integers, and then the columns of what is left.

  So many columns share a scale, if they can.
  """
  count, width = contexts.matrix_shape(array.shape)
  is_whole = array.size == count * width  # else the last row begins anew
  matrix = array.reshape(count, width) if is_whole else np.resize(array, (count, width))
  places = runs(width, _COLUMNS, _RUNS)
  some = np.concatenate([matrix[:, run] for run in places], axis=1)
  row_levels, noise = _levels(some, np.zeros((1, 1)), 1)
  rows = _quantized(row_levels, noise, array.size, some.shape[1])
  some_rows = slice(None, None, max(count // _ROWS, 1))
  levels, noise = _levels(matrix[some_rows], row_levels[some_rows, None], 0)
  levels = levels.reshape(contexts.matrix_shape(array.shape, shared)[1], -1).mean(1)
  columns = _quantized(levels, noise, array.size, shared * min(count, _ROWS))
  one = 0 if array.dtype in ulps.FORMATS else STEPS * _ONE
  return rows.astype(int) - one, columns.astype(int)


def densities(mask: np.ndarray) -> Lines:
  """Returns scales of the rows of a mask, bits `[R, C]`: half octaves of the odds."""
  ones = np.bitwise_count(mask).sum(axis=1, dtype=float) + 0.5
  odds = 2 * np.log2(ones / (8 * mask.shape[1] + 1 - ones))
  rows = np.rint(odds).astype(int) + DENSITIES // 2
  return rows.clip(0, DENSITIES - 1), np.zeros(1, int)


def _quantized(
  levels: np.ndarray, noise: float, size: int, measured: int
) -> np.ndarray:
  """Returns the scales of rows or columns, or one for all if they would save nothing.

  `size` numbers, whose logarithms have the variance `noise`, have these levels; each
  was measured by `measured` numbers.
  """
  lines = np.rint(STEPS * levels)
  saved = _SAVED * size * (np.var(levels) / noise - 2 / measured)
  if saved > tables.entropy_bits(np.unique(lines, return_counts=True)[1]):
    return lines
  return np.rint(STEPS * levels.mean(keepdims=True))


def _levels(array: np.ndarray, by: np.ndarray, axis: int) -> tuple[np.ndarray, float]:
  """Returns the levels of rows, axis 1, or of columns, axis 0, less those of `by`.

  Also returns about the variance of the logarithms.
  """
  dtype = array.dtype if array.dtype in ulps.FORMATS else np.dtype(np.float32)
  form, halves = ulps.FORMATS[dtype], max(dtype.itemsize // 2, 1)
  unit = 1 << form.nmant + 16 - form.bits
  # Integers, so that a file does not depend on the order of sums.
  by = np.rint(by * unit).astype(np.int16)
  levels, variances, step = [], [], max(_CHUNK // max(array.shape[axis], 1), 1)
  ones = np.ones(array.shape[axis], np.float32)
  for start in range(0, array.shape[1 - axis], step):
    places = slice(start, start + step)
    part = array[places] if axis else array[:, places]
    part = part.astype(dtype, copy=False)
    if dtype.itemsize == 1:
      part = part.view(np.uint8).astype(np.int16) << 8
    logs = part.view(np.int16)[:, halves - 1 :: halves] & np.int16(0x7FFF)
    logs -= by
    sample = logs.reshape(-1)[:: max(logs.size >> 10, 1)]
    middle = int(np.partition(sample, sample.size // 2)[sample.size // 2])
    limits = np.array([middle - _BELOW * unit, middle + _ABOVE * unit])
    limits = limits.clip(-(2**15), 2**15 - 1).astype(np.int16)
    np.clip(logs, *limits, out=logs)
    variances.append(np.var(sample))  # clipped
    # Exact: sums of at most 2^9 integers up to 2^15, in which 2^24 is the limit.
    numbers = logs.astype(np.float32)
    sums = (numbers @ ones if axis else ones @ numbers).astype(float)
    levels.append(sums / (ones.size * unit))
  return np.concatenate(levels), max(float(np.mean(variances)) / unit**2, 1e-3)
