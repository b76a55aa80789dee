r"""Bases of the subspaces of a sliced model, and products of them with its dense base.

SliceGPT makes every tensor of a sliced model from one of the dense model and from bases
V_s `[D, d]` of subspaces, whose columns are orthonormal; see `slicing`:

    reads      V_s^T diag(scale) kernel        a kernel that reads segment s
    writes     centred(kernel) V_s             a kernel or bias that writes it, a table
    shortcut   V_s^T V_{s+1}
    bias       bias + offset @ kernel          of a linear layer that reads a LayerNorm

So beside the dense model it is enough to store the bases. Two leaves stand for one:

* `Basis`: its numbers, multiples of a step.
* `Subspace`: d (D - d) numbers that tell the subspace alone. The basis is the one of
  which d rows J are a symmetric matrix M with eigenvalues of at least 0. With the other
  rows S, it is a Cayley transform of a matrix A `[D - d, d]`, whose singular values are
  at most 1:

      S = 2 (I + A A^T)^-1 A,    M = I - A^T S

Products must have the same bits on every machine. Therefore all of them, and the steps
of Newton's iteration for the inverse, are sums of integers, which float64 adds exactly
in any order, see `exact`. Numbers of bases are multiples of 2^-25. Vectors of the
dense model are rounded to integers of so many bits that their norms are below 2^26.

Shape letters: D hidden size, d width of a segment, n any other length.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from flax import struct
import numpy as np

from rotbits_jax.structured import exact
from rotbits_jax.structured.base import Origin
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import static
from rotbits_jax.system import schema

Kind = Literal['reads', 'writes', 'shortcut', 'bias']

UNIT = 25
"""The numbers of bases are multiples of 2^-UNIT."""

_ONE = 1 << UNIT
_LEAST_BOUND = 1 << 10  # of the rows S, whatever the width
_NEWTON = 5  # steps, after which 3^-32 of the first error is left
_BLOCK = 1 << 22  # numbers of a tensor that are taken together

Step = Annotated[int, schema.between(1, _ONE)]


class _OfSubspace(Structured):
  """A basis `[D, d]` in units of 2^-UNIT, which readers need to compute tensors."""

  origin: ClassVar[Origin] = Origin.FILE
  step: int

  @property
  def dtype(self) -> Any:
    return np.dtype(np.int32)


@register
@struct.dataclass
class Basis(_OfSubspace):
  """A basis as it is.

  Attributes:
    numbers: int32 `[D, d]`, in units of `step`.
    step: in units of 2^-25.
  """

  type_name: ClassVar[str] = 'basis'

  numbers: Annotated[Any, Array('Dd', np.int32)]
  step: Step = static()

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.numbers.shape)

  def materialize(self, *needed: Any) -> np.ndarray:
    return _int32(self.numbers.astype(np.float64) * self.step)


@register
@struct.dataclass
class Subspace(_OfSubspace):
  """A subspace, see above.

  Attributes:
    tangent: int32 `[D - d, d]`, the matrix A in units of `step`.
    mask: uint8 `[ceil(D / 8)]`, a bit for each row, low bits first: whether it is in J.
    step: in units of 2^-25.
  """

  type_name: ClassVar[str] = 'subspace'

  tangent: Annotated[Any, Array('ad', np.int32)]
  mask: Annotated[Any, Array('m', np.uint8)]
  step: Step = static()

  @classmethod
  def of(cls, tangent: np.ndarray, rows: np.ndarray, step: int) -> 'Subspace':
    """Makes the leaf.

    Args:
      tangent: the matrix A, float64.
      rows: bool `[D]`, whether a row is in J.
      step: the step to which A is rounded, in units of 2^-25.
    """
    numbers = _int32(np.rint(tangent * (_ONE / step)))
    return cls(numbers, np.packbits(rows, bitorder='little'), step)

  @property
  def shape(self) -> tuple[int, ...]:
    others, width = self.tangent.shape
    return others + width, width

  def materialize(self, *needed: Any) -> np.ndarray:
    tangent = self.tangent.astype(np.float64) * self.step
    others, width = tangent.shape
    inverse = _inverse(_scaled(exact.product(tangent, tangent.T)) + _identity(others))
    lower = 2 * _scaled(exact.product(inverse, tangent))
    found = np.empty(self.shape, np.int32)
    upper = _identity(width) - _scaled(exact.product(tangent.T, lower))
    is_upper = self._is_upper()
    found[is_upper], found[~is_upper] = _int32(upper), _int32(lower)
    return found

  def _is_upper(self) -> np.ndarray:
    bits = np.unpackbits(self.mask, count=self.shape[0], bitorder='little')
    return bits.astype(bool)

  def check(self) -> None:
    size, width = self.shape
    if self.mask.size != -(-size // 8) or self._is_upper().sum() != width:
      raise ValueError(f'a basis of {self.shape} must have {width} rows of M')
    if is_narrow(self.shape):
      raise ValueError(f'a basis of {self.shape} is too narrow to be a subspace')


def is_narrow(shape: tuple[int, ...]) -> bool:
  """Returns whether a basis `[D, d]` is stored by its numbers only.

  A subspace takes the inverse of a matrix `[D - d, D - d]`, which few numbers of a
  hostile file could make huge.
  """
  size, width = shape
  return size - width > max(16 * width, _LEAST_BOUND)


def _identity(size: int) -> np.ndarray:
  return _ONE * np.eye(size)


def _scaled(product: np.ndarray) -> np.ndarray:
  """Returns a product of two matrices in units of 2^-UNIT in these units again."""
  return np.rint(product / _ONE)


def _inverse(matrix: np.ndarray) -> np.ndarray:
  """Returns the inverse of a matrix with eigenvalues from 1 to 2, by Newton's steps."""
  identity = _identity(len(matrix))
  found = np.rint(identity * (2 / 3))
  for _ in range(_NEWTON):
    found = _scaled(
      exact.product(found, 2 * identity - _scaled(exact.product(matrix, found)))
    )
  return found


