"""Models and PyTrees that Orbax saves and loads as files of this package."""

import asyncio
import pathlib
from typing import Any

import jax
import numpy as np

from rotbits_jax import api
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import placement
from rotbits_jax.file import trees

_NAME = 'model.rotbits'


class Checkpointable:
  """Orbax v1's `StatefulCheckpointable` around a model or a PyTree of arrays.

    ocp.save_checkpointables(path, {'state': Checkpointable(state)})
    found = ocp.load_checkpointables(path, {'state': Checkpointable(state)})
    found['state'].value  # the state that was saved

  Orbax makes the directory, and gives it its name when it is complete. It has one file
  in it, which any function of this package reads. The class does not import Orbax.

  Attributes:
    value: the model or the PyTree to save. For loading, it gives the shardings, and the
      structure of a PyTree; its arrays may be `jax.ShapeDtypeStruct`. With None, or a
      `Model`, the file gives the structure. After loading, it is the loaded one.
  """

  def __init__(
    self,
    value: Any = None,
    *,
    base: api.Base | None = None,
    sharding: file.Place | None = None,
    preset: api.PresetName | presets.Preset = 'exact',
    **options: Any,
  ):
    """Stores the settings.

    Args:
      value: see the class.
      base: see `encode`; the weights before a fine-tune, for example. Loading needs it,
        too.
      sharding: see `load`; by default arrays are where those of `value` are committed.
      preset: see `encode`. It is 'exact' also for a sliced model, because the state of
        an optimizer has the coordinates of the weights.
      options: further options of `encode`. With `files` and `stem` the file decodes to
        a checkpoint.
    """
    self.value = value
    self._base, self._sharding = base, sharding
    self._preset, self._options = preset, options

  async def save(self, directory: Any) -> Any:
    """Copies the arrays to the host; the awaitable that it returns stores them.

    In a job of several processes, the first one writes, and all arrays must be
    replicated or on its devices.

    Raises:
      ValueError: if a leaf of a PyTree cannot be stored.
    """
    if not isinstance(self.value, models.Model):
      trees.to_dicts(self.value)
    is_first = jax.process_index() == 0
    if is_first:
      # The program may donate or change its arrays when this returns.
      value, base = jax.tree.map(_copied, jax.device_get((self.value, self._base)))

    async def write() -> None:
      folder = await directory.await_creation()
      if is_first:
        await asyncio.to_thread(self._write, folder / _NAME, value, base)

    return write()

  async def load(self, directory: Any) -> Any:
    """Reads the file, and sets `value`.

    Raises:
      ContainerError: see `decode`.
      ValueError: if the PyTree in the file is another one.
    """
    # Not in the awaitable, whose errors Orbax takes for those of another handler.
    self.value = await asyncio.to_thread(self._read, directory / _NAME)

    async def done() -> None:
      pass

    return done()

  # Orbax's paths may be those of a bucket, so that they open and write their files.

  def _write(self, path: pathlib.Path, value: Any, base: api.Base | None) -> None:
    data = api.encode(value, preset=self._preset, base=base, **self._options)
    path.write_bytes(data)

  def _read(self, path: pathlib.Path) -> Any:
    with path.open('rb') as opened:
      if self.value is None or isinstance(self.value, models.Model):
        place = self._sharding or _place_like(self.value)
        return api.load(opened, base=self._base, sharding=place)
      found: Any = api.decode(opened, base=self._base, like=self.value)
    if self._sharding is None:
      is_leaf = structured.is_structured
      return jax.tree.map(placement.placed_like, self.value, found, is_leaf=is_leaf)
    flat = placement.placed(structured.flatten(trees.to_dicts(found)), self._sharding)
    return trees.unflatten_like(self.value, structured.unflatten(flat))


def _copied(leaf: Any) -> Any:
  """Returns a copy of an array; a base may be something else, such as a path."""
  return np.array(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf


def _place_like(model: models.Model | None) -> file.Place | None:
  """Returns where the parameters of a model are; None if JAX may move all of them."""
  flat = {} if model is None else structured.flatten(model.params)
  found = {
    key: place
    for path, leaf in flat.items()
    for array in jax.tree.leaves(leaf)[:1]
    if (place := placement.committed(array)) is not None
    for key in _layered(path)
  }
  return (lambda path, _: found.get(_layered(path)[0])) if found else None


def _layered(path: str) -> list[str]:
  """Returns the path in each layer, because the file may have other stacks."""
  layers = models.names.stacked_layers(path)
  if layers is None:
    return [path]
  return [models.names.prefix(x) + path.partition('/')[2] for x in layers]
