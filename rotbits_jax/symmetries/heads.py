r"""The gauges of attention heads: a change of basis within every head.

Two kernels share the h coordinates of a head, and they can change together:

    value, output:  W_v -> W_v A,  W_o -> A^-1 W_o          A in GL(h)
    query, key:     W_q -> W_q A,  W_k -> W_k A^-T          A in GL(m), m = h - r

GL(h) is the group of invertible matrices `[h, h]`. RoPE rotates the first r coordinates
of a query or key, on which A is the identity. All query heads that read the same
key-value head share its A.

To fix the gauge, the output kernel (transposed) or the key kernel is replaced by a
basis of its column space, see `structured.heads`, and its partner is multiplied by A.
No matrix is inverted that can be singular, so heads may have any rank. Biases change
with their kernels. Those of keys and values are redundant, see `docs/mathematics.md`.

Shape letters are those of `models.config`; d is the width of the segment that a kernel
reads or writes, and G = H / K. G query heads that share a key-value head form a group.
`kv_heads` is K. Results are float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rotbits_jax import models
from rotbits_jax import structured

_matmul = functools.partial(jnp.matmul, precision='highest')

VALUE, OUT = 'attention/value/kernel', 'attention/out/kernel'
QUERY, KEY = 'attention/query/kernel', 'attention/key/kernel'
VALUE_BIAS, OUT_BIAS = 'attention/value/bias', 'attention/out/bias'
QUERY_BIAS, KEY_BIAS = 'attention/query/bias', 'attention/key/bias'

VALUES = (VALUE, VALUE_BIAS, OUT)
"""The parameters that share the gauge of values; the bias may be missing."""

KEYS = (QUERY, QUERY_BIAS, KEY, KEY_BIAS)
"""The parameters that share the gauge of keys; the biases may be missing."""


def basis(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Splits a matrix: returns B `[n - h, h]` and a factor `[h, h]`.

  The matrix, float32 `[n, h]`, n >= h, of any rank, is `[I - B^T B / 4; B] @ factor`,
  see `structured.heads`. Let Q = [C; D] be an orthonormal basis of its column space. A
  polar decomposition makes C symmetric and positive semidefinite, `B = 2 D (I + C)^-1`.

  >>> float(abs(basis(jnp.array([[0.0], [1.0]]))[0][0, 0]))
  2.0
  """
  if matrix.ndim != 2 or matrix.shape[0] < matrix.shape[1]:
    raise ValueError(f'the matrix must be [n, h] with n >= h, got {matrix.shape=}')
  h = matrix.shape[1]
  q, r = jnp.linalg.qr(matrix)
  u, cosines, vt = jnp.linalg.svd(q[:h])
  inverse = _matmul(vt.T / (1 + cosines), u.T)
  factor = _matmul(u * (1 + cosines) / 2, _matmul(vt, r))
  return 2 * _matmul(q[h:], inverse), factor


