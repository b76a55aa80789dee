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
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.evaluation import perplexity
from rotbits_jax.presets import sensitivities
from rotbits_jax.presets.near import near
from rotbits_jax.system import progress as progress_lib

PROBE = -5.0
"""The step at which the divergence of each parameter is estimated."""

MOST_OFFSET = 4.0
"""Bound of the offsets in octaves: a parameter may hardly cause any divergence."""

_PRECISION = 0.125  # octaves
_EVALUATIONS = 8


class Point(NamedTuple):
  """One measurement: the step, in octaves from the rms, and the mean KL in nats."""

  step: float
  kl: float


class Calibration(NamedTuple):
  """The result of `calibrate`.

  Attributes:
    offsets: octaves to add to the step, by the path of a parameter. Their mean over the
      numbers that rounding changes is about zero.
    sensitivities: about the mean KL in nats that each causes alone at the step `PROBE`.
    inputs: the inputs of matrices, see `passes.Rounding`.
  """

  offsets: dict[str, float]
  sensitivities: dict[str, float]
  inputs: dict[str, passes.Inputs]


class Found(NamedTuple):
  """The result of `search`.

  Attributes:
    step: the coarsest step whose measured divergence is below the bound.
    offsets: octaves to add to it, by the path of a parameter.
    curve: all measurements at such offsets, from the finest step on.
    sensitivities: about the divergence that each causes alone at the step `PROBE`.
    inputs: the inputs of matrices, see `passes.Rounding`.
  """

  step: float
  offsets: dict[str, float]
  curve: list[Point]
  sensitivities: dict[str, float]
  inputs: dict[str, passes.Inputs]

  @property
  def kl(self) -> float:
    """The mean divergence that was measured at the step."""
    return next(point.kl for point in self.curve if point.step == self.step)


def calibrate(
  model: models.Model,
  tokens: np.ndarray,
  *,
  max_tokens: int | None = 4096,
  progress: bool = False,
) -> Calibration:
  """Divides the bits among the parameters, see above.

  The whole model is held in memory, in its own dtype and in float32, and the
  moments of the inputs of every kernel `[in, out]`, float32 `[in, in]`.

  Args:
    model: the model.
    tokens: `[N]` token ids of the text on which divergences are measured.
    max_tokens: number of tokens to use; None for all.
    progress: whether to show the progress on stderr.

  Returns:
    The offsets and the measurements.
  """
  with progress_lib.Progress('calibrate', 1, 'step', show=progress) as bar:
    bar.stage('gradients')
    found = _Text.make(model, tokens, max_tokens).calibrate()
    bar.update()
    bar.finish()
  return found


def search(
  model: models.Model,
  tokens: np.ndarray,
  *,
  max_kl: float,
  max_tokens: int | None = 4096,
  calibrated: bool = True,
  progress: bool = False,
) -> Found:
  """Finds the coarsest steps that keep the mean divergence on a text below a bound.

  The whole model is held in memory, as in `calibrate`.

  Args:
    model: the model.
    tokens: `[N]` token ids of the text.
    max_kl: bound of the mean KL(model || rounded model) over the tokens, in nats.
    max_tokens: number of tokens to use; None for all.
    calibrated: whether each parameter gets its own offset, and matrices are rounded
      with error feedback, to a step for each line; else all offsets are zero, and
      numbers are rounded to the nearest multiples.
    progress: whether to show the progress on stderr.

  Returns:
    The step, the offsets and the measurements.

  Raises:
    ValueError: if the bound is not positive, or if not even the finest step is
      fine enough.
  """
  if not (math.isfinite(max_kl) and max_kl > 0):
    raise ValueError(f'max_kl must be positive and finite, got {max_kl}')
  with progress_lib.Progress('search', 2 + _EVALUATIONS, 'step', show=progress) as bar:
    bar.stage('compiling, removing gauges')
    text = _Text.make(model, tokens, max_tokens)
    bar.update()
    bar.stage('gradients')
    found = text.calibrate() if calibrated else Calibration({}, {}, {})
    bar.update()
    curve: dict[float, float] = {}
    step = PROBE
    while len(curve) < _EVALUATIONS and step not in curve:
      bar.stage(f'2^{step:g}')
      # No name keeps a rounded model, so that there is one of them at a time.
      curve[step] = text.divergence(text.rounded(step, found.offsets, found.inputs))
      bar.update()
      step = _next_step(curve, max_kl)
    bar.finish()
  below = [step for step, kl in curve.items() if kl <= max_kl]
  if not below:
    raise ValueError(
      f'no step from 2^{min(curve)} on keeps the divergence below {max_kl}: it is '
      f'{min(curve.values()):.3g}; a preset that keeps more is `free`'
    )
  points = [Point(step, curve[step]) for step in sorted(curve)]
  return Found(max(below), found.offsets, points, found.sensitivities, found.inputs)


