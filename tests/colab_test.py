"""The notebooks run from top to bottom and are stored without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

COLABS = pathlib.Path(__file__).parents[1] / 'colabs'
NOTEBOOKS = sorted(COLABS.glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
class TestColabs:
  def test_outputs_are_stripped(self, path):
    for cell in nbformat.read(path, as_version=4).cells:
      assert not cell.get('outputs')
      assert cell.get('execution_count') is None

  @pytest.mark.slow
  @pytest.mark.parametrize('directory', ['.', '..'], ids=['colabs', 'root'])
  def test_runs(self, path, directory):
    notebook = nbformat.read(path, as_version=4)
    resources = {'metadata': {'path': str(path.parent / directory)}}
    client = nbclient.NotebookClient(notebook, timeout=300, resources=resources)
    client.execute()  # raises the exception of a cell
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    assert outputs
    assert not [out.text for out in outputs if out.get('name') == 'stderr']
