r"""The gauges of attention heads: a change of basis within every head.

A gauge is a choice of coordinates that does not change the function of the model. Two
kernels share the h coordinates of a head, and they can change together:

    value, output:  W_v -> W_v A^-1,  W_o -> A W_o          A in GL(h)
    query, key:     W_q -> W_q A^T,   W_k -> W_k A^-1       A in GL(h), without RoPE

GL(h) is the group of invertible matrices `[h, h]`. RoPE rotates the first r coordinates
of a query or key in r/2 planes. There A must commute with RoPE, so it is a complex
factor for each plane. For the other coordinates A is in GL(h - r). All query heads that
read the same key-value head share its A.

To fix the gauge, one kernel of the pair is replaced by a basis of its column space, see
`structured.heads`. The kernel is this basis times a factor, and its partner is
multiplied by the factor. This saves h^2 numbers for each key-value head, or
(h - r)^2 + r with RoPE. No matrix is inverted that can be singular, so heads may have
any rank.

The basis replaces the output kernel in the first pair. In the second pair it replaces
the query kernel in the planes that RoPE rotates, and the key kernel elsewhere. The
query is the better choice for the planes, because it has more columns than the key, and
the basis makes the norms of these columns nearly equal.

Biases change with their kernels, with one exception. The bias of the key does not
change the output in coordinates that RoPE does not rotate, see `biases`; it becomes
zero there.

Shape letters are those of `models.config`; d is the width of the segment that a kernel
reads or writes, m = h - r, and G = H / K. G query heads that share a key-value head
form a group. Use `vmap` for several layers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.symmetries import transform

_matmul = functools.partial(jnp.matmul, precision='highest')


class Basis(NamedTuple):
  """A matrix `[n, h]` as a basis and a factor: `[I - B^H B / 4; B] @ factor`.

  Attributes:
    below: B, `[n - h, h]`.
    factor: `[h, h]`.
  """

  below: jax.Array
  factor: jax.Array


def basis(matrix: jax.Array) -> Basis:
  """Returns the basis of a matrix's column space that `structured.heads` describes.

  Let Q = [C; D] be an orthonormal basis of the column space. A polar decomposition
  makes C symmetric and positive semidefinite. Then `B = 2 D (I + C)^-1`.

  Args:
    matrix: float32 or complex64 `[n, h]`, n >= h, of any rank.

  Returns:
    The basis and the factor, in the matrix's dtype.
  """
  h = matrix.shape[1]
  q, r = jnp.linalg.qr(matrix)
  u, cosines, vh = jnp.linalg.svd(q[:h])
  inverse = _matmul(vh.conj().T / (1 + cosines), u.conj().T)
  factor = _matmul(u * (1 + cosines) / 2, _matmul(vh, r))
  return Basis(2 * _matmul(q[h:], inverse), factor)


def times(array: jax.Array, matrices: jax.Array) -> jax.Array:
  """Multiplies the heads of a kernel or bias from the right, in float32.

  Args:
    array: `[..., H h]`.
    matrices: float32 `[K, h, h]`; G consecutive heads share one.

  Returns:
    float32 `[..., H h]`.
  """
  groups, h, _ = matrices.shape
  heads = array.astype(jnp.float32).reshape(*array.shape[:-1], groups, -1, h)
  product = jnp.einsum('...kgi,kij->...kgj', heads, matrices, precision='highest')
  return product.reshape(array.shape)


def rotate_values(layer: models.Params, rotations: jax.Array) -> models.Params:
  """Rotates a layer's value heads: `W_v -> W_v Q`, `W_o -> Q^T W_o`.

  Args:
    layer: parameters of a layer; value and output must be arrays.
    rotations: Q, float32 `[K, h, h]`, orthogonal.

  Returns:
    The parameters in their old dtypes.
  """
  value, out = layer['attention']['value'], layer['attention']['out']
  kernel = times(out['kernel'].T, rotations).T.astype(out['kernel'].dtype)
  turned = {k: times(x, rotations).astype(x.dtype) for k, x in value.items()}
  attention = {'value': turned, 'out': out | {'kernel': kernel}}
  return layer | {'attention': layer['attention'] | attention}


def rotate_keys(layer: models.Params, rotations: jax.Array) -> models.Params:
  """Rotates a layer's queries and keys: `W_q -> W_q Q`, `W_k -> W_k Q`.

  Args:
    layer: parameters of a layer; query and key must be arrays.
    rotations: Q, float32 `[K, h, h]`, orthogonal. They must commute with RoPE, if the
      model has RoPE.

  Returns:
    The parameters in their old dtypes.
  """
  attention = dict(layer['attention'])
  for name in ('query', 'key'):
    attention[name] = {
      k: times(x, rotations).astype(x.dtype) for k, x in attention[name].items()
    }
  return layer | {'attention': attention}


def fix_values(pair: models.Params, *, kv_heads: int) -> models.Params:
  """Fixes the gauge between value and output.

  Args:
    pair: 'value' and 'out' of a layer's attention, without the output bias. The kernels
      are arrays, and W_o has at least h columns. A missing bias is zero.
    kv_heads: K.

  Returns:
    The pair in float32; W_o is a `structured.HeadRows`.
  """
  h = pair['value']['kernel'].shape[1] // kv_heads
  width = pair['out']['kernel'].shape[1]
  heads = _stacked_heads(pair['out']['kernel'].T, kv_heads, h)  # [K, G d, h]
  below, factors = jax.vmap(basis)(heads)
  # The first rows of the basis belong to the first head of a group.
  first, others = jnp.split(below, (width - h,), axis=1)
  others = jnp.swapaxes(others.reshape(kv_heads, -1, width, h), 2, 3)
  leaf = structured.HeadRows(
    jnp.swapaxes(first, 1, 2).reshape(kv_heads * h, width - h),
    structured.nonempty(others.reshape(-1, width)),
    groups=kv_heads,
  )
  moved = jnp.matrix_transpose(factors)
  return {
    'value': {k: times(x, moved) for k, x in pair['value'].items()},
    'out': {'kernel': leaf},
  }


def fix_keys(pair: models.Params, *, kv_heads: int, rotary: int) -> models.Params:
  """Fixes the gauge between query and key.

  Args:
    pair: 'query' and 'key' of a layer's attention. The kernels are arrays, and W_k has
      at least h - r rows. A missing bias is zero.
    kv_heads: K.
    rotary: r.

  Returns:
    The pair in float32. W_q is a `structured.HeadPlanes` if r > 0, and W_k is a
    `structured.HeadColumns` if r < h. The bias of the key is zero in the coordinates
    that RoPE does not rotate.
  """
  query, key = pair['query']['kernel'], pair['key']['kernel']
  d, h = key.shape[0], key.shape[1] // kv_heads
  # The same plane of all heads of a group is a complex matrix with one column.
  planes = _stacked_heads(query, kv_heads, h)[..., :rotary]  # [K, G d, r]
  real, imaginary = jnp.split(jnp.swapaxes(planes, 1, 2), 2, axis=1)
  below, scales = jax.vmap(jax.vmap(basis))(jax.lax.complex(real, imaginary)[..., None])
  below, scales = below[..., 0], scales[..., 0, 0]  # [K, r/2, G d - 1], [K, r/2]
  rest, factors = jax.vmap(basis)(_stacked_heads(key, kv_heads, h)[..., rotary:])
  moved = jax.vmap(_adjoint)(scales, factors)
  fixed: models.Params = {
    'query': {'kernel': times(query, moved)},
    'key': {'kernel': times(key, moved)},
  }
  if rotary:
    planes = jnp.concatenate([below.real, below.imag], axis=1)
    planes = jnp.pad(planes, ((0, 0), (0, 0), (1, 0)))  # the known row
    planes = planes.reshape(kv_heads, rotary, -1, d).transpose(3, 0, 2, 1)
    heads = fixed['query']['kernel'].reshape(d, kv_heads, -1, h)
    heads = heads.at[..., :rotary].set(planes)
    fixed['query']['kernel'] = structured.HeadPlanes(
      below=heads[1:].reshape(d - 1, -1),
      top=structured.nonempty(heads[0].reshape(kv_heads, -1)[:, rotary:]),
      groups=kv_heads,
      head_dim=h,
    )
  if rotary < h:
    turned = fixed['key']['kernel'].reshape(d, kv_heads, h)[..., :rotary]
    rest = jnp.swapaxes(rest, 0, 1)
    fixed['key']['kernel'] = structured.HeadColumns(
      turned=structured.nonempty(turned.reshape(d, kv_heads * rotary)),
      rest=rest.reshape(rest.shape[0], -1),
      heads=kv_heads,
    )
  if 'bias' in pair['query']:
    divided = jax.vmap(_adjoint)(1 / scales.conj(), factors)
    fixed['query']['bias'] = times(pair['query']['bias'], divided)
  if 'bias' in pair['key']:
    bias = times(pair['key']['bias'], moved).reshape(kv_heads, h)
    fixed['key']['bias'] = bias.at[:, rotary:].set(0).reshape(-1)
  return fixed


def _adjoint(scales: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns the matrix by which a kernel is multiplied from the right.

  It carries the factors of the partner's basis over to the kernel.

  Args:
    scales: the factors of the planes, complex64 `[r/2]`. The row (x, y) of a plane is
      multiplied by the conjugate factor.
    factor: the factor of the other coordinates, float32 `[m, m]`.

  Returns:
    float32 `[r + m, r + m]`.
  """
  real, imaginary = jnp.diag(scales.real), jnp.diag(scales.imag)
  planes = jnp.block([[real, -imaginary], [imaginary, real]])
  return jax.scipy.linalg.block_diag(planes, factor.T)


