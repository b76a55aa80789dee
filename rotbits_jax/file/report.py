"""The report on a file, to the byte: as text, as JSON, and as one web page.

A row of the waterfall from the bytes of the tensors to those of the file is a bar: its
name; '' for a whole size, '-' for saved bytes, '+' for added ones; its elements, bytes
and share as texts; and where it begins and ends, at most 1.
"""

from collections.abc import Sequence
import html
import math
import os
import textwrap
from typing import Any, NamedTuple

from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax.file import container
from rotbits_jax.file import manifest
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import verification
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.relative import entries
from rotbits_jax.system import schema
from rotbits_jax.system import text

_COLUMNS = 32  # of a table of notes, whose fields a stranger may have written
_ROWS = 64  # of a table of records: a PyTree may have any
_BAR = 18  # characters
_WIDTH = 88

BACK: dict[presets.Keeps, str] = {
  'bits': 'every bit comes back',
  'function': 'the same function comes back, up to rounding, in other weights',
  'approximation': 'nearly the same function comes back, in other weights',
}
"""How a decoded file compares with its source, by the guarantee of its preset."""

_ADAPTERS = (
  'The weights are others, and adapters (LoRA) that were trained on the input do not '
  'fit them: merge those first, or use the preset exact.'
)
_MEASURE = 'Measure how much it differs with `rotbits evaluate`.'
_UNMEASURED = (
  'No divergence was measured, because the tensors are of no known family: compare the '
  'predictions with those of the input, on a text that matters to you.'
)

Note = dict[str, Any]
"""What a step tells about a tensor: JSON values by name."""

Bar = tuple[str, str, str, str, str, float, float]


class ReportLine(NamedTuple):
  """A line of the report. All lines add up to the whole saving."""

  name: str
  elements_saved: int
  bytes_saved: int


class Report(NamedTuple):
  """The content of a file in figures.

  Attributes:
    preset, keeps, family: as in the manifest; None for the family of plain tensors.
    input_elements, input_bytes: those of the tensors of the input.
    stored_elements, file_bytes: those of the file.
    lines: one for each cause of a difference between the sizes.
    needs: the arrays of a base that are needed to decode the file, by their paths.
    notes: the notes of each step, by its name.
  """

  preset: str
  keeps: presets.Keeps
  family: str | None
  input_elements: int
  stored_elements: int
  input_bytes: int
  file_bytes: int
  lines: list[ReportLine]
  needs: dict[str, entries.BaseArray]
  notes: dict[str, list[Note]]

  def to_json(self, *, verbose: bool = False) -> dict[str, Any]:
    """Returns the report as JSON values, with the notes if `verbose`."""
    value = {
      'preset': self.preset,
      'keeps': self.keeps,
      'family': self.family,
      'elements': {'input': self.input_elements, 'stored': self.stored_elements},
      'bytes': {'input': self.input_bytes, 'file': self.file_bytes},
      'lines': [line._asdict() for line in self.lines],
      'remarks': self.remarks(),
      'base': [schema.dump(array) for array in self.needs.values()],
    }
    return value | {'notes': self.notes} if verbose else value

  def to_text(self, *, verbose: bool = False) -> str:
    """Returns the report as tables for people; with a row a note, if `verbose`."""
    family = f'family {self.family}' if self.family else 'plain tensors'
    lines = [f'preset {self.preset}, {family}', f'{"":24}{"elements":>16}{"bytes":>18}']
    for name, sign, elements, size, share, begin, end in self.bars():
      first, last = round(_BAR * begin), round(_BAR * end)
      drawn = ' ' * first + (sign or '#') * max(last - first, 1)
      name = f'  {name}' if sign else name
      lines.append(f'{name:24}{elements:>16}{size:>18} {share:>8}  {drawn}')
    for name, rows in self.tables(verbose=verbose).items():
      lines += ['', f'{name}:', *_aligned(rows)]
    for remark in self.remarks():
      lines += ['', *textwrap.wrap(remark, _WIDTH)]
    return '\n'.join(map(text.printable, lines))

  def bars(self) -> list[Bar]:
    """Returns the bars from the tensors to the file; each begins where one ended."""
    rows = [('tensors', '', self.input_bytes, self.input_elements, 0)]
    left = self.input_bytes
    for name, elements, saved in self.lines:
      left -= saved
      if saved or elements:
        sign = '-' if saved >= 0 else '+'
        rows.append((name, sign, abs(saved), -elements, min(left, left + saved)))
    rows.append(('file', '', self.file_bytes, self.stored_elements, 0))
    longest = max(1, *(begin + nbytes for _, _, nbytes, _, begin in rows))
    bars = []
    for name, sign, nbytes, count, begin in rows:
      elements_text = f'{count:{"+" if sign else ""},}' if count else ''
      share = f'{sign}{nbytes / max(self.input_bytes, 1):.2%}'
      ends = begin / longest, (begin + nbytes) / longest
      bars.append((name, sign, elements_text, f'{sign}{nbytes:,}', share, *ends))
    return bars

  def tables(self, *, verbose: bool = False) -> dict[str, list[list[str]]]:
    """Returns the notes of each step as a table, whose first row is the header.

    Unless `verbose`, layers that say the same of one parameter are a row.
    """
    tables = {}
    for name, notes in self.notes.items():
      rows = notes if verbose else _summary(notes)
      header = list(dict.fromkeys(key for row in rows for key in row))[:_COLUMNS]
      cells = [[_cell(row.get(key)) for key in header] for row in rows]
      tables[name] = [header, *cells]
    return tables

  def remarks(self) -> list[str]:
    """Returns remarks for users of the decoded weights, a sentence or two each."""
    remarks = []
    if self.needs:
      size = sum(math.prod(array.shape) for array in self.needs.values())
      remarks.append(
        f'The file needs {len(self.needs)} tensors of a base, {size:,} numbers, such '
        f'as {next(iter(self.needs))}: whoever decodes it passes that model with '
        '--base.'
      )
    if self.keeps != 'bits':
      remarks.append(_ADAPTERS)
    if self.keeps == 'approximation':
      remarks.append(_UNMEASURED if self.family is None else _MEASURE)
    return remarks


