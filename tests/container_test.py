"""The file is valid safetensors, the same every time, and notices damage anywhere."""

import os
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import safetensors.numpy

from rotbits_jax.file import container

MANIFEST = {'preset': 'exact', 'units': [{'name': 'ü'}]}
STREAMS = {
  'b/raw': np.arange(13, dtype=np.uint8),
  'a/rans': np.arange(7, dtype=np.uint16) * 9000,
  'empty': np.zeros(0, np.uint8),
}


class ContainerTest(parameterized.TestCase):
  def test_round_trip(self):
    opened = container.Container(container.pack(MANIFEST, STREAMS))
    self.assertEqual(opened.manifest, MANIFEST)
    for name, stream in STREAMS.items():
      self.assertIn(name, opened)
      np.testing.assert_array_equal(opened.stream(name), stream)
    self.assertEqual(opened.stream_bytes(), 13 + 14)
    with self.assertRaisesRegex(container.ContainerError, 'nothing: no such stream'):
      opened.stream('nothing')

  def test_any_safetensors_library_opens_it(self):
    tensors = safetensors.numpy.load(container.pack(MANIFEST, STREAMS))
    self.assertEqual(set(tensors), set(STREAMS))
    for name, stream in STREAMS.items():
      np.testing.assert_array_equal(tensors[name], stream)

  def test_same_input_gives_same_bytes(self):
    packed = {container.pack(MANIFEST, STREAMS) for _ in range(5)}
    self.assertLen(packed, 1)

  def test_every_flipped_bit_is_noticed(self):
    data = container.pack(MANIFEST, STREAMS)
    for position in range(len(data)):
      damaged = bytearray(data)
      damaged[position] ^= 1 << position % 8
      try:
        opened = container.Container(bytes(damaged))
        same = opened.manifest == MANIFEST
        for name, stream in STREAMS.items():
          same &= np.array_equal(opened.stream(name), stream)
      except container.ContainerError:
        continue
      # Only padding may change without notice.
      self.assertTrue(same, position)

  def test_every_truncation_is_noticed(self):
    data = container.pack(MANIFEST, STREAMS)
    for cut in (*range(len(data)), len(data) + 1):
      with self.assertRaises(container.ContainerError):
        container.Container((data + b'x')[:cut])

  @parameterized.parameters(
    b'', b'{}', b'hello, world, this is no container', b'\0' * 64
  )
  def test_other_files_are_refused(self, data):
    with self.assertRaises(container.ContainerError):
      container.Container(data)

  def test_other_safetensors_files_are_refused(self):
    data = safetensors.numpy.save({'x': np.zeros(3)})
    with self.assertRaisesRegex(container.ContainerError, 'not a rotbits file'):
      container.Container(data)

  def test_later_versions_are_refused(self):
    data = container.pack(MANIFEST, STREAMS).replace(b'"version":"2"', b'"version":"3"')
    with self.assertRaisesRegex(container.ContainerError, 'version 3'):
      container.Container(data)

  def test_files_are_written_whole_or_not_at_all(self):
    directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    path = directory / 'x.rotbits'
    container.write_file(path, b'first')
    container.write_file(path, b'second')
    self.assertEqual(path.read_bytes(), b'second')
    with self.assertRaises(TypeError):
      container.write_file(path, 'not bytes')
    self.assertEqual(path.read_bytes(), b'second')
    self.assertEqual(os.listdir(directory), ['x.rotbits'])
    with self.assertRaises(FileNotFoundError):
      container.write_file(directory / 'missing' / 'x', b'')


if __name__ == '__main__':
  absltest.main()
