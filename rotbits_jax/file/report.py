"""The report on a file, to the byte: as text, as JSON, and as one web page."""

from collections.abc import Sequence
import html
import math
import os
import re
import string
import textwrap
from typing import Any, NamedTuple

import numpy as np
import tqdm

from rotbits_jax import presets
from rotbits_jax import quantisers
from rotbits_jax.evaluation import held_out
from rotbits_jax.file import container
from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.relative import entries
from rotbits_jax.system import schema
from rotbits_jax.system import text

_COLUMNS, _ROWS = 32, 64  # of a table, which a stranger may have written
_BAR, _WIDTH = 18, 88  # characters of the longest bar and of a line
_INDEX = re.compile(r'(?<=\.)[0-9]+')  # of a layer

BACK: dict[presets.Keeps, str] = {
  'bits': 'every bit comes back',
  'function': 'the same function comes back, up to rounding, in different weights',
  'approximation': 'nearly the same function comes back, in different weights',
}
"""How a decoded file compares with its source, by the guarantee of its preset."""

Note = dict[str, Any]
"""A row of a table, such as what a step tells about a tensor: JSON values by name."""


class ReportLine(NamedTuple):
  """A line of the report. All lines add up to the whole saving."""

  name: str
  elements_saved: int
  bytes_saved: int


class Report(NamedTuple):
  """The content of a file in figures."""

  preset: str
  keeps: presets.Keeps
  family: str | None  # None for plain tensors
  input_elements: int  # of the tensors of the input
  stored_elements: int
  input_bytes: int  # of the tensors of the input
  file_bytes: int
  lines: list[ReportLine]  # one for each cause of a difference between the sizes
  needs: dict[str, entries.BaseArray]  # arrays of a base, by path, to decode the file
  notes: dict[str, list[Note]]  # bits per element, and of each step by its name
  metadata: dict[str, str]  # texts of the user by their names
  measured: held_out.Measured | None = None  # if `near` was given a bound
  missed: tuple[str, ...] = ()  # files of the input's folder that are not stored
  excluded: tuple[str, ...] = ()  # those that were left out on purpose
  records: int = 0
  kept_records: tuple[str, ...] = ()  # that are stored as `exact` stores them
  kept_tensors: tuple[str, ...] = ()  # in other records

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
      'measured': schema.dump(self.measured),
      'metadata': self.metadata,
      'kept': {'records': self.kept_records, 'tensors': self.kept_tensors},
    }
    return value | {'notes': self.notes} if verbose else value

  def to_text(self, *, verbose: bool = False) -> str:
    """Returns the report as tables and remarks for people.

    Unless `verbose`, notes that say the same of one parameter in each layer are a row.
    """
    family = f'family {self.family}' if self.family else 'plain tensors'
    lines = [f'preset {self.preset}, {family}', f'{"":24}{"elements":>16}{"bytes":>18}']
    rows = [('tensors', '', self.input_elements, self.input_bytes)]
    for name, elements, saved in self.lines:
      if saved or elements:
        rows.append((f'  {name}', '-' if saved >= 0 else '+', -elements, abs(saved)))
    rows.append(('file', '', self.stored_elements, self.file_bytes))
    longest = max(1, *(nbytes for *_, nbytes in rows))
    for name, sign, elements, nbytes in rows:
      count = f'{elements:{"+" if sign else ""},}' if elements else ''
      share = f'{sign}{nbytes / max(self.input_bytes, 1):.2%}'
      bar = (sign or '#') * max(round(_BAR * nbytes / longest), 1)
      line = f'{name:24}{count:>16}{f"{sign}{nbytes:,}":>18} {share:>8}  {bar}'
      lines.append(text.printable(line))
    texts = ['\n'.join(lines)]
    for name, notes in self.notes.items():
      table = _aligned(notes if verbose else _summary(notes))
      texts.append('\n'.join([f'{text.printable(name)}:', *table]))
    if self.metadata:
      pairs = [text.printable(f'  {key}: {x}') for key, x in self.metadata.items()]
      texts.append('\n'.join(['metadata:', *pairs]))
    texts += [textwrap.fill(text.printable(x), _WIDTH) for x in self.remarks()]
    return '\n\n'.join(texts)

  def remarks(self) -> list[str]:
    """Returns remarks for users of the decoded weights, a sentence or two each."""
    remarks = []
    if self.missed:
      names = ', '.join(self.missed[:_ROWS])
      remarks.append(f'NOT STORED: {names} (keep the original of these).')
    if self.excluded:
      names = ', '.join(self.excluded[:_ROWS])
      remarks.append(f'Left out on purpose, by --exclude: {names}.')
    if self.needs:
      size = sum(math.prod(array.shape) for array in self.needs.values())
      first, count = next(iter(self.needs)), len(self.needs)
      text = f'{count} tensors, {size:,} elements, such as {first}'
      remarks.append(f'The file needs a base, to decode it with: {text}.')
    if self.kept_records or self.kept_tensors:
      remarks.append(self._about_kept())
    if self.keeps != 'bits':
      text = 'LoRA adapters trained on the input no longer fit: merge them first'
      remarks.append(f'The weights differ, so {text}, or use the preset exact.')
    if self.keeps == 'bits':
      return remarks
    if self.measured is not None:
      remarks.append(f'The loss is {self.measured}.')
    elif self.keeps == 'approximation':
      text = '`rotbits evaluate` compares the predictions of models of known families'
      remarks.append(f'No divergence was measured: {text}.')
    return remarks

  def _about_kept(self) -> str:
    """Returns the remark on what is stored as `exact` stores it."""
    records, tensors, counted = self.kept_records, self.kept_tensors, []
    if records:
      counted.append(f'{len(records)} of {self.records} records ({_few(records)})')
    if tensors:
      counted.append(f'{len(tensors)} tensors ({_few(tensors)})')
    text = ' and '.join(counted)
    return (
      f'Smaller as the preset exact stores them, so all their bits are kept: {text}.'
    )


