"""Draws the pictures of README and of the documentation, as SVG for both themes.

  python -m benchmarks.pictures [--checkpoint=DIR] [--max_tokens=N]
    [--peers_python=PYTHON] [--output=DIR]

`waterfall.svg` shows how the bytes of a sliced checkpoint become those of a file, and
other compressors on the same tensors, see benchmarks/peers.py. `curve.svg` shows bytes
against KL divergence, beside the block formats of GGUF. The numbers are kept in
`measured.json`; `--draw` draws them again, and with them the pictures of the benchmarks
decode, growth, near and base, from their tables in RESULTS.md.
"""

import html
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np
import safetensors.numpy

from benchmarks import base
from benchmarks import charts
from benchmarks import decode
from benchmarks import demo
from benchmarks import formats
from benchmarks import growth
from benchmarks import near
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import evaluation
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  str(demo.WEIGHTS.parent),
  'The sliced checkpoint to measure.',
  flag_values=FLAGS,
)
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', demo.QUICK_TOKENS, 'Tokens of the text to use.', flag_values=FLAGS
)
_PEERS_PYTHON = flags.DEFINE_string(
  'peers_python',
  None,
  'A Python with zstandard, lmzip and zipnn; none of them is shown without it.',
  flag_values=FLAGS,
)
_DRAW = flags.DEFINE_bool(
  'draw', False, 'Draw what was measured before.', flag_values=FLAGS
)
_OUTPUT = flags.DEFINE_string(
  'output',
  str(demo.ROOT / 'docs' / 'pictures'),
  'The directory for the pictures.',
  flag_values=FLAGS,
)

STEPS = (-7.0, -6.0, -5.0, -4.0, -3.0)
"""Steps of `near` in the curve; with -9 a file is larger than with `free`."""

BLOCKS = ('Q8_0', 'Q5_0', 'Q4_0')
"""GGUF's formats in the curve."""

NEAR = {
  'opt-small': '`near` beside other formats: opt-small-sliced-0.2',
  'smollm2': '`near` beside other formats: SmolLM2-135M, sliced by 25%',
  'smollm2-dense': '`near` beside other formats: SmolLM2-135M, dense',
}
"""The sections of RESULTS.md for the pictures of `benchmarks.near`."""

Measured = dict[str, Any]  # JSON values


# ---- other compressors ---------------------------------------------------------------

PEERS = {'zstandard': 'zstd -3', 'lmzip': 'lmzip', 'zipnn': 'ZipNN'}
"""The names of other compressors in `benchmarks.peers`, and in the picture."""


def peers(model: rotbits_jax.Model, python: str) -> dict[str, int]:
  """Returns the bytes that other compressors make of a model's safetensors file."""
  found = {}
  with tempfile.TemporaryDirectory() as directory:
    source = pathlib.Path(directory) / 'model.safetensors'
    safetensors.numpy.save_file(checkpoints.to_tensors(model), source)
    for name, shown in PEERS.items():
      output = pathlib.Path(directory) / name
      script = str(pathlib.Path(__file__).with_name('peers.py'))
      subprocess.run([python, script, name, 'compress', source, output], check=True)
      found[shown] = output.stat().st_size
  return found


# ---- measuring -----------------------------------------------------------------------


