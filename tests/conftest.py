"""Settings of all tests.

Tests compile many small programs and run each of them once. Therefore XLA optimises
less, which takes less time in total.
"""

import os
import pathlib
import tempfile

os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
  ]
)

# Commands keep their compiled programs there, and not among those of the user.
os.environ['XDG_CACHE_HOME'] = str(pathlib.Path(tempfile.gettempdir(), 'rotbits_tests'))
