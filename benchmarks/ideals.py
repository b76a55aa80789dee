"""What a tensor of floats should take, under two models of its elements.

Nothing here is a format: it says what a format should reach, tensor by tensor. Both
models store the bits of the mantissa that they do not name as they are, and the signs,
if there are two. Counts are free, scales take the entropy of their steps.

Shape letters: R rows, C columns.
"""

from collections.abc import Iterator
import itertools

import ml_dtypes
import numpy as np

from rotbits_jax.coding import tables

_STEPS = 4  # of a scale, for a factor of 2
_BINS = 255  # half octaves that have a symbol; others take all of their bits


def _entropy(symbols: np.ndarray) -> float:
  """Returns the bits of all symbols under their own counts."""
  return float(tables.entropy_bits(np.bincount(symbols.reshape(-1))))


def _scales(halves: np.ndarray, axes: str) -> tuple[np.ndarray, float]:
  """Returns the scale of each element, in quarter octaves, and the bits of scales.

  Args:
    halves: int `[R, C]`, magnitudes in half octaves.
    axes: 'r' if rows have scales, 'c' if columns do.
  """
  logs = halves * 0.5
  total = np.zeros(halves.shape, np.int32)
  bits = 0.0
  if 'r' in axes:
    means = logs.mean(1) - ('c' in axes) * logs.mean()
    rows = np.rint(_STEPS * means).astype(np.int32)
    total = total + rows[:, None]
    bits += _entropy(rows - np.min(rows))
  if 'c' in axes:
    columns = np.rint(_STEPS * logs.mean(0)).astype(np.int32)
    total = total + columns
    bits += _entropy(columns - np.min(columns))
  return total, bits


def _octaves_bits(halves: np.ndarray, axes: str, whole: int) -> float:
  """Returns the bits of half octaves relative to scales; `whole` are of an escape."""
  scale, bits = _scales(halves, axes)
  relative = halves - 2 * (scale // _STEPS)
  bins = relative - int(np.median(relative)) + _BINS // 2
  symbols = np.where((bins < 0) | (bins >= _BINS), _BINS, bins)
  for quarter in range(_STEPS):
    bits += _entropy(symbols[scale % _STEPS == quarter])
  return bits + whole * np.count_nonzero(symbols == _BINS)


def bits(array: np.ndarray) -> float:
  """Returns the bits of an array under the better of both models.

  Args:
    array: floats of 16 or 32 bits, of any shape.

  Returns:
    The bits of exponents by one table, with sign and mantissa raw; or, if these are
    fewer, of half octaves relative to the scales of rows and columns, where rows are
    along all axes but the last one or along the first one.
  """
  mantissa = ml_dtypes.finfo(array.dtype).nmant
  width = 8 * array.itemsize
  unsigned = np.ascontiguousarray(array).view(f'u{array.itemsize}')
  magnitudes = (unsigned & ((1 << width - 1) - 1)).astype(np.uint32)
  signs = array.size * bool((unsigned >> width - 1).any())
  least = _entropy(magnitudes >> mantissa) + mantissa * array.size
  halves = (magnitudes >> mantissa - 1).astype(np.int32)
  shapes = {(-1, array.shape[-1]), (array.shape[0], -1)} if array.ndim else {(1, 1)}
  for shape, axes in itertools.product(shapes, ('', 'r', 'c', 'rc')):
    coded = _octaves_bits(halves.reshape(shape), axes, width)
    least = min(least, coded + (mantissa - 1) * array.size)
  return least + signs


def synthetic() -> Iterator[tuple[str, np.ndarray]]:
  """Yields tensors of many distributions, float64, and their names."""
  rng = np.random.default_rng(0)
  size = (1024, 1024)

  def normal(*shape: int, deviation: float = 0.02) -> np.ndarray:
    return deviation * rng.standard_normal(shape)

  def signs() -> np.ndarray:
    return rng.choice([-1.0, 1.0], size)

  yield 'normal', normal(*size)
  factors = np.exp(normal(1024, 1, deviation=0.4) + normal(1024, deviation=0.4))
  yield 'normal x rows x columns', normal(*size) * factors
  yield 'normal^2', normal(*size) ** 2
  yield 'normal^4', normal(*size) ** 4
  yield 'half of it x 1e-20', normal(*size) * rng.choice([1, 1e-20], size)
  yield 'lognormal, sigma 3', np.exp(normal(*size, deviation=3)) * signs()
  yield 'lognormal, sigma 8', np.exp(normal(*size, deviation=8)) * signs()
  yield 'Cauchy', 0.02 * rng.standard_cauchy(size)
  yield 'columns alternate', normal(*size) * np.where(np.arange(1024) % 2, 1, 1e-3)
  channels = np.exp(normal(512, 1, 1, 1, deviation=1))
  yield 'convolution 3 x 3', normal(512, 512, 3, 3) * channels
  yield 'convolution 64 x 1', normal(512, 64, 64, 1) * channels
