"""Numbers that share a step are raised and lowered exactly; tables are the same."""

import itertools
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import scales
from rotbits_jax.coding import tables
from rotbits_jax.structured import ulps

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)


def patterns(dtype):
  """Returns all bit patterns of 16 bits, or many of 32 bits."""
  width = 8 * np.dtype(dtype).itemsize
  if width <= 16:
    return np.arange(1 << width).astype(f'u{width // 8}')
  return np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32)


def rounded(bits, form, least):
  """Rounds numbers towards zero to multiples of the step of a minimum exponent."""
  magnitude = bits & ((1 << form.bits - 1) - 1)
  exponent = np.maximum(magnitude >> form.nmant, 1).astype(np.int64)
  below = np.clip(least - exponent, 0, form.bits - 1).astype(bits.dtype)
  # The leading 1 of a number is also cut off, if it is below the step.
  sign = bits & (1 << form.bits - 1)
  return np.where(below > form.nmant, sign, bits >> below << below).astype(bits.dtype)


def test_small_numbers_count_steps(subtests):
  for dtype, least in itertools.product(map(np.dtype, FLOATS), [1, 2, 9, 25]):
    with subtests.test(dtype=dtype, least=least):
      check_raised(dtype, least)


def check_raised(dtype, least):
  form = ulps.FORMATS[dtype]
  bias = (1 << form.nexp - 1) - 1
  bits = rounded(patterns(dtype), form, least)
  raised = np.asarray(ulps.raised(jnp.asarray(bits), form, least))
  np.testing.assert_array_equal(ulps.raised(bits, form, least, np), raised)
  with np.errstate(invalid='ignore'):
    values = np.abs(bits.view(dtype).astype(np.float64))
  small = values < 2.0 ** (least + 1 - bias)
  steps = np.ldexp(values[small], bias + form.nmant - least)
  magnitude = bits.dtype.type((1 << form.bits - 1) - 1)
  np.testing.assert_array_equal(raised[small] & magnitude, steps)
  offset = np.array((least - 1) << form.nmant, bits.dtype)
  np.testing.assert_array_equal(raised[~small], bits[~small] - offset)
  wide = (raised & magnitude).astype(np.uint32)
  for xp in (jnp, np):
    lowered = ulps.lowered(xp.asarray(wide), form, least, xp)
    np.testing.assert_array_equal(lowered, bits & magnitude)


def test_tables_of_pairs_follow_the_counts():
  rng = np.random.default_rng(0)
  counts = rng.multinomial(tables.TOTAL, np.full(32, 1 / 32), 5)
  ideal = (counts[:, :, None] * counts[:, None]).reshape(5, -1)[:, :-1] / 2**28
  for precision in (12, 14):
    frequencies = tables.of_pairs(counts, counts, precision)
    np.testing.assert_array_equal(frequencies, np.floor(ideal * 2**precision + 0.5))


def test_tables_without_an_escape_or_with_a_frequent_symbol_are_refused():
  zeros = np.zeros(256, int)
  for counts in (np.eye(1, 32, dtype=int) << 14, np.full((1, 32), 600)):
    with pytest.raises(ValueError, match='slots'):
      layouts.Pairs(np.dtype(np.float16), 8).tables(zeros[:1], zeros[:4], counts)
  with pytest.raises(ValueError, match='slots'):
    layouts.Bytes(np.dtype(np.uint8), 0).tables(zeros, zeros, np.full((1, 255), 17))
  with pytest.raises(ValueError, match='slots'):
    layouts.Singles(np.dtype(np.float16), 8).tables(
      zeros[:1], zeros[:4], np.full((1, 255), 17)
    )
  for counts in (np.eye(1, 32, 1, dtype=int) << 14, np.full((1, 32), 1 << 10)):
    with pytest.raises(ValueError, match='slots'):
      layouts.Differences(np.dtype(np.int8), 0).tables(zeros[:1], zeros, counts)
  with pytest.raises(ValueError, match='9 tables'):
    layouts.Differences(np.dtype(np.int8), 0).tables(
      zeros[:1], zeros, np.ones((9, 32), int)
    )


@pytest.mark.parametrize('dtype', ulps.FORMATS)
def test_numbers_are_moved_by_their_differences(dtype):
  rng, most = np.random.default_rng(0), 1 << 8 * dtype.itemsize
  known, numbers = rng.integers(0, most, (2, 50_000)).astype(np.uint32)
  off = ulps.differences(numbers, known, dtype, np)
  moved = ulps.moved(known, off.view(np.uint32), dtype, np) & np.uint32(most - 1)
  np.testing.assert_array_equal(moved, numbers)
  on_device = ulps.differences(jnp.asarray(numbers), jnp.asarray(known), dtype)
  np.testing.assert_array_equal(on_device, off)


def test_rows_along_the_first_axis_and_modes_are_read():
  layout = layouts.Singles(np.dtype(np.float16), 8)
  frequencies = np.full((1, 255), 16)
  written = contexts.Contexts(np.zeros(1, int), np.zeros(4, int), frequencies)
  rows, columns = np.arange(4, dtype=np.uint8), np.arange(6, dtype=np.uint8)
  expected = scales.Scales(7, rows, columns, by_first=True)
  data = contexts.to_bytes(written, [expected])
  _, (found,) = contexts.from_bytes(data, layout, [(4, 2, 3)])
  classes = np.empty(24, np.uint8)
  found.write((4, 2, 3), 1, 0, classes)
  np.testing.assert_array_equal(classes, 7 + np.add.outer(rows, columns).reshape(-1))
  content = bytearray(zlib.decompress(data, -15))
  content[2] = 8
  with pytest.raises(ValueError, match='mode 8'):
    contexts.from_bytes(zlib.compress(content, wbits=-15), layout, [(4, 2, 3)])


def test_damaged_contexts_are_refused_and_what_is_inflated_is_bounded():
  layout = layouts.Pairs(np.dtype(np.float16), 8)
  packed = lambda data: zlib.compress(data, wbits=-15)
  good = packed(bytes([*[0] * 4, 1, 0, 0, 0, *[0] * 32, *[2] * 32]))  # counts of 512
  contexts.from_bytes(good, layout, ((1, 2),))
  for bad in (good[:-3], b'', good + b'0', packed(bytes(1 << 24)), packed(bytes(72))):
    with pytest.raises(ValueError, match='tables'):
      contexts.from_bytes(bad, layout, ((1, 2),))
