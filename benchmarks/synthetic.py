"""Writes sliced Llamas of any size, with random weights, for time, memory and size.

Each layer is drawn, written and dropped, so memory holds one layer or the embedding.
Llama-2-7B, 11.4 GB, takes 92 s on two cores and 0.75 GB of memory.

A shortcut leads from one residual segment to the next. The shortcuts are those of a
chain of subspaces, as SliceGPT makes them: M = A C R, where A and R `[d, d]` are random
rotations and C is diagonal with the cosines of the angles between two subspaces. With D
the width before slicing, 2d - D of the cosines are 1. The others are in (0, 1), half of
them above 0.92, as is usual in sliced models. The last segment is not sliced: its
shortcut is `[d, D]` with orthonormal rows.

Weights are independent Gaussians, so that a coder finds no other structure in them.
Their scale has a lognormal factor for each row and for each column. If the embeddings
are tied in the dense model, the embedding is the head times a part of a rotation.
"""

from collections.abc import Iterator
import concurrent.futures
import json
import os
import pathlib
from typing import NamedTuple
import zlib

import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import slicing
from rotbits_jax import structured

BLOCK = 64  # width of the dense blocks of a rotation
STAGES = 2  # number of sparse rotations in a product
DRAWN = 1 << 20  # how many numbers one thread draws at a time
# Standard deviations of the log2 of the scales.
RESIDUAL_DEVIATION = 0.1  # along the axis of the residual stream
OTHER_DEVIATION = 0.25  # along the other axis of a matrix


def llama(width: int, layers: int, **fields: int) -> dict[str, object]:
  """Returns the config.json of a dense Llama of this size."""
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_size': width,
    'intermediate_size': 11 * width // 4,
    'num_hidden_layers': layers,
    'num_attention_heads': width // 64,
    'vocab_size': 1024,  # few, so that layers are most of the model
    'max_position_embeddings': 4096,
    'rms_norm_eps': 1e-5,
    'tie_word_embeddings': False,
    'torch_dtype': 'float16',
  } | fields


