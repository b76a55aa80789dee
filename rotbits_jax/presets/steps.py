"""Calibration of the preset `near`: its steps, for a bound of the divergence.

    model -> transforms of `near`, float32 -> steps -> divergence on a text

If a matrix of n numbers causes the divergence k 4^s at the step s, the least bytes have
s = log2(n / k) / 2 + constant; the page on `near` has the proof. Each k follows from
the errors of one rounding and from `sensitivities`. By the same rule rows and columns
of a matrix have steps of their own, see `symmetries.steps`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import os
import tempfile
import types
from typing import Any, NamedTuple

import jax
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.evaluation import held_out
from rotbits_jax.evaluation import perplexity
from rotbits_jax.models import fisher
from rotbits_jax.models import transformer
from rotbits_jax.passes import transform as transform_lib
from rotbits_jax.presets import sensitivities
from rotbits_jax.presets.preset import near
from rotbits_jax.symmetries import rotations
from rotbits_jax.system import host
from rotbits_jax.system import progress as progress_lib

PROBE = -5.0
"""The step at which the divergence of each parameter is estimated."""

_MOST_OFFSET = 4.0  # octaves: a parameter may hardly cause any divergence
_PRECISION = 0.125  # octaves
_EVALUATIONS = 8
_BY_LAW = 4  # evaluations before the range is halved instead

_Folder = str | os.PathLike[str] | None
_Windows = Sequence[np.ndarray]  # tokens, int32 [1, T] each


class Point(NamedTuple):
  """One measurement on the tokens that are kept apart."""

  step: float  # in octaves from the rms
  kl: float  # mean, in nats
  ear: float  # mean of the expected agreement rate


class Calibration(NamedTuple):
  """The result of `calibrate`: options of `near`, and the measurements behind them."""

  offsets: dict[str, float]  # octaves to add to the step, by path; about 0 in the mean
  inputs: Mapping[str, passes.Inputs]  # of matrices, see `passes.Rounding`
  sensitivities: dict[str, float]  # about the KL that each causes at the step `PROBE`
  curve: tuple[Point, ...] = ()  # with a bound, all measurements, from the finest step
  step: float | None = None  # the coarsest one whose divergence is below the bound
  measured: held_out.Measured | None = None  # at this step, on tokens kept apart

  @property
  def options(self) -> dict[str, Any]:
    """The options of `near`, with those of the bound if there is one."""
    names = 'offsets', 'inputs', 'step', 'measured'
    options = {name: getattr(self, name) for name in names}
    return {name: value for name, value in options.items() if value is not None}


@host.own_settings()
def calibrate(
  model: Any,  # a `models.Model`, or an opened checkpoint
  tokens: np.ndarray,  # [N], ids of the text on which divergences are measured
  *,
  max_kl: float | None = None,
  max_tokens: int | None = 4096,  # how many to use; None for all
  seed: int = 0,  # chooses the tokens to keep apart
  tolerance: float = rotations.TOLERANCE,  # see `near`
  folder: _Folder = None,  # of temporary files, in which moments of inputs remain
  progress: bool = False,
) -> Calibration:
  """Divides the bits among the parameters, and finds the coarsest steps for a bound.

  The bound `max_kl` is that of the mean KL(model || rounded model), in nats, over a
  quarter of the tokens, see `held_out`. Without it all tokens calibrate, and no steps
  are searched. A ValueError says that the tokens or the bound do not fit, or that no
  measured step is fine enough.
  """
  if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
    raise ValueError(f'max_kl must be positive and finite, got {max_kl}')
  tokens, apart = np.asarray(tokens)[:max_tokens], list[np.ndarray]()
  if max_kl is None:
    windows = held_out.whole_windows(tokens, model.config)
  else:
    windows, apart = held_out.split(tokens, model.config, seed=seed)
  count = 2 if max_kl is None else 3 + _EVALUATIONS
  count *= model.config.num_layers + 1
  with progress_lib.Progress('calibrate', count, 'record', show=progress) as bar:
    rewritten = _Rewritten(model, tolerance, folder, bar)
    calibration = _calibrated(rewritten, windows)
    if max_kl is not None:
      calibration, point = _searched(calibration, rewritten, apart, max_kl)
      measured = held_out.Measured.of(point.kl, point.ear, tokens, apart, seed)
      calibration = calibration._replace(measured=measured)
  return calibration


# ---- a model, part by part ---------------------------------------------------------


_Part = Callable[[int | None], models.Params]
"""Returns the record of a layer by its index, or for None the parameters outside."""


def _layers(config: models.ModelConfig, part: _Part) -> Any:
  """Returns a model that is read part by part, see `transformer.streams`."""
  return types.SimpleNamespace(
    config=config,
    layer=lambda index: part(index)[models.names.layer(index)],
    outer=lambda: part(None),
  )


def _mapped(array: Any, folder: _Folder) -> np.ndarray:
  """Returns an array as a read-only map of a temporary file, not to hold it."""
  array = np.asarray(array, order='C')
  if not array.size:
    return array
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(array.reshape(-1).view(np.uint8))
    file.flush()
    return np.asarray(np.memmap(file, array.dtype, 'r', shape=array.shape))


class _Rewritten:
  """A model after the transforms of `near`, float32, in a temporary file."""

  def __init__(
    self, model: Any, tolerance: float, folder: _Folder, bar: progress_lib.Progress
  ):
    self.model, self.config, self.bar = model, model.config, bar
    self.context = passes.make_context(model)
    self.store = functools.partial(_mapped, folder=folder)
    self.parts: dict[int | None, models.Params] = {}
    transform = near(tolerance=tolerance).transform
    bar.stage('compiling, removing gauges')
    for records, _ in passes.rewrite(
      self.context, transform, rounding=passes.Rounding(dtype=np.float32)
    ):
      params = {name: x for record in records for name, x in record.params.items()}
      index = models.names.layer_index(records[0].name)
      self.parts[index] = jax.tree.map(self.store, params)
      bar.update()

  def rounded(
    self, index: int | None, rounding: passes.Rounding
  ) -> tuple[dict[str, Any], set[str]]:
    """Rounds a part; returns arrays by path, and the paths that have steps."""
    params = transform_lib.widened(self.parts[index])
    params, notes, _ = transform_lib.round_params(rounding, params, self.context)
    arrays = transform_lib.widened(structured.unflatten(params))
    return arrays, {note['tensor'] for note in notes}

  def decoded(self, index: int | None, rounding: passes.Rounding) -> models.Params:
    """Rounds a part, also to the dtypes of the checkpoint as `decode` does."""
    arrays = structured.expand(self.rounded(index, rounding)[0])
    for path, leaf in arrays.items():
      arrays[path] = structured.astype(leaf, self.context.dtype_of(path))
    return structured.unflatten(structured.astype(arrays, np.float32))


# ---- the divergence of each parameter ----------------------------------------------


def _calibrated(rewritten: _Rewritten, windows: _Windows) -> Calibration:
  """Estimates the divergence of each parameter, and divides the bits."""
  rewritten.bar.stage('gradients')
  parts, store = rewritten.parts, rewritten.store
  inputs: dict[str, passes.Inputs] = {}
  counts, divergences = {}, {}
  part = lambda index: structured.unflatten(transform_lib.widened(parts[index]))
  model = _layers(rewritten.config, part)
  # Feedback fits the text that it has seen, so errors are made with one half of it, and
  # the other half tells their cost.
  halves = [half for half in (windows[::2], windows[1::2]) if half]
  measured = (sensitivities.measure(model, half, store) for half in halves)
  for seen, *unseen in zip(*measured, strict=True):
    inputs |= sensitivities.fitted([seen, *unseen], halves, store)
    index = models.names.layer_index(next(iter(seen)))
    fitted = sensitivities.fitted([seen], halves[:1])
    rounding = passes.Rounding(PROBE, uniform=True, inputs=fitted)
    exact = transform_lib.widened(parts[index])
    rounded, stepped = rewritten.rounded(index, rounding)
    for path, matrix_inputs in (unseen or [seen])[0].items():
      if path in stepped:
        counts[path] = structured.count_elements(rounded[path])
        leaves = exact[path], rounded[path]
        divergences[path] = float(fisher.divergence(*leaves, *matrix_inputs))
    rewritten.bar.update()
  return Calibration(_offsets(counts, divergences), inputs, divergences)


def _offsets(counts: dict[str, int], divergences: dict[str, float]) -> dict[str, float]:
  """Divides the bits, see above. The mean offset over all numbers is zero."""
  if not counts:
    return {}
  paths = sorted(counts)
  sizes, causes = (np.array([x[path] for path in paths]) for x in (counts, divergences))
  # A divergence that is close to zero counts as a small one.
  least = max(causes.max() * 2.0 ** (-4 * _MOST_OFFSET), 1e-12)
  offsets = np.log2(sizes / np.maximum(causes, least)) / 2
  offsets -= np.average(offsets, weights=sizes)
  offsets = np.clip(offsets, -_MOST_OFFSET, _MOST_OFFSET).round(3)
  return dict(zip(paths, offsets.tolist(), strict=True))


# ---- the search of a step ----------------------------------------------------------


def _searched(
  calibration: Calibration, rewritten: _Rewritten, windows: _Windows, max_kl: float
) -> tuple[Calibration, Point]:
  """Adds the coarsest step that keeps the bound, and all that were measured."""
  offsets, config, bar = calibration.offsets, rewritten.config, rewritten.bar

  def predicted(part: _Part) -> tuple[models.Params, list[jax.Array]]:
    """Returns the outer parameters, and the last residual stream of each window."""
    outer, last = part(None), list[jax.Array]()
    layers = _layers(config, lambda index: outer if index is None else part(index))
    for streams in transformer.streams(layers, windows):
      last = streams
      bar.update()
    return outer, last

  bar.stage('predictions')
  source = rewritten.model
  source = source.rounded() if source.stored_as else source
  name = models.names.layer
  read = lambda index: source.outer() if index is None else source.read(name(index))
  expected = predicted(
    lambda index: structured.unflatten(transform_lib.widened(read(index)))
  )
  estimates = (4 ** offsets[x] * kl for x, kl in calibration.sensitivities.items())
  step, points = _next_step([Point(PROBE, sum(estimates), 1.0)], max_kl), list[Point]()
  while step is not None and len(points) < _EVALUATIONS:
    bar.stage(f'2^{step:g}')
    rounding = passes.Rounding(step, True, offsets, calibration.inputs)
    rounded = predicted(functools.partial(rewritten.decoded, rounding=rounding))
    points.append(
      Point(step, *perplexity.differences(config, windows, rounded, expected))
    )
    if not math.isfinite(points[-1].kl):
      raise ValueError('the predictions are not finite')
    del rounded
    step = _next_step(points, max_kl)
  bar.update(bar.total - bar.n)
  points.sort()
  below = [point for point in points if point.kl <= max_kl]
  if not below:
    text = f'has a divergence of {points[0].kl:.3g}, above {max_kl}; `free` keeps more'
    raise ValueError(f'the finest step, 2^{points[0].step:g}, {text}')
  return calibration._replace(curve=tuple(points), step=below[-1].step), below[-1]


def _next_step(points: list[Point], max_kl: float) -> float | None:
  """Returns the step to measure next; None if none is left between the bounds."""
  # The divergence is about proportional to 4^step, unless the dtype causes it.
  fine = [point.step for point in points if point.kl <= max_kl]
  coarse = [point.step for point in points if point.kl > max_kl]
  least = max(fine) + _PRECISION if fine else passes.FINEST
  most = min(coarse) - _PRECISION if coarse else 0.0
  if least > most:
    return None
  last = points[-1]
  step = last.step + math.log2(max_kl / max(last.kl, 1e-12)) / 2
  if len(points) >= _BY_LAW:
    step = (least + most) / 2
  step = math.floor(step / _PRECISION) * _PRECISION
  return float(min(max(step, least), most))
