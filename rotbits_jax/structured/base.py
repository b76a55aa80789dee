"""What a structured leaf is, and PyTrees of them."""

import abc
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

Settings = dict[str, Any]  # JSON values
Arrays = dict[str, np.ndarray]


class Structured(abc.ABC):
  """What every structured leaf can do."""

  kind: ClassVar[str]

  @property
  @abc.abstractmethod
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that the leaf stands for."""

  @property
  @abc.abstractmethod
  def dtype(self) -> Any:
    """Dtype of that array."""

  @abc.abstractmethod
  def materialize(self) -> jax.Array:
    """The array that the leaf stands for."""

  def layer(self, index: int) -> Self:
    """One layer of a stacked leaf."""
    return jax.tree.map(lambda x: x[index], self)

  @classmethod
  def stack(cls, leaves: list[Self]) -> Self:
    """The inverse of `layer`, for leaves of one kind, shape and dtype."""
    return jax.tree.map(_stack, *leaves)

  def astype(self, dtype: Any) -> Self:
    """The leaf with its floating-point numbers in another format.

    A leaf whose numbers must keep the format that they are in overrides it.
    """
    return jax.tree.map(lambda x: _astype(x, dtype), self)

  @abc.abstractmethod
  def stored(self) -> tuple[Settings, Arrays]:
    """What the file keeps of an unstacked leaf: settings and arrays."""

  @classmethod
  @abc.abstractmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> Self:
    """The inverse of `stored`."""


KINDS: dict[str, type[Structured]] = {}


def register(cls: type[Any]) -> type[Any]:
  """Class decorator: makes a kind of leaf known to the file format."""
  if cls.kind in KINDS:
    raise ValueError(f'a structured leaf of kind {cls.kind!r} exists already')
  KINDS[cls.kind] = cls
  return cls


def is_structured(leaf: Any) -> bool:
  return isinstance(leaf, Structured)


def is_plain(leaf: Any) -> bool:
  """Whether a leaf is an array of floating-point numbers."""
  if leaf is None or is_structured(leaf):
    return False
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def materialize(tree: Any) -> Any:
  """The PyTree with every structured leaf replaced by the array it stands for."""
  return jax.tree.map(
    lambda x: x.materialize() if is_structured(x) else x, tree, is_leaf=is_structured
  )


def astype(tree: Any, dtype: Any) -> Any:
  """The PyTree with all floating-point numbers in another format."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if is_structured(x) else _astype(x, dtype),
    tree,
    is_leaf=is_structured,
  )


def count_numbers(tree: Any) -> int:
  """How many numbers a PyTree of unstacked leaves stores."""
  return sum(a.size for a in _stored_arrays(tree))


def count_bytes(tree: Any) -> int:
  """How many bytes those numbers take, uncoded."""
  return sum(a.nbytes for a in _stored_arrays(tree))


def _stack(*arrays: Any) -> Any:
  return (np if isinstance(arrays[0], np.ndarray) else jnp).stack(arrays)


def _astype(array: Any, dtype: Any) -> Any:
  """Rounds to nearest; what is too large becomes infinite."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over='ignore'):
    return array.astype(dtype)


def _stored_arrays(tree: Any) -> list[Any]:
  arrays: list[Any] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_structured):
    arrays.extend(leaf.stored()[1].values() if is_structured(leaf) else [leaf])
  return arrays