def _stacked_heads(kernel: jax.Array, kv_heads: int, h: int) -> jax.Array:
  """Reshapes a kernel `[d, H h]` to float32 `[K, G d, h]`: a group's heads stacked."""
  heads = kernel.astype(jnp.float32).reshape(kernel.shape[0], kv_heads, -1, h)
  return heads.transpose(1, 2, 0, 3).reshape(kv_heads, -1, h)


# ---- the error that rounding makes in a pair -----------------------------------------


def product_norm(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the Frobenius norm of the K matrices `left @ right^T` together.

  Args:
    left: float32 `[K, a, h]`.
    right: float32 `[K, b, h]`.

  Returns:
    float32 `[]`.
  """
  gram = lambda x: _matmul(jnp.matrix_transpose(x), x)
  return jnp.sqrt(jnp.maximum(jnp.sum(gram(left) * gram(right)), 0))


def product_error(
  left: jax.Array, right: jax.Array, near_left: jax.Array, near_right: jax.Array
) -> jax.Array:
  """Returns the Frobenius norm of `left @ right^T - near_left @ near_right^T`.

  The result is accurate even if `near_left` and `near_right` differ little from `left`
  and `right`. Shapes are those of `product_norm`.
  """
  return product_norm(
    jnp.concatenate([near_left - left, near_left], axis=2),
    jnp.concatenate([right, near_right - right], axis=2),
  )


def _sides(pair: models.Params, kv_heads: int) -> tuple[jax.Array, jax.Array]:
  """Returns both kernels as `[K, ..., h]`; only `left @ right^T` matters."""
  pair = structured.materialize(pair)
  if 'out' in pair:
    left, right = _with_bias(pair['value']), pair['out']['kernel'].T
    h = left.shape[1] // kv_heads
  else:
    left, right = _with_bias(pair['query']), _with_bias(pair['key'])
    h = right.shape[1] // kv_heads
  return _stacked_heads(left, kv_heads, h), _stacked_heads(right, kv_heads, h)


def _with_bias(params: models.Params) -> jax.Array:
  """Returns a kernel with its bias as one more row."""
  if 'bias' not in params:
    return params['kernel']
  return jnp.concatenate([params['kernel'], params['bias'][None]])


# ---- a whole model -------------------------------------------------------------------


def remove_value_gauge(*, tolerance: float | None = None) -> transform.Transform:
  """Makes the transform that fixes the gauge between value and output of every layer.

  Args:
    tolerance: the factor by which the rounding error of the product of the two kernels
      may grow. A layer whose error grows more is not changed. By default it is 3 in
      models whose residual stream is rotated, because there the other parameters make
      most of the error. In other models heads make all of it, and the factor is 1.

  Returns:
    A transform. Its notes give, for each layer, the form of the output kernel, the
    count of numbers, and the rounding error of the product of the two kernels, in this
    form and as plain arrays.
  """
  return transform.make(
    'value gauge',
    layers=functools.partial(_remove, names=('value', 'out'), tolerance=tolerance),
  )


def remove_query_key_gauge(*, tolerance: float | None = None) -> transform.Transform:
  """Makes the transform that fixes the gauge between query and key of every layer.

  Args:
    tolerance: see `remove_value_gauge`.

  Returns:
    A transform. Its notes give the form of the query and key kernels of each layer, and
    the same figures as those of `remove_value_gauge`.
  """
  return transform.make(
    'query-key gauge',
    layers=functools.partial(_remove, names=('query', 'key'), tolerance=tolerance),
  )


def _remove(
  context: transform.Context,
  state: Any,
  first: int,
  layers: transform.Layers,
  *,
  names: tuple[str, str],
  tolerance: float | None,
) -> tuple[Any, transform.Layers, list[list[transform.Note]]]:
  config, valid = context.config, models.layout.symmetries(context.config)
  notes: list[list[transform.Note]] = [[] for _ in layers]
  if not (valid.values if names[0] == 'value' else valid.queries):
    return state, layers, notes
  if tolerance is None:
    tolerance = 3.0 if valid.segments or valid.stream else 1.0
  pairs = [_plain_pair(layer['attention'], names, config.head_dim) for layer in layers]
  found = [i for i, pair in enumerate(pairs) if pair]
  results = context.map_layers(
    _fix_layer,
    [(pairs[i], jnp.float32(tolerance)) for i in found],
    kv_heads=config.num_kv_heads,
    rotary=config.rotary_dim,
    dtype=context.dtype,
  )
  rewritten = list(layers)
  for i, fixed in zip(found, results, strict=True):
    plain_error, error = float(fixed.plain_error), float(fixed.error)
    if not np.isfinite(plain_error):
      continue
    accepted = bool(fixed.accepted)
    if accepted:
      rewritten[i] = _with_pair(layers[i], fixed.pair)
    for name in names:
      if structured.is_structured(fixed.pair[name]['kernel']):
        leaf = rewritten[i]['attention'][name]['kernel']
        path = f'{models.names.layer(first + i)}/attention/{name}/kernel'
        details = {'plain_error': transform.three_digits(plain_error)}
        note = transform.note(path, leaf, error=error if accepted else 0.0)
        notes[i].append(note | details)
  return state, rewritten, notes


def _plain_pair(
  attention: models.Params, names: tuple[str, str], h: int
) -> models.Params | None:
  """Returns the pair of a layer for `fix_values` or `fix_keys`.

  The result is None if a parameter is not a plain array, or if a kernel is too small.
  """
  pair: models.Params = {}
  for name in names:
    pair[name] = dict(attention[name])
    bias = pair[name].get('bias')
    if name == 'out' or (isinstance(bias, structured.Constant) and not bias.value):
      pair[name].pop('bias', None)
  leaves = jax.tree.leaves(pair, is_leaf=structured.is_structured)
  if not all(map(structured.is_plain, leaves)):
    return None
  return pair if min(pair[names[1]]['kernel'].shape) >= h else None


def _with_pair(layer: models.Params, pair: models.Params) -> models.Params:
  """Returns a layer with the pair's parameters, converted to the layer's dtypes."""
  attention = dict(layer['attention'])
  for name, params in pair.items():
    attention[name] = attention[name] | {
      k: structured.astype(x, attention[name][k].dtype) for k, x in params.items()
    }
  return layer | {'attention': attention}


class _Fixed(NamedTuple):
  """A pair with its gauge fixed, and the error of rounding it.

  Attributes:
    pair: the pair in float32.
    error: error that rounding the pair makes in the product of the two kernels,
      relative to the product, in the Frobenius norm.
    plain_error: the same error for the pair before its gauge was fixed.
    accepted: bool, whether `error` is small enough.
  """

  pair: models.Params
  error: jax.Array
  plain_error: jax.Array
  accepted: jax.Array


def _fix_layer(
  pair: models.Params, tolerance: jax.Array, *, kv_heads: int, rotary: int, dtype: Any
) -> _Fixed:
  if 'key' in pair:
    fixed = fix_keys(pair, kv_heads=kv_heads, rotary=rotary)
  else:
    fixed = fix_values(pair, kv_heads=kv_heads)
  rounded = structured.astype(structured.astype(fixed, dtype), jnp.float32)
  error = product_error(*_sides(fixed, kv_heads), *_sides(rounded, kv_heads))
  # The numbers of a checkpoint have no rounding error, because they are rounded
  # already. A multiple of them has the usual error.
  left, right = _sides(pair, kv_heads)
  left, right = left * _SQRT2, right / _SQRT2
  near = (x.astype(dtype).astype(jnp.float32) for x in (left, right))
  plain_error = product_error(left, right, *near)
  norm = jnp.maximum(product_norm(left, right), jnp.finfo(jnp.float32).tiny)
  # If rounding makes a number infinite, the error is infinite or NaN, and the
  # comparison is false.
  accepted = error <= tolerance * plain_error
  return _Fixed(fixed, error / norm, plain_error / norm, accepted)


_SQRT2 = 2**0.5