class _Text(NamedTuple):
  """A text on which a model is compared with its rounded versions.

  Attributes:
    context: see `passes.make_context`.
    unrounded: the float32 model after the transforms of `near`.
    reference: the model.
    tokens: `[N]` token ids of the text.
    max_tokens: number of tokens to use; None for all.
  """

  context: passes.Context
  unrounded: models.Model
  reference: models.Model
  tokens: np.ndarray
  max_tokens: int | None

  @classmethod
  def make(
    cls, model: models.Model, tokens: np.ndarray, max_tokens: int | None
  ) -> '_Text':
    context = passes.make_context(model, stored_as=model.stored_as)
    unrounded = jax.device_put(_rewritten(context))
    reference = jax.device_put(dataclasses.replace(model.rounded(), buffers={}))
    return cls(context, unrounded, reference, tokens, max_tokens)

  def rounded(
    self,
    step: float,
    offsets: dict[str, float],
    inputs: dict[str, passes.Inputs],
  ) -> models.Model:
    """Rounds the model as the preset `near` does."""
    rounding = passes.to_steps(step, offsets, inputs)
    return jax.device_put(_rounded(self.unrounded, self.context, rounding))

  def divergence(self, model: models.Model) -> float:
    """Measures the divergence of a model from the reference."""
    references = {'model': self.reference}
    measured = evaluation.compare(
      {'rounded': model}, self.tokens, references, max_tokens=self.max_tokens
    )
    return measured['rounded'].kl['model']

  def calibrate(self) -> Calibration:
    """Estimates the divergence of each parameter, and divides the bits."""
    config = self.unrounded.config
    windows = perplexity.full_windows(self.tokens, config, self.max_tokens)
    inputs = sensitivities.measure(self.unrounded, windows)
    rounded = dict(self.rounded(PROBE, {}, inputs).leaves())
    exact = dict(self.unrounded.leaves())
    counts, found = {}, {}
    for path, leaf in exact.items():
      count = _count(leaf, rounded[path])
      if count and path in inputs:
        needed = [structured.materialize(exact[x]) for x in getattr(leaf, 'needs', ())]
        error = _error(leaf, rounded[path], *needed)
        counts[path] = count
        found[path] = sensitivities.divergence(inputs[path], error)
    return Calibration(_offsets(counts, found), found, inputs)


@jax.jit
def _error(leaf: Any, rounded: Any, *needed: jax.Array) -> jax.Array:
  array = lambda x: x.materialize(*needed) if structured.is_structured(x) else x
  return array(structured.astype(leaf, jnp.float32)) - array(
    structured.astype(rounded, jnp.float32)
  )


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
  elif coarse and not fine and step >= min(coarse):
    step = min(coarse) - 2 * _PRECISION
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
    for path, offset in offsets.items()
  }


def rewritten(model: models.Model) -> models.Model:
  """Applies the transforms of the preset `near`.

  Args:
    model: the model.

  Returns:
    The model with float32 parameters. Its `stored_as` is the dtype of most parameters
    of `model`.
  """
  return _rewritten(passes.make_context(model, stored_as=model.stored_as))


def _rewritten(context: passes.Context) -> models.Model:
  units = passes.rewrite(context.widened(), near().transform)
  result = passes.to_model(context.config, (unit for some, _ in units for unit in some))
  return dataclasses.replace(result, stored_as=context.dtype.name)


def _count(leaf: Any, rounded: Any) -> int:
  """Returns the numbers of a leaf with a matrix that rounding changed, or 0."""
  if structured.is_plain(rounded) and not structured.is_plain(leaf):
    leaf = structured.materialize(leaf)
  pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(rounded), strict=True)
  changed = any(passes.is_matrix(x) and bool((x != y).any()) for x, y in pairs)
  return structured.count_elements(leaf) if changed else 0


def _rounded(
  model: models.Model, context: passes.Context, rounding: passes.Rounding
) -> models.Model:
  """Rounds a float32 model as the encoder does."""
  own, chain = context._replace(source=model), passes.chain()
  records = passes.rewrite(own, chain, rounding=rounding)
  result = passes.to_model(
    model.config, (record for some, _ in records for record in some)
  )
  # Arrays in place of integers, so that one compiled program serves all steps.
  multiples = lambda x: isinstance(x, structured.UniformlyQuantized)
  params = jax.tree.map(
    lambda x: np.asarray(x.materialize()) if multiples(x) else x,
    result.params,
    is_leaf=multiples,
  )
  return dataclasses.replace(result, params=params)
