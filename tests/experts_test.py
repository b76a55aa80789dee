"""Experts of a mixture are records of their own."""

import io
import json
import pathlib
import tempfile
import weakref

from absl.testing import absltest
import jax
import numpy as np

from fuzz import containers
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import container
from rotbits_jax.file import job
from rotbits_jax.file import shards
from rotbits_jax.file import sources
from rotbits_jax.file import writer
from rotbits_jax.system import progress

CHECKPOINT = pathlib.Path(__file__).parent / 'testdata' / 'mixtral-tiny-dense'
UP = 'layers.1.experts.2/mlp/up/kernel'


class ExpertsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.source = checkpoints.open_checkpoint(CHECKPOINT)

  def test_one_is_read_without_the_others(self):
    spy = self.enterContext(
      absltest.mock.patch.object(
        container.StreamReader,
        'checked',
        autospec=True,
        side_effect=container.StreamReader.checked,
      )
    )
    found = rotbits_jax.read_tensor(rotbits_jax.encode(self.source), UP)
    names = [call.args[1] for call in spy.mock_calls]
    self.assertEqual(names, ['manifest', 'layers.1.experts.2'])
    expected = self.source.layer(1)['mlp']['up']['kernel'][2]
    self.assertTrue(structured.same_bits(found, expected))

  def test_few_are_in_memory(self):
    alive, most = [], []
    real = checkpoints.CheckpointReader.read

    def read(source, record):
      found = real(source, record)
      if 'experts' in record:
        alive.extend(map(weakref.ref, jax.tree.leaves(found)))
        most.append(sum(x() is not None for x in alive))
      return found

    with absltest.mock.patch.object(checkpoints.CheckpointReader, 'read', read):
      for preset in ('exact', 'free'):
        rotbits_jax.encode_to_file(self.source, self.folder / 'x', preset=preset)
    kernels = 3
    self.assertLessEqual(max(most), 4 * kernels)

  def test_a_layer_is_continued_and_divided(self):
    output, real = self.folder / 'x', writer.encode_record
    given = {'preset': 'free', 'shard_size': 30_000}

    def encode_record(record, *args):
      if record.name == 'layers.1.experts.1':
        raise KeyboardInterrupt
      return real(record, *args)

    stopped = absltest.mock.patch.object(writer, 'encode_record', encode_record)
    with stopped, self.assertRaises(KeyboardInterrupt):
      rotbits_jax.encode_to_file(self.source, output, **given)
    spy = absltest.mock.Mock(wraps=real)
    with absltest.mock.patch.object(writer, 'encode_record', spy):
      rotbits_jax.encode_to_file(self.source, output, **given)
    names = {call.args[0].name for call in spy.mock_calls}
    experts = {f'layers.1.experts.{i}' for i in (1, 2, 3)}
    self.assertEqual(names, experts | {'embed', 'final_norm', 'head'})
    with file.Reader(output) as reader:
      homes = reader._records.files
      self.assertNotEqual(homes['layers.0'].name, homes['layers.0.experts.3'].name)
      found = reader.read()
    expected = rotbits_jax.decode(rotbits_jax.encode(self.source, preset='free'))
    for path, leaf in expected.leaves():
      self.assertTrue(structured.same_bits(dict(found.leaves())[path], leaf), path)

  def test_a_process_may_begin_within_a_layer(self):
    with file.Reader(rotbits_jax.encode(self.source, preset='free')) as reader:
      checksums = {name: record.crc32 for name, record in reader.records.items()}
      sizes = {name: record.input.bytes for name, record in reader.records.items()}
    own = shards.plan(pathlib.Path('x'), sizes, None, 3)[1]
    self.assertEqual(own.records[0], 'layers.0.experts.2')
    data = io.BytesIO()
    work = job.Job(sources.Source(self.source), presets.free())
    with progress.Progress('encode', 1, 'B', show=False) as bar:
      work.write([own], lambda _: data, bar)
    with file.Reader(data.getvalue()) as reader:
      for name, record in reader.records.items():
        self.assertEqual(record.crc32, checksums[name], name)

  def test_savings_are_those_of_the_numbers_that_are_stored(self):
    model = checkpoints.load_checkpoint(CHECKPOINT).model
    rewritten, (saving,) = passes.run_chain((passes.remove_residual_gauge(),), model)
    before, after = np.array([passes.count_model(x) for x in (model, rewritten)])
    self.assertEqual((saving.elements, saving.bytes), tuple(before - after))

  def test_missing_and_different_ones(self):
    streams, manifest = containers.unpack(rotbits_jax.encode(self.source))
    name = manifest['records'].pop(4)['name']
    del streams[name]
    damaged = containers.pack(streams, json.dumps(manifest).encode())
    with self.assertRaisesRegex(file.ContainerError, f'{name}: no such record'):
      rotbits_jax.decode(damaged)
    calls = []

    def widen(context, state, first, layers):
      if 'mlp/up/kernel' in layers[0] and not calls:
        calls.append(first)
        layers[0]['mlp/up/kernel'] = np.float32(layers[0]['mlp/up/kernel'])
      return state, layers, [[]]

    preset = presets.exact(transforms=(passes.Transform('widen', layers=widen),))
    mixed = rotbits_jax.encode(self.source, preset=preset)
    self.assertEqual(rotbits_jax.read_tensor(mixed, UP).shape, (32, 48))
    with self.assertRaisesRegex(file.ContainerError, r'layers\.0: its experts are'):
      rotbits_jax.decode(mixed)


if __name__ == '__main__':
  absltest.main()
