"""The report on a file: the saving of each step of the encoder, to the byte."""

import math
import textwrap
from typing import Any, NamedTuple

from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.relative import entries
from rotbits_jax.system import schema
from rotbits_jax.system import text

_COLUMNS = 32  # of a table of notes, whose fields a stranger may have written
_BAR = 18  # characters
_WIDTH = 88


class ReportLine(NamedTuple):
  """A line of the report. All lines add up to the whole saving."""

  name: str
  elements_saved: int
  bytes_saved: int


class Bar(NamedTuple):
  """A row of the waterfall from the bytes of the tensors to those of the file.

  Attributes:
    name: name of the step, 'tensors' or 'file'.
    sign: '' for a whole size, '-' for saved bytes, '+' for added ones.
    elements: number of elements, as text.
    size: number of bytes, as text with the sign.
    share: that number as percents of the tensors.
    begin: where the bar begins, from 0 to 1.
    end: where it ends.
  """

  name: str
  sign: str
  elements: str
  size: str
  share: str
  begin: float
  end: float


BACK: dict[presets.Keeps, str] = {
  'bits': 'every bit comes back',
  'function': 'the same function comes back, up to rounding, in other weights',
  'approximation': 'nearly the same function comes back, in other weights',
}
"""What a decoded file is, by what its preset keeps."""


class Report(NamedTuple):
  """The content of a file in figures.

  Attributes:
    preset: name of the preset with which the file was encoded.
    keeps: 'bits', 'function' or 'approximation', see `presets.Preset`.
    family: family of the model; None for a PyTree of arrays.
    input_elements: number of elements of the tensors of the input.
    stored_elements: number of elements that the file stores.
    input_bytes: number of bytes of the tensors of the input.
    file_bytes: size of the file.
    lines: one for each cause of a difference between the sizes.
    needs: the arrays of a base that are needed to decode the file, by their paths.
    notes: the notes of each transform, by its name. A note describes the change
      of a tensor.
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
  notes: dict[str, list[dict[str, Any]]]

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

  def bars(self) -> list[Bar]:
    """Returns the bars from the tensors to the file; each begins where one ended."""
    sizes = [('tensors', '', self.input_bytes, self.input_elements, 0)]
    bytes_left = self.input_bytes
    for name, elements, saved in self.lines:
      bytes_left -= saved
      if saved or elements:
        begin = min(bytes_left, bytes_left + saved)
        sizes.append((name, '-' if saved >= 0 else '+', abs(saved), -elements, begin))
    sizes.append(('file', '', self.file_bytes, self.stored_elements, 0))
    longest = max(1, *(begin + nbytes for _, _, nbytes, _, begin in sizes))
    return [
      Bar(
        name,
        sign,
        f'{elements:{"+" if sign else ""},}' if elements else '',
        f'{sign}{nbytes:,}',
        f'{sign}{nbytes / max(self.input_bytes, 1):.2%}',
        begin / longest,
        (begin + nbytes) / longest,
      )
      for name, sign, nbytes, elements, begin in sizes
    ]

  def tables(self, *, verbose: bool = False) -> dict[str, list[list[str]]]:
    """Returns the notes of each transform as a table, whose first row is the header.

    Args:
      verbose: whether every note has a row, rather than layers of one type.
    """
    tables = {}
    for name, notes in self.notes.items():
      rows = notes if verbose else summary(notes)
      header = list(dict.fromkeys(key for row in rows for key in row))[:_COLUMNS]
      cells = [[_cell(row.get(key)) for key in header] for row in rows]
      tables[name] = [header, *cells]
    return tables

  def to_text(self, *, verbose: bool = False) -> str:
    """Returns the report as tables for people, see `tables`."""
    family = f'family {self.family}' if self.family else 'plain tensors'
    lines = [f'preset {self.preset}, {family}', f'{"":24}{"elements":>16}{"bytes":>18}']
    for bar in self.bars():
      begin, end = round(_BAR * bar.begin), round(_BAR * bar.end)
      drawn = ' ' * begin + (bar.sign or '#') * max(end - begin, 1)
      name = f'  {bar.name}' if bar.sign else bar.name
      lines.append(f'{name:24}{bar.elements:>16}{bar.size:>18} {bar.share:>8}  {drawn}')
    for name, rows in self.tables(verbose=verbose).items():
      widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
      lines += ['', f'{name}:']
      for row in rows:
        cells = [x.ljust(width) for x, width in zip(row, widths, strict=True)]
        lines.append(f'  {"  ".join(cells).rstrip()}')
    lines = [text.printable(line) for line in lines]
    for remark in self.remarks():
      lines += ['', *textwrap.wrap(remark, _WIDTH)]
    return '\n'.join(lines)

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
      same = 'the same' if self.keeps == 'function' else 'nearly the same'
      remarks.append(
        f'The decoded model computes {same} function in other weights. Adapters (LoRA) '
        'that were trained on the input do not fit it: merge them first, or use the '
        'preset exact.'
      )
    if self.keeps == 'approximation' and self.family is None:
      remarks.append(
        'No divergence was measured, because the tensors are of no known family: '
        'compare the predictions of the decoded checkpoint with those of the input, on '
        'a text that matters to you.'
      )
    elif self.keeps == 'approximation':
      remarks.append('Measure how much it differs with `rotbits evaluate`.')
    return remarks


def summary(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns one row for the notes of all layers that say the same of one parameter.

  Args:
    notes: of one transform.

  Returns:
    Rows with `tensor` (an asterisk stands for the layer's number) and `form`; the count
    of tensors, the elements saved and the greatest error. Notes without a tensor get a
    row for each type, with the range of each number.
  """
  groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
  for note in notes:
    words = {key: x for key, x in note.items() if isinstance(x, str)}
    if 'tensor' in words:
      words['tensor'] = models.names.pattern(words['tensor']).removesuffix('/kernel')
    groups.setdefault(tuple(words.items()), []).append(note)
  rows = []
  for words_of_group, group in groups.items():
    row: dict[str, Any] = dict(words_of_group) | {'count': len(group)}
    if all(note.get('shape') is not None for note in group):
      whole = sum(math.prod(note['shape']) for note in group)
      row['saved'] = whole - sum(note['elements'] for note in group)
    else:
      for key in [key for key, x in group[0].items() if not isinstance(x, str)]:
        values = [note[key] for note in group if note.get(key) is not None]
        if values and all(isinstance(x, int | float) for x in values):
          least, most = min(values), max(values)
          row[key] = least if least == most else f'{_cell(least)} to {_cell(most)}'
    errors = [note['error'] for note in group if note.get('error') is not None]
    if errors:
      row['error'] = max(errors)
    rows.append(row)
  return rows


