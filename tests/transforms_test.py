"""What every transform promises, checked on every family.

A new transform joins all these tests by a row in `TRANSFORMS`.
"""

import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax import symmetries

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
CHECKPOINTS = tuple(
  sorted(path.name for path in TESTDATA.iterdir() if (path / 'config.json').exists())
)
TRANSFORMS = {'residual gauge': symmetries.remove_gauge()}
CASES = [
  {'testcase_name': f'{name}_{checkpoint}', 'transform': t, 'checkpoint': checkpoint}
  for name, t in TRANSFORMS.items()
  for checkpoint in CHECKPOINTS
]


@functools.cache
def _load(checkpoint):
  return checkpoints.load_checkpoint(TESTDATA / checkpoint).model


@functools.cache
def _applied(transform, checkpoint):
  return transform.apply(_load(checkpoint))


@functools.cache
def _logits(checkpoint, transform=None, *, rerounded=False):
  model = _load(checkpoint)
  if transform is not None:
    model, _ = _applied(transform, checkpoint)
  if rerounded:
    model = symmetries.randomly_rotated(model, key=jax.random.key(0))
  tokens = np.load(TESTDATA / checkpoint / 'ref_logits.npz')['input_ids'][:, :24]
  fast_compile = {'xla_backend_optimization_level': 0}
  return np.asarray(
    jax.jit(models.logits, compiler_options=fast_compile)(model, tokens)
  )


class TransformsTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_function_is_kept_to_the_storage_formats_rounding(
    self, transform, checkpoint
  ):
    reference = _logits(checkpoint)
    if _load(checkpoint).config.sliced:
      noise = np.abs(_logits(checkpoint, rerounded=True) - reference).mean()
    else:
      noise = 0
    error = np.abs(_logits(checkpoint, transform) - reference).mean()
    self.assertLessEqual(error, 2 * noise)

  @parameterized.named_parameters(*CASES)
  def test_leaves_stand_for_arrays_of_the_same_shape_and_dtype(
    self, transform, checkpoint
  ):
    layers = zip(
      _load(checkpoint).layers(),
      _applied(transform, checkpoint)[0].materialize().layers(),
      strict=True,
    )
    for before, after in layers:
      same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after
      )
      self.assertTrue(all(jax.tree.leaves(same)), same)

  @parameterized.named_parameters(*CASES)
  def test_no_more_numbers_are_stored_and_all_are_finite(self, transform, checkpoint):
    model, _ = _applied(transform, checkpoint)
    before, after = symmetries.count(_load(checkpoint)), symmetries.count(model)
    self.assertLessEqual(after, before)
    for leaf in jax.tree.leaves(model):
      self.assertTrue(np.isfinite(np.float32(leaf)).all())

  @parameterized.named_parameters(*CASES)
  def test_notes_name_tensors_and_count_what_their_leaves_store(
    self, transform, checkpoint
  ):
    model, notes = _applied(transform, checkpoint)
    layers = list(model.layers())
    for note in notes:
      layer, name = note['tensor'].split('/')
      leaf = layers[int(layer.removeprefix('layers.'))][name]['kernel']
      self.assertEqual(note['numbers'], structured.count_numbers(leaf))
      self.assertEqual(tuple(note['shape']), leaf.shape)


if __name__ == '__main__':
  absltest.main()
