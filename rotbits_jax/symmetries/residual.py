r"""The residual gauge: a rotation of every segment of the residual stream.

    x_0 = embed[tokens],   x_{s+1} = x_s M_s + sublayer_s(RMSN(x_s)),   s = 0 .. S-1

For orthogonal R_s the map x_s -> x_s R_s changes no output if what writes a segment is
multiplied by R_s and what reads it by R_s^T; a shortcut becomes R_s^T M_s R_{s+1}.

Polar gauge. M_s = P_s O_s with P_s symmetric positive semidefinite and O_s orthogonal.
With R_{s+1} = O_s^T R_s every shortcut becomes R_s^T P_s R_s. SliceGPT's M_s is a block
of an orthogonal matrix, so most singular values are 1 and P_s = I - B_s B_s^T with few
columns; stored is R_s^T B_s, brought to lower trapezoidal form by a rotation of its
columns. A shortcut [d, D] that widens the stream is [P_s 0] O_s, with O_s in O(D).

Where it cannot be so: a shortcut that narrows the stream takes a triangular form,
L = R_s^T M_s R_{s+1} (an LQ factor); a P_s whose low-rank form is not accurate enough
is stored as its lower triangle; a segment that touches non-finite numbers is not
rotated, and the shortcut that leads into it stays an array.

R_0 = I: the last, global rotation is left to another transform.

Shape letters: d, e widths of a shortcut's two segments, W the widest of a run, N layers
of a block.

References:
  SliceGPT, arXiv 2401.15024, section 3: the rotations and the shortcuts.
  Getting Free Bits Back from Rotational Symmetries in LLMs, arXiv 2410.01309: the same
  freedom, removed by bits-back coding.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import transform

Rotations = list[np.ndarray]  # float32 [d, d], one a segment

_matmul = functools.partial(jnp.matmul, precision='highest')

# The relative error, in roundoffs, up to which a low-rank form is accurate enough.
# Rounding a dense matrix costs 0.4; SliceGPT's own shortcuts in this form 0.6.
_ERROR_BOUND = 2.0


# ---- pure functions: write unbatched, vmap outward -----------------------------------


class Polar(NamedTuple):
  """M = [P 0] O with P = U diag(values) U^T."""

  u: jax.Array  # float32 [d, d], orthogonal
  values: jax.Array  # float32 [d], descending
  rotation: jax.Array  # float32 [e, e], O


def polar(matrix: jax.Array) -> Polar:
  """Left polar decomposition of a shortcut `[d, e]`, d <= e, in float32.

  By the singular value decomposition, which stays accurate where a singular value is
  near 0; orthogonal to about 1e-6.
  """
  d, e = matrix.shape
  u, values, vt = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=True)
  left = jnp.eye(e, dtype=jnp.float32).at[:d, :d].set(u)
  return Polar(u, values, _matmul(left, vt))


def cumulative_rotations(steps: jax.Array, first: jax.Array) -> jax.Array:
  """R_0 .. R_S from R_{s+1} = O_s^T R_s, by an associative scan.

  Args:
    steps: float32 `[S, W, W]`, the O_s.
    first: float32 `[W, W]`, R_0.

  Returns:
    float32 `[S + 1, W, W]`, orthogonal to the rounding of float32.
  """
  factors = jnp.concatenate([first[None], jnp.matrix_transpose(steps)])
  rotations = jax.lax.associative_scan(lambda a, b: _matmul(b, a), factors)
  return canonical.reorthogonalize(rotations)


def lower_factor(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """LQ factors of `[d, e]`: L lower trapezoidal, and Q `[e, e]` orthogonal."""
  q, r = jnp.linalg.qr(matrix.T.astype(jnp.float32), mode='complete')
  return r.T, q.T


def gram_factor(rotation: jax.Array, u: jax.Array, weights: jax.Array) -> jax.Array:
  """A lower trapezoidal B with B B^T = R^T U diag(weights) U^T R.

  Args:
    rotation: float32 `[d, d]`, R.
    u: float32 `[d, k]`, orthonormal columns.
    weights: float32 `[k]`, not negative; 0 for a column that only pads.

  Returns:
    float32 `[d, k]`.
  """
  factor = _matmul(rotation.T, u * jnp.sqrt(weights))
  # Reduced QR of B^T: its R is upper trapezoidal.
  lower = jnp.linalg.qr(factor.T, mode='r').T
  return jnp.tril(jnp.pad(lower, ((0, 0), (0, u.shape[1] - lower.shape[1]))))


def turn(
  array: jax.Array, *, rows: jax.Array | None = None, columns: jax.Array | None = None
) -> jax.Array:
  """`rows^T @ array @ columns` in float32, rounded to the array's dtype.

  An identity leaves the array as it is, even where its numbers are not finite.
  """
  product = array.astype(jnp.float32)
  if rows is not None:
    product = jnp.where(_is_identity(rows), product, _matmul(rows.T, product))
  if columns is not None:
    product = jnp.where(_is_identity(columns), product, _matmul(product, columns))
  return product.astype(array.dtype)


def _is_identity(rotation: jax.Array) -> jax.Array:
  return jnp.all(rotation == jnp.eye(rotation.shape[0], dtype=rotation.dtype))


def rotate_layer(
  layer: models.Params, rotations: tuple[jax.Array, ...]
) -> models.Params:
  """Rotates the segments that one layer touches.

  Args:
    layer: parameters of a layer, arrays.
    rotations: float32 `[d, d]` for each of its segments: the input, the one between
      attention and MLP unless blocks are parallel, and the output.

  Returns:
    The parameters, in the dtypes they had.
  """
  # With parallel blocks both sublayers read the first segment and write the last.
  reads = {'attention': rotations[0], 'mlp': rotations[-2]}
  writes = {'attention': rotations[1], 'mlp': rotations[-1]}
  rotated = dict(layer)
  for name, last in (('attention', 'out'), ('mlp', 'down')):
    rotated[name] = {
      linear: params | {'kernel': turn(params['kernel'], rows=reads[name])}
      for linear, params in layer[name].items()
      if linear != last
    }
    rotated[name][last] = {
      key: turn(value, columns=writes[name]) for key, value in layer[name][last].items()
    }
    if f'{name}_shortcut' in layer:
      kernel = layer[f'{name}_shortcut']['kernel']
      kernel = turn(kernel, rows=reads[name], columns=writes[name])
      rotated[f'{name}_shortcut'] = {'kernel': kernel}
  return rotated


def rotate_outer(
  outer: models.Params, first: jax.Array, last: jax.Array
) -> models.Params:
  """Rotates the embeddings into the first segment and the head out of the last."""
  head = outer['head']
  return outer | {
    'embed': {k: turn(table, columns=first) for k, table in outer['embed'].items()},
    'head': head | {'kernel': turn(head['kernel'], rows=last)},
  }


# ---- a whole model: shapes are known, ranks are chosen from the spectra --------------


def rotate(model: models.SlicedModel, rotations: Rotations) -> models.SlicedModel:
  """Rotates every residual segment of a sliced model.

  Args:
    model: the model; structured leaves are materialized.
    rotations: R_s, float32 `[d_s, d_s]`, one a segment.

  Returns:
    A model of the same function, rounded to the dtypes it had, with NumPy arrays.

  Raises:
    ValueError: if the model has no shortcuts, so that its segments are not free.
  """
  if not model.config.sliced:
    raise ValueError('a dense model has no shortcuts: its segments cannot be rotated')
  model = model.materialize()
  step = model.config.segments_per_layer
  params, layer = dict(model.params), 0
  for group, size in enumerate(model.group_sizes):
    start = layer * step
    stacks = tuple(
      np.stack(rotations[start + i : start + i + (size - 1) * step + 1 : step])
      for i in range(step + 1)
    )
    name = f'blocks_{group}'
    # Fetched block by block: a device need not hold the whole model.
    params[name] = jax.device_get(_rotate_layers(params[name], stacks))
    layer += size
  outer = _rotate_outer(model.outer(), rotations[0], rotations[-1])
  return dataclasses.replace(model, params=params | jax.device_get(outer))


def randomly_rotated(
  model: models.SlicedModel, *, key: jax.Array
) -> models.SlicedModel:
  """A model whose every segment is rotated by a Haar rotation and rounded again.

  It has the same function up to rounding: the yardstick for what rounding alone does.

  Args:
    model: a sliced model.
    key: from `jax.random.key`.

  Returns:
    The rotated model, in the dtypes it had.

  Raises:
    ValueError: if the model has no shortcuts.
  """
  widths = model.config.segment_widths
  keys = jax.random.split(key, len(widths))
  rotations = map(jax.random.orthogonal, keys, widths)
  return rotate(model, jax.device_get(list(rotations)))


def remove_gauge(*, tolerance: float = 1.5) -> transform.Transform:
  """The transform that fixes the residual gauge.

  Args:
    tolerance: how far from 1 a singular value may be and still count as 1, in units of
      the storage format's roundoff (2^-11 for float16, 2^-8 for bfloat16, and what
      float32 arithmetic can tell, 2^-19, for float32). Those of SliceGPT's shortcuts
      that should be 1 spread by 0.9 of it.

  Returns:
    A transform. Its notes tell, for each shortcut, the form taken, its rank, the
    numbers stored and the relative error.
  """
  return transform.Transform(
    'residual gauge', functools.partial(_remove_gauge, tolerance=tolerance)
  )


def _remove_gauge(
  model: models.SlicedModel, *, tolerance: float
) -> tuple[models.SlicedModel, list[transform.Note]]:
  if not model.config.sliced:
    return model, []
  model = model.materialize()
  shortcuts = [np.asarray(kernel) for _, kernel in _shortcuts(model)]
  fixed = _non_finite_segments(model)
  while True:
    gauge = _find_gauge(shortcuts, model.config.segment_widths, fixed)
    rotated = rotate(model, gauge.rotations)
    # A rotation can carry a large number past the format's greatest.
    overflowed = _non_finite_segments(rotated) - fixed
    if not overflowed:
      break
    fixed |= overflowed
  forms = _structured_shortcuts(gauge, shortcuts, tolerance)
  kernels, notes = [], []
  for s, (name, kernel) in enumerate(_shortcuts(rotated)):
    leaf, error = forms.get(s, (kernel, 0.0))
    kernels.append(leaf)
    gram = isinstance(leaf, structured.IdentityMinusGram)
    notes.append(
      {
        'tensor': name,
        'form': leaf.kind if structured.is_structured(leaf) else 'array',
        'shape': list(leaf.shape),
        'rank': leaf.b.shape[1] + leaf.c.shape[1] if gram else min(leaf.shape),
        'numbers': structured.count_numbers(leaf),
        'error': float(f'{error:.3g}'),
      }
    )
  layers = []
  for layer in rotated.layers():
    own = {name: {'kernel': kernels.pop(0)} for name in _shortcut_names(layer)}
    layers.append(layer | own)
  rewritten = models.from_layers(model.config, rotated.outer(), layers, model.buffers)
  return rewritten, notes


def _shortcut_names(layer: models.Params) -> list[str]:
  return [n for n in ('attention_shortcut', 'mlp_shortcut') if n in layer]


def _shortcuts(model: models.SlicedModel) -> Iterator[tuple[str, Any]]:
  """Names and kernels of the shortcuts M_0 .. M_{S-1}."""
  for i, layer in enumerate(model.layers()):
    for name in _shortcut_names(layer):
      yield f'layers.{i}/{name}', layer[name]['kernel']


def _non_finite_segments(model: models.SlicedModel) -> set[int]:
  """The segments that a tensor with an infinite or undefined number touches."""
  bad = lambda tree: not all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
  step, last = model.config.segments_per_layer, len(model.config.segment_widths) - 1
  outer = model.outer()
  segments = {0} if bad(outer['embed']) else set()
  segments |= {last} if bad(outer['head']['kernel']) else set()
  for i, layer in enumerate(model.layers()):
    for name, s in (('attention', i * step), ('mlp', (i + 1) * step - 1)):
      if bad([layer[name], layer.get(f'{name}_shortcut')]):
        segments |= {s, s + 1}
  return segments


class _Gauge(NamedTuple):
  """The rotations, and what the shortcuts are in terms of them."""

  rotations: Rotations  # R_s
  polars: dict[int, Polar]  # of the shortcuts that take the polar gauge
  lowers: dict[int, np.ndarray]  # L of those that take the triangular form


def _find_gauge(
  shortcuts: list[np.ndarray], widths: tuple[int, ...], fixed: set[int]
) -> _Gauge:
  """Chooses R_0 .. R_S.

  Segments form runs, within which each shortcut takes the polar gauge; a run ends
  where the stream gets narrower or the next segment must not be rotated.
  """
  count = len(shortcuts)
  polars: dict[int, Polar] = {}
  wanted = [
    s for s in range(count) if widths[s] <= widths[s + 1] and s + 1 not in fixed
  ]
  for group in _same_shape(wanted, shortcuts):
    stack = jax.device_get(_polar_stack(np.stack([shortcuts[s] for s in group])))
    polars |= {s: Polar(*(x[i] for x in stack)) for i, s in enumerate(group)}
  rotations: Rotations = []
  lowers: dict[int, np.ndarray] = {}
  start, first = 0, np.eye(widths[0], dtype=np.float32)
  while True:
    stop = next((s for s in range(start, count) if s not in polars), count)
    widest = widths[stop]
    steps = [embed(polars[s].rotation, widest) for s in range(start, stop)]
    stack = np.array(steps, np.float32).reshape(-1, widest, widest)
    turns = np.asarray(_cumulative_rotations(stack, embed(first, widest)))
    rotations += [
      turns[s - start, : widths[s], : widths[s]] for s in range(start, stop + 1)
    ]
    if stop == count:
      return _Gauge(rotations, polars, lowers)
    start, first = stop + 1, np.eye(widths[stop + 1], dtype=np.float32)
    if start not in fixed:
      lower, q = _turned_lower_factor(rotations[-1], shortcuts[stop])
      lowers[stop], first = np.asarray(lower), np.asarray(q).T


def _structured_shortcuts(
  gauge: _Gauge, shortcuts: list[np.ndarray], tolerance: float
) -> dict[int, tuple[structured.Structured, float]]:
  """The shortcuts' leaves in this gauge and their relative errors (Frobenius)."""
  leaves: dict[int, tuple[structured.Structured, float]] = {}
  for s, lower in gauge.lowers.items():
    rounded = np.tril(lower).astype(shortcuts[s].dtype)
    error = np.linalg.norm(rounded.astype(np.float32) - lower)
    norm = max(float(np.linalg.norm(lower)), _TINY)
    leaves[s] = structured.Trapezoidal(rounded), float(error) / norm
  for group in _same_shape(list(gauge.polars), shortcuts):
    dtype, columns = shortcuts[group[0]].dtype, shortcuts[group[0]].shape[1]
    unit = max(float(jnp.finfo(dtype).eps) / 2, 16 * float(jnp.finfo(jnp.float32).eps))
    stacked = jax.tree.map(lambda *x: np.stack(x), *(gauge.polars[s] for s in group))
    less = np.sum(stacked.values < 1 - tolerance * unit, axis=1)
    more = np.sum(stacked.values > 1 + tolerance * unit, axis=1)
    turns = np.stack([gauge.rotations[s] for s in group])
    forms = jax.device_get(
      _symmetric_forms(
        turns, stacked, less, more, k=int(less.max()), j=int(more.max()), dtype=dtype
      )
    )
    for i, s in enumerate(group):
      gram = structured.IdentityMinusGram(
        b=forms.b[i, :, : less[i]], c=forms.c[i, :, : more[i]], columns=columns
      )
      triangle = structured.SymmetricTriangle(forms.lower[i], columns)
      smaller = structured.count_numbers(gram) < structured.count_numbers(triangle)
      if smaller and forms.gram_error[i] <= _ERROR_BOUND * unit:
        leaves[s] = gram, forms.gram_error[i]
      else:
        leaves[s] = triangle, forms.lower_error[i]
  return leaves