class Rotation(NamedTuple):
  """A random rotation `[n, n]`: a product of sparse rotations.

  Attributes:
    stages: for each sparse rotation, a permutation `[n]` of the coordinates, and
      rotations `[n // b, b, b]` of blocks of the permuted coordinates. The n mod b last
      coordinates are not rotated.
  """

  stages: tuple[tuple[np.ndarray, np.ndarray], ...]

  @classmethod
  def random(cls, n: int, rng: np.random.Generator) -> 'Rotation':
    """Draws a rotation. It is dense if n is less than `BLOCK ** STAGES`."""
    width = min(n, BLOCK)
    stages = []
    for _ in range(STAGES):
      normal = rng.standard_normal((n // width, width, width))
      q, r = np.linalg.qr(normal)
      q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
      stages.append((rng.permutation(n), q.astype(np.float32)))
    return cls(tuple(stages))

  def apply(self, x: np.ndarray) -> np.ndarray:
    """Returns the rotation times a float32 matrix `[n, k]`."""
    for permutation, blocks in self.stages:
      x = x[permutation]
      _rotate(blocks, x)
    return x

  def apply_transposed(self, x: np.ndarray) -> np.ndarray:
    """Returns the transposed rotation times a float32 matrix `[n, k]`."""
    for permutation, blocks in reversed(self.stages):
      y = x.copy()
      _rotate(blocks.swapaxes(1, 2), y)
      x = np.empty_like(y)
      x[permutation] = y
    return x


def _rotate(blocks: np.ndarray, x: np.ndarray) -> None:
  """Rotates blocks of rows in place."""
  count, width, _ = blocks.shape
  rows = x[: count * width].reshape(count, width, x.shape[1])
  # Products of this size run on one thread. The threads of a larger product wait for
  # each other, which takes many times as long if other processes share the machine.
  for start in range(0, x.shape[1], BLOCK):
    columns = rows[:, :, start : start + BLOCK]
    columns[:] = np.matmul(blocks, columns)


def shortcut(
  hidden: int, width: int, following: int, rng: np.random.Generator
) -> np.ndarray:
  """Draws the shortcut M = A C R, float32.

  Args:
    hidden: D, the width before slicing.
    width: d, the width of this segment.
    following: the width of the next segment: d, or D if it is not sliced.
    rng: the source of randomness.
  """
  count = min(width, hidden - width) if following == width else 0
  angles = np.pi / 2 * (0.01 + 0.98 * rng.random(count) ** 2)
  diagonal = np.eye(width, following, dtype=np.float32)
  diagonal[np.arange(count), np.arange(count)] = np.cos(angles)
  left = Rotation.random(width, rng).apply(diagonal)
  right = Rotation.random(following, rng)
  return right.apply_transposed(np.ascontiguousarray(left.T)).T


class Weights:
  """Draws matrices. Each number depends only on the seed and on its place."""

  def __init__(self, seed: int):
    self._seed = seed
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def matrix(
    self,
    path: str,
    shape: tuple[int, int],
    deviations: tuple[float, float],
  ) -> np.ndarray:
    """Draws a matrix.

    Args:
      path: name of the matrix; matrices with different names differ.
      shape: `[rows, columns]`.
      deviations: standard deviations of the log2 of the scales of rows and of columns.

    Returns:
      The matrix `[rows, columns]`.
    """
    rows, columns = shape
    rng = self._generator(path)
    row, column = (
      np.exp2(deviation * rng.standard_normal(n)).astype(np.float32)
      for n, deviation in zip(shape, deviations, strict=True)
    )
    row *= np.float32(columns**-0.5)
    result = np.empty((rows, columns), np.float16)
    step = max(1, DRAWN // columns)

    def fill(start: int) -> None:
      stop = min(start + step, rows)
      generator = self._generator(path, 1 + start // step)
      drawn = generator.standard_normal((stop - start, columns), np.float32)
      drawn *= row[start:stop, None]
      drawn *= column
      result[start:stop] = drawn

    # `list` raises the exception of a thread, if there was one.
    list(self._pool.map(fill, range(0, rows, step)))
    return result

  def _generator(self, path: str, block: int = 0) -> np.random.Generator:
    seed = [self._seed, zlib.crc32(path.encode()), block]
    return np.random.Generator(np.random.SFC64(seed))


def write(
  directory: str | os.PathLike[str],
  config_json: dict[str, object],
  *,
  sparsity: float = 0.25,
  seed: int = 0,
) -> models.ModelConfig:
  """Writes a sliced checkpoint with random float16 weights; see the module docstring.

  Args:
    directory: the directory, which is made if it does not exist.
    config_json: the config.json of a dense Llama, see `llama`.
    sparsity: the part of the hidden size to remove.
    seed: seed of all numbers.

  Returns:
    The config of the sliced model.
  """
  dense = checkpoints.parse_config(config_json)
  hidden, segments = dense.hidden_size, len(dense.segment_widths)
  width = slicing.sliced_width(hidden, sparsity)
  config = dense.sliced_to((width,) * (segments - 1) + (hidden,))
  stem = f'llama_{sparsity}'
  files = {
    'config.json': json.dumps(config_json, indent=2).encode(),
    f'{stem}.json': json.dumps(checkpoints.slicing_json(config)).encode(),
  }
  paths = [*structured.flatten(models.outer_shapes(config))]
  for index in range(config.num_layers):
    layer_paths = structured.flatten(models.layer_shapes(config, index))
    paths += [models.names.prefix(index) + path for path in layer_paths]
  writer = checkpoints.CheckpointWriter(
    pathlib.Path(directory),
    config,
    dtypes=dict.fromkeys(paths, np.float16),
    files=files,
    stem=stem,
  )
  with writer.open():
    for path, array in _arrays(Weights(seed), config, dense.tied_head, seed):
      writer.add(path, array)
  return config


def _arrays(
  weights: Weights, config: models.ModelConfig, is_tied: bool, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields paths and parameters; kernels are transposed views of `[out, in]`."""
  deviations = OTHER_DEVIATION, RESIDUAL_DEVIATION
  for index in range(config.num_layers):
    for path, shape in structured.flatten(models.layer_shapes(config, index)).items():
      full = models.names.prefix(index) + path
      if 'shortcut' in path:
        number = 2 * index + (path == 'mlp_shortcut/kernel')
        width, following = config.segment_widths[number : number + 2]
        rng = np.random.default_rng([seed, number])
        matrix = shortcut(config.hidden_size, width, following, rng)
        yield full, matrix.astype(np.float16)
      else:
        writes = path in ('attention/out/kernel', 'mlp/down/kernel')
        scales = deviations[::-1] if writes else deviations
        yield full, weights.matrix(full, shape[::-1], scales).T
  shapes = structured.flatten(models.outer_shapes(config))
  kernel = weights.matrix('head/kernel', shapes['head/kernel'][::-1], deviations).T
  yield 'head/kernel', kernel
  tokens = shapes['embed/tokens']
  if is_tied:
    rotation = Rotation.random(config.hidden_size, np.random.default_rng(seed))
    rotated = rotation.apply_transposed(kernel.astype(np.float32))
    yield 'embed/tokens', rotated[: tokens[1]].T.astype(np.float16)
  else:
    yield 'embed/tokens', weights.matrix('embed/tokens', tokens, deviations)