def measure(
  checkpoint: rotbits_jax.Checkpoint, max_tokens: int | None, python: str | None
) -> Measured:
  """Measures all that the pictures show."""
  model = checkpoint.model
  report = rotbits_jax.inspect(rotbits_jax.encode(model, preset='free'))
  exact = len(rotbits_jax.encode(model, preset='exact'))
  tokens = evaluation.encode_text(checkpoint.files, demo.read_data('evaluation.txt'))

  def divergence(other: rotbits_jax.Model) -> float:
    result = evaluation.evaluate(
      other, tokens, reference=model, max_tokens=max_tokens, progress=True
    )
    assert result.kl is not None
    return result.kl

  curve: dict[str, list[list[float]]] = {'this library': [], 'GGUF': []}
  for preset in (presets.free(), *(presets.near(step=x) for x in STEPS)):
    data = rotbits_jax.encode(model, preset=preset)
    loaded = rotbits_jax.load(data)
    assert isinstance(loaded, rotbits_jax.Model)
    kl = divergence(loaded)
    curve['this library'].append([len(data) / report.input_bytes, kl])
  for name in BLOCKS:
    stored = formats.in_blocks(model, name)
    kl = divergence(stored.model)
    curve['GGUF'].append([stored.bytes / report.input_bytes, kl])
  floor = divergence(passes.randomly_rotated(model, key=jax.random.key(0)))
  return {
    'checkpoint': checkpoint.stem,
    'input': report.input_bytes,
    'file': report.file_bytes,
    'exact': exact,
    'lines': [[x.name, x.bytes_saved] for x in report.lines],
    'peers': peers(model, python) if python else {},
    'curve': curve,
    'floor': floor,
  }


# ---- drawing -------------------------------------------------------------------------

_STYLE = """
.whole { fill: var(--soft); }
.peer { fill: none; stroke: var(--soft); stroke-width: 2; }
.less { fill: url(#hatch); stroke: var(--s0); } .more { fill: var(--s1); }
text.ink { fill: var(--ink); }
"""
_HATCH = (
  '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
  'patternTransform="rotate(45)"><path class="s0" stroke-width="3" d="M0 0V6"/>'
  '</pattern></defs>'
)
_ROW = 22


def waterfall(measured: Measured) -> str:
  """Draws the bytes of the tensors, of each step, of the file, and of others."""
  whole, left = measured['input'], measured['input']
  rows = [('raw tensors', 0, whole, 'whole')]
  for name, saved in measured['lines']:
    after = left - saved
    if abs(saved) >= whole / 1000:
      rows.append((name, min(left, after), abs(saved), 'less' if saved > 0 else 'more'))
    left = after
  rows.append(('free', 0, measured['file'], 'whole'))
  rows.append(('exact, every bit', 0, measured['exact'], 'whole'))
  rows += [(name, 0, size, 'peer') for name, size in measured['peers'].items()]
  ground = '<rect width="100%" height="100%" style="fill: var(--page)"/>'
  parts = [f'<style>{charts.STYLE}{_STYLE}</style>{_HATCH}{ground}']
  for i, (name, begin, size, kind) in enumerate(rows):
    y = 8 + i * _ROW
    x, width = 150 + 280 * begin / whole, max(280 * size / whole, 1.5)
    sign = {'less': '&#8722;', 'more': '+'}.get(kind, '')
    style = 'ink' if kind in ('whole', 'peer') else ''
    parts.append(
      f'<text class="{style}" x="142" y="{y + 12}" text-anchor="end">'
      f'{html.escape(name)}</text>'
      f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="15"/>'
      f'<text class="{style}" x="490" y="{y + 12}" text-anchor="end">'
      f'{sign}{size / whole:.1%}</text>'
    )
  height = 16 + len(rows) * _ROW
  title = 'bytes of the tensors, what each step saves, and other compressors'
  return (
    f'<svg viewBox="0 0 500 {height}" xmlns="http://www.w3.org/2000/svg" role="img" '
    f'aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>\n'
  )


