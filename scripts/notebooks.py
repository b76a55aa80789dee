"""Runs the notebooks and stores them, with their outputs, as pages of the site.

  python -m scripts.notebooks [NAME ...]

NAME is one such as 02_bits_back; by default all are run. The site shows what is stored
in docs/notebooks, because 03 takes minutes. A test compares the code with colabs/.
"""

import pathlib
import sys

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ROOT / 'docs' / 'notebooks'


def stored(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> None:
  """Runs a notebook in a folder, and prepares it for the site."""
  client = nbclient.NotebookClient(
    notebook,
    timeout=3600,
    record_timing=False,
    resources={'metadata': {'path': str(folder)}},
  )
  client.execute()
  for cell in notebook.cells:
    if 'REPOSITORY' in cell.source:
      cell.metadata['tags'] = ['remove-cell']
    if 'outputs' in cell:
      cell.outputs = [x for x in cell.outputs if x.get('name') != 'stderr']


def main(names: list[str]) -> None:
  for path in sorted((ROOT / 'colabs').glob('*.ipynb')):
    if not names or path.stem in names:
      notebook = nbformat.read(path, as_version=4)
      stored(notebook, path.parent)
      nbformat.write(notebook, PAGES / path.name)


if __name__ == '__main__':
  main(sys.argv[1:])
