"""Arrays beside a base come back, and damaged leaves are refused."""

import itertools
import zlib

import ml_dtypes
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import pool
from rotbits_jax.relative import factors as difference_factors
from rotbits_jax.relative import measure as passes
from rotbits_jax.relative import scales as differences
from rotbits_jax.structured import relative
from rotbits_jax.system import host

FLOATS = ['float16', 'bfloat16', 'float32']
OTHERS = ['float8_e4m3fn', 'float8_e5m2', 'int8', 'uint8', 'int16', 'int32', 'uint32']
FEW_BITS = [
  *('int2', 'uint2', 'int4', 'uint4'),
  *('float4_e2m1fn', 'float6_e2m3fn', 'float6_e3m2fn'),
]


def pair(dtype='bfloat16', shape=(200, 96), *, scale=0.01, seed=0):
  """A base, and an array near it whose rows and columns differ in their scales."""
  rng = np.random.default_rng(seed)
  base = rng.normal(size=shape)
  rows = np.exp(rng.normal(size=(*shape[:-1], 1)))
  columns = np.exp(rng.normal(size=shape[-1:]))
  target = base + scale * rng.normal(size=shape) * rows * columns
  dtype = relative.dtype_of(dtype)
  if dtype.kind in 'iu':
    base, target = 50 + 9 * base, 50 + 9 * target
  return target.astype(dtype), base.astype(dtype)


def assert_comes_back(target, base, kind=None):
  """Stores an array beside a base, and returns the leaf."""
  leaf = passes.beside(target, base)
  assert leaf is not None
  assert kind in (None, leaf.type_name)
  settings, arrays = leaf.stored()
  encoded = coder.encode(list(arrays.values()))
  decoded = coder.decode(encoded.spec, encoded.data)
  again = type(leaf).from_stored(settings, dict(zip(arrays, decoded, strict=True)))
  assert structured.same_bits(again, leaf)
  assert structured.same_bits(again.materialize(base), target)
  assert (again.shape, again.dtype) == (target.shape, target.dtype)
  return leaf


def related(target, base):
  """Stores the differences even if the array takes fewer bytes alone."""
  bits = relative.bits_of(target), relative.bits_of(base)
  leaf = passes._relative(target, *bits, 1e9, pool.in_turn)
  assert leaf is not None
  return leaf


def patched(target, base):
  """Stores the changed elements, however many they are."""
  bits, known = relative.bits_of(target), relative.bits_of(base)
  places = np.flatnonzero(bits != known)
  return structured.Patched.of(target, known, places, pool.in_turn)


def coded_bytes(leaf):
  return coder.encode(list(leaf.stored()[1].values())).data.size


@pytest.mark.parametrize('dtype', FLOATS)
def test_a_fine_tune_takes_fewer_bytes_than_alone(dtype):
  target, base = pair(dtype)
  leaf = assert_comes_back(target, base, 'relative')
  assert coded_bytes(leaf) < 0.85 * coder.encode([target]).data.size


@pytest.mark.parametrize('dtype', FLOATS)
def test_scales_are_those_of_rows_and_columns(dtype):
  rng = np.random.default_rng(0)
  rows, columns = (2.0 ** rng.integers(-6, 6, n) for n in (3000, 500))
  base = np.zeros((3000, 500))
  target = rng.normal(size=base.shape) * rows[:, None] * columns
  bits = [relative.bits_of(x.astype(relative.dtype_of(dtype))) for x in (target, base)]
  of_rows, of_columns = differences.scales(
    *(x.reshape(base.shape) for x in bits), relative.dtype_of(dtype), pool.in_turn
  )
  # In eighths of an octave; a factor may move from rows to columns.
  for found, given in ((of_rows, rows), (of_columns, columns)):
    error = found - 8 * np.log2(given)
    assert np.abs(error - np.median(error)).max() < 3


def test_rows_that_no_sample_has_may_differ_by_any_factor():
  rng = np.random.default_rng(0)
  base, own = rng.normal(size=(2, 3000, 64)).astype(np.float32)
  update = rng.normal(size=(3000, 2)) @ rng.normal(size=(2, 64))
  target = base + (own / 500 + update).astype(np.float32)
  target[1:3] *= np.array([[1e36], [1e-36]], np.float32)
  leaf = assert_comes_back(target, base, 'relative')
  assert leaf.left is None


@pytest.mark.parametrize('adapted', [False, True])
def test_jobs_side_by_side_give_the_same_leaf(adapted):
  rng = np.random.default_rng(0)
  base, own = rng.normal(size=(2, 9000, 256))
  more = rng.normal(size=(9000, 4)) @ rng.normal(size=(4, 256))
  target = base + 0.02 * (own + adapted * more)
  target, base = (x.astype(relative.dtype_of('bfloat16')) for x in (target, base))
  one, other = (passes.beside(target, base, x) for x in (pool.in_turn, pool.run))
  assert (one.left is not None) == adapted
  assert structured.same_bits(one, other)


