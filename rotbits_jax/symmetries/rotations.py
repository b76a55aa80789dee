r"""Rotations of the residual stream: the same function in other coordinates.

The residual stream of a sliced model is

    x_0 = embed[tokens],   x_{s+1} = x_s M_s + sublayer_s(RMSN(x_s)),   s = 0 .. S-1

x_s is segment s of the residual stream, and M_s is the shortcut past sublayer s. In a
dense model, M_s is the identity and is not stored.

Let R_s be an orthogonal matrix for each segment. The map x_s -> x_s R_s changes no
output if three kinds of parameters change with it. A kernel that writes segment s is
multiplied by R_s from the right. A kernel that reads segment s is multiplied by R_s^T
from the left. A shortcut becomes R_s^T M_s R_{s+1}. `models.layout` says which axis of
a parameter belongs to which segment.

In this file d is the width of a segment. Rotations include reflections.

Reference: SliceGPT, arXiv 2401.15024, section 3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.symmetries import products

_matmul = products.matmul


def turn(
  array: Any, *, rows: jax.Array | None = None, columns: jax.Array | None = None
) -> Any:
  """Rotates one array: returns `rows^T @ array @ columns` in the array's dtype.

  The product is computed in float32. If a rotation is the identity, the array keeps
  every bit, even if a number is not finite. If the array is a pair of factors, each
  factor is rotated separately.

  Args:
    array: an array `[n, m]` or `[m]`, or a `structured.FactorPair`.
    rows: float32 `[n, n]`; None for no rotation.
    columns: float32 `[m, m]`; None for no rotation.

  Returns:
    The rotated array, or a `structured.LowRank` for a pair of factors.
  """
  if isinstance(array, structured.FactorPair):
    pair = array.plain()
    u, v = turn(pair.u, rows=rows), turn(pair.v, columns=columns)
    return dataclasses.replace(pair, u=u, v=v)
  product = array.astype(jnp.float32)
  if rows is not None:
    product = jnp.where(_is_identity(rows), product, _matmul(rows.T, product))
  if columns is not None:
    product = jnp.where(_is_identity(columns), product, _matmul(product, columns))
  return product.astype(array.dtype)


def _is_identity(rotation: jax.Array) -> jax.Array:
  return jnp.all(rotation == jnp.eye(rotation.shape[0], dtype=rotation.dtype))


def turn_parameters(
  flat: dict[str, Any], rotations: tuple[jax.Array, ...], *, axes: tuple[Any, ...]
) -> dict[str, Any]:
  """Rotates the parameters of a layer, or the parameters outside the layers.

  Args:
    flat: arrays, or pairs of factors, by path.
    rotations: float32 `[d, d]` for each segment that the parameters read or write. For
      a layer, these are its input, the segment between attention and MLP (unless they
      are parallel), and its output. For the parameters outside the layers, they are the
      first and the last segment of the model.
    axes: pairs of a path and the parameter's axes, see `models.layout`. Paths that are
      not in `flat` are skipped.

  Returns:
    The parameters in their old dtypes.
  """
  turned = dict(flat)
  for path, own in axes:
    if path in flat:
      rows = rotations[own[0]] if len(own) == 2 and isinstance(own[0], int) else None
      columns = rotations[own[-1]] if isinstance(own[-1], int) else None
      turned[path] = turn(flat[path], rows=rows, columns=columns)
  return turned


def lower(factor: jax.Array) -> jax.Array:
  """Returns the lower trapezoidal B `[d, k]` with the same `B B^T` as the factor.

  Args:
    factor: `[d, k]`.
  """
  # In the QR factorisation of the transposed factor, R is upper trapezoidal, and R^T
  # is B.
  r = jnp.linalg.qr(factor.T.astype(jnp.float32), mode='r')
  padding = ((0, 0), (0, factor.shape[1] - r.shape[0]))
  return jnp.tril(jnp.pad(r.T, padding)).astype(factor.dtype)


jitted_turn_parameters = jax.jit(turn_parameters, static_argnames='axes')
