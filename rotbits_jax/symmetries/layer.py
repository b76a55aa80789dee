r"""One layer of a model, in the coordinates that `canonicalize` chooses.

    gauge      the polar factors of its shortcuts, M_s = [P_s 0] O_s
    segments   the rotations of its segments, R_{s+1} = O_s^T R_s
    rotate     its kernels between rotated segments
    fix        the biases and the bases of its attention heads

`gauge` needs the layer alone, and `segments` the rotation that the layer before ends
with. The others need the rotations, and no other layer. `canonicalize` is their
`vmap` over stacked layers; `passes` calls the same functions layer by layer, measures
what rounding does to the result, and keeps what is accurate.

A layer is a dict of float32 leaves by path. Every function returns new leaves. d is the
width of a shortcut's first segment, and e that of its second one. Rotations are float32
`[d, d]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import factorizations
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib

Params = dict[str, Any]
Polars = Sequence[factorizations.Polar | None]
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
  polar: Callable[[jax.Array], factorizations.Polar] = factorizations.polar,
) -> list[factorizations.Polar | None]:
  """Returns the polar decompositions of the shortcuts, M_s = [P_s 0] O_s.

  Args:
    params: the layer.
    config: the config of the model.
    polar: the function that decomposes a matrix `[d, e]`, d <= e.

  Returns:
    A decomposition for each shortcut; None for one that narrows the stream.
  """
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
  first: jax.Array,
  config: models.ModelConfig,
  *,
  free: jax.Array | None = None,
) -> list[jax.Array]:
  """Returns the rotations R_s, R_{s+1}, ... of the segments of a layer.

  A shortcut that narrows the stream becomes lower trapezoidal. All segments of a dense
  model have the same rotation.

  Args:
    params: the layer.
    polars: what `gauge` returned.
    first: R_s of the segment that the layer reads, float32 `[d, d]`.
    config: the config of the model.
    free: Z of the last shortcut; None for the identity.

  Returns:
    The rotations, float32.
  """
  if not config.sliced:
    return [first] * 3
  rotations = [first]
  paths = shortcut_paths(config)
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

  Args:
    params: the first layer.
    polars: what `gauge` returned.
    config: the config of the model.

  Returns:
    R_0 and its pivots; None if that kernel is a structured leaf, or if the segment that
    it reads has another width than the first.
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
  outer: Params, polar: factorizations.Polar | None
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
  rotations: Sequence[jax.Array | None],
  config: models.ModelConfig,
  *,
  is_outer: bool = False,
  function: Callable[..., Any] = rotations_lib.rotate,
) -> Params:
  """Rotates the kernels and biases of a layer, or the parameters outside the layers.

  In a dense model, the scales of norms are folded into kernels first. Shortcuts stay
  matrices, see `rotations.shortcut`.

  Args:
    params: the parameters.
    rotations: those of `segments`, or outside the layers those of the first and the
      last segment; None for the identity.
    config: the config of the model.
    is_outer: whether the parameters are those outside the layers.
    function: `rotations.rotate` or its compiled form.

  Returns:
    The rotated parameters, in their dtypes.
  """
  layout = models.layout
  axes = layout.outer_axes(config) if is_outer else layout.layer_axes(config)
  if not config.sliced:
    params = fold_norm_scales(params, config, is_outer=is_outer)

  def of(segment: int | None) -> jax.Array | None:
    return None if segment is None else rotations[segment]

  rotated = {}
  for path, leaf in params.items():
    read, written = rotations_lib.sides(axes[path])
    rotated[path] = function(leaf, of(read), of(written))
  return rotated


def fold_norm_scales(
  params: Params, config: models.ModelConfig, *, is_outer: bool = False
) -> Params:
  """Moves the scales of RMSNorms into the kernels that read them, in their old dtypes.

  A scale multiplies the coordinates of a segment, and does not commute with a
  rotation: `(x * scale) W = x (diag(scale) W)`.

  >>> checkpoint = rotbits_jax.checkpoints.example('llama-tiny-dense')
  >>> model = rotbits_jax.load_checkpoint(checkpoint).model
  >>> folded = fold_norm_scales(structured.flatten(model.layer(0)), model.config)
  >>> float(folded['mlp_norm/scale'].value)
  1.0

  Args:
    params: the parameters of a layer of a dense model, by path.
    config: the config of the model.
    is_outer: whether they are the parameters outside the layers instead.

  Returns:
    The parameters; the scales are constant leaves of value 1.

  Raises:
    ValueError: for another norm, or a scale of another shape.
  """
  if config.norm != 'rmsnorm':
    raise ValueError(f'{config.family}: only scales of RMSNorms can be folded')
  layout = models.layout
  folded = dict(params)
  axes = layout.outer_axes(config) if is_outer else layout.layer_axes(config)
  for path, path_axes in axes.items():
    is_reader = len(path_axes) == 2 and isinstance(path_axes[0], int)
    if path not in params or not is_reader:
      continue
    sublayer = path.split('/')[0]
    norm = 'final_norm' if is_outer else layout.norm_of(config, sublayer)
    folded[path] = _scaled_rows(params, path, norm)
    folded[f'{norm}/scale'] = structured.Constant.like(params[f'{norm}/scale'], 1.0)
  return folded


def _scaled_rows(params: Params, path: str, norm: str) -> jax.Array:
  """Returns the kernel `diag(scale) W`, in its dtype."""
  kernel = params[path]
  scale = params[f'{norm}/scale']
  if scale.shape != (kernel.shape[-2],):
    raise ValueError(
      f'{norm}/scale must have an element for each row of {path}, got {scale.shape=}, '
      f'{kernel.shape=}'
    )
  product = kernel.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
  return product.astype(kernel.dtype)


# ---- attention heads ---------------------------------------------------------------


def without_biases(params: Params, config: models.ModelConfig) -> Params:
  """Returns the biases that change when those of key and value become zero."""
  valid = models.layout.symmetries(config)
  changed: Params = {}

  def has(path: str) -> bool:
    return structured.is_plain(params.get(path))

  if valid.key_bias and has(heads.KEY_BIAS):
    zeros = structured.Constant.like(params[heads.KEY_BIAS], 0.0)
    changed[heads.KEY_BIAS] = zeros
  if valid.values and has(heads.VALUE_BIAS) and has(heads.OUT_BIAS):
    value = params[heads.VALUE_BIAS]
    out = params[heads.OUT_BIAS]
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

  Args:
    params: the layer.
    config: the config of the model.
    paths: `heads.VALUES` or `heads.KEYS`.

  Returns:
    The parameters; {} if there is no such gauge.
  """
  valid = models.layout.symmetries(config)
  is_values = paths == heads.VALUES
  is_free = valid.values
  if not is_values:
    is_free = valid.queries and config.rotary_dim < config.head_dim
  if not is_free:
    return {}
  pair: Params = {}
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
  params = params | without_biases(params, config)
  gauges = {}
  for name, paths in (('values', heads.VALUES), ('keys', heads.KEYS)):
    if pair := head_pair(params, config, paths=paths):
      fixed, gauges[name] = fix_pair(pair, config)
      params |= fixed
  return params, gauges
