"""Sources of encoding: models, opened checkpoints and PyTrees.

A source has records, which are read one at a time. Those of a model are those of
`models.names`; every key of the outermost level of a PyTree is a record.
"""

from collections.abc import Callable, Mapping
import dataclasses
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

# The bits of a byte that numbers of these dtypes use.
_USED_BITS = {'int2': 3, 'uint2': 3, 'int4': 15, 'uint4': 15}


def of(value: Any) -> passes.Source:
  """Returns the source of a model, a checkpoint (its path, or opened), or a PyTree."""
  if isinstance(value, str | os.PathLike):
    return checkpoints.open_any(value)
  source: Any = value.model if isinstance(value, checkpoints.Checkpoint) else value
  if isinstance(source, models.Model):
    return dataclasses.replace(
      source, params=native(source.params), buffers=native(source.buffers)
    )
  if isinstance(source, checkpoints.CheckpointReader | checkpoints.PlainFiles):
    return source
  return TreeRecords(native(to_dicts(source)))


def plain(source: passes.Source, path: Any) -> passes.Source:
  """Returns a dense checkpoint of safetensors files as tensors under their names.

  Its files come back byte for byte then. Other sources are returned as they are. `path`
  is the one at which it was opened, or anything else.
  """
  if not isinstance(source, checkpoints.CheckpointReader) or source.config.sliced:
    return source
  if source.path is None or '.safetensors' not in source.path.suffixes:
    return source
  is_path = isinstance(path, str | os.PathLike)
  return checkpoints.open_plain(path if is_path else source.path)


def native(tree: Any) -> Any:
  """Returns a PyTree whose arrays have the bits that those of JAX would have.

  Their bytes are in the order of this machine, and those of short integers have zeros
  for the bits that say nothing. NumPy keeps what others have put there.
  """
  return structured.map_leaves(lambda leaf: jax.tree.map(_native_array, leaf), tree)


def _native_array(array: Any) -> Any:
  """Returns an array, see `native`."""
  if not isinstance(array, np.ndarray):
    return array
  if not array.dtype.isnative:
    return array.astype(array.dtype.newbyteorder('='))
  used = _USED_BITS.get(array.dtype.name)
  if used is None or (array.view(np.uint8) <= used).all():
    return array
  return (array.view(np.uint8) & used).view(array.dtype)


def array_of(source: passes.Source, path: str) -> Any:
  """Returns the array of a parameter, which other parameters may need."""
  record = path.partition('/')[0]
  flat = structured.flatten(source.read(record)) if record in source.records else {}
  if path not in flat:
    raise ValueError(f'{path} is needed, but missing')
  return structured.materialize(flat[path])


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
  is_array = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
  dtype = leaf.dtype if is_array else None
  if (
    dtype is None
    or isinstance(leaf, np.ma.MaskedArray)
    or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    or dtype.kind in 'OSUMm'
  ):
    raise ValueError(
      f'{path}: expected an array of numbers, got {type(leaf).__name__} {dtype or ""}; '
      'numpy.asarray, jax.random.key_data, and for text numpy.frombuffer make them. Of '
      'a TrainState, encode the params and the opt_state'
    )
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
