"""Damages files in every way, and fuzzes the readers.

A small file of each preset is damaged: each byte flipped, each truncation, streams
swapped or taken from another model, and each field of the manifest edited with the
checksums made right (`fuzz.sweep`). Without `--quick` atheris then makes inputs for
each reader (`fuzz.run`).
"""

from collections.abc import Iterator
import subprocess
import sys
import warnings

from benchmarks import common
from fuzz import seeds
from fuzz import sweep

DAMAGES = {
  'flip': 'flips',
  'truncation': 'truncations',
  'exchange': 'exchanges',
  'field': 'fields',
}
ENDS = {'refused': 'refused', 'same': 'the same numbers', 'failed': 'failures'}
QUICK_STRIDE = 8  # takes one of so many cases
SECONDS = 120  # of each target of the fuzzer


def swept(stride: int) -> str:
  """Returns the table of damaged files."""
  warnings.simplefilter('ignore')
  rows = []
  for name in (*seeds.presets_of_sweep(), seeds.PLAIN):
    data, other = (seeds.container(name, seed) for seed in (0, 1))
    counts = sweep.sweep(data, other, stride=stride)
    damages = (sum(n for x, n in counts.items() if x[0] == y) for y in DAMAGES)
    ends = (sum(n for x, n in counts.items() if x[1] == y) for y in ENDS)
    rows.append((name, *(f'{n:,}' for n in (*damages, *ends))))
  return common.table(('file', *DAMAGES.values(), *ENDS.values()), rows)


def fuzzed() -> str:
  """Returns what became of each target of the fuzzer."""
  command = [sys.executable, '-m', 'fuzz.run', f'--seconds={SECONDS}']
  done = subprocess.run(
    command, stdout=subprocess.PIPE, text=True, check=True, cwd=common.ROOT
  )
  rows = [line.split(': ') for line in done.stdout.splitlines()]
  return common.table(('reader', 'end'), rows, texts=2)


def run(settings: common.Settings) -> Iterator[common.Section]:
  stride = QUICK_STRIDE if settings.quick else 1
  about = (
    'A small file of each preset, damaged in every way. Reading must end in a '
    '`ContainerError` that names the stream; a field that does not bear on the numbers '
    'may leave them the same.'
  )
  if settings.quick:
    about += f' One of {stride} cases is taken.'
  yield common.Section('Damaged files', f'{about}\n\n{swept(stride)}')
  if not settings.quick:
    about = (
      f'Inputs that atheris makes for {SECONDS} s, guided by coverage, with checksums '
      'made right. A reader fails by any error that it does not promise, or if an '
      'input takes more than 30 s or 6 GB.'
    )
    yield common.Section('Fuzzed readers', f'{about}\n\n{fuzzed()}')
