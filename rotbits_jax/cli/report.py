"""Writes a web page about a file: its content and the bytes that each step saved.

  rotbits report SmolLM2-135M.rotbits report.html

The default PAGE is FILE with the ending .html. The page loads nothing from a network.

JSON: page, its path, and its bytes.
"""

from rotbits_jax.cli import program
from rotbits_jax.file import output
from rotbits_jax.file import report as report_lib
from rotbits_jax.system import files
from rotbits_jax.system import outputs

(_OVERWRITE,) = program.shared('overwrite')


def main(file: str, page: str | None = None) -> program.Result:
  page = page or f'{file.removesuffix(".rotbits")}.html'
  target = files.real_path(page)
  output.check_path(target, None, inputs=[file], overwrite=_OVERWRITE.value)
  with outputs.writer(target) as folder:
    outputs.check(target, overwrite=_OVERWRITE.value)
    (folder / target.name).write_text(report_lib.report_page(file), encoding='utf-8')
    outputs.move(folder / target.name, target)
  return {'page': str(target), 'bytes': target.stat().st_size}, f'wrote {target}'
