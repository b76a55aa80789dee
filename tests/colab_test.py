"""The notebooks run from top to bottom, also on a fresh runtime."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import venv

import jax
import nbclient
import nbformat
import pytest

from scripts import address as address_lib

ROOT = pathlib.Path(__file__).parents[1]
COLABS = ROOT / 'colabs'
NOTEBOOKS = sorted(COLABS.glob('*.ipynb'))

# Runs notebooks: the arguments are the working directory and their paths.
RUN = """
import sys
import nbclient, nbformat
for path in sys.argv[2:]:
  notebook = nbformat.read(path, as_version=4)
  resources = {'metadata': {'path': sys.argv[1]}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
"""


def source_of_installation(path, repository=''):
  (source,) = (
    cell.source
    for cell in nbformat.read(path, as_version=4).cells
    if 'REPOSITORY' in cell.source
  )
  return re.sub(r"REPOSITORY = '.*?'", f"REPOSITORY = '{repository}'", source)


@pytest.fixture(name='pip')
def _pip(monkeypatch):
  """Fails in place of pip, unless `succeeds` is set; notes constraints and packages."""
  pip = types.SimpleNamespace(succeeds=False, calls=[])
  run = subprocess.run

  def instead(command, **options):
    if 'pip' not in command:
      return run(command, **options)
    *_, constraints, package = command
    pip.calls.append((constraints.read_text(), package))
    return subprocess.CompletedProcess(command, not pip.succeeds)

  monkeypatch.setattr(subprocess, 'run', instead)
  return pip


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
class TestColabs:
  def test_outputs_are_stripped(self, path):
    for cell in nbformat.read(path, as_version=4).cells:
      assert not cell.get('outputs')
      assert cell.get('execution_count') is None

  def test_the_site_has_it_with_outputs(self, path):
    """`python -m scripts.notebooks` has run what is there now."""
    stored = nbformat.read(ROOT / 'docs' / 'notebooks' / path.name, as_version=4)
    given = nbformat.read(path, as_version=4)
    assert [x.source for x in stored.cells] == [x.source for x in given.cells]
    outputs = [out for cell in stored.cells for out in cell.get('outputs', [])]
    assert outputs
    kinds = {x.get('name', x.output_type) for x in outputs}
    assert kinds.isdisjoint({'error', 'stderr'})

  def test_outside_of_a_clone_the_index_has_the_package(
    self, path, tmp_path, monkeypatch, pip
  ):
    monkeypatch.chdir(tmp_path)
    pip.succeeds = True
    exec(source_of_installation(path), {})
    ((constraints, package),) = pip.calls
    assert f'jax=={jax.__version__}' in constraints.splitlines()
    assert package.startswith('rotbits_jax[')
    assert not list(tmp_path.iterdir())

  @pytest.mark.usefixtures('pip')
  def test_outside_of_a_clone_it_asks_for_the_repository(
    self, path, tmp_path, monkeypatch
  ):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='set REPOSITORY'):
      exec(source_of_installation(path), {})

  @pytest.mark.usefixtures('pip')
  def test_outside_of_a_clone_it_clones_the_repository(
    self, path, tmp_path, monkeypatch
  ):
    repository = tmp_path / 'repository'
    package = repository / 'rotbits_jax'
    package.mkdir(parents=True)
    (package / '__init__.py').touch()
    git = ['git', '-c', 'user.name=test', '-c', 'user.email=test@test']
    for command in ('init --quiet', 'add .', 'commit --quiet --message=first'):
      subprocess.run([*git, *command.split()], cwd=repository, check=True)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    exec(source_of_installation(path, f'file://{repository}'), {})
    clone = tmp_path / 'here' / 'rotbits_jax'
    assert (clone / 'rotbits_jax' / '__init__.py').exists()
    assert sys.path[0] == str(clone)

  @pytest.mark.slow
  def test_runs_without_warnings(self, path, monkeypatch):
    monkeypatch.setenv('QUICK', '1')  # a small model in place of SmolLM2
    notebook = nbformat.read(path, as_version=4)
    resources = {'metadata': {'path': str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=resources)
    client.execute()  # raises the exception of a cell
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    assert outputs
    assert not [out.text for out in outputs if out.get('name') == 'stderr']


def test_the_address_of_the_repository_is_written_everywhere(tmp_path):
  shutil.copytree(COLABS, tmp_path / 'colabs')
  shutil.copy(ROOT / 'CITATION.cff', tmp_path)
  files = [*tmp_path.glob('colabs/*.ipynb'), tmp_path / 'CITATION.cff']
  texts = []
  for address in ('github.com/us/first', 'github.com/us/x', 'github.com/us/x/'):
    address_lib.main(f'https://{address}', tmp_path)
    texts.append([path.read_text('utf-8') for path in files])
  assert texts[1] == texts[2]
  for path, text in zip(files, texts[2], strict=True):
    assert 'us/first' not in text
    assert "REPOSITORY = 'https://github.com/us/x'" in text or path.suffix == '.cff'
    assert text.count('https://github.com/us/x') == 1
    opens = f'colab.research.google.com/github/us/x/blob/main/colabs/{path.name})'
    assert text.count(opens) == (path.suffix == '.ipynb')
  with pytest.raises(ValueError, match='expected https'):
    address_lib.main('https://example.org/us/x', tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('directory', ['colabs', '.'], ids=['colabs', 'root'])
def test_notebooks_run_in_a_clone_on_a_fresh_runtime(directory, tmp_path):
  clone = tmp_path / 'clone'
  for name in ('colabs', 'configs', 'rotbits_jax', 'tests/testdata'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, clone / name, ignore=ignored)
  for name in ('LICENSE', 'README.md', 'pyproject.toml', 'setup.py'):
    shutil.copy(ROOT / name, clone)
  venv.create(tmp_path / 'runtime', with_pip=True)
  python = tmp_path / 'runtime' / 'bin' / 'python'
  own = {'PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'XLA_FLAGS'}
  environment = {name: x for name, x in os.environ.items() if name not in own}
  pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
  subprocess.run([*pip, 'ipykernel', 'nbclient'], env=environment, check=True)
  notebooks = sorted((clone / 'colabs').glob('*.ipynb'))
  assert len(notebooks) == len(NOTEBOOKS)
  subprocess.run(
    [python, '-c', RUN, clone / directory, *notebooks],
    cwd=tmp_path,
    env=environment | {'QUICK': '1'},
    check=True,
  )
