"""Tests of arrays that were quantised before, see `quantisers`."""

import itertools
import subprocess
import sys
import zlib

from absl.testing import parameterized
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from benchmarks import quantised
import rotbits_jax
from rotbits_jax import quantisers
from rotbits_jax import structured
from rotbits_jax.quantisers import search

BF16, F32 = ml_dtypes.bfloat16, np.float32
through = quantised.through


def weights(rows: int = 256, columns: int = 384, seed: int = 0) -> np.ndarray:
  """Returns normal numbers whose rows differ in size, float32."""
  rng = np.random.default_rng(seed)
  sizes = np.exp(rng.normal(size=(rows, 1)) / 4) / 30
  return (rng.normal(size=(rows, columns)) * sizes).astype(F32)


def zero_points(array):
  """Quantises groups of 128 to 0 to 15 with an integer zero point, as GPTQ does."""
  groups = array.reshape(-1, 128)
  least, most = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
  scales = quantised.rounded(np.float16)((most - least) / F32(15))
  zeros = np.rint(-least / scales)
  codes = np.clip(np.rint(groups / scales) + zeros, 0, 15)
  return ((codes - zeros + F32(0)) * scales).reshape(array.shape)


def minima(array, bits=4):
  """Quantises groups of 64 to codes above their minimum, as MLX does."""
  groups, most = array.reshape(-1, 64), (1 << bits) - 1
  least, greatest = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
  scales, least = HALF((greatest - least) / F32(most)), HALF(least)
  codes = np.clip(np.rint((groups - least) / scales), 0, most)
  return (codes * scales + least).reshape(array.shape)


INT4, E4M3 = quantised.integers(7), quantised.rounded(ml_dtypes.float8_e4m3fn)
BLOCKS = through((128, 128), E4M3, 448)
INT8 = quantised.integers(127), 127
LOWEST = lambda x: np.clip(np.rint(x), -128, 127) + F32(0)
E5M2 = quantised.rounded(ml_dtypes.float8_e5m2), 57344
HALF = quantised.rounded(BF16)
# A quantiser, the grid and the block that are found, and bits.
SCHEMES = {
  'int8_tensor': (through((0, 0), *INT8), 'int8', (256, 384), 7),
  'int8_rows': (through((1, 0), *INT8), 'int8', (1, 384), 7.6),
  'int8_rows_bf16': (through((1, 0), *INT8, HALF), 'int8', (1, 384), 7.6),
  'int8_rows_lowest': (through((1, 0), LOWEST, 128), 'int8', (1, 384), 7.55),
  'int8_columns': (through((0, 1), *INT8), 'int8', (256, 1), 7.6),
  'int8_16': (through((1, 16), *INT8), 'int8', (1, 16), 10),
  'int8_32_e4m3': (
    *(through((1, 32), *INT8, quantised.two_scales), 'int8', (1, 32), 8),
  ),
  'fake_int8': (through((1, 0), np.rint, 127), 'int8', (1, 384), 7.6),
  'e4m3_tensor': (through((0, 0), E4M3, 448), 'float8_e4m3fn', (256, 384), 6.9),
  'e4m3_blocks': (BLOCKS, 'float8_e4m3fn', (128, 128), 6.9),
  'e5m2_rows': (through((1, 0), *E5M2), 'float8_e5m2', (1, 384), 6.3),
  'int4_128': (through((1, 128), INT4, 7), 'int4', (1, 128), 3.7),
  'int4_64_columns': (through((64, 1), INT4, 7), 'int4', (64, 1), 3.9),
  'int4_32_bf16': (through((1, 32), INT4, 7, HALF), 'int4', (1, 32), 4.2),
  'int4_rows': (through((1, 0), INT4, 7), 'int4', (1, 384), 3.5),
  'int6_64': (through((1, 64), quantised.integers(31), 31), 'int8', (1, 64), 6.3),
  'zero_points': (zero_points, 'int4', (1, 128), 3.9),
  'minima': (minima, 'int4', (1, 64), 4.4),
  'minima_3': (lambda x: minima(x, 3), 'int4', (1, 64), 3.4),
  'minima_5_columns': (lambda x: minima(x.T, 5).T, 'int8', (64, 1), 5.6),
  'minima_columns': (lambda x: minima(x.T).T, 'int4', (64, 1), 4.4),
  'mxfp4': (quantised.QUANTISERS['MXFP4'], 'float4_e2m1fn', (1, 32), 4.2),
  'nvfp4': (quantised.QUANTISERS['NVFP4'], 'float4_e2m1fn', (1, 16), 4.5),
}


