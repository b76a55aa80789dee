"""Calibration of the preset `near`: its steps, for a bound of the divergence.

    model -> transforms of `near`, float32 -> steps -> divergence on a text

The divergence grows with the square of the steps. So the bits that a bound allows are
divided among the parameters as reverse water-filling does: if a matrix of n numbers
causes the divergence k 4^s at the step s, the least bytes have

    s = log2(n / k) / 2 + constant

and each matrix causes a divergence in proportion to its numbers. Each k follows from
the errors of one rounding and the sensitivities of the predictions, see
`sensitivities`. By the same rule lines of a matrix have steps of their own, and it is
rounded with error feedback, see `symmetries.steps`.

The model is read layer by layer. Temporary files have the data for several uses: the
layers after the transforms, in float32; the moments of the inputs of kernels; and
the residual stream in front of each layer.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.evaluation import perplexity
from rotbits_jax.models import transformer
from rotbits_jax.presets import sensitivities
from rotbits_jax.presets.near import near
from rotbits_jax.system import host
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.system import spool

PROBE = -5.0
"""The step at which the divergence of each parameter is estimated."""

MOST_OFFSET = 4.0
"""Bound of the offsets in octaves: a parameter may hardly cause any divergence."""

_PRECISION = 0.125  # octaves
_EVALUATIONS = 8
_BY_LAW = 4  # evaluations before the range is halved instead


_Part = Callable[[str | None], models.Params]


class Point(NamedTuple):
  """One measurement: the step, in octaves from the rms, and the mean KL in nats."""

  step: float
  kl: float


class Calibration(NamedTuple):
  """The result of `calibrate`: options of `near`, and the measurements behind them.

  Attributes:
    offsets: octaves to add to the step, by the path of a parameter. Their mean over the
      numbers that rounding changes is about zero.
    inputs: the inputs of matrices, see `passes.Rounding`.
    sensitivities: about the mean KL in nats that each causes alone at the step `PROBE`.
    curve: with a bound, all steps that were measured, from the finest one on.
    step: with a bound, the coarsest one of these whose divergence is below it.
  """

  offsets: dict[str, float]
  inputs: Mapping[str, passes.Inputs]
  sensitivities: dict[str, float]
  curve: tuple[Point, ...] = ()
  step: float | None = None

  @property
  def kl(self) -> float:
    """The mean divergence that was measured at the step."""
    assert self.step is not None
    return dict(self.curve)[self.step]

  @property
  def options(self) -> dict[str, Any]:
    """The options of `near`, with the step if there is one."""
    options = {'offsets': self.offsets, 'inputs': self.inputs, 'step': self.step}
    return {name: value for name, value in options.items() if value is not None}


@host.own_settings()
def calibrate(
  model: passes.ModelSource,
  tokens: np.ndarray,
  *,
  max_kl: float | None = None,
  max_tokens: int | None = 4096,
  tolerance: float = 0.7,
  folder: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> Calibration:
  """Divides the bits among the parameters, and finds the coarsest steps for a bound.

  Args:
    model: the model, in memory or on disk.
    tokens: `[N]` token ids of the text on which divergences are measured.
    max_kl: bound of the mean KL(model || rounded model) over the tokens, in nats; None
      for no search.
    max_tokens: number of tokens to use; None for all.
    tolerance: see `near`.
    folder: where temporary files are; None for the system's folder for such files.
    progress: whether to show the progress on stderr.

  Returns:
    The options and measurements. The moments of the inputs remain in a file.

  Raises:
    ValueError: if the tokens are not those of a text for this model, if the bound is
      not positive, or if no measured step is fine enough.
    OSError: if a file cannot be written.
  """
  if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
    raise ValueError(f'max_kl must be positive and finite, got {max_kl}')
  cut = perplexity.windows(tokens, model.config, max_tokens=max_tokens)
  count = 2 if max_kl is None else 3 + _EVALUATIONS
  count *= model.config.num_layers + 1
  with progress_lib.Progress('calibrate', count, 'record', show=progress) as bar:
    context, part = _rewritten(model, tolerance, folder, bar)
    calibration = _calibrated(context, part, cut, folder, bar)
    if max_kl is not None:
      calibration = _searched(calibration, model, context, part, cut, max_kl, bar)
  return calibration


def _searched(
  calibration: Calibration,
  model: Any,
  context: passes.Context,
  part: _Part,
  cut: Sequence[tuple[np.ndarray, int]],
  max_kl: float,
  bar: progress_lib.Progress,
) -> Calibration:
  """Adds the coarsest step that keeps the bound, and all that were measured."""
  offsets, config = calibration.offsets, model.config
  windows, lengths = [window for window, _ in cut], [length for _, length in cut]
  bar.stage('predictions')
  stored = model.rounded() if getattr(model, 'stored_as', None) else model
  reference = _Arrays.of(
    config, lambda name: stored.read(name) if name else stored.outer()
  )
  expected = reference.outer(), _last_streams(reference, windows, bar)
  estimates = (4 ** offsets[x] * kl for x, kl in calibration.sensitivities.items())
  step = _next_step({PROBE: sum(estimates)}, max_kl)
  curve: dict[float, float] = {}
  while step is not None and len(curve) < _EVALUATIONS:
    bar.stage(f'2^{step:g}')
    rounding = passes.to_steps(step, offsets, calibration.inputs)
    rounded = _Arrays.rounded(context, part, rounding)
    predicted = rounded.outer(), _last_streams(rounded, windows, bar)
    curve[step] = perplexity.mean_divergence(config, expected, predicted, lengths)
    if not math.isfinite(curve[step]):
      raise ValueError('the predictions are not finite')
    del rounded, predicted
    step = _next_step(curve, max_kl)
  bar.update(bar.total - bar.n)
  points = tuple(Point(step, curve[step]) for step in sorted(curve))
  below = [point.step for point in points if point.kl <= max_kl]
  if not below:
    raise ValueError(
      f'the finest step, 2^{points[0].step:g}, has a divergence of '
      f'{points[0].kl:.3g}, above {max_kl}; a preset that keeps more is `free`'
    )
  return calibration._replace(curve=points, step=below[-1])


class _Arrays(NamedTuple):
  """A model that is read part by part, as the forward pass takes it, see `_arrays`.

  Attributes:
    config: sizes and switches.
    part: returns a layer by the name of its record, and those outside the layers for
      None: nested dicts whose keys are names of records.
  """

  config: models.ModelConfig
  part: _Part

  @classmethod
  def of(cls, config: models.ModelConfig, part: _Part) -> '_Arrays':
    """Returns a model whose parts are stored in any form."""
    return cls(config, lambda name: structured.unflatten(_arrays(part(name))))

  @classmethod
  def rounded(
    cls, context: passes.Context, part: _Part, rounding: passes.Rounding
  ) -> '_Arrays':
    """Returns a model that is rounded part by part, as the preset `near` does it.

    Its leaves become arrays whose numbers are rounded to the dtype of the checkpoint,
    too, as `decode` does it.
    """

    def rounded_part(name: str | None) -> models.Params:
      leaves = _rounded(context, part(name), rounding)
      arrays = structured.expand(leaves, keep_factors=True)
      stored = {
        path: structured.astype(leaf, context.dtypes.get(path, context.dtype))
        for path, leaf in arrays.items()
      }
      return structured.unflatten(structured.astype(stored, np.float32))

    outer = rounded_part(None)  # it is needed before the layers and after them
    return cls(context.config, lambda name: rounded_part(name) if name else outer)

  def layer(self, index: int) -> models.Params:
    """Returns the parameters of a layer."""
    name = models.names.layer(index)
    layer: models.Params = self.part(name)[name]
    return layer

  def outer(self) -> models.Params:
    """Returns the parameters outside the layers."""
    return self.part(None)


def _rounded(
  context: passes.Context, part: models.Params, rounding: passes.Rounding
) -> dict[str, Any]:
  """Rounds a part of a model as `passes.rewrite` does; returns arrays by path."""
  params, *_ = passes.round_params(rounding, passes.widened(part), context)
  return _arrays(structured.unflatten(params))


def _arrays(params: models.Params) -> dict[str, Any]:
  """Returns parameters in float32 on the device, by path.

  Arrays take the place of integers, so that one compiled program serves all steps.
  """
  plain = lambda x: structured.materialize(x) if structured.is_in_files(x) else x
  return passes.widened(jax.tree.map(plain, params, is_leaf=structured.is_structured))


def _last_streams(
  model: transformer.Layers, windows: Sequence[np.ndarray], bar: progress_lib.Progress
) -> list[jax.Array]:
  """Returns the residual stream of each window after the last layer."""
  last: list[jax.Array] = []
  for xs in transformer.streams(model, windows):
    last = xs
    bar.update()
  return last


def _rewritten(
  model: Any,
  tolerance: float,
  folder: str | os.PathLike[str] | None,
  bar: progress_lib.Progress,
) -> tuple[passes.Context, _Part]:
  """Applies the transforms of `near`; returns the parts of the result, too."""
  transform = near(tolerance=tolerance).transform
  bar.stage('compiling, removing gauges')
  context = passes.make_context(model, stored_as=getattr(model, 'stored_as', None))
  parts = spool.Spool(folder)
  for records, _ in passes.rewrite(context, transform, rounding=passes.FLOAT32):
    is_layer = models.names.layer_index(records[0].name) is not None
    params = {name: x for record in records for name, x in record.params.items()}
    parts[records[0].name if is_layer else None] = params
    bar.update()
  return context, lambda name: parts[name]


def _calibrated(
  context: passes.Context,
  part: _Part,
  cut: Sequence[tuple[np.ndarray, int]],
  folder: str | os.PathLike[str] | None,
  bar: progress_lib.Progress,
) -> Calibration:
  """Estimates the divergence of each parameter, and divides the bits."""
  # Padding is no input whose statistics are of interest.
  windows = [window for window, length in cut if length == window.size]
  bar.stage('gradients')
  inputs: dict[str, passes.Inputs] = {}
  counts, divergences, store = {}, {}, spool.Spool(folder).stored
  rewritten_model = _Arrays.of(context.config, part)
  # Feedback fits the text that it has seen. So errors are made with one half of it, and
  # the other half tells their cost.
  halves = [half for half in (windows[::2], windows[1::2]) if half]
  measured = (
    sensitivities.measure(rewritten_model, half, spool.Spool(folder)) for half in halves
  )
  for seen, *unseen in zip(*measured, strict=True):
    inputs |= sensitivities.fitted([seen, *unseen], halves, store)
    index = models.names.layer_index(next(iter(seen)))
    name = None if index is None else models.names.layer(index)
    rounding = passes.to_steps(PROBE, {}, sensitivities.fitted([seen], halves[:1]))
    exact = _arrays(part(name))
    rounded = _rounded(context, part(name), rounding)
    for path, matrix_inputs in (unseen or [seen])[0].items():
      leaf = exact[path]
      count = _count(leaf, rounded[path])
      if count:
        needed = [structured.materialize(exact[x]) for x in getattr(leaf, 'needs', ())]
        error = _error(leaf, rounded[path], *needed)
        counts[path] = count
        divergences[path] = sensitivities.divergence(matrix_inputs, error)
    bar.update()
  return Calibration(_offsets(counts, divergences), inputs, divergences)


@jax.jit
def _error(leaf: Any, rounded: Any, *needed: jax.Array) -> jax.Array:
  """Returns the error of the array of a leaf."""
  array = lambda x: x.materialize(*needed) if structured.is_structured(x) else x
  exact = array(leaf)
  # Tokens that no text has may have other numbers, which are kept.
  return jnp.where(jnp.isfinite(exact), exact - array(rounded), 0)


def _next_step(curve: dict[float, float], max_kl: float) -> float | None:
  """Returns the step to measure next; None if none is left between the bounds.

  The divergence is about proportional to 4^step. Where another cause makes most of it,
  such as the dtype, the range of steps is halved.
  """
  fine = [step for step, kl in curve.items() if kl <= max_kl]
  coarse = [step for step, kl in curve.items() if kl > max_kl]
  least = max(fine) + _PRECISION if fine else passes.FINEST
  most = min(coarse) - _PRECISION if coarse else 0.0
  if least > most:
    return None
  last, kl = list(curve.items())[-1]
  step = last + math.log2(max_kl / max(kl, 1e-12)) / 2
  if len(curve) >= _BY_LAW:
    step = (least + most) / 2
  step = math.floor(step / _PRECISION) * _PRECISION
  return float(min(max(step, least), most))


def _offsets(counts: dict[str, int], divergences: dict[str, float]) -> dict[str, float]:
  """Divides the bits, see above. The mean offset over all numbers is zero."""
  if not counts:
    return {}
  # A divergence that is close to zero counts as a small one.
  least = max(divergences.values()) * 2.0 ** (-4 * MOST_OFFSET)
  offsets = {
    path: math.log2(count / max(divergences[path], least, 1e-12)) / 2
    for path, count in counts.items()
  }
  total = sum(counts.values())
  mean = sum(counts[path] * offset for path, offset in offsets.items()) / total
  return {
    path: round(min(max(offset - mean, -MOST_OFFSET), MOST_OFFSET), 3)
    for path, offset in sorted(offsets.items())
  }


def _count(leaf: Any, rounded: Any) -> int:
  """Returns the numbers of a leaf with a matrix that a step changed, or 0."""
  if isinstance(rounded, structured.Tied):
    return 0
  if structured.is_plain(rounded) and not structured.is_plain(leaf):
    leaf = structured.materialize(leaf)
  pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(rounded), strict=True)
  changed = any(passes.is_matrix(x) and bool((x != y).any()) for x, y in pairs)
  return structured.count_elements(leaf) if changed else 0