def test_any_dtype_and_shape_comes_back(subtests):
  for dtype, shape in itertools.product(
    (*FLOATS, *OTHERS), ((40, 50), (2, 3, 40), (700,), (5, 3), (1, 70000))
  ):
    with subtests.test(dtype=dtype, shape=shape):
      target, base = pair(dtype, shape, scale=0.1)
      leaf = related(target, base)
      found = leaf.from_stored(*leaf.stored()).materialize(base)
      assert structured.same_bits(found, target)
      patch = patched(target, base)
      found = patch.from_stored(*patch.stored()).materialize(base)
      assert structured.same_bits(found, target)


def test_numbers_of_few_bits_come_back(subtests):
  numbers = np.random.default_rng(0).integers(0, 2, (2, 72, 80))
  for dtype in FEW_BITS:
    with subtests.test(dtype=dtype):
      target, base = numbers.astype(relative.dtype_of(dtype))
      leaf = related(target, base)
      found = leaf.from_stored(*leaf.stored()).materialize(base)
      assert structured.same_bits(found, target)


@pytest.mark.parametrize('dtype', FEW_BITS)
def test_numbers_of_few_bits_in_another_order_come_back(dtype, subtests):
  target, base = np.random.default_rng(0).integers(0, 2, (2, 72, 80)).astype(dtype)
  transposed = np.asfortranarray
  for orders in ((transposed, transposed), (transposed, np.asarray)):
    with subtests.test(orders=orders):
      tree, old = ({'x': f(x)} for f, x in zip(orders, (target, base), strict=True))
      data = rotbits_jax.encode(tree, base=old)
      found = rotbits_jax.decode(data, base=old)['x']
      np.testing.assert_array_equal(found.view(np.uint8), target.view(np.uint8))


def test_numbers_of_more_than_8_bytes_do_not_fit():
  for dtype in (np.complex128, np.longdouble):
    array = np.ones((3, 4), dtype)
    assert passes.beside(array, array) is None


def test_special_numbers_come_back(subtests):
  for dtype in FLOATS:
    with subtests.test(dtype=dtype):
      target, base = pair(dtype)
      odd = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-7, -1e-7]
      base[0, :8], target[1, :8] = odd, odd
      base[2, :8], target[2, :8] = odd, odd[::-1]
      target[3], base[4], target[4] = 0, 0, -0.0
      bits = target.view(f'u{target.itemsize}')
      bits[5] = np.arange(bits.shape[1]) + np.array(np.nan, dtype=target.dtype).view(
        bits.dtype
      )
      assert_comes_back(target, base, 'relative')


def test_an_equal_array_stores_nothing(subtests):
  for dtype in ('bfloat16', 'int64', 'float64', 'bool', 'int4'):
    with subtests.test(dtype=dtype):
      own = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
      base = np.arange(60).reshape(3, 20).astype(np.int8).astype(own)
      leaf = assert_comes_back(base.copy(), base, 'same')
      assert not leaf.stored()[1]


def test_the_base_is_rounded_first():
  base = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
  for dtype in (np.float16, ml_dtypes.bfloat16):
    assert_comes_back(base.astype(dtype), base, 'same')
  wide = base.astype(np.float64)
  assert_comes_back(base, wide, 'same')
  assert passes.beside(wide, base) is None
  assert passes.beside(base.astype(np.int32), base) is None


def test_equal_rows_cost_nothing():
  target, base = pair(shape=(2000, 96))
  some = np.arange(2000) % 100 != 3
  target[some] = base[some]
  assert_comes_back(target, base)
  leaf = related(target, base)
  assert structured.same_bits(leaf.materialize(base), target)
  assert leaf.coded.size < 20 * 96
  assert coded_bytes(leaf) < 0.02 * base.nbytes


@pytest.mark.parametrize('rows', [150, 200, 260])
def test_another_number_of_rows(rows):
  target, _ = pair(shape=(rows, 96), seed=0)
  _, base = pair(shape=(200, 96), seed=0)
  common = min(rows, 200)
  rng = np.random.default_rng(1)
  far = 1e-3 * rng.normal(size=(common, 96))
  target[:common] = (base[:common].astype(np.float32) + far).astype(base.dtype)
  leaf = assert_comes_back(target, base, 'relative')
  alone = coder.encode([target]).data.size
  assert coded_bytes(leaf) < 0.7 * alone
  assert passes.beside(target[:, :95], base) is None


