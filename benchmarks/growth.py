"""How time, memory and bytes grow with the size of a model, over three decades.

  python -m benchmarks.growth [--sizes=256x2,512x5,512x48,1024x12,2048x36]
    [--presets=free,exact] [--peers_python=PYTHON] [--work=DIR] [--results=RESULTS.md]
    [--plot=FILE.svg]

A size is the width of a dense Llama and its layers; the sliced model of it (25%) has
random weights, see benchmarks/synthetic.py. Two sizes of equal bytes show what depth
costs. Each is encoded to a file, and loaded as JAX arrays, by processes of their own.
So do the peers with the safetensors file of the same tensors, see benchmarks/peers.py
and benchmarks/decode.py. Seconds are those of a second time in the same process, so
that nothing is compiled. Memory is the peak resident size of the process; mapped pages
of files and the arrays that `load` returns count in it; zstd's program has a process of
its own that does not count. A slope is that of the logarithm of one size and the next:
1 is in proportion to the tensors' bytes.

The second table has one of the models by the processors that there are: one, all of
this machine, and those that XLA is told of (NPROC=16).
"""

from collections.abc import Sequence
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from absl import flags

from benchmarks import charts
from benchmarks import sections
from benchmarks import synthetic
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_SIZES = flags.DEFINE_list(
  'sizes',
  ['256x2', '512x5', '512x48', '1024x12', '2048x36'],
  'Widths and layers of dense models, ascending.',
  flag_values=FLAGS,
)
_PRESETS = flags.DEFINE_list(
  'presets', ['free', 'exact'], 'What to encode with.', flag_values=FLAGS
)
_PEERS_PYTHON = flags.DEFINE_string(
  'peers_python', None, 'A Python with the packages of the peers.', flag_values=FLAGS
)
_WORK = flags.DEFINE_string('work', None, 'Where files are written.', flag_values=FLAGS)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)
_PLOT = flags.DEFINE_string('plot', None, 'Where to write the plot.', flag_values=FLAGS)

ROOT = pathlib.Path(__file__).parents[1]
BY_PROCESSORS = '1024x12'
PEERS = ('zstd', 'zipnn', 'lmzip', 'openzl')
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
import sys
import jax
import rotbits_jax
from benchmarks import peers
peers.print_cost(lambda: {})
"""


class Cost(NamedTuple):
  """What encoding or loading a model took."""

  seconds: float
  memory: float  # bytes, at the peak


class Point(NamedTuple):
  """A model and what a preset, or a peer, takes for it."""

  name: str
  size: str  # width and layers
  bytes: int  # of the tensors
  coded: int  # bytes of the file
  encode: Cost
  load: Cost


def run(command: Sequence[str], **variables: str) -> Cost:
  """Runs a process that prints what its work cost."""
  given = os.environ | {'PYTHONPATH': str(ROOT)} | variables
  output = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=given)
  return Cost(*json.loads(output.stdout))


def run_twice(statement: str, *args: str, cpu: str = '', **variables: str) -> Cost:
  """Runs a statement twice in a process of its own, and times the second time."""
  code = TIMED.format(statement.strip())
  pinned = ['taskset', '--cpu-list', cpu] if cpu else []
  return run([*pinned, sys.executable, '-c', code, *args], **variables)


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


def make(hidden: int, layers: int, work: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Writes a model; returns its folder and the bytes of its tensors."""
  checkpoint = work / f'{hidden}x{layers}'
  synthetic.write(
    checkpoint, dense_config(hidden, layers), sparsity=SPARSITY, name='llama'
  )
  return checkpoint, rotbits_jax.open_checkpoint(checkpoint).nbytes


def measure(
  checkpoint: pathlib.Path,
  size: int,
  presets: Sequence[str],
  peers_python: str | None,
  work: pathlib.Path,
) -> list[Point]:
  """Encodes a model with each preset and loads it, and has the peers do the same."""
  encoded = work / 'encoded'
  points = []
  for preset in presets:
    encode = run_twice(ENCODE, str(checkpoint), str(encoded), preset)
    coded, load = encoded.stat().st_size, run_twice(LOAD, str(encoded))
    points.append(Point(preset, checkpoint.name, size, coded, encode, load))
  if peers_python is not None:
    plain = work / 'plain'
    rotbits_jax.decode_to_directory(encoded, plain, format='safetensors')
    (tensors,) = plain.glob('*.safetensors')
    for name in PEERS:
      base = [peers_python, str(ROOT / 'benchmarks' / 'peers.py'), name, 'time']
      encode = run([*base, 'compress', str(tensors), str(encoded)])
      coded, load = encoded.stat().st_size, run([*base, 'decode', str(encoded)])
      points.append(Point(name, checkpoint.name, size, coded, encode, load))
    shutil.rmtree(plain)
  return points


