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
  """Matches plain tensors with the parameters of a model; None if they are of none.

  Args:
    decoder: decodes the tensors.
    files: the other files of the checkpoint, by name.
  """
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
    content = checkpoints.parse_object(files['config.json'], 'config.json')
    config = checkpoints.parse_config(content)
    return checkpoints.in_memory(tensors, config, files)
  except (KeyError, checkpoints.CheckpointError):
    return None


class ModelDecoder:
  """Decodes the records of a model whose parameters are arrays, and need no others.

  Its two functions return the shapes and dtypes of a record, and its arrays.
  """

  def __init__(self, specs: Callable[[str], Any], read: Callable[[str], Any]):
    self._specs, self._read = specs, read

  def entry(self, name: str) -> manifest.RecordEntry:
    """Returns an entry for a record, as if its parameters were stored as they are."""
    leaves, arrays = [], []
    for path, spec in structured.flatten(self._specs(name)).items():
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
    """Decodes a record, into rows if they are given."""
    flat = structured.flatten(self._read(name))
    if rows:
      for path, leaf in flat.items():
        (flat[path],) = rows[path.removeprefix(f'{name}/')]
        flat[path][...] = host.contiguous(leaf)
    return flat
