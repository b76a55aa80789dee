"""PyTrees in a temporary file, for those that memory would not hold together."""

from collections.abc import Hashable
import os
import tempfile
import threading
from typing import Any
import weakref

import jax
import numpy as np

from rotbits_jax.system import host
from rotbits_jax.system import outputs


class Spool:
  """A mapping of keys to PyTrees whose arrays are in a temporary file.

  Every reading makes new NumPy arrays. The file has no name where the system allows
  that, and ends with the object or the process.

  >>> spool = Spool()
  >>> spool['layer'] = {'kernel': np.ones((2, 3), np.float16)}
  >>> spool['layer']['kernel'].shape
  (2, 3)
  """

  def __init__(self, folder: str | os.PathLike[str] | None = None):
    """Makes the file.

    Args:
      folder: the folder of the file; None for that of temporary files.

    Raises:
      OSError: if it cannot be written.
    """
    self._folder = tempfile.gettempdir() if folder is None else folder
    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
    weakref.finalize(self, self._file.close)
    self._places: dict[Hashable, tuple[int, Any]] = {}
    self._lock = threading.Lock()

  def __setitem__(self, key: Hashable, tree: Any) -> None:
    with self._lock, outputs.named(self._folder):
      start = self._file.seek(0, os.SEEK_END)
      arrays = jax.tree.map(np.asarray, tree)
      for array in jax.tree.leaves(arrays):
        self._file.write(host.contiguous(array).reshape(-1).view(np.uint8))
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    self._places[key] = start, specs

  def __getitem__(self, key: Hashable) -> Any:
    start, specs = self._places[key]
    arrays = jax.tree.map(lambda x: host.empty(x.shape, x.dtype), specs)
    with self._lock, outputs.named(self._folder):
      self._file.seek(start)
      for array in jax.tree.leaves(arrays):
        self._file.readinto(array.reshape(-1).view(np.uint8))
    return arrays
