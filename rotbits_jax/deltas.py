"""Steps of a training as bytes: from one PyTree of arrays to the next."""

import collections
from collections.abc import Callable, Mapping
import functools
import hashlib
import itertools
import json
from typing import Any, TypeVar

import jax
import numpy as np

from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import pool
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import placement
from rotbits_jax.file import sources
from rotbits_jax.relative import base as base_lib
from rotbits_jax.system import host

T = TypeVar('T')

_OLD = 'old'  # the file that has a digest of the old PyTree


@host.own_settings()
def delta(new: Any, old: Any, *, metadata: Mapping[str, str] | None = None) -> bytes:
  """Returns the bytes that turn one PyTree of arrays into another, bit for bit.

  A trainer sends them to samplers after each step: most numbers in bfloat16 do not
  change in a step of reinforcement learning. They hold a checksum of every old array
  that they need, and a digest of all.

  >>> old = {'w': np.zeros((64, 64), np.float32)}
  >>> new = {'w': np.eye(64, dtype=np.float32)}
  >>> data = rotbits_jax.delta(new, old)
  >>> bool((rotbits_jax.apply(data, old)['w'] == new['w']).all())
  True

  Args:
    new: arrays in any containers, on the host or on devices.
    old: the PyTree that the receiver has, of the same structure, shapes and dtypes.
    metadata: texts to keep, such as the number of the step, see `encode`.

  Returns:
    The bytes for `apply`, which are also a file whose base is `old`.

  Raises:
    ValueError: if the PyTrees differ in structure, shapes or dtypes, or a leaf is no
      array; it names the path.
  """
  sources.unflatten_like(old, new)  # as `apply` does
  with pool.started() as start:
    base, digest = _opened(old, start)
    source, files = sources.of_tree(new), {_OLD: digest}
    encoder = encode_lib.Encoder(
      source, presets.make('exact'), base=base, files=files, metadata=metadata
    )
    return encoder.in_memory(progress=False)


@host.own_settings()
def apply(
  data: file.Encoded,
  params: T,
  *,
  sharding: file.Place | None = None,
  donate: bool = False,
) -> T:
  """Applies the bytes of `delta`: turns the old PyTree into the new one.

  Args:
    data: the bytes of `delta`, the path of a file with them, or its reader, which
      needs no base.
    params: the old PyTree.
    sharding: see `load`, also for the paths of a `Model`. By default, and for its
      buffers, a JAX array gets the sharding of the old one if that is committed to it,
      and a NumPy array stays one.
    donate: whether the JAX arrays of `params` may be deleted, each when it is replaced,
      so that devices never hold both PyTrees. One that is there twice stays, and no
      other may share its buffer. After an error some may be gone.

  Returns:
    The new PyTree, in the containers of the old one. An array that did not change is
    the old one itself, unless `sharding` is given. A leaf of integers that changed, see
    `load`, becomes its array.

  Raises:
    ContainerError: if the bytes are damaged, or were made from another old PyTree.
    ValueError: if a reader has another base.
  """
  old = structured.flatten(sources.to_dicts(params))
  new: dict[str, Any] = {}
  # As `load` does, which places no buffers.
  prefix = 'params/' if isinstance(params, models.Model) else ''
  if isinstance(data, file.Reader):
    data, of_reader = data.inputs
    if of_reader is not None:
      raise ValueError('the base of a delta is `params`: open it without base=')
  with pool.started() as start:
    base, digest = _opened(params, start)
    reader = file.Reader(data, base=base)
    if reader.files().get(_OLD) != digest():
      raise file.ContainerError('the delta was made from other old arrays than these')
  leaves = {name: reader.records[name].leaves for name in reader.names()}
  key = lambda array: (array.path, array.shape, array.dtype, array.crc32)
  same = {  # paths of arrays that are those of the same paths in the base
    leaf.path
    for leaf in itertools.chain(*leaves.values())
    if not leaf.arrays and leaf.base is not None and key(leaf.base) == key(leaf)
  }
  needed = {  # by each record: its paths, and those of arrays of its bases
    name: dict.fromkeys(
      path for x in group for path in (x.path, *(base.path for base in x.base_arrays))
    )
    for name, group in leaves.items()
  }
  last = {path: name for name, paths in needed.items() for path in paths}
  counts = collections.Counter(map(id, jax.tree.leaves(old)))
  for record, flat in reader.each(integers=True):
    for path in needed[record]:
      place = sharding if path.startswith(prefix) else None
      if path in flat and path in same and place is None and path in old:
        new[path] = old[path]
      elif path in flat:
        new[path] = _like(old.get(path), path.removeprefix(prefix), flat[path], place)
      is_done = last[path] == record and old.get(path) is not new.get(path)
      for array in jax.tree.leaves(old.get(path)) if donate and is_done else ():
        if isinstance(array, jax.Array) and counts[id(array)] == 1:
          array.delete()
  new |= {x: {} for entry in reader.records.values() for x in entry.empty}
  nested = sources.unescaped(structured.unflatten(new))
  return sources.unflatten_like(params, nested)


def _opened(tree: Any, start: Any) -> tuple[base_lib.Base, Callable[[], bytes]]:
  """Opens the old PyTree as a base, and digests all arrays: a new one may need none."""
  array = lambda x: x if getattr(x, 'needs', ()) else structured.materialize(x)
  tree = structured.map_leaves(array, sources.of_tree(tree).tree)
  source = sources.TreeRecords(tree)
  arrays = start(lambda: sorted(sources.entries(source))).result  # JAX sorts keys
  crc32s = functools.cache(lambda: {tuple(key): x for *key, x in arrays()})
  base = base_lib.Base(source, plain=False, crc32s=crc32s)
  return base, lambda: hashlib.sha256(json.dumps(arrays()).encode()).digest()


def _like(old: Any, path: str, array: Any, sharding: file.Place | None) -> Any:
  """Returns a new array where the old one is, or with the sharding that is given."""
  if sharding is not None:
    if isinstance(old, np.ndarray) and np.may_share_memory(array, old):
      array = np.array(array)  # on CPUs, JAX would take the memory of the caller
    return placement.placed({path: array}, sharding)[path]
  structures: list[Any] = [jax.tree.structure(x) for x in (old, array)]
  if structured.is_structured(array) and structures[0] != structures[1]:
    return array  # `unflatten_like` refuses it
  return placement.placed_like(old, array)
