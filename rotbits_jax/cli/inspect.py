"""Shows the content of a file, the bytes that each step saved, and notes on tensors.

  rotbits inspect --input=FILE [--json]

The saved bytes add up exactly to the difference between the size of the checkpoint's
tensors and the size of the file. Only the header of the file is read; `rotbits verify`
reads and checks the rest.
"""

import sys

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
  'input', None, 'The file to inspect.', required=True, flag_values=FLAGS
)
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object in place of the table.', flag_values=FLAGS
)


def main() -> None:
  report = rotbits_jax.inspect(_INPUT.value)
  if _JSON.value:
    program.print_json(report.to_json())
  else:
    print(report.to_text())
    print('\nOnly the header was read; rotbits verify checks the rest.')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
