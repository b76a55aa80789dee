"""The examples run."""

import pathlib
import runpy

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


@pytest.mark.parametrize('name', ['orbax_checkpoint'])
def test_example(name, capsys):
  runpy.run_path(str(EXAMPLES / f'{name}.py'), run_name='__main__')
  assert capsys.readouterr().out
