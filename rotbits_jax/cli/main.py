"""The `rotbits` program: hands the command line to one of the commands."""

import importlib
import sys

COMMANDS = {
  'slice': 'a dense checkpoint becomes a narrower one, by SliceGPT',
  'encode': 'a checkpoint becomes a smaller file',
  'decode': 'the file becomes a checkpoint again',
  'inspect': 'what a file holds and what made it small',
  'verify': 'whether a file is undamaged, and is the checkpoint that was encoded',
  'evaluate': 'perplexity of a model, and KL divergence from another',
  'generate': 'the text that a model writes after a prompt',
  'accounting': 'what a model would come to, from its sizes alone',
}


def usage() -> str:
  """The commands, a line each."""
  lines = [f'  {name:<12}{what}' for name, what in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: rotbits <command> [--flag=value ...]',
      '',
      *lines,
      '',
      'rotbits <command> --help lists the flags of one.',
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
      f'rotbits: no command {name!r}; the commands are {", ".join(COMMANDS)}',
      file=sys.stderr,
    )
    return 2
  del sys.argv[1]
  # Only the chosen command is imported; the others' imports would cost seconds.
  return importlib.import_module(f'rotbits_jax.cli.{name}').run()


if __name__ == '__main__':
  sys.exit(main())
