"""Numbers, shapes and models at the edges of what can be stored."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import ml_dtypes
import numpy as np
import random_models
import transform_checks

import rotbits_jax
from rotbits_jax import models
from rotbits_jax import structured

FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
OTHERS = (np.bool_, np.int8, np.int16, np.int32, np.int64)
OTHERS += (np.uint8, np.uint16, np.uint32, np.uint64)
SHAPE = (96, 80)


def bits(array):
  return array.view(np.dtype(f'u{array.dtype.itemsize}'))


def special_floats(dtype, rng):
  """Arrays of one dtype, by name: values at the edges, alone and among others."""
  dtype = np.dtype(dtype)
  unsigned = np.dtype(f'u{dtype.itemsize}')
  normal = rng.normal(size=SHAPE).astype(dtype)
  mixed = normal.copy()
  mixed[3, 4], mixed[5], mixed[:, 7] = np.nan, np.inf, -np.inf
  bits(mixed)[9, 9] |= 1
  zeros = normal.copy()
  zeros[rng.random(SHAPE) < 0.5] = 0
  zeros[rng.random(SHAPE) < 0.3] *= -1
  small = rng.integers(0, 50, SHAPE).astype(unsigned)
  sign = unsigned.type(1 << (8 * dtype.itemsize - 1))
  greatest = np.full(SHAPE, jax.numpy.finfo(dtype).max, dtype)
  any_bits = np.frombuffer(rng.bytes(normal.nbytes), dtype).reshape(SHAPE)
  return {
    'any bits': any_bits,
    'infinite': np.full(SHAPE, -np.inf, dtype),
    'mixed': mixed,
    'NaN': np.full(SHAPE, np.nan, dtype),
    'zeros': np.zeros(SHAPE, dtype),
    'negative zeros': -np.zeros(SHAPE, dtype),
    'zeros among others': zeros,
    'subnormal': small.view(dtype),
    'negative subnormal': (small | sign).view(dtype),
    'greatest': greatest * np.sign(normal),
  }


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  paths = jax.tree_util.tree_leaves_with_path(actual)
  for (path, a), b in zip(paths, jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path


class TreeTest(parameterized.TestCase):
  def check(self, tree):
    data = rotbits_jax.encode(tree, preset='exact')
    assert_same_bits(rotbits_jax.decode(data), tree)
    assert_same_bits(rotbits_jax.load(data), tree)
    assert_same_bits({k: rotbits_jax.read_record(data, k)[k] for k in tree}, tree)

  @parameterized.parameters(*FLOATS)
  def test_floats(self, dtype):
    self.check({'x': special_floats(dtype, np.random.default_rng(0))})

  def test_every_dtype_in_every_shape(self):
    rng = np.random.default_rng(0)
    shapes = {'()': (), '(0)': (0,), '(3, 0, 2)': (3, 0, 2), '(1, 1)': (1, 1)}
    self.check(
      {
        np.dtype(dtype).name: {
          name: np.asarray(100 * rng.normal(size=shape), dtype)
          for name, shape in (shapes | {'(7, 300)': (7, 300)}).items()
        }
        for dtype in (*FLOATS, *OTHERS)
      }
    )


class ModelTest(parameterized.TestCase):
  """Models with numbers at the edges: `free` keeps what is finite, or falls back."""

  def edited(self, name, edit):
    """A sliced model with one parameter of the first layer changed."""
    model = random_models.sliced_llama((16,) * 3, np.float16)
    layers = list(model.layers())
    flat = structured.flatten(layers[0])
    flat[name] = edit(np.array(flat[name]))
    layers[0] = structured.unflatten(flat)
    return models.from_layers(model.config, model.outer(), layers)

  @parameterized.product(
    name=('attention_shortcut/kernel', 'attention/query/kernel', 'mlp/down/kernel'),
    edit=('zero', 'subnormal', 'greatest'),
  )
  def test_free(self, name, edit):
    def change(x):
      x = {'zero': x * 0, 'subnormal': x * 2.0**-22}.get(edit, np.sign(x) * 65504)
      return x.astype(np.float16)

    model = self.edited(name, change)
    decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset='free'))
    tokens = np.arange(12)[None]
    expected = transform_checks.fast_logits(model, tokens)
    actual = transform_checks.fast_logits(decoded, tokens)
    self.assertTrue(np.isfinite(expected).all())
    np.testing.assert_allclose(actual, expected, atol=0.02 * expected.std())


if __name__ == '__main__':
  absltest.main()
