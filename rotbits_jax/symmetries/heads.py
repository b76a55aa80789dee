r"""The gauges of attention heads: a change of basis within every head.

Heads read and write their h numbers by pairs of kernels that may change together,

    value, output:  W_v -> W_v A^-1,  W_o -> A W_o          A in GL(h)
    query, key:     W_q -> W_q A^T,   W_k -> W_k A^-1       A in GL(h), without RoPE

RoPE turns the first r numbers of a query or key in r/2 planes and leaves only what
commutes with it: a complex factor a plane, and GL(h - r) for the other numbers. Query
heads that read one key-value head share its A.

One kernel of each pair becomes the basis of its own column space that
`structured.heads` describes, and its partner is multiplied by what that basis leaves
out. That takes h^2 numbers fewer a key-value head, or (h - r)^2 + r with RoPE. It is
the output's kernel; the query's in planes that RoPE turns, since the query has the more
columns, whose norms become equal; and else the key's. No kernel is divided by anything,
so that heads may have any rank.

Biases follow their kernels, but for the key's where RoPE does not turn it: there it
does not change the output, see `biases`, and is left out.

Shape letters are those of `models.config`; d is the width of the segment that a kernel
reads or writes, m = h - r, and G = H / K. `vmap` the functions over layers.
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
  """`matrix = [I - B^H B / 4; B] @ factor`."""

  below: jax.Array  # [n - h, h], B
  factor: jax.Array  # [h, h]


def basis(matrix: jax.Array) -> Basis:
  """The basis of a column space that `structured.heads` describes.

  With orthonormal columns Q = [C; D] of which C is symmetric and positive semidefinite,
  by a polar decomposition, `B = 2 D (I + C)^-1`.

  Args:
    matrix: float32 or complex64 `[n, h]`, n >= h; of any rank.

  Returns:
    The basis and the factor, of the matrix's dtype.
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
    matrices: float32 `[K, h, h]`; G heads in a row share one.

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
    layer: parameters of a layer; those of value and output are arrays.
    rotations: float32 `[K, h, h]`, orthogonal.

  Returns:
    The parameters, in the dtypes they had.
  """
  value, out = layer['attention']['value'], layer['attention']['out']
  kernel = times(out['kernel'].T, rotations).T.astype(out['kernel'].dtype)
  turned = {k: times(x, rotations).astype(x.dtype) for k, x in value.items()}
  attention = {'value': turned, 'out': out | {'kernel': kernel}}
  return layer | {'attention': layer['attention'] | attention}


def rotate_keys(layer: models.Params, rotations: jax.Array) -> models.Params:
  """Rotates a layer's queries and keys: `W_q -> W_q Q`, `W_k -> W_k Q`.

  Args:
    layer: parameters of a layer; those of query and key are arrays.
    rotations: float32 `[K, h, h]`, orthogonal; they commute with RoPE if there is any.

  Returns:
    The parameters, in the dtypes they had.
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
    pair: 'value' and 'out' of a layer's attention, without the output's bias. The
      kernels are arrays, W_o with at least h columns; a bias that is missing is zero.
    kv_heads: K.

  Returns:
    The pair in float32, with `structured.HeadRows` for W_o.
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
    pair: 'query' and 'key' of a layer's attention. The kernels are arrays, W_k with at
      least h - r rows; a bias that is missing is zero.
    kv_heads: K.
    rotary: r.

  Returns:
    The pair in float32. W_q is a `structured.HeadPlanes` if RoPE turns anything, W_k a
    `structured.HeadColumns` if it does not turn all. The key's bias is zero in
    dimensions that it does not turn.
  """
  query, key = pair['query']['kernel'], pair['key']['kernel']
  d, h = key.shape[0], key.shape[1] // kv_heads
  # The same plane of a group's heads is a complex matrix of one column.
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
  """What one side of a pair is multiplied by if the other's basis leaves this out.

  Args:
    scales: complex64 `[r/2]`. A plane's row (x, y) is multiplied by the conjugate.
    factor: float32 `[m, m]`.

  Returns:
    float32 `[r + m, r + m]`.
  """
  real, imaginary = jnp.diag(scales.real), jnp.diag(scales.imag)
  planes = jnp.block([[real, -imaginary], [imaginary, real]])
  return jax.scipy.linalg.block_diag(planes, factor.T)


def _stacked_heads(kernel: jax.Array, kv_heads: int, h: int) -> jax.Array:
  """A kernel `[d, H h]` as float32 `[K, G d, h]`: the heads of a group stacked."""
  heads = kernel.astype(jnp.float32).reshape(kernel.shape[0], kv_heads, -1, h)
  return heads.transpose(1, 2, 0, 3).reshape(kv_heads, -1, h)


# ---- what rounding does to a pair ----------------------------------------------------


def product_norm(left: jax.Array, right: jax.Array) -> jax.Array:
  """Frobenius norm of the K matrices `left @ right^T` together.

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
  """Frobenius norm of the K matrices `left @ right^T - near_left @ near_right^T`.

  It loses no digits where the factors are near. Shapes are those of `product_norm`.
  """
  return product_norm(
    jnp.concatenate([near_left - left, near_left], axis=2),
    jnp.concatenate([right, near_right - right], axis=2),
  )


