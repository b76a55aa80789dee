"""An example of a quantiser among the transforms: int8 weights by the library Qwix.

  pip install '.[int8]'
  python -m benchmarks.int8 [--max_tokens=N]

The example defines a leaf and a transform that the package does not have. The transform
follows those that remove redundant numbers, so only the numbers that remain get 8 bits
each. The table compares this with the same quantisation of the original model. Both are
entropy coded.
"""

import functools
import sys
from typing import Any, ClassVar

from absl import flags
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import qwix

from benchmarks import demo
import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.cli import program

CHECKPOINT = demo.WEIGHTS.parent

FLAGS = flags.FlagValues()
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Number of tokens of the text to use.', flag_values=FLAGS
)


# ---- the leaf ------------------------------------------------------------------------


@structured.register
@struct.dataclass
class Int8(structured.Structured):
  """A kernel whose numbers have 8 bits each, with a scale for each column.

  Attributes:
    values: an int8 array, or a structured leaf of int8 arrays.
    scales: an array of scales, or a structured leaf of them. An array `[..., m, n]` of
      values has the scales `[..., 1, n]`.
  """

  type_name: ClassVar[str] = 'int8'

  values: Any
  scales: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def dtype(self) -> Any:
    return self.scales.dtype

  def materialize(self, *needed: Any) -> jax.Array:
    dequantized = jax.tree.map(_dequantize_array, self.values, self.scales)
    return structured.materialize(dequantized)

  def layer(self, index: int) -> 'Int8':
    return Int8(**models.unstack_layer(self._parts(), index))

  @classmethod
  def stack(cls, leaves: list['Int8']) -> 'Int8':
    return cls(**models.stack_layers([leaf._parts() for leaf in leaves], len(leaves)))

  def _parts(self) -> dict[str, Any]:
    return {'values': self.values, 'scales': self.scales}

  def stack_key(self) -> tuple[str, ...]:
    if not structured.is_structured(self.values):
      return ()
    return self.values.type_name, *self.values.stack_key()

  def stored_sizes(self) -> list[tuple[np.dtype, int]]:
    sizes = [(np.dtype(x.dtype), x.size) for x in jax.tree.leaves(self.scales)]
    if structured.is_structured(self.values):
      return self.values.stored_sizes() + sizes
    return [(np.dtype(self.values.dtype), self.values.size), *sizes]

  def astype(self, dtype: Any) -> 'Int8':
    return self  # a quantised leaf is not rounded again

  def stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    settings, arrays = {}, {'': np.asarray(self.values)}
    if structured.is_structured(self.values):
      inner, arrays = self.values.stored()
      settings = {'kind': self.values.type_name, 'settings': inner}
    for i, scale in enumerate(jax.tree.leaves(self.scales)):
      arrays[f'scale_{i}'] = np.asarray(scale)
    return settings, arrays

  @classmethod
  def from_stored(
    cls, settings: dict[str, Any], arrays: dict[str, np.ndarray]
  ) -> 'Int8':
    scales = [x for name, x in arrays.items() if name.startswith('scale_')]
    values = {k: x for k, x in arrays.items() if not k.startswith('scale_')}
    leaf: Any = values.get('')
    if settings:
      kind = structured.TYPES[settings['kind']]
      leaf = kind.from_stored(settings['settings'], values)
    return cls(leaf, jax.tree.unflatten(jax.tree.structure(leaf), scales))


# ---- the transform -------------------------------------------------------------------


def quantize_kernels() -> passes.Transform:
  """Makes the transform that rounds the numbers of every kernel to int8.

  Returns:
    The transform. Its notes tell the relative error of each kernel.
  """
  return passes.Transform(
    'int8', layers=_quantize_layers, outer=_quantize_outer, most_error=0.02
  )


