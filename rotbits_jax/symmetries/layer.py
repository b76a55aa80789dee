r"""One layer of a model, in the coordinates that `canonicalize` chooses.

    gauge      the polar factors of its shortcuts, M_s = [P_s 0] O_s
    segments   the rotations of its segments, R_{s+1} = O_s^T R_s
    rotate     its kernels between rotated segments
    fix        the biases and the bases of its attention heads

`gauge` needs the layer alone, and `segments` the rotation that the layer before ends
with. The others need the rotations, and no other layer. `stacked.canonicalize` is their
`vmap` over stacked layers; `passes` calls the same functions layer by layer, measures
what rounding does to the result, and keeps what is accurate.

A layer is a dict of float32 leaves by path. Every function returns new leaves. d is the
width of a shortcut's first segment, and e that of its second one. Rotations are float32
`[d, d]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib

Params = dict[str, Any]
Polars = Sequence[canonical.Polar | None]
"""The decompositions of a layer's shortcuts, see `gauge`."""

UP, HEAD = 'mlp/up/kernel', 'head/kernel'


def shortcut_paths(config: models.ModelConfig) -> list[str]:
  """Returns the paths of the shortcuts of a layer; none in a dense model."""
  sublayers = models.layout.SUBLAYERS[: config.segments_per_layer]
  return [f'{x}_shortcut/kernel' for x in sublayers] if config.sliced else []


# ---- the residual stream -----------------------------------------------------------


def gauge(
  params: Params,
  config: models.ModelConfig,
  *,
  polar: Callable[[jax.Array], canonical.Polar] = canonical.polar,
) -> list[canonical.Polar | None]:
  """Returns the polar decompositions of the shortcuts; None for one that narrows."""
  kernels = [params[path] for path in shortcut_paths(config)]
  is_wide = [x.shape[0] <= x.shape[1] for x in kernels]
  if len(kernels) == 2 and kernels[0].shape == kernels[1].shape and all(is_wide):
    # One after the other, because LAPACK uses all CPUs for each.
    both = jax.lax.map(polar, jnp.stack(kernels))
    return [jax.tree.map(lambda x, s=s: x[s], both) for s in range(2)]
  pairs = zip(kernels, is_wide, strict=True)
  return [polar(kernel) if is_wide else None for kernel, is_wide in pairs]


def segments(
  params: Params,
  polars: Polars,
  first: jax.Array,  # R_s of the segment that the layer reads
  config: models.ModelConfig,
  *,
  free: jax.Array | None = None,  # Z of the last shortcut
) -> list[jax.Array]:
  """Returns the rotations R_s, R_{s+1}, ... of the segments of a layer.

  A shortcut that narrows the stream becomes lower trapezoidal. All segments of a dense
  model have the same rotation.
  """
  if not config.sliced:
    return [first] * 3
  rotations, paths = [first], shortcut_paths(config)
  for path, polar in zip(paths, polars, strict=True):
    if polar is None:
      rotated = products.matmul(rotations[-1].T, params[path].astype(jnp.float32))
      rotation = rotations_lib.upper_rotation(rotated.T)
    else:
      z = free if path == paths[-1] else None
      rotation = rotations_lib.next_rotation(polar.rotation, rotations[-1], z)
    rotations.append(rotation)
  return rotations


def first_rotation(
  params: Params, polars: Polars, config: models.ModelConfig
) -> rotations_lib.UpperForm | None:
  """Returns the R_0 that makes the up kernel of the first layer upper trapezoidal.

  It is None if that kernel is a structured leaf, or if the segment that it reads has
  another width than the first. The arguments are those of `segments`.
  """
  if not structured.is_plain(params.get(UP)):
    return None
  if not config.sliced:
    params = fold_norm_scales(params, config)
  kernel = params[UP].astype(jnp.float32)
  if config.sliced and not config.parallel_block:
    if polars[0] is None or len(polars[0].u) != len(kernel):
      return None
    kernel = products.matmul(polars[0].rotation, kernel)
  return rotations_lib.upper_form(kernel)


def last_rotation(
  outer: Params, polar: canonical.Polar | None
) -> rotations_lib.UpperForm | None:
  """Returns the Z `[e - d, e - d]` that makes the last rows of the head trapezoidal.

  It is None if the stream does not get wider at its last shortcut, whose decomposition
  is given, or if the head is a structured leaf.
  """
  new = 0 if polar is None else len(polar.rotation) - len(polar.u)
  if polar is None or not new or not structured.is_plain(outer.get(HEAD)):
    return None
  head = outer[HEAD].astype(jnp.float32)
  return rotations_lib.upper_form(products.matmul(polar.rotation[-new:], head))