def _summary(notes: list[Note]) -> list[Note]:
  """Returns a row for the notes that differ in numbers or in the number of a layer."""
  groups: dict[tuple[Any, ...], list[Note]] = {}
  for note in notes:
    words = {key: x for key, x in note.items() if isinstance(x, str)}
    if 'tensor' in words:
      words['tensor'] = models.names.pattern(words['tensor']).removesuffix('/kernel')
    groups.setdefault(tuple(words.items()), []).append(note)
  rows = []
  for words_of_group, group in groups.items():
    row: Note = dict(words_of_group) | {'count': len(group)}
    for key in group[0]:
      values = [x for x in (note.get(key) for note in group) if x is not None]
      if values and all(isinstance(x, int | float) for x in values):
        least, most = _cell(min(values)), _cell(max(values))
        row[key] = least if least == most else f'{least} to {most}'
    rows.append(row)
  return rows


def _cell(value: Any) -> str:
  """Returns a value of a note as text."""
  if isinstance(value, list | tuple):
    return ' x '.join(map(str, value))
  if isinstance(value, int):
    return f'{value:,}'
  return '' if value is None else str(value)


def from_reader(reader: reader_lib.Reader) -> Report:
  """Makes the report on an opened file, or on all its shards."""
  stored: list[Any] = list(reader.records.values())
  stored += [x.message for x in reader.manifests if x.message is not None]
  lines: dict[str, ReportLine] = {}
  notes: dict[str, list[Note]] = {}
  for saving in (saving for entry in stored for saving in entry.savings):
    _, elements, size = lines.get(saving.name, ReportLine(saving.name, 0, 0))
    lines[saving.name] = ReportLine(
      saving.name, elements + saving.elements, size + saving.bytes
    )
    if saving.notes:
      notes.setdefault(saving.name, []).extend(saving.notes)
  input_elements = sum(entry.input.elements for entry in stored)
  input_bytes = sum(entry.input.bytes for entry in stored)
  uncoded_bytes = input_bytes - sum(line.bytes_saved for line in lines.values())
  other_bytes = sum(x.nbytes for y in reader.manifests for x in y.files.values())
  coded_bytes = reader.stream_bytes() - other_bytes
  leaves = [x for record in reader.records.values() for x in record.leaves]
  if any(leaf.base_arrays or leaf.product for leaf in leaves):
    notes[writer_lib.BESIDE] = [_beside_base(leaf) for leaf in leaves]
  return Report(
    preset=reader.preset,
    keeps=reader.keeps,
    family=reader.config.family if reader.config else None,
    input_elements=input_elements,
    stored_elements=input_elements - sum(x.elements_saved for x in lines.values()),
    input_bytes=input_bytes,
    file_bytes=reader.size,
    lines=[
      *lines.values(),
      ReportLine('coding', 0, uncoded_bytes - coded_bytes),
      ReportLine('tokenizer and settings', 0, -other_bytes),
      ReportLine('file overhead', 0, reader.stream_bytes() - reader.size),
    ],
    needs=reader.needed_arrays(),
    notes=notes,
  )


def _beside_base(leaf: manifest.Leaf) -> Note:
  """Returns how a tensor is stored beside a base."""
  form = (leaf.type_name if leaf.arrays else 'unchanged') or 'array'
  note: Note = {'tensor': leaf.path, 'form': form}
  if leaf.base is not None and leaf.base.path != leaf.path:
    note['base'] = leaf.base.path
  if leaf.product is not None:
    note['product'] = leaf.product.kind
  return note


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns the lines of a table."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  padded = [
    [cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows
  ]
  return [text.printable(f'  {"  ".join(row)}'.rstrip()) for row in padded]


