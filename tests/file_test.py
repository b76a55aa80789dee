"""Files that are written one record at a time: shards, interrupted runs, damage."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from fuzz import containers
from fuzz import seeds
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.file import job
from rotbits_jax.file import memory
from rotbits_jax.file import records
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
      name: (reader._records.files[name].read(name), record)
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


class ReaderTest(Base):
  @parameterized.parameters(rotbits_jax.decode, rotbits_jax.verify, rotbits_jax.load)
  def test_a_file_that_shrinks_while_it_is_read(self, read):
    self.encode()
    whole, opened = self.output.read_bytes(), file.container.files.File.read
    reads = []

    def read_less(self, offset, out):
      reads.append(offset)
      if len(reads) == 5:  # behind the header and the manifest
        self.path.write_bytes(whole[: offset + out.size // 2])
        os.utime(self.path, ns=(self.modified, self.modified))
      return opened(self, offset, out)

    patch = absltest.mock.patch.object(file.container.files.File, 'read', read_less)
    with patch, self.assertRaisesRegex(file.ContainerError, 'changed after'):
      read(self.output)
    self.output.write_bytes(whole)
    with file.Reader(self.output) as reader:
      self.output.write_bytes(whole[:-1])
      with self.assertRaisesRegex(file.ContainerError, 'changed after'):
        reader.record('layers.0')

  def test_an_output_with_the_name_of_an_index_is_refused(self):
    for options in ({}, SHARDS):
      with self.assertRaisesRegex(ValueError, 'names of indices'):
        rotbits_jax.encode_to_file(OLD, self.folder / 'x.index.json', **options)
    self.assertEmpty(self.names())

  def test_every_field_of_the_manifest_is_checked(self):
    model = seeds.sliced_model(seeds.LLAMA)
    data = rotbits_jax.encode(model, preset='free', files=seeds.FILES, stem='tiny')
    with file.Reader(data) as reader:
      manifest = json.loads(reader.manifests[0].to_bytes())
    record = manifest['records'][0]
    start = time.monotonic()
    leaves = record['leaves']
    for place in (manifest, record, *leaves[:3], leaves[-1]):
      for name in list(place):
        old = place[name]
        for new in (None, -1, 2**62, True, 'x', [], {}, [[]], {'x': 1}, 1e300):
          if new == old and type(new) is type(old):
            continue
          place[name] = new
          try:
            rotbits_jax.decode(self.repacked(data, manifest))
          except file.ContainerError:
            pass
          else:
            if name == 'config' and new is None:
              continue  # a PyTree of arrays
            # Only values that decoding does not need may be arbitrary.
            self.assertIn(
              name,
              (
                'preset',
                'options',
                'keeps',
                'stem',
                'savings',
                'input',
                'files',
                'stack_key',
              ),
            )
        place[name] = old
    self.assertLess(time.monotonic() - start, 120)

  def repacked(self, data, manifest):
    """Returns the file with another manifest and its checksum."""
    streams, _ = containers.unpack(data)
    return containers.pack(streams, json.dumps(manifest).encode())

  def test_what_decodes_to_more_than_memory_is_refused_before_it_is_allocated(self):
    data = rotbits_jax.encode({'a': {'zeros': np.zeros(1 << 20)}}, preset='exact')
    small = absltest.mock.patch.object(memory, '_available', lambda: 1 << 20)
    with (
      small,
      self.assertRaisesRegex(file.ContainerError, 'content: it decodes to 8,388,608'),
    ):
      rotbits_jax.decode(data)
    with small, self.assertRaisesRegex(file.ContainerError, 'a: it decodes to 8,388,6'):
      rotbits_jax.read_record(data, 'a')
    full = absltest.mock.patch.object(records.host, 'empty', side_effect=MemoryError)
    with full, self.assertRaisesRegex(file.ContainerError, 'more than memory holds'):
      rotbits_jax.decode(data)

  def test_records_that_fit_memory_one_by_one_only_are_refused(self):
    data = rotbits_jax.encode({'a': np.zeros(1 << 17), 'b': np.zeros(1 << 17)})
    limit = self.folder / 'limit'
    limits = absltest.mock.patch.object(memory, '_LIMITS', (limit, 'missing'))
    limit.write_text(f'{3 << 19}\n')
    memory._available.cache_clear()
    self.addCleanup(memory._available.cache_clear)
    with limits, self.assertRaisesRegex(file.ContainerError, 'decodes to 2,097,152'):
      rotbits_jax.decode(data)
    with limits:
      rotbits_jax.read_record(data, 'a')
    limit.write_text('max\n')
    memory._available.cache_clear()
    with limits:
      rotbits_jax.decode(data)

  def test_beside_a_large_record_no_other_is_held(self):
    tree, steps = {name: np.full(9, i) for i, name in enumerate('abc')}, []

    def noted(owner, name, step):
      function = getattr(owner, name)

      def call(*args, **kwargs):
        found = function(*args, **kwargs)
        steps.append(step)
        return found

      return absltest.mock.patch.object(owner, name, call)

    with (
      absltest.mock.patch.object(memory, 'LARGE', 0),
      noted(job.sources.Source, 'read', 'read'),
      noted(job.writer_lib, 'encode_record', 'code'),
      noted(records.Records, 'decode', 'decode'),
    ):
      data = rotbits_jax.encode(tree)
      with file.Reader(data) as reader:
        for _ in reader.each():
          steps.append('use')
    self.assertEqual(steps, ['read', 'code'] * 3 + ['decode', 'use'] * 3)

  def test_errors_are_not_as_long_as_the_names_in_a_file(self):
    name = 'x' * 100_000
    streams, manifest = containers.unpack(rotbits_jax.encode({name: np.arange(3)}))
    (record,) = manifest['records']
    for change, words in (
      (lambda: record.update(nbytes=record['nbytes'] + 1), 'needs a stream of'),
      (lambda: record.update(leaves=[]), 'needs a stream of'),
      (lambda: record['spec']['arrays'][0].__setitem__(1, [1 << 62]), 'must be from 0'),
      (lambda: streams.update({name: streams[name][:-1] + b'x'}), 'must be from 0'),
    ):
      change()
      data = containers.pack(streams, json.dumps(manifest).encode())
      with self.assertRaisesRegex(
        file.ContainerError, f'xxx.*xxx: .*{words}'
      ) as caught:
        rotbits_jax.decode(data)
      self.assertLess(len(str(caught.exception)), 1000)

  def test_factors_have_names_that_a_checkpoint_knows(self):
    model = seeds.sliced_model(seeds.LLAMA)
    layer = model.layer(0)
    outer, config = model.outer(), model.config
    shape = models.layer_shapes(config, 0)['attention']['out']['kernel']
    leaf = structured.LowRank(
      np.ones((shape[0], 2), np.float16), np.ones((2, shape[1]), np.float16)
    )
    layer['attention']['out']['kernel'] = leaf
    model = models.from_layers(config, outer, [layer])
    data = rotbits_jax.encode(model, preset='exact', files=seeds.FILES, stem='tiny')
    streams, manifest = containers.unpack(data)
    (leaf,) = [
      leaf
      for record in manifest['records']
      for leaf in record['leaves']
      if leaf.get('type_name') == 'low_rank'
    ]
    leaf['stack_key'], leaf['settings']['names'] = ['x'], 'x'
    data = containers.pack(streams, json.dumps(manifest).encode())
    with self.assertRaisesRegex(file.ContainerError, 'no known names'):
      rotbits_jax.decode_to_directory(data, self.folder / 'out')

  @parameterized.parameters(
    ({'stem': None}, 'needs a stem'),
    ({'stem': 'other'}, r'other\.json is missing'),
    ({'files': seeds.FILES | {'model.safetensors': b''}}, 'two files have the name'),
  )
  def test_a_model_of_which_no_checkpoint_can_be_made(self, given, message):
    model = seeds.sliced_model(seeds.LLAMA)
    given = {'files': seeds.FILES, 'stem': 'tiny'} | given
    data = rotbits_jax.encode(model, preset='exact', **given)
    with self.assertRaisesRegex(file.ContainerError, message):
      rotbits_jax.decode_to_directory(data, self.folder / 'out')
    self.assertEmpty(self.names())

  @parameterized.parameters([[]], 'x', 1)
  def test_the_dtype_of_a_checkpoint_is_known(self, dtype):
    model = seeds.sliced_model(seeds.LLAMA)
    data = rotbits_jax.encode(model, preset='near', files=seeds.FILES, stem='tiny')
    streams, manifest = containers.unpack(data)
    for name in ('', manifest['records'][0]['leaves'][0]['path']):
      manifest['dtypes'] = {name: dtype}
      data = containers.pack(streams, json.dumps(manifest).encode())
      with self.assertRaisesRegex(file.ContainerError, 'dtypes'):
        rotbits_jax.decode_to_directory(data, self.folder / 'out')

  def test_notes_that_no_report_can_be_made_of_are_refused(self):
    for note in (
      3,
      'x',
      {'shape': 3},
      {'shape': [2, 'x'], 'numbers': 1},
      {'shape': [2]},
      {'shape': [2], 'numbers': 'x'},
      {'error': 'x'},
      {'error': []},
      {'tensor': 3},
      {f'field {i}': 0 for i in range(33)},  # a report has a column for each
    ):
      with self.subTest(note=note):
        data = rotbits_jax.encode({'a': np.arange(3)})
        _, manifest = containers.unpack(data)
        manifest['records'][0]['savings'] = [['x', 1, 1, [note]]]
        with self.assertRaisesRegex(file.ContainerError, 'records/0/savings/0/notes'):
          rotbits_jax.inspect(self.repacked(data, manifest))

  def test_notes_of_one_name_are_one_table(self):
    data = rotbits_jax.encode({'a': np.arange(3), 'b': np.arange(3)})
    _, manifest = containers.unpack(data)

    def with_fields(count):
      for i, record in enumerate(manifest['records']):
        fields = {f'field {i} {j}': 0 for j in range(count)}
        record['savings'] = [['x', 1, 1, [fields]]]
      return self.repacked(data, manifest)

    rotbits_jax.inspect(with_fields(16)).to_text()
    with self.assertRaisesRegex(file.ContainerError, "'x' must have at most 32 differ"):
      rotbits_jax.inspect(with_fields(17))

  def test_notes_may_lack_an_error(self):
    data = rotbits_jax.encode({'a': np.arange(3)})
    _, manifest = containers.unpack(data)
    notes = [{'tensor': 'a', 'error': None}, {'tensor': 'a', 'error': 0.5}]
    notes.append({'tensor': 'a', 'shape': None})
    manifest['records'][0]['savings'] = [['x', 1, 1, notes]]
    report = rotbits_jax.inspect(self.repacked(data, manifest))
    self.assertRegex(report.to_text(), r'a +3 +0\.5')

  def test_nothing_waits_for_a_record_that_is_decoded_later(self):
    head, table = np.ones((4, 300), np.float16), np.ones((300, 2), np.float16)
    numbers = np.zeros((4, 2), np.int32), np.zeros(4, np.int32)
    leaf = structured.TiedExactly.from_table(table, head, *numbers)
    tied = structured.Tied(np.zeros((4, 2), np.float16), 300)
    tree = {'x': {'a': leaf}, 'head': {'kernel': head, 'tied': tied}}
    data = rotbits_jax.encode(tree)
    self.assertEqual(file.Reader(data)._outer(), ['head', 'x'])
    np.testing.assert_array_equal(rotbits_jax.decode(data)['x']['a'], table)

  def test_small_leaves_that_need_one_large_array_over_and_over_are_refused(self):
    leaf = structured.Tied(np.zeros((64, 1), np.float16), 300)
    tree = {'head': {'kernel': np.ones((64, 300), np.float16)}}
    with file.Reader(rotbits_jax.encode(tree | {'x': [leaf] * 9})) as reader:
      self.assertLen(reader.record('x')['x'], 9)
    data = rotbits_jax.encode(tree | {'x': [leaf] * 40})
    with self.assertRaisesRegex(file.ContainerError, 'head/kernel: 40 leaves need it'):
      file.Reader(data)

  def test_a_parameter_that_the_model_lacks_is_not_needed(self):
    dense = rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense')).model
    map_ = np.eye(dense.config.hidden_size, dtype=np.float16)
    tied = structured.Tied(map_, dense.config.vocab_size)
    model = dataclasses.replace(
      dense, params=dense.params | {'embed': {'tokens': tied}}
    )
    streams, manifest = containers.unpack(rotbits_jax.encode(model, preset='exact'))
    manifest['config']['tied_head'] = True
    manifest['records'] = [x for x in manifest['records'] if x['name'] != 'head']
    del streams['head']
    data = containers.pack(streams, json.dumps(manifest).encode())
    with self.assertRaisesRegex(file.ContainerError, 'embed/tokens: it needs head/ker'):
      file.Reader(data)

  def test_a_config_that_is_no_object_is_named(self):
    dense, sliced = (
      rotbits_jax.load_checkpoint(checkpoints.example(name))
      for name in ('llama-tiny-dense', 'phi2-tiny-sliced-0.25')
    )
    cases = (dense, {'dtype': 'float32'}), (sliced, {'format': 'transformers'})
    for given, options in cases:
      with self.subTest(options=options):
        files = {**given.files, 'config.json': b'[]'}
        data = rotbits_jax.encode(given, preset='exact', files=files)
        with self.assertRaisesRegex(
          file.ContainerError, 'config.json: expected an obj'
        ):
          rotbits_jax.decode_to_directory(data, self.folder / 'out', **options)

  def test_a_config_with_a_note_can_be_decoded(self):
    dense = rotbits_jax.load_checkpoint(checkpoints.example('llama-tiny-dense'))
    values = json.loads(dense.files['config.json']) | {'my_note': 'tuned in May'}
    del values['tie_word_embeddings']
    files = dense.files | {'config.json': json.dumps(values).encode()}
    data = rotbits_jax.encode(dense, preset='free', files=files)
    rotbits_jax.decode_to_directory(data, self.folder / 'out')
    found = json.loads((self.folder / 'out' / 'config.json').read_text())
    self.assertEqual(found, values | {'tie_word_embeddings': False})

  def test_other_files_have_names_that_lead_nowhere(self):
    tree = {'a': {'b': np.arange(3)}}
    for name in ('', '..', '../x', '/x', 'x//y', 'x\\y', 'x\0', 'x\n', 'x' * 300):
      with self.assertRaisesRegex(ValueError, 'not the name of a file'):
        rotbits_jax.encode(tree, preset='exact', files={name: b'x'})
    streams, manifest = containers.unpack(
      rotbits_jax.encode(tree, preset='exact', files={'x': b'x'})
    )
    entry = manifest['files']['x']
    for name in ('../x', '', '/x', 'x/../../y', '\x1b'):
      renamed = {
        f'files/{name}' if key == 'files/x' else key: x for key, x in streams.items()
      }
      manifest['files'] = {name: entry}
      data = containers.pack(renamed, json.dumps(manifest).encode())
      with self.assertRaisesRegex(file.ContainerError, 'not the name of a file'):
        file.Reader(data)

  def test_other_files_are_inflated_to_a_size_that_is_bounded(self):
    tree = {'a': {'b': np.arange(3)}}
    data = rotbits_jax.encode(tree, preset='exact', files={'x': bytes(1 << 20)})
    self.assertLess(len(data), 1 << 14)
    _, manifest = containers.unpack(data)
    for size in (0, (1 << 20) - 1, (1 << 20) + 1):
      manifest['files']['x'][2] = size
      with self.assertRaisesRegex(file.ContainerError, 'files/x: it must inflate to'):
        file.Reader(self.repacked(data, manifest)).files()
    manifest['files']['x'][2] = 1 << 40
    with self.assertRaisesRegex(file.ContainerError, 'files/x/size'):
      file.Reader(self.repacked(data, manifest))

  def test_paths_are_not_deep(self):
    tree = np.arange(3)
    for _ in range(70):
      tree = {'a': tree}
    with self.assertRaisesRegex(ValueError, 'up to 64 keys'):
      rotbits_jax.encode(tree, preset='exact')

  def test_a_report_does_not_steer_a_terminal(self):
    data = rotbits_jax.encode({'a': {'b': np.arange(3)}}, preset='exact')
    _, manifest = containers.unpack(data)
    manifest['preset'] = 'x\x1b[2J\ny\u202e'
    text = rotbits_jax.inspect(self.repacked(data, manifest)).to_text()
    self.assertIn(r'preset x\x1b[2J\ny\u202e', text)
    self.assertTrue(all(line.isprintable() for line in text.splitlines()))

  def test_a_header_and_a_manifest_that_differ_name_the_stream(self):
    streams, manifest = containers.unpack(
      rotbits_jax.encode({'a': {'b': np.arange(3)}}, preset='exact')
    )
    text = json.dumps(manifest).encode()
    for changed in (streams | {'b': b''}, {'a': streams['a'][:-1]}):
      with self.assertRaisesRegex(file.ContainerError, '[ab]: the header and the mani'):
        file.Reader(containers.pack(changed, text))


if __name__ == '__main__':
  absltest.main()
