r"""The residual gauge: a rotation of every segment of the residual stream.

`symmetries.rotations` explains why the segments can be rotated, and the polar gauge in
which all shortcuts are symmetric. `symmetries.shortcuts` gives the forms of shortcuts.
This pass finds the rotations layer by layer, because R_0 needs the first layer and O_s
needs M_s. It rotates every kernel once.

**Free rotations.** R_0 is free. It makes the up kernel of the first MLP upper
trapezoidal. If the last segment is wider than the one before, a rotation of the new
dimensions is free, too. It makes the last rows of the head upper trapezoidal. The head
could serve for R_0 as well, but it would make the rounding errors twice as harmful
(measured). The reason is that the rows of the head share a mean, and so do the
activations that they are multiplied with; the trapezoidal form puts both means along
one axis.

**Exceptions.** A shortcut that narrows the stream becomes lower trapezoidal, by an LQ
factorisation. A P_s whose low-rank form would not be accurate is stored as its lower
triangle. A segment is not rotated if a rotation could make a number larger than its
dtype can hold, or if a number is not finite. The shortcut that leads into such a
segment remains an array, and a note names the parameter that is the cause.

**Dense models with RMSNorm** have no shortcuts. The scales of the norms are first
folded into the kernels that read them. Then all segments share one rotation, which is
free. If the head is the embedding, nothing can be rotated, because the scale of the
last norm stands between the two.

In this file, d and e are the widths of a shortcut's two segments, and D is the hidden
size.

References:
  SliceGPT, arXiv 2401.15024, section 3: the rotations and the shortcuts.
  Getting Free Bits Back from Rotational Symmetries in LLMs, arXiv 2410.01309: the same
  freedom, removed by bits-back coding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import shortcuts

# Norms of rows and columns may be at most this part of the greatest number of a dtype.
_RANGE = 0.99

# The low-rank form is accurate enough if its relative error is at most this multiple of
# the roundoff. Rounding a dense matrix makes an error of 0.4, and SliceGPT's own
# shortcuts have 0.6 in this form.
_MOST_ERROR = 2.0

_UP = 'mlp/up/kernel'
_HEAD = 'head/kernel'
_OUTER = None  # in place of the index of a layer, for parameters outside the layers


def remove_residual_gauge(*, tolerance: float = 0.7) -> transform.Transform:
  """Makes the transform that fixes the rotations of the residual stream.

  The transform must be the first in a chain, because it reads the layers of the source
  to choose the free rotations.

  Args:
    tolerance: a singular value of a shortcut counts as 1 if it differs from 1 by at
      most this multiple of the roundoff of the stored dtype. The roundoff is 2^-11 for
      float16 and 2^-8 for bfloat16. For float32 it is 2^-19, the error of float32
      linear algebra. In SliceGPT's shortcuts, the singular values that should be 1
      spread by 0.9 roundoffs. With a tolerance of 1.5 all of them count as 1. This
      removes SliceGPT's own rounding errors from the shortcuts, and it changes the
      model as much as storing it in other coordinates does. With 0.7 the larger of
      these errors are kept.

  Returns:
    A transform. Its notes give, for each shortcut, the form, the rank, the count of
    numbers and the relative error. They also name the kernels that are trapezoidal, and
    the parameters because of which a segment is not rotated.
  """
  return transform.make(
    'residual gauge',
    init=_init,
    layers=functools.partial(_layers, tolerance=tolerance),
    outer=_outer,
    skip=_skip,
    reads_source=True,
    takes='float32',
  )


class State(NamedTuple):
  """The state of the transform between two layers.

  Attributes:
    first: R_0, float32 `[d, d]`.
    rotation: the rotation of the segment that the next layer reads, float32 `[d, d]`.
    zeros: how many of the last rows of the first up kernel, and of the head, free
      rotations make upper trapezoidal, int32 `[2]`. If the first is 0, R_0 is the
      identity.
    is_rotated: 0 if the segment that the next layer reads is not rotated, int32 `[]`.
  """

  first: Any
  rotation: Any
  zeros: Any
  is_rotated: Any


def _init(context: transform.Context) -> State | tuple[()]:
  symmetries = models.layout.symmetries(context.config)
  if not (symmetries.segments or symmetries.stream):
    return ()
  rotation = None if _first_obstacle(context) else _first_rotation(context)
  if rotation is not None:
    zeros = np.array([len(rotation), 0], np.int32)
    return State(rotation, rotation, zeros, np.int32(1))
  if symmetries.stream:
    return ()
  eye = np.eye(context.config.segment_widths[0], dtype=np.float32)
  return State(eye, eye, np.zeros(2, np.int32), np.int32(0))


def _layers(
  context: transform.Context,
  state: State,
  first: int,
  layers: list[transform.Params],
  *,
  tolerance: float,
) -> transform.Noted:
  notes: list[list[transform.Note]] = [[] for _ in layers]
  if not state:
    return state, layers, notes
  config = context.config
  layers = [structured.expand(layer, keep_factors=True) for layer in layers]
  gauges: list[_Gauge] = []
  if config.sliced:
    gauges, state = _find_gauges(context, state, first, layers)
  else:
    layers = [_fold(layer, config=config, index=0) for layer in layers]
  names = _shortcut_paths(config)
  kernels = [{path: layer.pop(path) for path in names} for layer in layers]
  rotations = [gauge.rotations for gauge in gauges]
  _rotate_layers(context, layers, rotations or [[state.rotation] * 3] * len(layers))
  if first == 0 and state.zeros[0]:
    layers[0][_UP], error = _with_zeros(layers[0][_UP], rows=int(state.zeros[0]))
    path = models.names.prefix(0) + _UP
    notes[0].append(transform.note(path, layers[0][_UP], error=error))
  for i, gauge in enumerate(gauges):
    for s, path in enumerate(names):
      leaf, kernel = (
        _shortcut(context, gauge, s, kernels[i], tolerance),
        kernels[i][path],
      )
      layers[i][path] = leaf
      name, rank, error = models.names.prefix(first + i) + path, min(leaf.shape), 0.0
      if structured.is_structured(leaf):
        sides = gauge.rotations[s : s + 2]
        rank, error = leaf.rank, _error(leaf, kernel, *sides, dtype=context.dtype)
      note = transform.note(name, leaf, error=error, rank=rank)
      notes[i].append(note | gauge.obstacles.get(s + 1, {}))
  if not config.sliced:
    layers = [_with_constant_norms(layer) for layer in layers]
  return state, layers, notes


def _skip(
  context: transform.Context, state: State, first: int, layers: list[transform.Params]
) -> State:
  if not state or not context.config.sliced:
    return state
  layers = [structured.expand(layer, keep_factors=True) for layer in layers]
  return _find_gauges(context, state, first, layers)[1]


def _outer(
  context: transform.Context, state: State, params: transform.Params
) -> tuple[transform.Params, list[transform.Note]]:
  config, notes = context.config, list[transform.Note]()
  symmetries = models.layout.symmetries(config)
  if (symmetries.segments or symmetries.stream) and not (state and state.zeros[0]):
    notes = [
      transform.note('embed/tokens', params['embed/tokens']) | obstacle
      for obstacle in [_first_obstacle(context)]
      if obstacle
    ]
  if not state:
    return params, notes
  params = structured.expand(params, keep_factors=True)
  if not config.sliced:
    params = _fold(params, config=config, index=_OUTER)
  axes = models.layout.outer_axes(config)
  for path in list(params):
    read, written = rotations_lib.sides(axes[path])
    rows = state.rotation if read is not None and state.is_rotated else None
    columns = state.first if written is not None and state.zeros[0] else None
    params[path] = _rotate(params.pop(path), rows, columns)
  if rows := int(state.zeros[1]):
    params[_HEAD], error = _with_zeros(params[_HEAD], rows=rows)
    notes.append(transform.note(_HEAD, params[_HEAD], error=error))
  return (params if config.sliced else _with_constant_norms(params)), notes


def _rotate_layers(
  context: transform.Context,
  layers: list[transform.Params],
  rotations: list[list[Any]],
) -> None:
  """Rotates the parameters of layers, one parameter after the other."""
  axes = models.layout.layer_axes(context.config)
  for path in list(layers[0]):
    sides = rotations_lib.sides(axes[path])
    if sides == (None, None):
      continue
    arguments = [
      (layer.pop(path), *(None if s is None else own[s] for s in sides))
      for layer, own in zip(layers, rotations, strict=True)
    ]
    results = context.map_layers(rotations_lib.rotate, arguments)
    del arguments  # the memory of what was rotated
    for layer, result in zip(layers, results, strict=True):
      layer[path] = result


def _with_constant_norms(params: transform.Params) -> transform.Params:
  """Replaces scales of 1 by leaves that store one number."""
  return {
    path: structured.Constant.like(leaf, 1.0) if path.endswith('_norm/scale') else leaf
    for path, leaf in params.items()
  }


# ---- the rotations of sliced models ------------------------------------------------


class _Gauge(NamedTuple):
  """The rotations of one layer.

  Attributes:
    rotations: R_s for the segments that the layer reads or writes; None if a segment is
      not rotated.
    polars: polar decompositions of the shortcuts that do not narrow the stream, by
      path.
    values: their singular values, on the host.
    obstacles: parts of notes that say why a segment is not rotated, by its place in
      `rotations`.
  """

  rotations: list[Any]
  polars: dict[str, canonical.Polar]
  values: dict[str, np.ndarray]
  obstacles: dict[int, transform.Note]


def _find_gauges(
  context: transform.Context,
  state: State,
  first: int,
  layers: list[transform.Params],
) -> tuple[list[_Gauge], State]:
  """Returns the gauges of consecutive layers, and the state after these layers."""
  config, paths = context.config, _shortcut_paths(context.config)
  stop, wanted = first + len(layers), []
  for index, layer in enumerate(layers, first):
    widths = config.layer_widths(index)
    keep = [p for s, p in enumerate(paths) if widths[s] <= widths[s + 1]]
    wanted.append(({path: layer[path] for path in keep},))
  polars = context.map_layers(_polars, wanted)
  used = [_range_used(context, i, layer) for i, layer in enumerate(layers, first)]
  used.append(_readers_used(context, stop))
  # The only wait for the devices.
  values, used = jax.device_get(
    ([{path: x.values for path, x in own.items()} for own in polars], used)
  )
  gauges, rotation, zeros = [], state.rotation, state.zeros
  last = rotation if state.is_rotated else None
  for i, layer in enumerate(layers):
    index, widths = first + i, config.layer_widths(first + i)
    device = next(iter(layer.values())).device
    gauge = _Gauge([jax.device_put(last, device)], polars[i], values[i], {})
    for s, path in enumerate(paths):
      d, e = widths[s], widths[s + 1]
      is_last = s + 1 == len(paths)
      obstacle = _obstacle(context, index, used[i], -1 if is_last else s + 1)
      if is_last and not obstacle:
        after = index + 1 if index + 1 < config.num_layers else _OUTER
        obstacle = _obstacle(context, after, used[i + 1], -1 if after is _OUTER else 0)
      before = _or_identity(last, d)
      if obstacle:
        gauge.obstacles[s + 1] = obstacle
        last = None
      elif d > e:
        last = _lower_factor(before, layer[path])[1]
      else:
        step, free = polars[i][path].rotation, None
        if e > d and index + 1 == config.num_layers and is_last:
          free = _last_rotation(context, step, d)
          zeros = np.array([zeros[0], 0 if free is None else e - d], np.int32)
        last = _next_rotation(step, before, free)
      gauge.rotations.append(last)
    gauges.append(gauge)
  rotation = np.eye(e, dtype=np.float32) if last is None else last
  return gauges, State(state.first, rotation, zeros, np.int32(last is not None))


def _or_identity(rotation: Any, width: int) -> Any:
  return jnp.eye(width, dtype=jnp.float32) if rotation is None else rotation


def _shortcut(
  context: transform.Context,
  gauge: _Gauge,
  segment: int,
  kernels: dict[str, jax.Array],
  tolerance: float,
) -> Any:
  """Returns a shortcut of a layer in its gauge, float32, in its smallest form.

  Args:
    context: the context of the transform.
    gauge: the gauge of the layer.
    segment: the place of the shortcut in the layer.
    kernels: the shortcuts of the layer, by path.
    tolerance: see `remove_residual_gauge`.
  """
  path, kernel = list(kernels.items())[segment]
  rows, columns = gauge.rotations[segment : segment + 2]
  if columns is None:
    return _rotate(kernel, rows, None)
  if path not in gauge.polars:
    return structured.Trapezoidal(jnp.tril(_rotate(kernel, rows, columns)))
  polar, values = gauge.polars[path], gauge.values[path].astype(np.float64)
  (d, width), unit = kernel.shape, context.roundoff
  rows = _or_identity(rows, d)
  counted = np.abs(values - 1) > tolerance * unit
  less, more = (int(np.sum(counted & x)) for x in (values < 1, values > 1))
  # The values that count as 1 are an error. So is the rounding of B and C: for a column
  # whose square is w, about 0.6 w roundoffs.
  errors = np.abs(values - 1) * np.where(counted, 0.6 * unit, 1)
  is_accurate = np.linalg.norm(errors) <= _MOST_ERROR * unit * np.linalg.norm(values)
  size = sum(structured.lower_size((d, k)) for k in (less, more))
  if not is_accurate or size >= structured.lower_size((d, d)):
    return structured.SymmetricTriangle(_triangle(rows, polar), columns=width)
  b, c = _factors(
    rows,
    polar,
    tolerance=tolerance * unit,
    columns=(_padded(less, d), _padded(more, d)),
  )
  return structured.IdentityMinusGram(b[:, :less], c[:, :more], columns=width)


def _padded(rank: int, most: int) -> int:
  """Rounds a rank up, so that few different programs are compiled.

  Between a power of two and the next there are four results, all multiples of 16; but
  none exceeds `most`.
  """
  grain = 1 << max(rank.bit_length() - 3, 4)
  return min(-(-rank // grain) * grain, most)


def _shortcut_paths(config: models.ModelConfig) -> list[str]:
  sublayers = models.layout.SUBLAYERS[: config.segments_per_layer]
  return [f'{x}_shortcut/kernel' for x in sublayers] if config.sliced else []


# ---- free rotations ----------------------------------------------------------------


def _first_rotation(context: transform.Context) -> jax.Array | None:
  """Returns the R_0 that makes the up kernel of the first MLP upper trapezoidal.

  It is None if that kernel is a pair of factors, or if the segment that it reads has
  another width or is not rotated.
  """
  config, layer = context.config, _source(context, 0)
  if structured.pair(layer[_UP]) is not None:
    return None
  kernel = jnp.asarray(layer[_UP], jnp.float32)
  if not config.sliced:
    scale = layer[f'{models.layout.norm_of(config, "mlp")}/scale']
    kernel = norms.scale_rows(kernel, jnp.asarray(scale))
  elif not config.parallel_block:
    d, e = config.layer_widths(0)[:2]
    used = jax.device_get(_range_used(context, 0, layer))
    if d != e or _obstacle(context, 0, used, 1):
      return None
    shortcut = layer[_shortcut_paths(config)[0]]
    kernel = _product(_polar(shortcut).rotation, kernel)
  return _upper_rotation(kernel[:, : len(kernel)])


def _last_rotation(
  context: transform.Context, step: jax.Array, width: int
) -> jax.Array | None:
  """Returns the rotation Z that makes the last rows of the head upper trapezoidal.

  It is None if the head is a pair of factors.

  Args:
    context: the context of the transform.
    step: O of the last shortcut, `[e, e]`.
    width: d, the width of the segment before.
  """
  head = _source(context, _OUTER)[_HEAD]
  if structured.pair(head) is not None:
    return None
  columns = jax.device_put(head[:, : len(head) - width], step.device)
  return _upper_rotation(_product(step[width:], columns.astype(jnp.float32)))


def _source(context: transform.Context, index: int | None) -> transform.Params:
  """Returns the parameters of a layer of the source, or outside the layers, by path.

  Structured leaves are replaced by the same float32 arrays as when their layer is
  rewritten. A source without structured leaves is not copied.
  """
  source = context.source
  flat = structured.flatten(source.outer() if index is None else source.layer(index))
  wide = {
    path: leaf.astype(jnp.float32) if structured.is_structured(leaf) else leaf
    for path, leaf in flat.items()
  }
  return structured.expand(wide, keep_factors=True)


# ---- which segments can be rotated -------------------------------------------------


def _axes(config: models.ModelConfig, index: int | None) -> models.layout.Axes:
  layout = models.layout
  return layout.outer_axes(config) if index is _OUTER else layout.layer_axes(config)


def _range_used(
  context: transform.Context, index: int | None, params: transform.Params
) -> dict[str, jax.Array]:
  """Returns `rotations.range_used` of a layer, or outside the layers, on the device."""
  prefix = models.names.prefix(index)
  limits = {path: np.float32(context.limit(prefix + path)) for path in params}
  index = index if index is _OUTER else 0
  return _jitted_range_used(params, limits, config=context.config, index=index)


def _readers_used(context: transform.Context, index: int) -> dict[str, jax.Array]:
  """Returns the range used by the kernels that read the input of a layer, or the head.

  Args:
    context: the context of the transform.
    index: the layer; after the last layer comes the head.
  """
  layer = index if index < context.config.num_layers else _OUTER
  axes, params = _axes(context.config, layer), _source(context, layer)
  segment = -1 if layer is _OUTER else 0
  readers = {
    path: leaf
    for path, leaf in params.items()
    if rotations_lib.sides(axes[path])[0] == segment
  }
  return _range_used(context, layer, readers)


def _obstacle(
  context: transform.Context,
  index: int | None,
  used: dict[str, Any],
  segment: int | None = None,
) -> transform.Note:
  """Returns the part of a note that says why a segment cannot be rotated.

  Args:
    context: the context of the transform.
    index: the layer, or `_OUTER`.
    used: `_range_used` of the layer, on the host.
    segment: the segment, as in `models.layout`; None for all.

  Returns:
    The part; empty if the segment can be rotated.
  """
  axes, prefix = _axes(context.config, index), models.names.prefix(index)
  for path, part in used.items():
    touches = segment is None or segment in rotations_lib.sides(axes[path])
    if touches and not part <= _RANGE:  # also if it is NaN
      reason = 'too large' if np.isfinite(part) else 'not finite'
      return {'obstacle': f'{prefix}{path} has numbers that are {reason}'}
  return {}


def _first_obstacle(context: transform.Context) -> transform.Note:
  """Returns why the first segment, or a dense model, cannot be rotated."""
  config, outer = context.config, _source(context, _OUTER)
  if config.sliced:
    embeddings = {path: x for path, x in outer.items() if path.startswith('embed/')}
    used = jax.device_get(_range_used(context, _OUTER, embeddings))
    readers = jax.device_get(_readers_used(context, 0))
    return _obstacle(context, _OUTER, used) or _obstacle(context, 0, readers)
  for index in (_OUTER, *range(config.num_layers)):
    params = outer if index is _OUTER else _source(context, index)
    used = jax.device_get(_range_used(context, index, params))
    if obstacle := _obstacle(context, index, used):
      return obstacle
  return {}


# ---- compiled functions ------------------------------------------------------------


def _polars(kernels: dict[str, jax.Array]) -> dict[str, canonical.Polar]:
  found: dict[str, canonical.Polar] = {}
  for path, matrix in kernels.items():
    if found:
      # LAPACK uses all CPUs. Two decompositions at a time would take four times as long
      # as one, so that each waits for the one before it.
      last = next(reversed(found.values())).values
      matrix, _ = jax.lax.optimization_barrier((matrix, last))
    found[path] = canonical.polar(matrix)
  return found


@functools.partial(jax.jit, static_argnames='dtype')
def _error(
  leaf: Any, kernel: jax.Array, rows: Any, columns: Any, *, dtype: np.dtype
) -> jax.Array:
  """Returns the relative error of a rounded leaf that stands for a rotated kernel."""
  expected = rotations_lib.rotate(kernel, rows, columns)
  rounded = structured.astype(structured.astype(leaf, dtype), jnp.float32)
  off = structured.materialize(rounded) - expected
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * expected.size**0.5
  return jnp.linalg.norm(off) / jnp.maximum(jnp.linalg.norm(expected), least)


@functools.partial(jax.jit, static_argnames='rows')
def _with_zeros(kernel: jax.Array, *, rows: int) -> tuple[Any, jax.Array]:
  """Makes the leaf of a kernel whose last rows are upper trapezoidal.

  Returns:
    The leaf, and the relative error of its zeros in the Frobenius norm.
  """
  first = kernel.shape[0] - rows
  upper = jnp.concatenate([kernel[:first], jnp.triu(kernel[first:])])
  norm = jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(jnp.float32).tiny)
  leaf = structured.TrapezoidalRows.of(upper, rows)
  return leaf, jnp.linalg.norm(upper - kernel) / norm


@functools.partial(jax.jit, static_argnames=('config', 'index'))
def _fold(
  params: transform.Params, *, config: models.ModelConfig, index: int | None
) -> transform.Params:
  return norms.fold_norm_scales(params, config, _axes(config, index))


@functools.partial(jax.jit, static_argnames=('config', 'index'))
def _jitted_range_used(
  params: transform.Params,
  limits: dict[str, jax.Array],
  *,
  config: models.ModelConfig,
  index: int | None,
) -> dict[str, jax.Array]:
  axes = _axes(config, index)
  if not config.sliced:
    wide = structured.astype(params, jnp.float32)
    params = norms.fold_norm_scales(wide, config, axes)
  return rotations_lib.range_used(params, limits, axes=axes)


_polar = jax.jit(canonical.polar)
_product = jax.jit(products.matmul)
_rotate = jax.jit(rotations_lib.rotate)
_next_rotation = jax.jit(rotations_lib.next_rotation)
_upper_rotation = jax.jit(rotations_lib.upper_rotation)
_lower_factor = jax.jit(shortcuts.lower_factor)
_factors = jax.jit(shortcuts.factors, static_argnames=('tolerance', 'columns'))
_triangle = jax.jit(shortcuts.triangle)
