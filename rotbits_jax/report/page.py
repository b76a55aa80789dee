"""The report on a file as one web page, which needs no network.

The page shows the bytes that each step saves (a waterfall), the singular values of the
shortcuts, the error of each tensor beside that of rounding alone, the reductions beside
the published table, and the layout of the file. A shortcut is the matrix that leads
from one residual segment of a sliced model to the next. The page follows the light or
dark theme of the browser, and fits a phone.
"""

import datetime
import html
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rotbits_jax
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import structured
from rotbits_jax.coding import tables
from rotbits_jax.coding import weights
from rotbits_jax.evaluation import accounting as accounting_lib
from rotbits_jax.evaluation import published
from rotbits_jax.file import verification
from rotbits_jax.report import charts
from rotbits_jax.report import savings
from rotbits_jax.system import text

_LAYERS = 6
"""The greatest number of layers whose spectra are shown."""

_TENSORS = 8
"""The greatest number of kinds of tensors whose errors are shown."""

_KINDS = 16
"""The greatest number of kinds of tensors whose bits are shown."""

_OFTEN = 8
"""How often a value must occur on average, so that counts tell its probability."""

_MOST_ERROR = 1e9
"""The least relative error that is not shown, because charts cannot show any number."""

_WIDE = 30
"""The ratio of an error to the noise floor from which on the axis is logarithmic."""

_ROUNDING = 0.4
"""The relative error of rounding a matrix (Frobenius norm), in units of roundoff."""


