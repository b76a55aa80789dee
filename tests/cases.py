"""Tables of tests: a structured leaf of every type, and every transform.

A leaf or a transform that joins a table joins all tests that go over it.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import passes
from rotbits_jax import quantisers
from rotbits_jax import structured
from rotbits_jax.relative import measure
from rotbits_jax.structured import subspaces

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
CHECKPOINTS = sorted(path.parent.name for path in TESTDATA.glob('*/config.json'))


@functools.cache
def load(name):
  """Loads a checkpoint of the tests."""
  return checkpoints.load_checkpoint(TESTDATA / name)


def transforms():
  """Returns all transforms of the package, by name."""
  chain = (
    passes.remove_residual_gauge(),
    passes.retie_embedding(),
    passes.remove_head_gauges(),
    passes.random_rotation(key=jax.random.key(1)),
    passes.retie_exactly(),
  )
  return {transform.name: transform for transform in chain}


def lower(seed, rows, columns, dtype=np.float16, scale=0.1):
  rng = np.random.default_rng(seed)
  return np.tril(rng.standard_normal((rows, columns)) * scale).astype(dtype)


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


LEAVES = {
  'gram': lambda seed: structured.IdentityMinusGram(
    b=lower(seed, 6, 2 + seed), c=lower(seed, 6, 1), columns=6
  ),
  'gram_wide': lambda seed: structured.IdentityMinusGram(
    b=lower(seed, 6, 3), c=lower(seed, 6, 0), columns=9
  ),
  'gram_of_rank_0': lambda seed: structured.IdentityMinusGram(
    b=lower(seed, 6, 0), c=lower(seed, 6, 0), columns=9
  ),
  'trapezoidal_rows': lambda seed: structured.TrapezoidalRows(
    full=normal(seed, 2, 8), lower=lower(seed + 9, 8, 3)
  ),
  'trapezoidal_rows_only': lambda seed: structured.TrapezoidalRows(
    full=None, lower=lower(seed, 8, 5)
  ),
  'trapezoidal_rows_wide': lambda seed: structured.TrapezoidalRows(
    full=None, lower=lower(seed, 4, 7)
  ),
  'trapezoidal_rows_of_pivots': lambda seed: structured.TrapezoidalRows(
    full=None, lower=lower(seed, 8, 3), pivots=np.uint8([0, 1, 1, 0, 0, 1, 0, 0])
  ),
  'head_columns': lambda seed: structured.HeadBases(
    below=normal(seed + 9, 4, 6), rotary=normal(seed, 7, 8), heads=2
  ),
  'head_rows': lambda seed: structured.HeadBases(
    below=normal(seed, 12, 6), rotary=None, heads=2, group=3
  ),
  'constant': lambda seed: structured.Constant.like(lower(seed, 3, 4), 1.5),
  'multiples': lambda seed: structured.UniformlyQuantized(
    integers=np.arange(-15, 15, dtype=np.int16).reshape(6, 5) * (1 + seed),
    step=np.float32(0.625),
    name='float16',
    row_exponents=np.arange(-3, 3, dtype=np.int8),
    column_exponents=np.arange(5, dtype=np.int8) - np.int8(seed),
  ),
}
"""Makes a leaf of every type that needs no other parameter, from a seed."""


def leaves():
  """Returns a structured leaf of every type, by name."""
  rng = np.random.default_rng(0)
  return {name: make(0) for name, make in LEAVES.items()} | {
    'block_quantized': quantisers.BlockQuantized(
      numbers=np.int8([[-12, -1, -16, 8], [2, 4, 6, 8]]),
      scales=np.uint8([[106], [0]]),
      grid='float4_e2m1fn',
      ones_complement=True,
      name='bfloat16',
      block=(1, 4),
      scale_form=(944, 20),
      factor=np.float32(0.5),
      gaps=np.uint32([2, 4]),
      exceptions=np.array([1, 3], jnp.bfloat16),
    ),
    'tied': structured.Tied(normal(0, 5, 3), tokens=9),
    'basis': subspaces.Basis(rng.integers(-90, 90, (6, 4)).astype(np.int32), 1 << 17),
    # The mask is a byte 1, as in the target, whose arrays have ones.
    'subspace': subspaces.Basis.of(
      0.2 * normal(0, 7, 1).astype(np.float64), 2.0**-15, np.arange(8) == 0
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