class FindTest(parameterized.TestCase):
  """Codes and scales of arrays that were quantised."""

  @parameterized.parameters(*SCHEMES)
  def test_every_bit_comes_back(self, scheme):
    quantiser, grid, block, most = SCHEMES[scheme]
    for dtype in (BF16, np.float16, F32):
      with self.subTest(dtype=dtype):
        array = quantiser(weights()).astype(dtype)
        leaf = quantisers.find(array)
        self.assertIsNotNone(leaf)
        self.assertEqual((leaf.grid, leaf.block), (grid, block))
        self.assertTrue(structured.same_bits(leaf.materialize(), array))
        data = rotbits_jax.encode({'x': array})
        self.assertTrue(structured.same_bits(rotbits_jax.decode(data)['x'], array))
        self.assertLess(8 * len(data) / array.size, most)

  def test_dense_weights_have_no_codes(self):
    for array in weights(), weights().T, np.abs(weights()) ** 3:
      for dtype in (BF16, np.float16, F32):
        self.assertIsNone(quantisers.find(array.astype(dtype)))

  def test_negative_zeros_leave_no_place_for_the_lowest_code(self):
    array = SCHEMES['fake_int8'][0](weights())
    array[0] = F32(1 / 8)
    array[0, 7] = -16  # the code -128
    leaf = quantisers.find(array)
    self.assertEqual((leaf.numbers.dtype, leaf.ones_complement), (np.int8, True))
    self.assertLen(leaf.exceptions, 1)
    self.assertTrue(structured.same_bits(leaf.materialize(), array))

  def test_exceptions(self):
    array = SCHEMES['int4_128'][0](weights()).astype(BF16)
    flat = array.reshape(-1)
    flat[[0, 5, 70000]] = [np.nan, np.inf, 0.021]
    leaf = quantisers.find(array)
    self.assertLen(leaf.exceptions, 3)
    self.assertTrue(structured.same_bits(leaf.materialize(), array))

  def test_blocks_may_be_cut(self):
    array = np.pad(weights(), [(0, 128), (0, 128)])
    array = BLOCKS(array)[:300, :400].astype(BF16)
    leaf = quantisers.find(array)
    self.assertEqual(leaf.scales.shape, (3, 4))
    self.assertTrue(structured.same_bits(leaf.materialize(), array))
    rows = SCHEMES['int4_128'][0](weights())[:, :300].astype(BF16)
    for array, block in ((rows, (1, 128)), (rows.T, (128, 1))):
      leaf = quantisers.find(array)
      self.assertEqual(leaf.block, block)
      self.assertTrue(structured.same_bits(leaf.materialize(), array))

  def test_groups_of_one_row(self):
    array = SCHEMES['int4_128'][0](weights()).reshape(1, -1).astype(BF16)
    settings, _ = quantisers.find(array).stored()
    form = quantisers.form(settings, array.shape, [])
    self.assertEqual(form, 'int4, groups of 128')

  def test_many_zeros(self):
    array = weights() * (weights(seed=1) > 0.01)
    array = through((1, 64), *INT8)(array).astype(BF16)
    self.assertEqual(quantisers.find(array).block, (1, 64))

  @pytest.mark.slow
  def test_more_groups_with_minima_than_float32_counts(self):
    blocks = np.broadcast_to(np.array([[[0]], [[1]]], BF16), (2, 1, (1 << 23) + 32))
    _, codes, *_ = search._code_bounds(blocks, 2)
    self.assertTrue((codes == blocks[:, 0]).all())

  def test_experts(self):
    array = np.stack([SCHEMES['int4_128'][0](weights(seed=i)) for i in range(3)])
    leaf = quantisers.find(array.astype(BF16))
    self.assertEqual(leaf.shape, (3, 256, 384))
    self.assertTrue(structured.same_bits(leaf.materialize(), array.astype(BF16)))