def report_page(
  source: file.Readable, *, verified: verification.Verification | None = None
) -> str:
  """Makes the report of a file as a web page.

  Args:
    source: a path, bytes, or an open binary file. A few layers are decoded for the
      spectra of their shortcuts and the bits of their elements.
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
  name = html.escape(path or 'a rotbits file')
  with file.Reader(source) as reader:
    report = savings.from_reader(reader)
    records = _some_records(reader)
    sections = [
      ('The bytes', waterfall(report)),
      ('The tensors', tensors(records)),
      ('The shortcuts', shortcuts(records, report)),
      ('The errors', errors(reader, report)),
      ('The published table', table(reader, report)),
      ('The file', layout(reader)),
      ('To load it', loading(html.escape(path or 'FILE'), reader, report)),
    ]
  body = ''.join(
    f'<section><h2>{heading}</h2>{content}</section>'
    for heading, content in sections
    if content
  )
  before, after = map(text.of_bytes, (report.input_bytes, report.file_bytes))
  share = report.file_bytes / max(report.input_bytes, 1)
  family = f', family {html.escape(report.family)}' if report.family else ''
  back = savings.BACK[report.keeps]
  remarks = ''.join(f'<p>{html.escape(x)}</p>' for x in report.remarks())
  remarks = re.sub('`(.*?)`', r'<code>\1</code>', remarks)
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{name}: {before} to {after}</title>'
    f'<style>{charts.STYLE}{_CSS}</style></head><body><main>'
    f'<h1>{name}: {before} &rarr; {after}, {share:.1%}</h1>'
    f'<p class="lead">{back[0].upper()}{back[1:]}.{_measured(verified)}</p>'
    f'<p>{report.file_bytes:,} bytes in the file for {report.input_bytes:,} bytes of '
    f'tensors. Preset {html.escape(report.preset)}{family}.</p>{remarks}{body}'
    f'<footer>rotbits_jax {rotbits_jax.__version__}, '
    f'{datetime.date.today().isoformat()}</footer></main></body></html>\n'
  )


def _measured(verified: verification.Verification | None) -> str:
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


def loading(name: str, reader: file.Reader, report: savings.Report) -> str:
  """Shows how the file is decoded and loaded."""
  base = ' --base=BASE' if report.needs else ''
  given = ', base=BASE' if report.needs else ''
  lines = f'rotbits decode --input={name} --output=DIR{base}'
  if reader.config is not None:
    lines += (
      f"\n\nimport rotbits_jax\nmodel = rotbits_jax.load('{name}'{given})  # JAX arrays"
    )
  return f'<pre>{lines}</pre>'


# ---- the tensors ---------------------------------------------------------------------


def _some_records(reader: file.Reader) -> dict[str, dict[str, Any]]:
  """Decodes some records that need no base: the leaves of each by path."""
  entries = reader.records
  names = list(entries)
  layers = [x for x in names if models.names.layer_index(x) is not None]
  wanted = {*names} - {*layers}
  experts = [x for x in layers if models.names.expert_index(x) is not None]
  for like in ([x for x in layers if models.names.expert_index(x) is None], experts):
    places = np.linspace(0, len(like) - 1, min(len(like), _LAYERS))
    wanted |= {like[round(place)] for place in places}
  if reader.config is None:
    wanted = {*names[:_LAYERS]}
  beside = {x for x, own in entries.items() if any(y.base_arrays for y in own.leaves)}
  known = {leaf.path for x in beside for leaf in entries[x].leaves}
  # An embedding may be predicted from a head that needs the base.
  waits = lambda x: any(not known.isdisjoint(leaf.needs) for leaf in entries[x].leaves)
  wanted = {x for x in wanted - beside if not waits(x)}
  return {x: structured.flatten(reader.record(x)) for x in names if x in wanted}


def tensors(records: dict[str, dict[str, Any]]) -> str:
  """Tabulates the bits of an element for each kind of tensor; '' without records."""
  kinds: dict[str, list[list[np.ndarray]]] = {}
  for own in records.values():
    for path, leaf in own.items():
      arrays = [leaf]
      if structured.is_structured(leaf):
        arrays = list(leaf.stored()[1].values())
      kind = models.names.pattern(path).removesuffix('/kernel')
      kinds.setdefault(kind, []).append([np.asarray(x) for x in arrays])
  rows = []
  for kind, found in kinds.items():
    count = sum(x.size for arrays in found for x in arrays)
    held = sum(x.nbytes for arrays in found for x in arrays)
    if not count or any(x.dtype.name not in weights.DTYPES for y in found for x in y):
      continue
    size = sum(map(weights.estimate, found))
    least = _entropy([x for arrays in found for x in arrays])
    rows.append((size, kind, count, 8 * held / count, 8 * size / count, least))
  if not rows:
    return ''
  rows.sort(reverse=True)
  cells = ''.join(
    f'<tr><td>{html.escape(kind)}</td><td>{count:,}</td><td>{held:.0f}</td>'
    f'<td>{bits:.2f}</td><td>{"" if least is None else f"{least:.2f}"}</td></tr>'
    for _, kind, count, held, bits, least in rows[:_KINDS]
  )
  return (
    f'<p>Bits of an element, in {len(records)} records. The entropy is that of the '
    'elements of the kind, one by one: without the scales of rows and columns, which '
    'this coder knows, none takes fewer bits.</p>'
    '<div class="scroll"><table><tr><th>tensor</th><th>elements</th><th>bits</th>'
    f'<th>bits in the file</th><th>entropy</th></tr>{cells}</table></div>'
  )


def _entropy(arrays: list[np.ndarray]) -> float | None:
  """Returns the entropy of elements in bits; None if too few tell it."""
  counts = []
  for dtype in {x.dtype for x in arrays}:
    own = [x.reshape(-1) for x in arrays if x.dtype == dtype]
    bits = np.concatenate(own).view(f'u{dtype.itemsize}')
    counts.append(np.unique(bits, return_counts=True)[1])
  present = np.concatenate(counts)
  if present.sum() < _OFTEN * present.size:
    return None
  return tables.entropy_bits(present) / float(present.sum())


# ---- the bytes -----------------------------------------------------------------------


def waterfall(report: savings.Report) -> str:
  """Draws how the bytes of the tensors become those of the file."""
  rows, left = [('tensors', 0, report.input_bytes, 'whole')], report.input_bytes
  for line in report.lines:
    after = left - line.bytes_saved
    kind = 'less' if line.bytes_saved >= 0 else 'more'
    if line.bytes_saved:
      rows.append((line.name, min(left, after), abs(line.bytes_saved), kind))
    left = after
  rows.append(('file', 0, report.file_bytes, 'whole'))
  most = max(begin + size for _, begin, size, _ in rows)
  lines = []
  for name, begin, size, kind in rows:
    sign = {'whole': '', 'less': '&minus;', 'more': '+'}[kind]
    place = f'left:{100 * begin / most:.3f}%;width:{100 * size / most:.3f}%'
    lines.append(
      f'<li><span>{html.escape(name)}</span>'
      f'<span class="track"><i class="{kind}" style="{place}"></i></span>'
      f'<span class="number">{sign}{size:,}</span>'
      f'<span class="number">{sign}{size / max(report.input_bytes, 1):.2%}</span></li>'
    )
  return (
    '<p>Each step starts where the one above it ends. Hatched bars are bytes saved, '
    'solid narrow bars are bytes added.</p>'
    f'<ul class="waterfall">{"".join(lines)}</ul>'
  )


# ---- the shortcuts -------------------------------------------------------------------


class _Spectrum(NamedTuple):
  """The singular values of a shortcut, ascending, and its name within the layer."""

  kind: str
  values: np.ndarray


def shortcuts(records: dict[str, dict[str, Any]], report: savings.Report) -> str:
  """Draws the spectra of some shortcuts, and the ranks of all; '' if there are none."""
  notes = [x for x in _notes(report) if x.rank is not None and 'shortcut' in x.name]
  if not notes:
    return ''
  found = [x for name, own in records.items() for x in _spectra(name, own)]
  if not found:
    return ''
  most = max(x.values.size for x in found)
  kinds = list(dict.fromkeys(x.kind for x in found))
  series = [
    charts.Series(
      spectrum.kind,
      range(1, spectrum.values.size + 1),
      spectrum.values.tolist(),
      markers=False,
      style=kinds.index(spectrum.kind),
    )
    for spectrum in found
  ]
  highest = max(float(x.values.max()) for x in found)
  picture = charts.chart(
    series,
    charts.Axis('values, from the least up', 1, max(most, 2)),
    charts.Axis('singular value', 0, max(1.02, highest)),
    title=f'the singular values of {len(found)} shortcuts',
  )
  return (
    f'<p>The singular values of {len(found)} shortcuts. The file stores one column for '
    'each value that differs from 1 by more than the tolerance. Their count is the '
    'rank.</p><div class="figures">'
    f'<figure>{picture}<figcaption>Spectra</figcaption></figure>'
    f'<figure>{_ranks(notes, most)}<figcaption>Ranks</figcaption></figure></div>'
  )


def _ranks(notes: list['_TensorNote'], most: int) -> str:
  named: dict[str, list[_TensorNote]] = {}
  for note in notes:
    named.setdefault(note.name, []).append(note)
  series = [
    charts.Series(name, [x.layer for x in own], [float(x.rank or 0) for x in own])
    for name, own in named.items()
  ]
  last = max(note.layer for note in notes)
  return charts.chart(
    series,
    _layer_axis(last),
    charts.Axis(f'rank, of {most}', 0, most),
    title='the rank of every shortcut by layer',
  )


def _spectra(name: str, leaves: dict[str, Any]) -> list[_Spectrum]:
  """Computes the spectra of one layer's shortcuts."""
  found = []
  for path, leaf in leaves.items():
    if 'shortcut' not in path or len(leaf.shape) != 2:
      continue
    numbers = [np.asarray(x, np.float32) for x in jax.tree.leaves(leaf)]
    if not all(np.isfinite(x).all() for x in numbers):
      continue
    if structured.is_structured(leaf):
      values = leaf.singular_values()
    else:
      matrix = np.asarray(leaf, np.float32)
      values = np.linalg.svd(matrix, compute_uv=False)[::-1]
    kind = path.removeprefix(f'{name}/').removesuffix('/kernel')
    found.append(_Spectrum(kind, values))
  return found


