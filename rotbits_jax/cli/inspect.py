"""Shows what a file holds, and how many bytes each transform saved.

  rotbits inspect SmolLM2-135M.rotbits

The bytes saved add up exactly to the difference between the sizes. Only the header of
the file is read. In the tables of the transforms, `form` is the type of the leaf that
stores a tensor (`array` was left as it is), and `error` its relative error in the
Frobenius norm.

JSON: preset, keeps, family, elements and bytes of input and file, lines (each with its
elements_saved and bytes_saved), remarks, base, metadata, kept (the records and tensors
that are smaller by exact); with --verbose notes for each transform.
"""

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program

_VERBOSE = flags.DEFINE_bool('verbose', False, 'Give each layer a row, and notes.')


def main(file: str) -> program.Result:
  verbose = _VERBOSE.value
  report = rotbits_jax.inspect(file)
  note = 'Only the header was read; rotbits verify checks the rest.'
  return report.to_json(verbose=verbose), f'{report.to_text(verbose=verbose)}\n\n{note}'
