"""Verification of files: decodes everything, and compares it with a source."""

from collections.abc import Sequence
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.evaluation import held_out
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import schema

_TOKENS = 256  # number of tokens for which predictions are compared
_MOST_NOISE = 10  # greatest ratio of the divergence to the noise floor
_LEAST_LIMIT = 1e-7  # in nats; the divergence of float32 arithmetic alone
_DRAWS = 3  # of random rotations, whose greatest divergence is the noise floor
_LEAST_ERROR = 1e-5  # the relative error of float32 algebra
_MOST_ERRORS = 5  # greatest ratio of the error of a canonical form to that of a draw
_MOST_ERROR = 0.5  # of canonical forms that say something; negated rows have 2
_SPREAD = 0.05  # of a divergence that is measured again on another machine


class Verification(NamedTuple):
  """The result of `verify`: counts of what was decoded, and of what was compared."""

  records: int
  tensors: int
  files: int  # besides the weights
  same_bits: bool | None  # True if all are the checkpoint's; None if not compared
  kl: float | None  # mean divergence from the checkpoint's predictions, in nats
  kl_rerounded: float | None  # the noise floor: the greatest of random rotations
  compared: int  # tensors by all bits, or by canonical forms that rounding leaves
  measured: held_out.Measured | None = None  # on the tokens that `near` kept apart


def verify(
  reader: reader_lib.Reader,
  against: str | os.PathLike[str] | None,
  *,
  tokens: np.ndarray | None = None,
  progress: bool = False,
) -> Verification:
  """Decodes everything in a file, see `api.verify`."""
  options = reader.manifest.options
  if tokens is not None and (against is None or 'measured' not in options):
    raise ValueError('a text needs a checkpoint and a file with a bound of the KL')
  if against is None:
    return read_all(reader, progress=progress)
  is_plain, keeps = reader.is_plain, reader.manifest.keeps
  open_source = checkpoints.open_plain if is_plain else checkpoints.open_checkpoint
  expected: Any = open_source(against)
  if reader.config != expected.config:
    raise ContainerError(f'the config of the file is not that of {against}')
  files = reader.files()
  for name in sorted(files.keys() | expected.files.keys()):
    if files.get(name) != expected.files.get(name):
      raise ContainerError(f'{name}: differs from that of the checkpoint')
  bits = expected if keeps == 'bits' else None
  verified = read_all(reader, bits, progress=progress)
  if bits is not None or is_plain:
    return verified
  model: Any = reader.content(show_progress=progress)
  reference = checkpoints.load_checkpoint(against).model
  if tokens is not None:
    record = schema.load(held_out.Measured, options['measured'], 'measured')
    measured = record.again(model.materialize(), reference, tokens)
    if not measured.kl <= (1 + _SPREAD) * record.kl + _LEAST_LIMIT:
      raise ContainerError(f'{measured}, and {record} in the file')
    return verified._replace(measured=measured)
  draws = rotated(reference)
  kl, floor = divergences(model, reference, draws)
  if keeps == 'function' and (difference := different(kl, floor)):
    raise ContainerError(f'the decoded model computes {difference}')
  compared = _compare_forms(model, reference, draws) if keeps == 'function' else 0
  return verified._replace(kl=kl, kl_rerounded=floor, compared=compared)


def read_all(
  reader: reader_lib.Reader,
  expected: passes.Source | None = None,
  *,
  progress: bool = False,
) -> Verification:
  """Decodes everything in a file, counts it, and compares its bits with a source."""
  records = tensors = 0
  for name, flat in reader.each(integers=True, show_progress=progress):
    records += 1
    tensors += len(flat)
    if expected is None:
      continue
    is_known = name in expected.records
    source: Any = structured.flatten(expected.read(name)) if is_known else {}
    for path in sorted(flat.keys() | source.keys()):
      decoded, original = flat.get(path), source.get(path)
      if structured.is_structured(original) and not structured.is_structured(decoded):
        original = original.materialize()
      if not structured.same_bits(decoded, original):
        raise ContainerError(f'{path}: differs from the checkpoint')
  if expected is not None and records != len(expected.records):
    raise ContainerError('the checkpoint has other records than the file')
  files, headers = reader.files(), reader.headers()
  if isinstance(expected, checkpoints.PlainFiles) and headers != expected.headers:
    raise ContainerError('the headers of the weights files differ')
  same_bits, compared = (None, 0) if expected is None else (True, tensors)
  return Verification(records, tensors, len(files), same_bits, None, None, compared)