def test_a_partly_quantised_checkpoint(tmp_path):
  tensors = {f'{i}.attention.weight': weights(seed=i).astype(BF16) for i in range(2)}
  for i, scheme in enumerate(['e4m3_blocks', 'minima']):
    tensors[f'{i}.mlp.weight'] = SCHEMES[scheme][0](weights(seed=9)).astype(BF16)
  path, output = tmp_path / 'model.safetensors', tmp_path / 'model.rotbits'
  safetensors_numpy.save_file(tensors, path)
  rotbits_jax.encode_to_file(path, output)
  assert structured.same_bits(rotbits_jax.load(output), tensors)
  notes = rotbits_jax.inspect(output).notes['quantised before']
  assert [x['tensor'] for x in notes] == ['0.mlp.weight', '1.mlp.weight']
  forms = 'float8_e4m3fn, blocks of 128 x 128', 'int4, groups of 64, with minima'
  assert tuple(x['form'] for x in notes) == forms
  assert 6 < notes[0]['bits'] < 7


def test_a_fine_tune_beside_a_quantised_base():
  base = {'a': {'w': SCHEMES['int4_128'][0](weights()).astype(BF16)}}
  step = weights(seed=1) / 500
  tuned = {'a': {'w': (base['a']['w'].astype(F32) + step).astype(BF16)}}
  other = {'a': {'w': SCHEMES['int4_128'][0](weights() + step).astype(BF16)}}
  sizes = {}
  for name, tree, beside in (
    ('tuned', tuned, base),
    ('same', base, base),
    ('alone', other, None),
    ('requantised', other, base),
  ):
    data = rotbits_jax.encode(tree, base=beside)
    decoded = rotbits_jax.decode(data, base=beside)
    assert structured.same_bits(decoded, tree)
    sizes[name] = 8 * len(data) / step.size
  assert sizes['tuned'] < 6
  assert sizes['same'] < 0.2
  assert sizes['requantised'] < sizes['alone'] + 0.05


