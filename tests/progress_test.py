"""The time that a task still takes is told without what is done once."""

import itertools
import time

from rotbits_jax.system import progress


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
