"""Writes a web page about a file: its content and the bytes that each step saved.

  rotbits report SmolLM2-135M.rotbits report.html

Without PAGE it has the name of the file, with the ending .html. The page loads nothing
from a network. With --against it says how much the decoded model
differs from the checkpoint, as `rotbits verify` measures it, which may need --base.

JSON: page, its path, and its bytes.
"""

import pathlib

import rotbits_jax
from rotbits_jax.cli import program
from rotbits_jax.file import output
from rotbits_jax.file import report as report_lib

_BASE, _AGAINST, _OVERWRITE = program.shared('base', 'against', 'overwrite')


def main(file: str, page: str | None = None) -> program.Result:
  against, base, overwrite = _AGAINST.value, _BASE.value, _OVERWRITE.value
  target = pathlib.Path(page or f'{file.removesuffix(".rotbits")}.html').resolve()
  output.check_path(target, None, inputs=[file, base, against], overwrite=overwrite)
  verified = None
  if against is not None:
    verified = rotbits_jax.verify(file, against=against, base=base, progress=True)
  target.write_text(report_lib.report_page(file, verified=verified), encoding='utf-8')
  return {'page': str(target), 'bytes': target.stat().st_size}, f'wrote {target}'
