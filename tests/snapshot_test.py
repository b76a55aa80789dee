"""Snapshots: made once, by one process, and removed when they were not used."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest
import jax.numpy as jnp
import numpy as np

import rotbits_jax
from rotbits_jax.file import directory
from rotbits_jax.system import cache
from rotbits_jax.system import outputs

ROOT = pathlib.Path(__file__).parents[1]
DENSE = ROOT / 'tests/testdata/llama-tiny-dense'
SLICED = ROOT / 'tests/testdata/phi2-tiny-sliced-0.25'

# Makes a folder slowly, and writes a line for each process that does so.
MAKE = """
import pathlib, sys, time
from rotbits_jax.system import cache

def make(folder):
  folder.mkdir()
  (folder / 'first').write_text('1')
  with open(sys.argv[1], 'a') as log:
    print('made', file=log)
  time.sleep(float(sys.argv[2]))
  (folder / 'second').write_text('2')

found = cache.made('0' * 40, make, show=False)
assert {path.name for path in found.iterdir()} == {'first', 'second'}
"""
NAME = '0' * cache.DIGITS


class Base(absltest.TestCase):
  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.scratch = pathlib.Path(os.path.realpath(scratch))
    self.cache = self.scratch / 'cache'
    self.enterContext(mock.patch.dict(os.environ, {cache.VARIABLE: str(self.cache)}))

  def names(self):
    return sorted(path.name for path in (self.cache / 'snapshots').iterdir())


class SnapshotTest(Base):
  def encoded(self, checkpoint, name, **options):
    path = self.scratch / name
    rotbits_jax.encode_to_file(checkpoint, path, **options)
    return path

  def test_it_is_the_decoded_folder_and_is_made_once(self):
    path = self.encoded(DENSE, 'x')
    found = rotbits_jax.snapshot(path)
    rotbits_jax.decode_to_directory(path, self.scratch / 'decoded')
    read = lambda folder: {x.name: x.read_bytes() for x in folder.iterdir()}
    self.assertEqual(read(found), read(self.scratch / 'decoded'))
    copy = self.scratch / 'copy'
    copy.write_bytes(path.read_bytes())
    with mock.patch.object(directory, 'write', side_effect=AssertionError):
      self.assertEqual(rotbits_jax.snapshot(copy), found)
    self.assertEqual(self.names(), [found.name])

  def test_what_changes_the_content_changes_the_folder(self):
    path = self.encoded(SLICED, 'x', preset='exact')
    found = [
      rotbits_jax.snapshot(path),
      rotbits_jax.snapshot(path, format='safetensors'),
      rotbits_jax.snapshot(path, dtype='bfloat16'),
    ]
    with mock.patch.object(rotbits_jax, '__version__', 'another'):
      found.append(rotbits_jax.snapshot(path))
    self.assertLen(set(found), 4)
    code = [(folder / 'modeling_sliced_phi.py').exists() for folder in found]
    self.assertEqual(code, [True, False, True, True])
    # These are the defaults, by other names.
    self.assertEqual(rotbits_jax.snapshot(path, format='transformers'), found[0])
    self.assertEqual(rotbits_jax.snapshot(path, dtype=jnp.bfloat16), found[2])

  def test_a_missing_or_wrong_base_is_an_error(self):
    base = rotbits_jax.load_checkpoint(DENSE)
    tokens = base.model.params['embed']['tokens']
    params = base.model.params | {'embed': {'tokens': -tokens}}
    other = base._replace(model=base.model.replace(params=params))
    rotbits_jax.save_checkpoint(other, self.scratch / 'other')
    path = self.encoded(DENSE, 'x', base=DENSE)
    for _ in range(2):  # also when there is a snapshot
      with self.assertRaisesRegex(rotbits_jax.ContainerError, 'give that model'):
        rotbits_jax.snapshot(path)
      with self.assertRaisesRegex(rotbits_jax.ContainerError, 'of this base has other'):
        rotbits_jax.snapshot(path, self.scratch / 'other')
      with self.assertRaisesRegex(ValueError, 'must be on disk'):
        rotbits_jax.snapshot(path, base)
      found = rotbits_jax.snapshot(path, DENSE)
      self.assertEqual(self.names(), [found.name])

  def test_bad_input_leaves_nothing(self):
    path = self.encoded({'w': np.ones(8)}, 'x')
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'holds a PyTree'):
      rotbits_jax.snapshot(path)
    damaged = bytearray(self.encoded(DENSE, 'y').read_bytes())
    damaged[len(damaged) // 3] ^= 1
    path.write_bytes(damaged)
    with self.assertRaisesRegex(rotbits_jax.ContainerError, 'x: .* damaged'):
      rotbits_jax.snapshot(path)
    self.assertFalse(self.cache.exists())
    os.environ[cache.VARIABLE] = 'relative'
    with self.assertRaisesRegex(OSError, 'set ROTBITS_JAX_CACHE'):
      rotbits_jax.snapshot(self.scratch / 'y')

  def test_a_limit_keeps_the_new_one(self):
    path = self.encoded(DENSE, 'x')
    first = rotbits_jax.snapshot(path)
    second = rotbits_jax.snapshot(path, dtype='float32', limit=1)
    self.assertEqual(self.names(), [second.name])
    self.assertEqual(rotbits_jax.snapshot(path), first)
    self.assertCountEqual(rotbits_jax.prune_snapshots(), [first, second])


class CacheTest(Base):
  def start(self, seconds):
    command = [sys.executable, '-c', MAKE, self.scratch / 'log', str(seconds)]
    return subprocess.Popen(command, cwd=ROOT)

  def wait_for_line(self, process):
    while not (self.scratch / 'log').exists():
      self.assertIsNone(process.poll())
      time.sleep(0.05)

  def test_processes_that_race_make_it_once(self):
    processes = [self.start(0.5) for _ in range(4)]
    self.assertEqual([process.wait() for process in processes], [0] * 4)
    self.assertEqual((self.scratch / 'log').read_text(), 'made\n')
    self.assertEqual(self.names(), [NAME])

  def test_another_process_removes_its_folder_before_the_lock(self):
    found = [FileNotFoundError, *[mock.DEFAULT] * 20]
    with mock.patch.object(os, 'open', wraps=os.open, side_effect=found):
      cache.made(NAME, pathlib.Path.mkdir, show=False)
    self.assertEqual(self.names(), [NAME])

  def test_a_file_of_its_name_is_an_error(self):
    (self.cache / 'snapshots').mkdir(parents=True)
    (self.cache / 'snapshots' / NAME).touch()
    self.enterContext(mock.patch.object(outputs, 'fresh', side_effect=AssertionError))
    with self.assertRaisesRegex(NotADirectoryError, NAME):
      cache.made(NAME, pathlib.Path.mkdir, show=False)

  def test_one_that_is_being_made_stays_and_the_rest_of_a_killed_one_goes(self):
    process = self.start(60)
    self.wait_for_line(process)
    self.assertEqual(cache.prune(0), [])
    self.assertEqual(self.names(), [f'.{NAME}.partial'])
    process.kill()
    process.wait()
    self.assertEqual(cache.prune(0), [])
    self.assertEqual(self.names(), [])
    self.assertEqual(self.start(0).wait(), 0)

  def test_the_least_recently_used_go_first(self):
    def make(folder):
      (folder / 'sub').mkdir(parents=True)
      (folder / 'sub/file').write_bytes(bytes(100))

    names = [letter * cache.DIGITS for letter in 'abc']
    found = [cache.made(name, make, show=False) for name in names]
    for i, folder in enumerate(found):
      os.utime(folder, (i, i))
    cache.made(names[0], make, show=False)
    self.assertEqual(cache.prune(300), [])
    self.assertEqual(cache.prune(299), [found[1]])
    self.assertEqual(cache.prune(0, keep=found[2]), [found[0]])
    self.assertEqual(self.names(), [names[2]])

  def test_what_is_no_snapshot_stays(self):
    folders = self.cache / 'snapshots'
    (folders / 'thesis').mkdir(parents=True)
    (folders / 'thesis/text').write_text('years of work')
    (folders / '.thesis.partial').mkdir()
    (folders / NAME[1:]).touch()
    names = self.names()

    def make(folder):
      folder.mkdir()
      (folder / 'file').write_bytes(bytes(9))

    cache.made(NAME, make, show=False)
    self.assertEqual(cache.prune(0), [folders / NAME])
    self.assertEqual(self.names(), names)


if __name__ == '__main__':
  absltest.main()
