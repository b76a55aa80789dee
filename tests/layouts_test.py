"""Elements divide and join exactly; tables of the normal distribution are the same."""

import itertools
import math
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rotbits_jax.coding import contexts
from rotbits_jax.coding import layouts
from rotbits_jax.coding import tables

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)

LAYOUTS = [
  *(
    layouts.Float(np.dtype(x), layouts.Float(np.dtype(x), 0).most_raw_bits)
    for x in FLOATS
  ),
  *(
    layouts.Int(np.dtype(x), raw_bits)
    for x, least in (('i1', 0), ('u1', 0), ('i2', 2), ('u2', 2), ('i4', 18), ('u4', 18))
    for raw_bits in (least, 8 * int(x[1]) - 1)
  ),
]

# Dtype, number of raw bits of integers, and a common class.
NORMAL = (
  (np.float16, 0, -40),
  (np.float16, 0, -104),  # many numbers have exponent 0
  (ml_dtypes.bfloat16, 0, -37),
  (np.float32, 0, 11),
  (np.int8, 0, 35),
  (np.int8, 2, 35),
  (np.int16, 5, 101),
)


def patterns(dtype):
  """Returns all bit patterns of 8 or 16 bits, or many of 32 bits."""
  width = 8 * np.dtype(dtype).itemsize
  if width <= 16:
    return np.arange(1 << width).astype(f'u{width // 8}')
  return np.random.default_rng(0).integers(0, 1 << 32, 100_000).astype(np.uint32)


def check_round_trip(layout, bits):
  assert layout.is_valid()
  least, count = layout.unsigned.type(layout.min_exponent), np.int32(bits.size)
  out = tuple(jnp.zeros(bits.size, np.uint8) for _ in layout.pieces)
  out = jnp.zeros(bits.size, np.uint16), *out
  program = layout.program
  symbols, *pieces = layouts.split(out, bits, None, least, count, layout=program)
  assert int(symbols.max()) < layout.alphabet
  for piece, own in zip(layout.pieces, pieces, strict=True):
    assert int(own.max()) < 1 << piece.width
  joined = layouts.join(
    jnp.zeros_like(bits), symbols, tuple(pieces), None, least, count, layout=program
  )
  np.testing.assert_array_equal(joined, bits)


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_join_undoes_split_for_every_pattern(layout):
  check_round_trip(layout, patterns(layout.dtype))


def rounded(bits, form, least):
  """Rounds numbers towards zero to multiples of the step of a minimum exponent."""
  magnitude = bits & ((1 << form.width - 1) - 1)
  exponent = np.maximum(magnitude >> form.mantissa, 1).astype(np.int64)
  below = np.clip(least - exponent, 0, form.width - 1).astype(bits.dtype)
  # The leading 1 of a number is also cut off, if it is below the step.
  sign = bits & (1 << form.width - 1)
  return np.where(below > form.mantissa, sign, bits >> below << below).astype(
    bits.dtype
  )


@pytest.mark.parametrize(
  ('dtype', 'least'), [*itertools.product(FLOATS, [1, 2, 9, 25])]
)
def test_small_numbers_count_steps(dtype, least):
  dtype = np.dtype(dtype)
  form = layouts.FORMATS[dtype]
  bits = rounded(patterns(dtype), form, least)
  raised = np.asarray(layouts.raised(jnp.asarray(bits), form, least))
  with np.errstate(invalid='ignore'):
    values = np.abs(bits.view(dtype).astype(np.float64))
  small = values < 2.0 ** (least + 1 - form.bias)
  steps = np.ldexp(values[small], form.bias + form.mantissa - least)
  np.testing.assert_array_equal(raised[small] & ((1 << form.width - 1) - 1), steps)
  offset = np.array((least - 1) << form.mantissa, bits.dtype)
  np.testing.assert_array_equal(raised[~small], bits[~small] - offset)
  lowered = layouts.lowered(jnp.asarray(raised), form, least)
  np.testing.assert_array_equal(lowered, bits)
  most = layouts.Float(dtype, 0).most_raw_bits
  check_round_trip(layouts.Float(dtype, most, least), bits)


def layout_of(dtype, raw_bits):
  kind = layouts.Int if np.dtype(dtype).kind == 'i' else layouts.Float
  return kind(np.dtype(dtype), raw_bits)


def weights_of(layout, classes):
  every = np.arange(layout.alphabet)
  return contexts.normal_weights(layout, layout.alphabet, np.array(classes), every)


def masses(layout, deviation):
  """Returns the share of each symbol in a normal distribution, float64 `[A]`."""
  below = np.vectorize(lambda x: (1 + math.erf(x / deviation / math.sqrt(2))) / 2)
  if layout.dtype.kind == 'i':
    n = np.arange(layout.alphabet << layout.raw_bits)
    value = np.where(n % 2, -(n + 1) // 2, n // 2)
    share = below(value + 0.5) - below(value - 0.5)
    return share.reshape(-1, 1 << layout.raw_bits).sum(axis=1)
  infinite = ((1 << layout.format.exponent) - 1) << 3
  edges = np.full(layout.alphabet + 1, np.inf)
  bits = np.arange(infinite) << layout.most_raw_bits - 1
  edges[:infinite] = bits.astype(layout.unsigned).view(layout.dtype).astype(np.float64)
  return 2 * np.diff(below(edges))


@pytest.mark.parametrize(('dtype', 'raw_bits', 'k'), NORMAL)
def test_weights_are_the_normal_distribution(dtype, raw_bits, k):
  layout = layout_of(dtype, raw_bits)
  weights, expected = weights_of(layout, [k])[0], masses(layout, 2 ** (k / 8))
  loss = expected * np.log2(np.maximum(expected, 1e-300) / (weights / weights.sum()))
  assert loss.sum() < 2e-5


def test_tables_are_the_same_on_every_machine():
  """The tables are part of the format, so a change here breaks every file."""
  digest, classes = 0, [-(1 << 15), -1500, -104, -37, -3, 0, 18, 512, 1 << 15]
  for dtype, raw_bits, _ in NORMAL:
    weights = weights_of(layout_of(dtype, raw_bits), classes)
    assert weights.min() >= 1
    digest = zlib.crc32(tables.quantize(weights).astype('<u2').tobytes(), digest)
  assert digest == DIGEST


DIGEST = 1556244710


@pytest.mark.parametrize('position', [0, 1, 2])
def test_what_is_inflated_is_bounded(position):
  layout, bomb = layouts.Float(np.dtype(np.float16), 8), bytes(1 << 24)
  streams = [contexts.deflate(b'\0\1' + bytes(4)), contexts.deflate(bytes(1))]
  streams.append(zlib.compress(b''))
  streams[position] = (zlib.compress if position == 2 else contexts.deflate)(bomb)
  with pytest.raises(ValueError, match=r'too long|not a frequency'):
    contexts.from_bytes(b''.join(streams), layout, ((1, 2),))
