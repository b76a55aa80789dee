"""Symmetries of a transformer's weights, and the transforms that remove them."""

from rotbits_jax.symmetries.residual import randomly_rotated
from rotbits_jax.symmetries.residual import remove_gauge
from rotbits_jax.symmetries.residual import rotate
from rotbits_jax.symmetries.transform import Saving
from rotbits_jax.symmetries.transform import Transform
from rotbits_jax.symmetries.transform import count
from rotbits_jax.symmetries.transform import run_chain

__all__ = [
  'Saving',
  'Transform',
  'count',
  'randomly_rotated',
  'remove_gauge',
  'rotate',
  'run_chain',
]
