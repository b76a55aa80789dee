"""Changes as small as rounding errors are told from these."""

import ml_dtypes
import numpy as np
import pytest

from rotbits_jax.relative import rounding_errors

# A vector, a small matrix, and rows and columns of any sizes, as tokens have.
SHAPES = [(1, 300), (8, 12), (40, 30), (700, 96), (96, 700)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_rounding_errors_are_no_change(shape, dtype):
  rng, roundoff = np.random.default_rng(0), float(ml_dtypes.finfo(dtype).eps) / 2
  sizes = np.exp(rng.normal(size=(shape[0], 1)) + 0.5 * rng.normal(size=(1, shape[1])))
  made = rng.normal(size=shape) * sizes
  given = made.astype(dtype)
  assert rounding_errors.explain(given, made, roundoff)
  assert not rounding_errors.explain(given, made, roundoff / 4)
  assert rounding_errors.explain(
    np.float32(1e30) * given, np.float32(1e30) * made, roundoff
  )
  given[0, 3] = np.inf
  assert not rounding_errors.explain(given, made, roundoff)


def changed(rng, made, kind):
  """Returns a matrix, changed by less than a roundoff of bfloat16 in all."""
  off, (rows, columns), roundoff = np.zeros_like(made), made.shape, 2.0**-8
  low = lambda k, n=rows: rng.normal(size=(n, k)) @ rng.normal(size=(k, columns))
  norm = np.linalg.norm
  if kind.startswith('rank'):
    off = low(int(kind[4:]))
    off *= 0.6 * roundoff * norm(made) / norm(off)
  elif kind == 'some rows':
    off[:: rows // 12] = 6 * roundoff * made[:: rows // 12]
  elif kind == 'beside a large row':
    made[0] *= 320
    off[1:] = low(8, rows - 1)
    off *= 4 * roundoff * norm(made[1:]) / norm(off)
  elif kind == 'an element':
    off[3, 5] = 0.9 * roundoff * norm(made)
  return made + off


KINDS = 'rank 1', 'rank 8', 'some rows', 'beside a large row', 'an element'


@pytest.mark.parametrize('kind', KINDS)
def test_changes_below_the_rounding_errors_are_told_from_these(kind):
  rng, roundoff = np.random.default_rng(0), 2.0**-8
  made = rng.normal(size=(700, 96))
  given = changed(rng, made, kind).astype(ml_dtypes.bfloat16)
  far = np.linalg.norm(given.astype(np.float64) - made) / np.linalg.norm(made)
  assert far < roundoff
  assert not rounding_errors.explain(given, made, roundoff)


def test_a_small_row_counts_too():
  rng, roundoff = np.random.default_rng(0), 2.0**-8
  made = rng.normal(size=(700, 96))
  made[5] *= 0.003
  given = made.copy()
  explain = lambda x: rounding_errors.explain(
    x.astype(ml_dtypes.bfloat16), made, roundoff
  )
  assert explain(given)
  given[5] = rng.normal(size=96) * np.std(given[5])
  assert not explain(given)
