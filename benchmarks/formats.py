"""Other ways to store the matrices of a model: GGUF's block formats, and rows.

Each function rounds the matrices of a model and says how many bytes they take; vectors
keep their dtype. GGUF's K-formats are written after the dequantisers of the package
`gguf`, which has no quantisers for them: each block takes the scale and the minimum of
least squared error among some, and then these are rounded as the format has them.
llama.cpp also weighs errors by the inputs if it has an importance matrix, and its
mixtures take other formats for some tensors.
"""

from collections.abc import Callable
from concurrent import futures
import functools
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from rotbits_jax import models
from rotbits_jax import structured

Rounded = tuple[np.ndarray, float]
"""Rounded rows, and the bytes that they take."""

_MOST = {
  'Q5_K': 31,
  'Q4_K': 15,
}  # the greatest integer of formats that `gguf` cannot make
_PART = 1024  # blocks that are searched at once, in one shape, so they compile once


class Stored(NamedTuple):
  """A model whose weights were rounded, and the bytes that it takes."""

  model: models.Model
  bytes: int


def stored(model: models.Model, rounded: Callable[[np.ndarray], Rounded]) -> Stored:
  """Rounds the matrices of a model; vectors keep their dtype.

  Args:
    model: the model.
    rounded: takes float32 rows, one for each output or each token.
  """

  def of_leaf(path: str, leaf: Any) -> Rounded:
    array = np.asarray(leaf)
    if array.ndim < 2:
      return array, array.nbytes
    # A kernel `[inputs, outputs]` has a row for each input.
    as_rows = np.transpose if path.endswith('/kernel') else np.asarray
    rows, size = rounded(np.ascontiguousarray(as_rows(array), np.float32))
    return np.ascontiguousarray(as_rows(rows)), size

  trees, total = [], 0.0
  with futures.ThreadPoolExecutor() as executor:
    for tree in (*model.layers(), model.outer()):
      flat = structured.flatten(tree)
      leaves = list(executor.map(of_leaf, flat, flat.values()))
      arrays = dict(zip(flat, [array for array, _ in leaves], strict=True))
      trees.append(structured.unflatten(arrays))
      total += sum(size for _, size in leaves)
  *layers, outer = trees
  return Stored(models.from_layers(model.config, outer, layers), round(total))


def in_rows(model: models.Model, bits: int) -> Stored:
  """Stores a model as integers with a scale for each output, compressed by zstd."""
  most = 2 ** (bits - 1) - 1

  def rounded(rows: np.ndarray) -> Rounded:
    scale = _half(np.abs(rows).max(1, keepdims=True) / most)
    q = np.rint(rows / np.where(scale == 0, 1, scale)).clip(-most, most)
    size = len(zstandard.compress(q.astype(np.int8).tobytes(), 19)) + 2 * len(rows)
    return q * scale, size

  return stored(model, rounded)


def in_blocks(model: models.Model, name: str) -> Stored:
  """Stores a model in a block format of GGUF.

  A block meets the inputs of one output, as in llama.cpp's files. If the number of
  inputs is not a multiple of its length, blocks run on into the next output.
  """
  kind = gguf.GGMLQuantizationType[name]
  length, size = gguf.GGML_QUANT_SIZES[kind]

  def rounded(rows: np.ndarray) -> Rounded:
    flat = np.pad(rows.reshape(-1), (0, -rows.size % length)).reshape(-1, length)
    if name in _MOST:
      parts = np.pad(flat, ((0, -len(flat) % _PART), (0, 0))).reshape(-1, _PART, length)
      numbers = np.concatenate([_shifted(x, _MOST[name]) for x in parts])
    else:
      numbers = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
    return numbers.reshape(-1)[: rows.size].reshape(rows.shape), len(flat) * size

  return stored(model, rounded)


@functools.partial(jax.jit, static_argnums=1)
def _shifted(x: jax.Array, most: int) -> jax.Array:
  """Rounds blocks of 32 to multiples of a scale from a minimum, as Q4_K and Q5_K do.

  Args:
    x: `[N, 256]`.
    most: the greatest integer.
  """
  shape, x = x.shape, x.reshape(len(x), 8, 32)
  low = jnp.minimum(x.min(-1, keepdims=True), 0)
  span = x.max(-1, keepdims=True) - low
  best, scale, least = (jnp.full(low.shape, y) for y in (jnp.inf, 0.0, 0.0))
  mean = x.mean(-1, keepdims=True)
  for part in np.linspace(0.9, 1.1, 11).tolist():
    q = jnp.clip(jnp.rint(_ratio(x - low, span) * (most * part)), 0, most)
    centre = q.mean(-1, keepdims=True)
    slope = _ratio(
      ((x - mean) * (q - centre)).sum(-1, keepdims=True),
      jnp.square(q - centre).sum(-1, keepdims=True),
    )
    base = jnp.minimum(mean - slope * centre, 0)
    error = jnp.square(slope * q + base - x).sum(-1, keepdims=True)
    is_better = error < best
    best = jnp.where(is_better, error, best)
    scale = jnp.where(is_better, slope, scale)
    least = jnp.where(is_better, base, least)
  # Scales and minima are integers of 6 bits times a half of the whole row.
  units = [_half(y.max(1, keepdims=True) / 63) for y in (scale, -least)]
  scale, least = (
    unit * jnp.clip(jnp.rint(_ratio(y, unit)), 0, 63)
    for unit, y in zip(units, (scale, -least), strict=True)
  )
  q = jnp.clip(jnp.rint(_ratio(x + least, scale)), 0, most)
  return (scale * q - least).reshape(shape)


def _half(x: Any) -> Any:
  """Rounds an array of NumPy or JAX to halves; returns float32."""
  return x.astype(np.float16).astype(np.float32)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """Divides, and gives 0 for a division by 0."""
  return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
