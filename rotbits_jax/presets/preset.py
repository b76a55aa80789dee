"""The type of presets: everything that the encoder and its callers ask of one."""

import math
from typing import Any, Literal, NamedTuple

from rotbits_jax import passes

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
  # Whether name and options determine everything else, so that a run can be continued.
  resumable: bool = False
  coder: str = 'weights'  # of records, see `file.coders`; or `paper.CODER`


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
  """Returns the value of an option as a float; a ValueError if it is out of range."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not (is_number and math.isfinite(value) and least <= value <= most):
    expected = f'must be a finite number from {least:g} to {most:g}'
    raise ValueError(f'{name} {expected}, got {value!r}')
  return float(value)
