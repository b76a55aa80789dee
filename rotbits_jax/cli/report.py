"""Writes a web page about a file: what it holds and what made it small.

  rotbits report --input=FILE --output=report.html

The page stands alone: it loads nothing from a network.
"""

import pathlib
import sys

from absl import flags

from rotbits_jax import evaluation
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string(
  'input', None, 'The file to report on.', required=True, flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'The page to write.', required=True, flag_values=FLAGS
)


def main() -> None:
  program.check_output_file(_OUTPUT.value)
  page = evaluation.report_page(_INPUT.value)
  pathlib.Path(_OUTPUT.value).write_text(page, encoding='utf-8')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