def different(kl: float, floor: float) -> str:
  """Returns how a function differs beyond the noise floor, or ''."""
  if kl <= max(_MOST_NOISE * floor, _LEAST_LIMIT):  # not if it is NaN
    return ''
  return f'a different function: KL {kl:.3g} (noise floor {floor:.3g})'


def rotated(reference: models.Model) -> list[models.Model]:
  """Returns a model after random rotations and rounding."""
  keys = map(jax.random.key, range(_DRAWS))
  return [passes.randomly_rotated(reference, key=key) for key in keys]


def divergences(
  model: models.Model, reference: models.Model, draws: Sequence[models.Model]
) -> tuple[float, float]:
  """Returns the KL divergence for random tokens, and the noise floor of `rotated`."""
  from rotbits_jax import evaluation  # optax and pictures are slow to import

  table = np.asarray(structured.materialize(reference.params['embed']['tokens']))
  usable = np.flatnonzero(np.isfinite(table).all(axis=1))
  if not usable.size:
    raise ContainerError('no token of the model has finite numbers')
  count = min(_TOKENS, reference.config.max_positions)
  tokens = np.random.default_rng(0).choice(usable, count)
  kl: Any = lambda model: evaluation.evaluate(model, tokens, reference=reference).kl
  return kl(model), max(map(kl, draws))


def _compare_forms(
  model: models.Model, reference: models.Model, draws: Sequence[models.Model]
) -> int:
  """Compares buffers, and the canonical forms of parameters; returns their number.

  A few tokens do not show every row of an embedding, nor a neuron that is never active.
  """
  if not structured.same_bits(dict(model.buffers), dict(reference.buffers)):
    raise ContainerError(f'{models.names.BUFFERS}: differ from the checkpoint')
  try:
    expected = _forms(reference)
  except ValueError:  # a segment is narrower than the one before it
    return 0
  errors = [_form_errors(expected, x) for x in (model, *draws)]
  compared = 0
  for path in expected:
    error, *of_draws = (x[path] for x in errors)
    limit = _MOST_ERRORS * max(of_draws) + _LEAST_ERROR
    compared += limit < _MOST_ERROR  # it may be NaN
    if limit < _MOST_ERROR and not error <= limit:
      text = f'its canonical form has a relative error of {error:.3g} > {limit:.3g}'
      raise ContainerError(f'{path}: {text}')
  return compared


_canonicalize = jax.jit(symmetries.canonicalize, static_argnums=1)


def _forms(model: models.Model) -> dict[str, np.ndarray]:
  """Returns the canonical form of each parameter by path, in float32."""
  params, _ = _canonicalize(model.materialize().params, model.config)
  leaves = model.replace(params=params).leaves()
  return {path: np.asarray(structured.materialize(leaf)) for path, leaf in leaves}


@np.errstate(over='ignore', invalid='ignore')  # of weights that are not finite
def _form_errors(
  expected: dict[str, np.ndarray], model: models.Model
) -> dict[str, float]:
  """Returns the greatest error of a row or a column, relative to their mean square."""
  errors = {}
  for path, form in _forms(model).items():
    pair = form - expected[path], expected[path]
    x, y = (np.square(np.atleast_2d(z)) for z in pair)
    ratios = [x.sum(i).max() / max(y.sum(i).mean(), 1e-30) for i in (0, 1)]
    errors[path] = math.sqrt(max(ratios))
  return errors
