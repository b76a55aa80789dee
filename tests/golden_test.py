"""Golden files decode to the same bits under every setting of JAX."""

import os
import pathlib
import subprocess
import sys

import pytest

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
