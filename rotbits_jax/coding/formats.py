"""The choice of the layouts of floats, by the bits that they use."""

import numpy as np

from rotbits_jax.coding import layouts

# A minimum exponent that is further below the scale saves less than 0.03 bits.
_MOST_BELOW = 6
_MOST_ABOVE = 2

_TAILS = 1e-3, 1 - 1e-3  # shares of int8 below and above which they may have no bin
_MOST_SHARE = 0.6  # of the most frequent bin, because pairs of it have a limit

_SAMPLE = 1 << 12  # elements that tell the scale
_CHUNK = 1 << 14  # elements that are looked at at once, so that they fit the cache


def runs(size: int, most: int, count: int = 32) -> list[slice]:
  """Returns the places of a sample: all elements, or runs that have about `most`."""
  if size <= most:
    return [slice(0, size)]
  length = most // count
  starts = np.linspace(0, size - length, count).astype(int).tolist()
  return [slice(start, start + length) for start in starts]


def of_integers(numbers: np.ndarray) -> layouts.Layout:
  """Chooses the layout of integers, `[n]`, by their range."""
  if numbers.dtype == np.int8:
    several = np.concatenate([numbers[run] for run in runs(numbers.size, _CHUNK)])
    least, most = np.quantile(several, _TAILS).astype(int).tolist()
    raw_bits = ((most - least) // layouts.BINS).bit_length()
    counts = np.unique_counts(several >> raw_bits).counts
    if counts.max() < _MOST_SHARE * several.size:
      return layouts.Codes(numbers.dtype, raw_bits)
  return layouts.Integers(numbers.dtype, 0)


def of_floats(bits: np.ndarray, dtype: np.dtype) -> tuple[layouts.Floats, int]:
  """Chooses the layout of floats by the bits that they use.

  Args:
    bits: the bit patterns, unsigned integers `[n]`.
    dtype: dtype of the elements, in `layouts.FORMATS`.

  Returns:
    The layout, without low bits that are zero in all elements; and the highest minimum
    exponent that these allow, 1 if small ones share no step.
  """
  form = layouts.FORMATS[dtype]
  most, unsigned = form.nmant, bits.dtype.type
  mask = unsigned((1 << form.bits - 1) - 1)
  sample = np.concatenate([bits[run] for run in runs(bits.size, _SAMPLE)]) & mask
  exponents = np.maximum(sample[sample > 0] >> most, 1)
  if not exponents.size:
    exponents = np.ones(1)
  # For a normal distribution the mean of log2 |x| is 0.92 less than log2 of the
  # standard deviation, and the exponent is on average 0.5 less than log2.
  scale = int(exponents.mean() + 1.42)
  useless = max(scale - _MOST_BELOW, 1)
  # With a higher one too few symbols would be left for the elements below it. NaN must
  # stay above it.
  least = min(scale + _MOST_ABOVE, (1 << form.nexp) - 2)
  used, lowest = 0, 1 << 30
  for start in range(0, bits.size, _CHUNK):
    magnitude = bits[start : start + _CHUNK] & mask
    magnitude = magnitude[magnitude > 0]
    if not magnitude.size:
      continue
    exponent = magnitude >> most
    significand = magnitude & unsigned((1 << most) - 1)
    significand |= (exponent > 0).astype(bits.dtype) << most
    # A float32 holds a power of two exactly, and its bits tell the exponent.
    lowest_bit = (significand & -significand).astype(np.float32).view(np.int32) >> 23
    exponent = np.maximum(exponent, 1).astype(np.int32)
    lowest = min(lowest, int((exponent + lowest_bit).min()) - 127)
    used |= int(np.bitwise_or.reduce(magnitude))  # type: ignore[call-overload]
    if used & 1 and lowest <= useless:
      break
  if not used:
    return layouts.Floats(dtype, 1), 1
  low = used & ((1 << most - 1) - 1)
  zeros = (low & -low).bit_length() - 1 if low else most - 1
  # All elements are multiples of the step of the minimum exponent `lowest`. Those above
  # the minimum exponent end in so many zeros, so those below must.
  least = min(least, lowest - (zeros if low else most))
  is_raised = least > useless
  raw_bits = max(most - zeros - is_raised, 1)
  return layouts.Floats(dtype, raw_bits, is_raised), least if is_raised else 1
