"""Finds the codes and scales of arrays that were quantised before.

Many bfloat16 and float16 files were int8, float8, int4 or float4 numbers once, and were
dequantised because a trainer needs floats. `find` returns the codes and the scales of
such an array as a leaf, `BlockQuantized`, from which every bit comes back; and None for
any other array.
"""

from rotbits_jax.quantisers.leaf import BlockQuantized as BlockQuantized
from rotbits_jax.quantisers.leaf import form as form
from rotbits_jax.quantisers.search import find as find
from rotbits_jax.quantisers.search import nbytes as nbytes
from rotbits_jax.quantisers.search import repeats as repeats
