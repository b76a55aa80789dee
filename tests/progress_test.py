"""The time that a task still takes is told without what is done once."""

import fcntl
import itertools
import os
import pathlib
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from rotbits_jax.system import progress
from rotbits_jax.system import status

ROOT = pathlib.Path(__file__).parents[1]


def test_time_to_go_leaves_the_first_unit_out(monkeypatch, capsys):
  # The start, the first unit with its compilation, and two more. Each update asks for
  # the time up to twice.
  clock = itertools.chain([0], [100, 100], [170], [240])
  monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
  with progress.Progress('encode', 4, 'unit', show=True) as bar:
    for _ in range(3):
      bar.update()
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    'encode: 1 of 4 units, 1:40',
    'encode: 2 of 4 units, 2:50, 2:20 to go',
    'encode: 3 of 4 units, 4:00, 1:10 to go',
  ]


def test_bytes_have_their_sizes(monkeypatch, capsys):
  monkeypatch.setattr(progress, '_SECONDS', 0)
  with progress.Progress('encode', 4_000_000_000, 'B', show=True) as bar:
    bar.update(12_345_678)
  assert capsys.readouterr().err == 'encode: 12.3 MB of 4 GB, 0:00\n'


def test_without_stderr_nothing_is_shown(monkeypatch, capsys):
  monkeypatch.setattr(progress, '_SECONDS', 0)
  monkeypatch.setattr(sys, 'stderr', None)
  status.show('encode: reading ...')
  with progress.Progress('encode', 2, 'B', show=True) as bar:
    bar.update()
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(('term', 'drawn'), [('xterm', True), ('dumb', False)])
def test_only_terminals_that_can_overwrite_get_bars(term, drawn):
  """Something is shown at once, and its last line is the result."""
  reader, writer = pty.openpty()
  fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
  program = """
from rotbits_jax.system import progress, status
status.show('encode: reading ...')
with progress.Progress('encode', 2, 'B', show=True) as bar:
  bar.update(2)
status.clear()
"""
  environment = os.environ | {'TERM': term, 'PYTHONPATH': str(ROOT)}
  subprocess.run(
    [sys.executable, '-c', program], stderr=writer, env=environment, check=True
  )
  os.write(writer, b'end')
  shown = b''
  while not shown.endswith(b'end'):  # a terminal gives what it has in pieces
    shown += os.read(reader, 1 << 16)
  shown = shown.decode()
  if drawn:
    assert 'encode: reading ...' in shown
    assert '100%' in shown
  else:
    assert shown == 'encode: reading ...\r\nend'
