"""Transforms: passes over a model that leave fewer numbers to store.

A transform rewrites a model, layer by layer. It calls the pure functions of
`symmetries`, decides by measurement which forms to keep, and notes its choices. To
apply transforms to a model in memory:

    model, savings = passes.run_chain((passes.remove_biases(),), model)

The modules, in the order of reading:

    transform   transforms, and chains of transforms
    rewrite     the walk of a model through a transform
    rounding    the rounding of float32 weights to the stored dtype
    residual    the rotations of all segments of the residual stream
    heads       the bases and biases of attention heads
    tied        an embedding that is a linear image of the head
    low_rank    the basis between two factors
    noise       the change that rounding alone makes, as a yardstick
"""

from rotbits_jax.passes.heads import remove_biases
from rotbits_jax.passes.heads import remove_query_key_gauge
from rotbits_jax.passes.heads import remove_value_gauge
from rotbits_jax.passes.low_rank import remove_low_rank_gauge
from rotbits_jax.passes.noise import random_rotation
from rotbits_jax.passes.noise import randomly_rotated
from rotbits_jax.passes.residual import remove_residual_gauge
from rotbits_jax.passes.rewrite import ROUNDING
from rotbits_jax.passes.rewrite import Record
from rotbits_jax.passes.rewrite import Saving
from rotbits_jax.passes.rewrite import count_model
from rotbits_jax.passes.rewrite import make_context
from rotbits_jax.passes.rewrite import rewrite
from rotbits_jax.passes.rewrite import run_chain
from rotbits_jax.passes.rewrite import widened
from rotbits_jax.passes.rounding import COARSEST
from rotbits_jax.passes.rounding import FINEST
from rotbits_jax.passes.rounding import FLOAT32
from rotbits_jax.passes.rounding import NEAREST
from rotbits_jax.passes.rounding import Inputs
from rotbits_jax.passes.rounding import Rounding
from rotbits_jax.passes.rounding import is_matrix
from rotbits_jax.passes.rounding import round_leaf
from rotbits_jax.passes.rounding import round_params
from rotbits_jax.passes.rounding import to_steps
from rotbits_jax.passes.rounding import with_minimum_exponent
from rotbits_jax.passes.tied import retie_embedding
from rotbits_jax.passes.tied import retie_exactly
from rotbits_jax.passes.transform import Chain
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import ModelSource
from rotbits_jax.passes.transform import Transform
from rotbits_jax.passes.transform import chain
from rotbits_jax.passes.transform import note

__all__ = [
  'COARSEST',
  'FINEST',
  'FLOAT32',
  'NEAREST',
  'ROUNDING',
  'Chain',
  'Context',
  'Inputs',
  'ModelSource',
  'Record',
  'Rounding',
  'Saving',
  'Transform',
  'chain',
  'count_model',
  'is_matrix',
  'make_context',
  'note',
  'random_rotation',
  'randomly_rotated',
  'remove_biases',
  'remove_low_rank_gauge',
  'remove_query_key_gauge',
  'remove_residual_gauge',
  'remove_value_gauge',
  'retie_embedding',
  'retie_exactly',
  'rewrite',
  'round_leaf',
  'round_params',
  'run_chain',
  'to_steps',
  'widened',
  'with_minimum_exponent',
]
