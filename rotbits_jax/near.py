"""The search for the steps of the preset `near` that keep a divergence below a bound.

    model -> transforms of `near`, float32 -> steps -> divergence on a text

The divergence grows with the square of the steps. So the bits that a bound allows are
divided among the kinds of parameters as reverse water-filling does: if a kind of n
numbers causes the divergence k 4^s at the step s, the least bytes have

    s = log2(n / k) / 2 + constant

and each kind causes a divergence in proportion to its numbers. Each k is measured, by
rounding the parameters of this kind alone.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import progress as progress_lib
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.symmetries import rounding as rounding_lib
from rotbits_jax.symmetries import transform

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


class Found(NamedTuple):
  """The result of `search`.

  Attributes:
    step: the coarsest step whose measured divergence is below the bound.
    offsets: octaves to add to it, by kind of parameter.
    curve: all measurements at such offsets, from the finest step on.
    sensitivities: the divergence that each kind causes alone at the step `PROBE`.
  """

  step: float
  offsets: dict[str, float]
  curve: list[Point]
  sensitivities: dict[str, float]


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

  The whole model is held in memory, in its own dtype and in float32.

  Args:
    model: the model.
    tokens: `[N]` token ids of the text.
    max_kl: bound of the mean KL(model || rounded model) over the tokens, in nats.
    max_tokens: number of tokens to use; None for all.
    calibrated: whether each kind of parameter gets its own offset; else all offsets are
      zero.
    progress: whether to show the progress on stderr.

  Returns:
    The step, the offsets and the measurements.

  Raises:
    ValueError: if the bound is not positive, or if no step from 2^-12 on is fine
      enough.
  """
  if not (math.isfinite(max_kl) and max_kl > 0):
    raise ValueError(f'max_kl must be positive and finite, got {max_kl}')
  context = symmetries.make_context(model, stored_as=model.stored_as)
  reference = model.rounded()
  unrounded = _rewritten(context)
  kinds = _numbers(unrounded) if calibrated else {}
  total = len(kinds) + _EVALUATIONS
  with progress_lib.Progress('search', total, 'evaluation', show=progress) as bar:

    def divergence(octaves: Callable[[str, np.dtype], float | None]) -> float:
      rounded = _rounded(unrounded, context, symmetries.Rounding(octaves, uniform=True))
      measured = evaluation.compare(
        {'rounded': rounded}, tokens, {'model': reference}, max_tokens=max_tokens
      )
      bar.update()
      return measured['rounded'].kl['model']

    def alone(name: str) -> float:
      octaves = symmetries.to_steps(PROBE).octaves

      def own(path: str, dtype: np.dtype) -> float | None:
        return octaves(path, dtype) if symmetries.kind(path) == name else None

      return divergence(own)

    sensitivities = {name: alone(name) for name in kinds}
    offsets = _offsets(kinds, sensitivities)
    curve: dict[float, float] = {}
    step = PROBE
    while len(curve) < _EVALUATIONS and step not in curve:
      curve[step] = divergence(symmetries.to_steps(step, offsets).octaves)
      step = _next_step(curve, max_kl)
  below = [step for step, kl in curve.items() if kl <= max_kl]
  if not below:
    raise ValueError(
      f'no step from 2^{min(curve)} on keeps the divergence below {max_kl}: it is '
      f'{min(curve.values()):.3g}; a preset that keeps more is `free`'
    )
  points = [Point(step, curve[step]) for step in sorted(curve)]
  return Found(max(below), offsets, points, sensitivities)


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
  return float(min(max(step, -12.0), 0.0))


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


def _rewritten(context: symmetries.Context) -> models.Model:
  """Applies the transforms of `near`; the parameters stay float32."""
  wide = {
    path: np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
    for path, dtype in context.dtypes.items()
  }
  wide_context = context._replace(dtypes=wide)
  rewritten = symmetries.rewrite(wide_context, presets.near().transform)
  return transform.to_model(
    context.config, (unit for units, _ in rewritten for unit in units)
  )


def _numbers(model: models.Model) -> dict[str, int]:
  """Counts the numbers of each kind of parameter that has matrices."""
  counts: dict[str, int] = {}
  trees = [('', model.outer())]
  trees += [(f'layers.{i}/', layer) for i, layer in enumerate(model.layers())]
  for prefix, tree in trees:
    for path, leaf in structured.flatten(tree).items():
      if any(rounding_lib.is_matrix(x) for x in jax.tree.leaves(leaf)):
        name = symmetries.kind(prefix + path)
        counts[name] = counts.get(name, 0) + structured.count_numbers(leaf)
  return counts


def _rounded(
  model: models.Model, context: symmetries.Context, rounding: symmetries.Rounding
) -> models.Model:
  """Rounds a float32 model as `rewrite` does."""

  def round_tree(tree: models.Params, prefix: str) -> models.Params:
    flat: dict[str, Any] = {}
    for path, leaf in structured.flatten(tree).items():
      dtype = context.dtypes.get(prefix + path, context.form)
      octaves = rounding.octaves(prefix + path, dtype)
      rounded, _ = symmetries.round_leaf(leaf, dtype, octaves, rounding.uniform)
      flat[path] = jax.device_get(rounded)
    return structured.unflatten(flat)

  layers = [round_tree(layer, f'layers.{i}/') for i, layer in enumerate(model.layers())]
  return models.from_layers(model.config, round_tree(model.outer(), ''), layers)