def table(points: Sequence[Point]) -> str:
  """Costs of each preset and peer, and their slopes."""
  names = [f'{what} {unit}' for what in ('encode', 'load') for unit in ('s', 'GB')]
  heads = ''.join(f'{x:>10}{"slope":>6}' for x in names)
  lines = [f'{"":7}{"size":>8}{"bytes":>14}{"share":>7}{heads}']
  before: dict[str, Point] = {}
  order = list(dict.fromkeys(point.name for point in points))
  for point in sorted(points, key=lambda x: (order.index(x.name), x.bytes)):
    last = before.get(point.name)
    cells = ''
    values = [*point.encode, *point.load]
    slopes = [''] * len(values)
    # Nearly equal sizes have no slope.
    if last is not None and point.bytes > 1.5 * last.bytes:
      decade = math.log(point.bytes / last.bytes)
      pairs = zip(values, [*last.encode, *last.load], strict=True)
      slopes = [f'{math.log(a / b) / decade:.2f}' for a, b in pairs]
    for value, slope, unit in zip(values, slopes, (1, 1e9, 1, 1e9), strict=True):
      cells += f'{value / unit:10.3f}{slope:>6}'
    share = point.coded / point.bytes
    lines.append(f'{point.name:7}{point.size:>8}{point.bytes:14,}{share:7.3f}{cells}')
    before[point.name] = point
  return '\n'.join(lines)


def by_processors(
  checkpoint: pathlib.Path, presets: Sequence[str], work: pathlib.Path
) -> str:
  """Formats the seconds for one model by the number of processors."""
  encoded = work / 'encoded'
  here = len(os.sched_getaffinity(0))
  rows: dict[str, dict[str, str]] = {
    '1 processor': {'cpu': '0'},
    f'{here} processors': {},
    f'{here}, NPROC=16': {'NPROC': '16'},
  }
  heads = [f'{what}, {preset}' for preset in presets for what in ('encode', 'load')]
  lines = [f'{"":16}' + ''.join(f'{x:>15}' for x in heads)]
  for name, given in rows.items():
    cells = ''
    for preset in presets:
      encode = run_twice(ENCODE, str(checkpoint), str(encoded), preset, **given)
      load = run_twice(LOAD, str(encoded), **given)
      cells += f'{encode.seconds:15.3f}{load.seconds:15.3f}'
    lines.append(f'{name:16}{cells}')
  return '\n'.join(lines)


def picture(points: Sequence[Point]) -> str:
  """Draws the speed of loading and that of encoding over the tensors' bytes."""
  drawn = []
  for what in ('encode', 'load'):
    series = []
    for k, name in enumerate(dict.fromkeys(point.name for point in points)):
      own = sorted((x for x in points if x.name == name), key=lambda x: x.bytes)
      speeds = [x.bytes / getattr(x, what).seconds / 1e6 for x in own]
      labels = [''] * len(own)
      labels[k % len(own)] = name  # not below each other
      series.append(charts.Series(name, [x.bytes for x in own], speeds, labels=labels))
    low, high = (f(x.bytes for x in points) for f in (min, max))
    drawn.append(
      charts.chart(
        series,
        charts.Axis('bytes of the tensors', low, high, log=True),
        charts.Axis(f'{what}, MB/s', 3, 3000, log=True),
        title=f'MB/s to {what} over the bytes of the tensors',
        legend=False,
      )
    )
  return charts.side_by_side(drawn, 'Speed over size') + '\n'


def main() -> None:
  presets, peers_python = _PRESETS.value, _PEERS_PYTHON.value
  points: list[Point] = []
  processors = ''
  with tempfile.TemporaryDirectory(dir=_WORK.value) as folder:
    work = pathlib.Path(folder)
    for given in _SIZES.value:
      hidden, layers = map(int, given.split('x'))
      checkpoint, size = make(hidden, layers, work)
      points += measure(checkpoint, size, presets, peers_python, work)
      print(table(points), flush=True)
      if given == BY_PROCESSORS:
        processors = by_processors(checkpoint, presets, work)
        print(processors, flush=True)
      shutil.rmtree(checkpoint)
  body = (
    f'Written by `python -m benchmarks.growth` on {sections.machine()}. Sliced Llamas\n'
    'with random weights, float16. Nothing is compiled in what is timed; a slope is\n'
    f'that from one size to the next.\n\n```\n{table(points)}\n```\n'
  )
  if processors:
    body += (
      f'\nSeconds for the size {BY_PROCESSORS}, by the processors:\n\n'
      f'```\n{processors}\n```\n'
    )
  if _PLOT.value is not None:
    pathlib.Path(_PLOT.value).write_text(picture(points))
    body += f'\n![Speed over size]({_PLOT.value})\n'
  if _RESULTS.value is not None:
    sections.write(_RESULTS.value, TITLE, body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
