"""The model in a file of plain tensors, whose names are those of a known family.

The tensors of a layer are decoded together, and copied into the rows of the stacks:
files have the kernels of most families transposed.
"""

from collections.abc import Mapping
import functools
import threading

import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import pool
from rotbits_jax.file import decode
from rotbits_jax.file import memory
from rotbits_jax.file import placement
from rotbits_jax.file import stacks
from rotbits_jax.system import host
from rotbits_jax.system import progress


def open_model(
  decoder: decode.Decoder, files: Mapping[str, bytes]
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
    return checkpoints.CheckpointReader(tensors, config, files=files)
  except checkpoints.CheckpointError:
    return None


def read_model(
  source: checkpoints.CheckpointReader,
  layers: range,
  place: placement.Place | None,
  show_progress: bool,
) -> models.Model:
  """Reads the model that `open_model` found, see `Reader.read`."""
  names = {i: models.names.layer(i) for i in layers}
  is_outer = lambda x: models.names.layer_index(x) is None and x != models.names.BUFFERS
  outer = list(filter(is_outer, source.records))
  specs = {
    name: structured.flatten(source.specs(name)[name])
    for name in (*outer, *names.values())
  }
  sizes = {name: sum(x.nbytes for x in flat.values()) for name, flat in specs.items()}
  memory.check('the whole content', sum(sizes.values()))

  def fill(index: int, rows: Mapping[str, np.ndarray]) -> decode.Flat:
    """Decodes a layer into its rows."""
    leaves = structured.flatten(source.read(names[index])[names[index]])
    for path, leaf in leaves.items():
      rows[path][...] = host.contiguous(leaf)
    return {}

  def stack(run: range) -> stacks.Stack:
    """Starts a stack of layers whose arrays have equal shapes and dtypes."""
    name, wanted = models.names.stack(run), range(len(run))
    arrays = specs[names[run[0]]]
    if place is not None:
      shapes = [(path, x.shape) for path, x in arrays.items()]
      wanted = placement.local_layers(place, name, shapes, len(run))
    arrays_of_stack = {
      path: host.empty((len(wanted), *x.shape), x.dtype) for path, x in arrays.items()
    }
    jobs = []
    for row, i in enumerate(wanted):
      rows = {path: x[row] for path, x in arrays_of_stack.items()}
      jobs.append(start(functools.partial(fill, run[i], rows)))
    of_layers = [sizes[names[i]] for i in run]
    return stacks.Stack(
      name, len(run), wanted, jobs, of_layers, lambda _: arrays_of_stack
    )

  read = lambda name: structured.flatten(source.read(name))
  with (
    progress.Progress('decode', sum(sizes.values()), 'B', show=show_progress) as bar,
    pool.record_jobs() as start,
  ):
    jobs = [(sizes[name], start(functools.partial(read, name))) for name in outer]
    runs = models.stack_ranges(layers, lambda i: specs[names[i]])
    flat = stacks.placed(jobs, list(map(stack, runs)), place, bar)
  return models.Model(structured.unflatten(flat), source.buffers, source.config)