def quantize(leaf: Any, dtype: Any) -> Int8:
  """Quantises a kernel; the scale of a column follows from its absolute maximum.

  Args:
    leaf: an array `[..., m, n]`, or a structured leaf of such arrays.
    dtype: dtype of the scales.
  """
  arrays, treedef = jax.tree.flatten(leaf)
  quantized = [_quantize_array(jnp.asarray(x, jnp.float32), dtype) for x in arrays]
  values, scales = zip(*quantized, strict=True)
  return Int8(jax.tree.unflatten(treedef, values), jax.tree.unflatten(treedef, scales))


def _quantize_array(array: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
  if not array.size:  # Qwix fails on the maximum of an empty array
    scale = jnp.ones((*array.shape[:-2], 1, array.shape[-1]), dtype)
    return array.astype(jnp.int8), scale
  axes = [axis for axis in range(array.ndim) if axis != array.ndim - 2]
  quantized = qwix.quantize(array, jnp.int8, channelwise_axes=axes, scale_dtype=dtype)
  return quantized.qvalue, quantized.scale


def _dequantize_array(value: Any, scale: Any) -> jax.Array:
  value, scale = jnp.asarray(value), jnp.asarray(scale)
  if not value.size:
    return value.astype(scale.dtype)
  return qwix.dequantize(qwix.QArray(value, scale))


def _quantize_layers(
  context: passes.Context, state: Any, first: int, layers: list[passes.Params]
) -> tuple[Any, list[passes.Params], list[list[passes.Note]]]:
  notes = [
    _quantize_kernels(layer, context.dtype, models.names.prefix(i))
    for i, layer in enumerate(layers, first)
  ]
  return state, layers, notes


def _quantize_outer(
  context: passes.Context, state: Any, params: passes.Params
) -> tuple[passes.Params, list[passes.Note]]:
  return params, _quantize_kernels(params, context.dtype, '')


def _quantize_kernels(
  params: passes.Params, dtype: np.dtype, prefix: str
) -> list[passes.Note]:
  notes = []
  for path, leaf in params.items():
    if path.endswith('/kernel'):
      params[path] = _quantize(leaf, dtype=dtype)
      error = _relative_error(params[path], leaf)
      notes.append(passes.note(prefix + path, params[path], error=error))
  return notes


def _relative_error(leaf: Int8, original: Any) -> float:
  a, b = (np.asarray(structured.materialize(x), np.float32) for x in (leaf, original))
  norm = float(np.linalg.norm(b))
  return float(np.linalg.norm(a - b)) / norm if norm else 0.0


_quantize = functools.partial(jax.jit, static_argnames='dtype')(quantize)


# ---- the table -----------------------------------------------------------------------


def measure(
  model: models.Model, tokens: np.ndarray, max_tokens: int | None = None
) -> str:
  """Returns the table: bytes, perplexity, and KL divergence from the model."""
  int8 = (quantize_kernels(),)
  quantized, _ = passes.run_chain(int8, model)
  free, both = rotbits_jax.encode(model), rotbits_jax.encode(model, transforms=int8)
  rows = [
    ('exact', rotbits_jax.encode(model, preset='exact'), model),
    ('free', free, rotbits_jax.decode_checkpoint(free).model),
    ('int8', rotbits_jax.encode(quantized, preset='exact'), quantized),
    ('free, int8', both, rotbits_jax.decode_checkpoint(both).model),
  ]
  lines = [f'{"":12}{"bytes":>12}{"":>8}{"perplexity":>12}{"KL":>10}']
  for name, data, decoded in rows:
    result = evaluation.evaluate(
      decoded, tokens, reference=model, max_tokens=max_tokens
    )
    lines.append(
      f'{name:12}{len(data):12,}{len(data) / len(rows[0][1]):8.1%}'
      f'{result.perplexity:12.3f}{result.kl:10.2g}'
    )
  return '\n'.join(lines)


def main() -> None:
  checkpoint = rotbits_jax.load_checkpoint(CHECKPOINT)
  text = demo.read_data('evaluation.txt')
  tokens = evaluation.encode_text(checkpoint.files, text)
  print(measure(checkpoint.model, tokens, _MAX_TOKENS.value))


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
