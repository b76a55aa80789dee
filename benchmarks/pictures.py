"""Draws the pictures of README.md and of the documentation, with matplotlib.

  python -m benchmarks pictures

`canonical.png` and `waterfall.svg` are measured here. Every other picture is drawn from
the tables in RESULTS.md, and shows what was written there. README.md gets its tables
from there, too.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt
import numpy as np

from benchmarks import common
from benchmarks import kinds
from benchmarks import near
from benchmarks import speed
import rotbits_jax

mpl.use('svg')
plt.rcParams.update(
  {'svg.hashsalt': 'rotbits', 'font.size': 9, 'figure.dpi': 90, 'savefig.dpi': 90}
)
_NO_DATE = {'Date': None}  # the same numbers give the same file
# Where a legend covers no point.
_OUTSIDE: dict[str, Any] = {'loc': 'upper left', 'bbox_to_anchor': (1, 1)}


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
  fixed = dataclasses.replace(model, params=params)
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


def number(cell: str) -> float:
  """Returns the number in a cell."""
  return float(cell.replace(',', '').rstrip('%') or 'nan')


def near_picture(model: str, file: str) -> None:
  """Draws bits per weight against KL, for `near` and for other formats."""
  for rows in common.tables(near.title(model))[:1]:
    figure, ax = plt.subplots(figsize=(6.4, 4))
    for method in dict.fromkeys(row['method'] for row in rows):
      points = [row for row in rows if row['method'] == method]
      bits, kl = ([number(row[x]) for row in points] for x in ('bits', 'KL'))
      is_near = method.startswith('near')
      ax.plot(bits, kl, '.-' if is_near else '.', label=method)
      for row, x, y in zip(points, bits, kl, strict=True):
        if not is_near:
          ax.annotate(row['format'], (x, y), (3, 2), textcoords='offset points')
    ax.set(yscale='log', xlabel='bits per weight', ylabel='KL, nats per token')
    ax.margins(x=0.1)
    ax.set_title(model)
    ax.legend(**_OUTSIDE)
    save(figure, file)


def time_to_weights() -> None:
  """Draws the time to read a file over a link and to decode it, over the speed."""
  for rows in common.tables(speed.TITLE)[-1:]:
    model = next(iter(rows[0]))
    links = np.geomspace(10, 3000, 100)
    figure, ax = plt.subplots(figsize=(6.4, 4))
    for row in rows:
      seconds = number(row['MB']) / links + number(row['decode s'])
      ax.plot(links, seconds, label=row[model].strip('`'))
    ax.set(xscale='log', yscale='log', xlabel='link, MB/s', ylabel='seconds to weights')
    ax.set_title(model)
    ax.legend(**_OUTSIDE)
    save(figure, 'time-to-weights.svg')


def run(settings: common.Settings) -> Iterator[common.Section]:
  """Draws all pictures; there is no section."""
  del settings
  canonical()
  waterfall()
  for model, file in near.PICTURES.items():
    near_picture(model, file)
  time_to_weights()
  kinds.write_readme()
  yield from ()
