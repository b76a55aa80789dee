"""The documentation's code runs, and its site is built without warnings."""

import doctest
import importlib
import inspect
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

import rotbits_jax

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


def modules_with_examples():
  paths = sorted((ROOT / 'rotbits_jax').rglob('*.py'))
  return [
    str(path.relative_to(ROOT)) for path in paths if '>>>' in path.read_text('utf-8')
  ]


# Its examples compile many programs.
SLOW = 'reference/steps.md'


@pytest.mark.parametrize(
  'page',
  [
    pytest.param(page, marks=[pytest.mark.slow] if page == SLOW else [])
    for page in pages_with('pycon')
  ],
)
def test_examples(page):
  text = ''.join(blocks(page, 'pycon'))
  flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
  test = doctest.DocTestParser().get_doctest(text, {}, page, page, 0)
  report = []
  runner = doctest.DocTestRunner(optionflags=flags)
  runner.run(test, out=report.append)
  assert runner.summarize(verbose=False).failed == 0, ''.join(report)


INSTALLED = r"""
import doctest, pathlib, re, sys
import rotbits_jax

assert pathlib.Path(rotbits_jax.__file__).is_relative_to(pathlib.Path.cwd())
for page in sys.argv[1:]:
  text = pathlib.Path(page).read_text('utf-8')
  find = lambda language: re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S)
  code = re.sub(r'^:tags:.*$', '', ''.join(find('{code-cell} ipython3')), flags=re.M)
  exec(compile(code, page, 'exec'), {})
  code = ''.join(find('pycon'))
  examples = doctest.DocTestParser().get_doctest(code, {}, page, page, 0)
  flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
  assert not doctest.DocTestRunner(optionflags=flags).run(examples).failed, page
"""


@pytest.mark.slow
@pytest.mark.daily
def test_examples_run_after_a_plain_install(tmp_path):
  """What pip would install has the data that examples need."""
  shutil.copytree(ROOT / 'rotbits_jax', tmp_path / 'rotbits_jax')
  tools = mock.Mock(find_packages=lambda include: [])
  with mock.patch.dict(sys.modules, setuptools=tools):
    runpy.run_path(str(ROOT / 'setup.py'))
  setup = tools.setup.call_args.kwargs
  for package, source in setup['package_dir'].items():
    for pattern in setup['package_data'].get(package, ['*.py']):
      for path in (ROOT / source).glob(pattern):
        target = tmp_path / package.replace('.', '/') / path.relative_to(ROOT / source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
  pages = [x for x in PAGES if blocks(x, 'pycon') or blocks(x, '{code-cell} ipython3')]
  assert {'tutorial.md', 'howto/transform.md', 'reference/top.md'} < set(pages)
  subprocess.run(
    [sys.executable, '-c', INSTALLED, *(DOCS / page for page in pages)],
    check=True,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(tmp_path)},
    timeout=600,
  )


@pytest.mark.parametrize('path', modules_with_examples())
def test_examples_in_docstrings(path):
  module = importlib.import_module(path.replace('/', '.').removesuffix('.py'))
  names = {'rotbits_jax': rotbits_jax, 'jax': jax, 'jnp': jax.numpy, 'np': np}
  report = []
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  for test in doctest.DocTestFinder().find(module, extraglobs=names):
    runner.run(test, out=report.append)
  assert runner.summarize(verbose=False).failed == 0, ''.join(report)


@pytest.mark.parametrize('page', pages_with('python'))
def test_programs(page, tmp_path, monkeypatch):
  source = rotbits_jax.open_checkpoint(CHECKPOINT.with_name('phi2-tiny-sliced-0.25'))
  data = rotbits_jax.encode(source, preset='exact')
  for name in ('llama', 'model'):
    (tmp_path / f'{name}.rotbits').write_bytes(data)
  monkeypatch.chdir(tmp_path)
  exec(compile(''.join(blocks(page, 'python')), page, 'exec'), {})


