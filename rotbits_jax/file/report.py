"""The report on a file: what each step of the encoder saved, to the byte."""

from typing import Any, NamedTuple

from rotbits_jax.file import fields
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.symmetries import transform


class Source(NamedTuple):
  """A line of the report. All lines add up to the whole saving."""

  name: str
  numbers_saved: int
  bytes_saved: int


class Report(NamedTuple):
  """The content of a file in figures.

  Attributes:
    preset: name of the preset with which the file was encoded.
    family: family of the model; None for a PyTree of arrays.
    input_numbers: number of numbers in the tensors of the input.
    stored_numbers: number of numbers that the file stores.
    input_bytes: number of bytes of the tensors of the input.
    file_bytes: size of the file.
    sources: the sources of the difference between the sizes.
    notes: the notes of each transform, by its name. A note tells what the transform did
      to a tensor.
  """

  preset: str
  family: str | None
  input_numbers: int
  stored_numbers: int
  input_bytes: int
  file_bytes: int
  sources: list[Source]
  notes: dict[str, list[dict[str, Any]]]

  def to_json(self) -> dict[str, Any]:
    """Returns the report as JSON values."""
    return {
      'preset': self.preset,
      'family': self.family,
      'numbers': {'input': self.input_numbers, 'stored': self.stored_numbers},
      'bytes': {'input': self.input_bytes, 'file': self.file_bytes},
      'sources': [source._asdict() for source in self.sources],
    }

  def to_text(self) -> str:
    """Returns the report as a table for people."""
    share = lambda n, whole: f'{100 * n / whole:7.2f}%' if whole else ''
    lines = [
      f'preset {self.preset}' + (f', family {self.family}' if self.family else ''),
      f'{"":24}{"numbers":>14}{"bytes":>14}',
      f'{"tensors":24}{self.input_numbers:14,}{self.input_bytes:14,}',
    ]
    lines += [
      f'- {s.name:22}{-s.numbers_saved:14,}{-s.bytes_saved:14,}'
      f'{share(-s.bytes_saved, self.input_bytes)}'
      for s in self.sources
    ]
    lines.append(
      f'{"file":24}{self.stored_numbers:14,}{self.file_bytes:14,}'
      f'{share(self.file_bytes, self.input_bytes)}'
    )
    for name, notes in self.notes.items():
      lines += ['', *_table(name, notes)]
    return '\n'.join(map(fields.printable, lines))


def from_reader(reader: reader_lib.Reader) -> Report:
  """Makes the report on an opened file, or on all its shards."""
  holders: list[Any] = []
  for own in reader.manifests:
    holders += own.units if own.message is None else [*own.units, own.message]
  savings: dict[str, transform.Saving] = {}
  for saving in (saving for holder in holders for saving in holder.savings):
    total = savings.get(saving.name, transform.Saving(saving.name, 0, 0, []))
    total.notes.extend(saving.notes)
    savings[saving.name] = total._replace(
      numbers=total.numbers + saving.numbers, bytes=total.bytes + saving.bytes
    )
  numbers = sum(holder.input_numbers for holder in holders)
  input_bytes = sum(holder.input_bytes for holder in holders)
  file_bytes = sum(file.nbytes for own in reader.manifests for file in own.files)
  coded_bytes = reader.stream_bytes() - file_bytes
  uncoded_bytes = input_bytes - sum(saving.bytes for saving in savings.values())
  sources = [Source(x.name, x.numbers, x.bytes) for x in savings.values()]
  order_bytes = int(sum(unit.order_bits for unit in reader.units.values()) // 8)
  if order_bytes:
    sources.append(Source('neuron order', 0, order_bytes))
  sources += [
    Source('coding', 0, uncoded_bytes - coded_bytes - order_bytes),
    Source('tokenizer and settings', 0, -file_bytes),
    Source('file overhead', 0, reader.stream_bytes() - reader.size),
  ]
  return Report(
    preset=reader.preset,
    family=reader.config.family if reader.config else None,
    input_numbers=numbers,
    stored_numbers=numbers - sum(saving.numbers for saving in savings.values()),
    input_bytes=input_bytes,
    file_bytes=reader.size,
    sources=sources,
    notes={saving.name: saving.notes for saving in savings.values() if saving.notes},
  )


def _table(name: str, notes: list[dict[str, Any]]) -> list[str]:
  """Formats notes as a table; the keys of the first note are the columns."""
  header = list(notes[0])
  rows = [header] + [[_cell(note.get(key)) for key in header] for note in notes]
  widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
  lines = [
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    for row in rows
  ]
  return [f'{name}:', *(f'  {line.rstrip()}' for line in lines)]


def _cell(value: Any) -> str:
  if isinstance(value, list):
    return ' x '.join(str(v) for v in value)
  return '' if value is None else str(value)
