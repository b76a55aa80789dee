"""Writes a web page about a file: its content and the bytes that each step saved.

  rotbits report --input=FILE --output=report.html [--overwrite] [--json] [--verbose]

Example:

  rotbits report --input=smollm2.rotbits --output=report.html

The page stands alone: it loads nothing from a network.

JSON:

  output  path of the page
  bytes   bytes of the page
"""

import sys

from absl import flags

from rotbits_jax import report
from rotbits_jax.cli import program
from rotbits_jax.system import outputs

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
_JSON, _VERBOSE = program.define_output_flags(FLAGS)


def main() -> None:
  target = outputs.resolved(_OUTPUT.value)
  outputs.check(target, overwrite=_OVERWRITE.value)
  page = report.report_page(_INPUT.value)
  with outputs.fresh(outputs.staging(target)) as folder:
    written = folder / target.name
    written.write_text(page, encoding='utf-8')
    outputs.move(written, target)
  if _JSON.value:
    program.print_json({'output': str(target), 'bytes': target.stat().st_size})


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
