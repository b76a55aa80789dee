"""Measures decoders side by side, from a file to arrays.

  python -m benchmarks.decode --peers_python=PYTHON [--checkpoint=DIR] [--runs=5]
    [--presets=free,exact] [--pythons=PYTHON,...] [--work=DIR] [--results=RESULTS.md]
    [--plot=FILE.svg]

The program writes the tensors of a checkpoint to a safetensors file. By default the
checkpoint is SmolLM2-135M, sliced by 25% as in demo.sh. The peers compress that file:
the program `zstd`, its library, ZipNN and lmzip, each with its own package. Each preset
encodes the checkpoint to a file, too. Every decoder runs in a process that stays alive
(benchmarks/peers.py). The decoders take turns, so that the ratios hold even if other
processes use the machine. Times are medians; files are in the page cache, and programs
are compiled.

The second table has the limits: the parts of decoding that no program can avoid, each
measured alone; and the time from the start of a Python process to the arrays of a small
file. The third table has the time of one block, as XLA compiles its loop for 1, 2 and
16 processors (the variable NPROC). The fourth table has the time to weights, which is
the time to read the file over a link plus the time to decode it.

`--pythons` are further Pythons, with other versions of JAX. They decode the files of
the presets and the block, too.

PYTHON is a Python with the packages of the peers: `python -m venv DIR; DIR/bin/pip
install numpy zstandard zipnn lmzip`.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple, Self

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import charts
from benchmarks import demo
from benchmarks import sections
import rotbits_jax
from rotbits_jax import file
from rotbits_jax.cli import program
from rotbits_jax.coding import tables
from rotbits_jax.coding import weights
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import pool
from rotbits_jax.file import container
from rotbits_jax.system import native

FLAGS = flags.FlagValues()
_PEERS_PYTHON = flags.DEFINE_string(
  'peers_python',
  None,
  'A Python with the packages of the peers.',
  required=True,
  flag_values=FLAGS,
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'An existing sliced checkpoint.', flag_values=FLAGS
)
_PRESETS = flags.DEFINE_list(
  'presets', ['free', 'exact'], 'The presets to measure.', flag_values=FLAGS
)
_PYTHONS = flags.DEFINE_list(
  'pythons', [], 'Pythons with other versions of JAX.', flag_values=FLAGS
)
_RUNS = flags.DEFINE_integer(
  'runs', 5, 'Number of timed runs.', lower_bound=1, flag_values=FLAGS
)
_WORK = flags.DEFINE_string(
  'work', None, 'The directory for files; existing ones are reused.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'The file of results in which to write.', flag_values=FLAGS
)
_PLOT = flags.DEFINE_string(
  'plot', None, 'The file for a plot of the time to weights.', flag_values=FLAGS
)

ROOT = pathlib.Path(__file__).parents[1]
SPARSITY = 0.25
PEERS = ('zstd', 'zstandard', 'zipnn', 'lmzip')
RAW = 'safetensors'
LINKS = (10, 30, 100, 300, 1000, 3000)  # MB/s
PROCESSORS = (1, 2, 16)
MOST = 2.5  # the greatest relative time in the picture
TITLE = 'Decoding, from file to arrays'


class Row(NamedTuple):
  """A decoder with the bytes of its file and the median seconds to decode it."""

  name: str
  bytes: int
  seconds: float


class Decoder:
  """A context manager: a process that decodes one file each time it is told to."""

  def __init__(self, python: str, name: str, path: pathlib.Path):
    self._process = subprocess.Popen(
      [python, 'benchmarks/peers.py', name, 'serve', str(path)],
      cwd=ROOT,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._name = name
    self.seconds: list[float] = []

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *unused: object) -> None:
    assert self._process.stdin
    self._process.stdin.close()
    self._process.wait()

  def run(self) -> tuple[float, int]:
    """Decodes the file once; returns the seconds and the checksum of the arrays."""
    assert self._process.stdin
    assert self._process.stdout
    print('', file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise ValueError(f'{self._name} failed')
    seconds, checksum = json.loads(line)
    return seconds, checksum


def measure(
  tensors: pathlib.Path,
  files: dict[str, pathlib.Path],
  peers_python: str,
  pythons: dict[str, str],
  runs: int,
) -> list[Row]:
  """Measures all decoders, which take turns.

  Args:
    tensors: the safetensors file. The peers must return its tensors.
    files: the file of each peer and of each preset, by name.
    peers_python: the Python that runs the peers.
    pythons: further Pythons that decode the files of the presets, by their JAX.
    runs: number of timed runs.

  Returns:
    The measurements.

  Raises:
    ValueError: if a decoder fails, or if a peer returns other tensors.
  """
  chosen = {
    name: (peers_python, name, path)
    for name, path in ({RAW: tensors} | files).items()
    if name in (RAW, *PEERS)
  }
  for version, python in ({'': sys.executable} | pythons).items():
    for name, path in files.items():
      if name not in PEERS:
        chosen[f'{name} {version}'.strip()] = (python, 'rotbits', path)
  with contextlib.ExitStack() as stack:
    decoders = {
      name: stack.enter_context(Decoder(*own)) for name, own in chosen.items()
    }
    expected = None
    for name, decoder in decoders.items():
      _, checksum = decoder.run()
      expected = checksum if name == RAW else expected
      if name in PEERS and checksum != expected:
        raise ValueError(f'{name} returned other tensors')
      decoder.run()
    for _ in range(runs):
      for decoder in decoders.values():
        decoder.seconds.append(decoder.run()[0])
  return [
    Row(name, path.stat().st_size, statistics.median(decoders[name].seconds))
    for name, (*_, path) in chosen.items()
  ]


def zstd_seconds(rows: Sequence[Row]) -> float:
  """Returns the seconds of zstd's program or library, whichever is faster."""
  return min(row.seconds for row in rows if row.name in ('zstd', 'zstandard'))


