"""The `rotbits` program, which runs the command that the first argument names."""

import importlib
import io
import os
import sys

import rotbits_jax
from rotbits_jax.system import interrupts
from rotbits_jax.system import status

COMMANDS = {
  'encode': 'encodes a checkpoint as a smaller file',
  'decode': 'decodes a file to a checkpoint',
  'snapshot': 'decodes a file once, into a cache, for programs that load a folder',
  'estimate': 'says in seconds what each preset would take of a checkpoint',
  'inspect': 'shows the content of a file and the bytes that each step saved',
  'report': 'writes a web page about a file, with pictures',
  'verify': 'checks that a file is undamaged and matches its checkpoint',
  'evaluate': 'measures perplexity, and KL divergence from another model',
  'generate': 'prints the text that a model generates after a prompt',
  'slice': 'slices a dense checkpoint with SliceGPT',
  'accounting': 'computes sizes of a sliced model without its weights',
  'completion': 'prints a script that completes commands and flags in a shell',
}

USAGE = """\
Stores transformer checkpoints without what their symmetries make redundant.

usage: rotbits COMMAND [--flag=value ...]
       rotbits --version

{commands}

To make a checkpoint smaller, and get it back:

  rotbits encode --checkpoint=SmolLM2-135M --output=smollm2.rotbits
  rotbits inspect --input=smollm2.rotbits
  rotbits decode --input=smollm2.rotbits --output=SmolLM2-again

`rotbits COMMAND --help` shows an example, the flags, and the fields of --json.
Exit codes: 0 success, 2 bad input (one line on stderr, nothing written),
130 interrupted, 129 and 143 ended by SIGHUP and SIGTERM, 1 a fault of this
program."""


def usage() -> str:
  """Returns the help text, with a line for each command."""
  lines = [f'  {name:<12}{purpose}' for name, purpose in COMMANDS.items()]
  return USAGE.format(commands='\n'.join(lines))


def main() -> int:
  """Runs the command that the first argument names.

  Returns:
    The exit code.
  """
  # In place of streams that the caller has closed. An output would get their numbers,
  # and with them what native code prints.
  for name, mode in {'stdin': 'r', 'stdout': 'w', 'stderr': 'w'}.items():
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
  if isinstance(sys.stdout, io.TextIOWrapper):  # it may have fewer characters
    sys.stdout.reconfigure(errors='backslashreplace')
  try:
    with interrupts.raised():  # also while modules are imported, which takes seconds
      code = _run(sys.argv[1] if len(sys.argv) > 1 else '--help')
      sys.stdout.flush()
  except KeyboardInterrupt as error:
    return interrupts.exit_code(error)
  except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  finally:
    status.clear()
  return code


def _run(name: str) -> int:
  if name == 'help' and len(sys.argv) > 2:
    name = sys.argv[2]
    sys.argv[1:] = [name, '--help']
  if name in ('--help', '-h', 'help'):
    print(usage())
    return 0
  if name in ('--version', '-v'):
    print(f'rotbits {rotbits_jax.__version__}')
    return 0
  if name not in COMMANDS:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f'did you mean {near[0]}?' if near else f'it is one of {", ".join(COMMANDS)}'
    print(f'rotbits: unknown command {name!r}; {hint}', file=sys.stderr)
    return 2
  del sys.argv[1]
  # Before SciPy is imported, whose LAPACK JAX calls; see `host.lapack_is_serial`.
  os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
  status.show(f'{name}: starting ...')
  # Only this command is imported, because importing all of them would take seconds.
  program = importlib.import_module('rotbits_jax.cli.program')
  try:
    command = importlib.import_module(f'rotbits_jax.cli.{name}')
  except program.flags.Error as error:  # a --flagfile, in which --config is looked for
    print(f'rotbits {name}: {program.one_line(error)}', file=sys.stderr)
    return 2
  interrupts.check()
  code: int = program.run(command.main, command.FLAGS)
  return code
