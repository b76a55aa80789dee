"""Checks of every transform on every family.

To add a transform to all these tests, add a row to `TRANSFORMS`.
"""

import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.symmetries.transform import leaves
from tests import transform_checks

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
CHECKPOINTS = tuple(
  sorted(path.name for path in TESTDATA.iterdir() if (path / 'config.json').exists())
)
TRANSFORMS = {
  t.names[0]: t
  for t in (
    symmetries.remove_residual_gauge(),
    symmetries.retie_embedding(),
    symmetries.remove_biases(),
    symmetries.remove_value_gauge(),
    symmetries.remove_query_key_gauge(),
    symmetries.remove_low_rank_gauge(),
    symmetries.random_rotation(key=jax.random.key(1)),
  )
}


CASES = [
  {
    'testcase_name': f'{t.names[0]}_{checkpoint}',
    'transform': t,
    'checkpoint': checkpoint,
  }
  for t in TRANSFORMS.values()
  for checkpoint in CHECKPOINTS
]


@functools.cache
def _load(checkpoint):
  return checkpoints.load_checkpoint(TESTDATA / checkpoint).model


@functools.cache
def _applied(transform, checkpoint):
  model, (saving,) = symmetries.run_chain((transform,), _load(checkpoint))
  return model, saving.notes


@functools.cache
def _logits(checkpoint, transform=None, *, rerounded=False):
  model = _load(checkpoint)
  if transform is not None:
    before, (model, _) = model, _applied(transform, checkpoint)
    if _same_bits(model, before):
      return _logits(checkpoint)
  if rerounded:
    model = symmetries.randomly_rotated(model, key=jax.random.key(0))
  tokens = np.load(TESTDATA / checkpoint / 'ref_logits.npz')['input_ids'][:, :24]
  return transform_checks.fast_logits(model, tokens)


def _same_bits(a, b):
  x, y = dict(leaves(a)), dict(leaves(b))
  return x.keys() == y.keys() and all(
    isinstance(x[path], np.ndarray) and x[path].tobytes() == y[path].tobytes()
    for path in x
  )


class TransformsTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_function_is_kept_to_the_storage_formats_rounding(
    self, transform, checkpoint
  ):
    reference = _logits(checkpoint)
    noise = np.abs(_logits(checkpoint, rerounded=True) - reference).mean()
    error = np.abs(_logits(checkpoint, transform) - reference).mean()
    self.assertLessEqual(error, 2 * noise)

  @parameterized.named_parameters(*CASES)
  def test_leaves_stand_for_arrays_of_the_same_shape_and_dtype(
    self, transform, checkpoint
  ):
    model = _applied(transform, checkpoint)[0].materialize()
    kinds = lambda m: {p: (x.shape, x.dtype) for p, x in leaves(m)}
    self.assertEqual(kinds(model), kinds(_load(checkpoint)))

  @parameterized.named_parameters(*CASES)
  def test_no_more_numbers_are_stored_and_all_are_finite(self, transform, checkpoint):
    model, _ = _applied(transform, checkpoint)
    before, after = (symmetries.count_model(x) for x in (_load(checkpoint), model))
    self.assertLessEqual(after, before)
    for leaf in jax.tree.leaves(model):
      self.assertTrue(np.isfinite(np.float32(leaf)).all())

  @parameterized.named_parameters(*CASES)
  def test_notes_name_tensors_and_count_what_their_leaves_store(
    self, transform, checkpoint
  ):
    model, notes = _applied(transform, checkpoint)
    found = dict(leaves(model))
    for note in notes:
      self.assertEqual(note['numbers'], structured.count_numbers(found[note['tensor']]))
      self.assertEqual(tuple(note['shape']), found[note['tensor']].shape)


if __name__ == '__main__':
  absltest.main()
