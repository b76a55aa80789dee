"""Verification of files: reads and decodes everything, and compares it.

`verify(path)` checks every checksum and every digest. `verify(path, against=DIR)` also
compares the bits, or the function, with those of a checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured

_TOKENS = 256  # number of tokens for which predictions are compared
_MOST_NOISE = 10  # greatest ratio of the divergence to the noise floor
_LEAST_LIMIT = 1e-7  # in nats; the divergence of float32 arithmetic alone


class Verification(NamedTuple):
  """The result of `verify`.

  Attributes:
    units: number of decoded units. The preset `paper` has a unit for buffers only.
    tensors: number of decoded parameters.
    files: number of sidecar files that were read.
    same_bits: whether all bits were compared with those of the checkpoint, and are
      equal.
    kl: mean KL divergence from the checkpoint's predictions, in nats; None if the
      function was not compared.
    kl_rerounded: the noise floor: the divergence of the checkpoint after a random
      rotation and rounding.
  """

  units: int
  tensors: int
  files: int
  same_bits: bool
  kl: float | None
  kl_rerounded: float | None


def verify(
  source: file.Readable,
  *,
  against: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> Verification:
  """Reads and decodes everything in a file, and compares it with a checkpoint.

  Without a checkpoint, memory holds one unit at a time. A file of the preset 'exact'
  must have the bits of the checkpoint; they are compared one layer at a time. A file of
  'free' or 'paper' must have the function of the checkpoint: the divergence of its
  predictions for random tokens must be at most a few times the noise floor, which
  rounding alone makes. The divergence of a file of 'near' is measured, too, but it has
  no bound, because the step sets it. For that, memory holds both models.

  Args:
    source: a path, bytes, or an open binary file.
    against: the checkpoint that was encoded: its directory or its weights file.
    progress: whether to show the progress on stderr.

  Returns:
    The counts and measurements.

  Raises:
    ContainerError: if the file is damaged, or if it differs from the checkpoint.
    CheckpointError: if the checkpoint cannot be read.
    OSError: if a path cannot be read.
  """
  if against is None:
    return read_all(source, progress=progress)
  with file.Reader(source) as reader:
    preset, config = reader.preset, reader.config
    plain = bool(reader.weights_files)
  if plain:
    tensors = checkpoints.open_tensors(against)
    counts = read_all(source, tensors, progress=progress)
    _compare_files(source, tensors)
    return counts
  expected = checkpoints.open_checkpoint(against)
  with file.Reader(source) as reader:
    if config != expected.config:
      raise file.ContainerError(
        f'the file is of another model: its config is not that of {against}'
      )
  exact = preset == 'exact'
  counts = read_all(source, expected if exact else None, progress=progress)
  _compare_files(source, expected)
  if exact:
    return counts
  with file.Reader(source) as reader:
    model = reader.model(show_progress=progress)
  kl, floor = _divergence(model, expected.load().model)
  most = math.inf if preset == 'near' else max(_MOST_NOISE * floor, _LEAST_LIMIT)
  if not kl <= most:  # true if kl is NaN
    raise file.ContainerError(
      f'the function is not that of {against}: KL {kl:.3g}, noise floor {floor:.3g}'
    )
  return counts._replace(kl=kl, kl_rerounded=floor)


def read_all(
  source: file.Readable,
  expected: checkpoints.CheckpointReader
  | checkpoints.TensorFiles
  | models.Model
  | None = None,
  *,
  progress: bool = False,
) -> Verification:
  """Reads and decodes everything in a file, one unit at a time.

  Args:
    source: a path, bytes, or an open binary file.
    expected: a checkpoint or a model whose bits the file must have; None for none.
    progress: whether to show the progress on stderr.

  Returns:
    The counts.

  Raises:
    ContainerError: if the file is damaged, or if its bits differ from the expected.
    OSError: if a path cannot be read.
  """
  tensors = 0
  with file.Reader(source) as reader:
    for prefix, params in _parts(reader, progress):
      flat = structured.flatten(params)
      tensors += len(flat)
      if expected is not None:
        given = _given(expected, prefix, flat)
        for path, leaf in flat.items():
          if not structured.same_bits(leaf, given.get(path)):
            raise file.ContainerError(f'{prefix}{path}: differs from the checkpoint')
    buffers, rests = reader.buffers(), reader.rests()
    if isinstance(expected, checkpoints.TensorFiles):
      _compare_rests(reader, rests, expected)
    elif expected is not None and not structured.same_bits(
      buffers, dict(expected.buffers)
    ):
      raise file.ContainerError('the buffers differ from the checkpoint')
    files = len(reader.files())
    units = len(reader.units)
  return Verification(units, tensors, files, expected is not None, None, None)


def _parts(reader: file.Reader, progress: bool) -> Iterator[tuple[str, Any]]:
  """Yields the parameters in a file in parts, each after the prefix of its paths."""
  if reader.config is None:
    for name in reader.units:
      yield '', reader.unit(name)
    return
  for index, params in reader.parts(show_progress=progress):
    yield models.names.prefix(index), params


def _given(
  expected: checkpoints.CheckpointReader | checkpoints.TensorFiles | models.Model,
  prefix: str,
  paths: Iterable[str],
) -> Any:
  """Returns the expected parameters by path.

  They are those of a layer, or all outside the layers, or the tensors with these names
  of a checkpoint without a model.
  """
  if isinstance(expected, checkpoints.TensorFiles):
    return {name: expected.read(name) for name in paths if name in expected.specs}
  index = models.names.layer_index(prefix)
  if index is None:
    return structured.flatten(expected.outer())
  return structured.flatten(expected.layer(index))


def _compare_rests(
  reader: file.Reader, rests: Mapping[str, bytes], expected: checkpoints.TensorFiles
) -> None:
  """Compares weights files, of whose tensors each is known to have the right bits."""
  given = {layout.name: layout for layout in expected.weights}
  if reader.weights_files != given:
    raise file.ContainerError('the weights files are laid out in another way')
  for name, layout in given.items():
    if b''.join(expected.rest(layout)) != rests[name]:
      raise file.ContainerError(f'{name}: differs from the checkpoint')


def _compare_files(
  source: file.Readable,
  expected: checkpoints.CheckpointReader | checkpoints.TensorFiles,
) -> None:
  with file.Reader(source) as reader:
    own = reader.files()
  for name in sorted(own.keys() | expected.files.keys()):
    if own.get(name) != expected.files.get(name):
      raise file.ContainerError(f'{name}: differs from that of the checkpoint')


def _divergence(model: Any, reference: models.Model) -> tuple[float, float]:
  """Returns the KL from the reference for random tokens, and the noise floor."""
  from rotbits_jax import evaluation  # optax and pictures are slow to import

  config = reference.config
  count = min(_TOKENS, config.max_positions)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, count)
  rerounded = passes.randomly_rotated(reference, key=jax.random.key(0))
  if not isinstance(model, models.Model):
    raise file.ContainerError('the file holds a PyTree, not a model')
  result = evaluation.evaluate(
    dataclasses.replace(model, buffers={}),
    tokens,
    reference=reference,
    rerounded=rerounded,
  )
  assert result.kl is not None
  assert result.kl_rerounded is not None
  return result.kl, result.kl_rerounded
