r"""SliceGPT: rotate the residual stream to principal components, cut the last ones off.

For every segment s of the fused model (`norm_fusion`) calibration gives orthonormal
columns V_s `[D, d]` (`calibration`). What writes the segment is multiplied by V_s, what
reads it by V_s^T, and the shortcut between two segments becomes V_s^T V_{s+1}. With
d = D that is a rotation, which changes nothing; with d < D it is an approximation.

Products are float64 on the host, rounded once to the dtype that is asked for.

Reference: SliceGPT, arXiv 2401.15024, section 3.3 and algorithm 1.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.progress import track
from rotbits_jax.slicing import calibration
from rotbits_jax.slicing import norm_fusion

ORIENTATIONS = ('random', 'pca')


def sliced_width(hidden_size: int, sparsity: float, round_interval: int = 8) -> int:
  """d, the width of a sliced segment, as SliceGPT rounds it.

  Args:
    hidden_size: D.
    sparsity: the part of the hidden size that slicing removes, in [0, 1).
    round_interval: the width is rounded down to a multiple of it.

  Raises:
    ValueError: if a setting is out of range, or no width is left.
  """
  if not 0 <= sparsity < 1:
    raise ValueError(f'the slicing sparsity must be in [0, 1), got {sparsity}')
  if round_interval < 1:
    raise ValueError(f'round_interval must be positive, got {round_interval}')
  width = int((1 - sparsity) * hidden_size)  # in this order, as SliceGPT rounds
  width -= width % round_interval
  if width == 0:
    raise ValueError(
      f'the slicing sparsity {sparsity} leaves nothing of the hidden size {hidden_size}'
    )
  return width


def slice_model(
  model: models.Model,
  tokens: np.ndarray,
  *,
  sparsity: float,
  round_interval: int = 8,
  slice_head: bool = False,
  final_orientation: str = ORIENTATIONS[0],
  seed: int = 42,
  dtype: Any = None,
  progress: bool = False,
) -> models.Model:
  """Slices a dense model.

  In memory are, besides what is given and what is returned, the activations of one
  segment, float32 `[S, T, D]`, and in float64 one layer, the embeddings or the head.

  Args:
    model: dense.
    tokens: `[S, T]` token ids: the calibration text, see `sample_sequences`.
    sparsity: the part of the hidden size that slicing removes, in [0, 1).
    round_interval: the width of a segment is rounded down to a multiple of it.
    slice_head: whether the last segment, which the head reads, is sliced too.
    final_orientation: 'pca' leaves a segment's components in order, the largest first;
      'random' rotates those that are kept at random (Haar), so that all numbers of a
      matrix are alike. The function is the same.
    seed: of the random orientations.
    dtype: what the parameters are rounded to: float16, bfloat16, or None for float32,
      which leaves what the mathematics gave, before any storage format.
    progress: whether to show a bar on stderr, if that is a terminal.

  Returns:
    The sliced model; its leaves are NumPy arrays.

  Raises:
    ValueError: if the model is sliced already, a setting is out of range, the tokens do
      not suit the model or are fewer than D, the activations are not finite, or a
      parameter is too large for the dtype.
  """
  config = norm_fusion.fused(model.config)
  hidden = config.hidden_size
  width = sliced_width(hidden, sparsity, round_interval)
  if final_orientation not in ORIENTATIONS:
    raise ValueError(
      f'final_orientation must be one of {ORIENTATIONS}, got {final_orientation!r}'
    )
  tokens = _checked(tokens, config)
  segments = len(config.segment_widths)
  widths = (width,) * (segments - 1) + (width if slice_head else hidden,)
  rng = np.random.default_rng(seed) if final_orientation == 'random' else None
  dtype = jnp.dtype(np.float32 if dtype is None else dtype)
  remaining = iter(widths)

  def next_basis() -> calibration.Basis:
    basis = calibration.principal_components(activations, next(remaining))
    if rng is None:
      return basis
    return basis._replace(kept=basis.kept @ _haar(basis.kept.shape[1], rng))

  dense = model.materialize()
  embeddings = norm_fusion.fuse_embeddings(dense.outer(), dense.config)
  activations = calibration.embed(embeddings, tokens, config)
  bases, layers = [next_basis()], []
  embeddings = {name: table @ bases[0].kept for name, table in embeddings.items()}
  outer = {'embed': _rounded(embeddings, dtype, 'embed')}
  count = config.num_layers
  tracked = track(dense.layers(), 'slice', 'layer', total=count, show=progress)
  for i, layer in enumerate(tracked):
    fused = norm_fusion.fuse_layer(layer, dense.config)
    steps = [fused] if config.parallel_block else [{k: v} for k, v in fused.items()]
    for sublayers in steps:
      calibration.advance(activations, sublayers, bases[-1], config)
      bases.append(next_basis())
    sliced = slice_layer(fused, tuple(basis.kept for basis in bases), config)
    layers.append(_rounded(sliced, dtype, f'layers.{i}'))
    bases = bases[-1:]
  head = norm_fusion.fuse_head(dense.outer(), dense.config)
  head['kernel'] = bases[-1].kept.T @ head['kernel']
  outer['head'] = _rounded(head, dtype, 'head')
  return models.from_layers(config.sliced_to(widths), outer, layers, dense.buffers)


def slice_layer(
  layer: models.Params, bases: tuple[np.ndarray, ...], config: models.ModelConfig
) -> models.Params:
  """Slices the segments that one fused layer touches.

  Args:
    layer: parameters of the fused sublayers, float64.
    bases: V_s, float64 `[D, d]` for each of its segments: the input, the one between
      attention and MLP unless blocks are parallel, and the output.
    config: of the fused model.

  Returns:
    The parameters of the sliced layer, float64, with shortcuts.
  """
  flat, sliced = structured.flatten(layer), {}
  for path, axes in models.layout.layer_axes(config).items():
    first: Any = axes[0]
    last: Any = axes[-1]
    if '_shortcut' in path:
      sliced[path] = bases[first].T @ bases[last]
      continue
    array = flat[path]
    if len(axes) == 2 and isinstance(first, int):
      array = bases[first].T @ array
    if isinstance(last, int):
      array = array @ bases[last]
    sliced[path] = array
  return structured.unflatten(sliced)


def sliced_checkpoint(
  dense: checkpoints.Checkpoint, model: models.Model, stem: str
) -> checkpoints.Checkpoint:
  """What SliceGPT saves: the sliced model, its slicing JSON, the dense model's files.

  Args:
    dense: the checkpoint that was sliced.
    model: the sliced model.
    stem: what the weights and the JSON are named; SliceGPT's is `<name>_<sparsity>`.

  Returns:
    A checkpoint for `checkpoints.save_checkpoint`.
  """
  slicing_json = json.dumps(checkpoints.slicing_json(model.config)).encode()
  return checkpoints.Checkpoint(
    model, dense.files | {f'{stem}.json': slicing_json}, stem
  )


def _checked(tokens: np.ndarray, config: models.ModelConfig) -> np.ndarray:
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(
      f'tokens must be [S, T] integers, got {tokens.shape=} {tokens.dtype=}'
    )
  if tokens.shape[1] > config.max_positions:
    raise ValueError(
      f'the model has {config.max_positions} positions, got sequences of '
      f'{tokens.shape[1]} tokens'
    )
  if tokens.size < config.hidden_size:
    raise ValueError(
      f'the calibration text must have at least as many tokens as the hidden size '
      f'{config.hidden_size}, got {tokens.size}'
    )
  config.check_tokens(tokens)
  return tokens.astype(np.int32)


def _haar(n: int, rng: np.random.Generator) -> np.ndarray:
  """A random rotation, float64 `[n, n]` (Mezzadri, Notices AMS 54, 2007)."""
  q, r = np.linalg.qr(rng.standard_normal((n, n)))
  return q * np.sign(np.diag(r))


def _rounded(tree: models.Params, dtype: np.dtype, where: str) -> models.Params:
  """The tree in another dtype.

  Raises:
    ValueError: if a number is too large for it.
  """

  def rounded(path: Any, array: np.ndarray) -> np.ndarray:
    with np.errstate(over='ignore'):  # told below, with the parameter's name
      result = array.astype(dtype)
    if not np.isfinite(result).all():
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(f'{where}/{name} has numbers that {dtype} cannot hold')
    return result

  return jax.tree_util.tree_map_with_path(rounded, tree)