def _int32(numbers: np.ndarray) -> np.ndarray:
  if not np.abs(numbers).max(initial=0) < 2.0**31:
    raise ValueError('the numbers of a basis are too large')
  return numbers.astype(np.int32)


# ---- products ------------------------------------------------------------------------


class Way(NamedTuple):
  """How a tensor of a sliced model is made of tensors of its base.

  Attributes:
    kind: see above.
    transposed: whether the kernel is the transpose of the tensor of the base, which is
      the embedding of a model with a tied head.
    centred: whether the mean is subtracted from each row of the tensor of 'writes'.
    rounded: whether tensors of the base are rounded to the dtype, and again after they
      are scaled or centred. SliceGPT does so.
  """

  kind: Kind
  transposed: bool = False
  centred: bool = False
  rounded: bool = False


def fused(
  way: Way, arrays: Sequence[np.ndarray], dtype: np.dtype, block: slice
) -> np.ndarray:
  """Returns vectors that a basis is multiplied with, float64 `[n, D]`.

  Args:
    way: its kind is 'reads' or 'writes'.
    arrays: 'reads' takes the kernel `[D, n]` and the scale `[D]` of its norm; 'writes'
      takes the kernel or table `[n, D]`, or the bias `[D]`.
    dtype: dtype of the tensor of the sliced model.
    block: which of the n vectors.
  """
  array = np.atleast_2d(arrays[0])
  across = way.kind == 'reads' and not way.transposed
  rows = _rounded(array[:, block].T if across else array[block], way, dtype)
  if way.kind == 'reads':
    return _rounded(rows * _rounded(arrays[1], way, dtype), way, dtype)
  if not way.centred:
    return rows
  # A sum of integers, because a mean of floats may depend on the machine.
  bits = 52 - (rows.shape[1] - 1).bit_length()
  powers = _powers(rows, bits)[:, None]
  integers = np.rint(np.ldexp(rows, powers))
  means = integers.sum(axis=1, keepdims=True) / rows.shape[1]
  return _rounded(np.ldexp(integers - means, -powers), way, dtype)