# ---- the page ------------------------------------------------------------------------


def report_page(
  source: container.Readable, *, verified: verification.Verification | None = None
) -> str:
  """Returns the report of a file as a web page, HTML, that needs no network.

  If the result of `verify` against the checkpoint is given, the page tells it.
  """
  path = 'FILE'
  if isinstance(source, str | os.PathLike):
    path = text.printable(os.path.basename(os.fsdecode(source)))
  with reader_lib.Reader(source) as reader:
    report = from_reader(reader)
    tables = {'The records': _aligned(_records(reader))} if reader.records else {}
  steps = [
    line
    for name, rows in report.tables().items()
    for line in (f'{name}:', *_aligned(rows), '')
  ]
  tables |= {'The steps': steps} if steps else {}
  base, argument = (' --base=BASE', ', base=BASE') if report.needs else ('', '')
  loading = [f'rotbits decode --input={path} --output=DIR{base}']
  if report.family is not None:
    loading += ['', f"model = rotbits_jax.load('{path}'{argument})  # JAX arrays"]
  tables['To load it'] = loading
  before, after = map(text.of_bytes, (report.input_bytes, report.file_bytes))
  share = report.file_bytes / max(report.input_bytes, 1)
  title = html.escape(f'{path}: {before} to {after}, {share:.1%}')
  family = f', family {report.family}' if report.family else ''
  back = BACK[report.keeps]
  paragraphs = [
    f'{back[0].upper()}{back[1:]}.{_measured(verified)}',
    f'{report.file_bytes:,} bytes in the file for {report.input_bytes:,} bytes of '
    f'tensors. Preset {report.preset}{family}.',
    *report.remarks(),
  ]
  return ''.join(
    [
      '<!doctype html><html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f'<title>{title}</title><style>{_CSS}</style></head><body><h1>{title}</h1>',
      *(f'<p>{html.escape(x)}</p>' for x in paragraphs),
      f'<h2>The bytes</h2>{_bars(report)}',
      *(
        f'<h2>{name}</h2><pre>{html.escape(chr(10).join(lines))}</pre>'
        for name, lines in tables.items()
      ),
      '</body></html>\n',
    ]
  )


def _measured(verified: verification.Verification | None) -> str:
  """Returns the sentence on the comparison with the checkpoint; '' without one."""
  if verified is not None and verified.same_bits:
    return ' Compared with the checkpoint: all bits are the same.'
  if verified is None or verified.kl is None:
    return ''
  return (
    f' Its predictions differ from those of the checkpoint by {verified.kl:.2g} nats '
    f'(KL, random tokens); rounding alone makes {verified.kl_rerounded or 0:.2g}.'
  )


def _bars(report: Report) -> str:
  """Draws how the bytes of the tensors become those of the file."""
  colors = {'': 'whole', '-': 'less', '+': 'more'}
  rows = [
    f'<tr><td>{html.escape(name)}</td><td>{size}</td><td>{share}</td>'
    f'<td class="track"><i class="{colors[sign]}" style="margin-left:{begin:.3%};'
    f'width:{end - begin:.3%}"></i></td></tr>'
    for name, sign, _, size, share, begin, end in report.bars()
  ]
  return f'<table>{"".join(rows)}</table>'


def _records(reader: reader_lib.Reader) -> list[list[str]]:
  """Returns a table of the bits of a number for each type of record."""
  types: dict[str, list[Any]] = {}
  for name, record in reader.records.items():
    types.setdefault(models.names.pattern(name), []).append(record)
  rows = [['record', 'records', 'numbers', 'bits of each', 'bits in the file']]
  for pattern, records in list(types.items())[:_ROWS]:
    count = sum(record.input.elements for record in records)
    sizes = sum(x.input.bytes for x in records), sum(x.nbytes for x in records)
    bits = [f'{8 * size / max(count, 1):.2f}' for size in sizes]
    rows.append([pattern, f'{len(records):,}', f'{count:,}', *bits])
  return rows


_CSS = """
:root { color-scheme: light dark; }
body { max-width: 56rem; margin: 0 auto; padding: 1rem; font: 16px/1.5 sans-serif; }
table { width: 100%; }
td { padding: 2px 12px 2px 0; text-align: right; white-space: nowrap; }
td:first-child, .track { text-align: left; }
.track { width: 50%; }
.track i { display: block; height: 14px; min-width: 2px; }
.whole { background: #8a93a0; } .less { background: #0b62b5; }
.more { background: #da5e0d; }
pre { overflow-x: auto; padding: 12px; border: 1px solid #8a93a0; }
"""
