"""SliceGPT in JAX: makes a sliced model from a dense one."""

from rotbits_jax.slicing.calibration import sample_sequences as sample_sequences
from rotbits_jax.slicing.slicegpt import slice_model as slice_model
from rotbits_jax.slicing.slicegpt import sliced_checkpoint as sliced_checkpoint
from rotbits_jax.slicing.slicegpt import sliced_width as sliced_width
