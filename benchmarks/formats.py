"""Other ways to store the matrices of a model: GGUF's formats, rows, WaterSIC.

Each function rounds the matrices of a model and says how many bytes they take; vectors
keep their dtype.

GGUF's K- and IQ4-formats are written after the dequantisers of the package `gguf`,
which has no quantisers for them: each block takes the scale, and the minimum, of least
squared error among those around the greatest number, and then scales are rounded as the
format has them. llama.cpp also weighs errors by the inputs if it has an importance
matrix, and its mixtures take other formats for some tensors.

The WaterSIC-style rows are the idea of WaterSIC (ICML 2026) without its refinements: a
step for each input feature in proportion to 1 / L_ii, where `L L^T` are the second
moments of the inputs, errors that feed back (successive interference cancellation), and
as its size the entropy of the integers of features of like size, without any tables.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import functools
import math
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import zstandard

from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured

Rounded = tuple[np.ndarray, float]
"""Rounded rows, and the bytes that they take."""


class Stored(NamedTuple):
  """A model whose numbers were rounded, and the bytes that it takes."""

  model: models.Model
  bytes: int


def stored(
  model: models.Model, rounded: Callable[[str, np.ndarray], Rounded]
) -> Stored:
  """Rounds the matrices of a model; vectors keep their dtype.

  Args:
    model: the model.
    rounded: takes a path and float32 rows, one for each output or each token.
  """

  def of_leaf(path: str, leaf: Any) -> Rounded:
    array = np.asarray(leaf)
    if array.ndim < 2:
      return array, array.nbytes
    # A kernel `[inputs, outputs]` has a row for each input.
    turn = np.transpose if path.endswith('/kernel') else np.asarray
    rows, size = rounded(path, np.ascontiguousarray(turn(array), np.float32))
    return np.ascontiguousarray(turn(rows)), size

  parts = [(models.names.prefix(i), x) for i, x in enumerate(model.layers())]
  parts.append(('', model.outer()))
  trees, total = [], 0.0
  with futures.ThreadPoolExecutor() as executor:
    for prefix, tree in parts:
      flat = structured.flatten(tree)
      found = list(executor.map(of_leaf, [prefix + x for x in flat], flat.values()))
      arrays = dict(zip(flat, [array for array, _ in found], strict=True))
      trees.append(structured.unflatten(arrays))
      total += sum(size for _, size in found)
  *layers, outer = trees
  return Stored(models.from_layers(model.config, outer, layers), round(total))


# ---- GGUF ----------------------------------------------------------------------------


def in_blocks(model: models.Model, name: str) -> Stored:
  """Stores a model in a block format of GGUF.

  A block meets the inputs of one output, as in llama.cpp's files. If the number of
  inputs is not a multiple of its length, blocks run on into the next output.
  """
  kind = gguf.GGMLQuantizationType[name]
  length, size = gguf.GGML_QUANT_SIZES[kind]

  def rounded(path: str, rows: np.ndarray) -> Rounded:
    flat = np.pad(rows.reshape(-1), (0, -rows.size % length)).reshape(-1, length)
    if name in _SEARCHED:
      # In parts of one shape, so that a search is compiled once.
      parts = np.pad(flat, ((0, -len(flat) % _PART), (0, 0))).reshape(-1, _PART, length)
      numbers = np.concatenate([_SEARCHED[name](x) for x in parts])
    else:
      numbers = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
    return numbers.reshape(-1)[: rows.size].reshape(rows.shape), len(flat) * size

  return stored(model, rounded)


_PART = 1024  # blocks that are searched at once

Codes = range | tuple[float, ...]
"""What a number may be besides its scale, ascending."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _scaled(x: jax.Array, codes: Codes, length: int, scales: int) -> jax.Array:
  """Rounds blocks to multiples of codes by a scale, as Q3_K, Q6_K and IQ4 do.

  Args:
    x: `[N, 256]` or `[N, length]`.
    codes: the codebook.
    length: of the blocks that have a scale.
    scales: the greatest integer of a scale, whose unit is a half of the whole row; 0 if
      each scale is a half.
  """
  shape, x = x.shape, x.reshape(len(x), -1, length)
  places = jnp.abs(x).argmax(-1, keepdims=True)
  greatest = jnp.take_along_axis(x, places, -1)
  best, scale = jnp.full(greatest.shape, jnp.inf), jnp.zeros_like(greatest)
  for shift in np.linspace(-0.12, 0.12, 13).tolist():
    q = _nearest(_ratio(x, greatest) * (codes[0] * (1 + shift)), codes)
    dot, square = (x * q).sum(-1, keepdims=True), (q * q).sum(-1, keepdims=True)
    found = _ratio(dot, square)
    error = -found * dot  # besides the squares of x
    is_better = error < best
    best, scale = jnp.where(is_better, error, best), jnp.where(is_better, found, scale)
  if scales:
    # The greatest scale is the least integer, which is one farther from 0.
    most = jnp.take_along_axis(scale, jnp.abs(scale).argmax(1, keepdims=True), 1)
    unit = _half(most / -(scales + 1))
    scale = unit * jnp.clip(jnp.rint(_ratio(scale, unit)), -scales - 1, scales)
  else:
    scale = _half(scale)
  return (scale * _nearest(_ratio(x, scale), codes)).reshape(shape)


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
  return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _nearest(x: jax.Array, codes: Codes) -> jax.Array:
  if isinstance(codes, range):
    return jnp.clip(jnp.rint(x), codes[0], codes[-1])
  values = jnp.array(codes, jnp.float32)
  middles = (values[1:] + values[:-1]) / 2
  return values[jnp.searchsorted(middles, x, method='compare_all')]


