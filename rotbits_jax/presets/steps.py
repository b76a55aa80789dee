"""The search for the steps of the preset `near` that keep a divergence below a bound.

    model -> transforms of `near`, float32 -> steps -> divergence on a text

The divergence grows with the square of the steps. So the bits that a bound allows are
divided among the parameters as reverse water-filling does: if a matrix of n numbers
causes the divergence k 4^s at the step s, the least bytes have

    s = log2(n / k) / 2 + constant

and each matrix causes a divergence in proportion to its numbers. Each k follows from
the errors of one rounding and the sensitivities of the predictions, see
`sensitivities`. By the same rule lines of a matrix have steps of their own, and it is
rounded with error feedback, see `symmetries.steps`.

The model is read layer by layer. A temporary file has the data for several uses: the
layers after the transforms, in float32; the moments of the inputs of kernels; and
the residual stream in front of each layer.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
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
_PASSES = 1, 3  # over the layers to calibrate: of a model without and with experts


class Point(NamedTuple):
  """One measurement: the step, in octaves from the rms, and the mean KL in nats."""

  step: float
  kl: float


class Calibration(NamedTuple):
  """The result of `calibrate`.

  Attributes:
    offsets: octaves to add to the step, by the path of a parameter, and by pattern for
      all experts of a mixture. Their mean over the numbers that rounding changes is
      about zero.
    sensitivities: about the mean KL in nats that each causes alone at the step `PROBE`.
    inputs: the inputs of matrices, see `passes.Rounding`.
  """

  offsets: dict[str, float]
  sensitivities: dict[str, float]
  inputs: Mapping[str, passes.Inputs]


class SearchResult(NamedTuple):
  """The result of `search`.

  Attributes:
    step: the coarsest one of the measured steps whose divergence is below the bound.
    offsets: octaves to add to it, by the path of a parameter.
    curve: all measurements at such offsets, from the finest step on.
    sensitivities: about the divergence that each causes alone at the step `PROBE`.
    inputs: the inputs of matrices, see `passes.Rounding`.
  """

  step: float
  offsets: dict[str, float]
  curve: list[Point]
  sensitivities: dict[str, float]
  inputs: Mapping[str, passes.Inputs]

  @property
  def kl(self) -> float:
    """The mean divergence that was measured at the step."""
    return next(point.kl for point in self.curve if point.step == self.step)


@host.own_settings()
def calibrate(
  model: passes.ModelSource,
  tokens: np.ndarray,
  *,
  max_tokens: int | None = 4096,
  tolerance: float = 0.7,
  folder: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> Calibration:
  """Divides the bits among the parameters, see above.

  Args:
    model: the model, in memory or on disk.
    tokens: `[N]` token ids of the text on which divergences are measured.
    max_tokens: number of tokens to use; None for all.
    tolerance: see `near`.
    folder: where the temporary file is; None for the system's folder for such files.
    progress: whether to show the progress on stderr.

  Returns:
    The offsets and the measurements. The moments of the inputs remain in the file.

  Raises:
    ValueError: if the tokens are not those of a text for this model.
    OSError: if the file cannot be written.
  """
  windows = perplexity.full_windows(tokens, model.config, max_tokens)
  count = (1 + _PASSES[model.config.num_experts > 0]) * (model.config.num_layers + 1)
  with progress_lib.Progress('calibrate', count, 'record', show=progress) as bar:
    context = _rewritten(model, tolerance, folder, bar)
    return _calibrated(context, windows, folder, bar)


@host.own_settings()
def search(
  model: passes.ModelSource,
  tokens: np.ndarray,
  *,
  max_kl: float,
  max_tokens: int | None = 4096,
  tolerance: float = 0.7,
  calibrated: bool = True,
  folder: str | os.PathLike[str] | None = None,
  progress: bool = False,
) -> SearchResult:
  """Finds the coarsest steps that keep the mean divergence on a text below a bound.

  Args:
    model: the model, in memory or on disk.
    tokens: `[N]` token ids of the text.
    max_kl: bound of the mean KL(model || rounded model) over the tokens, in nats.
    max_tokens: number of tokens to use; None for all.
    tolerance: see `near`.
    calibrated: whether each parameter gets its own offset, and matrices are rounded
      with error feedback, to a step for each line; else all offsets are zero, and
      numbers are rounded to the nearest multiples.
    folder: see `calibrate`.
    progress: whether to show the progress on stderr.

  Returns:
    The step, the offsets and the measurements.

  Raises:
    ValueError: if the bound is not positive, or if not even the finest step is
      fine enough.
    OSError: see `calibrate`.
  """
  if not (math.isfinite(max_kl) and max_kl > 0):
    raise ValueError(f'max_kl must be positive and finite, got {max_kl}')
  config = model.config
  cut = perplexity.windows(tokens, config, max_tokens=max_tokens)
  full = perplexity.full_windows(tokens, config, max_tokens)
  count = 2 + calibrated * _PASSES[config.num_experts > 0] + _EVALUATIONS
  count *= config.num_layers + 1
  with progress_lib.Progress('search', count, 'record', show=progress) as bar:
    context = _rewritten(model, tolerance, folder, bar)
    found = Calibration({}, {}, {})
    if calibrated:
      found = _calibrated(context, full, folder, bar)
    bar.stage('predictions')
    reference, windows = _Arrays.of(_own(model)), [window for window, _ in cut]
    expected = _last_streams(reference, windows, bar)
    curve: dict[float, float] = {}
    step = PROBE
    if calibrated:
      estimates = (4 ** found.offsets[x] * kl for x, kl in found.sensitivities.items())
      step = _next_step({PROBE: sum(estimates)}, max_kl)
    while len(curve) < _EVALUATIONS and step not in curve:
      bar.stage(f'2^{step:g}')
      rounding = passes.to_steps(step, found.offsets, found.inputs)
      rounded = _Arrays.rounded(context, rounding)
      last = _last_streams(rounded, windows, bar)
      curve[step] = perplexity.mean_divergence(
        config,
        (reference.outer(), expected),
        (rounded.outer(), last),
        [length for _, length in cut],
      )
      if not math.isfinite(curve[step]):
        raise ValueError('the predictions are not finite')
      del rounded, last
      step = _next_step(curve, max_kl)
    bar.finish()
  below = [step for step, kl in curve.items() if kl <= max_kl]
  if not below:
    step = min(curve)
    raise ValueError(
      f'the finest step, 2^{step:g}, has a divergence of {curve[step]:.3g}, above '
      f'{max_kl}; a preset that keeps more is `free`'
    )
  points = [Point(step, curve[step]) for step in sorted(curve)]
  return SearchResult(
    max(below), found.offsets, points, found.sensitivities, found.inputs
  )


class _Arrays(NamedTuple):
  """A model that is read part by part, as the forward pass takes it, see `_arrays`."""

  config: models.ModelConfig
  layer: Callable[[int], models.Params]
  outer: Callable[[], models.Params]

  @classmethod
  def of(cls, model: passes.ModelSource) -> '_Arrays':
    return cls(
      model.config,
      lambda index: structured.unflatten(
        _arrays(models.read_layer(model.read, model.config, index))
      ),
      lambda: structured.unflatten(_arrays(model.outer())),
    )

  @classmethod
  def rounded(cls, context: passes.Context, rounding: passes.Rounding) -> '_Arrays':
    """Returns a model that is rounded part by part, as the preset `near` does it.

    Its leaves become arrays whose numbers are rounded to the dtype of the checkpoint,
    too, as `decode` does it.
    """

    def part(name: str | None) -> models.Params:
      leaves = _arrays(passes.round_part(context, name, rounding))
      arrays = structured.expand(leaves, keep_factors=True)
      stored = {
        path: structured.astype(leaf, context.dtypes.get(path, context.dtype))
        for path, leaf in arrays.items()
      }
      return structured.unflatten(structured.astype(stored, np.float32))

    outer = part(None)  # it is needed before the layers and after them
    layer = functools.partial(models.read_layer, part, context.config)
    return cls(context.config, layer, lambda: outer)


def _arrays(params: models.Params) -> dict[str, Any]:
  """Returns parameters in float32 on the device, by path.

  Arrays take the place of integers, so that one compiled program serves all steps.
  """
  plain = lambda x: structured.materialize(x) if structured.is_in_files(x) else x
  return passes.widened(jax.tree.map(plain, params, is_leaf=structured.is_structured))


def _own(model: Any) -> Any:
  """Returns the model in its own dtype."""
  return model.rounded() if getattr(model, 'stored_as', None) else model


def _last_streams(
  model: models.Layers, windows: Sequence[np.ndarray], bar: progress_lib.Progress
) -> list[jax.Array]:
  """Returns the residual stream of each window after the last layer."""
  last: list[jax.Array] = []
  for xs in models.streams(model, windows):
    last = xs
    bar.update()
  return last


def _rewritten(
  model: Any,
  tolerance: float,
  folder: str | os.PathLike[str] | None,
  bar: progress_lib.Progress,
) -> passes.Context:
  """Applies the transforms of `near`; the result is the source of the context."""
  transform = near(tolerance=tolerance).transform
  bar.stage('compiling, removing gauges')
  context = passes.make_context(model, stored_as=getattr(model, 'stored_as', None))
  parts: Any = passes.Parts(context.config, spool.Spool(folder))
  for records, _ in passes.rewrite(context.widened(), transform):
    parts.add(records)
    bar.update(models.names.expert_index(records[0].name) is None)
  return context._replace(source=parts)


def _calibrated(
  context: passes.Context,
  windows: Sequence[np.ndarray],
  folder: str | os.PathLike[str] | None,
  bar: progress_lib.Progress,
) -> Calibration:
  """Estimates the divergence of each parameter, and divides the bits."""
  bar.stage('gradients')
  inputs = sensitivities.OnDisk(folder)
  counts, found = {}, {}
  parts: Any = context.source
  # Feedback fits the text that it has seen. So errors are made with one half of it, and
  # the other half tells their cost.
  halves = [half for half in (windows[::2], windows[1::2]) if half]
  measured = (
    sensitivities.measure(_Arrays.of(parts), half, spool.Spool(folder))
    for half in halves
  )
  for seen, *unseen in zip(*measured, strict=True):
    inputs.add(sensitivities.fitted([seen, *unseen], halves))
    index = models.names.layer_index(next(iter(seen)))
    name = None if index is None else models.names.layer(index)
    rounding = passes.to_steps(PROBE, {}, sensitivities.fitted([seen], halves[:1]))
    exact = _arrays(parts.outer() if name is None else parts.read(name))
    rounded = _arrays(passes.round_part(context, name, rounding))
    for path, own_inputs in (unseen or [seen])[0].items():
      leaf = exact[path]
      count = _count(leaf, rounded[path])
      if count:
        needed = [structured.materialize(exact[x]) for x in getattr(leaf, 'needs', ())]
        error = _error(leaf, rounded[path], *needed)
        counts[path] = count
        found[path] = sensitivities.divergence(own_inputs, error)
    bar.update()
  for path, (count, kl) in _of_experts(context, windows, bar).items():
    counts[path], found[path] = count, kl
  return Calibration(_offsets(counts, found), found, inputs)


def _of_experts(
  context: passes.Context, windows: Sequence[np.ndarray], bar: progress_lib.Progress
) -> dict[str, tuple[int, float]]:
  """Returns how many numbers the experts have, and the divergence, by pattern.

  Gradients do not reach them, because a token has few experts. So the predictions are
  measured with all of them at the step `PROBE`.
  """
  config = context.config
  paths = models.layout.expert_axes(config)
  if not paths:
    return {}
  bar.stage('experts')

  def log2_step(path: str, dtype: np.dtype) -> float:
    del dtype
    return passes.FINEST if models.names.expert_index(path) is None else PROBE

  rounding = passes.Rounding(log2_step, uniform=True)
  both = _Arrays.of(context.source), _Arrays.rounded(context, rounding)
  exact, rounded = ((x.outer(), _last_streams(x, windows, bar)) for x in both)
  kl = perplexity.mean_divergence(config, exact, rounded, [x.size for x in windows])
  layers = [models.layer_shapes(config, i) for i in range(config.num_layers)]
  counts = {
    path: sum(math.prod(structured.flatten(shapes)[path]) for shapes in layers)
    for path in paths
  }
  whole = sum(counts.values())
  return {f'layers.*/{path}': (n, kl * n / whole) for path, n in counts.items()}


@jax.jit
def _error(leaf: Any, rounded: Any, *needed: jax.Array) -> jax.Array:
  array = lambda x: x.materialize(*needed) if structured.is_structured(x) else x
  given = array(leaf)
  # Tokens that no text has may have other numbers, which are kept.
  return jnp.where(jnp.isfinite(given), given - array(rounded), 0)


def _next_step(curve: dict[float, float], max_kl: float) -> float:
  """Returns the step to measure next: one that is measured already, to stop."""
  fine = [step for step, kl in curve.items() if kl <= max_kl]
  coarse = [step for step, kl in curve.items() if kl > max_kl]
  # The divergence is about proportional to 4^step.
  last = max(fine) if fine else min(coarse)
  guess = last + math.log2(max_kl / max(curve[last], 1e-12)) / 2
  step = math.floor(guess / _PRECISION) * _PRECISION
  if fine and coarse and not max(fine) < step < min(coarse):
    middle = (max(fine) + min(coarse)) / 2
    step = math.floor(middle / _PRECISION) * _PRECISION
  elif fine and not coarse and step == last:
    step = last + _PRECISION
  elif coarse and not fine:
    if step >= min(coarse):
      step = min(coarse) - 2 * _PRECISION
    # Another cause, such as the dtype, may make most of the divergence.
    step = min(step, min(coarse) - _PRECISION * 2 ** max(len(coarse) - 2, 0))
    if len(coarse) == _EVALUATIONS - 1:
      step = passes.FINEST
  return float(min(max(step, passes.FINEST), 0.0))


def _offsets(counts: dict[str, int], divergences: dict[str, float]) -> dict[str, float]:
  """Divides the bits, see above. The mean offset of a number is zero."""
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


def rewritten(model: models.Model) -> models.Model:
  """Applies the transforms of the preset `near`.

  Args:
    model: the model.

  Returns:
    The model with float32 parameters. Its `stored_as` is the dtype of most parameters
    of `model`.
  """
  context = passes.make_context(model, stored_as=model.stored_as)
  units = passes.rewrite(context.widened(), near().transform)
  result = passes.to_model(context.config, (unit for some, _ in units for unit in some))
  return dataclasses.replace(result, stored_as=context.dtype.name)


def _count(leaf: Any, rounded: Any) -> int:
  """Returns the numbers of a leaf with a matrix that a step changed, or 0."""
  if isinstance(rounded, structured.Tied):
    return 0
  if structured.is_plain(rounded) and not structured.is_plain(leaf):
    leaf = structured.materialize(leaf)
  pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(rounded), strict=True)
  changed = any(passes.is_matrix(x) and bool((x != y).any()) for x, y in pairs)
  return structured.count_elements(leaf) if changed else 0
