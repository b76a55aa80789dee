"""Presets: ways to rewrite and code a model.

exact   keeps every bit of the input
free    removes redundant elements, and keeps the function of the model up to rounding
near    as `free`, but rounds the other elements to coarse steps: the function changes a
        little, and the file is much smaller
paper   rotates the model, and gets the bits of the rotations back, as published

Unknown names and options, and values out of range, raise a ValueError. A new preset is
a function that makes a `Preset`: `presets.PRESETS['mine'] = my_package.mine`.
"""

from collections.abc import Callable
import inspect
from typing import Any

from rotbits_jax import models
from rotbits_jax.presets.preset import Keeps as Keeps
from rotbits_jax.presets.preset import Preset as Preset
from rotbits_jax.presets.preset import exact as exact
from rotbits_jax.presets.preset import free as free
from rotbits_jax.presets.preset import near as near
from rotbits_jax.presets.preset import paper as paper

PRESETS: dict[str, Callable[..., Preset]] = {
  'free': free,
  'exact': exact,
  'near': near,
  'paper': paper,
}
"""Functions that take options and make a preset, by the name of the preset."""


def default(config: models.ModelConfig | None) -> str:
  """Returns the name of the preset for a model, or for plain arrays (None).

  It is 'free' for a sliced model, in which a fifth of the elements and more is
  redundant; else 'exact', because on a dense model `free` changes elements to save next
  to nothing.

  >>> default(None)
  'exact'
  """
  return 'free' if config is not None and config.sliced else 'exact'


def make(preset: str | Preset, **options: Any) -> Preset:
  """Makes a preset from its name and options, or returns a given preset.

  >>> make('free', tolerance=1.0).keeps
  'function'
  """
  if isinstance(preset, Preset):
    if options:
      raise ValueError('options can be given only with the name of a preset')
    return preset
  if not isinstance(preset, str) or preset not in PRESETS:
    raise ValueError(f'the presets are {", ".join(PRESETS)}, got {preset!r}')
  factory = PRESETS[preset]
  if unknown := sorted(options.keys() - inspect.signature(factory).parameters.keys()):
    raise ValueError(f'the preset {preset!r} has no option {unknown[0]!r}')
  return factory(**options)
