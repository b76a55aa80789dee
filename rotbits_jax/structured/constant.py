"""The leaf for an array whose entries are all equal.

An example is the scale of a norm, once it has been folded into the kernels that read
the norm: all its entries are then 1.
"""

import math
from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Arrays
from rotbits_jax.structured.base import Settings
from rotbits_jax.structured.base import Structured
from rotbits_jax.structured.base import register
from rotbits_jax.structured.stored import Stored

_MOST_AXES = 8


@register
@struct.dataclass
class Constant(Structured):
  """An array whose entries all have one value. It stores no numbers.

  Attributes:
    empty: `[..., *shape, 0]`, an array without entries. It holds the shape and the
      dtype, also of a stacked leaf.
    value: the value of every entry.
  """

  kind: ClassVar[str] = 'constant'

  empty: Any
  value: float = struct.field(pytree_node=False)

  @classmethod
  def like(cls, array: Any, value: float) -> 'Constant':
    """Makes a leaf of the shape and dtype of an array."""
    return cls(np.zeros((*array.shape, 0), array.dtype), value)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.empty.shape[:-1]

  @property
  def dtype(self) -> Any:
    return self.empty.dtype

  def materialize(self) -> jax.Array:
    return jnp.full(self.shape, self.value, self.dtype)

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {'value': self.value, 'shape': list(self.shape)}
    return settings, {'empty': np.asarray(self.empty).reshape(-1)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Constant':
    given = Stored(settings, arrays)
    shape, value = given.sizes('shape'), given.number('value')
    empty = given.array('empty', 1)
    given.finish()
    if empty.size or len(shape) > _MOST_AXES:
      raise ValueError(f'no constant is made of {empty.shape=} and {len(shape)} axes')
    # Of one axis first, because NumPy multiplies the others although one is 0.
    if math.prod(n for n in shape if n) >= 1 << 48:
      raise ValueError(f'a constant of {shape=} is too large')
    return cls(empty.reshape(*shape, 0), value)
