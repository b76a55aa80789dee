"""`verify` names damaged tensors and other models, and accepts an undamaged file."""

import functools
import json
import pathlib
import struct
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import structured
from rotbits_jax.file import verification
from rotbits_jax.file import writer

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
NAME = 'llama-tiny-sliced-head-0.25'


@functools.cache
def _encoded(preset):
  return rotbits_jax.encode(checkpoints.open_checkpoint(TESTDATA / NAME), preset=preset)


def flipped(data, stream):
  """Returns the file with one bit in the middle of a stream flipped."""
  (length,) = struct.unpack('<Q', data[:8])
  begin, end = json.loads(data[8 : 8 + length])[stream]['data_offsets']
  damaged = bytearray(data)
  damaged[8 + length + (begin + end) // 2] ^= 1
  return bytes(damaged)


class VerifyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def changed(self, change):
    """Returns the checkpoint with other parameters."""
    checkpoint = checkpoints.load_checkpoint(TESTDATA / NAME)
    layers = list(checkpoint.model.layers())
    change(layers)
    model = rotbits_jax.models.from_layers(
      checkpoint.model.config, checkpoint.model.outer(), layers, {}
    )
    saved = checkpoint._replace(model=model)
    checkpoints.save_checkpoint(saved, self.folder / 'x')
    return self.folder / 'x'

  def test_tokens_that_are_not_finite_are_not_compared(self):
    checkpoint = checkpoints.load_checkpoint(TESTDATA / NAME)
    checkpoint.model.params['embed']['tokens'][1::2] = np.nan
    checkpoints.save_checkpoint(checkpoint, self.folder / 'x')
    data = rotbits_jax.encode(checkpoint, preset='free')
    found = rotbits_jax.verify(data, against=self.folder / 'x')
    self.assertLess(found.kl, 10 * found.kl_rerounded)

  @parameterized.parameters('exact', 'free')
  def test_a_whole_file(self, preset):
    result = rotbits_jax.verify(_encoded(preset))
    self.assertEqual((result.records, result.files), (5, 3))
    self.assertEqual(result.tensors, 29)
    self.assertFalse(result.same_bits)
    self.assertIsNone(result.kl)

  def test_exact_has_the_checkpoints_bits(self):
    self.assertTrue(
      rotbits_jax.verify(_encoded('exact'), against=TESTDATA / NAME).same_bits
    )

  def test_free_has_the_checkpoints_function(self):
    result = rotbits_jax.verify(_encoded('free'), against=TESTDATA / NAME)
    self.assertFalse(result.same_bits)
    self.assertLess(result.kl, 10 * result.kl_rerounded)

  def test_numbers_that_cannot_be_rotated(self):
    def change(layers):
      layers[1]['mlp']['down']['kernel'][0] = 6e4  # finite in float16

    path = self.changed(change)
    data = rotbits_jax.encode(checkpoints.open_checkpoint(path), preset='free')
    found = rotbits_jax.verify(data, against=path)
    self.assertTrue(np.isfinite(found.kl_rerounded))

  def test_one_other_bit_is_named(self):
    def change(layers):
      kernel = np.array(layers[1]['mlp']['up']['kernel'])
      kernel.view(np.uint16)[3, 5] ^= 1
      layers[1]['mlp']['up']['kernel'] = kernel

    with self.assertRaisesRegex(
      rotbits_jax.ContainerError, 'layers.1/mlp/up/kernel: differs'
    ):
      rotbits_jax.verify(_encoded('exact'), against=self.changed(change))

  def test_another_function_is_named(self):
    def change(layers):
      layers[1]['mlp']['up']['kernel'] = -layers[1]['mlp']['up']['kernel']

    error = rotbits_jax.ContainerError
    with self.assertRaisesRegex(error, 'its function is another one'):
      rotbits_jax.verify(_encoded('free'), against=self.changed(change))

  def test_another_file_is_named(self):
    path = self.changed(lambda layers: None)
    (path / 'generation_config.json').write_text('{}')
    for preset in ('exact', 'free'):
      with self.assertRaisesRegex(rotbits_jax.ContainerError, 'generation_config.json'):
        rotbits_jax.verify(_encoded(preset), against=path)

  def test_another_architecture_is_named(self):
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'config is not that'):
      rotbits_jax.verify(_encoded('exact'), against=TESTDATA / 'llama-tiny-dense')

  @parameterized.parameters('layers.2', 'embed', 'files/config.json')
  def test_damage_that_the_header_does_not_show(self, stream):
    data = flipped(_encoded('free'), stream)
    rotbits_jax.inspect(data)
    with self.assertRaisesRegex(rotbits_jax.ContainerError, stream):
      rotbits_jax.verify(data)

  def test_a_pytree(self):
    tree = {'a': {'x': np.arange(6.0)}, 'b': np.ones((2, 3), np.float16)}
    data = rotbits_jax.encode(tree, preset='exact')
    self.assertEqual(rotbits_jax.verify(data).tensors, 2)


class EncodeCheckTest(absltest.TestCase):
  def test_a_file_that_decodes_to_something_else_never_appears(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    output = folder / 'model.rotbits'
    real = writer.encode_record

    def encode_record(record, *args):
      flat = structured.flatten(record.params)
      if record.name == 'layers.1':
        flat['layers.1/mlp/up/kernel'] = -flat['layers.1/mlp/up/kernel']
      return real(record._replace(params=structured.unflatten(flat)), *args)

    output.write_text('the old file')
    faulty = absltest.mock.patch.object(writer, 'encode_record', encode_record)
    with (
      faulty,
      self.assertRaisesRegex(rotbits_jax.ContainerError, 'mlp/up/kernel: differs'),
    ):
      rotbits_jax.encode_to_file(TESTDATA / NAME, output, preset='exact', check=True)
    self.assertEqual([path.name for path in folder.iterdir()], ['model.rotbits'])
    self.assertEqual(output.read_text(), 'the old file')

  def test_shards_are_checked_before_they_appear(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = folder / 'model.rotbits'
    with absltest.mock.patch.object(
      verification, 'read_all', side_effect=verification.read_all
    ) as spy:
      rotbits_jax.encode_to_file(
        TESTDATA / NAME, path, preset='exact', shard_size=500_000, check=True
      )
    self.assertEqual(spy.call_count, 1)
    self.assertTrue(rotbits_jax.verify(path, against=TESTDATA / NAME).same_bits)


if __name__ == '__main__':
  absltest.main()
