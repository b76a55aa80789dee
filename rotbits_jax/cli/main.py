"""The `rotbits` program: `rotbits COMMAND PATH ... --flag=value ...`."""

import gc
import importlib
import os
import sys

import rotbits_jax
from rotbits_jax.system import signals

COMMANDS = {
  'encode': 'encodes a checkpoint as a smaller file',
  'decode': 'decodes a file to a checkpoint',
  'estimate': 'estimates how small each preset would make a checkpoint',
  'inspect': 'shows the content of a file and the bytes that each step saved',
  'report': 'writes a web page about a file',
  'verify': 'checks that a file is undamaged and matches its checkpoint',
  'evaluate': 'measures perplexity, and KL divergence from another model',
  'slice': 'slices a dense checkpoint with SliceGPT',
  'snapshot': 'decodes a file to a folder that other programs load',
}
"""The commands, each a module of this folder, and their purposes."""

USAGE = """\
Makes transformer checkpoints smaller: losslessly, or for a measured loss.

  rotbits encode SmolLM2-135M
  rotbits decode SmolLM2-135M.rotbits SmolLM2-again

Commands; `rotbits COMMAND -h` shows the flags, and --help explains them:

{commands}

Exit codes: 0 success, 2 bad input (one line on stderr, nothing written),
128+n ended by signal n (130 interrupted), 1 a fault of this program."""


def main() -> int:
  """Runs the command that the first argument names; returns the exit code."""
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in ('--help', '-h', 'help'):
    rows = [f'  {command:<10}{purpose}' for command, purpose in COMMANDS.items()]
    print(USAGE.format(commands='\n'.join(rows)))
    return 0
  if name == '--version':
    print(f'rotbits {rotbits_jax.__version__}')
    return 0
  if name not in COMMANDS:
    print(f'rotbits: unknown command {name!r}; see rotbits --help', file=sys.stderr)
    return 2
  del sys.argv[1]
  # Before NumPy and SciPy are imported, so their BLAS starts no threads; Python users
  # have `host.own_settings`.
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
  ending = signals.Ending()
  sys.unraisablehook = ending.repeat
  gc.disable()  # all that modules make stays; searching it takes a fifth of the time
  # Imports only one command, because importing all would take seconds.
  command = importlib.import_module(f'rotbits_jax.cli.{name}')
  program = importlib.import_module('rotbits_jax.cli.program')
  gc.freeze()
  gc.enable()
  try:
    with ending.raised():
      return program.run(command)
  except BaseException:  # an extension may make another error of an interrupt
    if ending.number is None:
      raise
  finally:
    gc.freeze()  # else the end of the process searches all that is left
  ending.exit()
