"""The preset `near`, which rounds to coarse steps; `presets.steps` searches them."""

from collections.abc import Mapping
import math

from rotbits_jax import passes
from rotbits_jax.presets.free import without_gauges
from rotbits_jax.presets.preset import Preset
from rotbits_jax.presets.preset import number


def near(
  *,
  step: float = -5.0,  # log2 of the ratio of the step to the rms of an array
  offsets: Mapping[str, float] | None = None,  # octaves to add, see `passes.to_steps`
  inputs: Mapping[str, passes.Inputs] | None = None,  # see `passes.Rounding`
  tolerance: float = 0.7,  # as in `free`
  transforms: tuple[passes.Transform, ...] = (),  # after those of the preset
) -> Preset:
  """Makes the preset for nearly the same function in far fewer bytes.

  It fixes every gauge as `free` does. Then it rounds the elements of each array to
  multiples of one step, so that an element costs few bits. `presets.steps.calibrate`
  finds offsets and inputs.

  >>> near(step=-4).keeps
  'approximation'
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
