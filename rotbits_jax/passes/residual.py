r"""The residual gauge: a rotation of every segment of the residual stream.

`symmetries.rotations` explains why the segments can be rotated, and the polar gauge in
which all shortcuts are symmetric. `symmetries.shortcuts` gives their low-rank form.
This pass finds the rotations layer by layer, because R_0 needs the first layer and O_s
needs M_s. It rotates every kernel once.

**Free rotations.** R_0 is free. It makes the up kernel of the first MLP upper
trapezoidal. If the last segment is
wider than the one before, a rotation of the new dimensions is free, too. It makes the
last rows of the head upper trapezoidal. The head could serve for R_0 as well, but it
would make the rounding errors twice as harmful
(measured). The reason is that the rows of the head share a mean, and so do the
activations that they are multiplied with; the trapezoidal form puts both means along
one axis.

**Exceptions.** A shortcut that narrows the stream becomes lower trapezoidal, by an LQ
factorisation. A P_s whose low-rank form would not be accurate remains an array, too.
Nothing is rotated if a rotation could make a number larger than its dtype can
hold, or if a number is not finite; a note names the parameter. Tokens whose row of the
embedding is not finite do not count, because a rotation keeps every row to itself.

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

from collections.abc import Iterator
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import devices
from rotbits_jax.passes import transform
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import shortcuts
from rotbits_jax.system import host

# Norms of rows and columns may be at most this part of the greatest number of a dtype.
_RANGE = 0.99

# The low-rank form is accurate enough if its relative error is at most this multiple of
# the roundoff. Rounding a dense matrix makes an error of 0.4, and SliceGPT's own
# shortcuts have 0.6 in this form.
_MOST_ERROR = 2.0

_LEAST = 0.03  # see `canonical.polar_from_gram`

_PROBES = 64  # vectors by which an error is measured

_HEAD = 'head/kernel'


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
    numbers and the relative error. They also name the kernels that are trapezoidal.
  """
  return transform.Transform(
    'residual gauge',
    init=_init,
    layers=functools.partial(_layers, tolerance=tolerance),
    outer=_outer,
    skip=_skip,
    reads_source=True,
    takes='float32',
    carries_adapters=True,
  )


class State(NamedTuple):
  """The state of the transform between two layers.

  Attributes:
    first: R_0, float32 `[d, d]`.
    rotation: the rotation of the segment that the next layer reads, float32 `[d, d]`.
    zeros: how many of the last rows of `models.layout.UPPER_KERNEL` in the first layer,
      and of the head, free rotations make upper trapezoidal, int32 `[2]`.
  """

  first: Any
  rotation: Any
  zeros: Any


def _is_valid(config: models.ModelConfig) -> bool:
  symmetries = models.layout.symmetries(config)
  return symmetries.segments or symmetries.stream


def _init(context: transform.Context) -> State | tuple[()]:
  if not _is_valid(context.config) or obstacle(context):
    return ()
  rotation, width = _first_rotation(context), context.config.segment_widths[0]
  if rotation is None:
    eye = np.eye(width, dtype=np.float32)
    return State(eye, eye, np.zeros(2, np.int32))
  return State(rotation, rotation, np.array([width, 0], np.int32))


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
  config, axes = context.config, _axes(context.config, 0)
  layers = [structured.expand(layer, keep_factors=True) for layer in layers]
  gauges: list[_Gauge] = []
  rotations = [[state.rotation] * 3] * len(layers)
  if config.sliced:
    gauges, state = _find_gauges(context, state, first, layers)
    rotations = [gauge.rotations for gauge in gauges]
  else:
    layers = [_fold(layer, config=config, is_outer=False) for layer in layers]
  names = _shortcut_paths(config)
  kernels = [{path: layer.pop(path) for path in names} for layer in layers]
  for path in list(layers[0]):
    sides = rotations_lib.sides(axes[path])
    arguments = [
      (layer.pop(path), *(None if s is None else own[s] for s in sides))
      for layer, own in zip(layers, rotations, strict=True)
    ]
    results = context.map_layers(rotations_lib.rotate, arguments)
    del arguments  # they would keep the memory of rotated arrays
    for layer, result in zip(layers, results, strict=True):
      layer[path] = result
  path = models.layout.UPPER_KERNEL
  if first == 0 and state.zeros[0] and path in layers[0]:  # a part may lack it
    layers[0][path], error = _with_zeros(layers[0][path], rows=int(state.zeros[0]))
    upper = models.names.prefix(0) + path
    notes[0].append(transform.note(upper, layers[0][path], error=error))
  for i, gauge in enumerate(gauges):
    for s, (path, kernel) in enumerate(kernels[i].items()):
      leaf, error = _shortcut(context, gauge, s, kernel, tolerance)
      rank = leaf.rank if structured.is_structured(leaf) else min(leaf.shape)
      layers[i][path] = leaf
      path = models.names.prefix(first + i) + path
      notes[i].append(transform.note(path, leaf, error=error, rank=rank))
  if not config.sliced:
    layers = [norms.with_constant_scales(layer, axes) for layer in layers]
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
  config = context.config
  if not state:
    why = obstacle(context) if _is_valid(config) else ''
    note = transform.note('embed/tokens', params['embed/tokens'], obstacle=why)
    return params, [note] if why else []
  params, notes = structured.expand(params, keep_factors=True), []
  if not config.sliced:
    params = _fold(params, config=config, is_outer=True)
  axes = _axes(config, None)
  for path in list(params):
    sides = rotations_lib.sides(axes[path])
    ends = state.first, state.rotation
    rows, columns = (None if s is None else ends[s] for s in sides)
    params[path] = _rotate(params.pop(path), rows, columns)
  if state.zeros[1]:
    params[_HEAD], error = _with_zeros(params[_HEAD], rows=int(state.zeros[1]))
    notes.append(transform.note(_HEAD, params[_HEAD], error=error))
  return params if config.sliced else norms.with_constant_scales(params, axes), notes


