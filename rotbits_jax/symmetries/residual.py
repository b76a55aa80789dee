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

R_0 = I: the last, global rotation is left to `symmetries.remove_global_gauge`.

Shape letters: d, e widths of a shortcut's two segments, W the widest of a run, N layers
of a block.

References:
  SliceGPT, arXiv 2401.15024, section 3: the rotations and the shortcuts.
  Getting Free Bits Back from Rotational Symmetries in LLMs, arXiv 2410.01309: the same
  freedom, removed by bits-back coding.
"""

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import canonical
from rotbits_jax.symmetries import rotations as rotations_lib
from rotbits_jax.symmetries import transform
from rotbits_jax.symmetries.rotations import Rotations
from rotbits_jax.symmetries.rotations import embed

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
  return rotations_lib.lower(_matmul(rotation.T, u * jnp.sqrt(weights)))


# ---- a whole model: shapes are known, ranks are chosen from the spectra --------------


def remove_gauge(*, tolerance: float = 0.7) -> transform.Transform:
  """The transform that fixes the residual gauge.

  Args:
    tolerance: how far from 1 a singular value may be and still count as 1, in units of
      the storage format's roundoff (2^-11 for float16, 2^-8 for bfloat16, and what
      float32 arithmetic can tell, 2^-19, for float32). Those of SliceGPT's shortcuts
      that should be 1 spread by 0.9 of it. At 1.5 all of them count, which takes
      SliceGPT's own rounding errors out of the shortcuts and moves the model by as much
      as storing it in other coordinates does; 0.7 keeps the larger ones.

  Returns:
    A transform. Its notes tell, for each shortcut, the form taken, its rank, the
    numbers stored and the relative error.
  """
  return transform.Transform(
    'residual gauge', functools.partial(_remove_gauge, tolerance=tolerance)
  )


def _remove_gauge(
  model: models.Model, *, tolerance: float
) -> tuple[models.Model, list[transform.Note]]:
  if not model.config.sliced:
    return model, []
  model = model.materialize(but=(structured.FactorPair,))
  form = transform.storage_format(model)
  limit = transform.limit(model)
  shortcuts = [np.asarray(kernel) for _, kernel in _shortcuts(model)]
  fixed = _overflowing_segments(model, limit)
  while True:
    gauge = _find_gauge(shortcuts, model.config.segment_widths, fixed)
    rotated = rotations_lib.rotate(model, gauge.rotations)
    # A rotation can carry a large number past the format's greatest.
    overflowed = _overflowing_segments(rotated, limit) - fixed
    if not overflowed:
      break
    fixed |= overflowed
  forms = _structured_shortcuts(
    gauge, shortcuts, form, unit=transform.roundoff(model), tolerance=tolerance
  )
  kernels, notes = [], []
  for s, (name, kernel) in enumerate(_shortcuts(rotated)):
    leaf, error = forms.get(s, (kernel, 0.0))
    kernels.append(leaf)
    gram = isinstance(leaf, structured.IdentityMinusGram)
    rank = leaf.b.shape[1] + leaf.c.shape[1] if gram else min(leaf.shape)
    notes.append(transform.note(name, leaf, error=error, rank=rank))
  layers = []
  for layer in rotated.layers():
    own = {name: {'kernel': kernels.pop(0)} for name in _shortcut_names(layer)}
    layers.append(layer | own)
  rewritten = models.from_layers(
    model.config, rotated.outer(), layers, model.buffers, model.stored_as
  )
  return rewritten, notes


def _shortcut_names(layer: models.Params) -> list[str]:
  return [n for n in ('attention_shortcut', 'mlp_shortcut') if n in layer]


def _shortcuts(model: models.Model) -> Iterator[tuple[str, Any]]:
  """Names and kernels of the shortcuts M_0 .. M_{S-1}."""
  for i, layer in enumerate(model.layers()):
    for name in _shortcut_names(layer):
      yield f'layers.{i}/{name}/kernel', layer[name]['kernel']


def _overflowing_segments(model: models.Model, limit: float) -> set[int]:
  """The segments that a tensor with a number beyond the limit, or none, touches."""
  bad = lambda tree: not transform.is_within(tree, limit)
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
  gauge: _Gauge,
  shortcuts: list[np.ndarray],
  form: np.dtype,
  *,
  unit: float,
  tolerance: float,
) -> dict[int, tuple[structured.Structured, float]]:
  """The shortcuts' leaves in this gauge and their relative errors (Frobenius).

  Args:
    gauge: the gauge.
    shortcuts: M_s.
    form: the format that the leaves will be rounded to.
    unit: its roundoff.
    tolerance: see `remove_gauge`.
  """
  leaves: dict[int, tuple[structured.Structured, float]] = {}
  for s, lower in gauge.lowers.items():
    rounded = np.tril(lower).astype(form).astype(np.float32)
    error = float(np.linalg.norm(rounded - lower))
    norm = max(float(np.linalg.norm(lower)), _TINY)
    leaf = structured.Trapezoidal(np.tril(lower))
    leaves[s] = leaf.astype(shortcuts[s].dtype), error / norm
  for group in _same_shape(list(gauge.polars), shortcuts):
    dtype, columns = shortcuts[group[0]].dtype, shortcuts[group[0]].shape[1]
    stacked = jax.tree.map(lambda *x: np.stack(x), *(gauge.polars[s] for s in group))
    less = np.sum(stacked.values < 1 - tolerance * unit, axis=1)
    more = np.sum(stacked.values > 1 + tolerance * unit, axis=1)
    turns = np.stack([gauge.rotations[s] for s in group])
    forms = jax.device_get(
      _symmetric_forms(
        turns, stacked, less, more, k=int(less.max()), j=int(more.max()), form=form
      )
    )
    for i, s in enumerate(group):
      gram = structured.IdentityMinusGram(
        b=forms.b[i, :, : less[i]], c=forms.c[i, :, : more[i]], columns=columns
      )
      triangle = structured.SymmetricTriangle(forms.lower[i], columns)
      smaller = structured.count_numbers(gram) < structured.count_numbers(triangle)
      if smaller and forms.gram_error[i] <= _ERROR_BOUND * unit:
        leaves[s] = gram.astype(dtype), forms.gram_error[i]
      else:
        leaves[s] = triangle.astype(dtype), forms.lower_error[i]
  return leaves


class _SymmetricForms(NamedTuple):
  """R^T P R in two forms, and the relative errors that rounding them makes."""

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
  form: Any,
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
  lower = jnp.tril(symmetric)
  norm = jnp.maximum(jnp.linalg.norm(symmetric), _TINY)
  width = symmetric.shape[0]
  error = lambda leaf: jnp.linalg.norm(leaf.materialize() - symmetric) / norm
  b32, c32, lower32 = (x.astype(form).astype(jnp.float32) for x in (b, c, lower))
  return _SymmetricForms(
    b=b,
    c=c,
    lower=lower,
    gram_error=error(structured.IdentityMinusGram(b32, c32, columns=width)),
    lower_error=error(structured.SymmetricTriangle(lower32, columns=width)),
  )


_TINY = float(jnp.finfo(jnp.float32).tiny)


@functools.partial(jax.jit, static_argnames=('k', 'j', 'form'))
def _symmetric_forms(*stacks: Any, **static: Any) -> _SymmetricForms:
  return jax.vmap(functools.partial(_symmetric_form, **static))(*stacks)


@jax.jit
def _turned_lower_factor(
  rotation: jax.Array, shortcut: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return lower_factor(_matmul(rotation.T, shortcut.astype(jnp.float32)))


_polar_stack = jax.jit(jax.vmap(polar))
_cumulative_rotations = jax.jit(cumulative_rotations)


def _same_shape(indices: list[int], arrays: list[np.ndarray]) -> list[list[int]]:
  """Groups the indices of arrays that have one shape."""
  groups: dict[tuple[int, ...], list[int]] = {}
  for index in indices:
    groups.setdefault(arrays[index].shape, []).append(index)
  return list(groups.values())
