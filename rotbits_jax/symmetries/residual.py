r"""The residual gauge: a rotation of every segment of the residual stream.

A gauge is a choice of coordinates that does not change the function of a model. This
file chooses the coordinates of the residual stream so that fewer numbers need to be
stored. To fix a gauge is to make such a choice.

    x_0 = embed[tokens],   x_{s+1} = x_s M_s + sublayer_s(RMSN(x_s)),   s = 0 .. S-1

x_s is segment s of the residual stream, and M_s is the shortcut past sublayer s. If R_s
is orthogonal for each s, the map x_s -> x_s R_s changes no output, see `rotations`.

**Polar gauge.** Let M_s = P_s O_s, with P_s symmetric and positive semidefinite, and
O_s orthogonal. With R_{s+1} = O_s^T R_s, every shortcut becomes R_s^T P_s R_s. In
SliceGPT's models, M_s is a block of an orthogonal matrix. Therefore most of its
singular values are 1, and P_s = I - B_s B_s^T, where B_s has few columns. The file
stores R_s^T B_s, in lower trapezoidal form; a rotation of the columns brings it to this
form. A shortcut [d, D] that widens the stream is [P_s 0] O_s, with O_s in O(D).

**Free rotations.** R_0 is free. If the stream gets wider, a rotation of the new
dimensions is free, too. Each free rotation makes rows of one kernel upper trapezoidal,
by a QR factorisation. The kernel is the up kernel of the next MLP, or the head if no
MLP follows. The head could serve for all free rotations, but it would make the rounding
errors twice as harmful (measured). The reason is that the rows of the head share a
mean, and so do the activations that they are multiplied with; the trapezoidal form puts
both means along one axis.

**Exceptions.** A shortcut that narrows the stream becomes L = R_s^T M_s R_{s+1}, where
L is the lower trapezoidal factor of an LQ factorisation. A P_s whose low-rank form is
not accurate enough is stored as its lower triangle. A segment is not rotated if a
rotation could make a number larger than its dtype can hold, or if a number is not
finite. The shortcut that leads into such a segment remains an array.

**Dense models with RMSNorm** have no shortcuts. The scales of the norms are first
folded into the kernels that read them. Then all segments share one rotation, which is
free. If the head is the embedding, nothing can be rotated, because the scale of the
last norm stays between the two.

The rotations are found layer by layer, because R_0 needs the first layer and O_s needs
M_s. Every kernel is rotated once.

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
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import norms
from rotbits_jax.symmetries import products
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import shortcuts as shortcuts_lib
from rotbits_jax.symmetries import transform

_matmul = products.matmul

# Norms of rows and columns may be at most this part of the greatest number of a dtype.
_RANGE = 0.99


# ---- pure functions of one matrix or one layer -------------------------------------


def upper_rotation(matrix: jax.Array) -> jax.Array:
  """Returns the rotation G that makes `G^T @ matrix` upper trapezoidal.

  Args:
    matrix: `[d, V]`.

  Returns:
    G, float32 `[d, d]`, orthogonal up to the rounding of float32.
  """
  columns = matrix[:, : matrix.shape[0]].astype(jnp.float32)
  q, _ = jnp.linalg.qr(columns, mode='complete')
  return canonical.reorthogonalize(q)


def next_rotation(step: jax.Array, rotation: jax.Array, free: jax.Array) -> jax.Array:
  """Returns R_{s+1} = O_s^T diag(R_s, Z).

  Args:
    step: O_s, float32 `[e, e]`.
    rotation: R_s, float32 `[d, d]`.
    free: Z, the free rotation of the new dimensions, float32 `[e - d, e - d]`.

  Returns:
    R_{s+1}, float32 `[e, e]`, orthogonal up to the rounding of float32.
  """
  both = jax.scipy.linalg.block_diag(rotation, free) if free.size else rotation
  return canonical.reorthogonalize(_matmul(step.T, both))


def range_used(
  flat: dict[str, Any], limits: dict[str, jax.Array], *, axes: tuple[Any, ...]
) -> dict[str, jax.Array]:
  """Returns how much of the range of its dtype each parameter can use when rotated.

  A rotation of the rows of a parameter keeps the norm of each column, and a rotation of
  the columns keeps the norm of each row. Therefore these norms bound every number that
  a rotation can make.

  Args:
    flat: arrays, or pairs of factors, by path.
    limits: the greatest number of the dtype of each parameter, by path.
    axes: pairs of a path and the parameter's axes, see `models.layout`.

  Returns:
    The bound, divided by the limit, for each parameter that reads or writes a segment.
    It is NaN or infinite if a number is not finite.
  """
  used = {}
  for path, own in axes:
    if path not in flat:
      continue
    rows = len(own) == 2 and isinstance(own[0], int)
    columns = isinstance(own[-1], int)
    leaf = flat[path]
    if isinstance(leaf, structured.FactorPair):
      pair = leaf.plain()
      parts = [(pair.u, rows, False), (pair.v, False, columns)]
    else:
      parts = [(leaf, rows, columns)]
    greatest = []
    for array, over_rows, over_columns in parts:
      squares = jnp.square(array.astype(jnp.float32) / limits[path])
      if over_rows:
        squares = jnp.sum(squares, axis=0, keepdims=True)
      if over_columns:
        squares = jnp.sum(squares, axis=-1, keepdims=True)
      greatest.append(jnp.sqrt(jnp.max(squares, initial=0)))
    if rows or columns:
      used[path] = jnp.max(jnp.stack(greatest))
  return used


# ---- the transform -----------------------------------------------------------------


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
  return transform.make(
    'residual gauge',
    init=_init,
    layers=functools.partial(_layers, tolerance=tolerance),
    outer=_outer,
    skip=_skip,
  )


class State(NamedTuple):
  """The state of the transform between two layers.

  Attributes:
    first: R_0, float32 `[d, d]`.
    rotation: the rotation of the segment that the next layer reads, float32 `[d, d]`.
    blocks: the blocks of rows of the next up kernel, or of the head, that free
      rotations make trapezoidal, int32 `[n]`. The first number is how many rows come
      before the blocks; the others are how many rows each block has. Empty if there are
      no blocks.
  """

  first: Any
  rotation: Any
  blocks: Any


def _state(first: Any, rotation: Any, blocks: list[int]) -> State:
  return State(first, rotation, np.array(blocks, np.int32))


def _init(context: transform.Context) -> State | tuple[()]:
  config, symmetries = context.config, models.layout.symmetries(context.config)
  width = config.segment_widths[0]
  first = np.eye(width, dtype=np.float32)
  if symmetries.segments:
    free = None if _is_fixed(context, 0) else _free_rotation(context, 0, 0)
  elif symmetries.stream and _stream_can_rotate(context):
    free = _free_rotation(context, config.segments_per_layer - 1, 0)
  else:
    return ()
  if free is None:
    return _state(first, first, [])
  return _state(free, free, [0, width])


def _layers(
  context: transform.Context,
  state: State,
  first: int,
  layers: transform.Layers,
  *,
  tolerance: float,
) -> tuple[State, transform.Layers, list[list[transform.Note]]]:
  if not state:
    return state, layers, [[] for _ in layers]
  config = context.config
  if not config.sliced:
    return _stream_layers(context, state, first, layers)
  flats = [structured.flatten(_plain(layer)) for layer in layers]
  layers.clear()  # so that the float32 arrays of each layer are freed early
  gauges, state = _find_gauges(context, state, first, flats)
  rotated = context.map_layers(
    rotations_lib.turn_parameters,
    [
      ({p: x for p, x in flat.items() if '_shortcut' not in p}, gauge.rotations)
      for flat, gauge in zip(flats, gauges, strict=True)
    ],
    axes=tuple(models.layout.layer_axes(config).items()),
  )
  notes: list[list[transform.Note]] = [[] for _ in flats]
  shortcuts = [
    _shortcut_leaves(context, flat, gauge, tolerance)
    for flat, gauge in zip(flats, gauges, strict=True)
  ]
  for i, (gauge, leaves) in enumerate(zip(gauges, shortcuts, strict=True)):
    prefix = models.names.prefix(first + i)
    for path, own in leaves.items():
      rotated[i][path] = own.leaf
      details = {'error': float(own.error), 'rank': own.rank}
      notes[i].append(transform.note(prefix + path, own.leaf, **details))
    if gauge.blocks:
      leaf, error = _trapezoids(rotated[i]['mlp/up/kernel'], gauge.blocks)
      rotated[i]['mlp/up/kernel'] = leaf
      notes[i].append(transform.note(f'{prefix}mlp/up/kernel', leaf, error=error))
  return state, [structured.unflatten(flat) for flat in rotated], notes


def _skip(
  context: transform.Context, state: State, first: int, layers: transform.Layers
) -> State:
  if not state or not context.config.sliced:
    return state._replace(blocks=np.zeros(0, np.int32)) if state else state
  flats = [structured.flatten(_plain(layer)) for layer in layers]
  return _find_gauges(context, state, first, flats)[1]


def _outer(
  context: transform.Context, state: State, outer: models.Params
) -> tuple[models.Params, list[transform.Note]]:
  if not state:
    return outer, []
  config = context.config
  axes = tuple(models.layout.outer_axes(config).items())
  flat = structured.flatten(_plain(outer))
  outer.clear()  # so that the memory of a parameter is free once it is rotated
  if not config.sliced:
    flat = norms.folded_outer(config, flat)
  turned: dict[str, Any] = {}
  for path in list(flat):
    turned |= rotations_lib.jitted_turn_parameters(
      {path: flat.pop(path)}, (state.first, state.rotation), axes=axes
    )
  notes = []
  blocks = [int(x) for x in state.blocks]
  if blocks:
    leaf, error = _trapezoids(turned['head/kernel'], blocks)
    turned['head/kernel'] = leaf
    notes.append(transform.note('head/kernel', leaf, error=error))
  if not config.sliced:
    turned = norms.with_constant_norms(turned)
  return structured.unflatten(turned), notes


def _plain(tree: models.Params) -> models.Params:
  """Replaces structured leaves by arrays, except pairs of factors."""
  return models.materialize(tree, but=(structured.FactorPair,))


def _plain_source(context: transform.Context, index: int | None) -> dict[str, Any]:
  """Returns the parameters of a layer of the source, or outside the layers, by path.

  Structured leaves are replaced by the same float32 arrays as when their layer is
  rewritten. A source without structured leaves is not copied.

  Args:
    context: the context of the transform.
    index: the layer; None for the parameters outside the layers.
  """
  source = context.source
  flat = structured.flatten(source.outer() if index is None else source.layer(index))
  wide = {
    path: leaf.astype(jnp.float32) if structured.is_structured(leaf) else leaf
    for path, leaf in flat.items()
  }
  return structured.flatten(_plain(structured.unflatten(wide)))


# ---- the rotations of sliced models ------------------------------------------------


class _Gauge(NamedTuple):
  """The rotations of one layer, and its shortcuts in these coordinates.

  Attributes:
    rotations: R_s for the segments that the layer reads or writes.
    polars: polar decompositions of the shortcuts in the polar gauge, by path.
    lowers: factors L of the shortcuts in triangular form, by path.
    blocks: the blocks of the layer's own up kernel, see `State`.
  """

  rotations: tuple[jax.Array, ...]
  polars: dict[str, canonical.Polar]
  lowers: dict[str, jax.Array]
  blocks: list[int]


def _find_gauges(
  context: transform.Context,
  state: State,
  first: int,
  flats: list[dict[str, Any]],
) -> tuple[list[_Gauge], State]:
  """Returns the gauges of consecutive layers, and the state after these layers.

  Args:
    context: the context of the transform.
    state: the state before these layers.
    first: index of the first layer.
    flats: the parameters of each layer by path.
  """
  config = context.config
  step = config.segments_per_layer
  wanted = []
  for i, flat in enumerate(flats):
    widths = config.layer_widths(first + i)
    paths = enumerate(_shortcut_paths(config))
    wanted.append({p: flat[p] for s, p in paths if widths[s] <= widths[s + 1]})
  found = context.map_layers(_polars, [(own,) for own in wanted])
  gauges = []
  for i, (flat, polars) in enumerate(zip(flats, found, strict=True)):
    layer = first + i
    used = _range_used(context, models.names.prefix(layer), flat)
    widths = config.layer_widths(layer)
    device = next(iter(used.values())).device
    rotations = [jax.device_put(jnp.asarray(state.rotation, jnp.float32), device)]
    blocks = [int(x) for x in state.blocks]
    lowers: dict[str, jax.Array] = {}
    own_blocks: list[int] = []
    for s, path in enumerate(_shortcut_paths(config)):
      if s == step - 1:  # the segment that the MLP reads
        own_blocks, blocks = blocks, []
      d, e = widths[s], widths[s + 1]
      fixed = not _within(used, _touching(config, 1 if s + 1 < step else -1))
      if s + 1 == step:
        fixed = fixed or not _readers_within(context, (layer + 1) * step)
      if fixed:
        polars.pop(path, None)
        rotations.append(jax.device_put(jnp.eye(e, dtype=jnp.float32), device))
        blocks = []
      elif path in polars:
        rotation, free = polars[path].rotation, None
        if e > d:
          free = _free_rotation(context, layer * step + s + 1, d, rotation)
          blocks = [] if free is None else [*(blocks or [d]), e - d]
        if free is None:
          free = jnp.eye(e - d, dtype=jnp.float32)
        free = jax.device_put(free, device)
        rotations.append(_next_rotation(rotation, rotations[-1], free))
      else:
        lowers[path], q = _turned_lower_factor(rotations[-1], flat[path])
        rotations.append(q.T)
        blocks = []
    gauges.append(_Gauge(tuple(rotations), polars, lowers, own_blocks))
    state = _state(state.first, rotations[-1], blocks)
  return gauges, state


def _shortcut_leaves(
  context: transform.Context, flat: dict[str, Any], gauge: _Gauge, tolerance: float
) -> dict[str, shortcuts_lib.Shortcut]:
  """Returns the shortcuts of one layer in the layer's gauge, by path."""
  found: dict[str, shortcuts_lib.Shortcut] = {}
  for s, path in enumerate(_shortcut_paths(context.config)):
    rows, columns = gauge.rotations[s : s + 2]
    kernel = flat[path]
    if path in gauge.lowers:
      found[path] = shortcuts_lib.trapezoid(gauge.lowers[path], dtype=context.dtype)
    elif path in gauge.polars:
      found[path] = shortcuts_lib.symmetric(
        rows,
        gauge.polars[path],
        kernel.shape[1],
        tolerance=tolerance,
        unit=context.roundoff,
        dtype=context.dtype,
      )
    else:
      turned = _turn(kernel, rows=rows, columns=columns)
      found[path] = shortcuts_lib.Shortcut(turned, 0.0, min(kernel.shape))
  return found


