"""Outputs: which paths may be written, and how old results are kept."""

import errno
import os
import pathlib
import stat

import pytest

from rotbits_jax.system import outputs


def test_a_new_file_or_an_old_one_with_overwrite(tmp_path):
  target = outputs.resolved(tmp_path / 'x')
  outputs.check(target, overwrite=False)
  target.write_text('old')
  outputs.check(target, overwrite=True)
  with pytest.raises(FileExistsError, match='overwrite'):
    outputs.check(target, overwrite=False)


def circle(folder):
  (folder / 'x').symlink_to('x')
  return folder / 'x'


def fifo(folder):
  os.mkfifo(folder / 'x')
  return folder / 'x'


def read_only(folder):
  (folder / 'x').write_text('old')
  (folder / 'x').chmod(0o444)
  return folder / 'x'


def link_to_folder(folder):
  (folder / 'link').symlink_to('.')
  return folder / 'link'


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (circle, 'not a regular file'),
    (fifo, 'not a regular file'),
    (read_only, 'read-only'),
    (link_to_folder, 'is a directory'),
    (lambda folder: os.devnull, 'not a regular file'),
    (lambda folder: folder / 'missing' / 'x', 'no such directory'),
    (lambda folder: '', 'empty'),
  ],
)
def test_what_is_not_written(tmp_path, make, words):
  with pytest.raises(OSError, match=words):
    outputs.check(outputs.resolved(make(tmp_path)), overwrite=True)


def test_a_directory(tmp_path):
  (tmp_path / 'link').symlink_to('x')
  assert outputs.directory_target(tmp_path / 'link' / 'y') == tmp_path / 'x' / 'y'
  (tmp_path / 'x').write_text('a file')
  with pytest.raises(NotADirectoryError, match=r"is a file.*/x'$"):
    outputs.directory_target(tmp_path / 'link' / 'below')


def test_what_a_killed_run_left_is_removed(tmp_path):
  staging = outputs.staging(tmp_path / 'x')
  (staging / 'folder').mkdir(parents=True)
  (staging / 'folder' / 'file').write_text('half')
  (staging / 'link').symlink_to(tmp_path)
  with outputs.fresh(staging) as folder:
    assert list(folder.iterdir()) == []
  assert list(tmp_path.iterdir()) == []


def test_folders_above_go_with_an_exception(tmp_path):
  staging = outputs.staging(tmp_path / 'a' / 'b' / 'x')
  with pytest.raises(ZeroDivisionError), outputs.fresh(staging):
    raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []
  with outputs.fresh(staging) as folder:
    (folder / 'x').write_text('whole')
    outputs.move(folder / 'x', folder.parent / 'x')
  assert [x.name for x in (tmp_path / 'a' / 'b').iterdir()] == ['x']


def test_a_link_is_no_staging_folder(tmp_path):
  outside = tmp_path / 'outside'
  outside.mkdir()
  (outside / 'file').write_text('stays')
  staging = outputs.staging(tmp_path / 'x')
  staging.symlink_to(outside)
  with pytest.raises(OSError, match='not a folder'), outputs.fresh(staging):
    raise AssertionError
  assert (outside / 'file').exists()


def test_a_replaced_file_keeps_its_mode(tmp_path):
  source, target = tmp_path / 'new', tmp_path / 'x'
  target.write_text('old')
  target.chmod(0o640)
  source.write_text('new')
  outputs.move(source, target)
  assert target.read_text() == 'new'
  assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_errors_without_a_path_get_one(tmp_path):
  with pytest.raises(OSError, match=str(tmp_path)), outputs.named(tmp_path):
    raise OSError(errno.ENOSPC, 'No space left on device')
  with pytest.raises(FileNotFoundError, match='other'), outputs.named(tmp_path):
    pathlib.Path(tmp_path, 'other').read_bytes()
