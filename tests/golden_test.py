"""Golden files decode to the same bits under every setting of JAX, and stay."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import rotbits_jax
from tests import golden

ROOT = pathlib.Path(__file__).parents[1]

# One process has these together, because each process takes seconds to start.
TOGETHER = {
  'JAX_ENABLE_X64': '1',
  'JAX_NUMPY_DTYPE_PROMOTION': 'strict',
  'JAX_DEFAULT_MATMUL_PRECISION': 'bfloat16',
  'XLA_FLAGS': (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'
  ),
}
ALONE = [
  *({name: value} for name, value in TOGETHER.items()),
  {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'},
  {'XLA_FLAGS': '--xla_cpu_max_isa=AVX2'},
  {'JAX_DEFAULT_MATMUL_PRECISION': 'highest'},
  {'JAX_DISABLE_JIT': '1'},
]


def check(settings):
  done = subprocess.run(
    [sys.executable, '-m', 'tests.golden', 'check'],
    env={**os.environ, **settings},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, ''), done.stdout + done.stderr
  assert ' 0 differ' in done.stdout


def test_every_array_has_its_digest():
  check({})


@pytest.mark.slow
def test_all_settings_at_once():
  check(TOGETHER)


@pytest.mark.slow
@pytest.mark.parametrize('settings', ALONE, ids=','.join)
def test_settings_alone(settings):
  check(settings)


def test_the_files_are_small():
  for name in golden.names():
    assert golden.file_of(name).stat().st_size < 100_000


def test_every_file_has_its_writer_and_digests():
  entries = golden.recorded()
  assert golden.names() == sorted(entries)
  assert all(re.match(r'\d+\.\d+', x['written by']) for x in entries.values())
  assert all(x['arrays'] for x in entries.values())


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(golden, 'FOLDER', tmp_path)
  monkeypatch.setattr(golden, 'DIGESTS', tmp_path / 'digests.json')
  golden.DIGESTS.write_text('{}')


def set_cases(monkeypatch, **numbers):
  found = {name: ({'x': np.arange(n)}, {}) for name, n in numbers.items()}
  monkeypatch.setattr(golden, 'cases', lambda: found)


@pytest.mark.usefixtures('empty_folder')
def test_write_adds_files_and_keeps_those_that_exist(monkeypatch):
  set_cases(monkeypatch, first=2)
  golden.write()
  old = golden.file_of('v4/first').read_bytes()
  set_cases(monkeypatch, first=3, second=4)
  golden.write()
  assert golden.names() == ['v4/first', 'v4/second'] == sorted(golden.recorded())
  assert golden.file_of('v4/first').read_bytes() == old
  assert golden.check() == ([], 2)
  assert golden.recorded()['v4/second']['written by'] == rotbits_jax.__version__


@pytest.mark.usefixtures('empty_folder')
def test_a_new_version_of_the_format_adds_a_folder(monkeypatch):
  set_cases(monkeypatch, first=2)
  golden.write()
  monkeypatch.setattr(golden.container, 'VERSION', 5)
  golden.write()
  assert golden.names() == ['v4/first', 'v5/first']


@pytest.mark.usefixtures('empty_folder')
def test_write_refuses_a_file_without_digests(monkeypatch):
  set_cases(monkeypatch, first=2)
  golden.file_of('v4/first').parent.mkdir()
  golden.file_of('v4/first').write_bytes(b'')
  with pytest.raises(FileExistsError, match='first'):
    golden.write()
  assert not golden.file_of('v4/first').read_bytes()
  assert golden.check() == (['v4/first'], 0)