# ---- the errors ----------------------------------------------------------------------


def errors(reader: file.Reader, report: savings.Report) -> str:
  """Draws the errors that the notes tell, beside that of rounding; '' without notes."""
  groups: dict[str, list[tuple[int, float]]] = {}
  for note in _notes(report):
    if note.error:
      name = f'{note.name} ({note.transform})'
      groups.setdefault(name, []).append((note.layer, note.error))
  on_disk = reader.dtypes_on_disk().values()
  dtypes = [x for x in on_disk if jnp.issubdtype(x, jnp.floating)]
  if not (groups and dtypes):
    return ''
  dtype = max(set(dtypes), key=dtypes.count)
  floor = _ROUNDING * float(jnp.finfo(dtype).eps) / 2
  names = list(groups)[:_TENSORS]
  most = max(y for name in names for _, y in groups[name]) / floor
  last = max(x for name in names for x, _ in groups[name])
  axis = charts.Axis('error / noise floor', 0, max(2.0, 1.1 * most))
  if most > _WIDE:
    axis = axis._replace(low=0.1, high=10.0 ** np.ceil(np.log10(most)), log=True)
  parts = []
  for name in names:
    points = sorted(groups[name])
    series = [
      charts.Series(name, [x for x, _ in points], [y / floor for _, y in points]),
      charts.Series('rounding alone', [0, max(last, 1)], [1.0] * 2, markers=False),
    ]
    picture = charts.chart(
      series,
      _layer_axis(last),
      axis,
      title=f'{name}: relative error by layer, beside rounding alone',
      legend=False,
    )
    parts.append(
      f'<figure>{picture}<figcaption>{html.escape(name)}</figcaption></figure>'
    )
  return (
    '<p>The relative error (Frobenius norm) of each rewritten tensor, or of the '
    'product that the rewriting keeps. Rounding a matrix to '
    f'{html.escape(dtype.name)} alone makes an error of about {floor:.1e}. This noise '
    'floor is the dashed line.</p>'
    f'<div class="figures">{"".join(parts)}</div>'
  )


