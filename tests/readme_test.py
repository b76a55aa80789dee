"""Every code block of README.md runs as it stands in a fresh clone."""

import pathlib
import re
import shlex

import pytest

from rotbits_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text('utf-8')
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
COMMANDS = [
  shlex.split(line, comments=True)
  for language, block in BLOCKS
  if language == 'bash'
  for line in block.replace('\\\n', ' ').splitlines()
]
ELSEWHERE = ('bash', 'python3', '.', 'pip')  # what the tests run in, and what runs them


@pytest.fixture(name='clone')
def _clone(tmp_path, monkeypatch):
  """A folder with what a clone has, so that blocks write nothing into this one."""
  for path in ROOT.iterdir():
    if not path.name.startswith('.') and path.suffix != '.rotbits':
      (tmp_path / path.name).symlink_to(path)
  (tmp_path / 'MY-MODEL').symlink_to(ROOT / 'tests/testdata/opt-small-sliced-0.2')
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.usefixtures('clone')
def test_commands(rotbits):
  """In their order, because later ones use the files of earlier ones."""
  for command, *args in COMMANDS:
    if command == 'rotbits':
      assert rotbits(*args)[0] == 0, args
    else:
      assert command in (*ELSEWHERE, 'cp')


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.usefixtures('clone')
def test_python():
  code = ''.join(block for language, block in BLOCKS if language == 'python')
  exec(compile(code, 'README.md', 'exec'), {})


def test_it_names_every_command_and_contributing_every_extra():
  named = re.search(r'^The commands are (.*?)\n\n', README, re.M | re.S)[1]
  assert set(re.findall(r'`([a-z]+)`', named)) == set(main.COMMANDS)
  requires = (ROOT / 'setup.py').read_text().partition('extras_require')[2]
  extras = re.findall(r"^    '(\w+)': ", requires, re.MULTILINE)
  assert extras
  for extra in extras:
    assert f'| `{extra}` |' in (ROOT / 'CONTRIBUTING.md').read_text()


def test_its_table_is_that_of_the_results():
  rows = re.findall(r'^\|.*%\*\* \|$', README, re.MULTILINE)
  results = (ROOT / 'RESULTS.md').read_text('utf-8')
  assert rows
  for row in rows:
    assert row in results


def test_links_lead_somewhere():
  for page in ('README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'RESULTS.md'):
    text = (ROOT / page).read_text('utf-8')
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', text):
      assert (ROOT / target).exists(), target
