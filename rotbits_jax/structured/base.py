"""The base classes of structured leaves, and functions of PyTrees that contain them.

A leaf of a PyTree is an array or a structured leaf. A structured leaf stands for an
array but stores fewer numbers; `structured` gives an overview. A dependent leaf is a
structured leaf that stands for an array only together with other parameters.
"""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.system import host

Settings = dict[str, Any]  # JSON values
Arrays = dict[str, np.ndarray]


class Structured(abc.ABC):
  """Base class of all structured leaves.

  A leaf is stacked if its arrays have a leading layer axis `[N, ...]`.

  Attributes:
    kind: name of the class in the file format.
    expands_on_reading: whether the file reader puts the array in the place of the leaf.
      Such a leaf is materialized on the host.
  """

  kind: ClassVar[str]
  needs: ClassVar[tuple[str, ...]] = ()
  expands_on_reading: ClassVar[bool] = False
  expands_on_writing: ClassVar[bool] = False
  config_fields: ClassVar[Mapping[str, str]] = {}

  @property
  def type_name(self) -> str:
    return self.kind

  @classmethod
  def stored_factored(cls, settings: Settings, shapes: Any) -> Any:
    return None

  @property
  def factored(self) -> Any:
    return None

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
    """Returns the array that the leaf stands for.

    `structured.materialize` compiles this method, so its arrays may be tracers.
    """

  def layer(self, index: int) -> Self:
    """Returns one layer of a stacked leaf, unstacked."""
    return jax.tree.map(lambda x: x[index], self)

  @classmethod
  def stack(cls, leaves: list[Self]) -> Self:
    """Stacks unstacked leaves with equal `structured.stack_key`: inverse of `layer`."""
    return jax.tree.map(_stack, *leaves)

  def map_numbers(self, function: Callable[[Any], Any]) -> Self:
    """Applies a function to each array of floating-point numbers, such as a rounding.

    A leaf whose numbers must stay as they are overrides this method.
    """
    return jax.tree.map(lambda x: function(x) if is_plain(x) else x, self)

  def astype(self, dtype: Any) -> Self:
    """Returns the leaf with its floating-point numbers in another dtype."""
    return self.map_numbers(lambda x: _astype(x, dtype))

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    """Returns the dtype and the size of each array of `stored`, without computing them.

    The leaf must be unstacked. A leaf whose arrays have more numbers than it stores
    overrides this method.
    """
    return [(np.dtype(x.dtype), int(np.prod(x.shape))) for x in jax.tree.leaves(self)]

  def stack_key(self) -> tuple[str, ...]:
    """Returns further names that must be equal in leaves that share a stack.

    Kind, shape and dtype must be equal, too; see the function `stack_key`.
    """
    return ()

  @abc.abstractmethod
  def stored(self) -> tuple[Settings, Arrays]:
    """Returns the content of an unstacked leaf in the file: settings and arrays."""

  @classmethod
  @abc.abstractmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> Self:
    """Makes the unstacked leaf from its content in a file: the inverse of `stored`.

    Raises:
      ValueError: if the settings and arrays do not fit together.
    """


class Dependent(Structured):
  """A leaf that stands for an array only together with other parameters.

  An example is an embedding that is a linear image of the head. `Model.materialize`,
  the forward pass and the file reader look up the parameters that `needs` names.

  Attributes:
    needs: paths of the other parameters, as in 'head/kernel'.
    eager: whether the file reader replaces the leaf by its array. It must do so for a
      leaf with which the forward pass cannot compute.
  """

  eager: ClassVar[bool] = False

  @abc.abstractmethod
  def expand(self, *needed: Any) -> Any:
    """Returns the array that the leaf stands for, given the arrays that it needs."""

  def check_needed(self, *shapes: tuple[int, ...]) -> None:
    """Checks the shapes of the arrays that the leaf needs.

    Raises:
      ValueError: if `expand` cannot take arrays of these shapes.
    """

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    """Returns rows of that array in float32.

    Args:
      needed_and_indices: the arrays that the leaf needs, then the indices of the rows,
        integers `[...]`.

    Returns:
      The rows, `[..., columns]`. A row beyond the last is NaN.
    """
    *needed, indices = needed_and_indices
    table = jnp.asarray(self.expand(*needed))
    return table.at[indices].get(mode='fill', fill_value=jnp.nan).astype(jnp.float32)

  def materialize(self, *needed: Any) -> jax.Array:
    if needed:
      return self.expand(*needed)
    raise ValueError(
      f'a leaf of kind {self.kind!r} needs {", ".join(self.needs)} to be materialized'
    )