def _free_rotation(
  context: transform.Context, segment: int, start: int, step: jax.Array | None = None
) -> jax.Array | None:
  """Returns a free rotation of the dimensions of a segment from `start` on.

  Args:
    context: the context of the transform.
    segment: index of the segment.
    start: the first free dimension. The dimensions before it are rotated already.
    step: O of the shortcut that leads into the segment; None if `start` is 0.

  Returns:
    The rotation that makes rows of the next up kernel, or of the head, upper
    trapezoidal; None if there is no such kernel.
  """
  kernel = _reader(context, segment)
  if kernel is None:
    return None
  kernel = jnp.asarray(kernel)[:, : context.config.segment_widths[segment]]
  return _free_rotation_of(kernel, step, start=start)


def _free_rotation_of(
  kernel: jax.Array, step: jax.Array | None, *, start: int
) -> jax.Array:
  kernel = kernel.astype(jnp.float32)
  return upper_rotation((kernel if step is None else _matmul(step, kernel))[start:])


def _reader(context: transform.Context, segment: int) -> Any:
  """Returns the next up kernel after a segment, or the head.

  The kernel is in the coordinates of that segment before any rotation. The result is
  None if the kernel is a pair of factors, or if a segment between attention and MLP
  stands between the two and cannot be rotated.
  """
  config = context.config
  steps = config.segments_per_layer
  if segment == steps * config.num_layers:
    kernel = _plain_source(context, None)['head/kernel']
    return None if isinstance(kernel, structured.FactorPair) else kernel
  index, position = divmod(segment, steps)
  flat = _plain_source(context, index)
  kernel = flat['mlp/up/kernel']
  if isinstance(kernel, structured.FactorPair):
    return None
  kernel = jax.device_put(kernel)
  if not config.sliced:
    scale = flat[f'{models.layout.norm_of(config, "mlp")}/scale']
    return norms.scaled(kernel, jnp.asarray(scale))
  if position == steps - 1:
    return kernel
  d, e = config.layer_widths(index)[:2]
  between = {path: flat[path] for path in _touching(config, 1)}
  used = _range_used(context, models.names.prefix(index), between)
  if d > e or not _within(used, _touching(config, 1)):
    return None
  path = _shortcut_paths(config)[0]
  polars = _jitted_polars({path: jnp.asarray(flat[path])})
  return _matmul(polars[path].rotation, kernel.astype(jnp.float32))[:d]