def _few(names: Sequence[str]) -> str:
  """Returns the first of some names, and the last one."""
  return ', '.join(names if len(names) < 4 else (*names[:2], '...', names[-1]))


def _summary(notes: list[Note]) -> list[Note]:
  """Returns a row for the notes that differ in numbers or in the number of a layer."""
  groups: dict[tuple[Any, ...], list[Note]] = {}
  for note in notes:
    words = {key: x for key, x in note.items() if isinstance(x, str)}
    if 'tensor' in words:
      words['tensor'] = _INDEX.sub('*', words['tensor']).removesuffix('/kernel')
    groups.setdefault(tuple(words.items()), []).append(note)
  rows = []
  for words_of_group, group in [*groups.items()][:_ROWS]:
    row: Note = dict(words_of_group) | {'count': len(group)}
    for key in group[0]:
      values = [x[key] for x in group if isinstance(x.get(key), int | float)]
      if values:
        least, most = _cell(min(values)), _cell(max(values))
        row[key] = least if least == most else f'{least} to {most}'
    rows.append(row)
  return rows


def _aligned(rows: list[Note]) -> list[str]:
  """Returns the lines of a table, the header first."""
  header = list(dict.fromkeys(key for row in rows for key in row))[:_COLUMNS]
  cells = [header, *([_cell(row.get(key)) for key in header] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  padded = (map(str.ljust, row, widths) for row in cells)
  return [text.printable(f'  {"  ".join(row)}'.rstrip()) for row in padded]


def _cell(value: Any) -> str:
  """Returns a value of a note as text."""
  if isinstance(value, list | tuple):
    return ' x '.join(map(str, value))
  if isinstance(value, int):
    return f'{value:,}'
  return '' if value is None else str(value)


def from_reader(reader: reader_lib.Reader) -> Report:
  """Makes the report on an opened file, or on all its shards."""
  manifest = reader.manifest
  stored: list[Any] = [*manifest.records, *filter(None, [manifest.message])]
  sums: dict[str, tuple[int, int]] = {}
  notes: dict[str, list[Note]] = {}
  for saving in (saving for entry in stored for saving in entry.savings):
    elements, size = sums.get(saving.name, (0, 0))
    sums[saving.name] = elements + saving.elements, size + saving.bytes
    if saving.notes:
      notes.setdefault(saving.name, []).extend(saving.notes)
  counted = [x for x in manifest.records if x.input.elements]  # no bases of subspaces
  if counted:
    notes = {'bits per element': list(map(_bits, counted))} | notes
  leaves = [leaf for record in manifest.records for leaf in record.leaves]
  if any(leaf.base_arrays or leaf.product for leaf in leaves):
    notes[encode_lib.RELATIVE] = [_relative_form(leaf) for leaf in leaves]
  if quantised := [x for record in manifest.records for x in _quantised(record)]:
    notes['quantised before'] = quantised
  kept = notes.pop(encode_lib.KEPT, [])
  names = [entry.name for entry in manifest.records if _is_kept(entry)]
  elements = sum(entry.input.elements for entry in stored)
  size = sum(entry.input.bytes for entry in stored)
  other_bytes = sum(x.nbytes for x in manifest.files.values())
  copied_bytes = sum(x.nbytes for x in manifest.copies.values())
  stream_bytes = sum(nbytes for _, nbytes in manifest.streams())
  lines = [ReportLine(name, *saved) for name, saved in sums.items()]
  loss: Any = manifest.options.get('measured')
  uncoded = size - sum(line.bytes_saved for line in lines)
  return Report(
    preset=manifest.preset,
    keeps=manifest.keeps,
    family=manifest.config.family if manifest.config else None,
    input_elements=elements,
    stored_elements=elements - sum(line.elements_saved for line in lines),
    input_bytes=size,
    file_bytes=reader.size,
    lines=[
      *lines,
      ReportLine('coding', 0, uncoded - (stream_bytes - other_bytes - copied_bytes)),
      ReportLine('tokenizer and settings', 0, -other_bytes),
      ReportLine('files copied whole', 0, -copied_bytes),
      ReportLine('file overhead', 0, stream_bytes - reader.size),
    ],
    needs={array.path: array for leaf in leaves for array in leaf.base_arrays},
    notes=notes,
    metadata=reader.metadata,
    measured=loss and schema.load(held_out.Measured, loss, 'measured'),
    missed=manifest.missed,
    excluded=manifest.excluded,
    records=len(manifest.records),
    kept_records=tuple(names),
    kept_tensors=tuple(str(note.get('tensor')) for note in kept),
  )


def _is_kept(record: manifest_lib.RecordEntry) -> bool:
  """Returns whether a preset that changes weights has kept those of a record."""
  return any(x.name == encode_lib.KEPT and not x.notes for x in record.savings)


def _bits(record: manifest_lib.RecordEntry) -> Note:
  """Returns the bits per element of a record in the input and in the file."""
  count = record.input.elements
  bits = lambda nbytes: round(8 * nbytes / count, 2)
  sizes = {'input': bits(record.input.bytes), 'file': bits(record.nbytes)}
  return {'tensor': record.name, 'elements': count} | sizes


def _quantised(record: manifest_lib.RecordEntry) -> list[Note]:
  """Returns what was found of tensors that were quantised before, and their bits."""
  is_found = lambda leaf: leaf.leaf_class is quantisers.BlockQuantized
  if not any(map(is_found, record.leaves)):
    return []
  record.check()
  spec, notes = record.stream_spec, list[Note]()
  sizes = np.zeros(len(spec.arrays))
  *members, plain = spec.members([x.parts for x in spec.arrays])
  for i, (dtype, shape) in plain:
    sizes[i] += math.prod(shape) * dtype.itemsize
  for group, of_group in zip(spec.groups, members, strict=True):
    # As if arrays that are coded together had the same bits per element.
    counts = [math.prod(shape) for _, (_, shape) in of_group]
    share = (group.contexts + sum(group.blocks)) / sum(counts)
    for (i, _), count in zip(of_group, counts, strict=True):
      sizes[i] += share * count
  nbytes = iter(sizes)
  for leaf in record.leaves:
    stored = sum(next(nbytes) for _ in leaf.arrays)
    if is_found(leaf):
      with container.naming(leaf.path):
        form = quantisers.form(leaf.settings, leaf.shape, leaf.arrays)
      bits = round(8 * stored / max(leaf.size, 1), 1)
      notes.append({'tensor': leaf.path, 'form': form, 'bits': bits})
  return notes


def _relative_form(leaf: manifest_lib.Leaf) -> Note:
  """Returns how a tensor is stored relative to a base."""
  form = 'unchanged' if leaf.type_name and not leaf.arrays else leaf.type_name
  product = {} if leaf.product is None else {'product': leaf.product.kind}
  return {'tensor': leaf.path, 'form': form or 'array'} | product


def report_page(source: container.Readable) -> str:
  """Returns the report of a file as a web page, HTML, that needs no network."""
  path = 'FILE'
  if isinstance(source, str | os.PathLike):
    path = text.printable(os.path.basename(os.fsdecode(source)))
  reader = reader_lib.Reader(source)
  report = from_reader(reader)
  sizes = report.input_bytes, report.file_bytes
  before, after = (tqdm.tqdm.format_sizeof(x, 'B') for x in sizes)
  share = report.file_bytes / max(report.input_bytes, 1)
  base, argument = (' --base=BASE', ', base=BASE') if report.needs else ('', '')
  loading = f"to load it:\n  content = rotbits_jax.load('{path}'{argument})"
  if report.family or reader.is_plain:  # no other tree has files to come back
    loading += f'\n  rotbits decode {path} FOLDER{base}'
  return _PAGE.substitute(
    title=html.escape(f'{path}: {before} to {after}, {share:.1%}'),
    text=html.escape(
      f'{BACK[report.keeps].capitalize()}.\n\n{report.to_text()}\n\n{loading}'
    ),
  )


_PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>:root { color-scheme: light dark; } pre { overflow-x: auto; }</style>
<h1>$title</h1>
<pre>$text</pre>
</html>
""")
