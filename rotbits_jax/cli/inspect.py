"""Shows what a file holds, and how many bytes each transform saved.

  rotbits inspect --input=FILE [--json] [--verbose]

Example:

  rotbits inspect --input=smollm2.rotbits

The bytes saved add up to the difference between the sizes exactly. Layers of one kind
are one row; --verbose gives each of them a row. Only the header of the file is read;
`rotbits verify` reads and checks the rest.

In the tables of the transforms, `form` is the kind of leaf that stands for a tensor;
`array` says that it was left as it is. `saved` counts elements. `error` is the greatest
relative error of a leaf, in the Frobenius norm. For an embedding that is left as it is,
it is the error of its prediction from the head.

JSON:

  preset            name of the preset
  keeps             what comes back: bits, function or approximation
  family            model family; null for plain arrays
  elements.input    count of the elements of the input's tensors
  elements.stored   count of the elements that the file keeps
  bytes.input       bytes of the input's tensors
  bytes.file        bytes of the file, or of all shards
  lines             list of objects: name, elements_saved, bytes_saved; they add up to
                    the differences above
  remarks           list of sentences on the decoded weights
  base              list of the tensors of a base that the file needs, each as the list
                    of its path, shape, dtype and CRC-32
  notes             with --verbose: for each transform, a list of objects
"""

import rotbits_jax
from rotbits_jax.cli import program

FLAGS = program.Flags()
_INPUT = FLAGS.add('input', 'The file to inspect.', source=True, required=True)


def main() -> program.Result:
  report = rotbits_jax.inspect(_INPUT.value)
  text = program.report_text(report, FLAGS.verbose.value)
  note = 'Only the header was read; rotbits verify checks the rest.'
  return report.to_json(verbose=FLAGS.verbose.value), f'{text}\n\n{note}'