def _sides(pair: models.Params, kv_heads: int) -> tuple[jax.Array, jax.Array]:
  """Both kernels as `[K, ..., h]`, so that what matters is `left @ right^T`."""
  pair = structured.materialize(pair)
  if 'out' in pair:
    left, right = _with_bias(pair['value']), pair['out']['kernel'].T
    h = left.shape[1] // kv_heads
  else:
    left, right = _with_bias(pair['query']), _with_bias(pair['key'])
    h = right.shape[1] // kv_heads
  return _stacked_heads(left, kv_heads, h), _stacked_heads(right, kv_heads, h)


def _with_bias(params: models.Params) -> jax.Array:
  """A kernel with its bias as one more row."""
  if 'bias' not in params:
    return params['kernel']
  return jnp.concatenate([params['kernel'], params['bias'][None]])


# ---- a whole model -------------------------------------------------------------------


def remove_value_gauge(*, tolerance: float = 3.0) -> transform.Transform:
  """The transform that fixes the gauge between value and output of every layer.

  Args:
    tolerance: how many times the error that rounding makes in the product of the
      kernels may grow; a layer where it grows more stays as it is.

  Returns:
    A transform. Its notes tell for each layer what form the output projection took, the
    numbers it stores, and the error that rounding makes in the product of the kernels,
    in this form and in a plain one.
  """
  return transform.make(
    'value gauge',
    layers=functools.partial(_remove, names=('value', 'out'), tolerance=tolerance),
  )


def remove_query_key_gauge(*, tolerance: float = 3.0) -> transform.Transform:
  """The transform that fixes the gauge between query and key of every layer.

  Args:
    tolerance: see `remove_value_gauge`.

  Returns:
    A transform. Its notes tell for each layer what form query and key took, and further
    what those of `remove_value_gauge` do.
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
  tolerance: float,
) -> tuple[Any, transform.Layers, list[list[transform.Note]]]:
  config, valid = context.config, models.layout.symmetries(context.config)
  notes: list[list[transform.Note]] = [[] for _ in layers]
  if not (valid.values if names[0] == 'value' else valid.queries):
    return state, layers, notes
  pairs = [_plain_pair(layer['attention'], names, config.head_dim) for layer in layers]
  found = [i for i, pair in enumerate(pairs) if pair is not None]
  results = context.map_layers(
    _fix_layer,
    [(pairs[i], jnp.float32(tolerance)) for i in found],
    kv_heads=config.num_kv_heads,
    rotary=config.rotary_dim,
    form=context.form,
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
        path = f'layers.{first + i}/attention/{name}/kernel'
        details = {'plain_error': transform.three_digits(plain_error)}
        note = transform.note(path, leaf, error=error if accepted else 0.0)
        notes[i].append(note | details)
  return state, rewritten, notes


def _plain_pair(
  attention: models.Params, names: tuple[str, str], h: int
) -> models.Params | None:
  """What the functions above take of a layer; None where they cannot."""
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
  """A layer with these parameters, in the dtypes that it has."""
  attention = dict(layer['attention'])
  for name, params in pair.items():
    attention[name] = attention[name] | {
      k: structured.astype(x, attention[name][k].dtype) for k, x in params.items()
    }
  return layer | {'attention': attention}


class _Fixed(NamedTuple):
  """A pair whose gauge is fixed, and what rounding does to the product (Frobenius)."""

  pair: models.Params
  error: jax.Array  # relative to the product
  plain_error: jax.Array  # the same in the gauge that the pair had
  accepted: jax.Array  # bool


def _fix_layer(
  pair: models.Params, tolerance: jax.Array, *, kv_heads: int, rotary: int, form: Any
) -> _Fixed:
  if 'key' in pair:
    fixed = fix_keys(pair, kv_heads=kv_heads, rotary=rotary)
  else:
    fixed = fix_values(pair, kv_heads=kv_heads)
  rounded = structured.astype(structured.astype(fixed, form), jnp.float32)
  error = product_error(*_sides(fixed, kv_heads), *_sides(rounded, kv_heads))
  # The numbers may be representable as they are; their multiples are not.
  left, right = _sides(pair, kv_heads)
  left, right = left * _SQRT2, right / _SQRT2
  near = (x.astype(form).astype(jnp.float32) for x in (left, right))
  plain_error = product_error(left, right, *near)
  norm = jnp.maximum(product_norm(left, right), jnp.finfo(jnp.float32).tiny)
  # Numbers that rounding makes infinite make the error so, or NaN.
  accepted = error <= tolerance * plain_error
  return _Fixed(fixed, error / norm, plain_error / norm, accepted)


_SQRT2 = 2**0.5
