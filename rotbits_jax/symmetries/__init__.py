"""Symmetries of a transformer's weights, and the transforms that remove them."""

from rotbits_jax.symmetries.biases import remove_biases
from rotbits_jax.symmetries.global_rotation import remove_global_gauge
from rotbits_jax.symmetries.heads import remove_query_key_gauge
from rotbits_jax.symmetries.heads import remove_value_gauge
from rotbits_jax.symmetries.low_rank import remove_low_rank_gauge
from rotbits_jax.symmetries.neurons import scale_neurons
from rotbits_jax.symmetries.noise import randomly_rotated
from rotbits_jax.symmetries.residual import remove_gauge
from rotbits_jax.symmetries.rotations import rotate
from rotbits_jax.symmetries.tied import retie_embedding
from rotbits_jax.symmetries.tied import retie_exactly
from rotbits_jax.symmetries.transform import Saving
from rotbits_jax.symmetries.transform import Transform
from rotbits_jax.symmetries.transform import count
from rotbits_jax.symmetries.transform import rounded
from rotbits_jax.symmetries.transform import run_chain

__all__ = [
  'Saving',
  'Transform',
  'count',
  'randomly_rotated',
  'remove_biases',
  'remove_gauge',
  'remove_global_gauge',
  'remove_low_rank_gauge',
  'remove_query_key_gauge',
  'remove_value_gauge',
  'retie_embedding',
  'retie_exactly',
  'rotate',
  'rounded',
  'run_chain',
  'scale_neurons',
]
