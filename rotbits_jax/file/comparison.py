"""Comparison of a decoded tensor with the original: by bits, or within its step.

An element x of an array that was rounded to multiples of a step s, without error
feedback, comes back as y with

    |x - y| <= s / 2 + |y| eps / 2

where eps is that of the dtype of y, which is rounded to after the step.
"""

import io
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rotbits_jax import structured
from rotbits_jax.file import prices
from rotbits_jax.file.container import ContainerError
from rotbits_jax.symmetries import steps
from rotbits_jax.system import files
from rotbits_jax.system import schema

_PIECE = 1 << 20  # elements that are compared together
_ROUNDOFF = 2.0**-22  # of the quotient by the step, in float32
_NEXT_STEP = 1.25  # greatest ratio of a step to the next finer one
_MOST_BOUND = 1.25  # of a bound that says something; other arrays differ by more


class Error(schema.Object):
  """The greatest error of a tensor, and the error that its step allows there.

  Both are in units of the tensor's root mean square, see `steps.typical_size`.
  """

  path: str
  error: float
  bound: float


class SameContent(io.RawIOBase):
  """A file that compares what is written to it with another file, piece by piece."""

  def __init__(self, other: files.File):
    self._other = other
    self._offset = 0
    self._is_same = True

  def writable(self) -> bool:
    """Returns True, as files do that are open for writing."""
    return True

  def write(self, data: Any) -> int:
    """Compares the next bytes."""
    content = np.frombuffer(data, np.uint8)
    end = self._offset + content.size
    if self._is_same and end <= self._other.size:
      expected = np.empty(content.size, np.uint8)
      self._other.read(self._offset, expected)
      self._is_same = np.array_equal(content, expected)
    self._offset = end
    return content.size

  def is_whole(self) -> bool:
    """Returns whether what was written is all of the other file."""
    return self._is_same and self._offset == self._other.size


def check_bits(path: str, decoded: Any, original: Any, name: str) -> None:
  """Compares two tensors by shape, dtype and bits.

  Args:
    path: the path of the tensor, for the error.
    decoded: the array or structured leaf in the file.
    original: the array or structured leaf on the other side.
    name: the name of the other side, for the error.

  Raises:
    ContainerError: if they differ; it has the first elements that do.
  """
  if structured.same_bits(decoded, original):
    return
  if not (_can_expand(decoded) and _can_expand(original)):
    raise ContainerError(f'{path}: differs from {name}')
  array = _array(decoded)
  wanted = _array(original)
  _check_type(path, array, wanted, name)
  bits = f'u{array.itemsize}'
  differs = np.atleast_1d(array.view(bits) != wanted.view(bits))
  if not differs.any():  # arrays of one side only are structured
    return
  first = tuple(np.argwhere(differs)[0].tolist())
  raise ContainerError(
    f'{path}: differs from {name}: {int(differs.sum())} of {array.size} elements, the '
    f'first at {list(first)}: {_values(array, wanted, first, name)}'
  )


def step_of(
  leaf: Any, original: np.ndarray, log2_step: float | None
) -> float | np.ndarray | None:
  """Returns the step of a decoded leaf, or of each element; None if it has none.

  A leaf of integers tells it. An array whose integers took too many bits does not, but
  its step follows from the original.

  Args:
    leaf: the decoded leaf.
    original: the array that was rounded.
    log2_step: log2 of the step over the typical size, which the file's options tell;
      None if they tell none.
  """
  if isinstance(leaf, structured.UniformlyQuantized):
    if leaf.row_exponents is None:
      return float(leaf.step)
    ones = np.ones_like(leaf.integers)
    units = leaf.replace(integers=ones, name='float32').materialize()
    return np.asarray(units, np.float64)
  if log2_step is None or not prices.is_rounded(leaf):
    return None
  step = steps.quarter_step(jnp.float32(_size(original)), jnp.float32(log2_step))
  # Another machine may have summed the squares in another order.
  return _NEXT_STEP * float(step)