EIGHT_DEVICES = """
import functools, jax, numpy as np, rotbits_jax
from fuzz import seeds
from rotbits_jax import models

assert jax.device_count() == 8
config = seeds.LLAMA | {'num_hidden_layers': 8}
rotbits_jax.encode_to_file(seeds.sliced_model(config), 'model.rotbits', preset=PRESET)
tokens = np.arange(16)[None]
logits = jax.jit(models.logits)
expected = np.asarray(logits(rotbits_jax.load('model.rotbits'), tokens))
make_mesh = jax.make_mesh
for kind in jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit:
  jax.make_mesh = functools.partial(make_mesh, axis_types=(kind,))
  exec(PAGE)
  devices = [len(x.sharding.device_set) for x in jax.tree.leaves(model.params)]
  assert set(devices) == {8}
  kernel = model.params[list(model.params)[-1]]['mlp']['down']['kernel']
  assert kernel.sharding.is_fully_replicated == (PRESET == 'free')
  np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.daily
@pytest.mark.parametrize('preset', ['exact', 'free'])  # one stack; stacks of 1 and 7
def test_the_page_on_several_devices_on_eight(preset, tmp_path):
  page = ''.join(blocks('howto/tpu.md', 'python'))
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'
  subprocess.run(
    [sys.executable, '-c', f'PAGE, PRESET = {page!r}, {preset!r}\n{EIGHT_DEVICES}'],
    check=True,
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': flags},
    timeout=300,
  )


@pytest.mark.slow
@pytest.mark.parametrize('page', pages_with('bash'))
def test_commands(page, tmp_path):
  words = ' '.join(
    (ROOT / 'rotbits_jax' / 'data' / 'evaluation.txt').read_text().split()
  )
  (tmp_path / 'text.txt').write_text(words[:4000])
  program = f'rotbits() {{ {sys.executable} -m rotbits_jax "$@"; }}\n'
  settings = {'CHECKPOINT': str(CHECKPOINT), 'TEXT': str(tmp_path / 'text.txt')}
  subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', program + ''.join(blocks(page, 'bash'))],
    check=True,
    cwd=tmp_path,
    env=os.environ | settings | {'PYTHONPATH': str(ROOT)},
    timeout=300,
  )


def public_values(module):
  """`__all__` or, without it, the functions and classes of a module, by name."""
  names = getattr(module, '__all__', None)
  if names is not None:
    return {name: getattr(module, name) for name in names}
  return {
    name: value
    for name, value in vars(module).items()
    if not name.startswith('_') and getattr(value, '__module__', '') == module.__name__
  }


def modules_of_notebooks():
  """The modules of the package that the notebooks import."""
  for path in sorted(ROOT.glob('colabs/*.ipynb')):
    for home, names in re.findall(
      r'"from (rotbits_jax[\w.]*) import ([\w, ]+)', path.read_text('utf-8')
    ):
      for name in names.split(', '):
        yield importlib.import_module(f'{home}.{name}')


def test_every_public_symbol_is_documented():
  text = ''.join((DOCS / page).read_text('utf-8') for page in PAGES)
  documented = set()
  kinds = r'currentmodule:: (\S+)\n|auto(?:function|class|exception):: (\w+)'
  for home, name in re.findall(kinds, text):
    if home:
      module = importlib.import_module(home)
    else:
      documented.add((name, id(getattr(module, name))))
  for home, options in re.findall(r'automodule:: (\S+)\n((?:   :.*\n)*)', text):
    for name, value in public_values(importlib.import_module(home)).items():
      is_own = getattr(value, '__module__', None) == home
      # Sphinx does not document constants and types that are imported.
      is_found = inspect.isclass(value) or inspect.isroutine(value)
      if is_own or (is_found and ':imported-members:' in options):
        documented.add((name, id(value)))
  listed = set(re.findall(r'^\.\. py:data:: [\w.]*?(\w+)$', text, re.M))
  public = [rotbits_jax, *modules_of_notebooks()]
  missing = set()
  for module in public:  # grows by the modules in it
    for name, value in public_values(module).items():
      if inspect.ismodule(value):
        public.append(value)
      elif (name, id(value)) not in documented and name not in listed:
        missing.add(f'{module.__name__}.{name}')
  assert not missing


@pytest.mark.slow
def test_site_is_built_without_warnings(tmp_path):
  pytest.importorskip('sphinx')
  # Pages with code write beside themselves, so that they get a copy.
  docs = shutil.copytree(DOCS, tmp_path / 'docs')
  for name in ('RESULTS.md', 'CHANGELOG.md', 'SECURITY.md'):  # pages include them
    shutil.copy(ROOT / name, tmp_path)
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
    assert (tmp_path / 'site' / page).with_suffix('.html').exists()
