"""The preset `free`, which keeps the function and removes redundant elements."""

from rotbits_jax import passes
from rotbits_jax.presets.preset import Preset
from rotbits_jax.presets.preset import number


def free(
  *,
  tolerance: float = 0.7,  # of `passes.remove_residual_gauge`, in roundoffs
  floor: float | None = 0.0,  # of `passes.with_minimum_exponent`; None to nearest
  transforms: tuple[passes.Transform, ...] = (),  # after those of the preset
) -> Preset:
  """Makes the preset that fixes every gauge, rounds once, and codes the other elements.

  The function of the model stays the same up to rounding; its elements change. With a
  floor above 1 it would not stay the same.
  """
  tolerance = number('tolerance', tolerance, 0)
  floor = None if floor is None else number('floor', floor, -64, 1)
  return Preset(
    name='free',
    options={'tolerance': tolerance, 'floor': floor},
    transform=without_gauges(tolerance, transforms),
    rounding=passes.NEAREST if floor is None else passes.with_minimum_exponent(floor),
    resumable=not transforms,
  )


def without_gauges(
  tolerance: float, transforms: tuple[passes.Transform, ...], heads: float | None = None
) -> passes.Chain:
  """Returns the transforms that fix every gauge, and further ones after them.

  `heads` is the tolerance of `passes.remove_value_gauge`.
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
