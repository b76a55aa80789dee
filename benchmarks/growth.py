"""How time and memory grow with the size of a model, over three decades.

  python -m benchmarks.growth [--sizes=256x2,512x5,1024x12,2048x36]
    [--presets=free,exact] [--work=DIR] [--results=RESULTS.md] [--plot=FILE.svg]

A size is the width of a dense Llama and its layers; the sliced model of it (25%) has
random weights, see benchmarks/synthetic.py. Each is encoded to a file, and loaded as
JAX arrays, by processes of their own. Seconds are those of a second time in the same
process, so that nothing is compiled. Memory is the peak resident size of the process;
mapped pages of files and the arrays that `load` returns count in it. A slope is that of
the logarithm of one size and the next: 1 is in proportion to the tensors' bytes.
"""

from collections.abc import Sequence
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

from absl import flags

from benchmarks import large
from benchmarks import sections
from benchmarks import synthetic
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax.cli import program
from rotbits_jax.report import charts

FLAGS = flags.FlagValues()
_SIZES = flags.DEFINE_list(
  'sizes',
  ['256x2', '512x5', '1024x12', '2048x36'],
  'Widths and layers of dense models, ascending.',
  flag_values=FLAGS,
)
_PRESETS = flags.DEFINE_list(
  'presets', ['free', 'exact'], 'What to encode with.', flag_values=FLAGS
)
_WORK = flags.DEFINE_string('work', None, 'Where files are written.', flag_values=FLAGS)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)
_PLOT = flags.DEFINE_string('plot', None, 'Where to write the plot.', flag_values=FLAGS)

SPARSITY = 0.25
TOKENS = 1024  # few, so that layers are most of the model
TITLE = 'How cost grows with size'

ENCODE = """
rotbits_jax.encode_to_file(*sys.argv[1:3], preset=sys.argv[3], overwrite=True)
"""
LOAD = """
jax.block_until_ready(jax.tree.leaves(rotbits_jax.load(sys.argv[1]).params))
"""
TIMED = """
import json, sys, time
import jax
import rotbits_jax
for _ in range(2):
  start = time.perf_counter()
  {}
print(json.dumps(time.perf_counter() - start))
"""


class Cost(NamedTuple):
  """What encoding or loading a model took."""

  seconds: float
  memory: float  # bytes, at the peak


class Point(NamedTuple):
  """A model and its costs."""

  preset: str
  bytes: int  # of the tensors
  encode: Cost
  load: Cost


def run(statement: str, *args: str) -> Cost:
  """Runs a statement twice in a process of its own, and times the second time."""
  code = TIMED.format(statement.strip())
  process = subprocess.Popen(
    [sys.executable, '-c', code, *args], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout
  output = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  if os.waitstatus_to_exitcode(status):
    raise ValueError(f'{statement.strip()} failed')
  return Cost(json.loads(output), usage.ru_maxrss * large.RSS_UNIT)


def dense_config(hidden: int, layers: int) -> models.ModelConfig:
  """Returns the config of a dense Llama of this size."""
  return checkpoints.parse_config(
    {
      'model_type': 'llama',
      'hidden_size': hidden,
      'intermediate_size': 11 * hidden // 4,
      'num_hidden_layers': layers,
      'num_attention_heads': hidden // 64,
      'vocab_size': TOKENS,
      'max_position_embeddings': 4096,
      'rms_norm_eps': 1e-5,
      'tie_word_embeddings': False,
    }
  )


def measure(
  hidden: int, layers: int, presets: Sequence[str], work: pathlib.Path
) -> list[Point]:
  """Writes a model, encodes it with each preset and loads it."""
  checkpoint, encoded = work / f'{hidden}x{layers}', work / 'encoded'
  synthetic.write(
    checkpoint, dense_config(hidden, layers), sparsity=SPARSITY, name='llama'
  )
  size = rotbits_jax.open_checkpoint(checkpoint).nbytes
  points = []
  for preset in presets:
    encode = run(ENCODE, str(checkpoint), str(encoded), preset)
    points.append(Point(preset, size, encode, run(LOAD, str(encoded))))
    encoded.unlink()
  for path in checkpoint.iterdir():
    path.unlink()
  checkpoint.rmdir()
  return points


def table(points: Sequence[Point]) -> str:
  """Costs of each preset, and their slopes."""
  names = [f'{what} {unit}' for what in ('encode', 'load') for unit in ('s', 'GB')]
  lines = [
    f'{"preset":8}{"bytes":>15}' + ''.join(f'{x:>11}{"slope":>7}' for x in names)
  ]
  before: dict[str, Point] = {}
  for point in sorted(points, key=lambda x: (x.preset, x.bytes)):
    last = before.get(point.preset)
    cells = ''
    values = [*point.encode, *point.load]
    slopes = [''] * len(values)
    if last is not None:
      decade = math.log(point.bytes / last.bytes)
      pairs = zip(values, [*last.encode, *last.load], strict=True)
      slopes = [f'{math.log(a / b) / decade:.2f}' for a, b in pairs]
    for value, slope, unit in zip(values, slopes, (1, 1e9, 1, 1e9), strict=True):
      cells += f'{value / unit:11.3f}{slope:>7}'
    lines.append(f'{point.preset:8}{point.bytes:15,}{cells}')
    before[point.preset] = point
  return '\n'.join(lines)


def picture(points: Sequence[Point]) -> str:
  """Draws the seconds over the tensors' bytes."""
  series = []
  for preset in dict.fromkeys(point.preset for point in points):
    own = sorted((x for x in points if x.preset == preset), key=lambda x: x.bytes)
    for what in ('encode', 'load'):
      seconds = [getattr(x, what).seconds for x in own]
      labels = [''] * len(own)
      labels[1 if preset == 'exact' else -2] = f'{what}, {preset}'  # not side by side
      series.append(charts.Series(what, [x.bytes for x in own], seconds, labels=labels))
  low, high = (f(x.bytes for x in points) for f in (min, max))
  drawn = charts.chart(
    series,
    charts.Axis('bytes of the tensors', low, high, log=True),
    charts.Axis('seconds', 1e-2, 1e3, log=True),
    title='Seconds to encode and to load over the bytes of the tensors',
    legend=False,
  )
  return charts.standalone(drawn) + '\n'


def main() -> None:
  sizes = [tuple(map(int, size.split('x'))) for size in _SIZES.value]
  points: list[Point] = []
  with tempfile.TemporaryDirectory(dir=_WORK.value) as folder:
    for hidden, layers in sizes:
      points += measure(hidden, layers, _PRESETS.value, pathlib.Path(folder))
      print(table(points), flush=True)
  body = (
    f'Written by `python -m benchmarks.growth` on {sections.machine()}. Sliced Llamas\n'
    'with random weights, float16. Nothing is compiled in what is timed; a slope is\n'
    f'that from one size to the next.\n\n```\n{table(points)}\n```\n'
  )
  if _PLOT.value is not None:
    pathlib.Path(_PLOT.value).write_text(picture(points))
    body += f'\n![Time over size]({_PLOT.value})\n'
  if _RESULTS.value is not None:
    sections.write(_RESULTS.value, TITLE, body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
