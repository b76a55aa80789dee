"""The config files of the folder `configs`, in a clone and in an installed package."""

import pathlib
import runpy
import subprocess
import venv

import pytest

from rotbits_jax import presets
from rotbits_jax.cli import program

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in program.config_folder().glob('[!_]*.py'))


def test_each_makes_a_preset():
  assert set(presets.PRESETS) <= set(CONFIGS)
  for name in CONFIGS:
    get_config = runpy.run_path(program.config_folder() / f'{name}.py')['get_config']
    fields = get_config().to_dict()
    fields.pop('experiment', None)
    made = presets.make(fields.pop('preset'), **fields)
    if name in presets.PRESETS:  # the file states every option and its default
      assert made.name == name
      assert made.options == presets.make(name).options


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
  code = 'import rotbits_jax; print(rotbits_jax.__path__[0])'
  run = {'cwd': tmp_path, 'capture_output': True, 'check': True, 'text': True}
  package = subprocess.run([python, '-I', '-c', code], **run).stdout.strip()
  folder = clone / 'configs' if editable else pathlib.Path(package, 'configs')
  assert sorted(path.stem for path in folder.glob('[!_]*.py')) == CONFIGS
