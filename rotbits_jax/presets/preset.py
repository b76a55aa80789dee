"""The type of presets: everything that the encoder and its callers ask of one."""

import math
from typing import Any, Literal, NamedTuple

from rotbits_jax import passes

Keeps = Literal['bits', 'function', 'approximation']


class Preset(NamedTuple):
  """A way to rewrite and code a model.

  Attributes:
    name: the name of the preset in the file.
    options: JSON values that the file keeps as a record of how it was made.
    transform: the transforms that rewrite the model, see `passes.chain`.
    rounding: how elements are rounded after the transforms, which see float32 elements.
      None if the transforms see the elements in their stored dtype and keep them.
    keeps: what comes back: the 'bits' of the input; its 'function' up to rounding; or
      an 'approximation', whose divergence has no bound. `verify` checks it. Plain
      tensors need a preset that keeps bits.
    resumable: whether name and options determine everything else, so that a run can
      continue the work of an interrupted run with the same options.
    coder: name of the coder of records, see `file.coders`; or `paper.CODER`, which
      codes a whole model as one message.
  """

  name: str
  options: dict[str, Any]
  transform: passes.Chain
  rounding: passes.Rounding | None = passes.NEAREST
  keeps: Keeps = 'function'
  resumable: bool = False
  coder: str = 'weights'


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
  """Returns the value of an option as a float; a ValueError if it is out of range."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (is_number and math.isfinite(value) and least <= value <= most):
    expected = f'must be a finite number from {least:g} to {most:g}'
    raise ValueError(f'{name} {expected}, got {value!r}')
  return float(value)
