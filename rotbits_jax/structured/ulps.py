"""The bits of floats as integers: exponents, shared steps, and differences in ULPs.

Functions that programs of the coder call take `xp`, JAX or NumPy.
"""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

FORMATS = {
  np.dtype(getattr(ml_dtypes, x, x)): ml_dtypes.finfo(x)
  for x in ('float16', 'bfloat16', 'float32', 'float8_e4m3fn', 'float8_e5m2')
}
"""The dtypes of floats, with the bits of their exponents and mantissas."""

_OCTAVES = 4  # below a known float, beyond which floats rarely occur


def bits_of(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array in C order, `[n]`."""
  return np.ascontiguousarray(array).reshape(-1).view(f'i{array.dtype.itemsize}')


def is_finite(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns whether the bits of floats are those of finite numbers."""
  infinite = np.array(np.inf, dtype).view(bits.dtype)
  return bits & np.iinfo(bits.dtype).max < infinite


def exponents(bits: Any, dtype: np.dtype, xp: Any = jnp) -> Any:
  """Returns the exponents in the bits of floats, at least 1; 0 for other numbers."""
  if dtype not in FORMATS:
    return xp.zeros_like(bits)
  magnitudes = bits & bits.dtype.type((1 << 8 * dtype.itemsize - 1) - 1)
  return xp.maximum(magnitudes >> FORMATS[dtype].nmant, bits.dtype.type(1))


def raised(bits: Any, form: ml_dtypes.finfo, min_exponent: Any, xp: Any = jnp) -> Any:
  """Replaces the magnitudes in bit patterns by those of a minimum exponent.

  Numbers with a lower exponent must be multiples of its step. The minimum exponent 1
  changes nothing.
  """
  unsigned, top = bits.dtype.type, form.nmant
  magnitude = bits & unsigned((1 << form.bits - 1) - 1)
  least = xp.asarray(min_exponent).astype(bits.dtype)
  exponent = xp.maximum(magnitude >> top, unsigned(1))
  shift = xp.where(exponent < least, least - exponent, unsigned(0))
  leading = (magnitude >> top > 0).astype(bits.dtype) << top
  significand = magnitude & unsigned((1 << top) - 1) | leading
  steps = significand >> xp.minimum(shift, unsigned(form.bits - 1))
  return bits - magnitude | xp.where(
    shift > 0, steps, magnitude - (least - unsigned(1) << top)
  )


def lowered(
  magnitude: Any, form: ml_dtypes.finfo, min_exponent: Any, xp: Any = jnp
) -> Any:
  """Restores magnitudes, uint32: the inverse of `raised`."""
  top, width = form.nmant, form.bits
  least = xp.asarray(min_exponent).astype(np.int32)
  # A float32 holds an integer below 2^24 exactly, and its bits tell the exponent.
  wide = magnitude.astype(np.float32).view(np.int32)
  below = least - np.int32(127 + top)
  normal = ((wide >> (23 - top)) + (below << top)).view(np.uint32)
  shift = xp.minimum(xp.maximum(least, 1) - 1, width - 1)
  subnormal = magnitude << shift.astype(np.uint32)
  small = xp.where((wide >> 23) + below >= 1, normal, subnormal)
  small = xp.where(magnitude > 0, small, np.uint32(0))
  large = magnitude + ((least - 1) << top).astype(np.uint32)
  return xp.where(magnitude >> top > 0, large, small) & np.uint32((1 << width - 1) - 1)


def differences(numbers: Any, known: Any, dtype: np.dtype, xp: Any = jnp) -> Any:
  """Returns the differences of numbers from known ones, int32; both are uint32.

  Those of floats are in ULPs and count away from 0, as far as the known ones go. The
  floats around 0, which are many and rarely occur, are the last ones.
  """
  width = 8 * dtype.itemsize
  if dtype.kind == 'i':
    return _signed(numbers - known, width)
  sign, magnitude, least, half = _places(known, dtype)
  place = _signed(_flipped(numbers ^ sign, width), width)
  gap = xp.where(place < -least, 2 * least, least + half)
  place = place - magnitude + xp.where(place >= least, np.int32(0), gap)
  return _signed(place.view(np.uint32), width)


def moved(known: Any, difference: Any, dtype: np.dtype, xp: Any = jnp) -> Any:
  """Returns the bits of numbers that differ so much from known ones: all uint32."""
  if dtype.kind == 'i':
    return known + difference
  sign, magnitude, least, half = _places(known, dtype)
  place = _signed(difference + magnitude.view(np.uint32), 8 * dtype.itemsize)
  gap = xp.where(place < half + 2 * least, least + half, 2 * least)
  place = place - xp.where(place >= least, np.int32(0), gap)
  return _flipped(place.view(np.uint32), 8 * dtype.itemsize) ^ sign


def _places(known: Any, dtype: np.dtype) -> tuple[Any, Any, Any, np.int32]:
  """Returns the signs of known floats, uint32, and their magnitudes and the least ones
  near them, int32; and the least number.
  """
  most = np.uint32((1 << 8 * dtype.itemsize - 1) - 1)
  magnitude = (known & most).view(np.int32)
  least = magnitude - magnitude.clip(max=_OCTAVES << FORMATS[dtype].nmant)
  return known & ~most, magnitude, least, (~most).view(np.int32)


def _signed(numbers: Any, width: int) -> Any:
  """Returns numbers, uint32 with any bits above their width, as int32."""
  return (numbers << 32 - width).view(np.int32) >> 32 - width


def _flipped(numbers: Any, width: int) -> Any:
  """Returns numbers, all bits but the sign of negative ones flipped."""
  negative = (_signed(numbers, width) >> 31).view(np.uint32)
  return numbers ^ negative & np.uint32((1 << width - 1) - 1)
