"""Arrays of float32 multiples of one step, as integers and the step."""

import numpy as np

# An integer has 15 bits, and a step 3, so the product has 18 of the 24 of float32.
_MOST_INTEGER, _LOW_BITS = 1 << 15, 0x3F

_LEAST = 1 << 8  # elements of an array whose step is worth its place in a file


def divide(array: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns the integers, int16, and the step of float32 multiples of a step.

  The step is the least magnitude. The result is None if the product would not give
  every element bit for bit.
  """
  if array.dtype != np.float32 or array.size < _LEAST:
    return None
  bits = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
  sample = bits[:: max(bits.size >> 12, 1)]
  if np.bitwise_or.reduce(sample) & _LOW_BITS:  # type: ignore[call-overload]
    return None
  sizes = np.abs(array)
  step = sizes.min(initial=np.inf, where=sizes > 0)
  # Comparisons with NaN are false.
  if not sizes.max() < _MOST_INTEGER * step or np.isinf(step):
    return None
  integers = np.rint(array / step).astype(np.int16)
  products = (integers * step).reshape(-1).view(np.uint32)
  return (integers, np.asarray(step)) if np.array_equal(products, bits) else None
