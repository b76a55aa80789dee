"""Functions of PyTrees whose leaves are arrays and structured leaves."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import convert


def is_structured(leaf: Any) -> bool:
  return isinstance(leaf, Structured)


def is_in_files(leaf: Any) -> bool:
  """Returns whether a leaf stands for an array in files only."""
  return is_structured(leaf) and leaf.origin.is_in_files


def is_plain(leaf: Any) -> bool:
  """Returns whether a leaf is an array of floating-point numbers."""
  if leaf is None or is_structured(leaf):
    return False
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def materialize(tree: Any, *, keep_factors: bool = False) -> Any:
  """Replaces every structured leaf of a PyTree by the array that it stands for.

  >>> u, v = jnp.ones((3, 1)), jnp.ones((1, 2))
  >>> materialize({'kernel': rotbits_jax.structured.LowRank(u, v)})['kernel'].shape
  (3, 2)

  Args:
    tree: the PyTree.
    keep_factors: whether low-rank leaves remain, see `Structured.pair`.

  Raises:
    ValueError: if a leaf needs other parameters; `models.materialize` materializes
      these leaves, too.
  """

  def array(leaf: Any) -> Any:
    if not is_structured(leaf) or (keep_factors and leaf.has_factors):
      return leaf
    # Bits of leaves that stand for arrays in files do not depend on a compiler.
    return leaf.materialize() if leaf.origin.is_in_files else _materialize(leaf)

  return jax.tree.map(array, tree, is_leaf=is_structured)


def expand(params: Mapping[str, Any], *, keep_factors: bool = False) -> dict[str, Any]:
  """Replaces every structured leaf by its array, also leaves that need others.

  Args:
    params: leaves by path, among them those that leaves need.
    keep_factors: whether low-rank leaves remain, see `Structured.pair`.
  """
  needs = {path: x.needs for path, x in params.items() if is_structured(x) and x.needs}
  found = {
    path: leaf if path in needs else materialize(leaf, keep_factors=keep_factors)
    for path, leaf in params.items()
  }
  for path, names in needs.items():
    found[path] = found[path].materialize(*(materialize(found[x]) for x in names))
  return found


@jax.jit
def _materialize(leaf: Structured) -> jax.Array:
  return leaf.materialize()


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
  """Applies a function to the leaves of nested dicts, whose keys keep their order.

  >>> map_leaves(lambda x: x + 1, {'b': 1, 'a': {'c': 2}})
  {'b': 2, 'a': {'c': 3}}
  """
  if isinstance(tree, Mapping):  # JAX would sort the keys
    return {key: map_leaves(function, child) for key, child in tree.items()}
  return function(tree)


def pair(leaf: Any) -> Any:
  """Returns a low-rank leaf as a `LowRank`, see `Structured.pair`; None for others."""
  return leaf.pair() if is_structured(leaf) else None


def astype(tree: Any, dtype: Any) -> Any:
  """Converts all floating-point numbers of a PyTree to another dtype.

  >>> astype({'w': jnp.ones(2), 'count': jnp.array(3)}, jnp.bfloat16)['w'].dtype
  dtype(bfloat16)
  """
  return jax.tree.map(
    lambda x: x.astype(dtype) if is_structured(x) else convert(x, dtype),
    tree,
    is_leaf=is_structured,
  )


def count_elements(tree: Any) -> int:
  """Returns how many numbers a PyTree of unstacked leaves stores.

  >>> u, v = jnp.ones((3, 1)), jnp.ones((1, 2))
  >>> count_elements({'kernel': rotbits_jax.structured.LowRank(u, v), 'bias': v})
  7
  """
  return sum(size for _, size in _stored_sizes(tree))


def count_bytes(tree: Any) -> int:
  """Returns how many bytes these numbers take before they are coded."""
  return sum(dtype.itemsize * size for dtype, size in _stored_sizes(tree))


def _stored_sizes(tree: Any) -> list[tuple[np.dtype, int]]:
  sizes: list[tuple[np.dtype, int]] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_structured):
    if is_structured(leaf):
      sizes += leaf.stored_sizes()
    else:
      sizes.append((np.dtype(leaf.dtype), int(np.prod(leaf.shape))))
  return sizes


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of nested dicts by path.

  A path is the keys joined by '/', as in 'attention/query/kernel'. The whole package
  names parameters in this way.

  >>> flatten({'mlp': {'up': {'kernel': 1}}})
  {'mlp/up/kernel': 1}

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

  >>> unflatten({'mlp/up/kernel': 1})
  {'mlp': {'up': {'kernel': 1}}}

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

  It consists of the type, the shape, the dtype, and the names of the leaf's own
  `stack_key`.
  """
  type_name, names = '', ()
  if is_structured(leaf):
    type_name, names = leaf.type_name, leaf.stack_key()
  return type_name, tuple(leaf.shape), np.dtype(leaf.dtype).name, tuple(names)


def same_bits(a: Any, b: Any) -> bool:
  """Returns whether two PyTrees have the same structure and bits.

  >>> same_bits({'w': np.float32([0.0])}, {'w': np.float32([-0.0])})
  False
  """
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
