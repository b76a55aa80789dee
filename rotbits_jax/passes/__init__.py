"""Transforms: passes over a model that leave fewer elements to store.

A transform rewrites a model, layer by layer. It calls the pure functions of
`symmetries`, decides by measurement which forms to keep, and notes its choices. To
apply transforms to a model in memory:

    model, savings = passes.run_chain((passes.remove_biases(),), model)

The modules, in the order of reading:

    transform   transforms, and chains of transforms
    rewrite     the walk of a model through a chain
    rounding    the rounding of float32 weights to the stored dtype or to a step
    residual    the rotations of all segments of the residual stream
    heads       the bases and biases of attention heads, and the bases of factors
    tied        an embedding that is a linear image of the head
    noise       the change that rounding alone makes, as a yardstick
"""

from rotbits_jax.passes.heads import remove_biases as remove_biases
from rotbits_jax.passes.heads import remove_low_rank_gauge as remove_low_rank_gauge
from rotbits_jax.passes.heads import remove_query_key_gauge as remove_query_key_gauge
from rotbits_jax.passes.heads import remove_value_gauge as remove_value_gauge
from rotbits_jax.passes.noise import random_rotation as random_rotation
from rotbits_jax.passes.noise import randomly_rotated as randomly_rotated
from rotbits_jax.passes.residual import remove_residual_gauge as remove_residual_gauge
from rotbits_jax.passes.rewrite import Record as Record
from rotbits_jax.passes.rewrite import Saving as Saving
from rotbits_jax.passes.rewrite import count_model as count_model
from rotbits_jax.passes.rewrite import make_context as make_context
from rotbits_jax.passes.rewrite import rewrite as rewrite
from rotbits_jax.passes.rewrite import run_chain as run_chain
from rotbits_jax.passes.rounding import COARSEST as COARSEST
from rotbits_jax.passes.rounding import FINEST as FINEST
from rotbits_jax.passes.rounding import FLOAT32 as FLOAT32
from rotbits_jax.passes.rounding import NEAREST as NEAREST
from rotbits_jax.passes.rounding import Inputs as Inputs
from rotbits_jax.passes.rounding import Rounding as Rounding
from rotbits_jax.passes.rounding import is_matrix as is_matrix
from rotbits_jax.passes.rounding import narrowed as narrowed
from rotbits_jax.passes.rounding import round_leaf as round_leaf
from rotbits_jax.passes.rounding import to_steps as to_steps
from rotbits_jax.passes.rounding import with_minimum_exponent as with_minimum_exponent
from rotbits_jax.passes.tied import retie_embedding as retie_embedding
from rotbits_jax.passes.tied import retie_exactly as retie_exactly
from rotbits_jax.passes.transform import Chain as Chain
from rotbits_jax.passes.transform import Context as Context
from rotbits_jax.passes.transform import Source as Source
from rotbits_jax.passes.transform import Transform as Transform
from rotbits_jax.passes.transform import chain as chain
from rotbits_jax.passes.transform import note as note
