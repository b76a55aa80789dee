"""The search for the steps of the preset `near` that keep a divergence below a bound.

    model -> transforms of `near`, float32 -> steps -> divergence on a text

The divergence grows with the square of the steps. So the bits that a bound allows are
divided among the kinds of parameters as reverse water-filling does: if a kind of n
numbers causes the divergence k 4^s at the step s, the least bytes have

    s = log2(n / k) / 2 + constant

and each kind causes a divergence in proportion to its numbers. Each k is measured, by
rounding the parameters of this kind alone. Matrices are rounded with error feedback,
see `symmetries.steps`; the moments of their inputs are measured first.
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
from rotbits_jax.presets.near import near
from rotbits_jax.system import progress as progress_lib

PROBE = -5.0
"""The step at which the divergence of each kind is measured."""

MOST_OFFSET = 3.0
"""Bound of the offsets in octaves: the divergence of a kind may be close to zero."""

_PRECISION = 0.125  # octaves
_EVALUATIONS = 8


class Point(NamedTuple):
  """One measurement: the step, in octaves from the rms, and the mean KL in nats."""

  step: float
  kl: float


class Calibration(NamedTuple):
  """The result of `calibrate`.

  Attributes:
    offsets: octaves to add to the step, by kind of parameter. Their mean over the
      numbers that rounding changes is about zero.
    sensitivities: the mean KL in nats that each kind causes alone at the step `PROBE`.
    inputs: the inputs of matrices, see `passes.Rounding`.
  """

  offsets: dict[str, float]
  sensitivities: dict[str, float]
  inputs: dict[str, passes.Inputs]


class Found(NamedTuple):
  """The result of `search`.

  Attributes:
    step: the coarsest step whose measured divergence is below the bound.
    offsets: octaves to add to it, by kind of parameter.
    curve: all measurements at such offsets, from the finest step on.
    sensitivities: the divergence that each kind causes alone at the step `PROBE`.
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
  """Divides the bits among the kinds of parameters, see above.

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
  return _Text.make(model, tokens, max_tokens).calibrate(progress)


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
    calibrated: whether each kind of parameter gets its own offset, and matrices are
      rounded with error feedback; else all offsets are zero, and numbers are rounded to
      the nearest multiples.
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
    bar.stage('rounding each kind alone')
    found = text.calibrate(progress=False) if calibrated else Calibration({}, {}, {})
    bar.update()
    curve: dict[float, float] = {}
    step = PROBE
    while len(curve) < _EVALUATIONS and step not in curve:
      bar.stage(f'2^{step:g}')
      # No name keeps a rounded model, so that there is one of them at a time.
      curve[step] = text.compare(
        {'rounded': text.rounded(step, found.offsets, found.inputs)}
      )['rounded']
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

  def compare(
    self, compared: dict[str, models.Model], progress: bool = False
  ) -> dict[str, float]:
    """Measures the divergence of each model from the reference."""
    measured = evaluation.compare(
      compared,
      self.tokens,
      {'model': self.reference},
      max_tokens=self.max_tokens,
      progress=progress,
    )
    return {name: found.kl['model'] for name, found in measured.items()}

  def calibrate(self, progress: bool) -> Calibration:
    """Measures models in which one kind of parameters is rounded."""
    inputs = self.inputs()
    probe = self.rounded(PROBE, {}, inputs)
    kinds = _numbers(self.unrounded, probe)
    rounded = structured.flatten(probe.params)
    exact = {
      # All models have the same dtypes, so that one compiled program serves all.
      path: jax.tree.map(lambda x, y: x.astype(y.dtype), leaf, rounded[path])
      for path, leaf in structured.flatten(self.unrounded.params).items()
    }

    def alone(kind: str) -> models.Model:
      # Vectors have no kind in `kinds`, because they have no step.
      own = {
        path: exact[path]
        if models.names.pattern(path) in kinds.keys() - {kind}
        else rounded[path]
        for path in exact
      }
      params = structured.unflatten(own)
      return dataclasses.replace(self.unrounded, params=params)

    sensitivities = self.compare({kind: alone(kind) for kind in kinds}, progress)
    return Calibration(_offsets(kinds, sensitivities), sensitivities, inputs)

  def inputs(self) -> dict[str, passes.Inputs]:
    """Measures the inputs of the matrices that are plain arrays."""
    model = dataclasses.replace(self.unrounded, buffers={}, stored_as=None)
    total: Any = None
    for tokens, length in perplexity.windows(
      self.tokens, model.config, max_tokens=self.max_tokens
    ):
      if length == tokens.size:  # padding is no input
        moments = _input_moments(model, tokens)
        total = moments if total is None else jax.tree.map(jnp.add, total, moments)
    leaves = dict(model.leaves())
    of_layers = dataclasses.replace(model, params=jax.device_get(total))
    return {
      path: passes.Inputs(moments, 0 if path.endswith('/kernel') else 1)
      for path, moments in of_layers.leaves()
      if structured.is_plain(leaves[path])
    }


_input_moments = jax.jit(models.input_moments)


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


def _offsets(
  kinds: dict[str, int], sensitivities: dict[str, float]
) -> dict[str, float]:
  """Divides the bits, see above. The mean offset of a number is zero."""
  if not kinds:
    return {}
  # A divergence that rounding errors of the evaluation hide counts as a small one.
  least = max(sensitivities.values()) * 2.0 ** (-4 * MOST_OFFSET)
  offsets = {
    name: math.log2(count / max(sensitivities[name], least, 1e-12)) / 2
    for name, count in kinds.items()
  }
  total = sum(kinds.values())
  mean = sum(kinds[name] * offset for name, offset in offsets.items()) / total
  return {
    name: round(min(max(offset - mean, -MOST_OFFSET), MOST_OFFSET), 3)
    for name, offset in offsets.items()
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


def _numbers(model: models.Model, rounded: models.Model) -> dict[str, int]:
  """Counts the numbers of the matrices that rounding changed, by kind of parameter."""
  counts: dict[str, int] = {}
  results = dict(rounded.leaves())
  for path, leaf in model.leaves():
    pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(results[path]), strict=True)
    if any(passes.is_matrix(x) and bool((x != y).any()) for x, y in pairs):
      name = models.names.pattern(path)
      counts[name] = counts.get(name, 0) + structured.count_elements(leaf)
  return counts


def _rounded(
  model: models.Model, context: passes.Context, rounding: passes.Rounding
) -> models.Model:
  """Rounds a float32 model as the encoder does."""
  own, chain = context._replace(source=model), passes.chain()
  records = passes.rewrite(own, chain, rounding=rounding)
  return passes.to_model(
    model.config, (record for some, _ in records for record in some)
  )
