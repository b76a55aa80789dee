"""The choice of the layouts of floats and integers, by the bits that they use."""

from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import layouts

# A minimum exponent that is further below the scale saves less than 0.03 bits.
_MOST_BELOW = 6
_MOST_ABOVE = 2

_CHUNK = 1 << 16  # elements that are looked at at once, so that they fit the cache
_RUNS = 4  # of elements, of which a sample consists


class _Survey(NamedTuple):
  """Properties of some floats.

  Attributes:
    lowest: an exponent. All elements are multiples of the step that the minimum
      exponent `lowest + 1` has, and not of a coarser one; it may be negative or large.
    scale: about log2 of their standard deviation, biased as exponents are.
  """

  lowest: int
  scale: int


def _survey(bits: np.ndarray, form: layouts.Format) -> _Survey | None:
  """Looks at the bit patterns of elements, not empty; None if all elements are 0."""
  exponents, count, lowest = 0, 0, 1 << 30
  for start in range(0, bits.size, _CHUNK):
    part = bits[start : start + _CHUNK]
    magnitude = part & part.dtype.type((1 << form.width - 1) - 1)
    magnitude = magnitude[magnitude > 0]
    if not magnitude.size:
      continue
    exponent = np.maximum(magnitude >> form.mantissa, 1).astype(np.int32)
    significand = magnitude & magnitude.dtype.type((1 << form.mantissa) - 1)
    significand |= (magnitude >> form.mantissa > 0).astype(part.dtype) << form.mantissa
    # A float32 holds a power of two exactly, and its bits tell the exponent.
    lowest_bit = (significand & -significand).astype(np.float32).view(np.int32) >> 23
    lowest = min(lowest, int((exponent + lowest_bit).min()) - 128)
    exponents += int(exponent.sum())
    count += magnitude.size
  # For a normal distribution the mean of log2 |x| is 0.92 less than log2 of the
  # standard deviation, and the exponent is on average 0.5 less than log2.
  return _Survey(lowest, int(exponents / count + 1.42)) if count else None


def of_floats(bits: np.ndarray, dtype: np.dtype) -> layouts.Float:
  """Chooses the layout of floats by the bits that they use.

  Args:
    bits: the bit patterns, unsigned integers `[n]`.
    dtype: dtype of the elements, in `layouts.FORMATS`.

  Returns:
    The layout, with the highest minimum exponent that the elements allow and without
    low bits that are zero in all of them.
  """
  form = layouts.FORMATS[dtype]
  # With more elements fewer low bits are zero in all, and `lowest` only falls.
  for run in (_CHUNK >> 4, _CHUNK >> 2, _CHUNK, bits.size):
    part = bits
    if _RUNS * run < bits.size:
      starts = np.linspace(0, bits.size - run, _RUNS).astype(int)
      part = np.concatenate([bits[start : start + run] for start in starts])
    used = int(np.bitwise_or.reduce(part))  # type: ignore[call-overload]
    layout = _layout(_survey(part, form), used, dtype)
    if part is bits or layout == layouts.Float(dtype, layout.most_raw_bits):
      break
  return layout


def _layout(survey: _Survey | None, used: int, dtype: np.dtype) -> layouts.Float:
  """Returns the layout of elements, given the union of their bit patterns."""
  if survey is None:
    return layouts.Float(dtype, int(used > 0))
  form, most = layouts.FORMATS[dtype], layouts.Float(dtype, 0).most_raw_bits
  # The raw bits are the sign and the low bits of the mantissa.
  low = used >> (form.width - 1) << most - 1 | used & ((1 << most - 1) - 1)
  zeros = (low & -low).bit_length() - 1 if low else most
  # Elements above the minimum exponent end in this many zeros, so those below must.
  least = survey.lowest + 1 - min(zeros, form.mantissa)
  # With a higher one too few symbols would be left for the elements below it.
  least = min(least, survey.scale + _MOST_ABOVE)
  least = min(least, (1 << form.exponent) - 2)  # NaN must stay above it
  least = least if least > max(survey.scale - _MOST_BELOW, 1) else 1
  return layouts.Float(dtype, most - zeros, least)


def most_folded(array: np.ndarray) -> int:
  """Returns the greatest of some integers, not empty, after folding."""
  largest, least = int(array.max()), int(array.min())
  return max(2 * largest, -2 * least - 1) if array.dtype.kind == 'i' else largest


def least_raw_bits(array: np.ndarray) -> int:
  """Returns the fewest raw bits that a layout of some integers, not empty, can have."""
  return max(most_folded(array).bit_length() - layouts.MOST_SYMBOL_BITS, 0)
