"""The report on a file as one web page, which needs no network.

The page shows the bytes that each step saves, the bits of an element of each type of
tensor, the greatest error of each type, and how the file is loaded. It follows the
light or dark theme of the browser.
"""

from collections.abc import Iterable, Sequence
import html
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import specs
from rotbits_jax.file import container
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import savings
from rotbits_jax.file import verification
from rotbits_jax.system import text

_LAYERS = 3
"""The greatest number of layers that are decoded, for the bits of their elements."""

_ROWS = 16
"""The greatest number of rows of a table."""

_ROUNDING = 0.4
"""The relative error of rounding a matrix (Frobenius norm), in units of roundoff."""


def report_page(
  source: container.Readable, *, verified: verification.Verification | None = None
) -> str:
  """Makes the report of a file as a web page.

  Args:
    source: a path, bytes, or an open binary file. A few records are decoded for the
      bits of their elements.
    verified: the result of `verify` against the checkpoint, which the page then tells.

  Returns:
    The page, HTML.

  Raises:
    ContainerError: if the source is not of this format or is damaged.
    OSError: if the path cannot be read.
  """
  path = ''
  if isinstance(source, str | os.PathLike):
    path = text.printable(os.path.basename(os.fsdecode(source)))
  with reader_lib.Reader(source) as reader:
    report = savings.from_reader(reader)
    sections = {
      'The bytes': _bytes(report),
      'The tensors': _tensors(reader),
      'The errors': _errors(reader, report),
      'To load it': _loading(path or 'FILE', reader, report),
    }
  before, after = map(text.of_bytes, (report.input_bytes, report.file_bytes))
  share = report.file_bytes / max(report.input_bytes, 1)
  back = savings.BACK[report.keeps]
  title = html.escape(f'{path or "a rotbits file"}: {before} to {after}, {share:.1%}')
  origin = f'Preset {report.preset}' + (
    f', family {report.family}' * bool(report.family)
  )
  paragraphs = [
    f'{back[0].upper()}{back[1:]}.{_measured(verified)}',
    f'{report.file_bytes:,} bytes in the file for {report.input_bytes:,} bytes of '
    f'tensors. {origin}.',
    *report.remarks(),
  ]
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{title}</title><style>{_CSS}</style></head><body><main><h1>{title}</h1>'
    + ''.join(f'<p>{html.escape(x)}</p>' for x in paragraphs)
    + ''.join(
      f'<h2>{name}</h2>{content}' for name, content in sections.items() if content
    )
    + '</main></body></html>\n'
  )


def _measured(verified: verification.Verification | None) -> str:
  """Returns the sentence on the comparison with the checkpoint; '' without one."""
  if verified is None:
    return ''
  if verified.same_bits:
    return ' Compared with the checkpoint: all bits are the same.'
  if verified.kl is None:
    return ''
  return (
    f' Its predictions differ from those of the checkpoint by {verified.kl:.2g} nats '
    f'(KL, random tokens); rounding alone makes {verified.kl_rerounded or 0:.2g}.'
  )


def _bytes(report: savings.Report) -> str:
  """Draws how the bytes of the tensors become those of the file."""
  bars = report.bars()
  longest = max(1, *(bar.begin + bar.nbytes for bar in bars))
  rows = []
  for bar in bars:
    sides = f'{bar.begin / longest:.3%} {bar.nbytes / longest:.3%}'.split()
    color = {'': 'whole', '-': 'less', '+': 'more'}[bar.sign]
    rows.append(
      f'<tr><td>{html.escape(bar.name)}</td><td>{bar.sign}{bar.nbytes:,}</td>'
      f'<td>{bar.sign}{bar.nbytes / max(report.input_bytes, 1):.2%}</td>'
      f'<td class="track"><i class="{color}" '
      f'style="margin-left:{sides[0]};width:{sides[1]}"></i></td></tr>'
    )
  return f'<table class="bars">{"".join(rows)}</table>'


