"""Presets: how a model is rewritten and coded. Each is a value with its own options.

free    the same function, without what its symmetries make redundant
exact   every bit of the input
paper   the published scheme: rotations by bits-back coding
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

from rotbits_jax import models
from rotbits_jax import symmetries


class Preset(NamedTuple):
  """How a model is rewritten and coded.

  Attributes:
    name: what the file calls it.
    options: JSON values that the file keeps, to say how it was made.
    transform: what rewrites the model, see `symmetries.chain`.
    names: of the savings, in order.
    widen: whether numbers are float32 between the transforms and are rounded once at
      the end. Without, every transform sees the numbers as they are stored.
    order_neurons: whether the order of an MLP's neurons is coded for free.
    message: the options of the published scheme, if the model goes onto one message of
      bits-back coding; else None.
  """

  name: str
  options: dict[str, Any]
  transform: symmetries.Transform
  names: tuple[str, ...]
  widen: bool = True
  order_neurons: bool = False
  message: Any = None


def free(
  *, tolerance: float = 0.7, transforms: tuple[symmetries.Transform, ...] = ()
) -> Preset:
  """The same function: fixes every gauge, rounds once, and codes what is left.

  Args:
    tolerance: see `symmetries.remove_residual_gauge`.
    transforms: further ones, applied after the preset's own.

  Returns:
    The preset.

  Raises:
    ValueError: if the tolerance is negative or not finite.
  """
  if not (math.isfinite(tolerance) and tolerance >= 0):
    raise ValueError(f'tolerance must be finite and not negative, got {tolerance}')
  own = (
    # Rotations first: what follows finds its structure in their coordinates.
    symmetries.remove_residual_gauge(tolerance=tolerance),
    symmetries.retie_embedding(),
    symmetries.remove_biases(),
    symmetries.remove_value_gauge(),
    symmetries.remove_query_key_gauge(),
    symmetries.remove_low_rank_gauge(),
    *transforms,
  )
  return Preset(
    name='free',
    options={'tolerance': float(tolerance)},
    transform=symmetries.chain(*own),
    names=tuple(transform.name for transform in own),
    order_neurons=True,
  )


def exact(*, transforms: tuple[symmetries.Transform, ...] = ()) -> Preset:
  """Every bit of the input; an embedding that is the head's image becomes residuals.

  Args:
    transforms: further ones, applied before the preset's own. They get the numbers as
      they are stored.

  Returns:
    The preset.
  """
  # It comes last, because the embedding is predicted from the final head.
  own = (*transforms, symmetries.retie_exactly())
  return Preset(
    name='exact',
    options={},
    transform=symmetries.chain(*own),
    names=tuple(transform.name for transform in own),
    widen=False,
  )


def paper(
  *,
  canonicaliser: str = 'polar_shortcut',
  rotation_codec: str = 'haar',
  correction: str = 'exact',
  threshold: float = 1e-3,
  entropy: bool = False,
  transforms: tuple[symmetries.Transform, ...] = (),
) -> Preset:
  """The published scheme: rotations by bits-back coding, see `rotbits_jax.paper`.

  Args:
    canonicaliser: 'polar_shortcut', 'qr' or 'svd' (published).
    rotation_codec: 'haar' or 'symmetric_eig' (published).
    correction: 'exact', or 'threshold' (published), which leaves errors of up to
      `threshold` in numbers that rotations were sampled from.
    threshold: see `correction`.
    entropy: whether numbers are entropy coded.
    transforms: none are possible, because they leave structured leaves.

  Returns:
    The preset.

  Raises:
    ValueError: if an option is unknown, or options do not go together.
  """
  from rotbits_jax.paper import Options  # its linear algebra is slow to import

  if transforms:
    raise ValueError("the preset 'paper' takes no transforms: it codes plain arrays")
  names = {
    'canonicaliser': canonicaliser,
    'rotation_codec': rotation_codec,
    'correction': correction,
  }
  for name, value in names.items():
    if value not in CHOICES[name]:
      known = ', '.join(CHOICES[name])
      raise ValueError(f'{name} is one of {known}; got {value!r}')
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
    transform=symmetries.chain(),
    names=('rotations',),
    message=options,
  )


CHOICES = {
  'canonicaliser': ('polar_shortcut', 'qr', 'svd'),
  'rotation_codec': ('haar', 'symmetric_eig'),
  'correction': ('exact', 'threshold'),
}
"""The options of the preset `paper` that are names."""

PRESETS: dict[str, Callable[..., Preset]] = {
  'free': free,
  'exact': exact,
  'paper': paper,
}
"""The presets by name: factories that take options."""


def default(config: models.ModelConfig | None) -> str:
  """Returns the name of the preset that suits a checkpoint.

  Args:
    config: of the model; None for plain arrays.

  Returns:
    'free' for a sliced model, whose symmetries hold a third of its numbers; else
    'exact', because on a dense model `free` changes every number and saves little more.
  """
  return 'free' if config is not None and config.sliced else 'exact'


def make(preset: str | Preset, **options: Any) -> Preset:
  """A preset by its name, or the preset itself.

  Args:
    preset: a name in `PRESETS`, or a preset that is made already.
    options: of the preset; none, if it is made already.

  Returns:
    The preset.

  Raises:
    ValueError: if the name or an option is not known.
  """
  if isinstance(preset, Preset):
    if options:
      raise ValueError('a preset that is made already takes no options')
    return preset
  if preset not in PRESETS:
    raise ValueError(f'the presets are {", ".join(PRESETS)}; got {preset!r}')
  try:
    return PRESETS[preset](**options)
  except TypeError as error:
    raise ValueError(f'the preset {preset!r} has other options: {error}') from error
