"""Writes a web page about a file: its content and the bytes that each step saved.

  rotbits report --input=smollm2.rotbits --output=report.html

The page loads nothing from a network. With --against it says how much the decoded model
differs from the checkpoint, as `rotbits verify` measures it, which may need --base.

JSON: output, the path of the page, and its bytes.
"""

import pathlib

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program
from rotbits_jax.file import output
from rotbits_jax.file import report

_INPUT, _BASE, _AGAINST, _OVERWRITE = program.shared(
  'input', 'base', 'against', 'overwrite'
)
_OUTPUT = flags.DEFINE_string('output', None, 'The page to write.', required=True)


def main() -> program.Result:
  source, against, base = _INPUT.value, _AGAINST.value, _BASE.value
  target, overwrite = pathlib.Path(_OUTPUT.value).resolve(), _OVERWRITE.value
  output.check_path(target, None, inputs=[source, base, against], overwrite=overwrite)
  verified = None
  if against is not None:
    verified = rotbits_jax.verify(source, against=against, base=base, progress=True)
  target.write_text(report.report_page(source, verified=verified), encoding='utf-8')
  return {'output': str(target), 'bytes': target.stat().st_size}, f'wrote {target}'