def table(rows: Sequence[Row]) -> str:
  """Formats sizes, seconds, and their ratios to `zstd_seconds`."""
  raw = next(row.bytes for row in rows if row.name == RAW)
  base = zstd_seconds(rows)
  lines = [f'{"":18}{"bytes":>13}{"share":>8}{"seconds":>9}{"GB/s":>7}{"x zstd":>8}']
  for row in rows:
    lines.append(
      f'{row.name:18}{row.bytes:13,}{row.bytes / raw:8.4f}{row.seconds:9.3f}'
      f'{raw / row.seconds / 1e9:7.2f}{base / row.seconds:8.2f}'
    )
  return '\n'.join(lines)


def times_to_weights(rows: Sequence[Row]) -> str:
  """Formats the seconds to read and to decode, by the speed of the link.

  The least time for each speed is marked.
  """
  lines = ['MB/s'.rjust(6) + ''.join(f'{row.name:>14}' for row in rows)]
  for link in LINKS:
    seconds = [row.bytes / (1e6 * link) + row.seconds for row in rows]
    cells = [f'{x:.2f}{"*" if x == min(seconds) else " "}' for x in seconds]
    lines.append(f'{link:6}' + ''.join(f'{cell:>14}' for cell in cells))
  return '\n'.join(lines)


def picture(rows: Sequence[Row]) -> str:
  """Draws the time to weights, relative to that of the safetensors file."""
  speeds = np.geomspace(min(LINKS), max(LINKS), 100)
  time_of = lambda row: row.bytes / (1e6 * speeds) + row.seconds
  raw = next(time_of(row) for row in rows if row.name == RAW)
  shown = [row for row in rows if row.name not in (RAW, 'zstandard')]
  series = []
  for row in shown:
    relative = time_of(row) / raw
    count = int((relative <= MOST).sum())  # it grows with the speed
    x, y = speeds[:count].tolist(), relative[:count].tolist()
    labels = [*[''] * (count - 1), row.name]
    series.append(charts.Series(row.name, x, y, markers=False, labels=labels))
  drawn = charts.chart(
    series,
    charts.Axis('link, MB/s', min(LINKS), 3 * max(LINKS), log=True, ticks=LINKS),
    charts.Axis('time to weights, safetensors = 1', 0.5, MOST),
    title='The time to weights over the speed of a link',
    legend=False,
  )
  return charts.standalone(drawn) + '\n'


def limits(
  free: pathlib.Path, exact: pathlib.Path | None, runs: int, base: float
) -> str:
  """Measures parts of decoding alone; returns lines with seconds.

  Args:
    free: the file of the first preset.
    exact: that of `exact`, if it is another one.
    runs: number of timed runs.
    base: `zstd_seconds`.
  """
  lines = []
  for path in (free, *([exact] if exact else [])):
    decode, numbers = _blocks_alone(path)
    seconds = _median(decode, runs)
    lines.append(
      f'{"the blocks of " + path.stem:38}{seconds:7.3f}'
      f'{numbers / seconds / 1e6:9.0f} million numbers/s, {base / seconds:.2f}x zstd'
    )
  for threads in sorted({1, pool.threads()}):
    decode, numbers = _block_on_each(threads)
    seconds = _median(decode, runs)
    lines.append(
      f'{f"one block on each of {threads} threads":38}{seconds:7.3f}'
      f'{numbers / seconds / 1e6:9.0f} million numbers/s'
    )
  seconds = _median(_lookups_alone(), runs)
  rate = blocks.CAPACITY / seconds / 1e6
  lines.append(
    f'{"the lookups of one block":38}{seconds:7.3f}{rate:9.0f} million numbers/s'
  )
  if exact:
    with file.Reader(exact) as reader:
      config = reader.config
    assert config is not None
    sizes = config.segment_widths[-1], config.vocab_size, config.segment_widths[0]
    seconds = _median(_product_alone(*sizes), runs)
    flops = 2.0 * math.prod(sizes)
    lines.append(
      f'{"the product for the tied embedding":38}{seconds:7.3f}'
      f'{flops / seconds / 1e9:9.0f} GFLOP/s in float64'
    )
  size = 1 << 28
  seconds = _median(lambda: np.empty(size, np.uint8).fill(1), runs)
  lines.append(
    f'{"fresh memory, written once":38}{seconds:7.3f}'
    f'{size / seconds / 1e9:9.2f} GB/s, for {size:,} bytes'
  )
  with tempfile.TemporaryDirectory() as kept:
    # The first run of the second line compiles, and is not timed.
    for what, cache in (('compiling', None), ('compiled before', kept)):
      seconds = _median(functools.partial(_start, cache), runs)
      lines.append(f'{f"import to arrays, {what}":38}{seconds:7.3f}')
  return '\n'.join(lines)