def _tensors(reader: reader_lib.Reader) -> str:
  """Tabulates the bits of an element for each type of tensor; '' without any."""
  arrays_of_type: dict[str, list[np.ndarray]] = {}
  records = _some_records(reader)
  for name in records:
    for path, leaf in structured.flatten(reader.record(name)).items():
      arrays = leaf.stored()[1].values() if structured.is_structured(leaf) else [leaf]
      pattern = models.names.pattern(path).removesuffix('/kernel')
      arrays_of_type.setdefault(pattern, []).extend(map(np.asarray, arrays))
  rows = []
  for pattern, arrays in arrays_of_type.items():
    count = sum(x.size for x in arrays)
    if not count or any(x.dtype.name not in specs.DTYPES for x in arrays):
      continue
    nbytes = coder.encode(arrays).data.size
    before = 8 * sum(x.nbytes for x in arrays) / count
    rows.append(
      (nbytes, pattern, f'{count:,}', f'{before:.0f}', f'{8 * nbytes / count:.2f}')
    )
  if not rows:
    return ''
  cells = [row[1:] for row in sorted(rows, reverse=True)[:_ROWS]]
  return (
    f'<p>Bits of an element, in {len(records)} records, each type of tensor coded on '
    'its own.</p>' + _table(('tensor', 'elements', 'bits', 'bits when coded'), cells)
  )


def _some_records(reader: reader_lib.Reader) -> list[str]:
  """Returns some records that need no others: a few layers and what is beside them."""
  names = [
    name
    for name, record in reader.records.items()
    if not any(leaf.base_arrays or leaf.needs for leaf in record.leaves)
  ]
  patterns = [models.names.pattern(name) for name in names]
  some = []
  for pattern in dict.fromkeys(patterns):
    alike = [name for name, x in zip(names, patterns, strict=True) if x == pattern]
    places = np.linspace(0, len(alike) - 1, min(len(alike), _LAYERS))
    some += [alike[round(place)] for place in places]
  return some[:_ROWS]


def _errors(reader: reader_lib.Reader, report: savings.Report) -> str:
  """Tabulates the errors that the notes tell, beside that of rounding; '' if none."""
  on_disk = reader.dtypes_on_disk().values()
  dtypes = [x for x in on_disk if jnp.issubdtype(x, jnp.floating)]
  rows = [
    (row.get('tensor', ''), name, row['error'])
    for name, notes in report.notes.items()
    for row in savings.summary(notes)
    if row.get('error')
  ]
  if not (rows and dtypes):
    return ''
  dtype = max(set(dtypes), key=dtypes.count)
  floor = _ROUNDING * float(jnp.finfo(dtype).eps) / 2
  cells = [
    (tensor, name, f'{error:.2g}', f'{error / floor:.3g}')
    for tensor, name, error in sorted(rows, key=lambda row: -row[2])[:_ROWS]
  ]
  return (
    '<p>The greatest relative error (Frobenius norm) of each type of rewritten tensor. '
    f'Rounding a matrix to {html.escape(dtype.name)} alone makes about {floor:.1e}.</p>'
    + _table(('tensor', 'step', 'error', 'error / rounding'), cells)
  )


def _loading(name: str, reader: reader_lib.Reader, report: savings.Report) -> str:
  """Shows how the file is decoded and loaded."""
  flag, argument = (' --base=BASE', ', base=BASE') if report.needs else ('', '')
  lines = f'rotbits decode --input={name} --output=DIR{flag}'
  if reader.config is not None:
    lines += (
      f"\n\nimport rotbits_jax\nmodel = rotbits_jax.load('{name}'{argument})"
      '  # JAX arrays'
    )
  return f'<pre>{html.escape(lines)}</pre>'


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Returns a table; its cells are escaped."""
  head = ''.join(f'<th>{html.escape(x)}</th>' for x in header)
  body = ''.join(
    '<tr>' + ''.join(f'<td>{html.escape(x)}</td>' for x in row) + '</tr>'
    for row in rows
  )
  return f'<table><tr>{head}</tr>{body}</table>'


_CSS = """
:root { color-scheme: light dark; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.bars { width: 100%; }
th, td { padding: 2px 12px 2px 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .track { text-align: left; }
.track { width: 50%; }
.track i { display: block; height: 14px; min-width: 2px; }
.whole { background: #8a93a0; } .less { background: #0b62b5; }
.more { background: #da5e0d; }
pre { overflow-x: auto; padding: 12px; border: 1px solid #8a93a0; }
"""
