"""The leaf for an array of small multiples of steps.

Shape letters: a matrix has R rows of C elements.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.structured import base
from rotbits_jax.structured import fields
from rotbits_jax.system import checksums

_CHUNK = 1 << 16  # elements that fit the cache
_MOST_OCTAVES = 60  # of a step with lines, so every element is a normal float32

_exponents = functools.partial(fields.Array, dtype=np.int8, optional=True, most=64)


@base.register
@dataclasses.dataclass(frozen=True)
class UniformlyQuantized(base.Structured):
  """An array whose elements are integers times a step.

      element = integer * step * factor of its row * factor of its column

  The factor of a line is (4 + i) 2^(q - 2) for its exponent e = 4 q + i, i < 4. Every
  product is exact in float32, so the leaf stands for the array bit for bit.
  """

  type_name: ClassVar[str] = 'uniformly_quantized'
  is_exact: ClassVar[bool] = True

  integers: Annotated[Any, fields.Array(None, np.int16)]  # [R, C] with exponents
  step: Annotated[Any, fields.Array('', np.float32)]
  name: Literal['float16', 'bfloat16', 'float32'] = fields.static()  # of the dtype
  row_exponents: Annotated[Any, _exponents('r')] = None
  column_exponents: Annotated[Any, _exponents('c')] = None

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.integers.shape)

  @property
  def dtype(self) -> Any:
    return np.dtype(jnp.dtype(self.name))

  def materialize(self, *needed: Any) -> jax.Array:
    step = jnp.asarray(self.step)
    step = jnp.expand_dims(step, tuple(range(step.ndim, self.integers.ndim)))
    matrix = jnp.asarray(self.integers, jnp.float32) * step
    if self.row_exponents is not None:
      matrix = matrix * line_factors(self.row_exponents)[..., :, None]
      matrix = matrix * line_factors(self.column_exponents)[..., None, :]
    return matrix.astype(self.dtype)

  def map_arrays(self, function: Callable[[Any], Any]) -> Any:
    """Returns the function of the array, which need not be multiples of a step."""
    return function(self.materialize())

  def astype(self, dtype: Any) -> 'UniformlyQuantized':
    return dataclasses.replace(self, name=np.dtype(jnp.dtype(dtype)).name)

  def write(self, out: np.ndarray, some: slice) -> int:
    """Writes elements if lines have no exponents; returns the CRC-32 of their bytes."""
    integers, out = self.integers.reshape(-1)[some], out.reshape(-1)[some]
    with np.errstate(over='ignore'):
      for start in range(0, out.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = np.multiply(integers[part], self.step, dtype=np.float32)
    return checksums.of_array(out)

  def check(self) -> None:
    if (self.row_exponents is None) != (self.column_exponents is None):
      raise ValueError('rows and columns have exponents, or neither do')
    if self.row_exponents is not None:
      lines = self.row_exponents.shape + self.column_exponents.shape
      if lines != self.integers.shape:
        raise ValueError(f'integers {self.shape} cannot have {lines} exponents')
      mantissa, octave = np.frexp(np.float32(self.step))
      is_step = 8 * mantissa in (4, 5, 6, 7) and abs(octave) <= _MOST_OCTAVES
    else:
      is_step = 0 < self.step < np.inf
    if not is_step:  # also if it is NaN
      raise ValueError(f'{self.step!r} is no step')


def line_factors(exponents: Any) -> jax.Array:
  """Returns the factors of lines, float32, for integer exponents of the same shape.

  >>> line_factors(np.array([0, 1, 4, -4])).tolist()
  [1.0, 1.25, 2.0, 0.5]
  """
  quarters = jnp.asarray(exponents, jnp.int32)
  return jnp.ldexp((4 + quarters % 4).astype(jnp.float32), quarters // 4 - 2)
