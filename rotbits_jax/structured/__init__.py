"""Structured leaves: parameters that store fewer numbers than they have entries.

A structured leaf takes the place of an array in a PyTree. It is a small `flax.struct`
dataclass whose arrays are ordinary PyTree leaves, so it works under `jit`, `vmap` and
`scan`. A leaf has three important methods: `materialize` computes the array that the
leaf stands for, `stored` returns the numbers that the file keeps, and `from_stored`
makes the leaf from these numbers.

A dependent leaf is a structured leaf that needs other parameters to be materialized.
For example, an embedding may be stored as a small matrix that is multiplied by the
head.

A leaf may be stacked, like the layers of a model: its arrays then have a leading layer
axis `[N, ...]`.

`Quantized` stands for a plain array in a file only: the reader puts the array in its
place. `UniformlyQuantized` stands for one in memory only.
"""

from rotbits_jax.structured.base import KINDS
from rotbits_jax.structured.base import TYPES
from rotbits_jax.structured.base import Dependent
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import astype
from rotbits_jax.structured.base import count_bytes
from rotbits_jax.structured.base import count_elements
from rotbits_jax.structured.base import empty_dicts
from rotbits_jax.structured.base import flatten
from rotbits_jax.structured.base import is_plain
from rotbits_jax.structured.base import is_structured
from rotbits_jax.structured.base import materialize
from rotbits_jax.structured.base import nonempty
from rotbits_jax.structured.base import register
from rotbits_jax.structured.base import same_bits
from rotbits_jax.structured.base import stack_key
from rotbits_jax.structured.base import unflatten
from rotbits_jax.structured.constant import Constant
from rotbits_jax.structured.heads import HeadColumns
from rotbits_jax.structured.heads import HeadPlanes
from rotbits_jax.structured.heads import HeadRows
from rotbits_jax.structured.low_rank import FactorPair
from rotbits_jax.structured.low_rank import LowRank
from rotbits_jax.structured.low_rank import ReducedLowRank
from rotbits_jax.structured.quantized import Quantized
from rotbits_jax.structured.shortcuts import IdentityMinusGram
from rotbits_jax.structured.shortcuts import SymmetricTriangle
from rotbits_jax.structured.stored import Stored
from rotbits_jax.structured.tied import Tied
from rotbits_jax.structured.tied import TiedExactly
from rotbits_jax.structured.triangles import RowTrapezoids
from rotbits_jax.structured.triangles import Trapezoidal
from rotbits_jax.structured.triangles import lower_size
from rotbits_jax.structured.triangles import pack_lower
from rotbits_jax.structured.triangles import unpack_lower
from rotbits_jax.structured.uniform import UniformlyQuantized

__all__ = [
  'KINDS',
  'TYPES',
  'Constant',
  'Dependent',
  'FactorPair',
  'HeadColumns',
  'HeadPlanes',
  'HeadRows',
  'IdentityMinusGram',
  'LowRank',
  'Quantized',
  'ReducedLowRank',
  'RowTrapezoids',
  'Stored',
  'Structured',
  'SymmetricTriangle',
  'Tied',
  'TiedExactly',
  'Trapezoidal',
  'UniformlyQuantized',
  'astype',
  'count_bytes',
  'count_elements',
  'empty_dicts',
  'flatten',
  'is_plain',
  'is_structured',
  'lower_size',
  'materialize',
  'nonempty',
  'pack_lower',
  'register',
  'same_bits',
  'stack_key',
  'unflatten',
  'unpack_lower',
]
