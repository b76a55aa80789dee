"""Transforms: passes over a model that leave fewer elements to store.

A transform rewrites a model, layer by layer. It calls the pure functions of
`symmetries`, decides by measurement which forms to keep, and notes its choices.
`run_chain` applies transforms to a model in memory.

The modules, in the order of reading:

    rounding    the rounding of float32 weights to the stored dtype or to a step
    transform   transforms, chains of transforms, the walk of a model through a chain
    residual    the rotations of all segments of the residual stream; random rotations
    heads       the bases and biases of attention heads
    tied        an embedding that is a linear image of the head
"""

from rotbits_jax.passes.heads import remove_head_gauges as remove_head_gauges
from rotbits_jax.passes.residual import is_rotated as is_rotated
from rotbits_jax.passes.residual import random_rotation as random_rotation
from rotbits_jax.passes.residual import randomly_rotated as randomly_rotated
from rotbits_jax.passes.residual import remove_residual_gauge as remove_residual_gauge
from rotbits_jax.passes.rounding import COARSEST as COARSEST
from rotbits_jax.passes.rounding import FINEST as FINEST
from rotbits_jax.passes.rounding import NEAREST as NEAREST
from rotbits_jax.passes.rounding import Inputs as Inputs
from rotbits_jax.passes.rounding import Rounding as Rounding
from rotbits_jax.passes.rounding import is_matrix as is_matrix
from rotbits_jax.passes.rounding import narrowed as narrowed
from rotbits_jax.passes.rounding import round_leaf as round_leaf
from rotbits_jax.passes.tied import retie_embedding as retie_embedding
from rotbits_jax.passes.tied import retie_exactly as retie_exactly
from rotbits_jax.passes.transform import Chain as Chain
from rotbits_jax.passes.transform import Context as Context
from rotbits_jax.passes.transform import Record as Record
from rotbits_jax.passes.transform import Saving as Saving
from rotbits_jax.passes.transform import Source as Source
from rotbits_jax.passes.transform import Transform as Transform
from rotbits_jax.passes.transform import chain as chain
from rotbits_jax.passes.transform import make_context as make_context
from rotbits_jax.passes.transform import rewrite as rewrite
from rotbits_jax.passes.transform import run_chain as run_chain
