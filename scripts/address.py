"""Writes the address of the repository into the files that cannot look it up.

  python -m scripts.address https://github.com/OWNER/NAME

Notebooks get a badge that opens them in Colab, and clone from the address where the
package index does not have the package. CITATION.cff names it. Once it is written, the
command changes nothing.
"""

import json
import pathlib
import re
import sys

BADGE = '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'


def main(address: str, root: pathlib.Path) -> None:
  path = address.removeprefix('https://github.com/').removesuffix('/')
  if not re.fullmatch(r'[\w.-]+/[\w.-]+', path):
    raise ValueError(f'expected https://github.com/OWNER/NAME, got {address}')
  address = f'https://github.com/{path}'
  for notebook in sorted((root / 'colabs').glob('*.ipynb')):
    content = json.loads(notebook.read_text('utf-8'))
    title = content['cells'][0]['source']
    if title[0].startswith(BADGE):
      del title[:2]
    colab = f'https://colab.research.google.com/github/{path}/blob/main/colabs'
    title[:0] = [f'{BADGE}({colab}/{notebook.name})\n', '\n']
    for cell in content['cells']:
      own = "REPOSITORY = '.*?'", f"REPOSITORY = '{address}'"
      cell['source'] = [re.sub(*own, line) for line in cell['source']]
    text = json.dumps(content, indent=1, ensure_ascii=False)
    notebook.write_text(f'{text}\n', 'utf-8')
  citation = root / 'CITATION.cff'
  lines = citation.read_text('utf-8').splitlines()
  lines = [line for line in lines if not line.startswith('repository-code:')]
  lines.insert(1, f'repository-code: {address}')
  citation.write_text('\n'.join(lines) + '\n', 'utf-8')


if __name__ == '__main__':
  main(sys.argv[1], pathlib.Path(__file__).parents[1])
