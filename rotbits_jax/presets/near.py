"""The preset `near`, which rounds to coarse steps; `presets.steps` searches them."""

from collections.abc import Mapping
import math

from rotbits_jax import passes
from rotbits_jax.presets.free import without_gauges
from rotbits_jax.presets.preset import Preset
from rotbits_jax.presets.preset import number


def near(
  *,
  step: float = -5.0,
  offsets: Mapping[str, float] | None = None,
  inputs: Mapping[str, passes.Inputs] | None = None,
  tolerance: float = 0.7,
  transforms: tuple[passes.Transform, ...] = (),
) -> Preset:
  """Makes the preset for nearly the same function in far fewer bytes.

  It fixes every gauge as `free` does. Then it rounds the elements of each array to
  multiples of one step, so that an element costs few bits.

  >>> near(step=-4).keeps
  'approximation'

  Args:
    step: log2 of the ratio of the step to the root mean square of an array's elements.
    offsets: numbers to add to `step`, by pattern of paths, see `models.names.pattern`.
    inputs: see `passes.Rounding`; `presets.steps.calibrate` finds both.
    tolerance: see `free`.
    transforms: further transforms, applied after those of the preset.

  Raises:
    ValueError: if the tolerance is negative, if a number is not finite, or if the step
      is too fine to save bytes, or too coarse to keep anything.
  """
  step = number('step', step, passes.FINEST, passes.COARSEST)
  offsets = {key: number(key, x, -math.inf) for key, x in (offsets or {}).items()}
  tolerance = number('tolerance', tolerance, 0)
  return Preset(
    name='near',
    options={
      'step': step,
      'offsets': offsets,
      'feedback': bool(inputs),
      'tolerance': tolerance,
    },
    # Rounding to the step dominates the rounding to a dtype, for which the default
    # tolerance of heads was chosen.
    transform=without_gauges(tolerance, transforms, heads=3.0),
    rounding=passes.to_steps(step, offsets, inputs),
    keeps='approximation',
    resumable=not (transforms or inputs),
  )
