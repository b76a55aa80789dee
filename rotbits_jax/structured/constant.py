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

_MOST_AXES = 32


@register
@struct.dataclass
class Constant(Structured):
  """An array whose entries all have one value. The file stores no numbers for it.

  Attributes:
    value: `[...]`, the value. It is an array, because a stacked leaf has one value a
      layer, and because Orbax cannot save arrays without entries.
    tail: shape of the array `[..., *tail]`, without the layer axis.
  """

  kind: ClassVar[str] = 'constant'

  value: Any
  tail: tuple[int, ...] = struct.field(pytree_node=False)

  @classmethod
  def like(cls, array: Any, value: float) -> 'Constant':
    """Makes a leaf of the shape and dtype of an unstacked array."""
    return cls(np.array(value, array.dtype), tuple(array.shape))

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.value.shape, *self.tail)

  @property
  def dtype(self) -> Any:
    return self.value.dtype

  def materialize(self) -> jax.Array:
    value = jnp.asarray(self.value)
    return jnp.broadcast_to(jnp.expand_dims(value, self._tail_axes()), self.shape)

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    return [(np.dtype(self.dtype), 0)]

  def stored(self) -> tuple[Settings, Arrays]:
    settings = {'value': float(self.value), 'shape': list(self.shape)}
    return settings, {'empty': np.zeros(0, self.dtype)}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Constant':
    given = Stored(settings, arrays)
    shape, value = given.sizes('shape'), given.number('value')
    empty = given.array('empty', 1)
    given.finish()
    if empty.size or len(shape) > _MOST_AXES:
      raise ValueError(f'no constant is made of {empty.shape=} and {len(shape)} axes')
    # NumPy multiplies the lengths of the other axes, even if one of them is 0.
    if math.prod(n for n in shape if n) >= 1 << 48:
      raise ValueError(f'a constant of {shape=} is too large')
    with np.errstate(over='ignore'):
      return cls(np.array(value, empty.dtype), shape)

  def _tail_axes(self) -> tuple[int, ...]:
    return tuple(range(-len(self.tail), 0))
