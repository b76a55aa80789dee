"""Runs a program in a process with several CPU devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(program, *, devices=8, **environment):
  """Runs a program, with the repository on its path; returns its standard output."""
  flags = os.environ.get('XLA_FLAGS', '')
  own = {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}',
  }
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    env=os.environ | own | environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout
