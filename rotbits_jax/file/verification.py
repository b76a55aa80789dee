"""Verification of files: decodes everything, and compares it with a source."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file.container import ContainerError

_TOKENS = 256  # number of tokens for which predictions are compared
_MOST_NOISE = 10  # greatest ratio of the divergence to the noise floor
_LEAST_LIMIT = 1e-7  # in nats; the divergence of float32 arithmetic alone


class Verification(NamedTuple):
  """The result of `verify`.

  Attributes:
    records, tensors, files: how many records, parameters and other files were decoded.
    same_bits: whether all bits were compared with the checkpoint's, and are equal.
    kl: mean KL divergence from the checkpoint's predictions, in nats, or None.
    kl_rerounded: the noise floor: that of the checkpoint after a random rotation and
      rounding.
  """

  records: int
  tensors: int
  files: int
  same_bits: bool
  kl: float | None
  kl_rerounded: float | None


def read_all(
  reader: reader_lib.Reader,
  expected: passes.Source | None = None,
  *,
  progress: bool = False,
) -> Verification:
  """Decodes everything in a file, one record at a time, and counts it.

  A ContainerError says that its bits are not those of the expected source, if any.
  """
  records = tensors = 0
  for name, flat in reader.each(show_progress=progress):
    records += 1
    tensors += len(flat)
    if expected is None:
      continue
    is_known = name in expected.records
    source = structured.flatten(expected.read(name)) if is_known else {}
    for path in sorted(flat.keys() | source.keys()):
      if not _same(flat.get(path), source.get(path)):
        raise ContainerError(f'{path}: differs from the checkpoint')
  if expected is not None and records != len(expected.records):
    raise ContainerError('the checkpoint has other records than the file')
  files, headers = reader.files(), reader.headers()
  if isinstance(expected, checkpoints.PlainFiles) and headers != expected.headers:
    raise ContainerError('the headers of the weights files differ')
  return Verification(records, tensors, len(files), expected is not None, None, None)


def _same(decoded: Any, original: Any) -> bool:
  """Returns whether a decoded leaf has the bits of a source's leaf, or of its array."""
  if structured.is_structured(original) and not structured.is_structured(decoded):
    original = original.materialize()
  return structured.same_bits(decoded, original)


def compare_function(
  reader: reader_lib.Reader, reference: models.Model, *, bounded: bool, progress: bool
) -> tuple[float, float]:
  """Compares the predictions of the model in a file with those of a reference.

  Returns:
    The divergence for random tokens, and the noise floor, near which it must be if it
    is `bounded`, see `Verification`.
  """
  from rotbits_jax import evaluation  # optax and pictures are slow to import

  model, config = reader.read(show_progress=progress), reference.config
  if not isinstance(model, models.Model):
    raise ContainerError('the file holds a PyTree, not a model')
  table = structured.materialize(reference.params['embed']['tokens'])
  usable = np.flatnonzero(np.isfinite(np.asarray(table)).all(axis=1))
  if not usable.size:
    raise ContainerError('no token of the model has finite numbers')
  count = min(_TOKENS, config.max_positions)
  result = evaluation.evaluate(
    dataclasses.replace(model, buffers={}),
    np.random.default_rng(0).choice(usable, count),
    reference=reference,
    rerounded=passes.randomly_rotated(reference, key=jax.random.key(0)),
  )
  kl, floor = result.kl, result.kl_rerounded
  assert kl is not None
  assert floor is not None
  most = max(_MOST_NOISE * floor, _LEAST_LIMIT) if bounded else math.inf
  if not kl <= most:  # true if kl is NaN
    raise ContainerError(
      f'its function is another one: KL {kl:.3g}, noise floor {floor:.3g}'
    )
  return kl, floor