def check_step(
  path: str, leaf: Any, original: np.ndarray, step: float | np.ndarray, name: str
) -> Error | None:
  """Compares a tensor that was rounded to a step with the original.

  Args:
    path: the path of the tensor, for the error.
    leaf: the decoded array, or its leaf of integers.
    original: the array that was rounded.
    step: the step, or that of each element.
    name: the name of the other side, for the error.

  Returns:
    The greatest error; None if the step is so coarse that it says nothing.

  Raises:
    ContainerError: if shapes or dtypes differ, or an error is beyond its bound.
  """
  array = _array(leaf)
  original = np.asarray(original)
  _check_type(path, array, original, name)
  size = _size(original) or 1.0
  if array.size and float(np.min(step)) / 2 > _MOST_BOUND * size:
    return None
  steps_of = np.broadcast_to(step, array.shape)
  worst = Error(path=path, error=0.0, bound=float(np.max(step)) / 2 / size)
  flat = np.reshape(array, -1), np.reshape(original, -1), np.reshape(steps_of, -1)
  for start in range(0, array.size, _PIECE):
    pieces = [x[start : start + _PIECE] for x in flat]
    errors, bounds = _errors_and_bounds(*pieces)
    place = int(np.argmax(errors - bounds))
    if not errors[place] <= bounds[place]:
      index = tuple(map(int, np.unravel_index(start + place, array.shape)))
      raise ContainerError(
        f'{path}: differs from {name} by more than its step allows: {errors[place]:.3g}'
        f' > {bounds[place]:.3g} at {list(index)}: '
        f'{_values(array, original, index, name)}'
      )
    place = int(np.argmax(errors))
    if errors[place] > worst.error * size:
      found = float(errors[place]) / size, float(bounds[place]) / size
      worst = Error(path=path, error=found[0], bound=found[1])
  return worst


@np.errstate(invalid='ignore', over='ignore')  # of numbers that are not finite
def _errors_and_bounds(
  decoded: np.ndarray, original: np.ndarray, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the errors of elements `[n]` and their bounds; 0, inf if not finite."""
  info = ml_dtypes.finfo(decoded.dtype)
  y = decoded.astype(np.float64)
  x = original.astype(np.float64)
  # The largest multiple stands for a number whose nearest multiple is too large.
  is_largest = np.abs(x) > float(info.max) - step
  bounds = np.where(is_largest, step, step / 2)
  bounds = bounds + np.abs(y) * float(info.eps) / 2 + np.abs(x) * _ROUNDOFF
  bounds = bounds + float(info.smallest_subnormal)
  is_same = (x == y) | (np.isnan(x) & np.isnan(y))
  errors = np.where(is_same, 0.0, np.abs(x - y))
  is_finite = np.isfinite(x) & np.isfinite(y)
  return np.where(is_finite | is_same, errors, np.inf), np.where(is_finite, bounds, 0.0)


def _size(array: np.ndarray) -> float:
  """Returns the typical size of the elements of an array."""
  return float(_typical_size(jnp.asarray(array, jnp.float32)))


_typical_size = jax.jit(steps.typical_size)


def _can_expand(leaf: Any) -> bool:
  """Returns whether a leaf is an array, or becomes one without others."""
  return leaf is not None and not getattr(leaf, 'needs', ())


def _array(leaf: Any) -> np.ndarray:
  """Returns the array that a leaf stands for."""
  return np.asarray(jax.device_get(structured.materialize(leaf)))


def _check_type(path: str, decoded: Any, original: Any, name: str) -> None:
  """Compares shapes and dtypes."""
  types = [f'{x.dtype.name} {list(x.shape)}' for x in (decoded, original)]
  if types[0] != types[1]:
    raise ContainerError(f'{path}: {types[0]} in the file, {types[1]} in {name}')


def _values(
  decoded: np.ndarray, original: np.ndarray, index: tuple[int, ...], name: str
) -> str:
  """Returns an element of both sides in words; its bits where numbers look alike."""
  pair = [np.ravel(x[index] if x.ndim else x) for x in (decoded, original)]
  words = [str(x[0]) for x in pair]
  if words[0] == words[1]:
    words = [f'bits {x.view(f"u{x.itemsize}")[0]:#x}' for x in pair]
  return f'{words[0]} in the file, {words[1]} in {name}'
