"""Decodes and checks everything in a file, and compares it with a checkpoint.

  rotbits verify --input=FILE [--against=DIR] [--json]

Every checksum must be right, and every array must decode to the numbers that were
encoded. With --against, a file of the preset `exact` must have the bits of the
checkpoint. A file of another preset must have its function: for random tokens, the
predictions may differ from the checkpoint's by a few times the difference that a random
rotation and rounding make. This comparison needs both models in memory; everything else
needs one layer at a time. `rotbits inspect` reads only the header of a file.
"""

import sys

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
  'input', None, 'The file to verify.', required=True, flag_values=FLAGS
)
_AGAINST = flags.DEFINE_string(
  'against', None, 'The checkpoint that was encoded.', flag_values=FLAGS
)
_JSON = flags.DEFINE_bool(
  'json', False, 'Print one JSON object in place of lines.', flag_values=FLAGS
)


def main() -> None:
  result = rotbits_jax.verify(_INPUT.value, against=_AGAINST.value, progress=True)
  if _JSON.value:
    program.print_json(result._asdict())
    return
  print(
    f'{_INPUT.value}: {result.tensors} tensors and {result.files} other files are '
    'undamaged'
  )
  if result.same_bits:
    print(f'all bits are those of {_AGAINST.value}')
  if result.kl is not None:
    print(
      f'the function is that of {_AGAINST.value}: KL {result.kl:.3g}, '
      f'noise floor {result.kl_rerounded:.3g}'
    )


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
