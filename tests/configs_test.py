"""The config files of the folder `configs`, in a clone and in an installed package."""

import subprocess
import venv

import pytest

import rotbits_jax
from rotbits_jax import presets
from rotbits_jax.system import config_files

ROOT = config_files.paths()['free'].parents[1]
NAMES = """
import pathlib
from rotbits_jax.system import config_files
print(*config_files.paths())
print(pathlib.Path(config_files.__file__).parents[2])
"""


def test_makes_a_preset(subtests):
  for name in config_files.paths():
    with subtests.test(name=name):
      fields = config_files.load(config_files.paths()[name])
      experiment = fields.pop('experiment', None)
      made = presets.make(fields.pop('preset'), **fields)
      if experiment is None:
        # The file states every option and its default.
        assert made.name == name
        assert made.options == presets.make(name).options
      else:
        # As in the paper.
        expected = {
          'canonicalizer': 'svd',
          'rotation_codec': 'symmetric_eig',
          'correction': 'threshold',
        }
        assert expected.items() <= made.options.items()


def test_every_preset_has_one():
  assert set(rotbits_jax.PRESETS) <= set(config_files.paths())


def test_only_names_are_replaced():
  free = config_files.paths()['free']
  for given, expected in (
    ('--config=free', f'--config={free}'),
    ('-config=free:1=2', f'-config={free}:1=2'),
    ('--config=other/free.py', '--config=other/free.py'),
    ('--output=free', '--output=free'),
    ('free', 'free'),
  ):
    assert config_files.named('config', given) == expected


@pytest.mark.slow
@pytest.mark.parametrize('editable', [False, True])
def test_installed_package_has_them(tmp_path, editable):
  clone = tmp_path / 'clone'
  tracked = ['git', 'ls-files', 'rotbits_jax', 'configs', '*.py', '*.md', 'LICENSE']
  files = subprocess.run(tracked, cwd=ROOT, capture_output=True, check=True, text=True)
  for name in files.stdout.split():
    (clone / name).parent.mkdir(parents=True, exist_ok=True)
    (clone / name).write_bytes((ROOT / name).read_bytes())
  venv.create(tmp_path / 'environment', with_pip=True)
  python = tmp_path / 'environment' / 'bin' / 'python'
  pip = [python, '-m', 'pip', 'install', '--quiet', '--no-deps']
  pip += ['--disable-pip-version-check', *(['-e'] if editable else []), clone]
  subprocess.run(pip, check=True, cwd=tmp_path)
  run = {'cwd': tmp_path, 'capture_output': True, 'check': True, 'text': True}
  found = subprocess.run([python, '-I', '-c', NAMES], **run).stdout.splitlines()
  assert found[0].split() == list(config_files.paths())
  assert (found[1] == str(clone)) == editable
