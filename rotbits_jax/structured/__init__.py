"""Structured leaves: parameters that store fewer numbers than they have entries.

A structured leaf takes the place of an array in a PyTree. It is a small `flax.struct`
dataclass whose arrays are ordinary PyTree leaves, so it works under `jit`, `vmap` and
`scan`. `materialize` computes the array that the leaf stands for, `stored` returns the
numbers that the file keeps, and `from_stored` makes the leaf from these numbers.

Some leaves need other parameters to be materialized, see `Structured.needs`. For
example, an embedding may be stored as a small matrix that is multiplied by the head.

A leaf may be stacked, like the layers of a model: its arrays then have a leading layer
axis `[N, ...]`.

`Difference` and `Basis` stand for plain arrays in files only: the reader computes the
array and puts it in the place of the leaf. `UniformlyQuantized` stands for a plain
array, in memory too.

To add a leaf, write a dataclass with annotated fields, see `fields`, and `register` it.
"""

from rotbits_jax.structured.base import TYPES
from rotbits_jax.structured.base import Origin
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import floating
from rotbits_jax.structured.base import register
from rotbits_jax.structured.constant import Constant
from rotbits_jax.structured.fields import Array
from rotbits_jax.structured.fields import static
from rotbits_jax.structured.heads import HeadBases
from rotbits_jax.structured.low_rank import LowRank
from rotbits_jax.structured.shortcuts import IdentityMinusGram
from rotbits_jax.structured.shortcuts import TrapezoidalRows
from rotbits_jax.structured.tied import Tied
from rotbits_jax.structured.trees import astype
from rotbits_jax.structured.trees import count_bytes
from rotbits_jax.structured.trees import count_elements
from rotbits_jax.structured.trees import empty_dicts
from rotbits_jax.structured.trees import expand
from rotbits_jax.structured.trees import flatten
from rotbits_jax.structured.trees import is_in_files
from rotbits_jax.structured.trees import is_plain
from rotbits_jax.structured.trees import is_structured
from rotbits_jax.structured.trees import map_leaves
from rotbits_jax.structured.trees import materialize
from rotbits_jax.structured.trees import same_bits
from rotbits_jax.structured.trees import stack_key
from rotbits_jax.structured.trees import stored_sizes
from rotbits_jax.structured.trees import unflatten
from rotbits_jax.structured.uniform import UniformlyQuantized
from rotbits_jax.structured.uniform import line_factors

__all__ = [
  'TYPES',
  'Array',
  'Constant',
  'HeadBases',
  'IdentityMinusGram',
  'LowRank',
  'Origin',
  'Structured',
  'Tied',
  'TrapezoidalRows',
  'UniformlyQuantized',
  'astype',
  'count_bytes',
  'count_elements',
  'empty_dicts',
  'expand',
  'flatten',
  'floating',
  'is_in_files',
  'is_plain',
  'is_structured',
  'line_factors',
  'map_leaves',
  'materialize',
  'register',
  'same_bits',
  'stack_key',
  'static',
  'stored_sizes',
  'unflatten',
]
