"""A quantiser of another library in the chain: the savings remain at 8 bits."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import numpy as np
import pytest
import random_models

import rotbits_jax
from rotbits_jax import evaluation
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured

pytest.importorskip('qwix')
int8 = pytest.importorskip('benchmarks.int8')

TOKENS = np.arange(8)[None]

_logits = jax.jit(models.logits)


def _lower(seed, rows, columns):
  rng = np.random.default_rng(seed)
  return np.tril(rng.standard_normal((rows, columns))).astype(np.float32)


LEAVES = {
  'array': lambda seed: _lower(seed, 6, 5).T,
  'gram': lambda seed: structured.IdentityMinusGram(
    b=_lower(seed, 6, 2 + seed), c=_lower(seed, 6, 0), columns=8
  ),
  'trapezoids': lambda seed: structured.TrapezoidalRows(None, _lower(seed, 8, 5)),
  'low_rank': lambda seed: structured.LowRank(
    _lower(seed, 6, 3), _lower(seed + 1, 7, 3).T
  ),
}


@functools.cache
def _model():
  return random_models.sliced_llama((16, 16, 16, 16, 24), np.float16)


@functools.cache
def _quantized(free):
  chain = (passes.remove_residual_gauge(),) if free else ()
  return passes.run_chain((*chain, int8.quantize_kernels()), _model())


class Int8Test(parameterized.TestCase):
  @parameterized.parameters(*LEAVES)
  def test_every_number_is_rounded_to_a_multiple_of_its_columns_scale(self, name):
    leaf = LEAVES[name](0)
    quantized = int8.quantize(leaf, np.float16)
    arrays = zip(
      jax.tree.leaves(leaf),
      jax.tree.leaves(quantized.values),
      jax.tree.leaves(quantized.scales),
      strict=True,
    )
    for original, value, scale in arrays:
      self.assertEqual((value.dtype, scale.dtype), (np.int8, np.float16))
      self.assertEqual(scale.shape, (1, original.shape[1]))
      if original.size:
        # Eight bits cover the range from -127.5 to 127.5.
        step = np.abs(np.float64(original)).max(axis=0) / 127.5
        np.testing.assert_allclose(scale[0], step, rtol=2**-11)
        self.assertTrue(np.all(np.abs(value * step - original) <= 0.5001 * step))

  @parameterized.parameters(*LEAVES)
  def test_stands_for_what_the_rounded_numbers_stand_for(self, name):
    leaf = LEAVES[name](0)
    quantized = int8.quantize(leaf, np.float32)
    self.assertEqual(quantized.shape, leaf.shape)
    self.assertEqual(quantized.dtype, np.float32)
    product = lambda q, scale: np.float32(np.float64(q) * np.float64(scale))
    rounded = jax.tree.map(product, quantized.values, quantized.scales)
    np.testing.assert_allclose(
      quantized.materialize(), structured.materialize(rounded), atol=1e-5
    )
    # Rounding to eight bits makes a noticeable change.
    error = np.abs(quantized.materialize() - structured.materialize(leaf)).max()
    self.assertBetween(error, 2e-3, 0.2)

  @parameterized.parameters(*LEAVES)
  def test_goes_through_stacks_and_files_bit_for_bit(self, name):
    leaves = [
      jax.device_get(int8.quantize(LEAVES[name](seed), np.float16)) for seed in range(2)
    ]
    stack = int8.Int8.stack(leaves)
    self.assertEqual(stack.shape, (2, *leaves[0].shape))
    for i, leaf in enumerate(leaves):
      chex.assert_trees_all_equal(stack.layer(i), leaf)
      chex.assert_trees_all_equal(int8.Int8.from_stored(*leaf.stored()), leaf)
    matrices = jax.jit(jax.vmap(lambda leaf: leaf.materialize()))(stack)
    for matrix, leaf in zip(matrices, leaves, strict=True):
      np.testing.assert_allclose(
        np.float32(matrix), np.float32(leaf.materialize()), atol=2e-3
      )

  def test_is_not_rounded_again(self):
    leaf = int8.quantize(LEAVES['gram'](0), np.float32)
    self.assertIs(leaf.astype(np.float16), leaf)


class QuantizeKernelsTest(parameterized.TestCase):
  def test_structural_zeros_are_not_stored(self):
    before, _ = passes.run_chain((passes.remove_residual_gauge(),), _model())
    after, savings = _quantized(free=True)
    shortcuts = 0
    for layer, quantized in zip(before.layers(), after.layers(), strict=True):
      for name in ('attention_shortcut', 'mlp_shortcut'):
        leaf, new = layer[name]['kernel'], quantized[name]['kernel']
        shortcuts += leaf.type_name == 'identity_minus_gram'
        self.assertIsInstance(new, int8.Int8)
        scales = sum(x.size for x in jax.tree.leaves(new.scales))
        numbers = structured.count_elements(leaf)
        self.assertEqual(structured.count_elements(new), numbers + scales)
        self.assertEqual(structured.count_bytes(new), numbers + 2 * scales)
    self.assertEqual(shortcuts, 4)
    self.assertEqual(savings[1].name, 'int8')
    self.assertGreater(savings[1].bytes, 0)
    for note in savings[1].notes:
      self.assertEqual(note['form'], 'int8')
      # The identity [I 0] has no numbers to round.
      self.assertTrue(note['error'] == 0 or 1e-4 < note['error'] < 0.02, note)

  @pytest.mark.slow
  def test_less_is_stored_than_without_the_gauge_and_the_function_is_as_close(self):
    reference = _logits(_model(), TOKENS)
    alone, both = _quantized(free=False)[0], _quantized(free=True)[0]
    errors = [np.abs(_logits(m, TOKENS) - reference).mean() for m in (alone, both)]
    self.assertLess(errors[1], 1.5 * errors[0])
    self.assertBetween(errors[0], 1e-3, 0.2)
    sizes = [len(rotbits_jax.encode(model, preset='exact')) for model in (alone, both)]
    self.assertLess(sizes[1], sizes[0])

  @pytest.mark.slow
  def test_file_gives_the_same_model_back(self):
    model, _ = _quantized(free=True)
    decoded = rotbits_jax.decode(rotbits_jax.encode(model, preset='exact'))
    chex.assert_trees_all_equal(decoded.params, model.params)

  @pytest.mark.slow
  def test_table_of_the_benchmark(self):
    checkpoint = rotbits_jax.load_checkpoint(int8.CHECKPOINT)
    text = 'The jargon of hackers, like any other, is a language of its own. ' * 20
    tokens = evaluation.encode_text(checkpoint.files, text)
    table = int8.measure(checkpoint.model, tokens, 128)
    rows = [line.split() for line in table.splitlines()[1:]]
    sizes = [int(row[-4].replace(',', '')) for row in rows]
    self.assertLen(sizes, 4)
    self.assertLess(sizes[3], 0.8 * sizes[2])
    self.assertLess(float(rows[3][-1]), 2 * float(rows[2][-1]))


if __name__ == '__main__':
  absltest.main()
