"""Loops of the coder are one native function on the CPU, and as usual elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rotbits_jax.coding import codecs
from rotbits_jax.coding import haar
from rotbits_jax.coding import permutation
from rotbits_jax.coding import rans
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import buffers
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import line_sums
from rotbits_jax.coding.weights import statistics
from rotbits_jax.relative import scales as differences
from rotbits_jax.structured import tied
from rotbits_jax.system import native


def loops_of_thunks(function, *arguments, **options):
  """Returns the loops of a compiled program that an executor of thunks would run.

  They are those of the entry, and of the bodies of such loops.
  """
  compiled = function if hasattr(function, 'lower') else jax.jit(function)
  text = compiled.lower(*arguments, **options).compile().as_text()
  bodies = dict(part.split(' ', 1) for part in text.split('\n%') if ' ' in part)
  entry = text[text.index('\nENTRY') :]
  found, left = [], [entry]
  while left:
    for line in left.pop().split('\n'):
      if ' while(' in line:
        body = line.split('body=%')[1].split(',')[0]
        found.append(body)
        left.append(bodies[body].split('\n}')[0])
  return found


def doubled(x, n):
  return jax.lax.fori_loop(0, n, lambda i, x: x + x[i], x)


def test_a_loop_is_not_a_loop_of_thunks():
  x = jnp.ones(64)
  assert not loops_of_thunks(native.loop(doubled), x, 3)
  np.testing.assert_array_equal(native.loop(doubled)(x, 3), doubled(x, 3))


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason='XLA does so by itself')
def test_it_would_be_one_without():
  assert loops_of_thunks(doubled, jnp.ones(64), 3)


def test_other_platforms_have_no_attributes():
  exported = jax.export.export(jax.jit(native.loop(doubled)), platforms=['cuda'])
  assert 'small_call' not in exported(jnp.ones(64), 3).mlir_module()


@pytest.mark.parametrize('size', [8, 1 << 14])
def test_closures_and_constants(size):
  """XLA aborts if an operand of a native function is a large constant."""
  rng = np.random.default_rng(0)
  table, own = rng.integers(0, 9, (2, size)), jnp.arange(size)

  def looked_up(x, n):
    step = lambda i, x: x + jnp.asarray(table[0])[i] + own[i]
    return jax.lax.fori_loop(0, n, step, x)

  found = jax.jit(native.loop(looked_up))(jnp.asarray(table[1]), 5)
  np.testing.assert_array_equal(found, table[1] + table[0][:5].sum() + 10)


def test_vmap():
  x = jnp.arange(12.0).reshape(2, 6)
  expected = jnp.stack([doubled(row, n) for row, n in zip(x, (3, 4), strict=True)])
  batched = jax.vmap(native.loop(doubled))(x, jnp.array([3, 4]))
  np.testing.assert_array_equal(batched, expected)


def message():
  rows = np.random.default_rng(0).integers(0, 1 << 16, (200, 8))
  return rans.stacked(jnp.asarray(rows, jnp.uint16), 300)


FREQUENCIES = jnp.full((3, 4), 1 << 12)
CODECS = {
  'uniform': codecs.uniform(jnp.full(100, 9)),
  'categorical': codecs.categorical(jnp.arange(100) % 3, FREQUENCIES),
  'haar': haar.codec(5, 5),
  'permutation': permutation.uniform(jnp.zeros(70, jnp.int32)),
}


@pytest.mark.parametrize('name', CODECS)
def test_codecs(name):
  codec = CODECS[name]
  rest, symbols = jax.jit(codec.pop)(message())
  assert not loops_of_thunks(codec.pop, message())
  assert not loops_of_thunks(codec.push, rest, symbols)


def test_a_codec_outside_a_program():
  codec = CODECS['categorical']
  rest, symbols = codec.pop(message())
  again = codec.push(rest, symbols)
  np.testing.assert_array_equal(rans.unstacked(again), rans.unstacked(message()))


def test_recovery_of_a_rotation_steps_through_panels_only():
  cells = jnp.zeros(haar.num_cells(40, 40), jnp.uint16)
  q = haar.rotation(cells, 40, 40)
  correction = jax.jit(haar.correct)(q, cells)
  assert len(loops_of_thunks(haar.recover, q, correction)) == 1


def test_blocks():
  made = blocks.tables_of(np.asarray(FREQUENCIES, np.int64))
  bytes_, words = (np.zeros(blocks.CAPACITY, x) for x in (np.uint8, np.uint16))
  numbers = made.entries(), made.alphabet, np.int32(9)
  stacks = np.zeros((blocks.LANES, blocks._STACK), np.uint16)
  assert not loops_of_thunks(blocks._push, stacks.reshape(-1), words, bytes_, *numbers)
  empty = rans.empty(blocks.LANES, 1)._replace(words=stacks)
  coded = words, empty, bytes_, made.entries(), made.slots()
  assert not loops_of_thunks(blocks._pop, *coded, *numbers[1:])
  split = (words, bytes_), words, np.uint16(1), np.int32(9)
  layout = layouts.Int(np.dtype(np.uint16), 8)
  assert not loops_of_thunks(layouts.split, *split, layout=layout)


def test_statistics():
  bytes_, words = (np.zeros(buffers.ROOM, x) for x in (np.uint8, np.uint16))
  counts = np.zeros(contexts.MAX_ENTRIES, np.int32)
  numbers = np.uint32(4), np.int32(12), np.int32(8), np.uint16(1), np.uint32(5)
  floats = layouts.Float(np.dtype(np.float16), 0, 2)
  for layout in (floats, layouts.Int(words.dtype, 0)):
    operands = counts, words, bytes_, *numbers
    assert not loops_of_thunks(statistics._count, *operands, layout=layout)


def test_sums_of_lines():
  out = line_sums.Sums(*(np.zeros(line_sums.PADDED, np.float32) for _ in range(4)))
  bits, dtype = np.zeros(line_sums.PADDED, np.int16), np.dtype(np.float16)
  numbers = out.rows, np.int32(2), np.int32(9), np.int32(9)
  given, unit = (out, (bits.view(np.uint16),), *numbers), np.float32(1)
  assert not loops_of_thunks(statistics._sums, *given, unit=unit, dtype=dtype)
  assert not loops_of_thunks(
    differences._roots, out, (bits, bits), *numbers, dtype=dtype
  )


def test_residuals_of_a_tied_embedding():
  signed, unsigned = (np.zeros(tied._PIECE, x) for x in (np.int8, np.uint8))
  starts, count = np.zeros(256, np.uint32), np.int32(9)
  arguments = signed, unsigned, signed, starts, count
  assert not loops_of_thunks(tied._merge, *arguments)
  # One copy, before the loop. A copy for each entry would take ten times as long.
  text = tied._merge.lower(*arguments).compile().as_text()
  assert text.count('u32[256]{0} copy(') <= 1
