"""Corrections make integers exact, and are as short as they can be."""

import functools
import itertools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding.bits_back import correction as correction_lib


@functools.partial(jax.jit, static_argnums=4)
def correct(positions, integers, margin, groups, count):
  others = positions
  return correction_lib.correct(positions, integers, others, margin, groups, count)


nearest = jax.jit(correction_lib.nearest)
levels = jax.jit(correction_lib.levels)

SIZE, GROUPS = 4096, 8


def _case(scale: float):
  rng = np.random.default_rng(0)
  integers = rng.integers(0, 65536, SIZE)
  integers[:4] = [0, 65535, 0, 65535]
  groups = np.arange(SIZE) % GROUPS
  noise = rng.standard_t(2, SIZE) * scale * (1 + groups)
  return (
    jnp.asarray(integers + noise, jnp.float32),
    jnp.asarray(integers, jnp.uint16),
    jnp.asarray(groups, jnp.int32),
  )


class CorrectionTest(absltest.TestCase):
  def test_no_shift_within_the_margin_changes_an_integer(self):
    for scale, margin in itertools.product([0.0, 0.1, 3.0, 300.0], [0.125, 0.5]):
      with self.subTest(scale=scale, margin=margin):
        positions, integers, groups = _case(scale)
        with jax.numpy_dtype_promotion('strict'):
          correction = correct(positions, integers, margin, groups, GROUPS)
          level = levels(correction.base, correction.extra, groups)
          for shift in (-0.9, 0, 0.9):
            # Positions are cyclic: 0 is next to 65535.
            for turn in (0, 65536):
              moved = positions + (shift * margin + turn)
              exact = nearest(moved, level, correction.residue)
              np.testing.assert_array_equal(exact, integers)

  def test_levels_suit_the_errors(self):
    positions, integers, groups = _case(1.0)
    correction = correct(positions, integers, 0.125, groups, GROUPS)
    base = np.asarray(correction.base)
    self.assertEqual(base[0], 2)
    self.assertEqual(base[7], 5)
    exact, _, _ = _case(0.0)
    correction = correct(exact, integers, 0.125, groups, GROUPS)
    self.assertEqual(np.asarray(levels(*correction[:2], groups)).max(), 0)
    self.assertEqual(np.asarray(correction.residue).max(), 0)