@pytest.mark.parametrize('dtype', FLOATS)
def test_a_merged_adapter_takes_its_factors(dtype, monkeypatch):
  rng = np.random.default_rng(0)
  base = rng.normal(size=(300, 400))
  update = 0.02 * rng.normal(size=(300, 8)) @ rng.normal(size=(8, 400))
  dtype = relative.dtype_of(dtype)
  wide = base.astype(dtype).astype(np.float64)
  target, base = (wide + update).astype(dtype), base.astype(dtype)
  base[0, :3], target[1, :3] = [np.inf, np.nan, 0], [np.inf, np.nan, 0]
  leaf = assert_comes_back(target, base, 'relative')
  assert 8 <= leaf.left.shape[1] < 12
  monkeypatch.setattr(difference_factors, 'find', lambda *_: None)
  without = related(target, base)
  assert coded_bytes(leaf) < 0.75 * coded_bytes(without)
  settings, arrays = leaf.stored()
  for name, damage in (('left', lambda x: x[:-1]), ('right', lambda x: x[:, 1:])):
    with pytest.raises(ValueError, match='factors of shapes'):
      type(leaf).from_stored(settings, arrays | {name: damage(arrays[name])})
  del arrays['left']
  with pytest.raises(ValueError, match='one of two factors'):
    type(leaf).from_stored(settings, arrays)


@pytest.mark.parametrize('dtype', FLOATS)
def test_weight_decay_is_a_drift(dtype, monkeypatch):
  target, base = pair(dtype, (1000, 96), scale=0.1)
  base[0, :6] = [np.inf, -np.inf, np.nan, 0, -0.0, 1e-7]
  unused = np.arange(1000) % 20 > 0
  decayed = base[unused].astype(np.float32)
  for step in np.linspace(2e-5, 1e-5, 1000, dtype=np.float32):
    decayed -= step * decayed
  target[unused] = decayed.astype(target.dtype)
  leaf = assert_comes_back(target, base, 'relative')
  settings, arrays = leaf.stored()
  monkeypatch.setattr(passes, '_drift', lambda *_: None)
  assert coded_bytes(leaf) < 0.65 * coded_bytes(related(target, base))
  for damage in (lambda x: x[:-1], lambda x: x & -(2**31), lambda x: x ^ 2**30):
    with pytest.raises(ValueError, match='cannot have this drift'):
      type(leaf).from_stored(settings, arrays | {'drift': damage(arrays['drift'])})


def test_a_step_takes_a_patch():
  rng = np.random.default_rng(0)
  base = rng.normal(size=(1000, 400)).astype(ml_dtypes.bfloat16)
  bits = base.view(np.int16).copy()
  changed = rng.random(bits.shape) < 0.01
  bits[changed] += rng.choice([-1, 1], np.count_nonzero(changed)).astype(np.int16)
  leaf = assert_comes_back(bits.view(base.dtype), base, 'patched')
  assert coded_bytes(leaf) < 0.0065 * base.nbytes
  # Small numbers change, as they do when an optimizer takes small steps.
  small = abs(base.astype(np.float32)) < 0.02
  bits = base.view(np.int16).copy()
  bits[small] += 1
  assert_comes_back(bits.view(base.dtype), base, 'relative')


def test_another_model_is_stored_alone():
  target, _ = pair(seed=0)
  _, base = pair(seed=1)
  assert passes.beside(target, base) is None
  sparse = np.where(np.random.default_rng(0).random(target.shape) < 0.02, target, 0)
  assert passes.beside(sparse.astype(target.dtype), base) is None


def test_another_base_is_refused():
  target, base = pair()
  leaf = passes.beside(target, base)
  with pytest.raises(ValueError, match='cannot be made from'):
    leaf.materialize(base[:, :40])
  with pytest.raises(ValueError, match='cannot be made from'):
    leaf.materialize(base.astype(np.int16))
  # Other classes have other sizes, or other elements come back.
  other = base[::-1].copy()
  try:
    found = leaf.materialize(other)
  except ValueError:
    return
  assert not structured.same_bits(found, target)


def headed(**changes):
  """Returns a function that changes the head of an array of 200 rows of 96."""

  def damage(data):
    head = relative.Head.from_bytes(data, 200 * 96, 96)
    changed = {name: change(getattr(head, name)) for name, change in changes.items()}
    return head._replace(**changed).to_bytes()

  return damage


DAMAGED = [
  ('head', headed(rows=lambda x: x[:-1]), 'of 200 rows and 96'),
  ('head', headed(rows=lambda x: x * 0 + 9000), 'scales must be within'),
  ('head', headed(columns=lambda x: x * 0 + relative.EQUAL), 'marked'),
  ('head', headed(bands=lambda x: x * 0), 'bands cannot have'),
  ('head', headed(bands=lambda x: x * 0 + 255), 'bands cannot have'),
  ('head', headed(shifts=lambda x: x * 0 + 9), 'cannot have'),
  ('head', lambda x: x[:-1], 'the head is not'),
  ('head', lambda x: x * 0, 'the head cannot be read'),
  ('head', lambda x: x.astype(np.int8), "'head' must have"),
  ('head', headed(shifts=lambda x: x * 0 + 1), None),
  ('coded', lambda x: x[:-1], None),
  ('coded', lambda x: x * 0, None),
  ('values', lambda x: x[:-1], None),
  ('values', lambda x: x.astype(np.int32), 'cannot be int32'),
]


