"""Draws the pictures of README.md and of the documentation, with matplotlib.

  python -m benchmarks pictures

`canonical.png` and `waterfall.svg` are measured here. Every other picture is drawn from
the tables in RESULTS.md, so that it shows what was written there.
"""

from collections.abc import Iterator
import re
from typing import Any

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt
import numpy as np

from benchmarks import common
from benchmarks import near
import rotbits_jax

mpl.use('svg')
plt.rcParams.update(
  {'svg.hashsalt': 'rotbits', 'font.size': 9, 'figure.dpi': 90, 'savefig.dpi': 90}
)
_NO_DATE = {'Date': None}  # the same numbers give the same file

Row = dict[str, str]


def save(figure: Any, name: str) -> None:
  """Writes a picture."""
  metadata = _NO_DATE if name.endswith('.svg') else None
  figure.savefig(common.PICTURES / name, bbox_inches='tight', metadata=metadata)
  plt.close(figure)


def canonical() -> None:
  """Draws a shortcut of a sliced model, before and after `canonicalize`."""
  model = rotbits_jax.load_checkpoint(common.SLICED).model
  canonicalize = jax.jit(rotbits_jax.canonicalize, static_argnums=1)
  params, _ = canonicalize(model.params, model.config)
  fixed = model.replace(params=params)
  before, after = (x.layer(1)['mlp_shortcut']['kernel'] for x in (model, fixed))
  factor = np.asarray(after.b, np.float32)
  factor = factor[:, np.abs(factor).max(0) > 1e-6]
  shown = {
    'a shortcut, 200 x 200': np.asarray(before, np.float32),
    'canonical: $I - B B^T$': np.asarray(after.materialize(), np.float32),
    '$B$, which is stored': factor,
  }
  ratios = [x.shape[1] for x in shown.values()]
  figure, axes = plt.subplots(
    *(1, len(shown)), figsize=(7, 3), width_ratios=ratios, layout='constrained'
  )
  for ax, (title, array) in zip(axes, shown.items(), strict=True):
    size = np.log10(np.abs(array) / np.abs(array).max() + 1e-9)
    image = ax.imshow(size, cmap='magma', vmin=-4, vmax=0, interpolation='nearest')
    ax.set_title(title)
    ax.set_axis_off()
  figure.colorbar(image, ax=axes, label='log10 of the magnitude', shrink=0.8)
  save(figure, 'canonical.png')


def waterfall() -> None:
  """Draws the bytes of a sliced model, of each transform, and of the file."""
  report = rotbits_jax.inspect(
    rotbits_jax.encode(rotbits_jax.open_checkpoint(common.SLICED), preset='free')
  )
  bars = [('tensors', 0, report.input_bytes, 'tab:gray')]
  left = report.input_bytes
  for line in report.lines:
    color = 'tab:blue' if line.bytes_saved > 0 else 'tab:red'
    left -= line.bytes_saved
    bars.append((line.name, left, line.bytes_saved, color))
  bars.append(('file', 0, report.file_bytes, 'tab:gray'))
  figure, ax = plt.subplots(figsize=(6.4, 0.27 * len(bars)))
  for i, (_, start, width, color) in enumerate(bars):
    ax.barh(i, width / 1e6, left=start / 1e6, color=color)
    ax.annotate(
      f'{width / report.input_bytes:.1%}',
      (1.01, i),
      xycoords=('axes fraction', 'data'),
      va='center',
    )
  ax.set_yticks(range(len(bars)), [name for name, *_ in bars])
  ax.invert_yaxis()
  ax.set_xlabel('MB')
  save(figure, 'waterfall.svg')


# ---- from the tables of RESULTS.md ---------------------------------------------------


def tables(title: str) -> list[list[Row]]:
  """Returns the tables of a section, each row a dict; empty if it is not there."""
  text = (common.ROOT / 'RESULTS.md').read_text('utf-8')
  section = re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', text, re.M | re.S)
  found = []
  for lines in re.findall(r'(?:^\|.*\n)+', section[1] if section else '', re.M):
    header, _, *rows = (
      [x.strip() for x in y.split('|')[1:-1]] for y in lines.split('\n')[:-1]
    )
    found.append([dict(zip(header, row, strict=True)) for row in rows])
  return found


def number(cell: str) -> float:
  """Returns the number in a cell."""
  return float(cell.replace(',', '').rstrip('%') or 'nan')


def near_picture(model: str, file: str) -> None:
  """Draws bits a weight against KL, for `near` and for other formats."""
  found = tables(near.title(model))
  if not found:
    return
  figure, ax = plt.subplots(figsize=(6.4, 4))
  for method in dict.fromkeys(row['method'] for row in found[0]):
    rows = [row for row in found[0] if row['method'] == method]
    bits, kl = ([number(row[x]) for row in rows] for x in ('bits', 'KL'))
    ax.plot(bits, kl, '.-' if 'near' in method else '.', label=method.replace('`', ''))
    if 'near' not in method:
      for row, x, y in zip(rows, bits, kl, strict=True):
        ax.annotate(row['format'], (x, y), textcoords='offset points', xytext=(3, 2))
  ax.set(yscale='log', xlabel='bits per weight', ylabel='KL, nats a token')
  ax.legend()
  save(figure, file)


def run(settings: common.Settings) -> Iterator[common.Section]:
  """Draws all; there is no section."""
  del settings
  canonical()
  waterfall()
  for model, file in near.PICTURES.items():
    near_picture(model, file)
  yield from ()
