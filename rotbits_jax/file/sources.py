"""Sources of encoding: models, opened checkpoints and PyTrees.

A source has records, which are read one at a time. Those of a model are those of
`models.names`; every key of the outermost level of a PyTree is a record.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.system import checksums

Tree = dict[str, Any]


def of(value: Any) -> passes.Source:
  """Returns the source of a model, a checkpoint (its path, or opened), or a PyTree."""
  if isinstance(value, str | os.PathLike):
    return checkpoints.open_any(value)
  source: Any = value.model if isinstance(value, checkpoints.Checkpoint) else value
  if isinstance(source, models.Model):
    params, buffers = map(_native, (source.params, source.buffers))
    return dataclasses.replace(source, params=params, buffers=buffers)
  if isinstance(source, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    return source
  return TreeRecords(_native(to_dicts(source)))


def plain(source: Any) -> passes.Source:
  """Returns a dense checkpoint of safetensors files as tensors under their names.

  Its files come back byte for byte then. Other sources are returned as they are.
  """
  is_model = isinstance(source, checkpoints.CheckpointReader)
  path = source.path if is_model and not source.config.sliced else None
  if path is None or '.safetensors' not in path.suffixes:
    return source
  return checkpoints.open_plain(path)


def _native(tree: Any) -> Any:
  """Returns a PyTree whose NumPy arrays have the byte order of this machine."""
  is_foreign = lambda x: isinstance(x, np.ndarray) and not x.dtype.isnative
  native = lambda x: x.astype(x.dtype.newbyteorder('=')) if is_foreign(x) else x
  return structured.map_leaves(lambda leaf: jax.tree.map(native, leaf), tree)


def fingerprint(source: Any) -> str:
  """Returns a digest: of the state of files on disk, or of all arrays in memory."""
  if hasattr(source, 'fingerprint'):
    digest: str = source.fingerprint()
    return digest
  arrays = [
    (path, array.dtype.name, array.shape, checksums.of_array(array))
    for record in source.records
    for path, leaf in structured.flatten(source.read(record)).items()
    for array in map(np.ascontiguousarray, jax.tree.leaves(leaf))
  ]
  return hashlib.sha256(json.dumps([repr(source.config), arrays]).encode()).hexdigest()


# ---- PyTrees as nested dicts ---------------------------------------------------------


class TreeRecords:
  """Nested dicts as a `passes.Source`; the keys of the outermost level are records."""

  config = stored_as = None

  def __init__(self, tree: Tree):
    self._tree = tree
    self.records = tuple(tree)

  def read(self, record: str) -> Tree:
    """Returns the leaves of a record."""
    return {record: self._tree[record]}

  specs = read  # the arrays tell their shapes and dtypes


def to_dicts(tree: Any, path: str = '') -> Any:
  """Returns any PyTree, or the part at a path, as nested dicts with the same leaves.

  The keys are those of dicts, the indices of sequences and the names of fields. Dicts
  may be empty. A ValueError says that a leaf is no array, that keys cannot be told
  apart, or that the tree is an array itself.
  """
  if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
    children = list(tree.items())  # JAX would sort the keys
  else:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    is_structured = structured.is_structured(tree)
    if is_structured or [keys for keys, _ in pairs] == [()]:
      if not path:
        raise ValueError('expected a dict or a sequence at the top level')
      return tree if is_structured else _array(tree, path)
    children = [(_path_of(keys), child) for keys, child in pairs]
  nested: Tree = {}
  for key, child in children:
    where = f'{path}/{key}' if path else key
    if not key or '/' in key or key in nested:
      raise ValueError(
        f'{where!r}: keys must be different, not empty and without a slash'
      )
    nested[key] = to_dicts(child, where)
  return nested


# Returns the path of a leaf, from JAX's keys of dicts, sequences and classes.
_path_of = functools.partial(jax.tree_util.keystr, simple=True, separator='/')


def _array(leaf: Any, path: str) -> Any:
  """Returns a leaf if it is an array that files can hold."""
  is_array = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
  dtype = leaf.dtype if is_array else None
  if (
    dtype is None
    or isinstance(leaf, np.ma.MaskedArray)
    or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    or dtype.kind in 'cOSUMm'
  ):
    raise ValueError(
      f'{path}: expected an array of numbers, got {type(leaf).__name__} {dtype or ""}; '
      'numpy.asarray, jax.random.key_data, and for text numpy.frombuffer make them. Of '
      'a TrainState, encode the params and the opt_state'
    )
  return leaf


def unflatten_like(like: Any, leaves: Tree) -> Any:
  """Returns a PyTree with the structure of another and the leaves of `to_dicts`.

  A ValueError says that paths, shapes or dtypes differ. The leaves of `like` may be
  `jax.ShapeDtypeStruct`. A structured leaf for which files have an array becomes that.
  """
  flat = structured.flatten(leaves)
  pairs, treedef = jax.tree_util.tree_flatten_with_path(
    like, is_leaf=structured.is_structured
  )
  expected = {_path_of(keys): leaf for keys, leaf in pairs}
  if wrong := sorted(expected.keys() ^ flat.keys()):
    raise ValueError(f'{wrong[0]}: only one of the file and `like` has it')
  for path, leaf in expected.items():
    of_like, of_file = (_in_file(x, path) for x in (leaf, flat[path]))
    if of_like != of_file:
      raise ValueError(f'{path}: `like` has {of_like[1:3]}, the file {of_file[1:3]}')
  return jax.tree.unflatten(treedef, [flat[path] for path in expected])


def _in_file(leaf: Any, path: str) -> tuple[Any, ...]:
  """Returns the type, the shape and the dtype of what files give back for a leaf."""
  if not structured.is_structured(leaf):
    is_spec = isinstance(leaf, jax.ShapeDtypeStruct)
    leaf = leaf if is_spec else _array(leaf, path)
  elif leaf.origin.is_in_files or isinstance(leaf, structured.UniformlyQuantized):
    leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return structured.stack_key(leaf)
