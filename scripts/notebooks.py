"""Runs the notebooks of colabs/ and stores their outputs in them.

  python -m scripts.notebooks [NAME ...]

NAME is one such as 02_bits_back; by default all are run.
"""

import pathlib
import sys

import nbclient
import nbformat

COLABS = pathlib.Path(__file__).parents[1] / 'colabs'


def main(names: list[str]) -> None:
  for path in sorted(COLABS.glob('*.ipynb')):
    if names and path.stem not in names:
      continue
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
      notebook,
      timeout=3600,
      record_timing=False,
      resources={'metadata': {'path': str(COLABS)}},
    ).execute()
    for cell in notebook.cells:
      if 'outputs' in cell:
        cell.outputs = [x for x in cell.outputs if x.get('name') != 'stderr']
    nbformat.write(notebook, path)


if __name__ == '__main__':
  main(sys.argv[1:])
