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

import chex
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
  chex.assert_rank(matrix, 2)
  h = matrix.shape[1]
  q, r = jnp.linalg.qr(matrix)
  u, cosines, vt = jnp.linalg.svd(q[:h])
  inverse = _matmul(vt.T / (1 + cosines), u.T)
  factor = _matmul(u * (1 + cosines) / 2, _matmul(vt, r))
  return 2 * _matmul(q[h:], inverse), factor


def fix_low_rank(
  u: jax.Array,  # [m, r], r <= m
  v: jax.Array,  # [r, n]
) -> tuple[jax.Array, jax.Array]:
  """Fixes the gauge GL(r) of two factors: returns B `[m - r, r]` and V `[r, n]`.

  Then `u @ v = [I - B^T B / 4; B] @ V`, with r^2 elements fewer. The product may have a
  lower rank than r. Compression by a singular value decomposition makes such factors.

  >>> u = jax.random.normal(jax.random.key(0), (32, 16))
  >>> [x.shape for x in fix_low_rank(u, u.T)]
  [(16, 16), (16, 32)]

  Reference: Zhao et al., PIFA, arXiv 2501.19090, section 3: the redundant elements.
  """
  chex.assert_shape(v, (u.shape[1], None))
  below, factor = basis(u.astype(jnp.float32))
  return below, _matmul(factor, v.astype(jnp.float32))


def with_value_bias(
  out_bias: jax.Array,  # [d]
  value_bias: jax.Array,  # [K h]
  kernel: jax.Array,  # W_o, [H h, d]
  *,
  kv_heads: int,
) -> jax.Array:
  """Returns the output bias that includes the value bias: `b_o + b_v W_o`, `[d]`."""
  chex.assert_shape([value_bias, kernel], [(None,), (None, len(out_bias))])
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
    product = _multiply(x.T, rotations).T if path == OUT else _multiply(x, rotations)
    return product.astype(x.dtype)

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
  d, h = params[KEY].shape[0], params[KEY].shape[1] // kv_heads
  heads = _stacked_heads(params[KEY], kv_heads, h)
  below, factors = jax.vmap(basis)(heads[..., rotary:])
  gauge, kept = jnp.matrix_transpose(factors), jnp.eye(rotary, dtype=jnp.float32)
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
  with_bias = lambda *paths: jnp.concatenate(
    [jnp.atleast_2d(params[path]) for path in paths if path in params]
  )
  if OUT in params:
    left, right = with_bias(VALUE, VALUE_BIAS), params[OUT].T
  else:
    left, right = with_bias(QUERY, QUERY_BIAS), with_bias(KEY, KEY_BIAS)
  h = min(left.shape[1], right.shape[1]) // kv_heads
  return _stacked_heads(left, kv_heads, h), _stacked_heads(right, kv_heads, h)


def rounding_errors(
  pair: models.Params,  # `VALUES` or `KEYS`, before their gauge is fixed
  fixed: models.Params,  # the same with their gauge fixed
  kv_heads: int,
  dtype: Any,
) -> dict[str, jax.Array]:
  """Returns the relative errors in the Frobenius norm that rounding makes in products.

  'plain_error' is that of plain kernels, and 'error' that of the fixed ones.
  """
  round_off = lambda x: structured.astype(structured.astype(x, dtype), jnp.float32)
  # The weights of a checkpoint have no rounding error, because they are rounded
  # already. A multiple of them has the usual error.
  left, right = _sides(pair, kv_heads)
  scaled = left * 2**0.5, right / 2**0.5
  exact, rounded = (_sides(x, kv_heads) for x in (fixed, round_off(fixed)))
  plain_error = _relative_error(scaled, round_off(scaled))
  return {'plain_error': plain_error, 'error': _relative_error(exact, rounded)}


def _relative_error(exact: Sides, near: Sides) -> jax.Array:
  """Returns the error of all products, accurately even if the sides differ little."""
  (left, right), (near_left, near_right) = exact, near
  off = _product_norm(
    jnp.concatenate([near_left - left, near_left], axis=2),
    jnp.concatenate([right, near_right - right], axis=2),
  )
  return off / jnp.maximum(_product_norm(left, right), jnp.finfo(jnp.float32).tiny)


def _product_norm(left: jax.Array, right: jax.Array) -> jax.Array:
  """Returns the Frobenius norm of `left @ right^T` over all heads."""
  gram = lambda x: _matmul(jnp.matrix_transpose(x), x)
  return jnp.sqrt(jnp.maximum(jnp.sum(gram(left) * gram(right)), 0))