def _blocks_alone(path: pathlib.Path) -> tuple[Callable[[], None], int]:
  """Prepares decoding all records into existing memory.

  Returns:
    A function that decodes them, and the number of their numbers.
  """
  with file.Reader(path) as reader:
    records = reader.records.values()
  streams = container.StreamReader(path)
  given = [
    (
      own.record_coder.decode,
      own.stream_spec,
      np.frombuffer(streams.read(own.name), np.uint8),
      [np.ones(x.shape, jnp.dtype(x.dtype)) for x in own.stream_spec.arrays],
    )
    for own in records
  ]

  def decode() -> None:
    with weights.record_jobs() as start:
      jobs = [functools.partial(decode, *own, out=out) for decode, *own, out in given]
      for future in [start(job) for job in jobs]:
        future.result()

  return decode, sum(array.size for *_, arrays in given for array in arrays)


def _block_on_each(threads: int) -> tuple[Callable[[], None], int]:
  """Prepares decoding a full block on each of some threads.

  Returns:
    A function that decodes them, and the number of their numbers.
  """
  # Numbers of one scale share a table, as most numbers of `free` do.
  array = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float16)
  encoded = weights.encode([array])
  job = functools.partial(weights.decode, encoded.spec, encoded.data)
  outs = [[np.ones_like(array)] for _ in range(threads)]

  def decode() -> None:
    with weights.record_jobs() as start:
      for future in [start(functools.partial(job, out=out)) for out in outs]:
        future.result()

  return decode, threads * array.size


def _lookups_alone() -> Callable[[], Any]:
  """Prepares the lookups of a block: a symbol, its interval, and the next word.

  As in the decoder, the interval depends on the symbol, and the next symbol on both
  the interval and the word.
  """
  lanes, steps = blocks.LANES, blocks.STEPS
  rng = np.random.default_rng(0)
  symbols = rng.integers(0, 256, tables.TOTAL, np.uint8)
  intervals = rng.integers(0, 1 << 32, 256, np.uint32)
  words = rng.integers(0, 1 << 16, lanes * (steps + 96), np.uint16)
  first = np.arange(lanes, dtype=np.uint32) * (steps + 96)

  def loop(
    state: jax.Array,
    place: jax.Array,
    symbols: jax.Array,
    intervals: jax.Array,
    words: jax.Array,
  ) -> jax.Array:
    found = lambda table, index: table.at[index].get(mode='promise_in_bounds')

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
      del i
      state, place = carry
      interval = found(intervals, found(symbols, state % tables.TOTAL))
      return interval ^ found(words, place).astype(jnp.uint32), place + 1

    return jax.lax.fori_loop(0, steps, step, (state, place))[0]

  made = jax.jit(native.loop(loop))
  operands = [jnp.asarray(x) for x in (first, first, symbols, intervals, words)]
  return lambda: jax.block_until_ready(made(*operands))


_START = """
import sys, rotbits_jax
rotbits_jax.load(sys.argv[1])
"""


def _start(cache: str | None) -> None:
  """Decodes a small file in a new process.

  Args:
    cache: the directory in which JAX keeps compiled programs; None for no such
      directory.
  """
  kept = {} if cache is None else {'JAX_COMPILATION_CACHE_DIR': cache}
  kept |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'PYTHONPATH': str(ROOT)}
  path = ROOT / 'tests' / 'testdata' / 'golden' / 'v1' / 'free.rotbits'
  given = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  command = [sys.executable, '-c', _START, str(path)]
  subprocess.run(command, env=given | kept, check=True)


_BLOCK = """
import json, sys
from benchmarks import decode
print(json.dumps(decode.block_seconds(int(sys.argv[1]))))
"""


