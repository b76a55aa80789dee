"""PyTrees in a temporary file, for those that memory would not hold together."""

from collections.abc import Hashable
import os
import tempfile
from typing import Any
import weakref

import jax
import numpy as np

from rotbits_jax.system import host
from rotbits_jax.system import outputs


class Spool(dict[Hashable, Any]):
  """A dict of PyTrees whose arrays are read-only maps of a file without a name."""

  def __init__(self, folder: str | os.PathLike[str] | None = None):
    super().__init__()
    self._folder = tempfile.gettempdir() if folder is None else folder
    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
    weakref.finalize(self, self._file.close)

  def __setitem__(self, key: Hashable, tree: Any) -> None:
    super().__setitem__(key, jax.tree.map(self.stored, tree))

  def stored(self, array: Any) -> np.ndarray:
    """Returns an array as a map of the file; an OSError if it cannot be written."""
    array = host.contiguous(np.asarray(array))
    if not array.size:
      return array
    with outputs.named(self._folder):
      start = self._file.seek(0, os.SEEK_END)
      self._file.write(array.reshape(-1).view(np.uint8))
      self._file.flush()
    return np.asarray(np.memmap(self._file, array.dtype, 'r', start, array.shape))
