"""A message that holds a whole model, as the preset `paper` writes it."""

from collections.abc import Iterator
import math
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import schema


class StoredMessage:
  """The message of a file."""

  def __init__(self, file: container.StreamReader, own: manifest_lib.Manifest):
    """Finds the coder, and reads the layout of the message.

    Args:
      file: the file.
      own: its manifest, which has a message.

    Raises:
      ContainerError: if the coder is not installed, or if the layout of the message is
        damaged or has fewer arrays than the config has layers.
    """
    assert own.message is not None
    assert own.config is not None
    self._file, self._entry, self._config = file, own.message, own.config
    self._options = own.options
    coder = coders.find(own.message.coder)
    if not isinstance(coder, coders.ModelCoder):
      raise ContainerError(f'the coder {own.message.coder!r:.100} is not installed')
    self._coder = coder
    with file.errors(), _errors():
      self._dtypes = dict(coder.dtypes(own.message.layout))
      if len(self._dtypes) < own.config.num_layers:  # a small file may name millions
        raise ContainerError('the message has other parameters than the config')
    layers = map(models.names.layer, range(own.config.num_layers))
    self._outer = models.outer_shapes(own.config)
    self._records = *layers, *self._outer

  def shapes(self, record: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter of a record, by path."""
    index = models.names.layer_index(record)
    if index is None:
      return structured.flatten({record: self._outer[record]})
    return structured.flatten({record: models.layer_shapes(self._config, index)})

  def dtypes(self) -> dict[str, np.dtype]:
    """Returns the dtype of every parameter, by path.

    Raises:
      ContainerError: if the message has other parameters than the config.
    """
    paths = {path for x in self._records for path in self.shapes(x)}
    with self._file.errors():
      if self._dtypes.keys() != paths:
        raise ContainerError('the message has other parameters than the config')
    return self._dtypes

  def nbytes(self) -> int:
    """Returns the bytes of all parameters."""
    dtypes = self.dtypes()
    return sum(
      math.prod(shape) * dtypes[path].itemsize
      for record in self._records
      for path, shape in self.shapes(record).items()
    )

  def decode(self, *, show_progress: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the parameters of each record, when it is complete.

    The last layer comes first.

    Raises:
      ContainerError: if the message is damaged.
    """
    sizes = [sum(map(math.prod, self.shapes(x).values())) for x in self._records]
    # Beside the largest record there are a rotation and its integers.
    rotation = 16 * max(self._config.segment_widths) ** 2
    memory.check('message', 4 * max(sizes) + rotation)
    words = lambda name: self._file.words(name, self._entry.streams[name].crc32)
    first, *others = self._coder.streams
    streams = {first: words(first), **{name: words(name)[:] for name in others}}
    found: dict[str, dict[str, Any]] = {}
    with self._file.errors(), _errors():
      options = schema.load(self._coder.options, self._options, 'options')
      arrays = self._coder.decode(
        options, self._entry.layout, streams, self._config, progress=show_progress
      )
      for path, array in arrays:
        record = path.partition('/')[0]
        own = found.setdefault(record, {})
        own[path] = array
        if len(own) == len(self.shapes(record)):
          yield record, found.pop(record)
    if found:
      raise ContainerError(f'{min(found)}: the message has only a part of it')


class _errors:  # noqa: N801
  """A context that turns errors of the coder into a `ContainerError`."""

  def __enter__(self) -> None:
    return None

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    # JAX says that memory is short by an error of its own.
    if isinstance(error, MemoryError) or str(error).startswith('RESOURCE_EXHAUSTED'):
      raise ContainerError('message: it takes more than memory holds') from error
    if isinstance(error, ValueError) and not isinstance(error, ContainerError):
      raise ContainerError(f'message: {error}') from error
