"""Outputs: which paths may be written, and how old results are kept."""

import errno
import os
import pathlib
import stat
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from rotbits_jax.system import outputs

ROOT = pathlib.Path(__file__).parents[1]


class Base(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    scratch = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(os.path.realpath(scratch))
    self.target = self.folder / 'x'

  def names(self):
    return sorted(path.name for path in self.folder.iterdir())


class CheckTest(Base):
  def check(self, overwrite=True):
    outputs.check(outputs.resolved(self.target), overwrite=overwrite)

  def test_a_new_file(self):
    self.check(overwrite=False)

  def test_a_file_that_exists_needs_overwrite(self):
    self.target.write_text('old')
    self.check()
    with self.assertRaisesRegex(FileExistsError, 'overwrite'):
      self.check(overwrite=False)

  def test_only_regular_files_are_replaced(self):
    os.mkfifo(self.target)
    with self.assertRaisesRegex(OSError, 'not a regular file'):
      self.check()
    self.target = pathlib.Path(os.devnull)
    with self.assertRaisesRegex(OSError, 'not a regular file'):
      self.check()
    self.target = self.folder
    with self.assertRaises(IsADirectoryError):
      self.check()

  def test_a_read_only_file_stays(self):
    self.target.write_text('old')
    self.target.chmod(0o444)
    with self.assertRaisesRegex(PermissionError, 'read-only'):
      self.check()

  def test_links_are_followed(self):
    link = self.folder / 'link'
    link.symlink_to('x')
    self.assertEqual(outputs.resolved(link), self.target)
    self.target.mkdir()
    self.target = link
    with self.assertRaises(IsADirectoryError):
      self.check()

  def test_a_circle_of_links(self):
    self.target.symlink_to('x')
    with self.assertRaises(OSError):
      self.check()

  def test_an_empty_path_and_a_missing_folder(self):
    with self.assertRaisesRegex(OSError, 'empty'):
      outputs.resolved('')
    self.target = self.folder / 'missing' / 'x'
    with self.assertRaisesRegex(NotADirectoryError, 'no such directory'):
      self.check()

  def test_a_folder_that_cannot_be_written(self):
    program = f"""
import os, pathlib
from rotbits_jax.system import outputs
target = pathlib.Path({str(self.target)!r})
for check in (
  lambda: outputs.check(target, overwrite=True),
  lambda: outputs.directory_target(target / 'a' / 'b'),
):
  try:
    check()
  except PermissionError as error:
    assert 'cannot be written' in str(error), error
  else:
    raise AssertionError
"""
    self.folder.chmod(0o555)
    own = {} if os.geteuid() else {'user': 65534}  # root may write anywhere
    done = subprocess.run(
      [sys.executable, '-c', program],
      cwd=ROOT,
      check=False,
      capture_output=True,
      text=True,
      **own,
    )
    self.folder.chmod(0o755)
    self.assertEqual((done.returncode, done.stderr), (0, ''))


class DirectoryTest(Base):
  def test_links_are_followed_and_files_refused(self):
    (self.folder / 'link').symlink_to('x')
    self.assertEqual(outputs.directory_target(self.folder / 'link'), self.target)
    self.target.write_text('a file')
    with self.assertRaisesRegex(NotADirectoryError, 'is a file'):
      outputs.directory_target(self.folder / 'link')
    with self.assertRaisesRegex(NotADirectoryError, "is a file.*/x'$"):
      outputs.directory_target(self.target / 'below')


class StagingTest(Base):
  def test_what_a_killed_run_left_is_removed(self):
    staging = outputs.staging(self.target)
    (staging / 'folder').mkdir(parents=True)
    (staging / 'folder' / 'file').write_text('half')
    (staging / 'link').symlink_to(self.folder)
    with outputs.fresh(staging) as folder:
      self.assertEmpty(list(folder.iterdir()))
    self.assertEmpty(self.names())

  def test_a_folder_that_another_process_made_stays(self):
    staging = outputs.staging(self.target)
    with outputs.fresh(staging) as folder:
      folder.rename(self.folder / 'moved')
      staging.mkdir()
      (staging / 'file').touch()
    self.assertTrue((staging / 'file').exists())

  def test_mounts(self):
    self.assertTrue(outputs.is_mount(pathlib.Path('/proc')))
    self.assertFalse(outputs.is_mount(self.folder))
    bound = self.folder / 'a b'
    bound.mkdir()
    mount = ['mount', '--bind', str(self.folder), str(bound)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
      self.skipTest('only root may mount')
    try:
      self.assertTrue(outputs.is_mount(bound))  # of the same file system
    finally:
      subprocess.run(['umount', str(bound)], check=True)

  def test_folders_above_go_with_an_exception(self):
    staging = outputs.staging(self.folder / 'a' / 'b' / 'x')
    with self.assertRaises(KeyboardInterrupt), outputs.fresh(staging):
      raise KeyboardInterrupt
    self.assertEmpty(self.names())
    with outputs.fresh(staging) as folder:
      outputs.move(folder, folder.parent / 'x')
    self.assertEqual(self.names(), ['a'])

  def test_one_run_at_a_time(self):
    staging = outputs.staging(self.target)
    with outputs.fresh(staging):
      with (
        self.assertRaisesRegex(BlockingIOError, 'another process'),
        outputs.fresh(staging),
      ):
        self.fail('two runs hold one lock')
      self.assertTrue(staging.exists())
    with outputs.fresh(staging):
      pass

  def test_a_link_is_no_staging_folder(self):
    outside = self.folder / 'outside'
    outside.mkdir()
    (outside / 'file').write_text('stays')
    outputs.staging(self.target).symlink_to(outside)
    with self.assertRaises(OSError), outputs.fresh(outputs.staging(self.target)):
      self.fail('a link was followed')
    self.assertTrue((outside / 'file').exists())

  def test_a_replaced_file_keeps_its_mode(self):
    source = self.folder / 'new'
    self.target.write_text('old')
    self.target.chmod(0o640)
    source.write_text('new')
    outputs.move(source, self.target)
    self.assertEqual(self.target.read_text(), 'new')
    self.assertEqual(stat.S_IMODE(self.target.stat().st_mode), 0o640)
    self.assertEqual(self.names(), ['x'])


class RemoveTest(Base):
  def test_a_file_and_one_that_is_not_there(self):
    self.target.write_text('old')
    for _ in range(2):
      outputs.remove(self.target)
      self.assertEmpty(self.names())


class NamedTest(Base):
  def test_errors_without_a_path_get_one(self):
    with self.assertRaises(OSError) as caught, outputs.named(self.target):
      raise OSError(errno.ENOSPC, 'No space left on device')
    self.assertEqual(caught.exception.filename, str(self.target))
    with self.assertRaises(FileNotFoundError) as caught, outputs.named(self.target):
      (self.folder / 'other').read_bytes()
    self.assertEqual(caught.exception.filename, str(self.folder / 'other'))


if __name__ == '__main__':
  absltest.main()
