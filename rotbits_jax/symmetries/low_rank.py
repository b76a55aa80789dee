r"""The gauge of low-rank pairs: a change of basis between two factors.

The basis between two factors is a gauge: a choice that does not change the product,

    x U V = x (U A)(A^-1 V)      for every invertible A `[r, r]`.

So r^2 of the r(m + n) numbers are redundant. One factor is replaced by a basis of its
column space, see `structured.LowRank`, and the other is multiplied by a square matrix.
No matrix is inverted that can be singular, so the product may have a lower rank.

Shape letters are those of `structured.low_rank`.

Reference: Zhao et al., PIFA, arXiv 2501.19090, section 3: the redundant numbers.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from rotbits_jax import structured
from rotbits_jax.symmetries import heads

_matmul = functools.partial(jnp.matmul, precision='highest')


def fix_pair(
  u: jax.Array,  # [m, r], 1 <= r <= min(m, n)
  v: jax.Array,  # [r, n]
) -> structured.LowRank:
  """Fixes the gauge of one pair; returns a leaf for `u @ v`, float32.

  >>> u = jax.random.normal(jax.random.key(0), (32, 16))
  >>> fixed = fix_pair(u, v := u.T)
  >>> structured.count_elements([u, v])  # 16^2 are redundant
  1024
  >>> structured.count_elements(fixed)
  768
  >>> bool(jnp.allclose(fixed.materialize(), u @ v, atol=1e-3))
  True
  """
  chex.assert_shape(v, (u.shape[1], None))
  u, v = u.astype(jnp.float32), v.astype(jnp.float32)
  if u.shape[0] <= v.shape[1]:
    basis = heads.basis(u)
    return structured.LowRank(basis.below, _matmul(basis.factor, v), 'u')
  basis = heads.basis(v.T)
  return structured.LowRank(_matmul(u, basis.factor.T), basis.below.T, 'v')
