"""Arrays beside known ones come back in few bytes; hostile leaves are refused."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.relative import measure
from rotbits_jax.structured import difference
from rotbits_jax.structured import tied
from rotbits_jax.structured import ulps

FLOATS = 'float16', 'bfloat16', 'float32'
DTYPES = *FLOATS, 'float8_e4m3fn', 'float8_e5m2', 'int8', 'uint8', 'int16', 'int32'
SHAPES = (40, 50), (2, 3, 40), (700,), (5, 3), (1, 70000)


def pair(dtype='bfloat16', shape=(200, 96), *, scale=0.01, seed=0):
  """A base, and an array near it whose rows and columns differ in their scales."""
  rng = np.random.default_rng(seed)
  base = rng.normal(size=shape)
  rows = np.exp(rng.normal(size=(*shape[:-1], 1)))
  columns = np.exp(rng.normal(size=shape[-1:]))
  target = base + scale * rng.normal(size=shape) * rows * columns
  dtype = np.dtype(dtype)
  if dtype.kind in 'iu':
    base, target = 50 + 9 * base, 50 + 9 * target
  return target.astype(dtype), base.astype(dtype)


def with_special_numbers(dtype):
  target, base = pair(dtype)
  odd = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-7, -1e-7]
  base[0, :8], target[1, :8] = odd, odd
  base[2, :8], target[2, :8] = odd, odd[::-1]
  target[3], base[4], target[4], target[5, :9] = 0, 0, -0.0, 1e4
  return target, base


def with_adapter(dtype):
  rng = np.random.default_rng(0)
  base = rng.normal(size=(300, 400)).astype(dtype)
  update = 0.02 * rng.normal(size=(300, 8)) @ rng.normal(size=(8, 400))
  target = (base.astype(np.float64) + update).astype(dtype)
  return target, base


def with_decay(dtype):
  target, base = pair(dtype, (1000, 96), scale=0.1)
  unused = np.arange(1000) % 20 > 0
  decayed = base[unused].astype(np.float32)
  for step in np.linspace(2e-5, 1e-5, 1000, dtype=np.float32):
    decayed -= step * decayed
  target[unused] = decayed.astype(target.dtype)
  return target, base


def with_equal_rows(dtype):
  target, base = pair(dtype, (2000, 96))
  some = np.arange(2000) % 4 > 0
  target[some] = base[some]
  return target, base


def step(dtype):
  rng = np.random.default_rng(0)
  base = rng.normal(size=(1000, 400)).astype(dtype)
  bits = base.view(f'i{base.itemsize}').copy()
  changed = rng.random(bits.shape) < 0.01
  bits[changed] += rng.choice([-1, 1], np.count_nonzero(changed)).astype(bits.dtype)
  return bits.view(base.dtype), base


def step_of_some_rows(dtype):
  target, base = step(dtype)
  target[160:] = base[160:]
  return target, base


CASES = {
  'fine_tune': (pair, {'elements'}, 0.85),
  'special': (with_special_numbers, {'elements'}, 1.0),
  'adapter': (with_adapter, {'left', 'right'}, 0.5),
  'decay': (with_decay, {'drift'}, 0.65),
  'equal_rows': (with_equal_rows, {'elements'}, 0.3),
  'step': (step, {'elements'}, 0.02),
  'steps_of_some_rows': (step_of_some_rows, {'elements', 'changed'}, 0.002),
  'equal': (lambda dtype: (pair(dtype)[1],) * 2, set(), 0.001),
}
"""Makes an array and its base; arrays of the leaf; its bytes over those alone."""


def beside(target, base):
  measured = measure.beside(target, base)
  assert measured is not None
  return measured


def assert_comes_back(measured, target, *needed):
  """Codes a leaf as a file does; returns the bytes."""
  leaf = measured.leaf
  settings, arrays = leaf.stored()
  place = [i for i, name in enumerate(arrays) if name == 'elements']
  encoded = coder.encode([*arrays.values()], dict.fromkeys(place, measured.near))
  memory = [np.empty(x.shape, x.dtype) for x in arrays.values()]
  again = lambda: type(leaf).from_stored(
    settings, dict(zip(arrays, memory, strict=True))
  )

  def near():
    bits = again().changed_part(again().known(*needed))
    return bits.view(f'u{bits.itemsize}')

  coder.decode(encoded.spec, encoded.data, out=memory, known=dict.fromkeys(place, near))
  assert structured.same_bits(again().materialize(*needed), target)
  assert structured.same_bits(leaf.materialize(*needed), target)
  assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype)
  return encoded.data.size


@pytest.mark.parametrize('case', CASES)
def test_an_array_beside_its_base(case, subtests):
  for dtype in FLOATS:
    with subtests.test(dtype=dtype):
      check_beside(dtype, *CASES[case])


def check_beside(dtype, make, names, share):
  target, base = make(np.dtype(dtype).name)
  measured = beside(target, base)
  assert names <= measured.leaf.stored()[1].keys()
  alone = coder.encode([target]).data.size
  assert assert_comes_back(measured, target, base) <= share * alone


def test_any_dtype_and_shape(subtests):
  for dtype in DTYPES:
    for shape in SHAPES:
      with subtests.test(dtype=dtype, shape=shape):
        target, base = pair(dtype, shape, scale=0.1)
        draft = difference.Difference(lengths=shape, name=dtype)
        bits = [ulps.bits_of(x) for x in (target, base)]
        leaf = measure.predicted(draft, *bits)
        assert_comes_back(leaf, target, base)


@pytest.mark.parametrize('dtype', ['int2', 'uint4', 'float4_e2m1fn', 'int64', 'bool'])
def test_numbers_of_other_sizes(dtype):
  target, base = np.random.default_rng(0).integers(0, 2, (2, 72, 80))
  target[9:] = base[9:]
  target, base = (x.astype(np.dtype(dtype)) for x in (target, base))
  measured = measure.beside(target, base)
  if measured is not None:
    assert_comes_back(measured, target, base)


@pytest.mark.parametrize('rows', [150, 200, 260])
def test_another_number_of_rows(rows):
  base = pair(shape=(200, 96))[1]
  target = pair(shape=(rows, 96))[0]
  common = min(rows, 200)
  far = 1e-3 * np.random.default_rng(1).normal(size=(common, 96))
  target[:common] = (base[:common].astype(np.float32) + far).astype(base.dtype)
  assert_comes_back(beside(target, base), target, base)
  assert measure.beside(target[:, :95], base) is None


def test_the_base_is_rounded_first():
  base = np.random.default_rng(0).normal(size=(40, 50))
  for dtype in FLOATS:
    target = base.astype(np.dtype(dtype))
    assert not beside(target, base).leaf.stored()[1]
  assert measure.beside(base, base.astype(np.float32)) is None
  assert measure.beside(base.astype(np.int32), base.astype(np.float32)) is None


# ---- an embedding beside its product with the head -----------------------------------


def embedding(dtype, tokens=512, rank=24, width=18):
  """A table that is the head times a map, up to rounding."""
  rng = np.random.default_rng(0)
  head = rng.normal(size=(rank, tokens)).astype(dtype)
  matrix = rng.normal(size=(rank, width))
  table = (head.astype(np.float64).T @ matrix).astype(dtype)
  return table, head, np.rint(matrix * 2.0**12).astype(np.int16), 12


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_an_embedding_beside_its_head(dtype):
  table, head, map, scale = embedding(np.dtype(dtype))
  table[3:7] = np.array([[np.inf], [-1e4], [1e-7], [-0.0]]).astype(table.dtype)
  measured = measure.beside_head(table, head, map, scale)
  nbytes = assert_comes_back(measured, table, head)
  assert nbytes < 0.7 * coder.encode([table]).data.size
  order = np.random.default_rng(0).permutation(len(head))
  leaf = measured.leaf
  turned = leaf.replace(map=leaf.map[order])
  np.testing.assert_array_equal(turned.known(head[order]), leaf.known(head))


def test_products_with_the_head_are_near():
  rng = np.random.default_rng(0)
  for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
    info = jnp.finfo(dtype)
    for low, high in ((info.minexp - 9, info.minexp), (-9, 3), (-30, 3)):
      sizes = 2.0 ** rng.integers(low, high, (1, 32))
      head = (rng.uniform(-1, 1, (5, 32)) * sizes).astype(dtype)
      map = rng.integers(-(1 << 14), 1 << 14, (5, 3)).astype(np.int16)
      made = tied.product(head, map, 14, dtype)
      wide, matrix = head.astype(np.float64), np.ldexp(map.astype(np.float64), -14)
      exact = wide.T @ matrix
      spacing = np.maximum(np.abs(exact) * float(info.eps), float(info.tiny) * 2.0**-7)
      # Both are rounded to 16 bits, in which the greatest of a column has 14 or more.
      most = np.maximum(np.abs(wide).max(axis=0)[:, None], 2.0**-36)
      spacing += 5 * 2.0**-13 * most * np.abs(matrix).max(axis=0)
      assert (np.abs(made.astype(np.float64) - exact) <= spacing).all()


def test_another_head_gives_other_known_elements():
  table, head, map, scale = embedding(np.float16)
  leaf = measure.beside_head(table, head, map, scale).leaf
  for factor in (64, np.nan):
    assert (leaf.known(np.float32(head) * factor) != leaf.known(head)).any()
  with pytest.raises(ValueError, match='needs head/kernel of'):
    leaf.known(head[:, 1:])


# ---- hostile leaves ------------------------------------------------------------------

HOSTILE_SETTINGS = (
  *({'lengths': x} for x in ([200, 97], [1 << 30] * 5, [2] * 40)),
  *({'name': x} for x in ('object', 'no such dtype', '(01,2)f4', 'float64', 'U3')),
  {'unit': 1000},
  {'scale': 4000},
)
HOSTILE_ARRAYS = {
  'elements': (lambda x: x[:-1], lambda x: x.astype(np.int32)),
  'changed': (lambda x: x[:-1], lambda x: ~x),
  'left': (lambda x: x[:-1],),
  'right': (lambda x: x[:, 1:],),
  'drift': (lambda x: x[:-1],),
  'map': (lambda x: x.astype(np.int32), lambda x: x[:, 1:]),
}


def leaves():
  """Leaves that have all arrays between them."""
  for make in (pair, with_adapter, with_decay, step_of_some_rows):
    target, base = make('bfloat16')
    yield beside(target, base).leaf
  yield measure.beside_head(*embedding(np.float16)).leaf


def test_hostile_settings_and_arrays_are_refused(subtests):
  damaged = set()
  for leaf in leaves():
    settings, arrays = leaf.stored()
    for change in HOSTILE_SETTINGS:
      with subtests.test(change=change), pytest.raises(ValueError):  # noqa: PT011
        type(leaf).from_stored(settings | change, arrays)
    for name in HOSTILE_ARRAYS.keys() & arrays.keys():
      damaged.add(name)
      for damage in HOSTILE_ARRAYS[name]:
        with subtests.test(name=name), pytest.raises(ValueError):  # noqa: PT011
          type(leaf).from_stored(settings, arrays | {name: damage(arrays[name])})
      if name in ('left', 'right'):
        rest = {key: x for key, x in arrays.items() if key != name}
        with subtests.test(lacks=name), pytest.raises(ValueError):  # noqa: PT011
          type(leaf).from_stored(settings, rest)
  assert damaged == HOSTILE_ARRAYS.keys()


def test_another_base_is_refused():
  target, base = pair()
  leaf = beside(target, base).leaf
  for other in (base[:, :40], base.astype(np.int16)):
    with pytest.raises(ValueError, match='cannot be made from'):
      leaf.materialize(other)
