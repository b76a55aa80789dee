"""Writes a web page about a file: its content and the bytes that each step saved.

  rotbits report --input=FILE --output=report.html [--against=DIR] [--base=DIR|FILE]
    [--overwrite] [--json] [--verbose]

Example:

  rotbits report --input=smollm2.rotbits --output=report.html

The page stands alone: it loads nothing from a network. With --against it says how much
the decoded model differs from the checkpoint, as `rotbits verify` measures it; a file
beside a base needs --base for that.

JSON:

  output  path of the page
  bytes   bytes of the page
"""

import rotbits_jax
from rotbits_jax.cli import program
from rotbits_jax.file import inputs
from rotbits_jax.file import report
from rotbits_jax.system import outputs

FLAGS = program.Flags()
_INPUT = FLAGS.add('input', 'The file to report on.', source=True, required=True)
_BASE = FLAGS.bases()
_OUTPUT = FLAGS.add('output', 'The page to write.', required=True)
_AGAINST = FLAGS.add('against', 'The checkpoint that was encoded.', source=True)
_OVERWRITE = FLAGS.add('overwrite', 'Replace an existing file.', bool, False)


def main() -> program.Result:
  against, base = _AGAINST.value, _BASE.value
  target = outputs.resolved(_OUTPUT.value)
  outputs.check(target, overwrite=_OVERWRITE.value)
  inputs.check([target], [_INPUT.value, base, against])
  if base and against is None:
    raise ValueError('--base is for --against')
  verified = None
  if against is not None:
    verified = rotbits_jax.verify(
      _INPUT.value, against=against, base=base, progress=True
    )
  page = report.report_page(_INPUT.value, verified=verified)
  with outputs.fresh(outputs.staging(target)) as folder:
    written = folder / target.name
    written.write_text(page, encoding='utf-8')
    outputs.move(written, target)
  return {'output': str(target), 'bytes': target.stat().st_size}, None
