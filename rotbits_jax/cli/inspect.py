"""Shows what a file holds, and how many bytes each transform saved.

  rotbits inspect --input=FILE [--json] [--verbose]

Example:

  rotbits inspect --input=smollm2.rotbits

The bytes saved add up to the difference between the sizes exactly. Layers of one kind
are one row; --verbose gives each of them a row. Only the header of the file is read;
`rotbits verify` reads and checks the rest.

In the tables of the transforms, `form` is the kind of leaf that stands for a tensor;
`array` says that it was left as it is. `saved` counts numbers. `error` is the greatest
relative error of a leaf, in the Frobenius norm. For an embedding that is left as it is,
it is the error of its prediction from the head.

JSON:

  preset            name of the preset
  family            model family; null for plain arrays
  numbers.input     count of the numbers in the input's tensors
  numbers.stored    count of the numbers that the file keeps
  bytes.input       bytes of the input's tensors
  bytes.file        bytes of the file, or of all shards
  lines             list of objects: name, numbers_saved, bytes_saved; they add up to
                    the differences above
  remarks           list of sentences on what the decoded weights are
  notes             with --verbose: for each transform, a list of objects
"""

import sys

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
  'input', None, 'The file to inspect.', required=True, flag_values=FLAGS
)
_JSON, _VERBOSE = program.define_output_flags(FLAGS)


def main() -> None:
  report = rotbits_jax.inspect(_INPUT.value)
  if _JSON.value:
    program.print_json(report.to_json(verbose=_VERBOSE.value))
  else:
    width = None if _VERBOSE.value else program.terminal_width()
    print(report.to_text(verbose=_VERBOSE.value, width=width))
    print('\nOnly the header was read; rotbits verify checks the rest.')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
