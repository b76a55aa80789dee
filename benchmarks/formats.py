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
import math
from typing import NamedTuple

import gguf
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
  total = 0.0

  def round_tree(tree: models.Params, prefix: str) -> models.Params:
    nonlocal total
    flat = structured.flatten(tree)
    for path, leaf in flat.items():
      array = np.asarray(leaf)
      if array.ndim < 2:
        total += array.nbytes
        continue
      # A kernel `[inputs, outputs]` has a row for each input.
      turn = np.transpose if path.endswith('/kernel') else np.asarray
      rows = np.ascontiguousarray(turn(array), np.float32)
      rows, size = rounded(prefix + path, rows)
      flat[path] = np.ascontiguousarray(turn(rows))
      total += size
    return structured.unflatten(flat)

  layers = [round_tree(x, models.names.prefix(i)) for i, x in enumerate(model.layers())]
  outer = round_tree(model.outer(), '')
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
      # In parts, because a search has several arrays of the size of its blocks.
      parts = np.array_split(flat, len(flat) // 4096 + 1)
      numbers = np.concatenate([_SEARCHED[name](x) for x in parts])
    else:
      numbers = gguf.quants.dequantize(gguf.quants.quantize(flat, kind), kind)
    return numbers.reshape(-1)[: rows.size].reshape(rows.shape), len(flat) * size

  return stored(model, rounded)


def _half(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float16).astype(np.float32)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
  return values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]


def _scaled(
  flat: np.ndarray, length: int, values: np.ndarray, scales: int
) -> np.ndarray:
  """Rounds blocks to multiples of values by a scale, as Q3_K, Q6_K and IQ4 do.

  Args:
    flat: `[N, 256]` or `[N, length]`.
    length: of the blocks that have a scale.
    values: the codebook, ascending.
    scales: the greatest integer of a scale, whose unit is a half of the whole row; 0 if
      each scale is a half.
  """
  x = flat.reshape(len(flat), -1, length)
  places = np.abs(x).argmax(-1)[..., None]
  greatest = np.take_along_axis(x, places, -1)
  best, scale = np.full(greatest.shape, np.inf, np.float32), np.zeros_like(greatest)
  for shift in np.linspace(-0.12, 0.12, 13):
    q = _nearest(_ratio(x, greatest) * (values[0] * (1 + shift)), values)
    dot, square = (x * q).sum(-1, keepdims=True), (q * q).sum(-1, keepdims=True)
    found = _ratio(dot, square)
    error = -found * dot  # besides the squares of x
    is_better = error < best
    best, scale = np.where(is_better, error, best), np.where(is_better, found, scale)
  if scales:
    # The greatest scale is the least integer, which is one farther from 0.
    most = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    unit = _half(most / -(scales + 1))
    scale = unit * np.clip(np.rint(_ratio(scale, unit)), -scales - 1, scales)
  else:
    scale = _half(scale)
  q = _nearest(_ratio(x, np.broadcast_to(scale, x.shape)), values)
  return (scale * q).reshape(flat.shape)


def _shifted(flat: np.ndarray, most: int) -> np.ndarray:
  """Rounds blocks of 32 to multiples of a scale from a minimum, as Q4_K and Q5_K do.

  Args:
    flat: `[N, 256]`.
    most: the greatest integer.
  """
  x = flat.reshape(len(flat), 8, 32)
  low = np.minimum(x.min(-1, keepdims=True), 0)
  span = x.max(-1, keepdims=True) - low
  best, scale, least = (np.full(low.shape, y, np.float32) for y in (np.inf, 0, 0))
  mean = x.mean(-1, keepdims=True)
  for part in np.linspace(0.9, 1.1, 11):
    q = np.clip(np.rint(_ratio(x - low, span) * (most * part)), 0, most)
    centre = q.mean(-1, keepdims=True)
    slope = _ratio(
      ((x - mean) * (q - centre)).sum(-1, keepdims=True),
      np.square(q - centre).sum(-1, keepdims=True),
    )
    base = np.minimum(mean - slope * centre, 0)
    error = np.square(slope * q + base - x).sum(-1, keepdims=True)
    is_better = error < best
    best = np.where(is_better, error, best)
    scale, least = np.where(is_better, slope, scale), np.where(is_better, base, least)
  # Scales and minima are integers of 6 bits times a half of the whole row.
  units = [_half(y.max(1, keepdims=True) / 63) for y in (scale, -least)]
  scale, least = (
    unit * np.clip(np.rint(_ratio(y, np.broadcast_to(unit, y.shape))), 0, 63)
    for unit, y in zip(units, (scale, -least), strict=True)
  )
  q = np.clip(np.rint(_ratio(x + least, np.broadcast_to(scale, x.shape))), 0, most)
  return (scale * q - least).reshape(flat.shape)


_CODEBOOK = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
_SEARCHED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'Q6_K': lambda x: _scaled(x, 16, np.arange(-32, 32, dtype=np.float32), 127),
  'Q5_K': lambda x: _shifted(x, 31),
  'Q4_K': lambda x: _shifted(x, 15),
  'Q3_K': lambda x: _scaled(x, 16, np.arange(-4, 4, dtype=np.float32), 31),
  'IQ4_NL': lambda x: _scaled(x, 32, _CODEBOOK, 0),
  'IQ4_XS': lambda x: _scaled(x, 32, _CODEBOOK, 31),
}
"""Quantisers that the package `gguf` lacks: rows of numbers to their rounded ones."""


# ---- rows ----------------------------------------------------------------------------


def in_rows(model: models.Model, bits: int) -> Stored:
  """Stores a model as integers with a scale for each output, compressed by zstd."""
  most = 2 ** (bits - 1) - 1

  def rounded(path: str, rows: np.ndarray) -> Rounded:
    scale = _half(np.abs(rows).max(1, keepdims=True) / most)
    q = np.rint(_ratio(rows, np.broadcast_to(scale, rows.shape))).clip(-most, most)
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