# ---- the published table -------------------------------------------------------------


def table(reader: file.Reader, report: savings.Report) -> str:
  """Tabulates reductions of published models and of this file; '' if it has none."""
  config = reader.config
  if config is None or not config.sliced or report.keeps != 'function':
    return ''
  dense = accounting_lib.dense_elements(config)
  if dense <= 0:
    return ''
  sizes = report.input_elements, report.stored_elements, report.file_bytes / 2
  own = [100 * (1 - n / dense) for n in sizes]
  rows = [
    '<tr><th>model</th><th>slicing</th><th>SliceGPT</th><th>bits-back, published</th>'
    '<th>gauge fixed</th><th>+ heads, retied</th></tr>',
    f'<tr class="own"><td>this file</td><td></td><td>{own[0]:.2f}%</td><td></td>'
    f'<td colspan="2">{own[1]:.2f}% of the elements, {own[2]:.2f}% of the bytes</td>'
    '</tr>',
  ]
  for name, model in published.experiments().items():
    for sparsity, bits_back in model.bits_back.items():
      found = accounting_lib.accounting(model.config, sparsity).reduction()
      best = found['gauge_fixed_heads_retied'] or found['gauge_fixed_heads']
      cells = ''.join(
        f'<td>{x:.2f}%</td>'
        for x in (found['slicegpt'], bits_back, found['gauge_fixed'], best)
      )
      rows.append(f'<tr><td>{name}</td><td>{sparsity:.0%}</td>{cells}</tr>')
  return (
    '<p>Reductions relative to the dense model with an untied head, at 16 bits an '
    'element, as the bits-back paper (arXiv 2410.01309) counts them. Its models are '
    'counted from their sizes alone, before entropy coding.</p>'
    f'<div class="scroll"><table>{"".join(rows)}</table></div>'
  )


# ---- the file ------------------------------------------------------------------------


def layout(reader: file.Reader) -> str:
  """Draws the streams of the file in order, and tabulates them."""
  sizes = reader.streams()
  sizes.append(('header and manifest', reader.size - reader.stream_bytes()))
  whole = max(sum(size for _, size in sizes), 1)
  strip = ''.join(
    f'<i style="flex-grow:{size}" title="{html.escape(name)}: {size:,} bytes">'
    f'<b>{html.escape(name)}</b></i>'
    for name, size in sizes
    if size
  )
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td><td>{size:,}</td><td>{size / whole:.2%}</td></tr>'
    for name, size in sizes
  )
  return (
    '<p>The streams in the order of the file, drawn in proportion to their lengths.</p>'
    f'<div class="strip">{strip}</div>'
    '<details><summary>All streams</summary><div class="scroll"><table>'
    '<tr><th>stream</th><th>bytes</th><th>share</th></tr>'
    f'{rows}</table></div></details>'
  )


