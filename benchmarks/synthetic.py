r"""Writes sliced checkpoints of published sizes, with random weights.

  python -m benchmarks.synthetic --model=llama-2-7b --slicing=0.25 --output=DIR \
      [--layers=N] [--dtype=float16] [--shard_size=BYTES] [--seed=N]

The checkpoints are for measurements of time, memory and size at 7 to 13 billion
parameters, where no real checkpoint is at hand. Each layer is drawn, written and
dropped, so memory holds one layer or the embedding. Llama-2-7B, 11.4 GB, takes 92 s on
two cores and 0.75 GB of memory.

A shortcut is the matrix that leads from one residual segment to the next. The shortcuts
are those of a chain of subspaces, as SliceGPT makes them. Segment s has orthonormal
columns V_s `[D, d]`, and its shortcut is M_s = V_s^T V_{s+1}. With m = D - d and an
orthonormal complement W_s,

  V_{s+1} = (V_s A C + W_s B S) R

Here A, R `[d, d]` and B `[m, m]` are random rotations, and C and S are diagonal
matrices with the cosines and sines of the angles between the two subspaces; d - m of
the cosines are 1. So M_s = A C R has 2d - D singular values 1. The others are cosines
in (0, 1), half of them above 0.92, as is usual in sliced models. The last segment is
not sliced: its shortcut is `[d, D]` with orthonormal rows. A rotation is a product of
sparse rotations (random permutations, and blocks of 64 with the Haar distribution); the
product is dense.

Weights are independent Gaussians, so that a coder finds no other structure in them.
Their scale has a lognormal factor for each row and for each column. If the dense
model's head is tied to the embedding, the head is drawn, and the embedding is the head
times V_last^T V_0. Otherwise both are drawn independently.
"""

from collections.abc import Iterator
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple
import zlib

from absl import flags
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
import tqdm

from configs import published
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import slicing
from rotbits_jax import structured
from rotbits_jax.cli import program

BLOCK = 64  # width of the dense blocks of a rotation
STAGES = 2  # number of sparse rotations in a product
DRAWN = 1 << 20  # how many numbers one thread draws at a time
# Standard deviations of the log2 of the scales.
RESIDUAL_OCTAVES = 0.1  # along the axis of the residual stream
OTHER_OCTAVES = 0.25  # along the other axis of a matrix

