"""A chain of transforms: numbers are rounded once, and every saving is counted."""

import dataclasses

from absl.testing import absltest
from flax import struct
import jax
import ml_dtypes
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.symmetries import transform
from tests import random_models


def _scaled(factor):
  """Multiplies all parameters."""

  def apply(model):
    params = jax.tree.map(lambda x: x * np.float32(factor), model.params)
    return dataclasses.replace(model, params=params), []

  return symmetries.Transform(f'times {factor}', apply)


def _seen(formats):
  """Notes what numbers a transform gets."""

  def apply(model):
    formats.append(
      (transform.storage_format(model), model.params['head']['kernel'].dtype)
    )
    return model, []

  return symmetries.Transform('seen', apply)


@struct.dataclass
class _Kept(structured.Structured):
  """A leaf whose numbers are not to be rounded."""

  kind = 'test.kept'
  values: np.ndarray

  @property
  def shape(self):
    return self.values.shape

  @property
  def dtype(self):
    return self.values.dtype

  def materialize(self):
    return self.values

  def astype(self, dtype):
    return self

  def stored(self):
    return {}, {'values': self.values}

  @classmethod
  def from_stored(cls, settings, arrays):
    return cls(arrays['values'])


class RunChainTest(absltest.TestCase):
  def test_numbers_are_rounded_once(self):
    model = random_models.sliced_llama([18] * 3, np.float16)
    thirds, _ = symmetries.run_chain((_scaled(1 / 3), _scaled(3)), model)
    for before, after in zip(
      jax.tree.leaves(model.params), jax.tree.leaves(thirds.params), strict=True
    ):
      np.testing.assert_array_equal(before, after)
    self.assertIsNone(thirds.stored_as)

  def test_transforms_see_float32_and_know_the_format(self):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
      formats = []
      model = random_models.sliced_llama([18] * 3, dtype)
      symmetries.run_chain((_seen(formats),), model)
      self.assertEqual(formats, [(np.dtype(dtype), np.float32)])
      symmetries.run_chain((_seen(formats),), model, widen=False)
      self.assertEqual(formats[1], (np.dtype(dtype), np.dtype(dtype)))

  def test_every_leaf_gets_its_own_format_back(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    layers = list(model.layers())
    layers[1]['mlp']['up'] = jax.tree.map(np.float32, layers[1]['mlp']['up'])
    mixed = models.from_layers(model.config, model.outer(), layers)
    formats = [str(x.dtype) for _, x in transform.leaves(mixed)]
    self.assertIn('float32', formats)
    again, _ = symmetries.run_chain((_scaled(1),), mixed)
    self.assertEqual([str(x.dtype) for _, x in transform.leaves(again)], formats)
    for (path, before), (_, after) in zip(
      transform.leaves(mixed), transform.leaves(again), strict=True
    ):
      np.testing.assert_array_equal(before, after, err_msg=path)

  def test_a_leaf_may_keep_its_numbers(self):
    def keep(model):
      head = {'kernel': _Kept(np.asarray(model.params['head']['kernel']) / 3)}
      return dataclasses.replace(model, params=model.params | {'head': head}), []

    model = random_models.sliced_llama([18] * 3, np.float16)
    kept, (saving,) = symmetries.run_chain((symmetries.Transform('keep', keep),), model)
    self.assertEqual(kept.params['head']['kernel'].dtype, np.float32)
    self.assertEqual(saving.numbers, 0)
    self.assertEqual(saving.bytes, -2 * model.params['head']['kernel'].size)

  def test_a_model_that_is_not_rounded_yet_is_rounded_once(self):
    model = random_models.sliced_llama([18] * 3, np.float32)
    unrounded = dataclasses.replace(model, stored_as='float16')
    expected = jax.tree.map(np.float16, model.params)
    tripled, (saving,) = symmetries.run_chain((_scaled(3),), unrounded)
    np.testing.assert_array_equal(
      tripled.params['head']['kernel'],
      np.float16(3 * model.params['head']['kernel']),
    )
    self.assertEqual((saving.numbers, saving.bytes), (0, 0))
    numbers, size = symmetries.count(unrounded)
    self.assertEqual(size, 2 * numbers)
    for a, b in zip(
      jax.tree.leaves(symmetries.rounded(unrounded).params),
      jax.tree.leaves(expected),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)

  def test_savings_add_up(self):
    model = random_models.sliced_llama([18] * 5, np.float16)
    chain = (symmetries.remove_gauge(), symmetries.remove_global_gauge())
    after, savings = symmetries.run_chain(chain, model)
    numbers, size = symmetries.count(model)
    self.assertEqual(
      symmetries.count(after),
      (
        numbers - sum(s.numbers for s in savings),
        size - sum(s.bytes for s in savings),
      ),
    )
    self.assertGreater(min(s.numbers for s in savings), 0)


if __name__ == '__main__':
  absltest.main()
