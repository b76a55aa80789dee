"""Compares `rotbits estimate` with the files that `rotbits encode` writes.

  python -m benchmarks.estimate [--checkpoints=DIR,DIR] [--smollm2]
    [--results=RESULTS.md]

By default the checkpoints are those of tests/testdata. --smollm2 adds SmolLM2-135M in
bfloat16, see benchmarks/demo.py.
"""

from collections.abc import Iterable
import pathlib
import sys
import tempfile
import time

from absl import flags

from benchmarks import demo
from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax.cli import program
from rotbits_jax.file import estimation

FLAGS = flags.FlagValues()
_CHECKPOINTS = flags.DEFINE_list(
  'checkpoints', None, 'Directories of checkpoints.', flag_values=FLAGS
)
_SMOLLM2 = flags.DEFINE_bool('smollm2', False, 'Add SmolLM2-135M.', flag_values=FLAGS)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'Estimates beside the files'


def table(paths: Iterable[pathlib.Path]) -> str:
  """Estimates and encodes checkpoints, and returns a table in Markdown."""
  lines = [
    '| checkpoint | preset | estimate | file | | CPU seconds of all estimates |',
    '|---|---|---|---|---|---|',
  ]
  with tempfile.TemporaryDirectory() as name:
    file = pathlib.Path(name) / 'x.rotbits'
    for path in paths:
      start = time.process_time()
      found, _ = estimation.estimate(checkpoints.open_any(path))
      seconds = time.process_time() - start
      for own in found:
        rotbits_jax.encode_to_file(path, file, preset=presets.make(own.preset))
        size = file.stat().st_size
        lines.append(
          f'| {path.name} | `{own.preset}` | {own.nbytes:,} | {size:,} | '
          f'{own.nbytes / size - 1:+.2%} | {seconds:.1f} |'
        )
        print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


def main() -> None:
  shipped = sorted(x.parent for x in demo.ROOT.glob('tests/testdata/*/config.json'))
  given = shipped if _CHECKPOINTS.value is None else _CHECKPOINTS.value
  with tempfile.TemporaryDirectory() as name:
    paths = [pathlib.Path(x) for x in given]
    if _SMOLLM2.value:
      paths.append(pathlib.Path(name) / 'SmolLM2-135M-bfloat16')
      rotbits_jax.save_checkpoint(demo.dense_smollm2().checkpoint, paths[-1])
    found = table(paths)
  about = f'Written by `python -m benchmarks.estimate` on {sections.machine()}.'
  if _RESULTS.value is not None:
    sections.write(_RESULTS.value, TITLE, f'{about}\n\n{found}')
  print(found)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