DTYPES = {
  'float16': np.dtype(np.float16),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float32': np.dtype(np.float32),
}

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_enum(
  'model',
  'llama-2-7b',
  list(published.MODELS),
  'The model whose sizes to take.',
  flag_values=FLAGS,
)
_SLICING = flags.DEFINE_float(
  'slicing', 0.25, 'The part of the hidden size to remove.', flag_values=FLAGS
)
_LAYERS = flags.DEFINE_integer(
  'layers',
  None,
  'Number of layers; default: all layers of the model.',
  lower_bound=1,
  flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The directory to write to.', required=True, flag_values=FLAGS
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float16', list(DTYPES), 'The dtype of the numbers.', flag_values=FLAGS
)
_SHARD_SIZE = flags.DEFINE_integer(
  'shard_size', None, 'Bytes of a weights file.', lower_bound=1, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer('seed', 0, 'The seed of all numbers.', flag_values=FLAGS)


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


class Step(NamedTuple):
  """The step from the subspace of one segment to that of the next.

  Attributes:
    kept: A, a rotation of the d coordinates.
    cut: B, a rotation of the m coordinates that slicing removes; None if m is 0.
    cosines: float32 `[k]`, the cosines of the k = min(d, m) angles; empty if the next
      segment is not sliced.
    after: R, a rotation of the coordinates of the next segment.
  """

  kept: Rotation
  cut: Rotation | None
  cosines: np.ndarray
  after: Rotation

  @classmethod
  def random(
    cls, hidden: int, width: int, following: int, rng: np.random.Generator
  ) -> 'Step':
    """Draws a step.

    Args:
      hidden: D.
      width: d, the width of this segment.
      following: the width of the next segment: d, or D if it is not sliced.
      rng: the source of randomness.
    """
    cut = hidden - width
    count = min(width, cut) if following == width else 0
    angles = np.pi / 2 * (0.01 + 0.98 * rng.random(count) ** 2)
    return cls(
      Rotation.random(width, rng),
      Rotation.random(cut, rng) if cut else None,
      np.cos(angles).astype(np.float32),
      Rotation.random(following, rng),
    )

  def shortcut(self, width: int, following: int) -> np.ndarray:
    """Returns the shortcut M = A C R, float32 `[d, d']`."""
    diagonal = np.eye(width, following, dtype=np.float32)
    index = np.arange(len(self.cosines))
    diagonal[index, index] = self.cosines
    left = self.kept.apply(diagonal)
    return self.after.apply_transposed(np.ascontiguousarray(left.T)).T

  def advance(self, coordinates: np.ndarray, width: int) -> np.ndarray:
    """Converts coordinates from the basis of this segment to that of the next.

    Args:
      coordinates: float32 `[D, k]`, in the basis `[V_s, W_s]`.
      width: d, the width of this segment.

    Returns:
      The coordinates in the basis `[V_{s+1}, W_{s+1}]`.
    """
    x = np.empty_like(coordinates)
    x[:width] = self.kept.apply_transposed(coordinates[:width])
    if self.cut is not None:
      x[width:] = self.cut.apply_transposed(coordinates[width:])
    count = len(self.cosines)
    cosines = self.cosines[:, None]
    sines = np.sqrt(1 - cosines**2)
    above, below = x[:count].copy(), x[width : width + count].copy()
    x[:count] = cosines * above + sines * below
    x[width : width + count] = cosines * below - sines * above
    following = len(self.after.stages[0][0])
    x[:following] = self.after.apply_transposed(x[:following])
    return x


class Weights:
  """Draws matrices. Each number depends only on the seed and on its place."""

  def __init__(self, seed: int, dtype: np.dtype):
    self._seed, self.dtype = seed, dtype
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def matrix(
    self,
    path: str,
    shape: tuple[int, int],
    octaves: tuple[float, float],
    gain: float = 1.0,
    times: np.ndarray | None = None,
  ) -> np.ndarray:
    """Draws a matrix.

    Args:
      path: name of the matrix; matrices with different names differ.
      shape: `[rows, columns]`.
      octaves: standard deviations of the log2 of the scales of rows and of columns.
      gain: the approximate root mean square of the norms of rows.
      times: float32 `[columns, k]`, a matrix by which the drawn matrix is multiplied
        before it is rounded; None for none.

    Returns:
      The matrix `[rows, columns]`, or `[rows, k]`.
    """
    rows, columns = shape
    rng = self._generator(path)
    row, column = (
      np.exp2(deviation * rng.standard_normal(n)).astype(np.float32)
      for n, deviation in zip(shape, octaves, strict=True)
    )
    row *= np.float32(gain / np.sqrt(columns))
    result = np.empty((rows, columns if times is None else times.shape[1]), self.dtype)
    step = max(1, DRAWN // columns)

    def fill(start: int) -> None:
      stop = min(start + step, rows)
      generator = self._generator(path, 1 + start // step)
      drawn = generator.standard_normal((stop - start, columns), np.float32)
      drawn *= row[start:stop, None]
      drawn *= column
      result[start:stop] = drawn if times is None else drawn @ times

    # `list` raises the exception of a thread, if there was one.
    list(self._pool.map(fill, range(0, rows, step)))
    return result

  def vector(self, path: str, size: int) -> np.ndarray:
    """Draws a bias `[size]`."""
    return (0.02 * self._generator(path).standard_normal(size)).astype(self.dtype)

  def _generator(self, path: str, block: int = 0) -> np.random.Generator:
    seed = [self._seed, zlib.crc32(path.encode()), block]
    return np.random.Generator(np.random.SFC64(seed))


def write(
  directory: str | os.PathLike[str],
  dense: models.ModelConfig,
  *,
  sparsity: float,
  name: str,
  dtype: DTypeLike = np.float16,
  seed: int = 0,
  shard_size: int | None = None,
  progress: bool = False,
) -> models.ModelConfig:
  """Writes a sliced checkpoint with random weights; see the module docstring.

  Args:
    directory: the directory, which is made if it does not exist.
    dense: config of the dense model, an OPT or a Llama.
    sparsity: the part of the hidden size to remove.
    name: name of the model; the stem is `<name>_<sparsity>`.
    dtype: dtype of the numbers.
    seed: seed of all numbers.
    shard_size: see `checkpoints.CheckpointWriter`.
    progress: whether to show a bar on stderr, if stderr is a terminal.

  Returns:
    The config of the sliced model.

  Raises:
    ValueError: if the model is of another family, or if a setting is out of range.
  """
  dtype = np.dtype(dtype)
  hidden, segments = dense.hidden_size, len(dense.segment_widths)
  width = slicing.sliced_width(hidden, sparsity)
  config = dense.sliced_to((width,) * (segments - 1) + (hidden,))
  stem = f'{name}_{sparsity}'
  config_json = hugging_face_json(dense) | {'torch_dtype': dtype.name}
  slicing_json = checkpoints.slicing_json(config)
  if checkpoints.parse_config(config_json, slicing_json) != config:
    raise ValueError(f'config.json cannot express all of {dense}')
  files = {
    'config.json': json.dumps(config_json, indent=2).encode(),
    f'{stem}.json': json.dumps(slicing_json).encode(),
  }
  weights = Weights(seed, dtype)
  # The coordinates of V_0 in the basis of the current segment, if the head is tied.
  first = np.eye(hidden, width, dtype=np.float32) if dense.tied_head else None
  bar = tqdm.tqdm(
    range(config.num_layers),
    desc='write',
    unit='layer',
    disable=None if progress else True,
  )
  with checkpoints.CheckpointWriter(
    directory, config, dtypes=dtype, files=files, stem=stem, shard_size=shard_size
  ) as writer:
    for index in bar:
      shortcuts = []
      for segment in range(config.segments_per_layer):
        number = index * config.segments_per_layer + segment
        own, following = config.segment_widths[number : number + 2]
        rng = np.random.default_rng([seed, number])
        step = Step.random(hidden, own, following, rng)
        shortcuts.append(step.shortcut(own, following))
        if first is not None:
          first = step.advance(first, own)
      layer = _layer(weights, config, index, shortcuts)
      for path, leaf in structured.flatten(layer).items():
        writer.add(models.names.prefix(index) + path, leaf)
    for outer in _outer(weights, config, first):
      for path, leaf in structured.flatten(outer).items():
        writer.add(path, leaf)
  return config


def hugging_face_json(config: models.ModelConfig) -> dict[str, Any]:
  """Returns the content of `config.json` for a dense OPT or Llama.

  Raises:
    ValueError: if the model is of another family.
  """
  shared = {
    'model_type': config.family,
    'hidden_size': config.hidden_size,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'vocab_size': config.vocab_size,
    'max_position_embeddings': config.max_positions,
    'tie_word_embeddings': config.tied_head,
    'use_cache': True,
  }
  if config.family == 'opt':
    return shared | {
      'architectures': ['OPTForCausalLM'],
      'activation_function': config.activation,
      'bos_token_id': 2,
      'do_layer_norm_before': True,
      'eos_token_id': 2,
      'ffn_dim': config.intermediate_size,
      'pad_token_id': 1,
      'word_embed_proj_dim': config.hidden_size,
    }
  if config.family == 'llama':
    return shared | {
      'architectures': ['LlamaForCausalLM'],
      'bos_token_id': 1,
      'eos_token_id': 2,
      'hidden_act': config.activation,
      'intermediate_size': config.intermediate_size,
      'num_key_value_heads': config.num_kv_heads,
      'rms_norm_eps': config.norm_eps,
      'rope_theta': config.rope_theta,
    }
  raise ValueError(f'the model must be an OPT or a Llama, got {config.family=}')


def _layer(
  weights: Weights,
  config: models.ModelConfig,
  index: int,
  shortcuts: list[np.ndarray],
) -> models.Params:
  """Draws the parameters of a layer; kernels are transposed views of `[out, in]`."""
  names = ('attention_shortcut/kernel', 'mlp_shortcut/kernel')
  made = dict(zip(names, shortcuts, strict=False))
  found: models.Params = {}
  for path, shape in structured.flatten(models.layer_shapes(config, index)).items():
    full = models.names.prefix(index) + path
    if path in made:
      found[path] = made[path].astype(weights.dtype)
    elif path.endswith('/bias'):
      found[path] = weights.vector(full, *shape)
    else:
      writes = path in ('attention/out/kernel', 'mlp/down/kernel')
      octaves = (OTHER_OCTAVES, RESIDUAL_OCTAVES)
      found[path] = weights.matrix(
        full, shape[::-1], octaves[::-1] if writes else octaves
      ).T
  return structured.unflatten(found)


def _outer(
  weights: Weights, config: models.ModelConfig, first: np.ndarray | None
) -> Iterator[models.Params]:
  """Draws the parameters outside the layers, one matrix at a time.

  Args:
    weights: draws the matrices.
    config: config of the sliced model.
    first: V_last^T V_0, float32 `[D, d]`, if the dense model's head is tied; else None.

  Yields:
    Parts of the tree of parameters.
  """
  octaves = (OTHER_OCTAVES, RESIDUAL_OCTAVES)
  shapes = structured.flatten(models.outer_shapes(config))
  head = shapes['head/kernel'][::-1]
  params = {'kernel': weights.matrix('head/kernel', head, octaves).T}
  if 'head/bias' in shapes:
    params['bias'] = weights.vector('head/bias', *shapes['head/bias'])
  yield {'head': params}
  del params
  if first is None:
    shape = shapes['embed/tokens']
    tokens = weights.matrix('embed/tokens', shape, octaves)
  else:  # the head is drawn again, because its rounded numbers would add an error
    tokens = weights.matrix('head/kernel', head, octaves, times=first)
  yield {'embed': {'tokens': tokens}}
  del tokens
  if 'embed/positions' in shapes:
    shape = shapes['embed/positions']
    yield {'embed': {'positions': weights.matrix('embed/positions', shape, octaves)}}


def main() -> None:
  dense = checkpoints.parse_config(published.MODELS[_MODEL.value])
  if _LAYERS.value is not None:
    segments = dense.segments_per_layer * _LAYERS.value + 1
    dense = dataclasses.replace(
      dense,
      num_layers=_LAYERS.value,
      segment_widths=(dense.hidden_size,) * segments,
    )
  config = write(
    _OUTPUT.value,
    dense,
    sparsity=_SLICING.value,
    name=_MODEL.value,
    dtype=DTYPES[_DTYPE.value],
    seed=_SEED.value,
    shard_size=_SHARD_SIZE.value,
    progress=True,
  )
  size = sum(file.stat().st_size for file in pathlib.Path(_OUTPUT.value).iterdir())
  print(f'wrote {_OUTPUT.value}: {models.count_elements(config):,} numbers, {size:,} B')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
