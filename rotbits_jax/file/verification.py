"""Verification of files: decodes everything, and compares it with a source."""

from collections.abc import Iterator, Mapping, Sequence
import math
import types
from typing import Any, BinaryIO, NamedTuple, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.evaluation import held_out
from rotbits_jax.file import comparison
from rotbits_jax.file import container
from rotbits_jax.file import originals
from rotbits_jax.file import prices
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import schema

_TOKENS = 256  # number of tokens for which predictions are compared
_MOST_NOISE = 10  # greatest ratio of the divergence to the noise floor
_MOST_COARSE = 2  # the same for `near`, whose steps make the noise; it is 1 at most
_MOST_SHARE = 0.5  # greatest ratio of the divergence to that of an unrelated model
_LEAST_LIMIT = 1e-7  # in nats; the divergence of float32 arithmetic alone
_DRAWS = 3  # of random rotations, whose greatest divergence is the noise floor
_LEAST_ERROR = 1e-5  # the relative error of float32 algebra
_MOST_ERRORS = 5  # greatest ratio of the error of a canonical form to that of a draw
_MOST_ERROR = 0.5  # of canonical forms that say something; negated rows have 2
_SPREAD = 0.05  # of a divergence that is measured again on another machine

WAYS = 'bits', 'step', 'form', 'none'
"""How a tensor is compared, see `Verification.ways`."""


class Count(schema.Object):
  """Tensors and their elements."""

  tensors: int
  elements: int


class Verification(NamedTuple):
  """The result of `verify`: counts of what was decoded, and of what was compared.

  Attributes:
    records: Number of decoded records.
    tensors: Number of decoded tensors.
    files: Number of other files that were decoded.
    same_bits: Whether all tensors and files have the bits of the other side; None
      unless the file keeps all bits.
    kl: Mean divergence from the predictions of the other side, in nats; None if it was
      not measured.
    kl_rerounded: The noise floor: the greatest divergence that random rotations, and
      rounding as in the file, cause.
    compared: Number of tensors that were compared, in any way.
    measured: The loss on the tokens that `near` kept apart.
    elements: Number of elements of the decoded tensors.
    ways: How many tensors were compared in each way. 'bits': all bits. 'step': each
      element is within the error that the step of its tensor allows. 'form': canonical
      forms differ by no more than those of randomly rotated and rounded models do.
      'none': not compared.
    worst: The tensor that rounding to its step changed most, relative to its size.
    files_compared: Number of other files whose bytes were compared.
    missed: Files in the folder of the other side that the file does not store, and that
      were not excluded when it was encoded.
  """

  records: int
  tensors: int
  files: int
  same_bits: bool | None
  kl: float | None
  kl_rerounded: float | None
  compared: int
  measured: held_out.Measured | None = None
  elements: int = 0
  ways: Mapping[str, Count] = types.MappingProxyType({})
  worst: comparison.Error | None = None
  files_compared: int = 0
  missed: tuple[str, ...] = ()


def verify(
  reader: reader_lib.Reader,
  against: Any,
  *,
  tokens: np.ndarray | None = None,
  progress: bool = False,
) -> Verification:
  """Decodes everything in a file, see `api.verify`."""
  manifest = reader.manifest
  if tokens is not None and (against is None or 'measured' not in manifest.options):
    raise ValueError('a text needs a checkpoint and a file with a bound of the KL')
  if against is None:
    return read_all(reader, progress=progress)
  original = originals.of(against, reader)
  _compare_config(reader, original)
  files_compared = _compare_files(reader, original)
  if manifest.keeps == 'bits' or reader.config is None:
    verified = _read_all(reader, original, progress=progress)
  else:
    verified = _read_all(reader, None, progress=progress)
    verified = _compare_models(reader, original, verified, tokens, progress=progress)
  return verified._replace(files_compared=files_compared, missed=original.missed)


def check(reader: reader_lib.Reader, folder: Any) -> None:
  """Raises a ValueError unless a file holds all of a folder, see `verify`."""
  missed = verify(reader, folder).missed
  if missed:
    raise ValueError(not_stored(folder, missed))


