r"""Rotations of the residual stream: the same function in other coordinates.

    x_0 = embed[tokens],   x_{s+1} = x_s M_s + sublayer_s(RMSN(x_s)),   s = 0 .. S-1

For orthogonal R_s the map x_s -> x_s R_s changes no output if what writes a segment is
multiplied by R_s and what reads it by R_s^T; a shortcut becomes R_s^T M_s R_{s+1}.

Shape letters: d the width of a segment, N layers of a block.

Reference: SliceGPT, arXiv 2401.15024, section 3.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured

Rotations = list[np.ndarray]  # float32 [d, d], one a segment

KEPT = (
  structured.IdentityMinusGram,
  structured.SymmetricTriangle,
  structured.FactorPair,
)

_matmul = functools.partial(jnp.matmul, precision='highest')


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


def turn_shortcut(kernel: Any, rows: jax.Array, columns: jax.Array) -> Any:
  """`rows^T @ kernel @ columns`; a symmetric leaf stays one.

  Args:
    kernel: a shortcut, `[d, e]`. A leaf stands for `[P, 0]`, with P symmetric.
    rows: float32 `[d, d]`.
    columns: float32 `[e, e]`; where the kernel is a leaf, `rows` and a rotation of the
      other dimensions, side by side.

  Returns:
    The shortcut in the dtype it had.
  """
  if isinstance(kernel, structured.IdentityMinusGram):
    b, c = (lower(turn(x, rows=rows)) for x in (kernel.b, kernel.c))
    return dataclasses.replace(kernel, b=b, c=c)
  if isinstance(kernel, structured.SymmetricTriangle):
    whole = dataclasses.replace(kernel, columns=kernel.shape[0]).materialize()
    turned = jnp.tril(turn(whole, rows=rows, columns=rows))
    return dataclasses.replace(kernel, lower=turned)
  return turn(kernel, rows=rows, columns=columns)


def lower(factor: jax.Array) -> jax.Array:
  """The lower trapezoidal B `[d, k]` with the same `B B^T` as a factor `[d, k]`."""
  # Reduced QR of B^T: its R is upper trapezoidal.
  r = jnp.linalg.qr(factor.T.astype(jnp.float32), mode='r')
  padding = ((0, 0), (0, factor.shape[1] - r.shape[0]))
  return jnp.tril(jnp.pad(r.T, padding)).astype(factor.dtype)


def rotate_layer(
  layer: models.Params, rotations: tuple[jax.Array, ...]
) -> models.Params:
  """Rotates the segments that one layer touches.

  Args:
    layer: parameters of a layer; arrays, but for symmetric shortcuts.
    rotations: float32 `[d, d]` for each of its segments: the input, the one between
      attention and MLP unless blocks are parallel, and the output.

  Returns:
    The parameters, in the dtypes they had.
  """
  ends = models.ends(rotations)
  turned = models.map_sublayers(
    layer,
    read=lambda name, linear: (
      linear | {'kernel': turn(linear['kernel'], rows=ends[name][0])}
    ),
    write=lambda name, linear: {
      key: turn(value, columns=ends[name][1]) for key, value in linear.items()
    },
  )
  for name, (read, written) in ends.items():
    if f'{name}_shortcut' in layer:
      kernel = turn_shortcut(layer[f'{name}_shortcut']['kernel'], read, written)
      turned[f'{name}_shortcut'] = {'kernel': kernel}
  return layer | turned


def rotate_outer(
  outer: models.Params, first: jax.Array, last: jax.Array
) -> models.Params:
  """Rotates the embeddings into the first segment and the head out of the last."""
  head = outer['head']
  return outer | {
    'embed': {k: turn(table, columns=first) for k, table in outer['embed'].items()},
    'head': head | {'kernel': turn(head['kernel'], rows=last)},
  }


def rotate(model: models.Model, rotations: Rotations) -> models.Model:
  """Rotates every residual segment of a model.

  Args:
    model: the model; structured leaves are materialized, but for pairs of factors, and
      for symmetric shortcuts, which ask something of the rotations, see
      `turn_shortcut`.
    rotations: R_s, float32 `[d_s, d_s]`, one a segment. Without shortcuts, in a dense
      model, all are one, and its norms have no scales.

  Returns:
    A model of the same function, rounded to the dtypes it had, with NumPy arrays.
  """
  params = model.materialize(but=KEPT).params
  step, layer = model.config.segments_per_layer, 0
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
  outer = {k: v for k, v in params.items() if not k.startswith('blocks_')}
  outer = jax.device_get(_rotate_outer(outer, rotations[0], rotations[-1]))
  return dataclasses.replace(model, params=params | outer)


_rotate_layers = jax.jit(jax.vmap(rotate_layer))
_rotate_outer = jax.jit(rotate_outer)


def embed(rotation: Any, width: int) -> np.ndarray:
  """A rotation of the first dimensions of a wider space."""
  d = rotation.shape[0]
  embedded = np.eye(width, dtype=np.float32)
  embedded[:d, :d] = rotation
  return embedded
