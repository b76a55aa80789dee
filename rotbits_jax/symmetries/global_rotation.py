r"""The global gauge: what is left of the residual stream's rotations.

When every shortcut is symmetric, [P_s 0] with P_s = P_s^T, one rotation is left that
keeps all of them so. If segment s has the first d_s of W dimensions, it is

    R = diag(G_0, G_1, ...),    G_0 in O(d_0), and G_i in O(d_{s+1} - d_s)
                                wherever the stream gets wider,

with R_s its leading d_s rows and columns. A G_i makes rows of a kernel that reads the
stream upper trapezoidal, by a QR factorisation: those of the first MLP's up kernel and,
of dimensions that only the last segment has, the head's. Rows of the head would do for
all, but they share a mean, and so do the activations that they meet: with both along
one axis the same rounding errors do twice the harm (measured).

The stream never gets narrower there: where it does, the residual gauge leaves no
freedom, and rotations start behind it; they start at the last segment where shortcuts
are plain arrays.

A dense model with RMSNorm has no shortcuts: after its norms' scales are folded into the
kernels that read them, all segments share one rotation. If its head is tied to the
embedding, the last norm's scale stays between the two, and nothing can be rotated.

Shape letters: D hidden size, V vocabulary, d the width of a segment.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import transform


def remove_global_gauge() -> transform.Transform:
  """The transform that fixes the last rotation of the residual stream.

  Returns:
    A transform. Its notes tell which kernels are trapezoidal and what they store.
  """
  return transform.Transform('global gauge', _remove_global_gauge)


def upper_rotation(matrix: jax.Array) -> jax.Array:
  """The rotation G that makes `G^T @ matrix` upper trapezoidal.

  Args:
    matrix: `[d, V]`.

  Returns:
    float32 `[d, d]`, orthogonal to the rounding of float32.
  """
  columns = matrix[:, : matrix.shape[0]].astype(jnp.float32)
  q, _ = jnp.linalg.qr(columns, mode='complete')
  return canonical.reorthogonalize(q)


def fold_norm_scales(layer: models.Params) -> models.Params:
  """Moves the scales of a dense layer's RMSNorms into the kernels that read them."""
  # With parallel blocks both sublayers read the attention's norm.
  norms = {name: f'{name}_norm' for name in models.WRITERS if f'{name}_norm' in layer}
  scales = {
    name: layer[norms.get(name, norms['attention'])]['scale'] for name in models.WRITERS
  }
  folded = models.map_sublayers(
    layer,
    read=lambda name, linear: (
      linear | {'kernel': scaled(linear['kernel'], scales[name])}
    ),
    write=lambda _, linear: linear,
  )
  ones = {
    norm: {'scale': jnp.ones_like(layer[norm]['scale'])} for norm in norms.values()
  }
  return layer | folded | ones


def scaled(kernel: Any, scale: jax.Array) -> Any:
  """`diag(scale) @ kernel` in float32, rounded to the kernel's dtype."""
  if isinstance(kernel, structured.FactorPair):
    pair = kernel.plain()
    return dataclasses.replace(pair, u=scaled(pair.u, scale))
  product = kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
  return product.astype(kernel.dtype)


