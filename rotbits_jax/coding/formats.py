"""The choice of the layouts of floats, by the bits that they use."""

import numpy as np

from rotbits_jax.coding import layouts

# A minimum exponent that is further below the scale saves less than 0.03 bits.
_MOST_BELOW = 6
_MOST_ABOVE = 2

_CHUNK = 1 << 16  # elements that are looked at at once, so that they fit the cache
_RUNS, _RUN = 4, 1 << 13  # of elements, of which a sample consists


def of_floats(bits: np.ndarray, dtype: np.dtype) -> tuple[layouts.Floats, int]:
  """Chooses the layout of floats by the bits that they use.

  Args:
    bits: the bit patterns, unsigned integers `[n]`.
    dtype: dtype of the elements, in `layouts.FORMATS`.

  Returns:
    The layout, without low bits that are zero in all elements; and the highest minimum
    exponent that these allow, 1 if small ones share no step.
  """
  # With more elements fewer low bits are zero in all, and the steps are only finer.
  if bits.size > _RUNS * _RUN:
    starts = np.linspace(0, bits.size - _RUN, _RUNS).astype(int)
    sample = np.concatenate([bits[start : start + _RUN] for start in starts])
    layout, min_exponent = _layout(sample, dtype)
    if layout == layouts.Floats(dtype, layout.format.nmant):
      return layout, min_exponent
  return _layout(bits, dtype)


def _layout(bits: np.ndarray, dtype: np.dtype) -> tuple[layouts.Floats, int]:
  """Returns the layout of elements by looking at all of them."""
  form = layouts.FORMATS[dtype]
  most = form.nmant
  exponents, count, lowest = 0, 0, 1 << 30
  for start in range(0, bits.size, _CHUNK):
    part = bits[start : start + _CHUNK]
    magnitude = part & part.dtype.type((1 << form.bits - 1) - 1)
    magnitude = magnitude[magnitude > 0]
    if not magnitude.size:
      continue
    exponent = np.maximum(magnitude >> most, 1).astype(np.int32)
    significand = magnitude & magnitude.dtype.type((1 << most) - 1)
    significand |= (magnitude >> most > 0).astype(part.dtype) << most
    # A float32 holds a power of two exactly, and its bits tell the exponent.
    lowest_bit = (significand & -significand).astype(np.float32).view(np.int32) >> 23
    lowest = min(lowest, int((exponent + lowest_bit).min()) - 127)
    exponents += int(exponent.sum())
    count += magnitude.size
  if not count:
    return layouts.Floats(dtype, 1), 1
  # For a normal distribution the mean of log2 |x| is 0.92 less than log2 of the
  # standard deviation, and the exponent is on average 0.5 less than log2.
  scale = int(exponents / count + 1.42)
  # Of the raw bits, the highest one is the sign.
  used = int(np.bitwise_or.reduce(bits))  # type: ignore[call-overload]
  low = used & ((1 << most - 1) - 1)
  zeros = (low & -low).bit_length() - 1 if low else most - 1
  # All elements are multiples of the step of the minimum exponent `lowest`. Those above
  # the minimum exponent end in so many zeros, so those below must.
  least = lowest - (zeros if low else most)
  # With a higher one too few symbols would be left for the elements below it.
  least = min(least, scale + _MOST_ABOVE)
  least = min(least, (1 << form.nexp) - 2)  # NaN must stay above it
  least = least if least > max(scale - _MOST_BELOW, 1) else 1
  return layouts.Floats(dtype, most - zeros, least > 1), least
