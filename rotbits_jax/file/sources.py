"""Sources of encoding: models, opened checkpoints and PyTrees.

A source has records, which are read one at a time; `models.names` has those of models.
"""

from collections.abc import Mapping
import hashlib
import json
import os
from typing import Any
from urllib import parse

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import pool
from rotbits_jax import structured
from rotbits_jax.system import checksums

Tree = dict[str, Any]


def of(value: Any, selection: checkpoints.Selection | None = None) -> passes.Source:
  """Returns the source of a model, a checkpoint (its path, or opened), or a PyTree.

  The selection is that of a folder at a path, see `checkpoints.Selection`.
  """
  selection = selection or checkpoints.Selection()
  if isinstance(value, str | os.PathLike):
    return checkpoints.open_any(value, selection)
  if selection != checkpoints.Selection():
    raise ValueError('exclude and all_files are for the path of a folder')
  source: Any = value.model if isinstance(value, checkpoints.Checkpoint) else value
  if isinstance(source, models.Model):
    params, buffers = map(_native, (source.params, source.buffers))
    return source.replace(params=params, buffers=buffers)
  if isinstance(source, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    return source
  return of_tree(source)


def of_tree(tree: Any) -> 'TreeRecords':
  """Returns the source of a PyTree. A `Model` is one, too, not read as a checkpoint."""
  return TreeRecords(_native(to_dicts(tree)))


def _native(tree: Any) -> Any:
  """Returns a PyTree whose NumPy arrays have the byte order of this machine."""
  is_foreign = lambda x: isinstance(x, np.ndarray) and not x.dtype.isnative
  native = lambda x: x.astype(x.dtype.newbyteorder('=')) if is_foreign(x) else x
  return structured.map_leaves(lambda leaf: jax.tree.map(native, leaf), tree)


def fingerprint(source: Any) -> str:
  """Returns a digest: of the state of files on disk, or of all arrays in memory."""
  if hasattr(source, 'fingerprint'):
    return str(source.fingerprint())
  content = json.dumps([repr(source.config), entries(source)])
  return hashlib.sha256(content.encode()).hexdigest()


def entries(source: passes.Source) -> list[tuple[str, str, tuple[int, ...], int]]:
  """Returns the path, the dtype, the shape and the CRC-32 of each array."""
  several = [
    (path, array)
    for record in source.records
    for path, leaf in structured.flatten(source.read(record)).items()
    for array in jax.tree.leaves(leaf)
  ]
  describe = lambda path, x: (path, x.dtype.name, x.shape, checksums.of_array(x))
  return pool.each(describe, *zip(*several, strict=True)) if several else []


class TreeRecords:
  """Nested dicts as a `passes.Source`; the keys of the outermost level are records."""

  config = stored_as = None

  def __init__(self, tree: Tree):
    self.tree = tree
    self.records = tuple(tree)

  def read(self, record: str) -> Tree:
    """Returns the leaves of a record."""
    return {record: self.tree[record]}

  specs = read  # the arrays tell their shapes and dtypes


def to_dicts(tree: Any, path: str = '') -> Any:
  """Returns any PyTree, or the part at a path, as nested dicts with the same leaves.

  The keys are those of dicts, with '%2F' for a slash, the indices of sequences and the
  names of fields. Dicts may be empty. A number of Python becomes an array, typed PRNG
  keys a dict from the name of their implementation to their data, and a tree that is a
  leaf itself has the key 'array'. A ValueError says that a leaf is no array, or that
  keys cannot be told apart.
  """
  if tree is None and not path:
    raise ValueError('the tree: expected arrays of numbers, got None')
  if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
    children = list(tree.items())  # JAX would sort the keys
  else:
    pairs = _children(tree, path)
    is_structured = structured.is_structured(tree)
    if is_structured or [keys for keys, _ in pairs] == [()]:
      if not path:
        return {'array': to_dicts(tree, 'array')}
      if _is_key(tree):
        return {str(jax.random.key_impl(tree)): jax.random.key_data(tree)}
      return tree if is_structured else _array(tree, path)
    children = [(jax.tree_util.keystr(x, simple=True), child) for x, child in pairs]
  nested: Tree = {}
  for name, child in children:
    key = name.replace('%', '%25').replace('/', '%2F')
    where = f'{path}/{key}' if path else key
    if not key or key in nested:
      raise ValueError(f'{where!r}: keys must be different and not empty')
    nested[key] = to_dicts(child, where)
  return nested


def _children(tree: Any, path: str) -> list[tuple[Any, Any]]:
  """Returns the keys and the children of a node; a leaf is its own child."""
  try:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
  except ValueError as error:
    if not isinstance(tree, Mapping):
      raise
    types = ' and '.join(sorted({type(key).__name__ for key in tree}))
    raise ValueError(
      f'{path or "the tree"}: JAX cannot sort keys of the types {types}'
    ) from error


def unescaped(tree: Any) -> Any:
  """Returns nested dicts with the keys that `to_dicts` got."""
  if not isinstance(tree, dict):
    return tree
  return {parse.unquote(key): unescaped(child) for key, child in tree.items()}


def _is_key(leaf: Any) -> bool:
  """Returns whether a leaf has typed PRNG keys."""
  return jax.dtypes.issubdtype(getattr(leaf, 'dtype', None), jax.dtypes.prng_key)


def _array(leaf: Any, path: str) -> Any:
  """Returns a leaf if it is an array that files can hold."""
  leaf = np.asarray(leaf) if isinstance(leaf, bool | int | float) else leaf
  is_array = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
  dtype = leaf.dtype if is_array else None
  if dtype is None or isinstance(leaf, np.ma.MaskedArray) or dtype.kind in 'cOSUMm':
    got = f'{type(leaf).__name__} {dtype or ""}; numpy.asarray and numpy.frombuffer'
    raise ValueError(f'{path}: expected an array of numbers, got {got} make them')
  return leaf


def unflatten_like(like: Any, leaves: Tree) -> Any:
  """Returns a PyTree with the structure of another and the leaves of `to_dicts`."""
  flat = structured.flatten(to_dicts(leaves))
  treedef: Any = jax.tree.structure(like, is_leaf=structured.is_structured)
  old = treedef.flatten_up_to(like)
  numbered = structured.flatten(to_dicts(treedef.unflatten(range(len(old)))))
  places = {int(index): path for path, index in numbered.items()}
  expected = {}
  for index, leaf in enumerate(old):
    path = places[index]
    if _is_key(leaf):
      path += f'/{jax.random.key_impl(leaf)}'
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    expected[path] = leaf
  if wrong := sorted(expected.keys() ^ flat.keys()):
    raise ValueError(f'{wrong[0]}: only one of the file and `like` has it')
  for path, leaf in expected.items():
    of_like, of_file = (_in_file(x, path) for x in (leaf, flat[path]))
    if of_like != of_file:
      raise ValueError(f'{path}: `like` has {of_like[1:3]}, the file {of_file[1:3]}')
  new = [_as_in(x, flat[path]) for x, path in zip(old, expected, strict=True)]
  return treedef.unflatten(new)


def _as_in(old: Any, new: Any) -> Any:
  """Returns a leaf of a file as a number of Python or as typed keys, if it was that."""
  if isinstance(old, bool | int | float):
    return type(old)(new)
  if _is_key(old):
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
  return new


def _in_file(leaf: Any, path: str) -> tuple[Any, ...]:
  """Returns the type, the shape and the dtype of what files give back for a leaf."""
  if not structured.is_structured(leaf):
    is_spec = isinstance(leaf, jax.ShapeDtypeStruct)
    leaf = leaf if is_spec else _array(leaf, path)
  elif leaf.is_in_files or isinstance(leaf, structured.UniformlyQuantized):
    leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return structured.stack_key(leaf)