# ---- the rotations of sliced models ------------------------------------------------


class _Gauge(NamedTuple):
  """The rotations of one layer.

  Attributes:
    rotations: R_s for the segments that the layer reads or writes.
    polars: polar decompositions of the shortcuts; None for those that narrow the
      stream.
    values: their singular values, on the host.
  """

  rotations: list[jax.Array]
  polars: list[canonical.Polar | None]
  values: list[np.ndarray | None]


def _find_gauges(
  context: transform.Context, state: State, first: int, layers: list[transform.Params]
) -> tuple[list[_Gauge], State]:
  """Returns the gauges of consecutive layers, and the state after these layers."""
  config, paths = context.config, _shortcut_paths(context.config)
  kernels = [[layer[path] for path in paths] for layer in layers]
  polars = _decomposed(context, kernels)
  values = jax.device_get([[x and x.values for x in own] for own in polars])
  gauges, rotation, zeros = [], state.rotation, state.zeros
  for i, own in enumerate(kernels):
    rotation = jax.device_put(rotation, own[0].device)
    gauge = _Gauge([rotation], polars[i], values[i])
    for s, kernel in enumerate(own):
      d, e = kernel.shape
      polar, free = polars[i][s], None
      if polar is None:
        rotation = _lower_factor(rotation, kernel)[1]
      else:
        if e > d and first + i + 1 == config.num_layers and s + 1 == len(own):
          free = _last_rotation(context, polar.rotation, d)
          zeros = np.array([zeros[0], 0 if free is None else e - d], np.int32)
        rotation = _next_rotation(polar.rotation, rotation, free)
      gauge.rotations.append(rotation)
    gauges.append(gauge)
  return gauges, State(state.first, rotation, zeros)


def _shortcut(
  context: transform.Context,
  gauge: _Gauge,
  place: int,
  kernel: jax.Array,
  tolerance: float,
) -> tuple[Any, jax.Array]:
  """Returns a shortcut in the gauge, float32, and its relative error when rounded.

  Args:
    context: the context of the transform.
    gauge: the gauge of the layer.
    place: the place of the shortcut in the layer.
    kernel: the shortcut.
    tolerance: see `remove_residual_gauge`.
  """
  rows, columns = gauge.rotations[place : place + 2]
  polar, values = gauge.polars[place], gauge.values[place]
  rng = np.random.default_rng(0)
  probes = jnp.asarray(rng.standard_normal((len(columns), _PROBES), np.float32))
  error_of = lambda leaf: _error(
    leaf, kernel, rows, columns, probes, dtype=context.dtype
  )
  if polar is None or values is None:
    leaf = jnp.tril(_rotate(kernel, rows, columns))
    return leaf, error_of(leaf)
  (d, width), unit = kernel.shape, context.roundoff
  off = np.abs(values.astype(np.float64) - 1)
  counted = off > tolerance * unit
  less, more = (int(np.sum(counted & x)) for x in (values < 1, values > 1))
  # The values that count as 1 are an error. So is the rounding of B and C: for a column
  # whose square is w, about 0.6 w roundoffs.
  error = np.linalg.norm(off * np.where(counted, 0.6 * unit, 1))
  if not error <= _MOST_ERROR * unit * np.linalg.norm(values):
    leaf = _rotate(kernel, rows, columns)
    return leaf, error_of(leaf)
  most = tuple(_padded(count, d) for count in (less, more))
  b, c = _factors(rows, polar, tolerance=tolerance * unit, columns=most)
  made = functools.partial(structured.IdentityMinusGram, columns=width)
  return made(b[:, :less], c[:, :more]), error_of(made(b, c))


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


