"""Presets: ways to rewrite and code a model. Each preset has options of its own.

free    keeps the function of the model up to rounding, and removes redundant numbers
exact   keeps every bit of the input
near    removes the same numbers as `free`, and rounds the others more coarsely, so that
        the function changes a little and the file is much smaller
paper   keeps the function up to rounding, and saves bits by rotating the model, as
        published

A gauge is a choice of coordinates that does not change the function of a model. A
transform rewrites a model so that fewer numbers need to be stored; see `symmetries`.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

from rotbits_jax import models
from rotbits_jax import passes


class Preset(NamedTuple):
  """A way to rewrite and code a model.

  Attributes:
    name: the name of the preset in the file.
    options: JSON values that the file keeps as a record of how it was made.
    transform: the transform that rewrites the model, see `passes.chain`.
    rounding: how numbers are rounded after the transforms, which see float32 numbers.
      None if the transforms see the numbers in their stored dtype and keep them.
    order_neurons: whether the neurons of an MLP are stored in an order that saves bits.
    message: the options of the published scheme, if the whole model is coded as one
      message by bits-back coding; else None.
    by_options: whether name and options determine everything else. Only then can a run
      continue the work of an interrupted run with the same options.
  """

  name: str
  options: dict[str, Any]
  transform: passes.Transform
  rounding: passes.Rounding | None = passes.NEAREST
  order_neurons: bool = False
  message: Any = None
  by_options: bool = False

  @property
  def names(self) -> tuple[str, ...]:
    """The names of the savings, in order. The report has a line for each."""
    return self.transform.names


def free(
  *,
  tolerance: float = 0.7,
  floor: float | None = 0.0,
  transforms: tuple[passes.Transform, ...] = (),
) -> Preset:
  """Makes the preset that fixes every gauge, rounds once, and codes the other numbers.

  The function of the model stays the same up to rounding; its numbers change.

  Args:
    tolerance: see `passes.remove_residual_gauge`.
    floor: see the offset of `passes.with_minimum_exponent`; None to round every number
      to the nearest number of its dtype.
    transforms: further transforms, applied after those of the preset.

  Returns:
    The preset.

  Raises:
    ValueError: if the tolerance is negative, or a number is not finite.
  """
  if not (math.isfinite(tolerance) and tolerance >= 0):
    raise ValueError(f'tolerance must be finite and not negative, got {tolerance}')
  if not (floor is None or math.isfinite(floor)):
    raise ValueError(f'floor must be finite or None, got {floor}')
  transform = _without_gauges(tolerance, transforms)
  return Preset(
    name='free',
    options={
      'tolerance': float(tolerance),
      'floor': None if floor is None else float(floor),
    },
    transform=transform,
    rounding=passes.NEAREST if floor is None else passes.with_minimum_exponent(floor),
    order_neurons=True,
    by_options=not transforms,
  )


def near(
  *,
  step: float = -5.0,
  offsets: Mapping[str, float] | None = None,
  inputs: Mapping[str, passes.Inputs] | None = None,
  tolerance: float = 0.7,
  transforms: tuple[passes.Transform, ...] = (),
) -> Preset:
  """Makes the preset for nearly the same function in far fewer bytes.

  It fixes every gauge as `free` does. Then it rounds the numbers of each array to
  multiples of one step, so that a number costs few bits. A matrix that no transform
  changed is packed instead if that takes fewer bytes, see `file.packing`.

  Args:
    step: log2 of the ratio of the step to the root mean square of an array's numbers,
      at least `passes.FINEST`.
    offsets: octaves to add to `step`, by kind of parameter, see `models.names.pattern`.
      `near.search` finds good ones.
    inputs: see `passes.Rounding`; `near.search` measures them.
    tolerance: see `passes.remove_residual_gauge`.
    transforms: further transforms, applied after those of the preset.

  Returns:
    The preset.

  Raises:
    ValueError: if the tolerance is negative, if a number is not finite, or if the step
      is too fine to save bytes.
  """
  offsets = {} if offsets is None else dict(offsets)
  for name, value in {'step': step, **offsets}.items():
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
      raise ValueError(f'{name} must be a finite number, got {value!r}')
  if step < passes.FINEST:
    raise ValueError(
      f'step must be at least {passes.FINEST:g}, got {step}: `free` keeps more'
    )
  if not (math.isfinite(tolerance) and tolerance >= 0):
    raise ValueError(f'tolerance must be finite and not negative, got {tolerance}')
  # The step makes far greater errors than the format that this factor is about.
  transform = _without_gauges(tolerance, transforms, heads=3.0)
  return Preset(
    name='near',
    options={
      'step': float(step),
      'offsets': offsets,
      'feedback': bool(inputs),
      'tolerance': float(tolerance),
    },
    transform=transform,
    rounding=passes.to_steps(step, offsets, inputs),
    order_neurons=True,
    by_options=not (transforms or inputs),
  )


def _without_gauges(
  tolerance: float,
  transforms: tuple[passes.Transform, ...],
  heads: float | None = None,
) -> passes.Transform:
  """Returns the transform that fixes every gauge, and further ones after it.

  Args:
    tolerance: see `passes.remove_residual_gauge`.
    transforms: the further ones.
    heads: see the tolerance of `passes.remove_value_gauge`.
  """
  return passes.chain(
    # Rotations come first, because the other transforms look for structure in the
    # coordinates that they choose.
    passes.remove_residual_gauge(tolerance=tolerance),
    passes.retie_embedding(),
    passes.remove_biases(),
    passes.remove_value_gauge(tolerance=heads),
    passes.remove_query_key_gauge(tolerance=heads),
    passes.remove_low_rank_gauge(),
    *transforms,
  )


def exact(*, transforms: tuple[passes.Transform, ...] = ()) -> Preset:
  """Makes the preset that keeps every bit of the input.

  If the embedding can be predicted from the head, it is stored as the difference from
  the prediction, in small integers.

  Args:
    transforms: further transforms, applied before that of the preset. They see the
      numbers in their stored dtype.

  Returns:
    The preset.
  """
  # It comes last, because the embedding is predicted from the final head.
  transform = passes.chain(*transforms, passes.retie_exactly())
  return Preset(
    name='exact',
    options={},
    transform=transform,
    rounding=None,
    by_options=not transforms,
  )


def paper(
  *,
  canonicaliser: str = 'polar_shortcut',
  rotation_codec: str = 'haar',
  correction: str = 'exact',
  threshold: float = 1e-3,
  entropy: bool = False,
  transforms: tuple[passes.Transform, ...] = (),
) -> Preset:
  """Makes the preset of the published scheme, see `rotbits_jax.paper`.

  The model is rotated and rounded, so its numbers change, but not its function up to
  rounding. Bits of the message choose the rotations, and the decoder gets them back.

  Args:
    canonicaliser: how the decoder recovers a rotation: 'polar_shortcut', 'qr' or 'svd'
      (published).
    rotation_codec: how a rotation is sampled: 'haar' or 'symmetric_eig' (published).
    correction: 'exact', or 'threshold' (published), which leaves errors of up to
      `threshold` in the numbers from which rotations were sampled.
    threshold: see `correction`.
    entropy: whether numbers are entropy coded.
    transforms: must be empty, because transforms make structured leaves.

  Returns:
    The preset.

  Raises:
    ValueError: if an option is unknown, or if two options cannot be combined.
  """
  from rotbits_jax.paper import Options  # its linear algebra is slow to import

  if transforms:
    raise ValueError(
      "the preset 'paper' takes no transforms, because it codes only plain arrays"
    )
  names = {
    'canonicaliser': canonicaliser,
    'rotation_codec': rotation_codec,
    'correction': correction,
  }
  for name, value in names.items():
    if value not in CHOICES[name]:
      known = ', '.join(CHOICES[name])
      raise ValueError(f'{name} must be one of {known}, got {value!r}')
  lossy = correction == 'threshold'
  options = Options(
    canonicaliser=canonicaliser,
    rotation_codec=rotation_codec,
    threshold=float(threshold) if lossy else None,
    entropy=entropy,
  ).check()
  return Preset(
    name='paper',
    options={**names, 'threshold': float(threshold), 'entropy': entropy},
    transform=passes.make('rotations'),
    message=options,
  )


CHOICES = {
  'canonicaliser': ('polar_shortcut', 'qr', 'svd'),
  'rotation_codec': ('haar', 'symmetric_eig'),
  'correction': ('exact', 'threshold'),
}
"""The values of the options of the preset `paper` that are names."""

PRESETS: dict[str, Callable[..., Preset]] = {
  'free': free,
  'exact': exact,
  'near': near,
  'paper': paper,
}
"""Functions that take options and make a preset, by the name of the preset."""


def default(config: models.ModelConfig | None) -> str:
  """Returns the name of the preset that suits a checkpoint.

  Args:
    config: of the model; None for plain arrays.

  Returns:
    'free' for a sliced model, in which a fifth of the numbers and more is redundant;
    else 'exact', because on a dense model `free` changes numbers and saves little.
  """
  return 'free' if config is not None and config.sliced else 'exact'


def make(preset: str | Preset, **options: Any) -> Preset:
  """Makes a preset from its name, or returns a given preset.

  Args:
    preset: a name in `PRESETS`, or a preset.
    options: the options of the preset; must be empty if `preset` is a preset.

  Returns:
    The preset.

  Raises:
    ValueError: if the name or an option is unknown.
  """
  if isinstance(preset, Preset):
    if options:
      raise ValueError('options can be given only with the name of a preset')
    return preset
  if preset not in PRESETS:
    raise ValueError(f'the presets are {", ".join(PRESETS)}, got {preset!r}')
  try:
    return PRESETS[preset](**options)
  except TypeError as error:
    raise ValueError(f'the preset {preset!r} has no such option: {error}') from error
