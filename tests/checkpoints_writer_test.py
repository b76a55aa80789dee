"""Tests of writing checkpoints one layer at a time."""

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import weights_files

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.checkpoints import CheckpointWriter
from rotbits_jax.checkpoints import tensors as tensors_lib
from rotbits_jax.system import outputs

TESTDATA = pathlib.Path(__file__).parent / 'testdata'
FIXTURES = sorted(path.parent.name for path in TESTDATA.glob('*/config.json'))
SLICED = [name for name in FIXTURES if 'sliced' in name]
TINY = 'llama-tiny-dense'


def bits(x):
  return x.dtype, x.shape, np.ascontiguousarray(x).tobytes()


def specs_of(source):
  """Returns shapes and dtypes of all parameters, by path in the model."""
  records = (structured.flatten(source.specs(record)) for record in source.records)
  return {path: spec for specs in records for path, spec in specs.items()}


def dtypes_of(source):
  return {path: np.dtype(spec.dtype) for path, spec in specs_of(source).items()}


def writer_of(source, directory, **changes):
  """Makes a writer for the checkpoint that a source holds."""
  known = {
    'dtypes': dtypes_of(source),
    'files': source.files,
    'stem': source.stem,
    'buffers': source.buffers,
  }
  return CheckpointWriter(directory, source.config, **known | changes)


def add(writer, params):
  for path, leaf in structured.flatten(params).items():
    writer.add(path, leaf)


def write_backwards(writer, source):
  """Writes the head, then the layers from last to first, then the others.

  The parameters of a record come in reverse order.
  """
  for record in reversed(source.records):
    if record != 'buffers':
      for path, leaf in reversed(structured.flatten(source.read(record)).items()):
        writer.add(path, leaf)


class WriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.scratch = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.target = self.scratch / 'x'

  def assert_nothing_is_left(self):
    self.assertEmpty(list(self.scratch.iterdir()))

  def open(self, name=TINY):
    return checkpoints.open_checkpoint(TESTDATA / name)

  @parameterized.parameters(*FIXTURES)
  def test_layers_in_any_order_make_the_same_file(self, name):
    source = self.open(name)
    with writer_of(source, self.target) as writer:
      write_backwards(writer, source)
    checkpoints.save_checkpoint(source.load(), self.scratch / 'y')
    files = sorted(file.name for file in self.target.iterdir())
    self.assertEqual(files, sorted([*source.files, 'model.safetensors']))
    for file in files:
      self.assertEqual(
        (self.target / file).read_bytes(), (self.scratch / 'y' / file).read_bytes()
      )

  @parameterized.parameters(*SLICED)
  def test_slicegpt(self, name):
    source = self.open(name)
    with writer_of(source, self.target, format='slicegpt') as writer:
      write_backwards(writer, source)
    checkpoints.save_checkpoint(source.load(), self.scratch / 'y', 'slicegpt')
    ordered = weights_files.read_torch(self.scratch / 'y' / f'{source.stem}.pt')
    written = weights_files.read_torch(self.target / f'{source.stem}.pt')
    self.assertEqual(list(written), list(ordered))
    chex.assert_trees_all_equal(written, ordered)
    loaded = checkpoints.load_checkpoint(self.target)
    chex.assert_trees_all_equal(loaded.model, source.load().model)
    self.assertEqual((loaded.files, loaded.stem), (source.files, source.stem))

  def test_shards(self):
    source = self.open()
    tensors = checkpoints.to_tensors(source.load().model)
    limit = max(x.nbytes for x in tensors.values()) - 1
    with writer_of(source, self.target, shard_size=limit) as writer:
      write_backwards(writer, source)
    index = json.loads((self.target / 'model.safetensors.index.json').read_text())
    self.assertEqual(index['metadata'], {'total_size': source.nbytes})
    self.assertEqual(index['weight_map'].keys(), tensors.keys())
    shards = sorted(set(index['weight_map'].values()))
    self.assertEqual(
      shards, [f'model-{i:05}-of-{len(shards):05}.safetensors'
               for i in range(1, len(shards) + 1)]
    )  # fmt: skip
    found = {}
    for shard in shards:
      with safetensors.safe_open(self.target / shard, framework='np') as file:
        self.assertEqual(file.metadata(), {'format': 'pt'})
        part = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
      self.assertTrue(len(part) == 1 or sum(x.nbytes for x in part.values()) <= limit)
      found |= part
    self.assertEqual(
      {name: bits(x) for name, x in found.items()},
      {name: bits(x) for name, x in tensors.items()},
    )
    chex.assert_trees_all_equal(
      checkpoints.load_checkpoint(self.target).model, source.load().model
    )

  def test_shards_take_the_place_of_one_file(self):
    checkpoint = self.open().load()
    checkpoints.save_checkpoint(checkpoint, self.target)
    (self.target / 'mine.py').write_text('mine')
    checkpoints.save_checkpoint(checkpoint, self.target, shard_size=100_000)
    self.assertFalse((self.target / 'model.safetensors').exists())
    self.assertEqual((self.target / 'mine.py').read_text(), 'mine')
    chex.assert_trees_all_equal(
      checkpoints.load_checkpoint(self.target).model, checkpoint.model
    )

  def test_shards_are_those_of_the_index(self):
    checkpoint = self.open().load()
    checkpoints.save_checkpoint(checkpoint, self.target, shard_size=100_000)
    again = checkpoints.load_checkpoint(self.target)
    checkpoints.save_checkpoint(again, self.scratch / 'y')
    for file in self.target.iterdir():
      self.assertEqual((self.scratch / 'y' / file.name).read_bytes(), file.read_bytes())
    # An index of other tensors is not followed.
    model = again.model
    widths = model.config.segment_widths[:3]
    config = dataclasses.replace(model.config, num_layers=1, segment_widths=widths)
    model = models.from_layers(config, model.outer(), [model.layer(0)])
    settings = json.loads(again.files['config.json']) | {'num_hidden_layers': 1}
    files = again.files | {'config.json': json.dumps(settings).encode()}
    cut = again._replace(model=model, files=files)
    checkpoints.save_checkpoint(cut, self.scratch / 'z')
    self.assertNotIn('model.safetensors.index.json', os.listdir(self.scratch / 'z'))

  def test_older_shards_are_removed(self):
    checkpoint = self.open().load()
    checkpoints.save_checkpoint(checkpoint, self.target, shard_size=100_000)
    (self.target / 'mine.safetensors').write_text('mine')
    checkpoints.save_checkpoint(checkpoint, self.target, shard_size=300_000)
    index = json.loads((self.target / 'model.safetensors.index.json').read_text())
    found = {file.name for file in self.target.glob('*.safetensors')}
    self.assertEqual(found, {*index['weight_map'].values(), 'mine.safetensors'})

  def test_arrays_of_any_layout(self):
    source = self.open('phi3-tiny-sliced-0.25')
    with writer_of(source, self.target, dtypes='bfloat16') as writer:
      layouts = [np.ascontiguousarray, np.asfortranarray, jnp.asarray]
      for record, layout in zip(source.records, layouts * 2, strict=False):
        layer = jax.tree.map(
          lambda x, layout=layout: layout(x.astype(ml_dtypes.bfloat16)),
          source.read(record),
        )
        add(writer, layer)
    again = checkpoints.open_checkpoint(self.target)
    for index in range(3):
      chex.assert_trees_all_equal(
        again.layer(index),
        jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), source.layer(index)),
      )

  def factored(self):
    """Makes a source whose layer 1 has a pair of factors with a bias."""
    source = self.open('phi2-tiny-dense')
    tensors = checkpoints.to_tensors(source.load().model)
    prefix = 'model.layers.1.mlp.fc1'
    rows, columns = tensors.pop(f'{prefix}.weight').shape
    rng = np.random.default_rng(0)
    tensors |= {
      f'{prefix}.ALinear.weight': rng.normal(size=(rows, 3)).astype(np.float16),
      f'{prefix}.BLinear.weight': rng.normal(size=(3, columns)).astype(np.float16),
      f'{prefix}.ALinear.bias': tensors.pop(f'{prefix}.bias'),
    }
    model = checkpoints.from_tensors(tensors, source.config)
    checkpoint = checkpoints.Checkpoint(model, source.files, None)
    checkpoints.save_checkpoint(checkpoint, self.scratch / 'factored')
    return checkpoints.open_checkpoint(self.scratch / 'factored'), tensors

  def test_exceptions_leave_nothing(self):
    source = self.open()
    with self.assertRaises(KeyboardInterrupt), writer_of(source, self.target) as writer:
      add(writer, source.read('layers.0'))
      self.assertNotEmpty(list(self.scratch.iterdir()))
      raise KeyboardInterrupt
    self.assert_nothing_is_left()

  @parameterized.parameters('safetensors', 'slicegpt')
  def test_a_missing_tensor(self, format):
    source = self.open('llama-tiny-sliced-head-0.25')
    match = r'9 tensors have not been written, such as model\.layers\.1'
    with self.assertRaisesRegex(ValueError, match):  # noqa: SIM117
      with writer_of(source, self.target, format=format) as writer:
        add(writer, source.outer())
        add(writer, source.read('layers.0'))
        add(writer, source.read('layers.2'))
    self.assert_nothing_is_left()

  def test_a_failure_leaves_the_target_as_it_was(self):
    source = self.open()
    self.target.mkdir()
    (self.target / 'config.json').write_text('old')
    with self.assertRaises(ZeroDivisionError), writer_of(source, self.target) as writer:
      write_backwards(writer, source)
      raise ZeroDivisionError
    self.assertEqual([x.name for x in self.target.iterdir()], ['config.json'])
    self.assertEqual((self.target / 'config.json').read_text(), 'old')
    self.assertEqual(list(self.scratch.iterdir()), [self.target])

  def test_the_next_run_removes_what_a_killed_one_left(self):
    source = self.open()
    leftover = self.scratch / '.x.partial'
    leftover.mkdir()
    (leftover / 'model-00001-of-00002.safetensors').write_bytes(b'half')
    with writer_of(source, self.target) as writer:
      self.assertFalse((leftover / 'model-00001-of-00002.safetensors').exists())
      write_backwards(writer, source)
    self.assertEqual(list(self.scratch.iterdir()), [self.target])
    self.assertLen(list(self.target.iterdir()), 1 + len(source.files))

  def test_files_that_are_replaced_in_part_are_no_checkpoint(self):
    old = self.open().load()
    doubled = jax.tree.map(lambda x: x * 2, old.model.params)
    model = dataclasses.replace(old.model, params=doubled)
    new = checkpoints.Checkpoint(model, old.files, old.stem)
    real, left = outputs.move, 0

    def move(*args):
      nonlocal left
      if not left:
        raise KeyboardInterrupt
      left -= 1
      real(*args)

    for shard_size in (None, 100_000):
      for count in range(20):
        checkpoints.save_checkpoint(old, self.target, shard_size=shard_size)
        left = count
        with mock.patch.object(outputs, 'move', move):
          try:
            checkpoints.save_checkpoint(new, self.target, shard_size=shard_size)
          except KeyboardInterrupt:
            with self.assertRaises((checkpoints.CheckpointError, OSError)):
              checkpoints.load_checkpoint(self.target)
          else:
            break
      self.assertGreater(count, 1)
      chex.assert_trees_all_equal(
        checkpoints.load_checkpoint(self.target).model, new.model
      )

  def test_parameters_that_are_refused(self):
    source = self.open('phi3-tiny-dense')
    up = 'layers.0/mlp/up/kernel'
    kernel = source.layer(0)['mlp']['up']['kernel']
    with writer_of(source, self.target) as writer:
      for path, leaf, match in (
        (up, kernel.T, r'layers\.0/mlp/up/kernel: expected float16'),
        (up, np.float32(kernel), r'layers\.0/mlp/up/kernel: .*got float32'),
        ('layers.0/mlp/up/bias', kernel[0], r'layers\.0/mlp/up/bias: the model has'),
        ('layers.3/mlp/up/kernel', kernel, r'layers\.3/mlp/up/kernel: the model has'),
      ):
        with self.assertRaisesRegex(ValueError, match):
          writer.add(path, leaf)
      write_backwards(writer, source)
      # Several parameters are in one tensor.
      with self.assertRaisesRegex(ValueError, f'{up} was added before'):
        writer.add(up, kernel)
    with self.assertRaisesRegex(ValueError, 'not open'):
      add(writer, source.read('layers.1'))

  def test_settings_that_are_refused(self):
    source = self.open('llama-tiny-sliced-head-0.25')
    dtypes = dtypes_of(source)
    del dtypes['layers.1/mlp/up/kernel']
    mixed = self.open('phi3-tiny-dense')
    for of, changes, match in (
      (source, {'dtypes': dtypes}, r'layers\.1/mlp/up/kernel: its dtype is missing'),
      (
        mixed,
        {'dtypes': dtypes_of(mixed) | {'layers.0/mlp/up/kernel': np.float32}},
        'gate_up_proj.weight: .* several dtypes',
      ),
      (source, {'shard_size': 0}, 'shard_size must be positive'),
      (source, {'shard_size': 9, 'format': 'slicegpt'}, 'shard_size .* slicegpt'),
      (source, {'format': 'npz'}, "got 'npz'"),
      (mixed, {'format': 'slicegpt'}, 'only a sliced model'),
      (source, {'stem': None}, 'needs a stem'),
      (source, {'stem': 'other'}, r'the file other\.json is missing'),
      (source, {'files': source.files | {'../x': b''}}, 'not the name of a file'),
      (
        source,
        {'files': source.files | {'model.safetensors': b''}},
        'two files have the name model.safetensors',
      ),
    ):
      with self.assertRaisesRegex(ValueError, match):
        writer_of(of, self.target, **changes)
    self.assert_nothing_is_left()


class RowMajorTest(absltest.TestCase):
  def test_bytes(self):
    for dtype, piece in itertools.product(
      [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8, np.bool_],
      [1, 10_000, 1 << 23],
    ):
      with self.subTest(dtype=dtype, piece=piece):
        rng = np.random.default_rng(0)
        x = rng.integers(0, 2 if dtype == np.bool_ else 100, (150, 130)).astype(dtype)
        with absltest.mock.patch.object(tensors_lib, '_PIECE', piece):
          for array in (
            x, x.T, x[::2, ::-1], x[:, 3:70].T, x[:0].T, x[:, :0], x[0], x[:, 0],
            x[3, 4], x.reshape(15, 10, 130).swapaxes(0, 2),
            np.broadcast_to(x[0], (70, 130)),
          ):  # fmt: skip
            got = b''.join(
              bytes(part) for part in tensors_lib.row_major(np.asarray(array))
            )
            self.assertEqual(got, array.tobytes())


if __name__ == '__main__':
  absltest.main()
