"""Symmetries of a transformer's weights, and the transforms that remove them.

A symmetry is a change of the weights that does not change the function of the model. A
gauge is one choice among the weights that a symmetry connects. A transform fixes a
gauge so that fewer numbers need to be stored.

The modules, in the order of reading:

    transform   transforms, chains of transforms, and the rewriting of a model
    rotations   the residual stream in other coordinates
    canonical   canonical forms under rotations: polar, QR, SVD
    shortcuts   leaves for the shortcuts between rotated segments
    norms       folding the scales of norms into kernels
    residual    the rotations of all segments
    heads       the bases of attention heads: value and output, query and key
    biases      biases that the output does not need
    tied        an embedding that is a linear image of the head
    low_rank    the basis between two factors
    noise       the change that rounding alone makes, as a yardstick
    rounding    the rounding of float32 numbers to the stored dtype
    packings    leaves that may take the place of rounded matrices
    feedback    rounding so that errors cancel in the outputs of a kernel
    products    matrix products that round equally on any number of threads
"""

from rotbits_jax.symmetries.biases import remove_biases
from rotbits_jax.symmetries.canonical import CANONICALISERS
from rotbits_jax.symmetries.canonical import Canonicaliser
from rotbits_jax.symmetries.canonical import Polar
from rotbits_jax.symmetries.canonical import polar
from rotbits_jax.symmetries.canonical import polar_shortcut
from rotbits_jax.symmetries.canonical import qr
from rotbits_jax.symmetries.canonical import svd
from rotbits_jax.symmetries.heads import remove_query_key_gauge
from rotbits_jax.symmetries.heads import remove_value_gauge
from rotbits_jax.symmetries.low_rank import fix_pairs
from rotbits_jax.symmetries.low_rank import remove_low_rank_gauge
from rotbits_jax.symmetries.noise import random_rotation
from rotbits_jax.symmetries.noise import randomly_rotated
from rotbits_jax.symmetries.residual import remove_residual_gauge
from rotbits_jax.symmetries.rounding import NEAREST
from rotbits_jax.symmetries.rounding import Inputs
from rotbits_jax.symmetries.rounding import Rounding
from rotbits_jax.symmetries.rounding import round_leaf
from rotbits_jax.symmetries.rounding import to_steps
from rotbits_jax.symmetries.rounding import with_floor
from rotbits_jax.symmetries.tied import retie_embedding
from rotbits_jax.symmetries.tied import retie_exactly
from rotbits_jax.symmetries.transform import Context
from rotbits_jax.symmetries.transform import Note
from rotbits_jax.symmetries.transform import Record
from rotbits_jax.symmetries.transform import Saving
from rotbits_jax.symmetries.transform import Source
from rotbits_jax.symmetries.transform import Transform
from rotbits_jax.symmetries.transform import chain
from rotbits_jax.symmetries.transform import count_model
from rotbits_jax.symmetries.transform import make
from rotbits_jax.symmetries.transform import make_context
from rotbits_jax.symmetries.transform import note
from rotbits_jax.symmetries.transform import rewrite
from rotbits_jax.symmetries.transform import run_chain

__all__ = [
  'CANONICALISERS',
  'NEAREST',
  'Canonicaliser',
  'Context',
  'Inputs',
  'Note',
  'Polar',
  'Record',
  'Rounding',
  'Saving',
  'Source',
  'Transform',
  'chain',
  'count_model',
  'fix_pairs',
  'make',
  'make_context',
  'note',
  'polar',
  'polar_shortcut',
  'qr',
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
  'run_chain',
  'svd',
  'to_steps',
  'with_floor',
]