# ---- the source ----------------------------------------------------------------------


def _parts(context: transform.Context) -> Iterator[tuple[str, transform.Params]]:
  """Yields the beginning of the paths of each part of the source, and the part."""
  yield '', structured.flatten(context.source.outer())
  for index in range(context.config.num_layers):
    name = models.names.layer(index)
    yield f'{name}/', structured.flatten(context.source.read(name)[name])


def _wide(params: transform.Params) -> transform.Params:
  """Replaces structured leaves by the float32 arrays that a rewriting has for them.

  Other leaves stay as they are, and are not copied.
  """
  wide = {
    path: leaf.astype(jnp.float32) if structured.is_structured(leaf) else leaf
    for path, leaf in params.items()
  }
  return structured.expand(wide, keep_factors=True)


def _axes(config: models.ModelConfig, index: int | None) -> models.layout.Axes:
  layout = models.layout
  is_outer = index is None
  axes = layout.outer_axes(config) if is_outer else layout.layer_axes(config)
  return layout.with_adapters(axes)


def obstacle(context: transform.Context) -> str:
  """Returns why the model cannot be rotated; '' if it can."""
  for prefix, given in _parts(context):
    codes = [path for path, leaf in given.items() if structured.is_in_files(leaf)]
    if codes:
      return f'{prefix}{codes[0]} has quantised codes, and a rotation would keep none'
    if path := _too_large(context, prefix, given):
      return f'{path} has numbers that are not finite, or too large to rotate'
  return ''


def is_in_range(context: transform.Context) -> bool:
  """Returns whether the numbers of a model are small enough to be rotated."""
  return not any(_too_large(context, *part) for part in _parts(context))


def _too_large(
  context: transform.Context, prefix: str, given: transform.Params
) -> str | None:
  """Returns the path of a parameter in a part that is too large to rotate, if any."""
  # An adapter does not decide: it is carried with the model, or it is refused.
  given = {path: x for path, x in given.items() if not path.endswith('/adapter')}
  params = _wide(given)
  own = [prefix + x for x in params if prefix + x in context.dtypes]
  if _rough_norm(params) <= _RANGE * min(map(context.limit, own)):
    return None
  bounds = _norms(params, config=context.config, is_outer=not prefix)
  for path, norm in jax.device_get(bounds).items():
    if not norm <= _RANGE * context.limit(prefix + path):  # also if it is NaN
      return prefix + path
  return None


def _rough_norm(params: transform.Params) -> float:
  """Returns a bound of `_norms` that costs no program; infinite or NaN if unknown."""
  greatest, longest = 0.0, 1
  for x in jax.tree.leaves(params):
    if not isinstance(x, np.ndarray):
      return math.inf
    bits = x.view(f'u{x.itemsize}')  # without their sign, they are in order
    top = np.max(bits << 1, initial=0) >> 1
    greatest = float(np.maximum(greatest, float(top.view(x.dtype))))
    longest = max((longest, *x.shape))
  return (1 + greatest) ** 2 * math.sqrt(longest)  # a scale may be folded into a kernel


def _first_rotation(context: transform.Context) -> jax.Array | None:
  """Returns the R_0 that makes a kernel of the first layer upper trapezoidal.

  The kernel is `models.layout.UPPER_KERNEL`. It is None if that kernel is a pair of
  factors, or if the segment that it reads has another width.
  """
  config, first = context.config, models.names.layer(0)
  layer = _wide(structured.flatten(context.source.read(first)[first]))
  path = models.layout.UPPER_KERNEL
  if structured.pair(layer[path]) is not None:
    return None
  kernel = jnp.asarray(layer[path], jnp.float32)
  if not config.sliced:
    norm = models.layout.norm_of(config, path.partition('/')[0])
    scale = layer[f'{norm}/scale']
    kernel = norms.scale_rows(kernel, jnp.asarray(scale))
  elif not config.parallel_block:
    shortcut = layer[_shortcut_paths(config)[0]]
    if shortcut.shape[0] != shortcut.shape[1]:
      return None
    wide = jnp.asarray(np.asarray(shortcut, np.float32))
    ((polar,),) = _decomposed(context, [[wide]])
    assert polar is not None
    kernel = _product(polar.rotation, kernel)
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
  head = _wide(structured.flatten(context.source.outer()))[_HEAD]
  if structured.pair(head) is not None:
    return None
  columns = jax.device_put(head[:, : len(head) - width], step.device)
  return _upper_rotation(_product(step[width:], columns.astype(jnp.float32)))