# ---- which segments can be rotated -------------------------------------------------


def _is_fixed(context: transform.Context, segment: int) -> bool:
  """Returns whether a rotation of the first segment could make an overflow."""
  outer = _plain_source(context, None)
  embeddings = {path: x for path, x in outer.items() if path.startswith('embed/')}
  used = _range_used(context, '', embeddings)
  return not (_within(used, used) and _readers_within(context, segment))


def _readers_within(context: transform.Context, segment: int) -> bool:
  """Returns whether no rotation makes an overflow in the parameters after a segment.

  Args:
    context: the context of the transform.
    segment: the first segment, or the output segment of a layer.
  """
  config = context.config
  index = segment // config.segments_per_layer
  if index == config.num_layers:
    head = {'head/kernel': _plain_source(context, None)['head/kernel']}
    used = _range_used(context, '', head)
    return _within(used, used)
  flat = _plain_source(context, index)
  readers = {path: flat[path] for path in _touching(config, 0)}
  used = _range_used(context, models.names.prefix(index), readers)
  return _within(used, used)


def _stream_can_rotate(context: transform.Context) -> bool:
  """Returns whether no rotation of a dense model makes an overflow."""
  config = context.config
  for i in range(config.num_layers):
    flat = norms.folded(config, jax.device_put(_plain_source(context, i)))
    used = _range_used(context, models.names.prefix(i), flat)
    if not _within(used, used):
      return False
  flat = norms.folded_outer(config, jax.device_put(_plain_source(context, None)))
  used = _range_used(context, '', flat)
  return _within(used, used)


