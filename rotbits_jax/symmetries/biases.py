r"""Biases of attention that the output does not need.

The bias of the keys adds `q . b_k` to all scores of a query. The softmax ignores a
number that is added to all scores. With RoPE this does not hold, because RoPE rotates
queries and keys by different angles.

The attention weights of a query sum to 1. Therefore the bias of the values adds the
same vector to the output at every token, and the bias of the output can include it:

    (weights @ (x W_v + b_v)) W_o + b_o = (weights @ x W_v) W_o + (b_v W_o + b_o)

Here b_v is repeated for every query head that reads it. Shape letters are those of
`models.config`.
"""

import chex
import jax
import jax.numpy as jnp


def with_value_bias(
  out_bias: jax.Array, value_bias: jax.Array, kernel: jax.Array, *, kv_heads: int
) -> jax.Array:
  """Returns the output bias that includes the value bias: `b_o + b_v W_o`.

  >>> with_value_bias(jnp.zeros(2), jnp.ones(2), jnp.eye(2), kv_heads=1).tolist()
  [1.0, 1.0]

  Args:
    out_bias: `[d]`.
    value_bias: `[K h]`.
    kernel: W_o, `[H h, d]`.
    kv_heads: K.

  Returns:
    float32 `[d]`.
  """
  chex.assert_rank([out_bias, value_bias, kernel], [1, 1, 2])
  chex.assert_shape(kernel, (None, len(out_bias)))
  # H / K consecutive query heads read the same value head.
  groups = kernel.shape[0] // value_bias.shape[0]
  heads = value_bias.astype(jnp.float32).reshape(kv_heads, 1, -1)
  repeated = jnp.broadcast_to(heads, (kv_heads, groups, heads.shape[2])).reshape(-1)
  moved = jnp.matmul(repeated, kernel.astype(jnp.float32), precision='highest')
  return out_bias.astype(jnp.float32) + moved
