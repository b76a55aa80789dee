"""Measures time and memory for a checkpoint of the shape of Llama-2-7B, sliced by 25%.

`rotbits encode`, `decode` and `rotbits_jax.load` each run in a new process, and
seconds include imports and compilation. The resident size includes the pages of mapped
files. Weights are random, so the ratio is that of the gauge and the coder alone.
"""

from collections.abc import Iterator
import pathlib
import shutil
import sys
import tempfile

from benchmarks import common
from benchmarks import synthetic
from configs import published
import rotbits_jax

TITLE = 'A model of the shape of Llama-2-7B'
LAYERS = 4
LOAD = """
import sys, jax, rotbits_jax
jax.block_until_ready(jax.tree.leaves(rotbits_jax.load(sys.argv[1]).params))
"""


def measure(checkpoint: pathlib.Path, preset: str, work: pathlib.Path) -> tuple:
  """Encodes, decodes and loads a checkpoint; returns a row."""
  source = rotbits_jax.open_checkpoint(checkpoint)
  file, decoded = work / f'{preset}.rotbits', work / 'decoded'
  rotbits, choice = ('-m', 'rotbits_jax'), f'--preset={preset}'
  costs = [common.run(*rotbits, 'encode', checkpoint, file, choice)]
  costs.append(common.run(*rotbits, 'decode', file, decoded))
  shutil.rmtree(decoded)
  costs.append(common.run('-c', LOAD, file))
  warm, *_ = common.run_peer(sys.executable, preset, 'decode', file)
  size = file.stat().st_size
  file.unlink()
  cells = [*map(common.megabytes, (source.nbytes, size)), f'{size / source.nbytes:.4f}']
  for cost in costs:
    cells += [f'{cost.seconds:.1f}', f'{cost.peak:.2f}']
  return (source.config.num_layers, f'`{preset}`', *cells, f'{warm:.2f}')


def run(settings: common.Settings) -> Iterator[common.Section]:
  with tempfile.TemporaryDirectory(dir=settings.output.parent) as folder:
    work = pathlib.Path(folder)
    shape = published.MODELS['llama-2-7b'] | {'num_hidden_layers': LAYERS}
    synthetic.write(work / 'llama', shape)
    rows = [measure(work / 'llama', preset, work) for preset in ('exact', 'free')]
  header = ['layers', 'preset', 'MB', 'file MB', 'share']
  header += ['encode s', 'GB', 'decode s', 'GB', 'load s', 'GB', 'warm load s']
  about = (
    'Fewer layers, sliced by 25%, with random weights in float16. Each command is a '
    'new process: times include compilation, and GB are its peak resident memory. A '
    'warm load is a later one of a process, with memory that it had before.'
  )
  yield common.Section(TITLE, f'{about}\n\n{common.table(header, rows, texts=2)}')
