"""Every code block of README.md runs as it stands in a fresh clone."""

import pathlib
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest

import rotbits_jax
from rotbits_jax.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)


@pytest.fixture(name='clone')
def _clone(tmp_path):
  """A folder with what a clone has; what the blocks write stays out of this one."""
  for path in ROOT.iterdir():
    if not path.name.startswith('.') and path.suffix != '.rotbits':
      (tmp_path / path.name).symlink_to(path)
  (tmp_path / 'MY-MODEL').symlink_to(ROOT / 'tests/testdata/opt-small-sliced-0.2')
  return tmp_path


def test_blocks_are_of_known_kinds():
  assert {kind for kind, _ in BLOCKS} == {'bash', 'python'}
  assert '```\n' not in re.sub(r'^```\w+\n.*?^```$', '', README, flags=re.M | re.S)


INSTALLATION = (
  'python3 -m venv .venv',
  '. .venv/bin/activate',
  'pip install ".[text]"',
)
# The calibration compiles as many programs as all other commands together.
CALIBRATED = '--max_kl'


@pytest.mark.slow
@pytest.mark.parametrize(
  'calibrates', [True, pytest.param(False, marks=pytest.mark.daily)]
)
def test_all_blocks(clone, rotbits, monkeypatch, calibrates):
  """In their order, because later ones use the files of earlier ones."""
  monkeypatch.chdir(clone)
  python = ''
  ran = []
  for kind, block in BLOCKS:
    if kind == 'python':
      python += block
      continue
    for line in block.replace('\\\n', ' ').splitlines():
      if CALIBRATED in line and not calibrates:
        continue
      command, *args = shlex.split(line, comments=True)
      ran.append(command)
      if command == 'rotbits':
        assert rotbits(*args)[0] == 0, line
      else:
        assert line in INSTALLATION  # what the tests run in
  assert ran.count('rotbits') > 5
  (
    clone / 'my-model.rotbits'
  ).unlink()  # Python encodes without asking, but so is it new
  exec(compile(python, 'README.md', 'exec'), {})


def test_it_names_every_extra_and_command():
  setup = (ROOT / 'setup.py').read_text()
  requires = setup.partition('extras_require')[2]
  extras = re.findall(r"^    '(\w+)': ", requires, re.MULTILINE)
  assert extras
  for extra in extras:
    assert f'| `{extra}` |' in (ROOT / 'CONTRIBUTING.md').read_text()
  for command in main.COMMANDS:
    assert f'| `rotbits {command}` |' in README


def test_it_is_short():
  assert len(README.split()) <= 1200


def test_links_lead_somewhere():
  for target in re.findall(r'\]\((?!https?:)([^)#]+)', README):
    assert (ROOT / target).exists(), target


def test_an_index_shows_its_pictures_and_links(monkeypatch):
  monkeypatch.setenv('ROTBITS_JAX_ADDRESS', 'https://example.org/us/rotbits')
  tools = mock.Mock(find_packages=lambda include: [])
  with mock.patch.dict(sys.modules, setuptools=tools):
    runpy.run_path(str(ROOT / 'setup.py'))
  metadata = tools.setup.call_args.kwargs
  assert metadata['version'] == rotbits_jax.__version__
  given = re.findall(r'(!?)\[[^\]]*\]\(([^)]*)\)', README)
  found = re.findall(r'(!?)\[[^\]]*\]\(([^)]*)\)', metadata['long_description'])
  assert {mark for mark, _ in given} == {'', '!'}
  for (mark, target), (_, address) in zip(given, found, strict=True):
    if not target.startswith(('https://', '#')):
      kind = 'raw' if mark else 'blob'
      tag = f'v{rotbits_jax.__version__}'
      target = f'https://example.org/us/rotbits/{kind}/{tag}/{target}'
    assert address == target
