"""Writes a web page about a file: its content and the bytes that each step saved.

  rotbits report --input=smollm2.rotbits --output=report.html

The page loads nothing from a network. With --against it says how much the decoded model
differs from the checkpoint, as `rotbits verify` measures it, which may need --base.

JSON: output, the path of the page, and its bytes.
"""

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program
from rotbits_jax.file import output
from rotbits_jax.file import report
from rotbits_jax.system import outputs

_INPUT, _BASE = program.define_input(), program.define_base()
_OUTPUT = flags.DEFINE_string('output', None, 'The page to write.', required=True)
_AGAINST = flags.DEFINE_string('against', None, 'The checkpoint that was encoded.')
_OVERWRITE = program.define_overwrite()


def main() -> program.Result:
  source, against, base = _INPUT.value, _AGAINST.value, _BASE.value
  target = outputs.resolved(_OUTPUT.value)
  outputs.check(target, overwrite=_OVERWRITE.value)
  output.check_inputs([target], [source, base, against])
  if base and against is None:
    raise ValueError('--base is for --against')
  verified = None
  if against is not None:
    verified = rotbits_jax.verify(source, against=against, base=base, progress=True)
  page = report.report_page(source, verified=verified)
  with outputs.fresh(outputs.staging(target)) as folder:
    (folder / target.name).write_text(page, encoding='utf-8')
    outputs.move(folder / target.name, target)
  result = {'output': str(target), 'bytes': target.stat().st_size}
  return result, f'wrote {_OUTPUT.value}'
