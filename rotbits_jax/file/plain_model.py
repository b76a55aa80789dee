"""The model in a file of plain tensors, whose names are those of a known family.

The tensors of a layer are decoded together, and copied into the rows of the stacks:
files have the kernels of most families transposed.
"""

from collections.abc import Callable, Mapping
import functools
import threading
import types
from typing import Any

import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.file import decode as decode_lib
from rotbits_jax.file import manifest
from rotbits_jax.relative import entries
from rotbits_jax.system import host


def open_model(
  decoder: decode_lib.Decoder, files: Mapping[str, bytes]
) -> checkpoints.CheckpointReader | None:
  """Matches plain tensors with the parameters of a model.

  Args:
    decoder: decodes the tensors.
    files: the other files of the checkpoint, by name.

  Returns:
    The model; None if there is no config of a known family, or if other tensors than
    those of the config are there.
  """
  content = files.get('config.json')
  if content is None:
    return None
  thread = threading.local()  # the record that each thread has decoded last

  def read(path: str) -> np.ndarray:
    name = decoder.holders[path]
    if getattr(thread, 'name', None) != name:
      thread.name, thread.flat = name, decoder.decode(name)
    return np.asarray(structured.materialize(thread.flat[path]))

  tensors = {
    path: checkpoints.LazyTensor(
      leaf.shape, np.dtype(leaf.dtype), functools.partial(read, path)
    )
    for path, leaf in decoder.leaves.items()
  }
  try:
    config = checkpoints.parse_config(checkpoints.parse_object(content, 'config.json'))
    return checkpoints.in_memory(tensors, config, files)
  except checkpoints.CheckpointError:
    return None


class ModelDecoder:
  """Decodes the records of a model of arrays, such as `open_model` finds.

  Attributes:
    specs: returns the shapes and dtypes of a record, in nested dicts.
    read: returns its arrays.
  """

  def __init__(self, specs: Callable[[str], Any], read: Callable[[str], Any]):
    self.specs, self.read = specs, read

  def entry(self, name: str) -> manifest.RecordEntry:
    """Returns an entry for a record, as if its parameters were stored as they are."""
    leaves, arrays = [], []
    for path, spec in structured.flatten(self.specs(name)).items():
      dtype = spec.dtype.name
      leaves.append(manifest.Leaf(path=path, shape=spec.shape, dtype=dtype))
      stored_dtype = entries.stored_dtype(dtype)
      arrays.append([stored_dtype, list(spec.shape), 0, [None], None])
    nbytes = sum(leaf.nbytes for leaf in leaves)
    return manifest.RecordEntry(
      name=name,
      nbytes=nbytes,
      crc32=0,
      leaves=tuple(leaves),
      spec={'arrays': arrays, 'groups': []},
      input=manifest.Counts(elements=sum(x.size for x in leaves), bytes=nbytes),
    )

  def decode(
    self,
    name: str,
    started: decode_lib.Started = types.MappingProxyType({}),
    *,
    rows: decode_lib.Rows | None = None,
    integers: bool = False,
  ) -> decode_lib.Flat:
    """Decodes a record; no parameter needs another one, or is of integers."""
    flat = structured.flatten(self.read(name))
    if rows:
      for path, leaf in flat.items():
        (flat[path],) = rows[path.removeprefix(f'{name}/')]
        flat[path][...] = host.contiguous(leaf)
    return flat
