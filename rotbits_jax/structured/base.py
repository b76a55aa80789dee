"""The base class of structured leaves.

`structured` gives an overview. What does not fit raises a ValueError.
"""

import abc
from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import fields
from rotbits_jax.system import host


class Structured(abc.ABC):
  """Base class of all structured leaves.

  A subclass is a frozen dataclass, and `fields` describes its annotations.

  Attributes:
    type_name: name of the class in the file format.
    needs: paths of the parameters that `materialize` takes, as in 'head/kernel'.
    is_exact: whether each machine computes the same bits of the array. Else sums of
      products in float32 depend on the machine.
    is_in_files: whether only files hold the leaf. The reader puts the array in its
      place, which each machine computes alike.
  """

  type_name: ClassVar[str]
  needs: ClassVar[tuple[str, ...]] = ()
  is_exact: ClassVar[bool] = False
  is_in_files: ClassVar[bool] = False

  def replace(self, **fields: Any) -> Self:
    """Returns a copy with other values of these fields."""
    return dataclasses.replace(self, **fields)  # type: ignore[type-var]

  # ---- the array that the leaf stands for

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that the leaf stands for."""

  @property
  def dtype(self) -> Any:
    """Dtype of that array: by default, that of the first stored array."""
    return next(fields.arrays_of(self))[2].dtype

  @abc.abstractmethod
  def materialize(self, *needed: Any) -> Any:
    """Returns the array that the leaf stands for, given the arrays that it `needs`.

    `structured.materialize` compiles this method, so its arrays may be tracers.
    """

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """Returns rows of the matrix, float32 `[..., columns]`; one beyond the last is NaN.

    It takes the arrays that `needs` names, then the indices of rows, integers `[...]`.
    """
    *needed, indices = needed_and_indices
    table = jnp.asarray(self.materialize(*needed))
    return table.at[indices].get(mode='fill', fill_value=jnp.nan).astype(jnp.float32)

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns `x @ matrix` for x `[..., rows]`, in the cheapest way and x's dtype."""
    return jnp.matmul(x, self.astype(x.dtype).materialize(), precision='highest')

  # ---- stacks

  def layer(self, index: int) -> Self:
    """Returns one layer of a stacked leaf, unstacked."""
    return jax.tree.map(lambda x: x[index], self)

  @classmethod
  def stack(cls, leaves: list[Self]) -> Self:
    """Stacks unstacked leaves with equal `structured.stack_key`: inverse of `layer`."""
    return jax.tree.map(_stack, *leaves)

  def stack_key(self) -> tuple[str, ...]:
    """Returns further names that must be equal in leaves that share a stack.

    Type, shape and dtype must be equal, too; see the function `stack_key`.
    """
    return ()

  # ---- the numbers

  def map_arrays(self, function: Callable[[Any], Any]) -> Self:
    """Applies a function to each array of floating-point numbers, such as a rounding.

    A leaf that is in files only does not change, because it stands for given bits.
    """
    if self.is_in_files:
      return self
    return jax.tree.map(lambda x: function(x) if _is_float(x) else x, self)

  def rounded(self, function: Callable[[Any], Any]) -> Self:
    """Applies a rounding whose step depends on the numbers, to an unstacked leaf.

    A leaf whose arrays are parts of one matrix overrides it, so they get one step.
    """
    return self.map_arrays(function)

  def astype(self, dtype: Any) -> Self:
    """Returns the leaf with its floating-point numbers in another dtype."""
    return self.map_arrays(lambda x: convert(x, dtype))

  # ---- the file

  stored = fields.store
  stored_sizes = fields.stored_sizes
  from_stored = classmethod(fields.load)

  def check(self) -> None:  # noqa: B027
    """Checks how the fields of an unstacked leaf fit together; `from_stored` calls it.

    Axes of one letter are equal already, see `fields`.
    """

  def check_needed(self, *shapes: tuple[int, ...]) -> None:  # noqa: B027
    """Checks that `materialize` can take arrays of these shapes."""


TYPES: dict[str, type[Structured]] = {}


def register(cls: type[Any]) -> type[Any]:
  """Registers a frozen dataclass of leaves with the file format, and with JAX."""
  if cls.type_name in TYPES:
    raise ValueError(f'a structured leaf of type {cls.type_name!r} exists already')
  TYPES[cls.type_name] = jax.tree_util.register_dataclass(cls)
  return cls


def floating(dtype: Any) -> np.dtype:
  """Returns a dtype, which must be of floating-point numbers."""
  dtype = np.dtype(jnp.dtype(dtype))
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'dtype must be of floating-point numbers, got {dtype.name}')
  return dtype


def convert(array: Any, dtype: Any) -> Any:
  """Rounds an array of floating-point numbers to a dtype, or to infinity.

  Other arrays do not change.
  """
  if not _is_float(array):
    return array
  with np.errstate(over='ignore', invalid='ignore'):  # of a signalling NaN
    return array.astype(dtype, copy=False)


def _is_float(array: Any) -> bool:
  return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _stack(*arrays: Any) -> Any:
  """Stacks arrays; makes no copy if they are the rows of an array already."""
  first = arrays[0]
  if not isinstance(first, np.ndarray):
    return jnp.stack(arrays)
  address = lambda x: x.__array_interface__['data'][0]
  if first.base is not None and all(
    x.base is first.base
    and (x.shape, x.dtype, x.strides) == (first.shape, first.dtype, first.strides)
    and x.flags.c_contiguous
    and address(x) == address(first) + i * first.nbytes
    for i, x in enumerate(arrays)
  ):
    strides = first.nbytes, *first.strides
    return np.lib.stride_tricks.as_strided(first, (len(arrays), *first.shape), strides)
  dtypes = {x.dtype for x in arrays}
  dtype = first.dtype if len(dtypes) == 1 else jnp.result_type(*dtypes)
  stacked = host.empty((len(arrays), *first.shape), dtype)
  return np.stack(arrays, out=stacked)
