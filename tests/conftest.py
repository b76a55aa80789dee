"""Settings of all tests.

Tests compile many small programs and run each of them once. Therefore XLA optimises
less, and compiles each program in one piece, which takes less time in total. The few
programs of the coder are optimised, because they run in most tests. Compiled programs
are kept between runs, in the system's folder for temporary files.

Tests run side by side, so linear algebra has one thread in each process. OpenBLAS would
have as many as there are cores, and they wait for each other in busy loops.

With ROTBITS_TEST_OPTIMISED set, XLA optimises as it does for users.
"""

import functools
import gc
import os
import pathlib
import sys
import tempfile
from unittest import mock

import pytest

if 'ROTBITS_TEST_OPTIMISED' not in os.environ:
  os.environ['XLA_FLAGS'] = ' '.join(
    [
      os.environ.get('XLA_FLAGS', ''),
      '--xla_backend_optimization_level=0',
      '--xla_llvm_disable_expensive_passes=true',
      '--xla_cpu_parallel_codegen_split_count=1',
    ]
  )

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

# Compiled programs are kept there, and not among those of the user.
_CACHE = pathlib.Path(tempfile.gettempdir(), 'rotbits_tests')
os.environ['XDG_CACHE_HOME'] = str(_CACHE)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

if 'ROTBITS_TEST_OPTIMISED' not in os.environ:
  import jax  # after XLA_FLAGS are set

  import rotbits_jax.structured

  options = {'xla_backend_optimization_level': 1}
  optimised = functools.partial(jax.jit, compiler_options=options)
  with mock.patch.object(jax, 'jit', optimised):
    import rotbits_jax.coding.coder  # noqa: F401


# Linux gives a process 65,530 mappings, and each compiled program takes several.
_MOST_MAPPINGS = 45_000


@pytest.fixture(autouse=True, scope='module')
def _few_compiled_programs():
  """Drops compiled programs after a module, before the mappings run out."""
  yield
  mappings = pathlib.Path('/proc/self/maps')
  if mappings.exists() and mappings.read_bytes().count(b'\n') > _MOST_MAPPINGS:
    import jax  # after XLA_FLAGS are set

    jax.clear_caches()
    gc.collect()


@pytest.fixture(name='rotbits')
def _rotbits(monkeypatch, capsys):
  """Runs `rotbits ARGS` in this process; returns exit code, stdout and stderr."""
  from absl import flags

  from rotbits_jax.cli import main  # after XLA_FLAGS are set
  from rotbits_jax.cli import program  # noqa: F401  defines flags of all commands

  def run(*args):
    monkeypatch.setattr(sys, 'argv', ['rotbits', *map(str, args)])
    capsys.readouterr()
    flags.FLAGS.unparse_flags()  # an earlier run may have left values
    shared = {*flags.FLAGS}
    try:
      code = main.main()
    finally:  # several commands define flags of one name
      for name in {*flags.FLAGS} - shared:
        delattr(flags.FLAGS, name)
      sys.modules.pop(f'rotbits_jax.cli.{args[0]}' if args else '', None)
    return code, *capsys.readouterr()

  return run
