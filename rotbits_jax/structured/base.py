"""What a structured leaf is, and PyTrees of them."""

import abc
from collections.abc import Iterable, Mapping
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

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    """Dtype and count of each array that the file keeps of an unstacked leaf.

    Nothing is computed. A leaf that stores fewer numbers than its arrays hold
    overrides it.
    """
    return [(np.dtype(x.dtype), int(np.prod(x.shape))) for x in jax.tree.leaves(self)]

  def stack_key(self) -> tuple[str, ...]:
    """Names that must be equal in leaves that share a stack, beside kind and shape."""
    return ()

  @abc.abstractmethod
  def stored(self) -> tuple[Settings, Arrays]:
    """What the file keeps of an unstacked leaf: settings and arrays."""

  @classmethod
  @abc.abstractmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> Self:
    """The inverse of `stored`."""


class Dependent(Structured):
  """A leaf that stands for an array only together with other parameters.

  An embedding that is an image of the head is one. `Model.materialize`, the forward
  pass and the reader of files look up the parameters that `needs` names.

  Attributes:
    needs: paths of the parameters, as in 'head/kernel'.
    eager: whether a reader puts the array in the leaf's place, because nothing can be
      computed with the leaf itself.
  """

  needs: ClassVar[tuple[str, ...]]
  eager: ClassVar[bool] = False

  @abc.abstractmethod
  def expand(self, *needed: Any) -> Any:
    """The array that the leaf stands for, given the arrays that it needs."""

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """Rows of that array, NaN beyond its last; the indices are the last argument."""
    *needed, indices = needed_and_indices
    table = jnp.asarray(self.expand(*needed))
    return table.at[indices].get(mode='fill', fill_value=jnp.nan).astype(jnp.float32)

  def materialize(self) -> jax.Array:
    raise ValueError(
      f'a leaf of kind {self.kind!r} needs {", ".join(self.needs)} to be materialized'
    )


KINDS: dict[str, type[Structured]] = {}


def register(cls: type[Any]) -> type[Any]:
  """Class decorator: makes a kind of leaf known to the file format."""
  if cls.kind in KINDS:
    raise ValueError(f'a structured leaf of kind {cls.kind!r} exists already')
  KINDS[cls.kind] = cls
  return cls


def nonempty(array: Any) -> Any:
  """Returns the array, or None if it has no entries.

  Leaves hold None in place of an array without entries, because Orbax cannot save such
  an array.
  """
  return array if array.size else None


def or_empty(array: Any, shape: tuple[int, ...], dtype: Any) -> Any:
  """Returns the inverse of `nonempty`: NumPy zeros of the shape in place of None."""
  return np.zeros(shape, dtype) if array is None else array


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
  return sum(size for _, size in _stored_sizes(tree))


def count_bytes(tree: Any) -> int:
  """How many bytes those numbers take, uncoded."""
  return sum(dtype.itemsize * size for dtype, size in _stored_sizes(tree))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of nested dicts by path: keys joined by '/'.

  This is the one way in which the package names a parameter.

  Raises:
    ValueError: if a key is no string, is empty or has a slash in it.
  """
  found: dict[str, Any] = {}
  for key, value in tree.items():
    if not isinstance(key, str) or not key or '/' in key:
      raise ValueError(f'{key!r}: keys must be strings without a slash')
    if isinstance(value, Mapping):
      found |= {f'{key}/{path}': leaf for path, leaf in flatten(value).items()}
    else:
      found[key] = value
  return found


def unflatten(flat: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """The inverse of `flatten`.

  Raises:
    ValueError: if one path leads through another's leaf.
  """
  tree: dict[str, Any] = {}
  for path, leaf in flat.items() if isinstance(flat, Mapping) else flat:
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise ValueError(f'{path}: a leaf has this path or a part of it')
    if last in node:
      raise ValueError(f'{path}: two leaves have this path')
    node[last] = leaf
  return tree


def stack_key(leaf: Any) -> tuple[Any, ...]:
  """Equal for leaves that can share a stack: kind, shape, dtype, and their names."""
  kind, names = '', ()
  if is_structured(leaf):
    kind, names = leaf.kind, leaf.stack_key()
  return kind, tuple(leaf.shape), np.dtype(leaf.dtype).name, tuple(names)


def _stack(*arrays: Any) -> Any:
  return (np if isinstance(arrays[0], np.ndarray) else jnp).stack(arrays)


def _astype(array: Any, dtype: Any) -> Any:
  """Rounds to nearest; what is too large becomes infinite."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over='ignore'):
    return array.astype(dtype)


def _stored_sizes(tree: Any) -> list[tuple[np.dtype, int]]:
  sizes: list[tuple[np.dtype, int]] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_structured):
    if is_structured(leaf):
      sizes += leaf.stored_sizes()
    else:
      sizes.append((np.dtype(leaf.dtype), int(np.prod(leaf.shape))))
  return sizes
