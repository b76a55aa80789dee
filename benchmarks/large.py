"""Measures time and memory for checkpoints of published sizes.

  python -m benchmarks.large --model=llama-2-7b --slicing=0.25 --layers=4,8,16
    [--presets=free,exact] [--checkpoint=DIR] [--work=DIR] [--results=RESULTS.md]

For each depth the program writes a synthetic checkpoint (see benchmarks/synthetic.py).
The commands `rotbits encode`, `inspect` and `decode` process it, and `rotbits_jax.load`
loads it; each runs in a process of its own. The table has bytes, seconds and the peak
resident size of each process. Seconds include imports and compilation. The resident
size includes the pages of mapped files. `fill` is a process that only writes as many
bytes of fresh memory as the tensors have, which no decoder can avoid. It runs before
`load`, because the host of a virtual machine takes memory back that is not in use, and
then the first process to write it waits for the host. The last lines are the seconds
per layer, computed from the least and the greatest depth. `--checkpoint` measures an
existing checkpoint instead.
"""

from collections.abc import Iterator
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

from benchmarks import sections
import rotbits_jax
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
  'model', 'llama-2-7b', 'The model whose sizes to take.', flag_values=FLAGS
)
_SLICING = flags.DEFINE_float(
  'slicing', 0.25, 'The part of the hidden size to remove.', flag_values=FLAGS
)
_LAYERS = flags.DEFINE_list(
  'layers', ['4', '8'], 'Numbers of layers to measure.', flag_values=FLAGS
)
_PRESETS = flags.DEFINE_list(
  'presets', ['free', 'exact'], 'The presets to measure.', flag_values=FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'An existing checkpoint to measure.', flag_values=FLAGS
)
_WORK = flags.DEFINE_string(
  'work', None, 'The directory for temporary files.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A file of results to write the section to.', flag_values=FLAGS
)

HEADER = (
  f'{"preset":8}{"layers":>7}{"tensor bytes":>16}{"file":>16}{"ratio":>8}'
  f'{"encode s":>10}{"GB":>8}{"inspect s":>10}{"GB":>8}{"decode s":>10}{"GB":>8}'
  f'{"fill s":>10}{"GB":>8}{"load s":>10}{"GB":>8}'
)


class Run(NamedTuple):
  """Time and memory of one process."""

  seconds: float
  peak: float  # peak resident size in GB


LOAD = """
import sys
import jax
import rotbits_jax
jax.block_until_ready(jax.tree.leaves(rotbits_jax.load(sys.argv[1]).params))
"""

FILL = """
from concurrent import futures
import os
import sys
import numpy as np
parts = np.array_split(np.empty(int(sys.argv[1]), np.uint8), os.cpu_count())
with futures.ThreadPoolExecutor(len(parts)) as pool:
  list(pool.map(lambda part: part.fill(1), parts))
"""


# The peak of a process counts from before it ran its program, when it was a copy of its
# parent. So a small process starts it.
_START = """
import os
import subprocess
import sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def run(*args: str) -> Run:
  """Runs Python with these arguments, and waits until it ends."""
  start = time.perf_counter()
  command = [sys.executable, '-S', '-c', _START, sys.executable, *args]
  found = subprocess.run(command, stdout=subprocess.PIPE, check=False)
  seconds = time.perf_counter() - start
  if found.returncode:
    raise ValueError(f'{" ".join(args)} failed')
  return Run(seconds, int(found.stdout) * RSS_UNIT / 1e9)


RSS_UNIT = 1 if sys.platform == 'darwin' else 1024  # bytes per unit of ru_maxrss


def measure(
  checkpoint: pathlib.Path, preset: str, work: pathlib.Path
) -> tuple[str, list[Run]]:
  """Encodes, inspects, decodes and loads a checkpoint.

  Returns:
    A line of the table, and what each process took.
  """
  source = rotbits_jax.open_checkpoint(checkpoint)
  output, decoded = work / f'{preset}.rotbits', work / 'decoded'
  runs = [
    run(
      '-m',
      'rotbits_jax',
      'encode',
      f'--checkpoint={checkpoint}',
      f'--output={output}',
      f'--preset={preset}',
    ),
    run('-m', 'rotbits_jax', 'inspect', f'--input={output}'),
    run('-m', 'rotbits_jax', 'decode', f'--input={output}', f'--output={decoded}'),
  ]
  shutil.rmtree(decoded)
  runs.append(run('-c', FILL, str(source.nbytes)))
  runs.append(run('-c', LOAD, str(output)))
  size = output.stat().st_size
  cells = ''.join(f'{x.seconds:10.1f}{x.peak:8.2f}' for x in runs)
  layers = source.config.num_layers
  line = f'{preset:8}{layers:7}{source.nbytes:16,}{size:16,}'
  output.unlink()
  return f'{line}{size / source.nbytes:8.4f}{cells}', runs


def table(work: pathlib.Path) -> Iterator[str]:
  """Yields the lines of the table, each as soon as it is measured."""
  yield HEADER
  if _CHECKPOINT.value is not None:
    for preset in _PRESETS.value:
      yield measure(pathlib.Path(_CHECKPOINT.value), preset, work)[0]
    return
  depths = sorted(map(int, _LAYERS.value))
  found: dict[tuple[str, int], list[Run]] = {}
  for depth in depths:
    checkpoint = work / 'checkpoint'
    run(
      '-m',
      'benchmarks.synthetic',
      f'--model={_MODEL.value}',
      f'--slicing={_SLICING.value}',
      f'--layers={depth}',
      f'--output={checkpoint}',
    )
    for preset in _PRESETS.value:
      line, found[preset, depth] = measure(checkpoint, preset, work)
      yield line
    shutil.rmtree(checkpoint)
  first, last = depths[0], depths[-1]
  for preset in _PRESETS.value if last > first else []:
    pairs = zip(found[preset, first], found[preset, last], strict=True)
    encode, _, decode, _, load = (
      (b.seconds - a.seconds) / (last - first) for a, b in pairs
    )
    yield (
      f'{preset}: {encode:.1f} s per layer to encode, {decode:.2f} s to decode, '
      f'{load:.2f} s to load'
    )


def title() -> str:
  """Returns the title of the section: the checkpoint, or model and slicing."""
  if _CHECKPOINT.value is not None:
    return f'How large may a model be? {pathlib.Path(_CHECKPOINT.value).name}'
  sliced = f'How large may a model be? {_MODEL.value} sliced by {_SLICING.value}'
  return sliced if _LAYERS.value[1:] else f'{sliced}, {_LAYERS.value[0]} layers'


def main() -> None:
  lines = []
  with tempfile.TemporaryDirectory(dir=_WORK.value) as folder:
    for line in table(pathlib.Path(folder)):
      print(line, flush=True)
      lines.append(line)
  if _RESULTS.value is not None:
    text = '\n'.join(lines)
    about = (
      f'Written by `python -m benchmarks.large` on {sections.machine()}.\n'
      'Orthogonal shortcuts and Gaussian weights, float16, so that the ratio is\n'
      'that of the gauge and the coder alone. Each command is a process of its own,\n'
      'and GB are its peak resident size, with the pages of mapped files.'
    )
    sections.write(_RESULTS.value, title(), sections.with_table(about, text))


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
