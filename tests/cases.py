"""Tables of tests: a structured leaf of every type, and every transform.

A leaf or a transform that joins a table joins all tests that go over it.
"""

import jax
import numpy as np

from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.relative import measure


def transforms():
  """Returns all transforms of the package, by name."""
  chain = (
    passes.remove_residual_gauge(),
    passes.retie_embedding(),
    passes.remove_biases(),
    passes.remove_value_gauge(),
    passes.remove_query_key_gauge(),
    passes.remove_low_rank_gauge(),
    passes.random_rotation(key=jax.random.key(1)),
    passes.retie_exactly(),
  )
  return {transform.name: transform for transform in chain}


def leaves():
  """Returns a structured leaf of every type that needs no other parameter."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: np.asarray(rng.standard_normal(shape), np.float16)
  lower = lambda rows, columns: np.tril(normal(rows, columns))
  return {
    'gram': structured.IdentityMinusGram(lower(6, 3), lower(6, 1), columns=9),
    'gram_of_rank_0': structured.IdentityMinusGram(lower(6, 0), lower(6, 0), columns=6),
    'trapezoidal_rows': structured.TrapezoidalRows(normal(2, 8), lower(8, 5)),
    'head_columns': structured.HeadColumns(normal(7, 8), normal(4, 6), heads=2),
    'head_rows': structured.HeadRows(normal(6, 2), normal(12, 5), groups=2, head_dim=3),
    'constant': structured.Constant.like(normal(3, 4), 1.5),
    'low_rank': structured.LowRank(normal(6, 2), normal(2, 5)),
    'reduced': structured.ReducedLowRank(
      normal(3, 2), normal(2, 7), size=5, transposed=True
    ),
    'reduced_lines': structured.ReducedLowRank(
      normal(3, 2),
      normal(2, 7),
      size=5,
      transposed=True,
      basis_exponents=np.arange(-2, 3, dtype=np.int8),
      other_exponents=np.arange(7, dtype=np.int8),
    ),
    'tied': structured.Tied(normal(5, 3), tokens=9),
    'multiples': structured.UniformlyQuantized(
      rng.integers(-900, 900, (6, 5)).astype(np.int16),
      np.float32(0.625),
      'float16',
      rng.integers(-9, 9, 6).astype(np.int8),
      rng.integers(-9, 9, 5).astype(np.int8),
    ),
    'basis': structured.Basis(rng.integers(-90, 90, (6, 4)).astype(np.int32), 1 << 17),
    # The mask is a byte 1, as in the target, whose arrays have ones.
    'subspace': structured.Subspace.of(
      0.2 * normal(7, 1).astype(np.float64), np.arange(8) == 0, 1 << 10
    ),
  }


def leaves_beside_base():
  """Returns leaves of every form that need an array of a base, and the array."""
  rng = np.random.default_rng(0)
  base = rng.standard_normal((80, 128)).astype(np.float16)
  near = (base + 0.01 * rng.standard_normal(base.shape)).astype(np.float16)
  near[0, :3] = 100, -100, np.inf
  few = base.copy()
  few[3, :9] = near[3, :9]
  decayed = (0.98 * base.astype(np.float32)).astype(np.float16)
  arrays = {'all': near, 'decayed': decayed, 'few': few, 'equal': base}
  return {name: (measure.beside(x, base).leaf, base) for name, x in arrays.items()}
