"""Bits-back coding and its corrections are exact, and as short as they can be."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import codecs
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import correction as correction_lib
from tests import codec_checks

LATENTS, SYMBOLS = 6, 9


def _mixture(rng: np.random.Generator, shape: tuple[int, ...]):
  """A codec of symbols from a mixture, with its exact posterior, and p(z), p(x | z)."""
  prior = rng.dirichlet(np.ones(LATENTS))
  likelihood = rng.dirichlet(np.ones(SYMBOLS), LATENTS)
  posterior = (prior[:, None] * likelihood).T
  quantize = lambda p: jnp.asarray(
    np.stack([tables.quantize((row * 1e9 + 1).astype(np.int64)) for row in p])
  )
  tables_of = [quantize(p) for p in (prior[None], likelihood, posterior)]
  codec = codecs.bits_back(
    prior=codecs.categorical(jnp.zeros(shape, jnp.uint32), tables_of[0]),
    likelihood=lambda z: codecs.categorical(z, tables_of[1]),
    posterior=lambda x: codecs.categorical(x, tables_of[2]),
  )
  return codec, prior, likelihood


class BitsBackTest(parameterized.TestCase):
  def test_costs_the_evidence(self):
    rng = np.random.default_rng(0)
    codec, prior, likelihood = _mixture(rng, (5000,))
    evidence = prior @ likelihood
    x = rng.choice(SYMBOLS, 5000, p=evidence)
    message = codec_checks.random_message(1, 16, 400)
    longer = rans.check(jax.jit(codec.push)(message, jnp.asarray(x, jnp.uint32)))
    cost = rans.content_bits(longer) - rans.content_bits(message)
    ideal = -np.log2(evidence[x]).sum()
    self.assertAlmostEqual(cost / ideal, 1, delta=1e-2)


correct = jax.jit(correction_lib.correct, static_argnums=4)
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
          level = levels(correction, groups)
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
    self.assertEqual(np.asarray(levels(correction, groups)).max(), 0)
    self.assertEqual(np.asarray(correction.residue).max(), 0)