def rotate(
  params: Params,
  rotations: Sequence[jax.Array | None],  # of `segments`, or of the ends of the model
  config: models.ModelConfig,
  *,
  is_outer: bool = False,
  function: Callable[..., Any] = rotations_lib.rotate,  # or its compiled form
) -> Params:
  """Rotates the kernels and biases of a layer, or the parameters outside the layers.

  In a dense model, the scales of norms are folded into kernels first. Shortcuts stay
  matrices, see `rotations.shortcut`.
  """
  layout = models.layout
  axes = layout.outer_axes(config) if is_outer else layout.layer_axes(config)
  if not config.sliced:
    params = fold_norm_scales(params, config, is_outer=is_outer)
  of = lambda segment: None if segment is None else rotations[segment]
  return {
    path: function(leaf, *map(of, rotations_lib.sides(axes[path])))
    for path, leaf in params.items()
  }


def fold_norm_scales(
  params: Params, config: models.ModelConfig, *, is_outer: bool = False
) -> Params:
  """Moves the scales of RMSNorms into the kernels that read them, in their old dtypes.

  A scale multiplies the coordinates of a segment, and does not commute with a
  rotation. The scales become constant leaves of value 1. The parameters are those
  of a layer of a dense model, or outside the layers; a ValueError for other norms.

  >>> checkpoint = rotbits_jax.checkpoints.example('llama-tiny-dense')
  >>> model = rotbits_jax.load_checkpoint(checkpoint).model
  >>> folded = fold_norm_scales(structured.flatten(model.layer(0)), model.config)
  >>> float(folded['mlp_norm/scale'].value)
  1.0
  """
  if config.norm != 'rmsnorm':
    raise ValueError(f'{config.family}: only scales of RMSNorms can be folded')
  layout, folded = models.layout, dict(params)
  axes = layout.outer_axes(config) if is_outer else layout.layer_axes(config)
  for path, path_axes in axes.items():
    sublayer, is_reader = path.split('/')[0], isinstance(path_axes[0], int)
    if path in params and len(path_axes) == 2 and is_reader:
      norm = 'final_norm' if is_outer else layout.norm_of(config, sublayer)
      kernel, scale = params[path], params[f'{norm}/scale']
      chex.assert_shape(scale, (kernel.shape[-2],))
      product = kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
      folded[path] = product.astype(kernel.dtype)
      folded[f'{norm}/scale'] = structured.Constant.like(scale, 1.0)
  return folded


# ---- attention heads ---------------------------------------------------------------


def without_biases(params: Params, config: models.ModelConfig) -> Params:
  """Returns the biases that change when those of key and value become zero."""
  valid, changed = models.layout.symmetries(config), Params()
  has = lambda path: structured.is_plain(params.get(path))
  if valid.key_bias and has(heads.KEY_BIAS):
    zeros = structured.Constant.like(params[heads.KEY_BIAS], 0.0)
    changed[heads.KEY_BIAS] = zeros
  if valid.values and has(heads.VALUE_BIAS) and has(heads.OUT_BIAS):
    value, out = params[heads.VALUE_BIAS], params[heads.OUT_BIAS]
    kernel = structured.materialize(params[heads.OUT])
    changed[heads.OUT_BIAS] = heads.with_value_bias(
      out, value, kernel, kv_heads=config.num_kv_heads
    )
    changed[heads.VALUE_BIAS] = structured.Constant.like(value, 0.0)
  return changed


def head_pair(
  params: Params, config: models.ModelConfig, *, paths: tuple[str, ...]
) -> Params:
  """Returns the parameters of a layer that share a gauge of heads.

  `paths` is `heads.VALUES` or `heads.KEYS`. The result is {} if there is no such gauge.
  """
  valid, pair = models.layout.symmetries(config), Params()
  is_values = paths == heads.VALUES
  is_free = valid.queries and config.rotary_dim < config.head_dim
  if not (valid.values if is_values else is_free):
    return {}
  for path in paths:
    leaf = params.get(path)
    if leaf is None or (isinstance(leaf, structured.Constant) and not leaf.value):
      continue  # a missing bias is zero
    if not structured.is_plain(leaf):
      return {}
    pair[path] = leaf
  kernel = pair[heads.OUT if is_values else heads.KEY]
  return pair if min(kernel.shape) >= config.head_dim else {}


def fix_pair(pair: Params, config: models.ModelConfig) -> tuple[Params, jax.Array]:
  """Fixes the gauge of the heads of a `head_pair`; returns it and A."""
  count = config.num_kv_heads
  if heads.OUT in pair:
    return heads.fix_values(pair, kv_heads=count)
  return heads.fix_keys(pair, kv_heads=count, rotary=config.rotary_dim)


def fix(
  params: Params, config: models.ModelConfig
) -> tuple[Params, dict[str, jax.Array]]:
  """Removes biases and fixes heads; also returns their A by 'values' and 'keys'."""
  params, gauges = params | without_biases(params, config), {}
  for name, paths in (('values', heads.VALUES), ('keys', heads.KEYS)):
    if pair := head_pair(params, config, paths=paths):
      fixed, gauges[name] = fix_pair(pair, config)
      params |= fixed
  return params, gauges
