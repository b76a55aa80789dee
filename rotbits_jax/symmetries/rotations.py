r"""Rotations of the residual stream: the same function in other coordinates.

    x_0 = embed[tokens],   x_{s+1} = x_s M_s + sublayer_s(RMSN(x_s)),   s = 0 .. S-1

For orthogonal R_s the map x_s -> x_s R_s changes no output if what writes a segment is
multiplied by R_s and what reads it by R_s^T; a shortcut becomes R_s^T M_s R_{s+1}.
`models.layout` says which axis of which parameter is which segment.

Shape letters: d the width of a segment.

Reference: SliceGPT, arXiv 2401.15024, section 3.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import products

_matmul = products.matmul


def turn(
  array: Any, *, rows: jax.Array | None = None, columns: jax.Array | None = None
) -> Any:
  """`rows^T @ array @ columns` in float32, rounded to the array's dtype.

  An identity leaves the array as it is, even where its numbers are not finite. Of a
  pair of factors each is turned by itself.
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
  """Rotates the segments that parameters touch.

  Args:
    flat: arrays, or pairs of factors, by path.
    rotations: float32 `[d, d]` for each segment: of a layer its input, the one between
      attention and MLP unless blocks are parallel, and its output.
    axes: pairs of a path and the parameter's axes, see `models.layout`; parameters that
      are not in `flat` are passed over.

  Returns:
    The parameters, in the dtypes they had.
  """
  turned = dict(flat)
  for path, own in axes:
    if path in flat:
      rows = rotations[own[0]] if len(own) == 2 and isinstance(own[0], int) else None
      columns = rotations[own[-1]] if isinstance(own[-1], int) else None
      turned[path] = turn(flat[path], rows=rows, columns=columns)
  return turned


def lower(factor: jax.Array) -> jax.Array:
  """The lower trapezoidal B `[d, k]` with the same `B B^T` as a factor `[d, k]`."""
  # Reduced QR of B^T: its R is upper trapezoidal.
  r = jnp.linalg.qr(factor.T.astype(jnp.float32), mode='r')
  padding = ((0, 0), (0, factor.shape[1] - r.shape[0]))
  return jnp.tril(jnp.pad(r.T, padding)).astype(factor.dtype)


def rotate(model: models.Model, rotations: list[np.ndarray]) -> models.Model:
  """Rotates every residual segment of a model in memory.

  Args:
    model: the model; structured leaves are materialized, but for pairs of factors.
    rotations: R_s, float32 `[d_s, d_s]`, one a segment. Without shortcuts, in a dense
      model, all are one, and its norms have no scales.

  Returns:
    A model of the same function, rounded to the dtypes it had, with NumPy arrays.
  """
  config = model.config
  model = model.materialize(but=(structured.FactorPair,))
  step, layers = config.segments_per_layer, []
  axes = tuple(models.layout.layer_axes(config).items())
  for i, layer in enumerate(model.layers()):
    own = tuple(map(jnp.asarray, rotations[i * step : (i + 1) * step + 1]))
    turned = jitted_turn_parameters(structured.flatten(layer), own, axes=axes)
    layers.append(structured.unflatten(jax.device_get(turned)))
  ends = jnp.asarray(rotations[0]), jnp.asarray(rotations[-1])
  outer = jitted_turn_parameters(
    structured.flatten(model.outer()),
    ends,
    axes=tuple(models.layout.outer_axes(config).items()),
  )
  outer = structured.unflatten(jax.device_get(outer))
  return models.from_layers(config, outer, layers, model.buffers, model.stored_as)


jitted_turn_parameters = jax.jit(turn_parameters, static_argnames='axes')


def embed(rotation: Any, width: int) -> jax.Array:
  """A rotation of the first dimensions of a wider space."""
  d = rotation.shape[0]
  return jnp.eye(width, dtype=jnp.float32).at[:d, :d].set(rotation)
