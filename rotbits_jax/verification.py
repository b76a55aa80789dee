"""Whether a file holds what was encoded: all of it is read, decoded and compared.

`verify(path)` checks every checksum and every digest. `verify(path, against=DIR)` also
compares the bits, or the function, with those of a checkpoint.
"""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries

_TOKENS = 256  # that predictions are compared for
_MOST_NOISE = 10  # noise floors that the divergence may be
_LEAST_LIMIT = 1e-7  # nats: float32 arithmetic alone comes to this


class Verification(NamedTuple):
  """The result of `verify`.

  Attributes:
    units: how many units were decoded; for the preset `paper` the buffers only.
    tensors: how many parameters were decoded.
    files: how many other files were read.
    same_bits: whether all bits were compared with the checkpoint's, and are the same.
    kl: mean KL divergence from the checkpoint's predictions in nats; None if the
      function was not compared.
    kl_rerounded: the divergence that appears when the checkpoint is rotated at random
      and rounded again.
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

  Without a checkpoint a unit at a time is in memory. A file of the preset 'exact' must
  have the checkpoint's bits, and is compared a layer at a time. Any other must have its
  function: predictions for random tokens differ from the checkpoint's by no more than a
  few times what rounding alone makes. For that both models are in memory.

  Args:
    source: a path, bytes, or a binary file.
    against: the checkpoint that was encoded: its directory or its weights file.
    progress: whether to tell on stderr how far it is.

  Returns:
    The counts and measurements.

  Raises:
    ContainerError: if the file is damaged, or holds something else than the checkpoint.
    CheckpointError: if the checkpoint cannot be read.
    OSError: if a path cannot be read.
  """
  if against is None:
    return read_all(source, progress=progress)
  expected = checkpoints.open_checkpoint(against)
  with file.Reader(source) as reader:
    exact, config = reader.preset == 'exact', reader.config
    if config != expected.config:
      raise file.ContainerError(f'the config is not that of {against}')
  if exact:
    return read_all(source, expected, progress=progress)
  counts = read_all(source, progress=progress)
  _compare_files(source, expected)
  with file.Reader(source) as reader:
    model = reader.model(show_progress=progress)
  kl, floor = _divergence(model, expected.load().model)
  if not kl <= max(_MOST_NOISE * floor, _LEAST_LIMIT):  # NaN is no agreement
    raise file.ContainerError(
      f'the function is not that of {against}: KL {kl:.3g}, noise floor {floor:.3g}'
    )
  return counts._replace(kl=kl, kl_rerounded=floor)


def read_all(
  source: file.Readable,
  expected: checkpoints.Source | models.Model | None = None,
  *,
  progress: bool = False,
) -> Verification:
  """Reads and decodes everything in a file, a unit at a time.

  Args:
    source: a path, bytes, or a binary file.
    expected: what every bit must be equal to, if anything.
    progress: whether to tell on stderr how far it is.

  Returns:
    The counts.

  Raises:
    ContainerError: if the file is damaged, or is not what is expected.
    OSError: if a path cannot be read.
  """
  tensors = 0
  with file.Reader(source) as reader:
    for prefix, params in _parts(reader, progress):
      flat = structured.flatten(params)
      tensors += len(flat)
      if expected is not None:
        given = _unit_of(expected, prefix)
        for path, leaf in flat.items():
          if not _same_bits(leaf, given.get(path)):
            raise file.ContainerError(f'{prefix}{path}: differs from the checkpoint')
    buffers = reader.buffers()
    if expected is not None and not _same_bits(buffers, dict(expected.buffers)):
      raise file.ContainerError('the buffers differ from the checkpoint')
    files = len(reader.files())
    units = len(reader.units)
  if isinstance(expected, checkpoints.Source):
    _compare_files(source, expected)
  return Verification(units, tensors, files, expected is not None, None, None)


def _parts(reader: file.Reader, progress: bool) -> Iterator[tuple[str, Any]]:
  """What a file holds in parts, and what their paths begin with."""
  if reader.config is None:
    for name in reader.units:
      yield '', reader.unit(name)
    return
  for index, params in reader.parts(show_progress=progress):
    yield '' if index is None else f'layers.{index}/', params


def _unit_of(expected: checkpoints.Source | models.Model, prefix: str) -> Any:
  """The expected parameters by path: those of a layer, or all outside the layers."""
  if not prefix:
    return structured.flatten(expected.outer())
  index = int(prefix.removeprefix('layers.').removesuffix('/'))
  return structured.flatten(expected.layer(index))


def _same_bits(a: Any, b: Any) -> bool:
  trees: Any = jax.tree.structure(a), jax.tree.structure(b)
  if trees[0] != trees[1]:
    return False
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(_same_array(np.asarray(x), np.asarray(y)) for x, y in pairs)


def _same_array(x: np.ndarray, y: np.ndarray) -> bool:
  if (x.shape, x.dtype) != (y.shape, y.dtype):
    return False
  bits = np.dtype(f'u{x.dtype.itemsize}')
  return np.array_equal(x.view(bits), y.view(bits))


def _compare_files(source: file.Readable, expected: checkpoints.Source) -> None:
  with file.Reader(source) as reader:
    own = reader.files()
  for name in sorted(own.keys() | expected.files.keys()):
    if own.get(name) != expected.files.get(name):
      raise file.ContainerError(f'{name}: differs from that of the checkpoint')


def _divergence(model: Any, reference: models.Model) -> tuple[float, float]:
  """KL from the reference for random tokens, and what rounding alone makes."""
  from rotbits_jax import evaluation  # forward passes are slow to import

  config = reference.config
  count = min(_TOKENS, config.max_positions)
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, count)
  rerounded = symmetries.randomly_rotated(reference, key=jax.random.key(0))
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