def fix_low_rank(u: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Fixes the gauge GL(r) of two factors: returns B `[m - r, r]` and V `[r, n]`.

  The factors are u `[m, r]`, r <= m, and v `[r, n]`; a ValueError for other shapes.

  Then `u @ v = [I - B^T B / 4; B] @ V`, with r^2 elements fewer. The product may have a
  lower rank than r. Compression by a singular value decomposition makes such factors.

  >>> u = jax.random.normal(jax.random.key(0), (32, 16))
  >>> [x.shape for x in fix_low_rank(u, u.T)]
  [(16, 16), (16, 32)]

  Reference: Zhao et al., PIFA, arXiv 2501.19090, section 3: the redundant elements.
  """
  if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[0]:
    raise ValueError(f'factors must be [m, r] and [r, n], got {u.shape=}, {v.shape=}')
  below, factor = basis(u.astype(jnp.float32))
  return below, _matmul(factor, v.astype(jnp.float32))


def with_value_bias(
  out_bias: jax.Array, value_bias: jax.Array, kernel: jax.Array, *, kv_heads: int
) -> jax.Array:
  """Returns the output bias that includes the value bias: `b_o + b_v W_o`.

  Args:
    out_bias: b_o, `[d]`.
    value_bias: `[K h]`; b_v repeats each of its heads for the G query heads of a group.
    kernel: W_o, `[H h, d]`.
    kv_heads: K.

  Returns:
    The bias, float32 `[d]`.

  Raises:
    ValueError: if the shapes do not fit.
  """
  is_valid = (
    out_bias.ndim == value_bias.ndim == 1
    and kernel.shape[1:] == out_bias.shape
    and value_bias.size % kv_heads == 0
    and kernel.shape[0] % value_bias.size == 0
  )
  if not is_valid:
    raise ValueError(
      f'expected biases [d] and [K h], and a kernel [H h, d], got {out_bias.shape=}, '
      f'{value_bias.shape=}, {kernel.shape=}, {kv_heads=}'
    )
  # H / K consecutive query heads read the same value head.
  groups = kernel.shape[0] // value_bias.shape[0]
  heads = value_bias.astype(jnp.float32).reshape(kv_heads, -1)
  repeated = jnp.repeat(heads, groups, axis=0).reshape(-1)
  return out_bias.astype(jnp.float32) + _matmul(repeated, kernel.astype(jnp.float32))


def rotate_heads(params: models.Params, rotations: jax.Array) -> models.Params:
  """Rotates heads: `W_v Q` and `Q^T W_o`; or `W_q Q` and `W_k Q`, in their old dtypes.

  The parameters are `VALUES` or `KEYS`; Q is float32 `[K, h, h]`. For keys, it must be
  the identity on the coordinates that RoPE rotates.
  """

  def rotate(path: str, x: jax.Array) -> jax.Array:
    if path == OUT:
      return _multiply(x.T, rotations).T.astype(x.dtype)
    return _multiply(x, rotations).astype(x.dtype)

  return {path: rotate(path, x) for path, x in params.items()}


def fix_values(
  params: models.Params, *, kv_heads: int
) -> tuple[models.Params, jax.Array]:
  """Fixes the gauge between value and output; W_o becomes a `structured.HeadBases`.

  The parameters are `VALUES`: arrays, and W_o has at least h columns. It also returns
  A, `[K, h, h]`.

  >>> params = {VALUE: jnp.eye(2), OUT: jnp.arange(8.0).reshape(2, 4)}
  >>> fixed, _ = fix_values(params, kv_heads=1)
  >>> structured.count_elements(params), structured.count_elements(fixed)
  (12, 8)
  >>> product = fixed[VALUE] @ fixed[OUT].materialize()
  >>> bool(jnp.allclose(product, params[VALUE] @ params[OUT], atol=1e-5))
  True
  """
  _check_heads(params, kv_heads)
  h = params[VALUE].shape[1] // kv_heads
  heads = _stacked_heads(params[OUT].T, kv_heads, h)  # [K, G d, h]
  below, factors = jax.vmap(basis)(heads)
  gauge = jnp.matrix_transpose(factors)
  fixed: models.Params = {
    path: _multiply(x, gauge) for path, x in params.items() if path != OUT
  }
  fixed[OUT] = structured.HeadBases(
    jnp.swapaxes(below, 0, 1).reshape(-1, kv_heads * h),
    None,
    heads=kv_heads,
    group=params[OUT].shape[0] // (kv_heads * h),
  )
  return fixed, gauge


def fix_keys(
  params: models.Params, *, kv_heads: int, rotary: int
) -> tuple[models.Params, jax.Array]:
  """Fixes the gauge between query and key in the coordinates that RoPE does not rotate.

  W_k becomes a `structured.HeadBases`; its bias is zero in these coordinates. The
  parameters are `KEYS`: arrays, and W_k has at least m rows. `rotary` is r < h. It also
  returns A, `[K, m, m]`.
  """
  _check_heads(params, kv_heads)
  d = params[KEY].shape[0]
  h = params[KEY].shape[1] // kv_heads
  heads = _stacked_heads(params[KEY], kv_heads, h)
  below, factors = jax.vmap(basis)(heads[..., rotary:])
  gauge = jnp.matrix_transpose(factors)
  kept = jnp.eye(rotary, dtype=jnp.float32)
  whole = jax.vmap(lambda a: jax.scipy.linalg.block_diag(kept, a))(gauge)
  queries = [path for path in (QUERY, QUERY_BIAS) if path in params]
  fixed: models.Params = {path: _multiply(params[path], whole) for path in queries}
  columns = params[KEY].astype(jnp.float32).reshape(d, kv_heads, h)[..., :rotary]
  fixed[KEY] = structured.HeadBases(
    jnp.swapaxes(below, 0, 1).reshape(d - h + rotary, kv_heads * (h - rotary)),
    columns.reshape(d, -1) if rotary else None,
    heads=kv_heads,
  )
  if KEY_BIAS in params:
    bias = params[KEY_BIAS].astype(jnp.float32).reshape(kv_heads, h)
    fixed[KEY_BIAS] = bias.at[:, rotary:].set(0).reshape(-1)
  return fixed, gauge


def _check_heads(params: models.Params, kv_heads: int) -> None:
  """Raises a ValueError if the head axes of parameters cannot be divided into K."""
  for path, x in params.items():
    size = x.shape[0] if path == OUT else x.shape[-1]
    if size % kv_heads:
      raise ValueError(f'{path} must have {kv_heads=} heads, got {x.shape=}')


def _multiply(array: jax.Array, matrices: jax.Array) -> jax.Array:
  """Multiplies heads `[..., H h]` by matrices `[K, h, h]`; G heads share one."""
  groups, h, _ = matrices.shape
  heads = array.astype(jnp.float32).reshape(*array.shape[:-1], groups, -1, h)
  product = jnp.einsum('...kgi,kij->...kgj', heads, matrices, precision='highest')
  return product.reshape(array.shape)


def _stacked_heads(kernel: jax.Array, kv_heads: int, h: int) -> jax.Array:
  """Reshapes a kernel `[d, H h]` to float32 `[K, G d, h]`: a group's heads stacked."""
  heads = kernel.astype(jnp.float32).reshape(kernel.shape[0], kv_heads, -1, h)
  return heads.transpose(1, 2, 0, 3).reshape(kv_heads, -1, h)


# ---- the errors of products --------------------------------------------------------

Sides = tuple[jax.Array, jax.Array]
"""float32 `[K, a, h]` and `[K, b, h]`, of K products `left @ right^T`."""


def _sides(params: models.Params, kv_heads: int) -> Sides:
  """Returns the two kernels of a pair, `VALUES` or `KEYS`. Biases are further rows."""
  params = structured.materialize(params)

  def with_bias(*paths: str) -> jax.Array:
    rows = [jnp.atleast_2d(params[path]) for path in paths if path in params]
    return jnp.concatenate(rows)

  if OUT in params:
    left = with_bias(VALUE, VALUE_BIAS)
    right = params[OUT].T
  else:
    left = with_bias(QUERY, QUERY_BIAS)
    right = with_bias(KEY, KEY_BIAS)
  h = min(left.shape[1], right.shape[1]) // kv_heads
  return _stacked_heads(left, kv_heads, h), _stacked_heads(right, kv_heads, h)


def rounding_errors(
  pair: models.Params, fixed: models.Params, kv_heads: int, dtype: Any
) -> dict[str, jax.Array]:
  """Returns the relative errors in the Frobenius norm that rounding makes in products.

  Args:
    pair: `VALUES` or `KEYS`, before their gauge is fixed.
    fixed: the same with their gauge fixed.
    kv_heads: K.
    dtype: the dtype to which they are rounded.

  Returns:
    'plain_error', that of plain kernels, and 'error', that of the fixed ones.
  """

  def round_off(x: Any) -> Any:
    return structured.astype(structured.astype(x, dtype), jnp.float32)

  # The weights of a checkpoint have no rounding error, because they are rounded
  # already. A multiple of them has the usual error.
  left, right = _sides(pair, kv_heads)
  scaled = left * 2**0.5, right / 2**0.5
  exact = _sides(fixed, kv_heads)
  rounded = _sides(round_off(fixed), kv_heads)
  plain_error = _relative_error(scaled, round_off(scaled))
  return {'plain_error': plain_error, 'error': _relative_error(exact, rounded)}


def _relative_error(exact: Sides, near: Sides) -> jax.Array:
  """Returns the error of all products, accurately even if the sides differ little."""
  left, right = exact
  near_left, near_right = near
  off = _product_norm(
    jnp.concatenate([near_left - left, near_left], axis=2),
    jnp.concatenate([right, near_right - right], axis=2),
  )
  return off / jnp.maximum(_product_norm(left, right), jnp.finfo(jnp.float32).tiny)


def _product_norm(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the Frobenius norm of `left @ right^T` over all heads."""
  gram = lambda x: _matmul(jnp.matrix_transpose(x), x)
  return jnp.sqrt(jnp.maximum(jnp.sum(gram(left) * gram(right)), 0))