def block_seconds(runs: int) -> float:
  """Returns the median seconds to decode one block on one thread."""
  return _median(_block_on_each(1)[0], runs)


def blocks_by_processors(pythons: dict[str, str], runs: int) -> str:
  """Formats the milliseconds of a block by version of JAX and number of processors."""
  heads = ''.join(f'{f"NPROC={count}":>10}' for count in PROCESSORS)
  lines = [f'{"":18}{heads}']
  for version, python in ({f'jax {jax.__version__}': sys.executable} | pythons).items():
    cells = ''
    for count in PROCESSORS:
      own = {'NPROC': str(count), 'PYTHONPATH': str(ROOT)}
      command = [python, '-c', _BLOCK, str(runs)]
      output = subprocess.check_output(command, env=os.environ | own, cwd=ROOT)
      cells += f'{1e3 * json.loads(output):10.2f}'
    lines.append(f'{version:18}{cells}')
  return '\n'.join(lines)


def _version(python: str) -> str:
  """Returns the version of JAX that a Python has."""
  code = 'import jax; print(f"jax {jax.__version__}")'
  return subprocess.check_output([python, '-c', code], text=True).strip()


def _product_alone(hidden: int, tokens: int, width: int) -> Callable[[], Any]:
  """Prepares the float64 product of `[tokens, hidden]` and `[hidden, width]`."""
  with jax.enable_x64(True):
    head, map = jnp.ones((tokens, hidden)), jnp.ones((hidden, width))
    product = jax.jit(jnp.matmul)
    product(head, map).block_until_ready()

  def run() -> None:
    with jax.enable_x64(True):
      product(head, map).block_until_ready()

  return run


def _median(run: Callable[[], Any], runs: int) -> float:
  run()
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def prepare(
  checkpoint: rotbits_jax.Checkpoint,
  work: pathlib.Path,
  presets: Sequence[str],
  peers_python: str,
) -> tuple[pathlib.Path, dict[str, pathlib.Path]]:
  """Writes the safetensors file and the file of each peer and of each preset."""
  tensors = work / 'tensors' / 'model.safetensors'
  files = {name: work / name for name in PEERS}
  files |= {name: work / f'{name}.rotbits' for name in presets}
  if not tensors.exists():
    rotbits_jax.save_checkpoint(checkpoint, tensors.parent, format='safetensors')
  for name, path in files.items():
    if path.exists():
      continue
    if name in PEERS:
      args = ['benchmarks/peers.py', name, 'compress', str(tensors), str(path)]
      subprocess.run([peers_python, *args], cwd=ROOT, check=True)
    else:
      preset = rotbits_jax.presets.make(name)
      data = rotbits_jax.encode(checkpoint.model, preset=preset, progress=True)
      path.write_bytes(data)
  return tensors, files


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(_WORK.value or folder).absolute()
    work.mkdir(exist_ok=True)
    if _CHECKPOINT.value is None:
      checkpoint = demo.slice_smollm2(SPARSITY, work)[0].checkpoint
    else:
      checkpoint = rotbits_jax.load_checkpoint(_CHECKPOINT.value)
    presets, runs = _PRESETS.value, _RUNS.value
    tensors, files = prepare(checkpoint, work, presets, _PEERS_PYTHON.value)
    stem = checkpoint.stem
    del checkpoint
    pythons = {_version(python): python for python in _PYTHONS.value}
    rows = measure(tensors, files, _PEERS_PYTHON.value, pythons, runs)
    own = [files[name] for name in presets]
    exact = files.get('exact')
    other = exact if exact != own[0] else None
    found = limits(own[0], other, runs, zstd_seconds(rows))
    processors = blocks_by_processors(pythons, runs)
  links = [row for row in rows if row.name in (RAW, *files)]
  body = (
    f'Written by `python -m benchmarks.decode`: {stem} on {sections.machine()}.\n'
    f'Medians of {runs} runs, in which all took turns. Files are in the page cache.\n\n'
    f'```\n{table(rows)}\n```\n\n'
    f'Parts of decoding alone, in seconds:\n\n```\n{found}\n```\n\n'
    'A block of 2^20 elements on one thread, in milliseconds, by the number of\n'
    f'processors for which XLA compiles:\n\n```\n{processors}\n```\n\n'
    'Time to weights, in seconds: reading over a link and decoding. * is the least.\n\n'
    f'```\n{times_to_weights(links)}\n```\n'
  )
  if _PLOT.value is not None:
    pathlib.Path(_PLOT.value).write_text(picture(links))
    body += f'\n![Time to weights]({_PLOT.value})\n'
  print(body)
  if _RESULTS.value is not None:
    sections.write(_RESULTS.value, TITLE, body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
