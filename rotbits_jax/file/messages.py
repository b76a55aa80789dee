"""The message of the preset `paper`, on which bits-back coding has a whole model."""

import collections
from collections.abc import Iterator
import math
from typing import Any

import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import memory
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import schema

Tree = dict[str, Any]


def arrays(
  file: container.StreamReader, own: manifest_lib.Manifest, *, show_progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the parameters of the model on a message, the last segment's first.

  Args:
    file: the file.
    own: its manifest.
    show_progress: whether to show the progress on stderr.

  Raises:
    ContainerError: if there is no message, or if it is damaged.
  """
  from rotbits_jax import paper  # its linear algebra is slow to import

  message, config = own.message, own.config
  if message is None or config is None:
    raise ContainerError('the file does not hold a message of bits-back coding')
  with file.errors():
    parts = [map(math.prod, x.values()) for x in _shapes_of_parts(config)]
    memory.check('message', 4 * max(map(sum, parts)))
    streams: dict[str, Any] = {}
    for stream in message.streams:
      streams[stream.name] = file.words(stream.name, stream.crc32)
    try:
      options = schema.load(paper.Options, own.options, 'options')
      yield from paper.decode(
        options, message.layout, streams, config, progress=show_progress
      )
    except ValueError as error:
      raise ContainerError(f'message: {error}') from error


def dtypes(
  file: container.StreamReader, own: manifest_lib.Manifest
) -> dict[str, np.dtype]:
  """Returns the dtype of every parameter on the message of a file, if it has one.

  Raises:
    ContainerError: if the layout of the message is damaged.
  """
  if own.message is None or own.config is None:
    return {}
  from rotbits_jax import paper  # slow to import

  with file.errors():
    try:
      return paper.dtypes(own.message.layout)
    except ValueError as error:
      raise ContainerError(f'message: {error}') from error


def layers(
  file: container.StreamReader,
  own: manifest_lib.Manifest,
  wanted: range,
  *,
  show_progress: bool,
) -> tuple[Tree, list[Tree]]:
  """Reads the parameters outside the layers, and some layers.

  Args:
    file: the file.
    own: its manifest.
    wanted: the layers.
    show_progress: whether to show the progress on stderr.

  Raises:
    ContainerError: see `arrays`; or if memory cannot hold the model.
  """
  assert own.config is not None
  flat: Tree = {}
  found = dtypes(file, own)
  shapes = collections.ChainMap(*_shapes_of_parts(own.config))
  memory.check(
    'the model',
    sum(math.prod(x) * found[path].itemsize for path, x in shapes.items()),
  )
  for path, array in arrays(file, own, show_progress=show_progress):
    index = models.names.layer_index(path.split('/')[0])
    if index is None or index in wanted:
      flat[path] = array
  tree = structured.unflatten(flat)
  stack = [tree.pop(models.names.layer(i)) for i in wanted]
  return tree, stack


def _shapes_of_parts(config: models.ModelConfig) -> list[dict[str, tuple[int, ...]]]:
  """Returns the shapes of all parameters outside the layers, and of each layer."""
  trees: list[Tree] = [models.outer_shapes(config)]
  for i in range(config.num_layers):
    trees.append({models.names.layer(i): models.layer_shapes(config, i)})
  return [structured.flatten(tree) for tree in trees]
