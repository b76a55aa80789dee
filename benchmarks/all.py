"""Makes RESULTS.md anew, on one machine and in one go.

  python -m benchmarks.all --peers_python=PYTHON [--pythons=PYTHON,PYTHON]
    [--results=RESULTS.md] [--only=NAMES] [--list]

Runs the benchmarks that write sections, one after the other, each in a process of its
own; so nothing else should run meanwhile. It takes some hours on two cores. `--only`
takes some of the names in `BENCHMARKS`, separated by commas. `--list` prints the
commands and runs nothing. A benchmark that fails is named at the end, and its sections
remain as they were.

`--peers_python` and `--pythons` are those of benchmarks/decode.py; SmolLM2 is installed
by demo.sh.
"""

from collections.abc import Mapping
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
_PYTHONS = flags.DEFINE_string(
  'pythons', None, 'Pythons with other versions of JAX.', flag_values=FLAGS
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
    arguments: its flags.
    shared: the flags that it shares with this program.
    results: its flag for the results; None if others read what it makes.
  """

  module: str
  arguments: tuple[str, ...] = ()
  shared: tuple[str, ...] = ()
  results: str | None = 'results'

  def command(self, results: str, shared: Mapping[str, str | None]) -> list[str]:
    """Returns the arguments after `python -m`."""
    own = [f'--{x}={shared[x]}' for x in self.shared if shared[x] is not None]
    written = [] if self.results is None else [f'--{self.results}={results}']
    return [self.module, *self.arguments, *own, *written]


_OPT = 'tests/testdata/opt-small-sliced-0.2'
_DENSE = f'demo_output/{demo.STEM}'
_SMOLLM2 = f'{_DENSE}_0.25'
_PICTURES = 'docs/pictures'
_PEERS = ('peers_python',)
_FEW_STEPS = '--steps=-5,-4,-3,-2,-1'


def _near(name: str, checkpoint: str, picture: str, *arguments: str) -> Benchmark:
  paths = f'--checkpoint={checkpoint}', f'--picture={_PICTURES}/{picture}'
  return Benchmark('benchmarks.near', (f'--name={name}', *paths, *arguments))


def _large(model: str, slicing: float, *arguments: str) -> Benchmark:
  return Benchmark(
    'benchmarks.large', (f'--model={model}', f'--slicing={slicing}', *arguments)
  )


BENCHMARKS: dict[str, Benchmark] = {
  'demo': Benchmark('benchmarks.demo', results=None),
  'results': Benchmark('benchmarks.results', results='output'),
  'dense': Benchmark('benchmarks.dense', shared=_PEERS),
  'kinds': Benchmark('benchmarks.kinds'),
  'base': Benchmark('benchmarks.base', (f'--picture={_PICTURES}/base.svg',)),
  'quantised': Benchmark('benchmarks.quantised'),
  'low_rank': Benchmark('benchmarks.low_rank'),
  'canonicalize': Benchmark('benchmarks.canonicalize'),
  'rounding': Benchmark(
    'benchmarks.rounding',
    (f'--checkpoint={_OPT}', '--text=rotbits_jax/data/evaluation.txt'),
  ),
  'gauges': Benchmark('benchmarks.gauges'),
  'estimate': Benchmark('benchmarks.estimate', ('--smollm2',)),
  'near': _near('opt-small-sliced-0.2', _OPT, 'near-opt-small.svg'),
  'decode': Benchmark(
    'benchmarks.decode',
    (f'--checkpoint={_SMOLLM2}', f'--plot={_PICTURES}/time-to-weights.svg'),
    shared=(*_PEERS, 'pythons'),
  ),
  'growth': Benchmark(
    'benchmarks.growth', (f'--plot={_PICTURES}/growth.svg',), shared=_PEERS
  ),
  'coder': Benchmark('benchmarks.coder'),
  'large_llama': _large('llama-2-7b', 0.25, '--layers=4,32'),
  'large_opt': _large('opt-6.7b', 0.2, '--layers=4'),
  'large_paper': _large('opt-1.3b', 0.2, '--layers=24', '--presets=paper'),
  'near_sliced': _near(
    'SmolLM2-135M, sliced by 25%', _SMOLLM2, 'near-smollm2.svg', _FEW_STEPS
  ),
  'near_dense': _near(
    'SmolLM2-135M, dense', _DENSE, 'near-smollm2-dense.svg', _FEW_STEPS
  ),
  'sweep': Benchmark('fuzz.sweep'),
  'faults': Benchmark('fuzz.faults'),
  'classes': Benchmark('fuzz.classes'),
  'fuzz': Benchmark('fuzz.run'),
}


def main() -> None:
  chosen = list(BENCHMARKS) if _ONLY.value is None else _ONLY.value
  if unknown := set(chosen) - set(BENCHMARKS):
    raise ValueError(f'{sorted(unknown)} are none of {list(BENCHMARKS)}')
  shared = {'peers_python': _PEERS_PYTHON.value, 'pythons': _PYTHONS.value}
  has_peers = any(BENCHMARKS[name].shared for name in chosen)
  if has_peers and _PEERS_PYTHON.value is None and not _LIST.value:
    raise ValueError('--peers_python is needed')
  results = str(pathlib.Path(_RESULTS.value).absolute())
  failed = []
  for name in chosen:
    arguments = BENCHMARKS[name].command(results, shared)
    print(f'python -m {shlex.join(arguments)}', flush=True)
    if _LIST.value:
      continue
    start = time.perf_counter()
    command = [sys.executable, '-m', *arguments]
    if subprocess.run(command, cwd=demo.ROOT, check=False).returncode:
      failed.append(name)
    print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)
  if failed:
    raise ValueError(f'these benchmarks failed: {", ".join(failed)}')


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