def _decomposed(
  context: transform.Context, kernels: list[list[jax.Array]]
) -> list[list[canonical.Polar | None]]:
  """Returns the polar decompositions of the shortcuts of layers, see `_Gauge`."""
  quick = _mapped(context, _quick_polar, kernels)
  least = jax.device_get([[x and x[1] for x in own] for own in quick])
  found = [[x and x[0] for x in own] for own in quick]
  poor = [
    i
    for i, own in enumerate(least)
    if any(x is not None and not x > _LEAST for x in own)  # also if it is NaN
  ]
  again = _mapped(context, _polar, [kernels[i] for i in poor])
  for i, own in zip(poor, again, strict=True):
    found[i] = own
  return found


def _mapped(
  context: transform.Context, core: devices.Core, kernels: list[list[jax.Array]]
) -> list[list[Any]]:
  """Applies a function to each shortcut of layers."""
  if context.mesh is None and host.lapack_is_serial():
    return [devices.side_by_side(core, own) for own in kernels]
  return context.map_layers(_one_by_one, [(own,) for own in kernels], function=core)


# ---- compiled functions ------------------------------------------------------------


def _polar(kernel: jax.Array) -> canonical.Polar | None:
  return canonical.polar(kernel) if kernel.shape[0] <= kernel.shape[1] else None


def _quick_polar(kernel: jax.Array) -> tuple[canonical.Polar, jax.Array] | None:
  d, e = kernel.shape
  return canonical.polar_from_gram(kernel) if d <= e else None


def _one_by_one(kernels: list[jax.Array], *, function: devices.Core) -> list[Any]:
  found: list[Any] = []
  done: list[jax.Array] = []
  for kernel in kernels:
    if done:
      # LAPACK uses all CPUs. Two decompositions at a time would take four times as long
      # as one, so that each waits for the one before it.
      kernel, _ = jax.lax.optimization_barrier((kernel, done[-1]))
    found.append(function(kernel))
    done += jax.tree.leaves(found[-1])
  return found


@functools.partial(jax.jit, static_argnames='dtype')
def _error(
  leaf: Any,
  kernel: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  probes: jax.Array,
  *,
  dtype: np.dtype,
) -> jax.Array:
  """Estimates the relative error of a rounded leaf that stands for a rotated kernel.

  For independent normal vectors x, the probes, the mean of |A x|^2 is the square of the
  Frobenius norm of A. Of 64 it is within a few percent; within 20% if A has rank 1.
  """
  matmul, kernel = products.matmul, kernel.astype(jnp.float32)
  expected = matmul(rows.T, matmul(kernel, matmul(columns, probes)))
  rounded = structured.astype(structured.astype(leaf, dtype), jnp.float32)
  off = matmul(structured.materialize(rounded), probes) - expected
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * expected.size**0.5
  return jnp.linalg.norm(off) / jnp.maximum(jnp.linalg.norm(expected), least)


@functools.partial(jax.jit, static_argnames='rows')
def _with_zeros(kernel: jax.Array, *, rows: int) -> tuple[Any, jax.Array]:
  """Makes the leaf of a kernel whose last rows are upper trapezoidal.

  Returns:
    The leaf, and the relative error of its zeros in the Frobenius norm.
  """
  upper = rotations_lib.upper_rows(kernel, rows)
  norm = jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(jnp.float32).tiny)
  leaf = structured.TrapezoidalRows.of(upper, rows)
  return leaf, jnp.linalg.norm(upper - kernel) / norm


@functools.partial(jax.jit, static_argnames=('config', 'is_outer'))
def _fold(
  params: transform.Params, *, config: models.ModelConfig, is_outer: bool
) -> transform.Params:
  axes = _axes(config, None if is_outer else 0)
  return norms.fold_norm_scales(params, config, axes)


@functools.partial(jax.jit, static_argnames=('config', 'is_outer'))
def _norms(
  params: transform.Params, *, config: models.ModelConfig, is_outer: bool
) -> dict[str, jax.Array]:
  """Returns a bound of the numbers of each parameter that can be rotated."""
  axes = _axes(config, None if is_outer else 0)
  if not config.sliced:
    wide = structured.astype(params, jnp.float32)
    params = norms.fold_norm_scales(wide, config, axes)
  rotated = [x for x in params if rotations_lib.sides(axes[x]) != (None, None)]
  return {
    path: rotations_lib.largest_norm(params[path], axes[path]) for path in rotated
  }


_product = jax.jit(products.matmul)
_rotate = jax.jit(rotations_lib.rotate)
_next_rotation = jax.jit(rotations_lib.next_rotation)
_upper_rotation = jax.jit(rotations_lib.upper_rotation)
_lower_factor = jax.jit(shortcuts.lower_factor)
_factors = jax.jit(shortcuts.factors, static_argnames=('tolerance', 'columns'))