KINDS: dict[str, type[Structured]] = {}
TYPES = KINDS


def register(cls: type[Any]) -> type[Any]:
  """Registers a class of leaves with the file format; a class decorator.

  Raises:
    ValueError: if another class has the same `kind`.
  """
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
  """Returns whether a leaf is an array of floating-point numbers."""
  if leaf is None or is_structured(leaf):
    return False
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def materialize(tree: Any) -> Any:
  """Replaces every structured leaf of a PyTree by the array that it stands for.

  Raises:
    ValueError: if a leaf is dependent; `models.materialize` materializes these, too.
  """
  return jax.tree.map(
    lambda x: _array(x) if is_structured(x) else x, tree, is_leaf=is_structured
  )


def _array(leaf: Structured) -> Any:
  return leaf.materialize() if leaf.expands_on_reading else _materialize(leaf)


@jax.jit
def _materialize(leaf: Structured) -> jax.Array:
  return leaf.materialize()


def astype(tree: Any, dtype: Any) -> Any:
  """Converts all floating-point numbers of a PyTree to another dtype."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if is_structured(x) else _astype(x, dtype),
    tree,
    is_leaf=is_structured,
  )


def count_elements(tree: Any) -> int:
  """Returns how many numbers a PyTree of unstacked leaves stores."""
  return sum(size for _, size in _stored_sizes(tree))


def count_bytes(tree: Any) -> int:
  """Returns how many bytes these numbers take before they are coded."""
  return sum(dtype.itemsize * size for dtype, size in _stored_sizes(tree))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of nested dicts by path.

  A path is the keys joined by '/', as in 'attention/query/kernel'. The whole package
  names parameters in this way.

  Raises:
    ValueError: if a key is not a string, is empty, or contains a slash.
  """
  found: dict[str, Any] = {}
  for key, value in tree.items():
    if not isinstance(key, str) or not key or '/' in key:
      raise ValueError(f'{key!r}: keys must be nonempty strings without a slash')
    if isinstance(value, Mapping):
      found |= {f'{key}/{path}': leaf for path, leaf in flatten(value).items()}
    else:
      found[key] = value
  return found


def empty_dicts(tree: Mapping[str, Any]) -> list[str]:
  """Returns the paths of the dicts that are empty, which `flatten` leaves out."""
  found = []
  for key, value in tree.items():
    if isinstance(value, Mapping):
      found += [f'{key}/{path}' for path in empty_dicts(value)] if value else [key]
  return found


def unflatten(flat: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Makes nested dicts from leaves by path: the inverse of `flatten`.

  Raises:
    ValueError: if two leaves have the same path, or if the path of one leaf is the
      beginning of another path.
  """
  tree: dict[str, Any] = {}
  for path, leaf in flat.items() if isinstance(flat, Mapping) else flat:
    *parents, last = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise ValueError(f'{path}: another leaf has this path or the beginning of it')
    if last in node:
      raise ValueError(f'{path}: another leaf has this path or a path that begins so')
    node[last] = leaf
  return tree


def stack_key(leaf: Any) -> tuple[Any, ...]:
  """Returns a key that is equal for two leaves if they can share a stack.

  It consists of the kind, the shape, the dtype, and the names of the leaf's own
  `stack_key`.
  """
  kind, names = '', ()
  if is_structured(leaf):
    kind, names = leaf.kind, leaf.stack_key()
  return kind, tuple(leaf.shape), np.dtype(leaf.dtype).name, tuple(names)


def same_bits(a: Any, b: Any) -> bool:
  """Returns whether two PyTrees have the same structure and bits."""
  trees: Any = jax.tree.structure(a), jax.tree.structure(b)
  if trees[0] != trees[1]:
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(_same_array(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _same_array(x: np.ndarray, y: np.ndarray) -> bool:
  if (x.shape, x.dtype) != (y.shape, y.dtype):
    return False
  bits = np.dtype(f'u{x.dtype.itemsize}')
  return np.array_equal(x.view(bits), y.view(bits))


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


def _astype(array: Any, dtype: Any) -> Any:
  """Rounds to nearest. Numbers that are too large for the dtype become infinite."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return array
  with np.errstate(over='ignore'):
    return array.astype(dtype, copy=False)


def _stored_sizes(tree: Any) -> list[tuple[np.dtype, int]]:
  sizes: list[tuple[np.dtype, int]] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_structured):
    if is_structured(leaf):
      sizes += leaf.stored_sizes()
    else:
      sizes.append((np.dtype(leaf.dtype), int(np.prod(leaf.shape))))
  return sizes
