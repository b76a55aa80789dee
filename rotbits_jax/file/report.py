"""The report on a file as one web page, which needs no network.

The page shows what `inspect` does, the bits that each type of record takes for a number
of the input, and how the file is loaded. It follows the light or dark theme of the
browser.
"""

from collections.abc import Sequence
import html
import os

from rotbits_jax import models
from rotbits_jax.file import container
from rotbits_jax.file import manifest
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import savings
from rotbits_jax.file import verification
from rotbits_jax.system import text

_ROWS = 64
"""The greatest number of rows of records: a PyTree may have any."""


def report_page(
  source: container.Readable, *, verified: verification.Verification | None = None
) -> str:
  """Makes the report of a file as a web page.

  Args:
    source: a path, bytes, or an open binary file.
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
      'The records': _records(reader),
      'The steps': ''.join(
        f'<h3>{html.escape(name)}</h3>{_table(*rows)}'
        for name, rows in report.tables().items()
      ),
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
  rows = []
  for bar in report.bars():
    color = {'': 'whole', '-': 'less', '+': 'more'}[bar.sign]
    rows.append(
      f'<tr><td>{html.escape(bar.name)}</td><td>{bar.size}</td><td>{bar.share}</td>'
      f'<td class="track"><i class="{color}" style="margin-left:{bar.begin:.3%};'
      f'width:{bar.end - bar.begin:.3%}"></i></td></tr>'
    )
  return f'<table class="bars">{"".join(rows)}</table>'


def _records(reader: reader_lib.Reader) -> str:
  """Tabulates the bits of a number for each type of record; '' without any."""
  types: dict[str, list[manifest.RecordEntry]] = {}
  for name, record in reader.records.items():
    types.setdefault(models.names.pattern(name), []).append(record)
  rows = []
  for pattern, records in types.items():
    count = sum(record.input.elements for record in records)
    before, after = (
      f'{8 * sum(sizes) / max(count, 1):.2f}'
      for sizes in zip(*((x.input.bytes, x.nbytes) for x in records), strict=True)
    )
    rows.append((pattern, f'{len(records):,}', f'{count:,}', before, after))
  header = 'record', 'records', 'numbers', 'bits of each', 'bits in the file'
  return _table(header, *rows[:_ROWS]) if rows else ''


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


def _table(header: Sequence[str], *rows: Sequence[str]) -> str:
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
