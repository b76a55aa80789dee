r"""The residual gauge: a rotation of every segment of the residual stream.

`symmetries.rotations` has the mathematics: the rotations, the polar gauge in which all
shortcuts are symmetric, and their low-rank form. This pass calls `symmetries.layer`
layer by layer, because R_0 needs the first layer and R_{s+1} needs R_s and M_s.

**Free rotations.** R_0 is free. It makes the up kernel of the first MLP upper
trapezoidal. If the last segment is wider than the one before, a rotation of the new
dimensions is free, too. It makes the last rows of the head upper trapezoidal. The head
could serve for R_0 as well, but it would make the rounding errors twice as harmful
(measured): the rows of the head share a mean, and so do the activations that they are
multiplied with; the trapezoidal form puts both means along one axis.

**Exceptions.** A shortcut that narrows the stream becomes lower trapezoidal, by an LQ
factorisation. A P_s whose low-rank form would not be accurate remains an array, too.
Nothing is rotated if a rotation could make a weight larger than its dtype can hold, or
if a weight is not finite; a note names the parameter. Tokens whose row of the embedding
is not finite do not count, because a rotation keeps every row to itself.

**Dense models with RMSNorm** have no shortcuts. After the scales of the norms have been
folded into the kernels that read them, all segments share one rotation, which is free.
If the head is the embedding, nothing can be rotated, because the scale of the last norm
stands between the two.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Noted
from rotbits_jax.passes.transform import Params
from rotbits_jax.passes.transform import Transform
from rotbits_jax.passes.transform import note
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import layer as layer_lib
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib

# Norms of rotated rows and columns, as a part of the greatest number of a dtype.
_RANGE = 0.99

# The low-rank form is accurate enough if its relative error is at most this multiple of
# the roundoff. Rounding a dense matrix makes an error of 0.4, and SliceGPT's own
# shortcuts have 0.6 in this form.
_MOST_ERROR = 2.0

_PROBES = 64  # vectors by which an error is measured


def remove_residual_gauge(*, tolerance: float = 0.7) -> Transform:
  """Makes the transform that fixes the rotations of the residual stream.

  Its notes give the form, the rank and the relative error of each shortcut, and name
  the kernels that are trapezoidal. A singular value of a shortcut counts as 1 if it
  differs from 1 by at most the tolerance times `Context.roundoff`. In SliceGPT's
  shortcuts, those that should be 1 spread by 0.9 roundoffs. With 1.5 all of them count
  as 1, which changes the model as much as other coordinates do.
  """
  return Transform(
    'residual gauge',
    init=_init,
    advance=_advance,
    layer=functools.partial(_layer, tolerance=tolerance),
    outer=_outer,
    reads_source=True,
    takes='float32',
  )


class State(NamedTuple):
  """The coordinates of a layer."""

  first: Any  # R_0, float32 [d, d]
  is_upper: bool  # whether R_0 makes the up kernel of the first layer trapezoidal
  segments: list[Any]  # R of the segments of the layer; R_0 where they share it
  polars: list[canonical.Polar | None]  # of the shortcuts, see `layer.gauge`
  new_rows: int  # how many of the last rows of the head are trapezoidal


def _init(context: Context) -> State | str:
  """Returns the state before the first layer, or why nothing is rotated."""
  config, reason = context.config, obstacle(context)
  if reason is not None:
    return reason
  params, polars = _read(context, 0), list[canonical.Polar | None]()
  params = jax.device_put(structured.astype(params, np.float32))
  if config.sliced:
    polars = _gauge({x: params[x] for x in layer_lib.shortcut_paths(config)}, config)
  rotation = _first_rotation(params, polars, config)
  is_upper = rotation is not None
  if rotation is None:
    rotation = np.eye(config.segment_widths[0], dtype=np.float32)
  count = 1 if config.sliced else 3
  return State(rotation, is_upper, [rotation] * count, [], 0)


def _advance(context: Context, state: Any, index: int, params: Params) -> Any:
  """Returns the coordinates of the next layer."""
  config = context.config
  if isinstance(state, str) or not config.sliced:
    return state
  paths = layer_lib.shortcut_paths(config)
  kernels = structured.expand({path: params[path] for path in paths})
  polars, free = _gauge(kernels, config), None
  if index + 1 == config.num_layers:
    free = _last_rotation(_read(context, None), polars[-1])
  segments = _segments(kernels, polars, state.segments[-1], config, free=free)
  new_rows = 0 if free is None else len(free)
  return state._replace(segments=segments, polars=polars, new_rows=new_rows)


def _layer(
  context: Context, state: Any, index: int, params: Params, *, tolerance: float
) -> Noted:
  """Rotates a layer."""
  if isinstance(state, str):
    return params, []
  config, prefix = context.config, models.names.prefix(index)
  params, notes = structured.expand(params, keep_factors=True), []
  shortcuts = {path: params.pop(path) for path in layer_lib.shortcut_paths(config)}
  params = rotate(params, state.segments, config)
  if index == 0 and state.is_upper:
    leaf, error = _with_zeros(params[layer_lib.UP], rows=len(state.first))
    params[layer_lib.UP] = leaf
    notes.append(note(prefix + layer_lib.UP, leaf, error=error))
  for place, (path, kernel) in enumerate(shortcuts.items()):
    rows, columns = state.segments[place : place + 2]
    leaf = _shortcut(kernel, state.polars[place], rows, columns, context, tolerance)
    x = np.random.default_rng(0).standard_normal((len(columns), _PROBES), np.float32)
    error = _error(leaf, kernel, rows, columns, x, dtype=context.dtype)
    rank = leaf.rank if structured.is_structured(leaf) else min(leaf.shape)
    params[path] = leaf
    notes.append(note(prefix + path, leaf, error=error, rank=rank))
  return params, notes


def _outer(context: Context, state: Any, params: Params) -> Noted:
  """Rotates the parameters outside the layers."""
  if isinstance(state, str):
    table = params['embed/tokens']
    return params, [note('embed/tokens', table, obstacle=state)] if state else []
  params, notes = structured.expand(params, keep_factors=True), []
  ends, rotated = [state.first, state.segments[-1]], Params()
  for is_embedding in (True, False):  # one after the other, because they are large
    paths = [path for path in params if path.startswith('embed/') == is_embedding]
    leaves = {path: params.pop(path) for path in paths}
    rotated |= rotate(leaves, ends, context.config, is_outer=True)
  if state.new_rows:
    head, error = _with_zeros(rotated[layer_lib.HEAD], rows=state.new_rows)
    rotated[layer_lib.HEAD] = head
    notes.append(note(layer_lib.HEAD, head, error=error))
  return rotated, notes


# ---- shortcuts ---------------------------------------------------------------------


def _shortcut(
  kernel: jax.Array,
  polar: canonical.Polar | None,
  rows: jax.Array,
  columns: jax.Array,
  context: Context,
  tolerance: float,
) -> Any:
  """Returns a shortcut between rotated segments, float32, in its smallest form."""
  if polar is None:
    return jnp.tril(_rotate_array(kernel, rows, columns))
  values, unit = np.asarray(polar.values), context.roundoff
  off = np.abs(values.astype(np.float64) - 1)
  counted = off > tolerance * unit
  # The values that count as 1 are an error. So is the rounding of B and C: for a column
  # whose square is w, about 0.6 w roundoffs.
  error = np.linalg.norm(off * np.where(counted, 0.6 * unit, 1))
  if not error <= _MOST_ERROR * unit * np.linalg.norm(values):
    return _rotate_array(kernel, rows, columns)
  less, more = (int(np.sum(counted & x)) for x in (values < 1, values > 1))
  ranks = tuple(_padded(count, len(values)) for count in (less, more))
  leaf = _low_rank(rows, polar, tolerance=tolerance * unit, columns=ranks)
  return leaf.replace(b=leaf.b[:, :less], c=leaf.c[:, :more])


def _padded(rank: int, most: int) -> int:
  """Rounds a rank up to one of four per octave: few programs are compiled then."""
  grain = 1 << max(rank.bit_length() - 3, 4)
  return min(-(-rank // grain) * grain, most)


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
  """Makes the last rows of a kernel upper trapezoidal; also returns the error."""
  leaf = rotations_lib.upper_rows(kernel, rows)
  norm = jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(jnp.float32).tiny)
  return leaf, jnp.linalg.norm(leaf.materialize() - kernel) / norm


# ---- weights that are too large to rotate ------------------------------------------


def obstacle(context: Context) -> str | None:
  """Returns why the stream cannot be rotated, '' for some families; None if it can."""
  config, layout = context.config, models.layout
  symmetries = layout.symmetries(config)
  if not (symmetries.segments or symmetries.stream):
    return ''
  for index in (None, *range(config.num_layers)):
    axes = layout.outer_axes(config) if index is None else layout.layer_axes(config)
    params, prefix = _read(context, index), models.names.prefix(index)
    # Scales of a dense model are folded into its kernels.
    scales = [np.abs(x).max() for path, x in params.items() if axes[path] == ('norm',)]
    scale = np.max([1.0, *scales])  # NaN if one is
    for path, leaf in params.items():
      rotated = tuple(i for i, axis in enumerate(axes[path]) if isinstance(axis, int))
      if not rotated:
        continue
      is_table = axes[path][0] in ('vocabulary', 'position')
      pair = structured.pair(leaf)
      factors = [(leaf, rotated)] if pair is None else [(pair.u, (0,)), (pair.v, (1,))]
      limit = _RANGE * float(jnp.finfo(context.dtype_of(prefix + path)).max) / scale
      bound = rotations_lib.largest_rotated
      if not all(bound(np.asarray(x), axis, is_table) <= limit for x, axis in factors):
        return (
          f'{prefix + path} has weights that are not finite, or too large to rotate'
        )
  return None


def _read(context: Context, index: int | None) -> Params:
  """Reads a layer, or the parameters outside the layers for None.

  Float32 arrays take the place of structured leaves; other leaves are not copied.
  """
  params: Params = {}
  for tree in context.read(index):
    params |= structured.flatten(tree)
  for path, leaf in params.items():
    if structured.is_structured(leaf):
      params[path] = leaf.astype(jnp.float32)
  return structured.expand(params, keep_factors=True)


# ---- compiled functions ------------------------------------------------------------


_gauge = jax.jit(
  functools.partial(layer_lib.gauge, polar=canonical.quick_polar), static_argnums=1
)
_segments = jax.jit(layer_lib.segments, static_argnums=3)
_first_rotation = jax.jit(layer_lib.first_rotation, static_argnums=2)
_last_rotation = jax.jit(layer_lib.last_rotation)
_rotate_array = jax.jit(rotations_lib.rotate)
# Each array is rotated by a program of its own, which serves all arrays of its shape.
rotate = functools.partial(layer_lib.rotate, function=_rotate_array)
_low_rank = jax.jit(rotations_lib.shortcut, static_argnames=('tolerance', 'columns'))