def _range_used(
  context: transform.Context, prefix: str, flat: dict[str, Any]
) -> dict[str, jax.Array]:
  of = models.layout.layer_axes if prefix else models.layout.outer_axes
  axes = tuple(of(context.config).items())
  limits = {path: np.float32(context.limit(prefix + path)) for path in flat}
  return _jitted_range_used(flat, limits, axes=axes)


def _within(used: dict[str, jax.Array], paths: Any) -> bool:
  # This comparison is false for NaN.
  return all(float(used[path]) <= _RANGE for path in paths)


@functools.lru_cache
def _touching(config: models.ModelConfig, segment: int) -> tuple[str, ...]:
  """Returns the paths of a layer's parameters that read or write a segment."""
  axes = models.layout.layer_axes(config)
  return tuple(path for path, own in axes.items() if segment in own)


def _shortcut_paths(config: models.ModelConfig) -> list[str]:
  sublayers = models.layout.SUBLAYERS[: config.segments_per_layer]
  return [f'{sublayer}_shortcut/kernel' for sublayer in sublayers]


# ---- dense models ------------------------------------------------------------------


def _stream_layers(
  context: transform.Context, state: State, first: int, layers: transform.Layers
) -> tuple[State, transform.Layers, list[list[transform.Note]]]:
  """Rewrites layers of a dense model, whose segments all have the same rotation."""
  config = context.config
  axes = tuple(models.layout.layer_axes(config).items())
  flats = [structured.flatten(_plain(layer)) for layer in layers]
  layers.clear()
  rotation = jnp.asarray(state.rotation)
  arguments = []
  for flat in flats:
    device = next(iter(jax.tree.leaves(flat))).device
    arguments.append(
      (norms.folded(config, flat), (jax.device_put(rotation, device),) * 3)
    )
  flats.clear()
  rotated = context.map_layers(rotations_lib.turn_parameters, arguments, axes=axes)
  notes: list[list[transform.Note]] = [[] for _ in rotated]
  blocks = [int(x) for x in state.blocks]
  if blocks:
    leaf, error = _trapezoids(rotated[0]['mlp/up/kernel'], blocks)
    rotated[0]['mlp/up/kernel'] = leaf
    notes[0].append(
      transform.note(f'{models.names.layer(first)}/mlp/up/kernel', leaf, error=error)
    )
    state = state._replace(blocks=np.zeros(0, np.int32))
  rotated = [structured.unflatten(norms.with_constant_norms(flat)) for flat in rotated]
  return state, rotated, notes


