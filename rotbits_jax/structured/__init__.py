"""Structured leaves: parameters that store fewer elements than they have.

A structured leaf takes the place of an array in a PyTree. It is a small frozen
dataclass whose arrays are ordinary PyTree leaves, so it works under `jit`, `vmap` and
`scan`. `materialize` computes the array that the leaf stands for, `stored` returns what
the file keeps, settings and arrays, and `from_stored` makes the leaf from these.

Some leaves need other parameters to be materialized, see `Structured.needs`. For
example, an embedding may be stored as a small matrix that is multiplied by the head.

A leaf may be stacked, like the layers of a model: its arrays then have a leading layer
axis `[N, ...]`.

`Difference` and `Basis` stand for plain arrays in files only: the reader computes the
array and puts it in the place of the leaf. `UniformlyQuantized` stands for a plain
array, in memory too.

To add a leaf, write a dataclass with annotated fields, see `fields`, and `register` it.
"""

from rotbits_jax.structured.base import TYPES as TYPES
from rotbits_jax.structured.base import Structured as Structured
from rotbits_jax.structured.base import floating as floating
from rotbits_jax.structured.base import register as register
from rotbits_jax.structured.constant import Constant as Constant
from rotbits_jax.structured.fields import Array as Array
from rotbits_jax.structured.fields import static as static
from rotbits_jax.structured.heads import HeadBases as HeadBases
from rotbits_jax.structured.shortcuts import IdentityMinusGram as IdentityMinusGram
from rotbits_jax.structured.shortcuts import TrapezoidalRows as TrapezoidalRows
from rotbits_jax.structured.tied import Tied as Tied
from rotbits_jax.structured.trees import astype as astype
from rotbits_jax.structured.trees import count_bytes as count_bytes
from rotbits_jax.structured.trees import count_elements as count_elements
from rotbits_jax.structured.trees import empty_dicts as empty_dicts
from rotbits_jax.structured.trees import expand as expand
from rotbits_jax.structured.trees import flatten as flatten
from rotbits_jax.structured.trees import is_plain as is_plain
from rotbits_jax.structured.trees import is_structured as is_structured
from rotbits_jax.structured.trees import map_leaves as map_leaves
from rotbits_jax.structured.trees import materialize as materialize
from rotbits_jax.structured.trees import same_bits as same_bits
from rotbits_jax.structured.trees import stack_key as stack_key
from rotbits_jax.structured.trees import stored_sizes as stored_sizes
from rotbits_jax.structured.trees import unflatten as unflatten
from rotbits_jax.structured.uniform import UniformlyQuantized as UniformlyQuantized
from rotbits_jax.structured.uniform import line_factors as line_factors
