"""Checks of every transform on every family.

To add a transform to all these tests, add it to `tests.cases.transforms`.
"""

import functools

from absl.testing import parameterized
import jax
import numpy as np
import pytest

from rotbits_jax import passes
from rotbits_jax import structured
from tests import cases
from tests import transform_checks

TRAINED = 'opt-small-sliced-0.2'  # larger than the others
TINY = [name for name in cases.CHECKPOINTS if name != TRAINED]
TRANSFORMS = cases.transforms()
TRANSFORMS.pop('exactly tied embedding')


@functools.cache
def _applied(transform, checkpoint):
  model, (saving,) = passes.run_chain((transform,), cases.load(checkpoint).model)
  return model, saving.notes


@functools.cache
def _logits(checkpoint, transform=None, *, rerounded=False):
  model = cases.load(checkpoint).model
  if transform is not None:
    model, _ = _applied(transform, checkpoint)
  if rerounded:
    model = passes.randomly_rotated(model, key=jax.random.key(0))
  reference = np.load(cases.TESTDATA / 'logits' / f'{checkpoint}.npz')
  tokens = reference['input_ids'][:, :24]
  return transform_checks.fast_logits(model, tokens)


class Checks(parameterized.TestCase):
  """Checks that every transform must pass on every checkpoint."""

  def check_all(self, checkpoint):
    for name, transform in TRANSFORMS.items():
      with self.subTest(transform=name):
        self.check_function(transform, checkpoint)
        model, notes = _applied(transform, checkpoint)
        self.check_shapes(model, checkpoint)
        self.check_numbers(model, checkpoint)
        self.check_notes(model, notes)

  def check_function(self, transform, checkpoint):
    """The function is kept to the storage format's rounding."""
    reference = _logits(checkpoint)
    noise = np.abs(_logits(checkpoint, rerounded=True) - reference).mean()
    error = np.abs(_logits(checkpoint, transform) - reference).mean()
    self.assertLessEqual(error, 2 * noise)

  def check_shapes(self, model, checkpoint):
    """Leaves stand for arrays of the same shape and dtype."""
    kinds = lambda m: {p: (x.shape, x.dtype) for p, x in m.leaves()}
    self.assertEqual(kinds(model.materialize()), kinds(cases.load(checkpoint).model))

  def check_numbers(self, model, checkpoint):
    """No more numbers are stored, and all are finite."""
    for count in (structured.count_elements, structured.count_bytes):
      before, after = (
        count(dict(x.leaves())) for x in (cases.load(checkpoint).model, model)
      )
      self.assertLessEqual(after, before)
    for leaf in jax.tree.leaves(model):
      self.assertTrue(np.isfinite(np.float32(leaf)).all())

  def check_notes(self, model, notes):
    """Notes name tensors and count what their leaves store."""
    found = dict(model.leaves())
    for note in notes:
      self.assertEqual(
        note['elements'], structured.count_elements(found[note['tensor']])
      )
      self.assertEqual(tuple(note['shape']), found[note['tensor']].shape)


class TransformsTest(Checks):
  @parameterized.parameters(*TINY)
  def test_all_checks(self, checkpoint):
    self.check_all(checkpoint)


@pytest.mark.slow
class TrainedCheckpointTest(Checks):
  def test_all_checks(self):
    self.check_all(TRAINED)