def not_stored(folder: Any, missed: Sequence[str]) -> str:
  """Returns an error about files of a folder that would be lost with it."""
  return (
    f'{folder}: NOT STORED: {", ".join(missed)} (keep the original of these); '
    'all_files=True stores them, exclude=[...] leaves them out on purpose'
  )


def read_all(
  reader: reader_lib.Reader,
  expected: passes.Source | None = None,
  *,
  progress: bool = False,
) -> Verification:
  """Decodes everything in a file, counts it, and compares its tensors with a source."""
  original = None if expected is None else originals.Original('the input', expected)
  return _read_all(reader, original, progress=progress)


def _read_all(
  reader: reader_lib.Reader, original: originals.Original | None, *, progress: bool
) -> Verification:
  """Decodes everything in a file, and compares it with the other side if given."""
  tally = _Tally(reader, original)
  records = 0
  for _, flat in tally.decoded(progress=progress):
    records += 1
    for path, leaf in flat.items():
      tally.add(path, leaf)
  files = reader.files()
  reader.headers()
  ways = tally.ways()
  return Verification(
    records,
    tally.tensors,
    len(files),
    True if original is not None and tally.is_exact else None,
    None,
    None,
    sum(count.tensors for way, count in ways.items() if way != 'none'),
    elements=tally.elements,
    ways=ways,
    worst=tally.worst,
  )


