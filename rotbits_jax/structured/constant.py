"""The leaf for an array whose entries are all equal.

An example is the scale of a norm, once it has been folded into the kernels that read
the norm: all its entries are then 1.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import base
from rotbits_jax.structured import fields

_MOST_AXES = 32


@base.register
@dataclasses.dataclass(frozen=True)
class Constant(base.Structured):
  """An array whose entries all have one value, which is all that the file stores.

  >>> leaf = Constant.like(jnp.zeros(3), 1.0)
  >>> leaf.materialize().tolist()
  [1.0, 1.0, 1.0]
  """

  type_name: ClassVar[str] = 'constant'
  is_exact: ClassVar[bool] = True

  value: Annotated[Any, fields.Array('')]  # [...], because a stack has one a layer
  tail: tuple[fields.Length, ...] = fields.static()  # shape without the layer axis

  @classmethod
  def like(cls, array: Any, value: float) -> 'Constant':
    """Makes a leaf of the shape and dtype of an unstacked array."""
    return cls(np.array(value, array.dtype), tuple(array.shape))

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.value.shape, *self.tail)

  def materialize(self, *needed: Any) -> jax.Array:
    axes = tuple(range(-len(self.tail), 0))
    return jnp.broadcast_to(jnp.expand_dims(self.value, axes), self.shape)

  def check(self) -> None:
    # NumPy multiplies the lengths of the other axes, even if one of them is 0.
    size = math.prod(n for n in self.tail if n)
    if len(self.tail) > _MOST_AXES or size >= 1 << 48:
      raise ValueError(f'a constant of {self.tail!r:.80} is too large')
