"""Makes RESULTS.md anew, on one machine and in one go.

  python -m benchmarks.all --peers_python=PYTHON [--results=RESULTS.md]
    [--only=NAMES] [--list]

Runs the benchmarks that write sections, one after the other, each in a process of its
own; so nothing else should run meanwhile. It takes some hours on two cores. `--only`
takes the names of benchmarks, separated by commas. `--list` prints the commands and
runs nothing. A benchmark that fails is named at the end, and its sections remain as
they were.

PYTHON is that of benchmarks/decode.py; SmolLM2 is installed by demo.sh.
"""

import pathlib
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

from absl import flags

from benchmarks import demo
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_PEERS_PYTHON = flags.DEFINE_string(
  'peers_python', None, 'A Python with the packages of the peers.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', 'RESULTS.md', 'The file whose sections are replaced.', flag_values=FLAGS
)
_ONLY = flags.DEFINE_list(
  'only', None, 'Runs only these benchmarks.', flag_values=FLAGS
)
_LIST = flags.DEFINE_bool(
  'list', False, 'Prints the commands and runs nothing.', flag_values=FLAGS
)


class Benchmark(NamedTuple):
  """A command that writes sections.

  Attributes:
    module: the module.
    arguments: its flags, besides those of the results and of the peers.
    peers: whether it needs the packages of the peers.
    results: its flag for the results; None if others read what it makes.
  """

  module: str
  arguments: tuple[str, ...] = ()
  peers: bool = False
  results: str | None = 'results'

  def command(self, results: str, peers_python: str | None) -> list[str]:
    """Returns the arguments after `python -m`."""
    peers = [f'--peers_python={peers_python}'] if self.peers else []
    written = [] if self.results is None else [f'--{self.results}={results}']
    return [self.module, *self.arguments, *peers, *written]


_OPT = 'tests/testdata/opt-small-sliced-0.2'
_DENSE = f'demo_output/{demo.STEM}'
_SMOLLM2 = f'{_DENSE}_0.25'
_PICTURES = 'docs/pictures'

BENCHMARKS: tuple[Benchmark, ...] = (
  Benchmark('benchmarks.demo', results=None),
  Benchmark('benchmarks.results', results='output'),
  Benchmark('benchmarks.dense', peers=True),
  Benchmark('benchmarks.kinds'),
  Benchmark('benchmarks.base', (f'--picture={_PICTURES}/base.svg',)),
  Benchmark('benchmarks.quantised'),
  Benchmark('benchmarks.low_rank'),
  Benchmark('benchmarks.canonicalise'),
  Benchmark(
    'benchmarks.rounding',
    (f'--checkpoint={_OPT}', '--text=rotbits_jax/data/evaluation.txt'),
  ),
  Benchmark('benchmarks.gauges'),
  Benchmark(
    'benchmarks.near',
    (
      '--name=opt-small-sliced-0.2',
      f'--checkpoint={_OPT}',
      f'--picture={_PICTURES}/near-opt-small.svg',
    ),
  ),
  Benchmark(
    'benchmarks.near',
    (
      '--name=SmolLM2-135M, sliced by 25%',
      f'--checkpoint={_SMOLLM2}',
      f'--picture={_PICTURES}/near-smollm2.svg',
      '--steps=-5,-4,-3,-2,-1',
    ),
  ),
  Benchmark(
    'benchmarks.near',
    (
      '--name=SmolLM2-135M, dense',
      f'--checkpoint={_DENSE}',
      f'--picture={_PICTURES}/near-smollm2-dense.svg',
      '--steps=-5,-4,-3,-2,-1',
    ),
  ),
  Benchmark(
    'benchmarks.decode',
    (f'--checkpoint={_SMOLLM2}', f'--plot={_PICTURES}/time-to-weights.svg'),
    peers=True,
  ),
  Benchmark('benchmarks.growth', (f'--plot={_PICTURES}/growth.svg',), peers=True),
  Benchmark('benchmarks.coder'),
  Benchmark('benchmarks.large', ('--model=llama-2-7b', '--slicing=0.25')),
  Benchmark('fuzz.sweep'),
  Benchmark('fuzz.run'),
  Benchmark('fuzz.faults'),
  Benchmark('fuzz.classes'),
)


def main() -> None:
  chosen = BENCHMARKS
  if _ONLY.value is not None:
    known = {x.module.rpartition('.')[2] for x in BENCHMARKS}
    if unknown := set(_ONLY.value) - known:
      raise ValueError(f'{sorted(unknown)} are none of {sorted(known)}')
    chosen = tuple(x for x in BENCHMARKS if x.module.rpartition('.')[2] in _ONLY.value)
  if any(x.peers for x in chosen) and _PEERS_PYTHON.value is None and not _LIST.value:
    raise ValueError('--peers_python is needed')
  results = str(pathlib.Path(_RESULTS.value).absolute())
  failed = []
  for own in chosen:
    arguments = own.command(results, _PEERS_PYTHON.value)
    print(f'python -m {shlex.join(arguments)}', flush=True)
    if _LIST.value:
      continue
    start = time.perf_counter()
    command = [sys.executable, '-m', *arguments]
    if subprocess.run(command, cwd=demo.ROOT, check=False).returncode:
      failed.append(own.module)
    print(f'{own.module}: {time.perf_counter() - start:.0f} s', flush=True)
  if failed:
    raise ValueError(f'these benchmarks failed: {", ".join(failed)}')


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