def curve(measured: Measured) -> str:
  """Draws bytes against divergence."""
  series = [
    charts.Series(name, [100 * x for x, _ in points], [y for _, y in points])
    for name, points in measured['curve'].items()
  ]
  least = min(measured['floor'], *(y for own in series for y in own.y))
  low = 10.0 ** np.floor(np.log10(least))
  high = 10.0 ** np.ceil(np.log10(max(y for own in series for y in own.y)))
  floor = charts.Series(
    'rounding alone', [20, 100], [measured['floor']] * 2, markers=False
  )
  picture = charts.chart(
    [*series, floor],
    charts.Axis('% of the bytes', 20, 100),
    charts.Axis('KL divergence, nats a token', low, high, log=True),
    title='bytes against the divergence of predictions',
    legend=False,
  )
  labels = ''
  for i, own in enumerate(series):
    x = 52 + (charts.WIDTH - 70) * 0.5
    y = 22 + 14 * i
    labels += f'{charts.marker(i, x, y + 6)}<text x="{x + 10}" y="{y + 10}">'
    labels += f'{html.escape(own.name)}</text>'
  labels += f'<text x="60" y="{charts.HEIGHT - 42}">dotted: rounding alone</text>'
  end = picture.index('</svg>')
  return charts.standalone(picture[:end] + labels + picture[end:]) + '\n'


# ---- tables of RESULTS.md ------------------------------------------------------------


def section(title: str) -> str:
  """Returns a section of RESULTS.md."""
  text = (demo.ROOT / 'RESULTS.md').read_text()
  found = re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', text, re.M | re.S)
  if found is None:
    raise ValueError(f'RESULTS.md has no section {title!r}')
  return found[1]


def rows_of(title: str, pattern: str) -> list[re.Match[str]]:
  """Returns the lines of a section that match a pattern."""
  return list(re.finditer(rf'^{pattern}', section(title), re.M))


def number(text: str) -> float:
  return float(text.replace(',', ''))


def of_decode() -> str:
  rows = rows_of(
    'Decoding, from file to arrays', r'(\w+) +([\d,]+) +\d[.]\d{4} +(\S+) .*$'
  )
  found = [(x[1], int(number(x[2])), float(x[3])) for x in rows]
  return decode.picture([decode.Row(*x) for x in found])


def of_growth() -> str:
  (header,) = rows_of(growth.TITLE, r' +size .*$')
  end = header[0].index('load s') + len('load s')  # columns before it may be empty
  points = []
  for row in rows_of(growth.TITLE, r'(\w+) +(\d+x\d+) +([\d,]+) +[\d.]+ +([\d.]+) .*$'):
    load = float(row[0][:end].split()[-1])
    costs = [growth.Cost(seconds, 0) for seconds in (float(row[4]), load)]
    points.append(growth.Point(row[1], row[2], int(number(row[3])), 0, *costs))
  return growth.picture(points)


def of_near(title: str) -> str:
  """Draws a table of `benchmarks.near`; the first row of a series has its name."""
  cells = r'(2\^-?\d+|I?Q\d_\w+|int\d) +([\d,]+) +([\d.]+) +([\d.]+) +(\S+) +([\d.]+)%'
  rows, series, elements = [], '', 0.0
  for row in rows_of(title, rf'(.{{18}}){cells}.*$'):
    series = row[1].strip() or series
    size = int(number(row[3]))
    perplexity, kl, ear = map(float, (row[5], row[6], row[7]))
    rows.append(near.Row(series, row[2], size, perplexity, kl, ear / 100))
    elements = 8 * size / float(row[4])
  return near.picture(rows, round(elements))


def main() -> None:
  output = pathlib.Path(_OUTPUT.value)
  output.mkdir(exist_ok=True, parents=True)
  numbers = output / 'measured.json'
  if not _DRAW.value:
    checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
    measured = measure(checkpoint, _MAX_TOKENS.value, _PEERS_PYTHON.value)
    numbers.write_text(json.dumps(measured, indent=2) + '\n')
  measured = json.loads(numbers.read_text())
  (output / 'waterfall.svg').write_text(waterfall(measured))
  (output / 'curve.svg').write_text(curve(measured))
  if _DRAW.value:
    (output / 'time-to-weights.svg').write_text(of_decode())
    (output / 'growth.svg').write_text(of_growth())
    (output / 'base.svg').write_text(base.picture(section(base.TITLE)))
    for name, title in NEAR.items():
      (output / f'near-{name}.svg').write_text(of_near(title))


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
