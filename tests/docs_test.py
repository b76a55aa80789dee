"""The code of README, documentation and notebooks runs; tables are those of RESULTS."""

import doctest
import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import nbclient
import nbformat
import numpy as np
import pytest
import word_checkpoints

from benchmarks import common
from benchmarks import demo
from benchmarks import kinds
import rotbits_jax
from rotbits_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(
  path.relative_to(DOCS).as_posix()
  for path in DOCS.rglob('*.md')
  if not {'commands', 'notebooks', 'reference'} & set(path.relative_to(DOCS).parts)
)
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))
CHECKPOINT = ROOT / 'tests' / 'testdata' / 'opt-small-sliced-0.2'
MODULES = [
  path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
  for path in sorted((ROOT / 'rotbits_jax').rglob('*.py'))
  if '>>>' in path.read_text('utf-8')
]
README = (ROOT / 'README.md').read_text('utf-8')
README_BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
README_COMMANDS = [
  shlex.split(line, comments=True)
  for language, block in README_BLOCKS
  if language == 'bash'
  for line in block.replace('\\\n', ' ').splitlines()
]
ELSEWHERE = ('bash', 'python3', '.', 'pip')  # what the tests run in, and what runs them


def blocks(page, language):
  """Returns the blocks of code of a page that are in this language."""
  text = (DOCS / page).read_text('utf-8')
  return ''.join(re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S))


def pages_with(language):
  return [page for page in PAGES if blocks(page, language)]


def run_examples(tests):
  report = []
  runner = doctest.DocTestRunner(
    optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
  )
  for test in tests:
    runner.run(test, out=report.append)
  assert runner.summarize(verbose=False).failed == 0, ''.join(report)


@pytest.mark.parametrize('page', pages_with('pycon'))
def test_examples(page):
  parse = doctest.DocTestParser().get_doctest
  run_examples([parse(blocks(page, 'pycon'), {}, page, page, 0)])


def test_examples_in_docstrings(subtests):
  names = {'rotbits_jax': rotbits_jax, 'jax': jax, 'jnp': jax.numpy, 'np': np}
  for module in MODULES:
    with subtests.test(module=module):
      found = importlib.import_module(module)
      run_examples(doctest.DocTestFinder().find(found, extraglobs=names))


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.parametrize('page', pages_with('python'))
def test_programs(page, tmp_path, monkeypatch):
  path = CHECKPOINT.with_name('phi2-tiny-sliced-0.25')
  for name in ('llama', 'model'):
    rotbits_jax.encode_to_file(path, tmp_path / f'{name}.rotbits', preset='exact')
  monkeypatch.chdir(tmp_path)
  exec(compile(blocks(page, 'python'), page, 'exec'), {})


@pytest.mark.slow
@pytest.mark.parametrize('page', pages_with('bash'))
def test_commands(page, tmp_path):
  text = (ROOT / 'rotbits_jax' / 'data' / 'evaluation.txt').read_text('utf-8')
  (tmp_path / 'text.txt').write_text(text[:4000])
  program = f'rotbits() {{ {sys.executable} -m rotbits_jax "$@"; }}\n'
  settings = {
    'CHECKPOINT': word_checkpoints.copy_with_tokenizer('llama-tiny-dense', tmp_path),
    'SLICED': CHECKPOINT,
    'TEXT': tmp_path / 'text.txt',
  }
  settings = {name: str(path) for name, path in settings.items()}
  subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', program + blocks(page, 'bash')],
    check=True,
    cwd=tmp_path,
    env=os.environ | settings | {'PYTHONPATH': str(ROOT)},
    timeout=600,
  )


def test_notebooks_have_outputs():
  installs = set()
  for path in NOTEBOOKS:
    cells = nbformat.read(path, as_version=4).cells
    installs.add(cells[1].source)
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    assert outputs, path
    names = {x.get('name', x.output_type) for x in outputs}
    assert names.isdisjoint({'error', 'stderr'}), path
  assert len(installs) == 1


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_without_warnings(path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('QUICK', '1')
  notebook = nbformat.read(path, as_version=4)
  resources = {'metadata': {'path': str(path.parent)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  assert not [x.text for x in outputs if x.get('name') == 'stderr']


@pytest.mark.slow
def test_site_is_built_without_warnings(tmp_path):
  pytest.importorskip('sphinx')
  # The site's pages of references and notebooks are made beside the others.
  docs = shutil.copytree(DOCS, tmp_path / 'docs')
  shutil.copytree(ROOT / 'colabs', tmp_path / 'colabs')
  for page in ROOT.glob('*.md'):  # pages of the site include some
    shutil.copy(page, tmp_path)
  command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html']
  done = subprocess.run(
    [*command, docs, tmp_path / 'site'],
    capture_output=True,
    check=False,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    text=True,
    timeout=1200,
  )
  assert done.returncode == 0, done.stderr
  index = (tmp_path / 'site/searchindex.js').read_text('utf-8')
  ignored = (tmp_path / 'site/_static/language_data.js').read_text('utf-8')
  for stem in ('near', 'instal', 'canonic'):
    assert f'"{stem}":' in index
    assert f'"{stem}"' not in ignored


@pytest.fixture(name='clone')
def _clone(tmp_path, monkeypatch):
  """A folder with what a clone has, so that blocks write nothing into this one."""
  for path in ROOT.iterdir():
    if not path.name.startswith('.') and path.suffix != '.rotbits':
      (tmp_path / path.name).symlink_to(path)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.usefixtures('clone')
def test_commands_of_the_readme(rotbits):
  """In their order, because later ones use the files of earlier ones."""
  for command, *args in README_COMMANDS:
    if command == 'rotbits':
      assert rotbits(*args)[0] == 0, args
    elif command not in ELSEWHERE:
      subprocess.run([command, *args], check=True)


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.usefixtures('clone')
def test_python_of_the_readme():
  os.symlink(CHECKPOINT, 'SLICED')
  code = ''.join(block for language, block in README_BLOCKS if language == 'python')
  exec(compile(code, 'README.md', 'exec'), {})


def test_readme_names_every_command_and_contributing_every_extra():
  named = re.search(r'^The commands are (.*?)\n\n', README, re.M | re.S)[1]
  assert set(re.findall(r'`([a-z]+)`', named)) == set(main.COMMANDS)
  requires = (ROOT / 'setup.py').read_text().partition('extras_require')[2]
  extras = re.findall(r"^    '(\w+)': ", requires, re.MULTILINE)
  assert extras
  for extra in extras:
    assert f'| `{extra}` |' in (ROOT / 'CONTRIBUTING.md').read_text()


def test_its_tables_are_those_of_the_results():
  for name, table in kinds.tables_of_readme().items():
    assert f'<!-- {name}: start -->\n{table}\n<!-- {name}: end -->' in README


def test_links_lead_somewhere():
  for page in ('README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'RESULTS.md'):
    text = (ROOT / page).read_text('utf-8')
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', text):
      assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.daily
def test_demo_of_the_benchmarks(tmp_path):
  (section,) = demo.run(common.Settings(output=tmp_path), full=False)
  for preset in ('exact', 'free', 'near'):
    assert f'`{preset}`' in section.body
  assert 'every bit' in section.body


def test_every_section_is_written_by_a_benchmark():
  text = (ROOT / 'RESULTS.md').read_text('utf-8')
  titles = re.findall(r'^## .*$', text, re.M)
  named = re.findall(r'^## .*\n\n`python -m benchmarks (\w+)`', text, re.M)
  assert len(named) == len(titles)
  assert set(named) <= set(common.BENCHMARKS)
  assert text.count(': start -->') == text.count(': end -->') == len(titles)
