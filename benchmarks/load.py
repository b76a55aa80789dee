"""Many readers at once, and many runs in one process: times and memory, in Markdown.

  python -m benchmarks.load --checkpoint=DIR [--rounds=1000] [--readers=16]

Each round encodes and decodes the checkpoint in memory with the preset `exact`. Memory
is what the process holds after a tenth of the rounds and after all of them, since the
first ones fill caches of compiled programs. Then readers, each a thread, decode one
file at the same time, and each must get the checkpoint's bits.
"""

from concurrent import futures
import gc
import pathlib
import sys
import tempfile
import time

from absl import flags

import rotbits_jax
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'A small checkpoint.', required=True, flag_values=FLAGS
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 1000, 'Times to encode and decode.', lower_bound=10, flag_values=FLAGS
)
_READERS = flags.DEFINE_integer(
  'readers', 16, 'Threads that read one file.', lower_bound=1, flag_values=FLAGS
)


def resident() -> int:
  """Returns the bytes of memory that this process holds, on Linux."""
  gc.collect()
  status = pathlib.Path('/proc/self/status').read_text()
  (line,) = (line for line in status.splitlines() if line.startswith('VmRSS:'))
  return 1024 * int(line.split()[1])


def growth(path: str, rounds: int) -> tuple[int, int, float]:
  """Encodes and decodes in turn.

  Args:
    path: of the checkpoint.
    rounds: how often.

  Returns:
    Bytes of memory after a tenth of the rounds and after all, and seconds a round.
  """
  source = rotbits_jax.open_checkpoint(path)
  early, start = 0, time.perf_counter()
  for i in range(rounds):
    rotbits_jax.decode(rotbits_jax.encode(source, preset='exact'))
    if i + 1 == rounds // 10:
      early = resident()
  return early, resident(), (time.perf_counter() - start) / rounds


def together(path: str, readers: int) -> tuple[float, float]:
  """Reads one file alone, and then by several threads at once.

  Args:
    path: of the checkpoint.
    readers: how many threads.

  Returns:
    Seconds of one reader alone, and of all together.

  Raises:
    ContainerError: if a reader does not get the checkpoint's bits.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'model.rotbits')
    rotbits_jax.encode_to_file(path, file, preset='exact')

    def read(_: int) -> None:
      rotbits_jax.verify(file, against=path)

    read(0)
    start = time.perf_counter()
    read(0)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    with futures.ThreadPoolExecutor(readers) as pool:
      list(pool.map(read, range(readers)))
    return alone, time.perf_counter() - start


def main() -> None:
  path, rounds, readers = _CHECKPOINT.value, _ROUNDS.value, _READERS.value
  early, late, seconds = growth(path, rounds)
  alone, all_of_them = together(path, readers)
  print(f'| {pathlib.Path(path).name} | |')
  print('|---|---|')
  print(f'| rounds of encoding and decoding | {rounds:,} |')
  print(f'| seconds a round | {seconds:.2f} |')
  print(f'| memory after {rounds // 10:,} rounds | {early / 1e6:,.1f} MB |')
  print(f'| memory after {rounds:,} rounds | {late / 1e6:,.1f} MB |')
  print(f'| seconds of one reader | {alone:.2f} |')
  print(f'| seconds of {readers} readers at once | {all_of_them:.2f} |')


def run() -> int:
  return program.run(main, FLAGS)


if __name__ == '__main__':
  sys.exit(run())
