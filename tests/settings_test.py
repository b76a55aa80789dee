"""The settings of the process while a function of the package runs."""

import os
import subprocess
import sys

import jax

from rotbits_jax.system import host

PROGRAM = """
import os, pathlib, jax, numpy
from rotbits_jax.system import host

blas = host._blas()
before = [x.get() for x in blas]
with host.own_settings(), host.own_settings():
  during = [x.get() for x in blas]
  jax.jit(lambda x: x + 1)(1.0)
files = len(os.listdir(os.environ['ROTBITS_JAX_CACHE']))
jax.jit(lambda x: x - 1)(1.0)
assert files == len(os.listdir(os.environ['ROTBITS_JAX_CACHE'])), 'kept afterwards'
assert jax.config.jax_compilation_cache_dir is None
assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
assert before == [x.get() for x in blas]
print(files > 0, set(during) <= {1}, len(blas))
"""


def _settings(tmp_path, **variables):
  """Runs the program above with a cache and no settings of a user but some."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith('JAX_') and not name.endswith('NUM_THREADS')
  }
  environment |= {'ROTBITS_JAX_CACHE': str(tmp_path / 'cache')} | variables
  command = [sys.executable, '-c', PROGRAM]
  run = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=300, check=False
  )
  assert not run.returncode, run.stderr
  return run.stdout.split()


def test_a_call_has_the_settings_of_a_command(tmp_path):
  keeps, is_single, count = _settings(tmp_path)
  assert (keeps, is_single) == ('True', 'True')
  if sys.platform == 'linux':  # the wheels of NumPy have OpenBLAS
    assert int(count) > 0


def test_settings_of_a_user_stay(tmp_path):
  _, _, count = _settings(tmp_path, OPENBLAS_NUM_THREADS='2')
  assert count == '0'


def test_a_folder_of_a_user_stays(tmp_path, monkeypatch):
  monkeypatch.setenv('ROTBITS_JAX_CACHE', str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  assert before is not None  # see conftest
  with host.own_settings():
    assert jax.config.jax_compilation_cache_dir == before