def _trapezoids(kernel: Any, blocks: list[int]) -> tuple[Any, float]:
  """Makes the leaf of a kernel with trapezoidal blocks of rows.

  Args:
    kernel: the kernel.
    blocks: see `State`.

  Returns:
    The leaf, and the relative error of the zeros in the Frobenius norm.
  """
  full, *rest = blocks
  upper, error = _with_zeros(kernel, blocks=tuple(rest), full=full)
  return structured.RowTrapezoids(upper, tuple(rest), full), float(error)


def _with_zeros(
  kernel: jax.Array, *, blocks: tuple[int, ...], full: int
) -> tuple[jax.Array, jax.Array]:
  starts = np.repeat(np.cumsum([0, *blocks])[:-1], blocks) + full
  rows = np.arange(full, full + sum(blocks))
  first = jnp.asarray(np.concatenate([np.zeros(full, int), rows - starts]))
  upper = jnp.where(jnp.arange(kernel.shape[1]) >= first[:, None], kernel, 0)
  norm = jnp.maximum(jnp.linalg.norm(kernel), _TINY)
  return upper, jnp.linalg.norm(upper - kernel) / norm


_TINY = float(jnp.finfo(jnp.float32).tiny)


def _polars(shortcuts: dict[str, jax.Array]) -> dict[str, canonical.Polar]:
  found: dict[str, canonical.Polar] = {}
  for path, matrix in shortcuts.items():
    if found:
      # LAPACK uses all CPUs. Two decompositions at a time would take four times as long
      # as one, so that each waits for the one before it.
      last = next(reversed(found.values())).values
      matrix, _ = jax.lax.optimization_barrier((matrix, last))
    found[path] = canonical.polar(matrix)
  return found


@jax.jit
def _turned_lower_factor(
  rotation: jax.Array, shortcut: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return shortcuts_lib.lower_factor(_matmul(rotation.T, shortcut.astype(jnp.float32)))


_jitted_polars = jax.jit(_polars)
_jitted_range_used = jax.jit(range_used, static_argnames='axes')
_next_rotation = jax.jit(next_rotation)
_turn = jax.jit(rotations_lib.turn)
_free_rotation_of = jax.jit(_free_rotation_of, static_argnames='start')
_with_zeros = jax.jit(_with_zeros, static_argnames=('blocks', 'full'))
