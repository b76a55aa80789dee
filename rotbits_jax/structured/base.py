"""The base class of structured leaves.

A leaf of a PyTree is an array or a structured leaf. A structured leaf stands for an
array but stores fewer numbers; `structured` gives an overview.
"""

import abc
from collections.abc import Callable, Mapping
import enum
import types
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import fields
from rotbits_jax.structured.fields import Arrays
from rotbits_jax.structured.fields import Settings
from rotbits_jax.system import host


class Origin(enum.Enum):
  """Where the array of a leaf comes from, and when it takes the place of the leaf.

  Attributes:
    SUMMED: The leaf is a parameter of the model. `materialize` sums products in
      float32, so the last bits of the array depend on the machine.
    COPIED: The leaf is a parameter of the model. Each machine computes the same bits.
    FILE: Only files hold the leaf. The reader puts the array in its place, and each
      machine computes the same bits.
    KNOWN: Like `FILE`, but the array is computed from another one that the reader
      knows: an array of a base, a product of such arrays, or a parameter that `needs`
      names.
  """

  SUMMED = enum.auto()
  COPIED = enum.auto()
  FILE = enum.auto()
  KNOWN = enum.auto()

  @property
  def is_in_files(self) -> bool:
    """Whether only files hold such leaves."""
    return self in (Origin.FILE, Origin.KNOWN)


class Structured(abc.ABC):
  """Base class of all structured leaves.

  A subclass is a `flax.struct` dataclass, and `fields` describes its annotations. It is
  unstacked, or its arrays have a leading layer axis `[N, ...]`.

  Most leaves stand for an array alone. Others need further parameters of the model; for
  example, an embedding may be a linear image of the head. `Model.materialize`, the
  forward pass and the file reader look up the parameters that `needs` names.

  Attributes:
    type_name: name of the class in the file format.
    needs: paths of the parameters that `materialize` takes, as in 'head/kernel'.
    origin: where the array comes from, and when it takes the place of the leaf.
    has_factors: whether two factors make the matrix, see `pair`.
    columns_first: whether the checksums of the array and of that of the base are those
      of their transposes.
    config_fields: the field of `ModelConfig` that a setting must equal, by the name of
      the setting. The arrays of a leaf may not tell how many heads there are.
  """

  type_name: ClassVar[str]
  needs: ClassVar[tuple[str, ...]] = ()
  origin: ClassVar[Origin] = Origin.SUMMED
  has_factors: ClassVar[bool] = False
  columns_first: bool = False
  config_fields: ClassVar[Mapping[str, str]] = types.MappingProxyType({})

  # ---- the array that the leaf stands for

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that the leaf stands for."""

  @property
  @abc.abstractmethod
  def dtype(self) -> Any:
    """Dtype of that array."""

  @abc.abstractmethod
  def materialize(self, *needed: Any) -> Any:
    """Returns the array that the leaf stands for.

    `structured.materialize` compiles this method, so its arrays may be tracers.

    Args:
      needed: the arrays that `needs` names.

    Raises:
      ValueError: if the leaf cannot have been made with these arrays.
    """

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """Returns rows of the matrix, in float32.

    Args:
      needed_and_indices: the arrays that `needs` names, then the indices of the rows,
        integers `[...]`.

    Returns:
      The rows, `[..., columns]`. A row beyond the last is NaN.
    """
    *needed, indices = needed_and_indices
    table = jnp.asarray(self.materialize(*needed))
    return table.at[indices].get(mode='fill', fill_value=jnp.nan).astype(jnp.float32)

  def apply(self, x: jax.Array) -> jax.Array:
    """Returns `x @ matrix` for x `[..., rows]`, in the cheapest way and x's dtype."""
    return jnp.matmul(x, self.astype(x.dtype).materialize(), precision='highest')

  def pair(self) -> Any:
    """Returns the matrix as a `LowRank` of two factors; None if there are none."""
    return None

  # ---- stacks

  def layer(self, index: int) -> Self:
    """Returns one layer of a stacked leaf, unstacked."""
    return jax.tree.map(lambda x: x[index], self)

  def check_layer(self, index: int) -> None:  # noqa: B027
    """Checks that nothing of a stacked leaf is lost if a layer is taken out.

    Raises:
      ValueError: if numbers would be, which a training has put where layers are padded.
    """

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

    A leaf whose numbers must not change overrides this method.
    """
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: function(x) if is_float(x) else x, self)

  def rounded(self, function: Callable[[Any], Any]) -> Self:
    """Applies a rounding with a step that depends on the numbers, to each array.

    A leaf whose arrays are parts of one matrix overrides this method, so that all of
    them get one step. The leaf is not stacked.
    """
    return self.map_arrays(function)

  def astype(self, dtype: Any) -> Self:
    """Returns the leaf with its floating-point numbers in another dtype."""
    return self.map_arrays(lambda x: convert(x, dtype))

  # ---- the file

  def stored(self) -> tuple[Settings, Arrays]:
    """Returns the content of an unstacked leaf in the file: settings and arrays."""
    return fields.store(self)

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    """Returns the dtype and the size of each array of `stored`, without computing them.

    The leaf must be unstacked.
    """
    return fields.stored_sizes(self)

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> Self:
    """Makes the unstacked leaf from its content in a file: the inverse of `stored`.

    Raises:
      ValueError: if the settings and arrays do not fit together.
    """
    leaf: Self = fields.load(cls, settings, arrays)
    return leaf

  def check(self) -> None:  # noqa: B027
    """Checks how the fields of an unstacked leaf fit together; `from_stored` calls it.

    Raises:
      ValueError: if they do not.
    """

  def check_needed(self, *shapes: tuple[int, ...]) -> None:  # noqa: B027
    """Checks the shapes of the arrays that the leaf needs.

    Raises:
      ValueError: if `materialize` cannot take arrays of these shapes.
    """

  @classmethod
  def stored_rank(
    cls, settings: Settings, shapes: Mapping[str, tuple[int, ...]]
  ) -> Any:
    """Returns the rank of a leaf in a file, if those in a stack may differ; else None.

    Ranks determine the shapes of a stack. So a process that has some of its layers only
    gives the ranks of all of them to `stack`, as a second argument.
    """
    return None


TYPES: dict[str, type[Structured]] = {}


def register(cls: type[Any]) -> type[Any]:
  """Registers a class of leaves with the file format; a class decorator.

  Raises:
    ValueError: if another class has the same `type_name`.
  """
  if cls.type_name in TYPES:
    raise ValueError(f'a structured leaf of type {cls.type_name!r} exists already')
  TYPES[cls.type_name] = cls
  return cls


def floating(dtype: Any) -> np.dtype:
  """Returns a dtype of floating-point numbers.

  Raises:
    ValueError: if it is another one.
  """
  found = np.dtype(jnp.dtype(dtype))
  if not jnp.issubdtype(found, jnp.floating):
    raise ValueError(f'dtype must be of floating-point numbers, got {found.name}')
  return found


def convert(array: Any, dtype: Any) -> Any:
  """Rounds an array of floating-point numbers to the nearest numbers of a dtype.

  Numbers that are too large for the dtype become infinite. Other arrays do not change.
  """
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over='ignore'):
    return array.astype(dtype, copy=False)


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
  stacked = host.empty((len(arrays), *first.shape), first.dtype)
  return np.stack(arrays, out=stacked)