def test_damaged_arrays_are_refused(subtests):
  target, base = pair(scale=0.03)
  target[7, :9] = 1e6
  leaf = passes.beside(target, base)
  settings, arrays = leaf.stored()
  for name, damage, message in DAMAGED:
    with subtests.test(name=name, message=message):
      changed = arrays | {name: damage(arrays[name])}
      if message is not None:
        with pytest.raises(ValueError, match=message):
          type(leaf).from_stored(settings, changed)
        continue
      again = type(leaf).from_stored(settings, changed)
      with pytest.raises(ValueError, match=r'raw bits|cannot be|table|symbol|message'):
        again.materialize(base)


SETTINGS = [
  {'lengths': [200, 97]},
  {'lengths': [1 << 30] * 5},
  {'lengths': [2] * 40},
  {'name': 'object'},
  {'name': 'no such dtype'},
  {'name': 'datetime64[s]'},
  {'name': '(01,2)f4'},
  {'name': 'float64'},
  {'name': 'U3'},
  {'name': 'int8'},
  {'width': 95},
  {'width': 0},
  {'first': 20000},
  {'unit': 1000},
]


def test_damaged_settings_are_refused(subtests):
  for damage in SETTINGS:
    with subtests.test(damage=damage):
      target, base = pair(scale=0.03)
      leaf = passes.beside(target, base)
      settings, arrays = leaf.stored()
      with pytest.raises(ValueError, match=r'cannot|must|not|too large|no differences'):
        type(leaf).from_stored(settings | damage, arrays)


def test_an_array_without_elements_has_no_wide_rows():
  head = zlib.compress(bytes([1, 1, 0]) + bytes(2000))
  with pytest.raises(ValueError, match='cannot have rows of 1000'):
    relative.Head.from_bytes(np.frombuffer(head, np.uint8), 0, 1000)


def test_damaged_patches_are_refused():
  target, base = pair(shape=(30, 20))
  target[0], target[2:] = base[0], base[2:]
  leaf = patched(target, base)
  settings, arrays = leaf.stored()
  for damage, message in (
    ({'changes': leaf.changes - 1}, 'cannot be in|table|block|message'),
    ({'changes': 601}, 'cannot have 601 changes'),
    ({'gaps': 601}, 'and 601 gaps'),
    ({'lengths': [1, 20]}, 'has no element'),
    ({'shift': 25}, 'shift'),
    ({'parts': leaf.parts[:-1]}, 'cannot be in'),
  ):
    with pytest.raises(ValueError, match=message):
      type(leaf).from_stored(settings | damage, arrays).materialize(base)
  values = {'values': np.zeros(1, np.int16)}
  with pytest.raises(ValueError, match='changed elements'):
    type(leaf).from_stored(settings, arrays | values).materialize(base)
  values = {'values': np.zeros(1, np.int32)}
  with pytest.raises(ValueError, match='cannot be int32'):
    type(leaf).from_stored(settings, arrays | values)


def test_rounding_and_functions_leave_the_leaf_as_it_is():
  target, base = pair()
  leaf = passes.beside(target, base)
  assert structured.same_bits(leaf.astype(np.float32), leaf)
  with pytest.raises(ValueError, match='cannot be made'):
    leaf.check_needed((3, 96, 1))


@pytest.mark.parametrize('number', [-np.inf, np.nan])
def test_a_column_without_finite_numbers(number):
  target, base = pair('float32', (4096, 64))
  target[:, 0] = base[:, 0] = number
  assert_comes_back(target, base, 'relative')


def test_float64_is_rounded_to_the_dtype_of_the_target():
  base = np.random.default_rng(0).normal(size=(100, 100))
  data = rotbits_jax.encode({'w': base.astype(np.float32)}, base={'w': base})
  assert list(rotbits_jax.inspect(data).needs) == ['w']
  assert len(data) < 2000


@pytest.mark.parametrize(
  'shape', [(7, 3, 600_000), (2, 300_000, 4), (0, 3, 5), (3, 0, 5)]
)
def test_products_of_factors_are_exact_however_they_are_divided(shape):
  rows, rank, columns = shape
  rng = np.random.default_rng(0)
  make = lambda shape: rng.integers(-(1 << 15), 1 << 15, shape)
  left, right = make((rows, rank)), make((rank, columns))
  found = host.small_products(left.astype(np.float64), right.astype(np.float64))
  np.testing.assert_array_equal(found, left @ right)
