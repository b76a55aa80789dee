"""Measures time and memory for checkpoints of published sizes.

  python -m benchmarks.large --model=llama-2-7b --slicing=0.25 --layers=4,8,16
    [--presets=free,exact] [--checkpoint=DIR] [--work=DIR]

For each depth the program writes a synthetic checkpoint (see benchmarks/synthetic.py).
The commands `rotbits encode`, `inspect` and `decode` process it, and `rotbits_jax.load`
loads it; each runs in a process of its own. The table has bytes, seconds and the peak
resident size of each process. Seconds include imports and compilation. The resident
size includes the pages of mapped files. The last lines are the seconds per layer,
computed from the least and the greatest depth. `--checkpoint` measures an existing
checkpoint instead.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import flags

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


def run(*args: str) -> Run:
  """Runs Python with these arguments, and waits until it ends."""
  start = time.perf_counter()
  process = subprocess.Popen([sys.executable, *args], stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.perf_counter() - start
  if os.waitstatus_to_exitcode(status):
    raise ValueError(f'{" ".join(args)} failed')
  return Run(seconds, usage.ru_maxrss * _UNIT / 1e9)


_UNIT = 1 if sys.platform == 'darwin' else 1024  # bytes per unit of ru_maxrss


def measure(checkpoint: pathlib.Path, preset: str, work: pathlib.Path) -> list[Run]:
  """Encodes, inspects, decodes and loads a checkpoint, and prints a line."""
  source = rotbits_jax.open_checkpoint(checkpoint)
  output, decoded = work / f'{preset}.rotbits', work / 'decoded'
  runs = [
    run(
      '-m',
      'rotbits_jax.cli.encode',
      f'--checkpoint={checkpoint}',
      f'--output={output}',
      f'--preset={preset}',
    ),
    run('-m', 'rotbits_jax.cli.inspect', f'--input={output}'),
    run('-m', 'rotbits_jax.cli.decode', f'--input={output}', f'--output={decoded}'),
  ]
  shutil.rmtree(decoded)
  runs.append(run('-c', LOAD, str(output)))
  size = output.stat().st_size
  cells = ''.join(f'{x.seconds:10.1f}{x.peak:8.2f}' for x in runs)
  layers = source.config.num_layers
  line = f'{preset:8}{layers:7}{source.nbytes:16,}{size:16,}'
  print(f'{line}{size / source.nbytes:8.4f}{cells}', flush=True)
  output.unlink()
  return runs


def main() -> None:
  print(
    f'{"preset":8}{"layers":>7}{"tensor bytes":>16}{"file":>16}{"ratio":>8}'
    f'{"encode s":>10}{"GB":>8}{"inspect s":>10}{"GB":>8}{"decode s":>10}{"GB":>8}'
    f'{"load s":>10}{"GB":>8}'
  )
  with tempfile.TemporaryDirectory(dir=_WORK.value) as folder:
    work = pathlib.Path(folder)
    if _CHECKPOINT.value is not None:
      for preset in _PRESETS.value:
        measure(pathlib.Path(_CHECKPOINT.value), preset, work)
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
        found[preset, depth] = measure(checkpoint, preset, work)
      shutil.rmtree(checkpoint)
  first, last = depths[0], depths[-1]
  for preset in _PRESETS.value if last > first else []:
    pairs = zip(found[preset, first], found[preset, last], strict=True)
    encode, _, decode, load = (
      (b.seconds - a.seconds) / (last - first) for a, b in pairs
    )
    print(
      f'{preset}: {encode:.1f} s per layer to encode, {decode:.2f} s to decode, '
      f'{load:.2f} s to load'
    )


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
