"""Writes a web page about a file: what it holds and what made it small.

  rotbits report --input=FILE --output=report.html [--overwrite]

The page stands alone: it loads nothing from a network.
"""

import sys

from absl import flags

from rotbits_jax import evaluation
from rotbits_jax import outputs
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
  'input', None, 'The file to report on.', required=True, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The page to write.', required=True, flag_values=FLAGS
)
_OVERWRITE = flags.DEFINE_bool(
  'overwrite', False, 'Replace an existing file.', flag_values=FLAGS
)


def main() -> None:
  target = outputs.resolved(_OUTPUT.value)
  outputs.check(target, overwrite=_OVERWRITE.value)
  page = evaluation.report_page(_INPUT.value)
  with outputs.fresh(outputs.staging(target)) as folder:
    written = folder / target.name
    written.write_text(page, encoding='utf-8')
    outputs.move(written, target)


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