def from_reader(reader: reader_lib.Reader) -> Report:
  """Makes the report on an opened file, or on all its shards."""
  entries: list[Any] = list(reader.records.values())
  entries += [x.message for x in reader.manifests if x.message is not None]
  lines: dict[str, ReportLine] = {}
  notes: dict[str, list[dict[str, Any]]] = {}
  for saving in (saving for entry in entries for saving in entry.savings):
    _, elements, size = lines.get(saving.name, ReportLine(saving.name, 0, 0))
    lines[saving.name] = ReportLine(
      saving.name, elements + saving.elements, size + saving.bytes
    )
    if saving.notes:
      notes.setdefault(saving.name, []).extend(saving.notes)
  input_elements = sum(entry.input.elements for entry in entries)
  input_bytes = sum(entry.input.bytes for entry in entries)
  uncoded_bytes = input_bytes - sum(line.bytes_saved for line in lines.values())
  other_bytes = sum(x.nbytes for y in reader.manifests for x in y.files.values())
  coded_bytes = reader.stream_bytes() - other_bytes
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
    notes=notes | _beside_base(reader),
  )


def _beside_base(reader: reader_lib.Reader) -> dict[str, list[dict[str, Any]]]:
  """Returns how each tensor is stored beside a base, as notes; none without a base."""
  leaves = [x for record in reader.records.values() for x in record.leaves]
  if not any(leaf.base_arrays or leaf.product for leaf in leaves):
    return {}
  notes = []
  for leaf in leaves:
    form = (leaf.type_name if leaf.arrays else 'unchanged') or 'array'
    note: dict[str, Any] = {'tensor': leaf.path, 'form': form}
    if leaf.base is not None and leaf.base.path != leaf.path:
      note['base'] = leaf.base.path
    if leaf.product is not None:
      note['product'] = leaf.product.kind
    notes.append(note)
  return {writer_lib.BESIDE: notes}


def _cell(value: Any) -> str:
  """Returns a value of a note as text."""
  if isinstance(value, list):
    return ' x '.join(str(v) for v in value)
  if isinstance(value, int):
    return f'{value:,}'
  return '' if value is None else str(value)
