"""The `rotbits` program, which runs the command that the first argument names."""

import importlib
import sys

COMMANDS = {
  'slice': 'slices a dense checkpoint with SliceGPT',
  'encode': 'encodes a checkpoint as a smaller file',
  'decode': 'decodes a file to a checkpoint',
  'inspect': 'shows the content of a file and the bytes that each step saved',
  'report': 'writes the same as a web page with pictures',
  'verify': 'checks that a file is undamaged and matches its checkpoint',
  'evaluate': 'measures perplexity, and KL divergence from another model',
  'generate': 'prints the text that a model generates after a prompt',
  'accounting': 'computes sizes of a sliced model without its weights',
}


def usage() -> str:
  """Returns the help text, with one line for each command."""
  lines = [f'  {name:<12}{what}' for name, what in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: rotbits <command> [--flag=value ...]',
      '',
      *lines,
      '',
      'rotbits <command> --help explains a command and lists its flags.',
    ]
  )


def main() -> int:
  """Runs the command that the first argument names.

  Returns:
    The exit code.
  """
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in ('--help', '-h', 'help'):
    print(usage())
    return 0
  if name not in COMMANDS:
    print(
      f'rotbits: unknown command {name!r}; the commands are {", ".join(COMMANDS)}',
      file=sys.stderr,
    )
    return 2
  del sys.argv[1]
  # Only this command is imported, because importing all of them would take seconds.
  return importlib.import_module(f'rotbits_jax.cli.{name}').run()


if __name__ == '__main__':
  sys.exit(main())
