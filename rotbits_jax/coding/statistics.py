"""Statistics of arrays: the layout of floats and codes, and masks.

What is chosen here affects only the size of a file.
"""

from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import layouts
from rotbits_jax.coding import scales
from rotbits_jax.coding import units as units_lib
from rotbits_jax.structured import ulps

DENSITIES = 32
"""The number of scales of the rows of masks."""

# A minimum exponent that is further below the scale saves less than 0.03 bits.
_MOST_BELOW, _MOST_ABOVE = 6, 2
# Fewer elements save less than the program for them takes to compile.
_LEAST_RAISED = 1 << 10

_TAILS = 1e-3, 1 - 1e-3  # shares of int8 below and above which they may have no bin
_MOST_SPREAD = 3  # of the scales of rows and columns of int8 in wide bins

_FLOATS = 1 << 14  # elements that are looked at at once, so that they fit the cache

# Masks of fewer elements cost more than they save. Fewer zeros are exceptions.
_LEAST_MASK = 1 << 12
_LEAST_ZEROS, _LEAST_ZERO_CODES = 1 / 1024, 1 / 8


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


def has_signs(array: np.ndarray) -> bool:
  """Returns whether the sign bit of any float is set."""
  bits = array.reshape(-1).view(f'i{array.itemsize}')
  return bool(_some(bits).min() < 0 or bits.min() < 0)


def of_codes(numbers: np.ndarray, lines: scales.Lines) -> layouts.Pairs | None:
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


class Step(NamedTuple):
  """The bits that floats use."""

  tail: int  # below half octaves, without low bits that are zero in all elements
  least: int  # the highest minimum exponent that floats allow; 0 for no shared step
  saved: float  # bits of an element that the shared step saves


def step_of(array: np.ndarray) -> Step:
  """Finds the bits that floats use, and the step that small ones share."""
  dtype, bits = array.dtype, array.reshape(-1).view(f'u{array.itemsize}')
  form, most, unsigned = ulps.FORMATS[dtype], ulps.FORMATS[dtype].nmant, bits.dtype.type
  mask, leading = unsigned((1 << form.bits - 1) - 1), unsigned(1 << most)
  sample = _some(bits) & mask
  exponents = np.maximum(sample[sample > 0] >> most, 1).astype(np.int32)
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
  if least <= useless or bits.size < _LEAST_RAISED or not exponents.size:
    return Step(most - zeros - 1, 0, 0.0)
  return Step(most - zeros - 1, least, float((least - exponents).clip(0, most).mean()))


def _some(flat: np.ndarray) -> np.ndarray:
  """Returns a sample of elements `[n]`."""
  return np.concatenate([flat[run] for run in scales.runs(flat.size, _FLOATS)])


def densities(mask: np.ndarray) -> scales.Lines:
  """Returns scales of the rows of a mask, bits `[R, C]`: half octaves of the odds."""
  ones = np.bitwise_count(mask).sum(axis=1, dtype=float) + 0.5
  odds = 2 * np.log2(ones / (8 * mask.shape[1] + 1 - ones))
  rows = np.rint(odds).astype(int) + DENSITIES // 2
  return rows.clip(0, DENSITIES - 1), np.zeros(1, int)
