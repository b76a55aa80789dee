"""The report on a file: the saving of each step of the encoder, to the byte."""

import math
import textwrap
from typing import Any, NamedTuple

from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax.file import leaves as leaves_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.file.container import ContainerError
from rotbits_jax.system import schema
from rotbits_jax.system import text


class ReportLine(NamedTuple):
  """A line of the report. All lines add up to the whole saving."""

  name: str
  elements_saved: int
  bytes_saved: int


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
  needs: dict[str, leaves_lib.BaseArray]
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

  def to_text(self, *, verbose: bool = False, width: int | None = None) -> str:
    """Returns the report as tables for people.

    Args:
      verbose: whether every note has a line, rather than layers of one kind.
      width: the longest line, in characters; None for no limit.
    """

    def row(name: str, elements: int, size: int, sign: str = '') -> str:
      share = f'{100 * size / whole:{sign}8.2f}%' if (whole := self.input_bytes) else ''
      count = f'{elements:{sign},}' if elements or not sign else ''
      return f'{name:24}{count:>16}{size:{sign}18,}{share}'

    lines = [
      f'preset {self.preset}, '
      + (f'family {self.family}' if self.family else 'plain tensors'),
      f'{"":24}{"elements":>16}{"bytes":>18}',
      row('tensors', self.input_elements, self.input_bytes),
      *(
        row(f'  {x.name}', -x.elements_saved, -x.bytes_saved, '+')
        for x in self.lines
        if x.elements_saved or x.bytes_saved
      ),
      row('file', self.stored_elements, self.file_bytes),
    ]
    for name, notes in self.notes.items():
      rows = _rows(notes) if verbose else summary(notes)
      lines += ['', *_table(name, rows)]
    lines = [text.printable(line) for line in lines]
    if width is not None:
      lines = [x if len(x) <= width else f'{x[: width - 3]}...' for x in lines]
    for remark in self.remarks():
      lines += ['', *textwrap.wrap(remark, width or 88)]
    return '\n'.join(lines)

  def remarks(self) -> list[str]:
    """Returns remarks for users of the decoded weights, a sentence or two each."""
    base = []
    if self.needs:
      size, first = sum(_size(x) for x in self.needs.values()), next(iter(self.needs))
      base.append(
        f'The file needs {len(self.needs)} tensors of a base, {size:,} numbers, such '
        f'as {first}: whoever decodes it passes that model with --base.'
      )
    if self.keeps == 'bits':
      return base
    same = 'the same' if self.keeps == 'function' else 'nearly the same'
    up_to = 'up to rounding, ' if self.keeps == 'function' else ''
    remarks = [
      *base,
      f'The decoded model computes {same} function {up_to}in other coordinates: its '
      'weights are not those of the input. Adapters (LoRA) that were trained on the '
      f'input do not fit it. Merge them first or use the preset exact.',
    ]
    if self.keeps == 'approximation':
      remarks.append('Measure how much it differs with `rotbits evaluate`.')
    return remarks


def summary(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns one row for the notes of all layers that say the same of one parameter.

  Args:
    notes: of one transform.

  Returns:
    Rows with `tensor` (an asterisk stands for the layer's number) and `form`; the count
    of tensors, the elements saved and the greatest error. Notes without a tensor get a
    row for each kind, with the range of each number.
  """
  kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
  for note in notes:
    words = {key: x for key, x in note.items() if isinstance(x, str)}
    if 'tensor' in words:
      words['tensor'] = models.names.pattern(words['tensor']).removesuffix('/kernel')
    kinds.setdefault(tuple(words.items()), []).append(note)
  rows = []
  for kind, own in kinds.items():
    row: dict[str, Any] = dict(kind) | {'count': len(own)}
    if all(note.get('shape') is not None for note in own):
      whole = sum(math.prod(note['shape']) for note in own)
      row['saved'] = whole - sum(note['elements'] for note in own)
    else:
      numbers = [key for key, x in own[0].items() if not isinstance(x, str)]
      for key in numbers:
        found = [note[key] for note in own if note.get(key) is not None]
        if all(isinstance(x, (int, float)) for x in found) and found:
          least, most = min(found), max(found)
          row[key] = least if least == most else f'{_cell(least)} to {_cell(most)}'
    errors = [note['error'] for note in own if note.get('error') is not None]
    if errors:
      row['error'] = max(errors)
    rows.append(row)
  return rows


def from_reader(reader: reader_lib.Reader) -> Report:
  """Makes the report on an opened file, or on all its shards.

  Raises:
    ContainerError: if all notes of one name have more different fields than those of a
      saving may have.
  """
  holders: list[Any] = list(reader.records.values())
  holders += [own.message for own in reader.manifests if own.message is not None]
  lines: dict[str, ReportLine] = {}
  notes: dict[str, list[dict[str, Any]]] = {}
  for saving in (saving for holder in holders for saving in holder.savings):
    _, elements, size = lines.get(saving.name, ReportLine(saving.name, 0, 0))
    lines[saving.name] = ReportLine(
      saving.name, elements + saving.elements, size + saving.bytes
    )
    if saving.notes:
      notes.setdefault(saving.name, []).extend(saving.notes)
  for name, own in notes.items():
    # A table has a column for each.
    if len(set().union(*own)) > manifest_lib.MOST_FIELDS:
      raise ContainerError(
        f'savings: the notes of {name!r:.100} must have at most '
        f'{manifest_lib.MOST_FIELDS} different fields'
      )
  input_elements = sum(holder.input.elements for holder in holders)
  input_bytes = sum(holder.input.bytes for holder in holders)
  uncoded_bytes = input_bytes - sum(line.bytes_saved for line in lines.values())
  other_bytes = sum(x.nbytes for own in reader.manifests for x in own.files.values())
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
    note: dict[str, Any] = {'tensor': leaf.path, 'form': leaf.type_name or 'array'}
    if leaf.base is not None and leaf.base.path != leaf.path:
      note['base'] = leaf.base.path
    if leaf.product is not None:
      note['product'] = leaf.product.kind
    notes.append(note)
  return {writer_lib.BESIDE: notes}


def _size(array: leaves_lib.BaseArray) -> int:
  return math.prod(array.shape)


def _rows(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the notes with their first one's keys."""
  return [{key: note.get(key) for key in notes[0]} for note in notes]


def _table(name: str, rows: list[dict[str, Any]]) -> list[str]:
  """Returns the lines of a table with a column for every key of a row."""
  header = list(dict.fromkeys(key for row in rows for key in row))
  cells = [header] + [[_cell(row.get(key)) for key in header] for row in rows]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = [
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    for row in cells
  ]
  return [f'{name}:', *(f'  {line.rstrip()}' for line in lines)]


def _cell(value: Any) -> str:
  if isinstance(value, list):
    return ' x '.join(str(v) for v in value)
  if isinstance(value, int):
    return f'{value:,}'
  return '' if value is None else str(value)