def test_a_reader_in_a_fresh_process(tmp_path):
  array = SCHEMES['int8_rows'][0](weights())
  path = tmp_path / 'x.rotbits'
  rotbits_jax.encode_to_file({'x': array}, path)
  program = (
    'import sys, zlib; from rotbits_jax.file import Reader; '
    'print(zlib.crc32(Reader(sys.argv[1]).tensor("x").tobytes()))'
  )
  command = [sys.executable, '-c', program, str(path)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert not done.returncode, done.stderr
  assert int(done.stdout) == zlib.crc32(array.tobytes())


def test_arrays_in_any_order(monkeypatch):
  cls, tree = quantisers.BlockQuantized, {'w': SCHEMES['int4_128'][0](weights(1024))}
  turned = lambda x, f=cls.stored: (f(x)[0], dict(reversed(f(x)[1].items())))
  monkeypatch.setattr(cls, 'stored', turned)
  assert structured.same_bits(rotbits_jax.decode(rotbits_jax.encode(tree)), tree)


class LeafTest(parameterized.TestCase):
  """What `BlockQuantized` computes, and what it refuses."""

  def test_large_arrays(self):
    matrix, rng = (1024, 1056), np.random.default_rng(0)
    codes = rng.integers(-16, 16, matrix).astype(np.int8)
    numbers = np.where(codes < 0, -F32(~codes), codes)
    # With the least scales, many sums are subnormal.
    for exponent, block in itertools.product(
      (-110, -80, 110), [(1, 16), (128, 128), (1, 48), (64, 1)]
    ):
      shape = [-(-n // m) for n, m in zip(matrix, block, strict=True)]
      places = np.ix_(*(np.arange(n) // m for n, m in zip(matrix, block, strict=True)))
      scales = np.exp2(rng.uniform(exponent, exponent + 16, shape)).astype(F32)
      minima = np.where(rng.random(shape) < 0.2, 0, F32(3.000001) * scales)
      with np.errstate(over='ignore'):
        sums = numbers * scales[places] + minima[places]
        arrays = [sums.astype(dtype) for dtype in (BF16, F32)]
      for array in arrays:
        out = np.empty_like(array)
        leaf = quantisers.BlockQuantized(
          numbers=codes,
          grid='int4',
          name=array.dtype.name,
          block=block,
          scales=scales.view(np.uint32),
          minima=minima.view(np.uint32),
          ones_complement=True,
        )
        crc32 = leaf.write(out)
        self.assertEqual(crc32, zlib.crc32(out))
        self.assertTrue(structured.same_bits(out, array), (exponent, block))

  def test_negative_zeros_of_large_arrays(self):
    codes = np.tile(np.int8([-1, 0, 1, -3]), (1 << 14, 16))
    array = np.tile(F32([-0.0, 0, 0.75, -1.5]), (1 << 14, 16))
    for dtype in (BF16, F32):
      leaf = quantisers.BlockQuantized(
        numbers=codes,
        grid='int4',
        name=np.dtype(dtype).name,
        block=codes.shape,
        scales=np.array([[0.75]], F32).view(np.uint32),
        ones_complement=True,
      )
      self.assertTrue(structured.same_bits(leaf.materialize(), array.astype(dtype)))

  @parameterized.parameters('float8_e4m3fn', 'float8_e5m2')
  def test_float8_of_large_arrays(self, grid):
    most = ml_dtypes.finfo(grid).max.astype(grid).view(np.uint8)
    bits = np.arange(1 << 21, dtype=np.uint8).reshape(-1, 512)
    numbers = np.where(bits & 127 > most, 0, bits).astype(np.uint8).view(grid)
    array = (numbers.astype(F32) * F32(1.2)).astype(BF16)
    array[[0, 1000], [3, 5]] = np.inf
    leaf = quantisers.BlockQuantized(
      numbers=numbers,
      grid=grid,
      name='bfloat16',
      block=numbers.shape,
      scales=np.array([[1.2]], F32).view(np.uint32),
      gaps=np.uint32([3, 1000 * 512 + 1]),
      exceptions=np.full(2, np.inf, BF16),
    )
    self.assertTrue(structured.same_bits(leaf.materialize(), array))

  def test_content_that_does_not_fit(self):
    array = SCHEMES['nvfp4'][0](weights()).astype(BF16)
    array[0, 0] = np.inf
    leaf = quantisers.find(array)
    cls, (settings, arrays) = type(leaf), leaf.stored()
    cls.from_stored(settings, arrays)
    scales = arrays['scales']
    of_bits = lambda x: {
      'scales': np.full(scales.shape, np.array(x, F32).view(np.uint32)),
      'scale_form': (0, 0),
      'factor': None,
    }
    wrong = [
      *(of_bits(x) for x in (0, 1e-38, np.nan, np.inf, -1.0)),
      *({'scale_form': x} for x in ((0, 20), (-5000, 20), (0, 24), (1 << 31, 0))),
      *({'scales': x} for x in (scales.astype(np.int8), scales[1:], scales[:, :-1])),
      {'scales': np.full_like(scales, 255), 'scale_form': (0, 23)},
      *({'factor': np.array(x, F32)} for x in (0, np.nan, np.inf, -1.0)),
      *({'numbers': np.full_like(arrays['numbers'], x)} for x in (16, -17)),
      *({'numbers': arrays['numbers'].astype(x)} for x in (BF16, np.float16)),
      *({'grid': x} for x in ('float8_e4m3fn', 'int3')),
      {'numbers': arrays['numbers'][0]},
      *({'gaps': x} for x in (np.full_like(arrays['gaps'], array.size), None)),
      {'exceptions': arrays['exceptions'].astype(F32)},
      *({'block': x} for x in ((1, 0), (0, 16), (1,), (1, 32), (1, 16, 1))),
      {'minima': np.full_like(scales, 255), 'minimum_form': (0, 23)},
      *({'minima': x} for x in (np.zeros_like(scales[1:]), scales.astype(F32))),
      {'name': 'float8_e4m3fn'},
    ]
    for change in wrong:
      names, several = {*arrays, 'minima'}, (arrays | change).items()
      fields = {key: x for key, x in several if key in names and x is not None}
      others = {key: x for key, x in change.items() if key not in names}
      with self.assertRaises(ValueError, msg=repr(change)):
        cls.from_stored(settings | others, fields).materialize()

  def test_numbers_that_a_grid_does_not_have(self):
    for scheme, dtype, code in (
      *(('e4m3_tensor', np.uint8, x) for x in (0x7F, 0xFF)),
      *(('e5m2_rows', np.uint8, x) for x in (0x7C, 0xFC)),
    ):
      leaf = quantisers.find(SCHEMES[scheme][0](weights()).astype(BF16))
      settings, arrays = leaf.stored()
      arrays['numbers'].view(dtype)[-1, -1] = code
      with self.assertRaises(ValueError):
        type(leaf).from_stored(settings, arrays).materialize()
