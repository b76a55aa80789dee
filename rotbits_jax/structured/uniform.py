"""The leaf for an array of small multiples of one step, in memory only."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured.base import Structured


@struct.dataclass
class UniformlyQuantized(Structured):
  """An array whose numbers are integers times one step.

  The file reader makes it of an array that a file stores so. A product is exact in
  float32, so that the leaf stands for the array bit for bit. A file has no such leaf:
  the encoder stores the array.

  Attributes:
    integers: int8 or int16, in the shape of the array.
    step: float32 `[]`; `[N]` if the leaf is stacked.
    name: name of the dtype of the array.
  """

  type_name: ClassVar[str] = 'uniformly_quantized'
  expands_on_writing: ClassVar[bool] = True

  integers: Any
  step: Any
  name: str = struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.integers.shape)

  @property
  def dtype(self) -> Any:
    return np.dtype(jnp.dtype(self.name))

  def materialize(self, *needed: Any) -> jax.Array:
    step = jnp.asarray(self.step)
    step = jnp.expand_dims(step, tuple(range(step.ndim, self.integers.ndim)))
    return (jnp.asarray(self.integers, jnp.float32) * step).astype(self.dtype)

  def rows(self, *needed_and_indices: Any) -> jax.Array:
    (indices,) = needed_and_indices
    integers = jnp.asarray(self.integers)
    steps = jnp.full(len(integers), self.step)
    taken = integers.at[indices].get(mode='fill', fill_value=0)
    step = steps.at[indices].get(mode='fill', fill_value=jnp.nan)
    rows = (taken.astype(jnp.float32) * step[..., None]).astype(self.dtype)
    return rows.astype(jnp.float32)

  def map_arrays(self, function: Callable[[Any], Any]) -> Any:
    """Returns the function of the array, which need not be multiples of a step."""
    return function(self.materialize())

  def astype(self, dtype: Any) -> 'UniformlyQuantized':
    return dataclasses.replace(self, name=np.dtype(jnp.dtype(dtype)).name)

  def stack_key(self) -> tuple[str, ...]:
    return (np.dtype(self.integers.dtype).name,)

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    return [(self.dtype, int(np.prod(self.shape)))]
