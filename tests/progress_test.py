"""Progress is shown on stderr if it is asked for, and changes no result."""

import pytest

from rotbits_jax.system import progress


@pytest.mark.parametrize('show', [False, True])
def test_track(capsys, show):
  items = progress.track(range(3), 'work', 'layer', total=3, show=show)
  assert list(items) == [0, 1, 2]
  assert capsys.readouterr().out == ''


def test_nothing_is_shown_without_asking(capsys):
  with progress.Progress('encode', 4, 'B', show=False) as bar:
    bar.update(2)
    bar.stage('a stage')
    bar.finish()
  assert capsys.readouterr().err == ''
