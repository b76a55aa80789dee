r"""The residual gauge: a rotation of every segment of the residual stream.

`symmetries.rotations` has the mathematics: the rotations, the polar gauge in which all
shortcuts are symmetric, and their low-rank form. This pass calls `symmetries.layer`
layer by layer, because R_0 needs the first layer and R_{s+1} needs R_s and M_s.

R_0 is free. It makes the up kernel of the first MLP upper trapezoidal. If the last
segment is wider than the one before, a rotation of the new dimensions is free, too. It
makes the last rows of the head upper trapezoidal. The head could serve for R_0 as well,
but it would make the rounding errors twice as harmful (measured): the rows of the head
share a mean, and so do the activations that they are multiplied with; the trapezoidal
form puts both means along one axis.

A shortcut that narrows the stream becomes lower trapezoidal, by an LQ factorisation. A
P_s whose low-rank form is not accurate remains an array, too.

The page on the mathematics has the proofs, and the gauge of dense models with RMSNorm.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.passes import transform as transform_lib
from rotbits_jax.passes.transform import Context
from rotbits_jax.passes.transform import Params
from rotbits_jax.symmetries import factorizations
from rotbits_jax.symmetries import heads
from rotbits_jax.symmetries import layer as layer_lib
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries.layer import HEAD
from rotbits_jax.symmetries.layer import UP

_RANGE = 0.99  # of the greatest number of a dtype, for norms that a rotation keeps

# The low-rank form is accurate enough if its relative error is at most this multiple of
# the roundoff. Rounding a dense matrix makes an error of 0.4, and SliceGPT's own
# shortcuts have 0.6 in this form.
_MOST_ERROR = 2.0

_PROBES = 64  # vectors by which an error is measured


def remove_residual_gauge(
  *, tolerance: float = rotations_lib.TOLERANCE
) -> transform_lib.Transform:
  """Makes the transform that fixes the rotations of the residual stream.

  A singular value of a shortcut counts as 1 if it differs from 1 by at most about the
  tolerance times `Context.roundoff`. In SliceGPT's shortcuts, those that should be 1
  spread by 0.9 roundoffs. With 1.5 all of them count as 1, which changes the model as
  much as other coordinates do.
  """
  return transform_lib.Transform(
    'residual gauge',
    layer=functools.partial(_layer, tolerance=tolerance),
    outer=_outer,
    advance=_advance,
  )


class State(NamedTuple):
  """The coordinates of a layer."""

  first: Any  # R_0, float32 [d, d]
  up_form: Any  # R_0 and the pivots of the first up kernel; None if R_0 is arbitrary
  segments: list[Any]  # R of the segments of the layer; R_0 where they share it
  polars: layer_lib.Polars = ()  # of the shortcuts, see `layer.gauge`
  head_form: Any = None  # Z of the last segment and the pivots of the head, if any


def _advance(context: Context, state: Any, index: int, params: Params) -> State | str:
  """Returns the coordinates of the next layer, or why nothing is rotated."""
  config = context.config
  if index == 0:
    state = obstacle(context)
  if isinstance(state, str) or (index and not config.sliced):
    return state
  params = structured.expand(params)
  kernels = {path: params[path] for path in layer_lib.shortcut_paths(config)}
  polars, free, head = _gauge(kernels, config), None, None
  if state is None:
    form = _first_rotation(params, polars, config)
    identity = np.eye(config.segment_widths[0], dtype=np.float32)
    first = identity if form is None else form.rotation
    state = State(first, form, [first])
  if config.sliced and index + 1 == config.num_layers:
    outer = jax.device_put(context.read(None), jax.local_devices()[0])
    head = _last_rotation(structured.expand(outer), polars[-1])
    free = None if head is None else head.rotation
  segments = _segments(kernels, polars, state.segments[-1], config, free=free)
  return state._replace(segments=segments, polars=polars, head_form=head)


def _layer(
  context: Context, state: Any, index: int, params: Params, *, tolerance: float
) -> transform_lib.Noted:
  """Rotates a layer."""
  if isinstance(state, str):
    return params, {}
  config = context.config
  params = structured.expand(params)
  shortcuts = {path: params.pop(path) for path in layer_lib.shortcut_paths(config)}
  params = rotate(params, state.segments, config)
  notes: dict[str, transform_lib.Note] = {}
  if index == 0 and state.up_form is not None:
    params[UP], notes[UP] = _with_zeros(params[UP], state.up_form)
  for place, (path, kernel) in enumerate(shortcuts.items()):
    rows, columns = state.segments[place : place + 2]
    params[path], notes[path] = _shortcut(
      kernel, state.polars[place], rows, columns, context, tolerance
    )
  return params, notes


def _outer(context: Context, state: Any, params: Params) -> transform_lib.Noted:
  """Rotates the parameters outside the layers."""
  if isinstance(state, str):
    return params, {'embed/tokens': {'obstacle': state}} if state else {}
  params = structured.expand(params)
  ends, rotated = [state.first, state.segments[-1]], Params()
  for is_embedding in (True, False):  # one after the other, because they are large
    paths = [path for path in params if path.startswith('embed/') == is_embedding]
    leaves = {path: params.pop(path) for path in paths}
    rotated |= rotate(leaves, ends, context.config, is_outer=True)
  notes: dict[str, transform_lib.Note] = {}
  if state.head_form is not None:
    rotated[HEAD], notes[HEAD] = _with_zeros(rotated[HEAD], state.head_form)
  return rotated, notes


def is_rotated(state: Any) -> bool:
  """Returns whether layers with this state of a chain have rotated coordinates."""
  return isinstance(state, State)


# ---- shortcuts ---------------------------------------------------------------------


def _shortcut(
  kernel: jax.Array,
  polar: factorizations.Polar | None,
  rows: jax.Array,
  columns: jax.Array,
  context: Context,
  tolerance: float,
) -> tuple[Any, transform_lib.Note]:
  """Returns a shortcut between rotated segments in its smallest form, and a note."""
  probes = np.random.default_rng(0).standard_normal((len(columns), _PROBES), np.float32)
  measure = functools.partial(_error, dtype=context.dtype)
  sides, unit = (kernel, rows, columns), context.roundoff
  if polar is not None:
    counts = np.asarray(_ranks(polar.values, tolerance * unit)).tolist()
    grain = max(len(rows) // 32, 16)  # few programs are compiled then
    padded = tuple(min(-(-count // grain) * grain, len(rows)) for count in counts)
    leaf = _low_rank(rows, polar, tolerance=tolerance * unit, columns=padded)
    leaf = leaf.replace(b=leaf.b[:, : counts[0]], c=leaf.c[:, : counts[1]])
    error = measure(leaf, *sides, probes)
    if error <= _MOST_ERROR * unit:
      return leaf, {'rank': leaf.rank, 'error': error}
  leaf = _rotate_array(*sides)
  leaf = jnp.tril(leaf) if polar is None else leaf
  return leaf, {'rank': min(leaf.shape), 'error': measure(leaf, *sides, probes)}


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
  """Estimates the relative error of a rounded leaf that stands for a rotated kernel."""
  # The mean of |A x|^2 of normal x is the square of the Frobenius norm of A.
  matmul, kernel = products.matmul, kernel.astype(jnp.float32)
  expected = matmul(rows.T, matmul(kernel, matmul(columns, probes)))
  rounded = structured.astype(structured.astype(leaf, dtype), jnp.float32)
  off = matmul(structured.materialize(rounded), probes) - expected
  # Rounding errors do not get smaller below the least normal number.
  least = float(jnp.finfo(dtype).smallest_normal) * expected.size**0.5
  return jnp.linalg.norm(off) / jnp.maximum(jnp.linalg.norm(expected), least)


def _with_zeros(
  kernel: jax.Array, form: rotations_lib.UpperForm
) -> tuple[Any, transform_lib.Note]:
  """Makes the last rows of a kernel upper trapezoidal; also returns a note."""
  if np.asarray(form.pivots)[: len(form.rotation)].all():  # as without pivots
    form = form._replace(pivots=None)
  return _with_zeros_in_form(kernel, form)


@jax.jit
def _with_zeros_in_form(
  kernel: jax.Array, form: rotations_lib.UpperForm
) -> tuple[Any, transform_lib.Note]:
  """Returns the leaf and the note of `_with_zeros`."""
  leaf = rotations_lib.upper_rows(kernel, form)
  norm = jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(jnp.float32).tiny)
  return leaf, {'error': jnp.linalg.norm(leaf.materialize() - kernel) / norm}


# ---- weights that are too large to rotate ------------------------------------------


def obstacle(context: Context) -> str | None:
  """Returns why the stream cannot be rotated, '' for some families; None if it can.

  A rotation must not make a weight larger than its dtype can hold, nor spread one that
  is not finite. Those of an embedding may be: a rotation keeps its rows to themselves.
  """
  config, layout = context.config, models.layout
  valid = layout.symmetries(config)
  if not (valid.segments or valid.stream):
    return ''
  for index in (None, *range(config.num_layers)):
    axes = layout.outer_axes(config) if index is None else layout.layer_axes(config)
    prefix, scale, shares = models.names.prefix(index), 1.0, dict[str, float]()
    for path, leaf in structured.expand(context.read(index)).items():
      rotated = tuple(i for i, axis in enumerate(axes[path]) if isinstance(axis, int))
      is_table = axes[path][0] in ('vocabulary', 'position')
      size = rotations_lib.largest_rotated(np.asarray(leaf), rotated, is_table)
      if rotated:
        shares[path] = size / float(jnp.finfo(context.dtype_of(prefix + path)).max)
      elif axes[path] == ('norm',):  # folded into the kernels of a dense model
        scale = np.maximum(scale, size)  # NaN if one is
    for path, share in shares.items():
      if not share * scale <= _RANGE:
        return f'{prefix}{path} has weights that are not finite, or too large to rotate'
  return None


# ---- the change that rounding alone makes ------------------------------------------


def randomly_rotated(model: models.Model, *, key: jax.Array) -> models.Model:
  """Rotates a model at random and rounds it again to its dtypes.

  Transforms should not change the function much more than this does, by rounding only.
  The rotations are uniform under the Haar measure. Where the residual stream has none,
  heads are rotated: values, and queries and keys in coordinates without RoPE.
  """
  return transform_lib.run_chain((random_rotation(key=key),), model)[0]


def random_rotation(*, key: jax.Array) -> transform_lib.Transform:
  """Makes the transform that `randomly_rotated` applies."""

  def layer(
    context: Context, state: Any, index: int | None, params: Params
  ) -> transform_lib.Noted:
    config, valid = context.config, models.layout.symmetries(context.config)
    params = structured.expand(params)
    if valid.segments or valid.stream:
      count, widths = config.segments_per_layer, config.segment_widths
      segments = [0, len(widths) - 1]
      if index is not None:
        segments = [*range(index * count, (index + 1) * count + 1)]
      places = [segment if config.sliced else 0 for segment in segments]
      draw = lambda x: (jax.random.fold_in(key, x), 1, widths[x])
      rotations = [_orthogonal(*draw(x))[0] for x in places]
      params = rotate(params, rotations, config, is_outer=index is None)
      return structured.expand(params), {}
    if index is None:
      return params, {}
    gauges = (heads.VALUES, 0), (heads.KEYS, config.rotary_dim)
    for offset, (paths, kept) in enumerate(gauges):
      if pair := layer_lib.head_pair(params, config, paths=paths):
        pair_key = jax.random.fold_in(key, 2 * index + offset)
        width = config.head_dim - kept
        rotations = _orthogonal(pair_key, config.num_kv_heads, width, kept)
        params |= _rotate_heads(pair, rotations)
    return params, {}

  return transform_lib.Transform(
    'rotation',
    layer=layer,
    outer=lambda context, state, params: layer(context, state, None, params),
  )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _orthogonal(key: jax.Array, count: int, width: int, kept: int = 0) -> jax.Array:
  """Returns random rotations of all coordinates but the first `kept` ones."""
  rotations = jax.random.orthogonal(key, width, (count,), jnp.float32)
  unchanged = jnp.eye(kept, dtype=jnp.float32)
  return jax.vmap(lambda x: jax.scipy.linalg.block_diag(unchanged, x))(rotations)


# ---- compiled functions ------------------------------------------------------------


_gauge = jax.jit(
  functools.partial(layer_lib.gauge, polar=factorizations.quick_polar), static_argnums=1
)
_segments = jax.jit(layer_lib.segments, static_argnums=3)
_first_rotation = jax.jit(layer_lib.first_rotation, static_argnums=2)
_last_rotation = jax.jit(layer_lib.last_rotation)
_rotate_array = jax.jit(rotations_lib.rotate)
# Each array is rotated by a program of its own, which serves all arrays of its shape.
rotate = functools.partial(layer_lib.rotate, function=_rotate_array)
_ranks = jax.jit(rotations_lib.ranks)
_low_rank = jax.jit(rotations_lib.shortcut, static_argnames=('tolerance', 'columns'))
_rotate_heads = jax.jit(heads.rotate_heads)