def _remove_global_gauge(
  model: models.Model,
) -> tuple[models.Model, list[transform.Note]]:
  widths = model.config.segment_widths
  if model.config.sliced:
    free, start = model.materialize(but=rotations_lib.KEPT), _first_free(model)
  elif model.config.norm == 'rmsnorm' and not model.config.tied_head:
    free, start = without_norm_scales(model), 0
  else:
    return model, []
  if start is None or not transform.is_within(free.params, np.inf):
    return model, []
  edges = [0, *sorted(set(widths[start:]))]  # it only gets wider
  layer, kernels = _readers(free, start)
  rotation = np.zeros((edges[-1], edges[-1]), np.float32)
  blocks: dict[str, list[int]] = {name: [] for name in kernels}
  for a, b in itertools.pairwise(edges):
    name = next((n for n, kernel in kernels.items() if b <= kernel.shape[0]), None)
    if name is None:
      return model, []
    blocks[name].append(b - a)
    rotation[a:b, a:b] = _upper_rotation(kernels[name][a:b])
  turns = [np.eye(d, dtype=np.float32) for d in widths[:start]]
  turns += [rotation[:d, :d] for d in widths[start:]]
  rotated = rotations_lib.rotate(free, turns)
  if not transform.is_within(rotated.params, transform.limit(model)):
    return model, []
  outer, layers, notes = rotated.outer(), list(rotated.layers()), []
  for name, sizes in blocks.items():
    if not sizes:
      continue
    parent = outer['head'] if name == HEAD else layers[layer]['mlp']['up']
    leaf, note = _trapezoids(name, parent['kernel'], sizes)
    notes.append(note)
    if name == HEAD:
      outer['head'] = parent | {'kernel': leaf}
    else:
      mlp = layers[layer]['mlp']
      layers[layer] = layers[layer] | {'mlp': mlp | {'up': parent | {'kernel': leaf}}}
  if not model.config.sliced:
    outer, *layers = (_with_constant_norms(tree) for tree in (outer, *layers))
  rewritten = models.from_layers(
    model.config, outer, layers, model.buffers, model.stored_as
  )
  return rewritten, notes


HEAD = 'head/kernel'


def _readers(model: models.Model, start: int) -> tuple[int, dict[str, Any]]:
  """The kernels that are made trapezoidal, the first MLP's and the head, by path.

  The MLP's is that of the first layer, also returned, whose MLP reads a segment that
  rotates; there is none if only the last segment does.
  """
  config, step = model.config, model.config.segments_per_layer
  kernels = {HEAD: model.params['head']['kernel']}
  if isinstance(kernels[HEAD], structured.FactorPair):
    kernels = {}
  for i, layer in enumerate(model.layers()):
    kernel = layer['mlp']['up']['kernel']
    if i * step + step - 1 >= start and not isinstance(kernel, structured.FactorPair):
      return i, {f'layers.{i}/mlp/up/kernel': kernel} | kernels
  return config.num_layers, kernels


def _trapezoids(
  path: str, kernel: np.ndarray, blocks: list[int]
) -> tuple[structured.RowTrapezoids, transform.Note]:
  full = kernel.shape[0] - sum(blocks)
  leaf = structured.RowTrapezoids(kernel, tuple(blocks), full)
  leaf = leaf.from_stored(*leaf.stored())  # with exact zeros
  dropped = float(np.linalg.norm(np.asarray(leaf.upper) - kernel))
  norm = float(np.linalg.norm(kernel))
  error = dropped / norm if norm else 0.0
  return leaf, transform.note(path, leaf, error=error, blocks=blocks)


def _first_free(model: models.Model) -> int | None:
  """From where on segments share a rotation; None where none is left."""
  start: int | None = 0
  shortcuts = (
    layer[name]['kernel']
    for layer in model.layers()
    for name in ('attention_shortcut', 'mlp_shortcut')
    if name in layer
  )
  for s, kernel in enumerate(shortcuts):
    if isinstance(kernel, structured.Trapezoidal):
      start = None
    elif not structured.is_structured(kernel):
      start = s + 1
  return start


def without_norm_scales(model: models.Model) -> models.Model:
  """A dense RMSNorm model with scales of 1, folded into the kernels that read them."""
  params = model.materialize(but=(structured.FactorPair,)).params
  for name in params:
    if name.startswith('blocks_'):
      params[name] = jax.device_get(_fold_norm_scales(params[name]))
  scale, head = params['final_norm']['scale'], params['head']
  kernel = jax.device_get(scaled(jax.tree.map(jnp.asarray, head['kernel']), scale))
  params['head'] = head | {'kernel': kernel}
  params['final_norm'] = {'scale': np.ones_like(scale)}
  return dataclasses.replace(model, params=params)


def _with_constant_norms(tree: models.Params) -> models.Params:
  """Scales of 1 as leaves that store nothing."""
  return {
    name: {'scale': structured.Constant.like(norm['scale'], 1.0)}
    if name.endswith('_norm')
    else norm
    for name, norm in tree.items()
  }


_upper_rotation = jax.jit(upper_rotation)
_fold_norm_scales = jax.jit(jax.vmap(fold_norm_scales))