_CODEBOOK = tuple(float(x) for x in gguf.quants.IQ4_NL.kvalues)
_SEARCHED: dict[str, Callable[[np.ndarray], jax.Array]] = {
  'Q6_K': lambda x: _scaled(x, range(-32, 32), 16, 127),
  'Q5_K': lambda x: _shifted(x, 31),
  'Q4_K': lambda x: _shifted(x, 15),
  'Q3_K': lambda x: _scaled(x, range(-4, 4), 16, 31),
  'IQ4_NL': lambda x: _scaled(x, _CODEBOOK, 32, 0),
  'IQ4_XS': lambda x: _scaled(x, _CODEBOOK, 32, 31),
}
"""Quantisers that the package `gguf` lacks: rows of numbers to their rounded ones."""


# ---- rows ----------------------------------------------------------------------------


def in_rows(model: models.Model, bits: int) -> Stored:
  """Stores a model as integers with a scale for each output, compressed by zstd."""
  most = 2 ** (bits - 1) - 1

  def rounded(path: str, rows: np.ndarray) -> Rounded:
    scale = _half(np.abs(rows).max(1, keepdims=True) / most)
    q = np.rint(rows / np.where(scale == 0, 1, scale)).clip(-most, most)
    size = len(zstandard.compress(q.astype(np.int8).tobytes(), 19)) + 2 * len(rows)
    return q * scale, size

  return stored(model, rounded)


# ---- WaterSIC ------------------------------------------------------------------------


def like_watersic(
  model: models.Model, log2_step: float, inputs: Mapping[str, passes.Inputs]
) -> Stored:
  """Stores a model as WaterSIC does, in bytes that are an entropy; see above.

  Args:
    model: the model.
    log2_step: log2 of the geometric mean of a matrix's steps over its rms.
    inputs: the inputs of matrices by path. Others have one step.
  """

  def rounded(path: str, rows: np.ndarray) -> Rounded:
    own = inputs.get(path)
    step = 2.0**log2_step * np.sqrt(np.mean(np.square(rows)))
    if own is None:
      q = np.rint(rows / max(step, 1e-30))
      return q * step, _entropy(q.reshape(1, -1)) / 8
    q, alpha = _cancelled(rows.T, np.asarray(own.moments), step)
    # Each feature's step is a half.
    return (q * alpha[:, None]).T, _entropy(q) / 8 + 2 * len(alpha)

  return stored(model, rounded)


def _cancelled(
  kernel: np.ndarray, moments: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
  """Rounds a kernel `[n, m]` from the last feature to the first, each with its step.

  Returns:
    The integers `[n, m]`, and the steps `[n]`.
  """
  count = len(kernel)
  damping = 0.01 * np.mean(np.diag(moments)) + 1e-30
  lower = np.linalg.cholesky(np.float64(moments) + damping * np.eye(count))
  own = np.diag(lower).copy()
  alpha = _half(step * np.exp(np.log(own).mean()) / own)
  unit = (lower / own).astype(np.float32)
  q, error = np.zeros_like(kernel), np.zeros_like(kernel)
  for i in range(count - 1, -1, -1):
    wanted = kernel[i] + unit[i + 1 :, i] @ error[i + 1 :]
    q[i] = np.rint(wanted / alpha[i])
    error[i] = kernel[i] - q[i] * alpha[i]
  return q, alpha


def _entropy(q: np.ndarray) -> float:
  """Returns the bits of the rows of integers.

  Rows whose root mean squares are within half an octave have common frequencies. The
  entropy of few integers is at most log2 of their count, which is too little; so each
  entropy has Miller's and Madow's correction, too.
  """
  bits = 0.0
  classes = np.rint(np.log2(np.square(q).mean(1) + 1e-30))
  for own in np.unique(classes):
    some = q[classes == own]
    counts = np.unique(some, return_counts=True)[1]
    bits -= float((counts * np.log2(counts / some.size)).sum())
    bits += (len(counts) - 1) / (2 * math.log(2))
  return bits
