"""PyTrees as nested dicts, whose outermost keys are records, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rotbits_jax import structured

Tree = dict[str, Any]


class TreeRecords:
  """Nested dicts as a `sources.Source`; the keys of the outermost level are records."""

  config = stored_as = None

  def __init__(self, tree: Tree):
    self._tree = tree
    self.records = tuple(tree)

  def read(self, record: str) -> Tree:
    """Returns the leaves of a record."""
    return {record: self._tree[record]}

  specs = read  # the arrays tell their shapes and dtypes


def to_dicts(tree: Any) -> Tree:
  """Returns any PyTree as nested dicts with the same leaves.

  The keys are those of dicts, the indices of sequences and the names of fields. Dicts
  may be empty. A ValueError says that a leaf is no array, that keys cannot be told
  apart, or that the tree is an array itself.
  """
  nested = _to_dicts(tree, '', _array)
  if not isinstance(nested, dict):
    raise ValueError('expected a dict or a sequence at the top level')
  return nested


def _to_dicts(tree: Any, where: str, leaf: Callable[[Any, str], Any]) -> Any:
  """Returns a part of a PyTree as nested dicts; `leaf` gets every leaf and its path."""
  if structured.is_structured(tree):
    return tree
  if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
    children = list(tree.items())
  else:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    if [keys for keys, _ in pairs] == [()]:
      return leaf(tree, where.removesuffix('/'))
    children = [(''.join(map(_key_name, keys)), child) for keys, child in pairs]
  nested: Tree = {}
  for key, child in children:
    if not key or '/' in key or key in nested:
      raise ValueError(
        f'{where}{key!r}: keys must be different, not empty and without a slash'
      )
    nested[key] = _to_dicts(child, f'{where}{key}/', leaf)
  return nested


def _key_name(key: Any) -> str:
  """Returns the name of one step into a PyTree: of a dict, a sequence or a class."""
  for name in ('key', 'idx', 'name'):
    if hasattr(key, name):
      return str(getattr(key, name))
  raise ValueError(f'{key!r}: a key of this class has no name')


def _array(leaf: Any, path: str) -> Any:
  """Returns a leaf if it is an array that files can hold."""
  problem = None
  if not isinstance(leaf, (np.ndarray, np.generic, jax.Array)):
    problem = (
      f'not an array, got {type(leaf).__name__}; numpy.asarray makes arrays of '
      'numbers. Leave out functions and text: of a TrainState, encode the params and '
      'the opt_state'
    )
  elif isinstance(leaf, np.ma.MaskedArray):
    problem = 'a masked array; give its data and its mask'
  elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    problem = 'a key; jax.random.key_data gives its numbers'
  elif leaf.dtype.kind in 'OSUMm':
    problem = (
      f'an array of {leaf.dtype} cannot be stored; text becomes an array by '
      'numpy.frombuffer(text.encode(), numpy.uint8)'
    )
  if problem is not None:
    raise ValueError(f'{path}: {problem}')
  return leaf


def _spec(leaf: Any, path: str) -> Any:
  return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else _array(leaf, path)


def unflatten_like(like: Any, leaves: Tree) -> Any:
  """Returns a PyTree with the structure of another and the leaves of `to_dicts`.

  A ValueError says that paths, shapes or dtypes differ.

  Args:
    like: the other one; its leaves may be `jax.ShapeDtypeStruct`. A structured leaf for
      which files have an array becomes that array.
    leaves: the leaves.
  """
  flat = structured.flatten(leaves)
  expected = structured.flatten(_to_dicts(like, '', _spec))
  if wrong := sorted(expected.keys() ^ flat.keys()):
    raise ValueError(f'{wrong[0]}: only one of the file and `like` has it')
  for path, leaf in expected.items():
    of_like, of_file = (structured.stack_key(_in_file(x)) for x in (leaf, flat[path]))
    if of_like != of_file:
      raise ValueError(f'{path}: `like` has {of_like[1:3]}, the file {of_file[1:3]}')
  treedef = jax.tree.structure(like, is_leaf=structured.is_structured)
  numbered = jax.tree.unflatten(treedef, range(len(expected)))
  numbers = structured.flatten(_to_dicts(numbered, '', lambda leaf, _: leaf))
  paths = sorted(numbers, key=lambda path: numbers[path])
  return jax.tree.unflatten(treedef, [flat[path] for path in paths])


def _in_file(leaf: Any) -> Any:
  """Returns the spec of an array for a structured leaf that files do not give back."""
  if structured.is_structured(leaf) and (
    leaf.origin.is_in_files or isinstance(leaf, structured.UniformlyQuantized)
  ):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return leaf