class _SymmetricForms(NamedTuple):
  """R^T P R in two forms, rounded, and the relative errors of the rounding."""

  b: jax.Array  # [d, k]
  c: jax.Array  # [d, j]
  lower: jax.Array  # [d, d]
  gram_error: jax.Array
  lower_error: jax.Array


def _symmetric_form(
  rotation: jax.Array,
  shortcut: Polar,
  less: jax.Array,
  more: jax.Array,
  *,
  k: int,
  j: int,
  dtype: Any,
) -> _SymmetricForms:
  """Both forms of one shortcut, `less` of whose values are below 1 and `more` above.

  Values descend, so those above come first and those below last. Of the k and j
  columns, what exceeds these counts only pads and ends as zeros.
  """
  u, values, _ = shortcut
  first, last = values[:j] - 1, 1 - values[values.size - k :]
  weights = jnp.where(jnp.arange(k) >= k - less, last, 0)
  b = gram_factor(rotation, u[:, u.shape[1] - k :], weights)
  c = gram_factor(rotation, u[:, :j], jnp.where(jnp.arange(j) < more, first, 0))
  turned = _matmul(rotation.T, u)
  symmetric = _matmul(turned * values, turned.T)
  b, c, lower = (x.astype(dtype) for x in (b, c, jnp.tril(symmetric)))
  norm = jnp.maximum(jnp.linalg.norm(symmetric), _TINY)
  width = symmetric.shape[0]
  error = lambda leaf: jnp.linalg.norm(leaf.materialize() - symmetric) / norm
  b32, c32, lower32 = (x.astype(jnp.float32) for x in (b, c, lower))
  return _SymmetricForms(
    b=b,
    c=c,
    lower=lower,
    gram_error=error(structured.IdentityMinusGram(b32, c32, columns=width)),
    lower_error=error(structured.SymmetricTriangle(lower32, columns=width)),
  )


_TINY = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, static_argnames=('k', 'j', 'dtype'))
def _symmetric_forms(*stacks: Any, **static: Any) -> _SymmetricForms:
  return jax.vmap(functools.partial(_symmetric_form, **static))(*stacks)


@jax.jit
def _turned_lower_factor(
  rotation: jax.Array, shortcut: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return lower_factor(_matmul(rotation.T, shortcut.astype(jnp.float32)))


_rotate_layers = jax.jit(jax.vmap(rotate_layer))
_rotate_outer = jax.jit(rotate_outer)
_polar_stack = jax.jit(jax.vmap(polar))
_cumulative_rotations = jax.jit(cumulative_rotations)


def embed(rotation: Any, width: int) -> np.ndarray:
  """A rotation of the first dimensions of a wider space."""
  d = rotation.shape[0]
  embedded = np.eye(width, dtype=np.float32)
  embedded[:d, :d] = rotation
  return embedded


def _same_shape(indices: list[int], arrays: list[np.ndarray]) -> list[list[int]]:
  """Groups the indices of arrays that have one shape."""
  groups: dict[tuple[int, ...], list[int]] = {}
  for index in indices:
    groups.setdefault(arrays[index].shape, []).append(index)
  return list(groups.values())
