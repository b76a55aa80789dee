"""The type of presets, and the presets themselves."""

from collections.abc import Mapping
import math
from typing import Any, Literal, NamedTuple

from rotbits_jax import paper as scheme
from rotbits_jax import passes
from rotbits_jax.evaluation import held_out
from rotbits_jax.symmetries import rotations
from rotbits_jax.system import schema

Keeps = Literal['bits', 'function', 'approximation']
"""What comes back: the bits of the input; its function up to rounding; or an
approximation, whose divergence has no bound. Plain tensors need 'bits' or the last.
"""


class Preset(NamedTuple):
  """A way to rewrite and code a model."""

  name: str
  options: dict[str, Any]  # JSON values, which the file keeps as a record
  transform: passes.Chain
  # After the transforms; None if they see elements in their stored dtype and keep them.
  rounding: passes.Rounding | None = passes.NEAREST
  keeps: Keeps = 'function'
  # Whether name and options determine everything else, so a run can be continued.
  # If not, other transforms may change the function, so it is compared for 'function'.
  resumable: bool = False
  # Whether records that are smaller as `exact` stores them are stored so.
  may_keep_bits: bool = False
  coder: str = 'weights'  # of records, see `file.coders`; or `paper.CODER`


def _number(name: str, value: Any, least: float, most: float = math.inf) -> float:
  """Returns the value of an option as a float; a ValueError if it is out of range."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (is_number and math.isfinite(value) and least <= value <= most):
    expected = f'must be a finite number from {least:g} to {most:g}'
    raise ValueError(f'{name} {expected}, got {value!r}')
  return float(value)


def exact() -> Preset:
  """Makes the preset that keeps every bit of the input.

  If the embedding can be predicted from the head, it is stored as the difference from
  the prediction, in small integers.
  """
  return Preset(
    name='exact',
    options={},
    transform=passes.chain(passes.retie_exactly()),
    rounding=None,
    keeps='bits',
    resumable=True,
  )


def free(
  *,
  tolerance: float = rotations.TOLERANCE,  # of `passes.remove_residual_gauge`
  floor: float | None = 0.0,  # step of `passes.Rounding`; None to nearest
  transforms: tuple[passes.Transform, ...] = (),  # after those of the preset
) -> Preset:
  """Makes the preset that fixes every gauge, rounds once, and codes the other elements.

  The function of the model stays the same up to rounding; its elements change. With a
  floor above 1 it would not stay the same.
  """
  tolerance = _number('tolerance', tolerance, 0)
  floor = None if floor is None else _number('floor', floor, -64, 1)
  return Preset(
    name='free',
    options={'tolerance': tolerance, 'floor': floor},
    transform=_without_gauges(tolerance, transforms),
    rounding=passes.Rounding(floor),
    resumable=not transforms,
    may_keep_bits=not transforms,
  )


def _without_gauges(
  tolerance: float, transforms: tuple[passes.Transform, ...], heads: float | None = None
) -> passes.Chain:
  """Returns transforms that fix every gauge; `heads` is the tolerance of heads."""
  return passes.chain(
    # Rotations come first, because the other transforms look for structure in the
    # coordinates that they choose.
    passes.remove_residual_gauge(tolerance=tolerance),
    passes.retie_embedding(),
    passes.remove_head_gauges(tolerance=heads),
    *transforms,
  )


def near(
  *,
  step: float = -5.0,  # log2 of the ratio of the step to the rms of an array
  offsets: Mapping[str, float] | None = None,  # octaves to add, see `passes.Rounding`
  inputs: Mapping[str, passes.Inputs] | None = None,  # see `passes.Rounding`
  tolerance: float = rotations.TOLERANCE,  # as in `free`
  measured: held_out.Measured | None = None,  # a record for the file
  transforms: tuple[passes.Transform, ...] = (),  # after those of the preset
) -> Preset:
  """Makes the preset for nearly the same function in far fewer bytes.

  It fixes every gauge as `free` does. Then it rounds the elements of each array to
  multiples of one step, so an element costs few bits. `presets.steps.calibrate`
  finds offsets and inputs.

  >>> near(step=-4).keeps
  'approximation'
  """
  step = _number('step', step, passes.FINEST, passes.COARSEST)
  offsets = {key: _number(key, x, -math.inf) for key, x in (offsets or {}).items()}
  tolerance = _number('tolerance', tolerance, 0)
  return Preset(
    name='near',
    options={
      'step': step,
      'offsets': offsets,
      'feedback': bool(inputs),
      'tolerance': tolerance,
      **({} if measured is None else {'measured': schema.dump(measured)}),
    },
    # Rounding to the step dominates the rounding to a dtype, for which the default
    # tolerance of heads was chosen.
    transform=_without_gauges(tolerance, transforms, heads=3.0),
    rounding=passes.Rounding(step, True, offsets, inputs or {}),
    keeps='approximation',
    resumable=not (transforms or inputs),
    may_keep_bits=not transforms,
  )


def paper(
  *,
  canonicalizer: scheme.Canonicalizer = 'polar_shortcut',
  rotation_codec: scheme.RotationCodec = 'haar',
  correction: scheme.CorrectionMethod = 'exact',
  threshold: float = 1e-3,
  entropy: bool = False,
) -> Preset:
  """Makes the preset of the published scheme.

  The model is rotated and rounded, so its elements change, but not its function up to
  rounding. Dense models are refused, because they have no shortcuts. The arguments are
  those of `rotbits_jax.paper.Options`. As published: svd, symmetric_eig and threshold.
  """
  options = schema.load(
    scheme.Options,
    {
      'canonicalizer': canonicalizer,
      'rotation_codec': rotation_codec,
      'correction': correction,
      'threshold': threshold,
      'entropy': entropy,
    },
  )
  return Preset(
    name='paper',
    options=schema.dump(options),
    transform=passes.chain(),  # the scheme rotates and rounds by itself
    rounding=None,
    coder=scheme.CODER,
  )