class _Tally:
  """Counts the tensors of a file, each after it was compared with the other side."""

  def __init__(self, reader: reader_lib.Reader, original: originals.Original | None):
    """Compares the paths of both sides, which tells tensors that one side lacks."""
    self._reader, self._original = reader, original
    self.is_exact = reader.manifest.keeps == 'bits'
    self.tensors = self.elements = 0
    self.worst: comparison.Error | None = None
    self._rounding = None if self.is_exact else rounding_of(reader)
    self._counts = {way: [0, 0] for way in WAYS}
    # Plain tensors that are compared with a model become its parameters.
    is_model = original is not None and original.source.config is not None
    self._model = reader.plain_model() if is_model else None
    if original is None:
      return
    source: Any = self._model or reader
    paths = originals.records_of(source).keys()
    for path in sorted(paths ^ original.paths()):
      if path in paths:
        raise ContainerError(f'{path}: only the file has it, {original.name} does not')
      raise ContainerError(f'{path}: only {original.name} has it, the file does not')

  def decoded(self, *, progress: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of each record, and its leaves by path."""
    if self._model is None:
      yield from self._reader.each(integers=True, show_progress=progress)
      return
    for record in self._model.records:
      yield record, structured.flatten(self._model.read(record))

  def add(self, path: str, leaf: Any) -> None:
    """Counts a decoded leaf, and compares it with that of the other side."""
    size = math.prod(leaf.shape)
    self.tensors += 1
    self.elements += size
    way = 'none'
    if self._original is not None:
      way = self._compare(path, leaf, self._original)
    self._counts[way][0] += 1
    self._counts[way][1] += size

  def ways(self) -> dict[str, Count]:
    """Returns how many tensors were compared in each way."""
    return {x: Count(tensors=n[0], elements=n[1]) for x, n in self._counts.items()}

  def _compare(self, path: str, leaf: Any, original: originals.Original) -> str:
    """Compares a leaf with the other side; returns the way."""
    wanted = original.leaf(path)
    if self.is_exact:
      comparison.check_bits(path, leaf, wanted, original.name)
      return 'bits'
    if structured.is_structured(wanted) and not structured.is_structured(leaf):
      wanted = structured.materialize(wanted) if not wanted.needs else wanted
    if structured.same_bits(leaf, wanted):
      return 'bits'
    log2_step = None
    if self._rounding is not None:
      log2_step = self._rounding.log2_step(path, np.dtype(leaf.dtype))
    step = comparison.step_of(leaf, wanted, log2_step)
    if step is None:
      comparison.check_bits(path, leaf, wanted, original.name)
      return 'bits'
    error = comparison.check_step(path, leaf, wanted, step, original.name)
    if error is None:
      return 'none'
    if self.worst is None or error.error > self.worst.error:
      self.worst = error
    return 'step'


def rounding_of(reader: reader_lib.Reader) -> passes.Rounding | None:
  """Returns how a file of `near` was rounded; None for other presets."""
  manifest = reader.manifest
  if manifest.preset != 'near':
    return None
  with container.naming('options'):
    step = schema.load(float, manifest.options.get('step'), 'step')
    stored: Any = manifest.options.get('offsets', {})
    offsets = schema.load(dict[str, float], stored, 'offsets')
    return presets.near(step=step, offsets=offsets).rounding


def _compare_config(reader: reader_lib.Reader, original: originals.Original) -> None:
  """Compares the configs of models."""
  theirs = original.source.config
  mine = reader.config
  if mine is None and theirs is not None:
    mine = getattr(reader.plain_model(), 'config', None)
  if mine is None or mine == theirs:
    return
  pair = msgspec.structs.asdict(mine), msgspec.structs.asdict(theirs)
  key = next(key for key in pair[0] if pair[0][key] != pair[1][key])
  raise ContainerError(
    f'the config of the file is not that of {original.name}: {key} is '
    f'{pair[0][key]!s:.100} in the file, {pair[1][key]!s:.100} in {original.name}'
  )


def _compare_files(reader: reader_lib.Reader, original: originals.Original) -> int:
  """Compares other files and the headers of weights files; returns their number."""
  count = 0
  pairs = [(reader.files(), original.files)]
  if reader.manifest.keeps == 'bits':
    pairs.append((reader.headers(), original.headers))
  for files, others in pairs:
    if others is None:
      continue
    for name in sorted(files.keys() | others.keys()):
      if name not in others:
        raise ContainerError(f'{name}: only the file has it, {original.name} does not')
      if name not in files:
        raise ContainerError(f'{name}: only {original.name} has it, the file does not')
      if files[name] != others[name]:
        raise ContainerError(f'{name}: differs from that of {original.name}')
    count += len(files)
  return count + _compare_copies(reader, original)


def _compare_copies(reader: reader_lib.Reader, original: originals.Original) -> int:
  """Compares files that memory does not hold; returns their number."""
  if original.copies is None:
    return 0
  copies = reader.copies()
  for name, write in copies.items():
    if name not in original.copies:
      raise ContainerError(f'{name}: only the file has it, {original.name} does not')
    other = original.copies[name]
    same = comparison.SameContent(other)
    write(cast(BinaryIO, same))
    if not same.is_whole():
      raise ContainerError(f'{name}: differs from that of {original.name}')
  return len(copies)


def _compare_models(
  reader: reader_lib.Reader,
  original: originals.Original,
  verified: Verification,
  tokens: np.ndarray | None,
  *,
  progress: bool,
) -> Verification:
  """Compares predictions, and canonical forms; see `verify`."""
  model: Any = reader.content(show_progress=progress)
  reference = original.model()
  if tokens is not None:
    return verified._replace(measured=_measured_again(reader, model, reference, tokens))
  rounding = rounding_of(reader)
  draws = rotated(reference)
  if rounding is not None:
    for i, draw in enumerate(draws):
      draws[i] = coarse(draw, rounding)  # replaced one by one, to save memory
  kl, floor = divergences(model, reference, draws)
  is_function = reader.manifest.keeps == 'function'
  if not is_function:
    _check_related(kl, reference, original.name)
  ways = dict(verified.ways)
  if is_function or rounding is not None:
    most = _MOST_NOISE if is_function else _MOST_COARSE
    if difference := different(kl, floor, most):
      raise ContainerError(f'the decoded model computes {difference}')
    ways = _compare_forms(model, reference, draws, original.name)
  compared = sum(count.tensors for way, count in ways.items() if way != 'none')
  return verified._replace(kl=kl, kl_rerounded=floor, compared=compared, ways=ways)


def _check_related(kl: float, reference: models.Model, name: str) -> None:
  """Compares a divergence with that of a model with another embedding for each token.

  If it is not far below, the file may be one of any model.
  """
  outer = reference.materialize().outer()
  table = outer['embed']['tokens']
  shuffled = {**outer['embed'], 'tokens': table[::-1]}
  unrelated = reference.replace(params={**reference.params, 'embed': shuffled})
  control, _ = divergences(unrelated, reference, [reference])
  if not kl <= _MOST_SHARE * control:
    raise ContainerError(
      f'the decoded model may be any: its KL from {name} is {kl:.3g}, and that of a '
      f'model with shuffled tokens {control:.3g}'
    )


def _measured_again(
  reader: reader_lib.Reader, model: Any, reference: models.Model, tokens: np.ndarray
) -> held_out.Measured:
  """Measures the loss that a file states again, and compares it."""
  options = reader.manifest.options
  record = schema.load(held_out.Measured, options['measured'], 'measured')
  measured = record.again(model.materialize(), reference, tokens)
  if not measured.kl <= (1 + _SPREAD) * record.kl + _LEAST_LIMIT:
    raise ContainerError(f'{measured}, and {record} in the file')
  return measured


def coarse(model: models.Model, rounding: passes.Rounding) -> models.Model:
  """Rounds matrices to the steps of a preset, without error feedback."""

  def rounded(flat: dict[str, Any]) -> models.Params:
    arrays = structured.expand(flat)
    for path, array in arrays.items():
      if prices.is_rounded(array):
        dtype = np.dtype(array.dtype)
        step = rounding.log2_step(path, dtype)
        assert step is not None
        wide = jnp.asarray(array, jnp.float32)
        leaf, _ = passes.round_leaf(wide, np.dtype(np.float32), step, uniform=True)
        arrays[path] = leaf.materialize()
    return structured.unflatten(arrays)

  outer = rounded(structured.flatten(model.outer()))
  layers = []
  for index in range(model.config.num_layers):
    name = models.names.layer(index)
    layers.append(rounded(structured.flatten(model.read(name)))[name])
  return models.from_layers(model.config, outer, layers, model.buffers)


def different(kl: float, floor: float, most: float = _MOST_NOISE) -> str:
  """Returns how a function differs by more than `most` noise floors, or ''."""
  if kl <= max(most * floor, _LEAST_LIMIT):  # not if it is NaN
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
  model: models.Model,
  reference: models.Model,
  draws: Sequence[models.Model],
  name: str,
) -> dict[str, Count]:
  """Compares buffers, and the canonical forms of parameters; returns their numbers.

  A few tokens do not show every row of an embedding, nor a neuron that is never active.
  """
  if not structured.same_bits(dict(model.buffers), dict(reference.buffers)):
    raise ContainerError(f'{models.names.BUFFERS}: differ from those of {name}')
  buffers = [math.prod(x.shape) for x in reference.buffers.values()]
  sizes: dict[str, list[int]] = {'bits': buffers, 'form': [], 'none': []}
  try:
    expected = _forms(reference)
  except ValueError:  # a segment is narrower than the one before it
    arrays = reference.materialize().leaves()
    sizes['none'] = [math.prod(array.shape) for _, array in arrays]
    expected = {}
  errors = [_form_errors(expected, x) for x in (model, *draws)] if expected else []
  for path, form in expected.items():
    error, *of_draws = (x[path] for x in errors)
    limit = _MOST_ERRORS * max(of_draws) + _LEAST_ERROR
    if not limit < _MOST_ERROR:  # it may be NaN
      sizes['none'].append(form.size)
      continue
    if not error <= limit:
      raise ContainerError(
        f'{path}: its canonical form differs from that of {name} by a relative error '
        f'of {error:.3g} > {limit:.3g}'
      )
    sizes['form'].append(form.size)
  return {way: Count(tensors=len(x), elements=sum(x)) for way, x in sizes.items()}


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
