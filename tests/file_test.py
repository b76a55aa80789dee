"""Files that are written one record at a time: shards, interrupted runs, damage."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

import rotbits_jax
from rotbits_jax import file
from rotbits_jax import structured
from rotbits_jax.file import shards as shards_lib
from tests import base_test

ROOT = pathlib.Path(__file__).parents[1]
TESTDATA = ROOT / 'tests' / 'testdata'
NAME = 'opt-small-sliced-0.2'
TINY = 'llama-tiny-sliced-head-0.25'

# Two results, of which one array is equal, and the options that put each into a shard.
OLD = {'a': np.zeros(3), 'b': np.zeros(3), 'same': np.zeros(2)}
NEW = {'a': np.ones(3), 'b': np.ones(3), 'same': np.zeros(2)}
SHARDS = {'shard_size': 1}


def flat(tree):
  return {
    path: [np.asarray(x) for x in jax.tree.leaves(leaf)]
    for path, leaf in structured.flatten(tree).items()
  }


def assert_same(actual, expected):
  actual, expected = flat(actual), flat(expected)
  assert actual.keys() == expected.keys()
  for path, arrays in expected.items():
    for a, b in zip(actual[path], arrays, strict=True):
      assert a.dtype == b.dtype, path
      assert a.tobytes() == b.tobytes(), path


def streams(path):
  """Returns the bytes and the manifest entry of each record of a file or of shards."""
  with file.Reader(path) as reader:
    return {
      name: (reader._decoder.files[name].read(name), record)
      for name, record in reader.records.items()
    }


class Base(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.output = self.folder / 'model.rotbits'

  def encode(self, name=TINY, **options):
    options.setdefault('preset', 'exact')
    rotbits_jax.encode_to_file(TESTDATA / name, self.output, **options)

  def names(self):
    return sorted(path.name for path in self.folder.iterdir())


class ShardsTest(Base):
  def test_shards_hold_the_streams_of_one_file(self):
    self.encode()
    whole = streams(self.output)
    self.encode(shard_size=300_000)
    self.assertNotIn('model.rotbits', self.names())
    index = json.loads((self.folder / 'model.rotbits.index.json').read_text())
    self.assertEqual(set(index['weight_map']), set(whole))
    shards = sorted(set(index['weight_map'].values()))
    self.assertGreater(len(shards), 2)
    self.assertEqual(self.names(), sorted([*shards, 'model.rotbits.index.json']))
    for i, shard in enumerate(shards, 1):
      checksum = index['metadata']['manifest_crc32'][shard]
      expected = f'model-{i:05}-of-{len(shards):05}-{checksum:08x}.rotbits'
      self.assertEqual(shard, expected)
    self.assertEqual(streams(self.output), whole)
    total = sum((self.folder / shard).stat().st_size for shard in shards)
    self.assertEqual(index['metadata']['total_size'], total)
    report = rotbits_jax.inspect(self.output)
    self.assertEqual(report.file_bytes, total)
    saved = sum(line.bytes_saved for line in report.lines)
    self.assertEqual(saved, report.input_bytes - report.file_bytes)

  def test_shards_are_read_as_one_model(self):
    expected = rotbits_jax.load_checkpoint(TESTDATA / TINY)
    self.encode(shard_size=300_000)
    for path in (self.output, self.folder / 'model.rotbits.index.json'):
      decoded = rotbits_jax.decode_checkpoint(path)
      assert_same(decoded.model.params, expected.model.params)
      self.assertEqual(decoded.files, expected.files)
    rotbits_jax.decode_to_directory(
      self.output, self.folder / 'out', shard_size=400_000
    )
    again = rotbits_jax.load_checkpoint(self.folder / 'out')
    assert_same(again.model.params, expected.model.params)

  def test_one_file_replaces_shards_and_the_other_way_round(self):
    self.encode(shard_size=300_000)
    shards = self.names()
    self.encode()
    self.assertEqual(self.names(), ['model.rotbits'])
    self.encode(shard_size=300_000)
    self.assertEqual(self.names(), shards)

  def test_a_missing_shard_is_named(self):
    self.encode(shard_size=300_000)
    next(self.folder.glob('model-00002-*')).unlink()
    with self.assertRaisesRegex(file.ContainerError, 'model-00002.*missing'):
      rotbits_jax.decode(self.output)

  def test_an_index_that_lies_is_refused(self):
    for text in (
      '{}',
      '[',
      '{"weight_map": {"a": "../x"}}',
      '{"weight_map": {"a": 1}}',
      '{"weight_map": {"a": "absent"}}',
      '[' * (33 << 20),
    ):
      with self.subTest(text=text[:40]):
        (self.folder / 'model.rotbits.index.json').write_text(text)
        with self.assertRaises(file.ContainerError):
          rotbits_jax.decode(self.output)

  def test_an_index_that_is_a_pipe_is_refused(self):
    os.mkfifo(self.folder / 'model.rotbits.index.json')
    with self.assertRaisesRegex(OSError, 'not a regular file'):
      rotbits_jax.decode(self.output)

  def test_a_shard_of_another_run_is_noticed(self):
    last = lambda: max(self.folder.glob('model-*'))
    self.encode(shard_size=200_000)
    old = last().read_bytes()
    self.encode(shard_size=200_000, files={})
    rotbits_jax.inspect(self.output)
    last().write_bytes(old)
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'another shard'):
      rotbits_jax.inspect(self.output)

  def test_an_index_with_a_changed_byte_is_refused_or_says_the_same(self):
    tree = {'a': {'b': np.arange(3)}, 'c': np.ones(4, np.float32)}
    rotbits_jax.encode_to_file(tree, self.output, preset='exact', shard_size=1)
    index = self.folder / 'model.rotbits.index.json'
    data, expected = index.read_bytes(), streams(self.output)
    for position in range(len(data)):
      damaged = bytearray(data)
      damaged[position] ^= 1 << position % 7
      index.write_bytes(damaged)
      try:
        found = streams(self.output)
      except file.ContainerError:
        continue
      self.assertEqual(found, expected, position)

  def test_an_index_must_fit_its_shards(self):
    for change, words in (
      (lambda x: x['weight_map'].pop('a'), 'a: the index and the shards differ'),
      (lambda x: x['weight_map'].update(d=x['weight_map']['a']), 'd: the index and'),
      (lambda x: x['weight_map'].update(a=x['weight_map']['c']), 'a: the index and'),
      (lambda x: x['metadata'].pop('manifest_crc32'), 'manifest_crc32: is missing'),
      (lambda x: x['metadata'].update(total_size=1), 'must have 1 bytes'),
      (lambda x: x['metadata'].update(more=1), 'more: is not known'),
      (lambda x: x.update(more=1), 'more: is not known'),
      (lambda x: x.pop('metadata'), 'metadata: is missing'),
      (lambda x: x['metadata']['manifest_crc32'].popitem(), 'not the name of a shard'),
    ):
      with self.subTest(words=words):
        tree = {'a': {'b': np.arange(3)}, 'c': np.ones(4, np.float32)}
        rotbits_jax.encode_to_file(tree, self.output, preset='exact', shard_size=1)
        index = self.folder / 'model.rotbits.index.json'
        value = json.loads(index.read_text())
        change(value)
        index.write_text(json.dumps(value))
        with self.assertRaisesRegex(file.ContainerError, words):
          file.Reader(self.output)

  def test_shards_of_a_tree_without_leaves(self):
    rotbits_jax.encode_to_file({}, self.output, preset='exact', shard_size=1)
    self.assertEqual(rotbits_jax.decode(self.output), {})

  def test_names_that_shards_cannot_have(self):
    longest = 'ä' * 111 + '.rotbits'
    for name in ('a\xa0b.rotbits', 'a\\b', f'x{longest}x'):
      with self.subTest(name), self.assertRaisesRegex(ValueError, 'name of shards'):
        rotbits_jax.encode_to_file({}, self.folder / name, preset='exact', shard_size=1)
    self.assertEmpty(self.names())
    rotbits_jax.encode_to_file({}, self.folder / f'x{longest}', shard_size=1)

  def test_plan(self):
    sizes = {'a': 5, 'b': 5, 'c': 20, 'd': 1}
    plan = lambda size, least=1: [
      shard.records
      for shard in shards_lib.plan(pathlib.Path('x.y'), sizes, size, least)
    ]
    self.assertEqual(plan(None), [('a', 'b', 'c', 'd')])
    self.assertEqual(plan(10), [('a', 'b'), ('c',), ('d',)])
    self.assertEqual(plan(21), [('a', 'b'), ('c', 'd')])
    self.assertEqual(plan(None, least=2), [('a', 'b'), ('c',), ('d',)])


class Killed(BaseException):
  """Stands for the end of the process."""


class ReplacedTest(Base):
  """Older results: how shards replace them, and which files are removed."""

  def write(self, tree, **options):
    rotbits_jax.encode_to_file(tree, self.output, preset='exact', **options)

  def files(self):
    """Returns all files, those of hidden folders too, by their path."""
    return {
      path: path.read_bytes() for path in self.folder.rglob('*') if path.is_file()
    }

  def put(self, files):
    """Replaces all files."""
    for path in self.folder.iterdir():
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path, data in files.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)

  def is_killed(self, step, work):
    """Does the work until it would rename or remove a file for the nth time.

    From then on, nothing changes any more. Returns whether it came to this.
    """
    done = itertools.count(1)

    def mortal(real):
      def call(*args, **kwargs):
        if next(done) >= step:
          raise Killed
        return real(*args, **kwargs)

      return call

    with contextlib.ExitStack() as stack:
      for owner, name in (
        (os, 'replace'),
        (pathlib.Path, 'unlink'),
        (shutil, 'rmtree'),
      ):
        real = mortal(getattr(owner, name))
        stack.enter_context(absltest.mock.patch.object(owner, name, real))
      try:
        work()
      except Killed:
        return True
    return False

  def which(self, path):
    """Returns which of the two results is read."""
    found = rotbits_jax.decode(path)
    assert_same(found, NEW if found['a'].any() else OLD)
    return 'new' if found['a'].any() else 'old'

  @parameterized.parameters((SHARDS, SHARDS), (SHARDS, {}), ({}, SHARDS))
  def test_a_kill_at_each_step(self, before, after):
    self.write(NEW, **after)
    new = self.files()
    self.put({})
    self.write(OLD, **before)
    old, states = self.files(), []
    index = self.folder / 'model.rotbits.index.json'
    for step in itertools.count(1):
      self.put(old)
      killed = self.is_killed(step, lambda: self.write(NEW, **after))
      left = self.files()
      states.append(self.which(self.output))
      if index.exists():
        self.which(index)
      self.write(NEW, **after)
      self.assertEqual(self.files(), new, f'step {step}, the same run again')
      self.put(left)
      self.write({'other': np.ones(2)})
      self.assertEqual(self.names(), ['model.rotbits'], f'step {step}, another run')
      if not killed:
        break
    self.assertEqual(states, sorted(states, reverse=True))  # 'old', then 'new'
    self.assertContainsSubset(('old', 'new'), states)

  def test_files_that_are_no_shards_of_the_output_stay(self):
    self.write(OLD, **SHARDS)
    shard = min(self.folder.glob('model-*'))
    data, number = shard.read_bytes(), '-00001-of-00003'
    others = {
      f'model{number}-01234567.rotbits': data,  # the checksum is another
      f'model{number}.safetensors': data,
      f'model{number}.rotbits': data,  # there is no checksum
      f'model{number}-0.rotbits': data,
      f'model-2{number}.rotbits': data,
      'model-00001-of-00002.rotbits': b'no container',
    }
    for name, content in others.items():
      (self.folder / name).write_bytes(content)
    (self.folder / f'model{number}-89abcdef.rotbits').symlink_to(shard.name)
    self.write(NEW)
    left = {*others, f'model{number}-89abcdef.rotbits', self.output.name}
    self.assertEqual(self.names(), sorted(left))

  def test_shards_without_an_index_are_not_removed_unasked(self):
    self.write(OLD, **SHARDS)
    (self.folder / 'model.rotbits.index.json').unlink()
    shards = self.names()
    for options in ({}, SHARDS):
      with self.assertRaisesRegex(FileExistsError, 'overwrite'):
        self.write(NEW, overwrite=False, **options)
    self.assertEqual(self.names(), shards)

  def test_shards_stay_beside_a_damaged_index_until_it_is_replaced(self):
    self.write(OLD, **SHARDS)
    index = self.folder / 'model.rotbits.index.json'
    index.write_text('{')
    old = self.files()
    self.is_killed(1, lambda: self.write(NEW, **SHARDS))
    self.assertContainsSubset(old, self.files())
    self.write(NEW, **SHARDS)
    self.assertEqual(self.which(self.output), 'new')
    self.assertLen(self.names(), 4)


class DevicesTest(Base):
  def run_python(self, program, *, devices=1, wait=True):
    flags = f'{os.environ.get("XLA_FLAGS", "")} '
    flags += f'--xla_force_host_platform_device_count={devices}'
    process = subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(program)],
      cwd=ROOT,
      env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      stderr=subprocess.PIPE,
      text=True,
    )
    if wait:
      self.finish(process)
    return process

  def finish(self, process):
    _, errors = process.communicate(timeout=500)
    self.assertEqual(process.returncode, 0, errors[-2000:])

  @pytest.mark.slow
  def test_two_processes_write_the_streams_of_one(self):
    tuned = base_test.tuned_checkpoint(self.folder / 'tuned')
    cases = {
      NAME: {'preset': 'free'},
      tuned: {'preset': 'exact', 'base': str(base_test.DENSE)},
    }
    program = """
      import jax
      jax.distributed.initialize('localhost:{port}', 2, {index})
      import rotbits_jax
      rotbits_jax.encode_to_file({source!r}, {output!r}, **{options!r})
    """
    for k, (name, options) in enumerate(cases.items()):
      with self.subTest(**options):
        self.output = self.folder / f'{k}.rotbits'
        self.encode(name, **options)
        expected = streams(self.output)
        self.output.unlink()
        own = {'source': str(TESTDATA / name), 'output': str(self.output)}
        port = 20000 + (os.getpid() + k) % 20000
        processes = [
          self.run_python(
            program.format(port=port, index=i, options=options, **own), wait=False
          )
          for i in range(2)
        ]
        for process in processes:
          self.finish(process)
        self.assertEqual(streams(self.output), expected)
        self.assertGreaterEqual(len(list(self.folder.glob(f'{k}-*.rotbits'))), 2)
        base = options.get('base')
        found = rotbits_jax.verify(self.output, against=TESTDATA / name, base=base)
        self.assertEqual(found.same_bits, base is not None)

  @pytest.mark.slow
  def test_layers_go_where_a_sharding_says(self):
    self.encode(NAME, preset='free')
    program = """
      import jax, numpy as np, rotbits_jax
      from jax.sharding import NamedSharding, PartitionSpec as P
      kinds = (jax.sharding.AxisType.{kind},)
      mesh = jax.make_mesh((2,), ('layers',), axis_types=kinds)
      spread, everywhere = NamedSharding(mesh, P('layers')), NamedSharding(mesh, P())
      model = rotbits_jax.load({path!r}, sharding=spread)
      for stack, expected in (('layers.0:1', everywhere), ('layers.1:3', spread)):
        kernel = model.params[stack]['attention']['query']['kernel']
        assert kernel.sharding.is_equivalent_to(expected, kernel.ndim), kernel.sharding
      tokens = np.arange(6)[None]
      plain = rotbits_jax.load({path!r})
      expected = jax.jit(rotbits_jax.models.logits)(plain, tokens)
      with jax.set_mesh(mesh):
        actual = jax.jit(rotbits_jax.models.logits)(
          jax.device_put(model, everywhere), tokens)
      np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-4)
    """
    for kind in ('Auto', 'Explicit'):
      self.run_python(program.format(path=str(self.output), kind=kind), devices=2)


class NamesTest(Base):
  def test_an_output_with_the_name_of_an_index_is_refused(self):
    for options in ({}, SHARDS):
      with self.assertRaisesRegex(ValueError, 'names of indices'):
        rotbits_jax.encode_to_file(OLD, self.folder / 'x.index.json', **options)
    self.assertEmpty(self.names())


if __name__ == '__main__':
  absltest.main()