def blocks(way: Way, arrays: Sequence[np.ndarray]) -> list[slice]:
  """Returns the blocks in which `fused` gives its vectors, so that few are wide."""
  shape = np.atleast_2d(arrays[0]).shape
  across = way.kind == 'reads' and not way.transposed
  count, width = shape[::-1] if across else shape
  step = max(_BLOCK // max(width, 1), 1)
  return [slice(i, i + step) for i in range(0, count, step)]


def tensor(
  way: Way,
  arrays: Sequence[np.ndarray],
  bases: Sequence[np.ndarray | None],
  shape: tuple[int, ...],
  dtype: np.dtype,
) -> np.ndarray:
  """Returns a tensor of a sliced model, the same on every machine.

  Args:
    way: how it is made.
    arrays: the tensors of the base: see `fused`; none for 'shortcut'; for 'bias' the
      kernel `[D, n]`, the offset `[D]` of the norm, and the bias `[n]` if there is one.
    bases: int32 `[D, d]` in units of 2^-25: one; two for 'shortcut'; none for 'bias'.
      None stands for the identity `[D, D]`.
    shape: shape of the tensor.
    dtype: its dtype. Numbers are rounded to float32 first.

  Raises:
    ValueError: if the arrays do not fit together, or if numbers are not finite.
  """
  try:
    if way.kind == 'shortcut':
      first, last = bases
      made = _shortcut(first, last, shape[0])
    elif way.kind == 'bias':
      made = _bias(way, arrays, dtype)
    else:
      (basis,) = bases
      rows = (fused(way, arrays, dtype, block) for block in blocks(way, arrays))
      made = np.concatenate([exact.rounded(_times(x, basis), dtype) for x in rows])
  except (IndexError, MemoryError) as error:
    raise ValueError(f'a product of these tensors cannot be made: {error}') from error
  if way.kind == 'reads':
    made = np.ascontiguousarray(made.T)
  elif way.kind == 'writes' and arrays[0].ndim == 1:
    made = made[0]
  if made.shape != shape:
    raise ValueError(f'a product must have the shape {shape}, got {made.shape}')
  return exact.rounded(made, dtype)


def _shortcut(
  first: np.ndarray | None, last: np.ndarray | None, size: int
) -> np.ndarray:
  """Returns the product of two bases."""
  if first is None and last is None:
    return np.eye(size)
  if first is None or last is None:
    only = last if first is None else first.T
    return np.ldexp(np.ascontiguousarray(only, np.float64), -UNIT)
  product = exact.product(first.T.astype(np.float64), last.astype(np.float64))
  return np.ldexp(product, -2 * UNIT)


def _bias(way: Way, arrays: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
  """Returns the bias of a linear layer that reads a LayerNorm."""
  kernel, offset, *biases = arrays
  offset = _rounded(offset, way, dtype)
  powers = _powers(offset[None], integer_bits(offset.size))
  integers = np.rint(np.ldexp(offset, powers))[:, None]
  columns = kernel if way.transposed else kernel.T
  found = [
    np.ldexp(_times(_rounded(columns[block], way, dtype), integers, 0), -powers)[:, 0]
    for block in blocks(way._replace(kind='reads'), arrays)
  ]
  total: np.ndarray = sum(
    (_rounded(x, way, dtype) for x in biases), np.concatenate(found)
  )
  return total


def _times(rows: np.ndarray, basis: np.ndarray | None, unit: int = UNIT) -> np.ndarray:
  """Returns `rows @ basis` for a basis in units of 2^-unit, float64 `[n, d]`."""
  if basis is None:
    return rows
  if rows.shape[1] != len(basis):
    raise ValueError(f'a basis of {basis.shape} cannot take rows of {rows.shape[1]}')
  powers = _powers(rows, integer_bits(rows.shape[1]))[:, None]
  integers = np.rint(np.ldexp(rows, powers))
  return np.ldexp(exact.product(integers, basis.astype(np.float64)), -powers - unit)


def integer_bits(size: int) -> int:
  """Returns the bits of integers for which the norm of so many is at most 2^26."""
  return 26 - (size.bit_length() + 1) // 2


def _powers(rows: np.ndarray, bits: int) -> np.ndarray:
  """Returns by which powers of two rows become integers of so many bits, int32 `[n]`.

  Raises:
    ValueError: if a number is not finite.
  """
  most = np.abs(rows).max(axis=1, initial=0)
  if not np.isfinite(most).all():
    raise ValueError('a tensor of the base has numbers that are not finite')
  return bits - np.frexp(most)[1].astype(np.int32)


def _rounded(array: np.ndarray, way: Way, dtype: np.dtype) -> np.ndarray:
  """Returns an array in float64, rounded to a dtype if that is the way."""
  numbers = exact.rounded(array, dtype) if way.rounded else np.asarray(array)
  return numbers.astype(np.float64)
