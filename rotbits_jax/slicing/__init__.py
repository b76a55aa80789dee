"""SliceGPT in JAX: makes a sliced model from a dense one."""

from rotbits_jax.slicing.calibration import sample_sequences
from rotbits_jax.slicing.slicegpt import slice_model
from rotbits_jax.slicing.slicegpt import sliced_checkpoint
from rotbits_jax.slicing.slicegpt import sliced_width

__all__ = [
  'sample_sequences',
  'slice_model',
  'sliced_checkpoint',
  'sliced_width',
]
