r"""SliceGPT: rotates the residual stream to principal components and removes the last.

For every segment s of the fused model (see `norm_fusion`), `calibration` finds
orthonormal columns V_s `[D, d]`. Parameters that write the segment are multiplied by
V_s, parameters that read it by V_s^T, and the shortcut between two segments becomes
V_s^T V_{s+1}. Products are computed in float64 on the host and rounded once.

Shape letters: S sequences of T tokens, D hidden size, d width of a segment.

Reference: SliceGPT, arXiv 2401.15024, section 3.3 and algorithm 1.
"""

import json

import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.slicing import calibration
from rotbits_jax.slicing import norm_fusion
from rotbits_jax.symmetries import rotations
from rotbits_jax.system.progress import Progress


def sliced_width(hidden_size: int, sparsity: float, round_interval: int = 8) -> int:
  """Returns d, the width of a sliced segment, rounded down as SliceGPT does.

  >>> sliced_width(768, 0.2)
  608

  Args:
    hidden_size: D.
    sparsity: the part of D that slicing removes, in [0, 1).
    round_interval: d is rounded down to a multiple of it.

  Raises:
    ValueError: if a setting is out of range, or d would be 0.
  """
  if not 0 <= sparsity < 1:
    raise ValueError(f'the slicing sparsity must be in [0, 1), got {sparsity}')
  if round_interval < 1:
    raise ValueError(f'round_interval must be positive, got {round_interval}')
  width = int((1 - sparsity) * hidden_size)  # the order of SliceGPT's operations
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
  seed: int = 42,
  progress: bool = False,
) -> models.Model:
  """Slices a dense model; the leaves of the result are float32 NumPy arrays.

  The kept components are multiplied by random rotations (Haar), so the elements of a
  matrix have similar sizes. Besides both models, memory holds the activations of one
  segment, float32 `[S, T, D]`, and in float64 one layer, the embeddings or the head.

  Args:
    model: the dense model.
    tokens: integers `[S, T]`, see `calibration.sample_sequences`.
    sparsity: the part of the hidden size that slicing removes, in [0, 1).
    round_interval: the width of a segment is rounded down to a multiple of it.
    slice_head: whether to slice the segment that the head reads, too.
    seed: the seed of the random rotations.
    progress: whether to show a progress bar.

  Returns:
    The sliced model.

  Raises:
    ValueError: if the model is sliced, a setting is out of range, or the tokens are too
      few, too many for a position, or outside the vocabulary.
  """
  config = norm_fusion.fused(model.config)
  hidden = config.hidden_size
  width = sliced_width(hidden, sparsity, round_interval)
  tokens = config.checked_tokens(tokens, '[S, T]')
  if tokens.shape[1] > config.max_positions:
    raise ValueError(
      f'the model has {config.max_positions} positions, got sequences of '
      f'{tokens.shape[1]} tokens'
    )
  if tokens.size < hidden:
    raise ValueError(
      'the calibration text must have at least as many tokens as the hidden size '
      f'{hidden}, got {tokens.size}'
    )
  segments = len(config.segment_widths)
  widths = (width,) * (segments - 1) + (width if slice_head else hidden,)
  rng = np.random.default_rng(seed)
  remaining = iter(widths)

  def next_basis() -> calibration.PrincipalComponents:
    basis = calibration.principal_components(activations, next(remaining))
    # A random rotation (Mezzadri, Notices AMS 54, 2007).
    kept = basis.kept.shape[1]
    q, r = np.linalg.qr(rng.standard_normal((kept, kept)))
    return basis._replace(kept=basis.kept @ (q * np.sign(np.diag(r))))

  dense = model.materialize()
  embeddings = norm_fusion.fuse_embeddings(dense.outer(), dense.config)
  activations = calibration.embed(embeddings, tokens, config)
  bases = [next_basis()]
  layers = []
  embeddings = {name: table @ bases[0].kept for name, table in embeddings.items()}
  outer = {'embed': _float32(embeddings, 'embed')}
  count = config.num_layers
  tracked = Progress('slice', count, 'layer', show=progress, units=dense.layers())
  for i, layer in enumerate(tracked):
    fused = norm_fusion.fuse_layer(layer, dense.config)
    steps = [fused] if config.parallel_block else [{k: v} for k, v in fused.items()]
    for sublayers in steps:
      calibration.advance(activations, sublayers, bases[-1], config)
      bases.append(next_basis())
    sliced = slice_layer(fused, tuple(basis.kept for basis in bases), config)
    layers.append(_float32(sliced, models.names.layer(i)))
    bases = bases[-1:]
  head = norm_fusion.fuse_head(dense.outer(), dense.config)
  head['kernel'] = bases[-1].kept.T @ head['kernel']
  outer['head'] = _float32(head, 'head')
  return models.from_layers(config.sliced_to(widths), outer, layers, dense.buffers)


def slice_layer(
  layer: models.Params, bases: tuple[np.ndarray, ...], config: models.ModelConfig
) -> models.Params:
  """Slices the segments of a fused layer: `V_s^T W`, `W V_s` or `V_s^T V_{s+1}`.

  Args:
    layer: the fused layer, float64.
    bases: V_s of its segments, float64 `[D, d]` each.
    config: the config of the fused model.

  Returns:
    The sliced layer, float64.
  """
  flat = structured.flatten(layer)
  sliced = {}
  for path, axes in models.layout.layer_axes(config).items():
    read, written = (None if x is None else bases[x] for x in rotations.sides(axes))
    if read is not None and written is not None:  # a shortcut
      sliced[path] = read.T @ written
    elif read is not None:
      sliced[path] = read.T @ flat[path]
    else:
      sliced[path] = flat[path] if written is None else flat[path] @ written
  return structured.unflatten(sliced)


def sliced_checkpoint(
  dense: checkpoints.Checkpoint, model: models.Model, stem: str
) -> checkpoints.Checkpoint:
  """Returns the checkpoint that SliceGPT saves.

  Args:
    dense: the checkpoint of the dense model, which has the other files.
    model: the sliced model.
    stem: `<name>_<sparsity>`, with which its files begin.
  """
  widths = json.dumps(checkpoints.slicing_json(model.config)).encode()
  return checkpoints.Checkpoint(model, dense.files | {f'{stem}.json': widths}, stem)


def _float32(tree: models.Params, where: str) -> models.Params:
  """Rounds the arrays of a tree to float32; a ValueError if a number is too large."""
  rounded = {}
  for path, array in structured.flatten(tree).items():
    with np.errstate(over='ignore'):  # the error below names the parameter
      rounded[path] = array.astype(np.float32)
    if not np.isfinite(rounded[path]).all():
      raise ValueError(f'{where}/{path} has numbers that float32 cannot hold')
  return structured.unflatten(rounded)
