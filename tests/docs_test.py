"""The documentation's code runs, and its site is built without warnings."""

import doctest
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob('*.md'))
CHECKPOINT = ROOT / 'tests' / 'testdata' / 'opt-small-sliced-0.2'


def blocks(page, language):
  """The blocks of code of a page that are in this language."""
  text = (DOCS / page).read_text('utf-8')
  return re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S)


def pages_with(language):
  return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize('page', pages_with('pycon'))
def test_examples(page):
  text = ''.join(blocks(page, 'pycon'))
  flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
  test = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
  report = []
  runner = doctest.DocTestRunner(optionflags=flags)
  runner.run(test, out=report.append)
  assert runner.summarize(verbose=False).failed == 0, ''.join(report)


@pytest.mark.slow
@pytest.mark.parametrize('page', pages_with('bash'))
def test_commands(page, tmp_path):
  words = ' '.join(
    (ROOT / 'rotbits_jax' / 'data' / 'evaluation.txt').read_text().split()
  )
  (tmp_path / 'text.txt').write_text(words[:4000])
  program = f'rotbits() {{ {sys.executable} -m rotbits_jax.cli.main "$@"; }}\n'
  settings = {'CHECKPOINT': str(CHECKPOINT), 'TEXT': str(tmp_path / 'text.txt')}
  subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', program + ''.join(blocks(page, 'bash'))],
    check=True,
    cwd=tmp_path,
    env=os.environ | settings | {'PYTHONPATH': str(ROOT)},
    timeout=300,
  )


def test_every_public_symbol_is_documented():
  import rotbits_jax

  text = ''.join((DOCS / page).read_text('utf-8') for page in PAGES)
  modules = set(re.findall(r'automodule:: (\S+)', text))
  for name in rotbits_jax.__all__:
    value = getattr(rotbits_jax, name)
    home = getattr(value, '__name__', '')
    assert home in modules or re.search(rf'(autofunction:: |`){name}\b', text), name


@pytest.mark.slow
def test_site_is_built_without_warnings(tmp_path):
  pytest.importorskip('sphinx')
  # Pages with code write beside themselves, so that they get a copy.
  docs = shutil.copytree(DOCS, tmp_path / 'docs')
  command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html']
  found = subprocess.run(
    [*command, docs, tmp_path / 'site'],
    capture_output=True,
    check=False,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    text=True,
    timeout=1200,
  )
  assert found.returncode == 0, found.stderr
  for page in PAGES:
    if page != 'pictures/README.md':
      assert (tmp_path / 'site' / page).with_suffix('.html').exists()
