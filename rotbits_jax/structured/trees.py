"""Functions of PyTrees whose leaves are arrays and structured leaves."""

from collections.abc import Callable, Iterable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import convert


def is_structured(leaf: Any) -> bool:
  return isinstance(leaf, Structured)


def is_plain(leaf: Any) -> bool:
  """Returns whether a leaf is an array of floating-point numbers."""
  if leaf is None or is_structured(leaf):
    return False
  return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def materialize(tree: Any) -> Any:
  """Replaces every structured leaf of a PyTree by the array that it stands for.

  `expand` takes leaves that need others, too.

  >>> zeros = rotbits_jax.structured.Constant.like(jnp.ones(3), 0.0)
  >>> materialize({'bias': zeros})['bias'].tolist()
  [0.0, 0.0, 0.0]
  """

  def array(leaf: Any) -> Any:
    if not is_structured(leaf):
      return leaf
    # Bits of leaves that stand for arrays in files do not depend on a compiler.
    return leaf.materialize() if leaf.is_in_files else _materialize(leaf)

  return jax.tree.map(array, tree, is_leaf=is_structured)


_materialize = jax.jit(lambda leaf: leaf.materialize())


def expand(params: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces structured leaves by arrays, given leaves by path and those they need.

  A ValueError names a leaf that needs one which is missing.
  """
  needs = {path: x.needs for path, x in params.items() if is_structured(x) and x.needs}
  arrays = {
    path: leaf if path in needs else materialize(leaf) for path, leaf in params.items()
  }
  for path, names in needs.items():
    for name in names:
      if name not in arrays:
        raise ValueError(f'{path}: it needs {name}, which is missing')
    needed = (materialize(arrays[x]) for x in names)
    arrays[path] = arrays[path].materialize(*needed)
  return arrays


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
  """Applies a function to the leaves of nested dicts, whose keys keep their order."""
  if isinstance(tree, Mapping):  # JAX would sort the keys
    return {key: map_leaves(function, child) for key, child in tree.items()}
  return function(tree)


def astype(tree: Any, dtype: Any) -> Any:
  """Converts all floating-point numbers of a PyTree to another dtype."""
  converted = lambda x: x.astype(dtype) if is_structured(x) else convert(x, dtype)
  return jax.tree.map(converted, tree, is_leaf=is_structured)


def count_elements(tree: Any) -> int:
  """Returns how many elements a PyTree of unstacked leaves stores."""
  return sum(size for _, size in stored_sizes(tree))


def count_bytes(tree: Any) -> int:
  """Returns how many bytes these elements take before they are coded."""
  return sum(dtype.itemsize * size for dtype, size in stored_sizes(tree))


def stored_sizes(tree: Any) -> list[tuple[np.dtype, int]]:
  """Returns the dtype and the size of each array that is stored."""
  sizes: list[tuple[np.dtype, int]] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_structured):
    array_size = lambda x: [(np.dtype(x.dtype), math.prod(x.shape))]
    sizes += leaf.stored_sizes() if is_structured(leaf) else array_size(leaf)
  return sizes


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the leaves of nested dicts by path: their keys, joined by '/'.

  Keys must be nonempty strings without a slash; others raise a ValueError.

  >>> flatten({'mlp': {'up': {'kernel': 1}}})
  {'mlp/up/kernel': 1}
  """
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if not isinstance(key, str) or not key or '/' in key:
      raise ValueError(f'{key!r}: keys must be nonempty strings without a slash')
    if isinstance(value, Mapping):
      flat |= {f'{key}/{path}': leaf for path, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def empty_dicts(tree: Mapping[str, Any]) -> list[str]:
  """Returns the paths of the dicts that are empty, which `flatten` leaves out."""
  paths = []
  for key, value in tree.items():
    if isinstance(value, Mapping):
      paths += [f'{key}/{path}' for path in empty_dicts(value)] if value else [key]
  return paths


def unflatten(flat: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Makes nested dicts from leaves by path: the inverse of `flatten`.

  A path must not be the beginning of another one; else a ValueError is raised.

  >>> unflatten({'mlp/up/kernel': 1})
  {'mlp': {'up': {'kernel': 1}}}
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
  """Returns a key that is equal for two leaves if they can share a stack."""
  shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype).name
  if not is_structured(leaf):
    return '', shape, dtype, ()
  return leaf.type_name, shape, dtype, tuple(leaf.stack_key())


def same_bits(a: Any, b: Any) -> bool:
  """Returns whether two PyTrees have the same structure and bits.

  >>> same_bits({'w': np.float32([0.0])}, {'w': np.float32([-0.0])})
  False
  """
  structures: Any = jax.tree.structure(a), jax.tree.structure(b)
  return bool(structures[0] == structures[1]) and all(
    map(_same_array, jax.tree.leaves(a), jax.tree.leaves(b))
  )


def _same_array(x: Any, y: Any) -> bool:
  x, y = np.asarray(x), np.asarray(y)
  is_alike, bits = (x.shape, x.dtype) == (y.shape, y.dtype), f'u{x.dtype.itemsize}'
  return is_alike and np.array_equal(x.view(bits), y.view(bits))