def _layer_axis(last: int) -> charts.Axis:
  ticks = range(0, last + 1, last // 6 + 1)
  return charts.Axis('layer', 0, max(last, 1), ticks=ticks)


class _TensorNote(NamedTuple):
  """A note about a tensor of a layer.

  Attributes:
    transform: the transform that made the note.
    layer: index of the layer.
    name: path of the tensor within the layer.
    rank: rank of a shortcut; None if the note has no rank.
    error: relative error; None if the note has no error.
  """

  transform: str
  layer: int
  name: str
  rank: int | None
  error: float | None


def _notes(report: savings.Report) -> list[_TensorNote]:
  """Returns the notes about tensors of layers. They may be from an untrusted file."""
  found = []
  for transform, note in ((key, x) for key, own in report.notes.items() for x in own):
    unit, _, name = str(note.get('tensor')).partition('/')
    layer = models.names.layer_index(unit)
    rank, error = note.get('rank'), note.get('error')
    if layer is not None:
      found.append(
        _TensorNote(
          transform,
          layer,
          name,
          rank if type(rank) is int and 0 <= rank < 1 << 31 else None,
          error if type(error) is float and 0 < error < _MOST_ERROR else None,
        )
      )
  return found


_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; }
p { max-width: 46rem; margin: 8px 0; }
ul { list-style: none; margin: 16px 0; padding: 0; }
.waterfall li { display: grid; align-items: center; gap: 0 12px; padding: 3px 0;
  grid-template-columns: 11rem 1fr 8rem 5rem; }
.track { position: relative; height: 18px; background:
  linear-gradient(var(--line), var(--line)) left / 1px 100% no-repeat; }
.track i { position: absolute; top: 0; bottom: 0; min-width: 2px; }
.whole { background: var(--soft); }
.less { border: 1px solid var(--s0); background: repeating-linear-gradient(
  135deg, var(--s0) 0 2px, transparent 2px 7px); }
.more { background: var(--s1); top: 5px !important; bottom: 5px !important; }
.number, td, th { font-variant-numeric: tabular-nums; }
.number { text-align: right; }
.figures { display: grid; gap: 20px;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .875rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: .875rem; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.legend svg { width: 28px; height: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9375rem; margin: 12px 0; }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.own td { font-weight: 700; border-bottom: 2px solid var(--soft); }
.strip { display: flex; height: 44px; margin: 16px 0; border: 1px solid var(--soft); }
.strip i { flex: 0 1 0; min-width: 1px; overflow: hidden; font-style: normal;
  border-right: 1px solid var(--page); background: var(--line); }
.strip i:nth-child(even) { background: var(--soft); color: var(--page); }
.strip b { display: block; padding: 11px 6px; font: 12px/20px inherit;
  font-size: 12px; font-weight: 400; white-space: nowrap; }
summary { cursor: pointer; }
.lead { font-size: 1.125rem; }
pre { overflow-x: auto; padding: 12px; border: 1px solid var(--line); }
footer { margin-top: 48px; color: var(--soft); font-size: .875rem; }
@media print {
  @page { margin: 16mm; }
  :root { color-scheme: light; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  figure, tr, li, .strip, pre { break-inside: avoid; }
  h2 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 12px 20px; }
  figure > svg { max-height: 44mm; }
  .scroll { overflow: visible; }
  table { font-size: 9pt; }
  pre { white-space: pre-wrap; }
}
@media (max-width: 640px) {
  .waterfall li { grid-template-columns: 1fr auto auto; padding: 6px 0; }
  .waterfall .track { grid-column: 1 / -1; grid-row: 2; }
  th, td { padding: 4px 8px; }
  th { white-space: normal; }
}
"""
