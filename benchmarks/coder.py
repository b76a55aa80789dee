"""Measures the speed and the overhead of the rANS coder and of whole units.

    python -m benchmarks.coder --count=10000000 --tables=32 [--results=RESULTS.md]

The first table compares our rANS coder with that of constriction. Both code the same
symbols in the same run: the exponents and top mantissa bits of Gaussian float16
numbers. Compare the ratios, because machines differ in speed. With `--tables=K`, rows
of numbers have K scales, an eighth of an octave apart, and our coder has a frequency
table for each scale. Constriction has one table for all numbers, and its overhead is
relative to the entropy with that table. It codes on one thread, with 32-bit words and
its default precision, and uses a categorical model made from the same counts.

The second table measures `coding.weights`, the coder of files, on a unit: an array of
as many numbers, whose rows and columns differ in scale. The unit is encoded to a stream
of bytes and decoded into the same memory, on all CPUs. The overhead of its lanes is the
bytes that hold their last states and their lengths, in percent of the stream.

Times are medians of several runs. Compilation is not timed.
"""

from collections.abc import Callable, Iterable
import os
import statistics
import time
from typing import Any

from absl import app
from absl import flags
import constriction
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import sections
import rotbits_jax
from rotbits_jax.coding import categorical
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding import weights
from rotbits_jax.coding.weights import floats

_COUNT = flags.DEFINE_integer('count', 10_000_000, 'Number of symbols.', lower_bound=1)
_TABLES = flags.DEFINE_integer('tables', 1, 'Number of frequency tables.', 1, 255)
_RUNS = flags.DEFINE_integer('runs', 5, 'Number of timed runs.', lower_bound=1)
_LANES = flags.DEFINE_list(
  'lanes',
  ['256', '512', '1024', '2048', '4096', '8192', '16384'],
  'Numbers of lanes to measure.',
)
_FILE = flags.DEFINE_string('file', None, 'A file whose lanes to count.')
_RESULTS = flags.DEFINE_string('results', None, 'A file to write the section to.')

_ROW = 432


def _symbols(count: int, num_tables: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws symbols; returns them and the index of each symbol's table."""
  rng = np.random.default_rng(0)
  contexts = np.repeat(rng.integers(0, num_tables, -(-count // _ROW)), _ROW)[:count]
  scales = np.exp2(-4 - contexts / 8).astype(np.float32)
  values = rng.standard_normal(count, np.float32) * scales
  symbols = np.asarray(floats.split(jnp.asarray(values, jnp.float16))[0])
  return symbols, contexts


def _counts(symbols: np.ndarray, contexts: np.ndarray, num_tables: int) -> np.ndarray:
  counts = np.bincount(contexts * 256 + symbols, minlength=256 * num_tables)
  return counts.reshape(num_tables, 256)


def _median_seconds(run: Callable[[], Any], runs: int) -> float:
  jax.block_until_ready(run())  # compiles and fills caches
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def rotbits(
  symbols: np.ndarray, contexts: np.ndarray, num_tables: int, lanes: int, runs: int
) -> tuple[float, float, float]:
  """Measures our coder: seconds to encode, seconds to decode, coded bits."""
  counts = _counts(symbols, contexts, num_tables)
  table = tables.quantize(counts)
  intervals = jnp.asarray(tables.pack_intervals(table))
  slots = jnp.asarray(tables.slots(table))
  steps = -(-symbols.size // lanes)
  # The last context marks the places at the end that hold no symbol.
  deal = lambda x, fill: jnp.asarray(
    np.pad(x, (0, steps * lanes - x.size), constant_values=fill).reshape(steps, lanes)
  )
  grid, places = deal(symbols, 0), deal(contexts.astype(np.uint8), num_tables)
  capacity = int(tables.cost_bits(counts, table).sum() / 16 / lanes * 1.1) + 64
  empty = rans.empty(lanes, capacity)
  push, pop = jax.jit(categorical.push), jax.jit(categorical.pop)
  message = rans.check(push(empty, grid, places, intervals))
  _, decoded = pop(message, places, intervals, slots)
  if not np.array_equal(np.asarray(decoded), np.asarray(grid)):
    raise RuntimeError('decoded symbols differ')
  return (
    _median_seconds(lambda: push(empty, grid, places, intervals), runs),
    _median_seconds(lambda: pop(message, places, intervals, slots), runs),
    16.0 * rans.to_words(message).size,
  )


def peer(symbols: np.ndarray, runs: int) -> tuple[float, float, float]:
  """Measures constriction's ANS coder; see `rotbits` for the result."""
  counts = np.bincount(symbols, minlength=256)
  present = np.flatnonzero(counts)
  index = np.searchsorted(present, symbols).astype(np.int32)
  probabilities = (counts[present] / symbols.size).astype(np.float32)
  model = constriction.stream.model.Categorical(probabilities, perfect=False)

  def encode() -> np.ndarray:
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(index, model)
    return coder.get_compressed()

  words = encode()
  decode = lambda: constriction.stream.stack.AnsCoder(words).decode(model, index.size)
  if not np.array_equal(decode(), index):
    raise RuntimeError('decoded symbols differ')
  bits = 32.0 * words.size
  return _median_seconds(encode, runs), _median_seconds(decode, runs), bits


_WIDTH = 1024


def unit(count: int, dtype: Any, runs: int) -> tuple[int, float, float, float, float]:
  """Measures a unit.

  Returns:
    Bytes of the numbers, seconds to encode, seconds to decode, bytes of the stream per
    byte of the numbers, and the part of the stream that the lanes take.
  """
  rng = np.random.default_rng(0)
  rows = -(-count // _WIDTH)
  octaves = rng.normal(0, 0.4, (rows, 1)) + rng.normal(0, 0.3, _WIDTH)
  values = rng.standard_normal((rows, _WIDTH), np.float32) * np.exp2(octaves - 5)
  array = values.astype(dtype)
  encoded = weights.encode([array])
  out = [np.empty_like(array)]
  weights.decode(encoded.spec, encoded.data, out=out)
  if out[0].tobytes() != array.tobytes():
    raise RuntimeError('decoded numbers differ')
  return (
    array.nbytes,
    _median_seconds(lambda: weights.encode([array]).data, runs),
    _median_seconds(lambda: weights.decode(encoded.spec, encoded.data, out=out), runs),
    encoded.data.size / array.nbytes,
    lane_bytes([encoded.spec]) / encoded.data.size,
  )


def lane_bytes(units: Iterable[weights.StreamSpec]) -> int:
  """Returns the bytes of the states and lengths of all lanes of all blocks."""
  # A state of 4 bytes and a length of 1, of which the last word's bits are coded data.
  return sum(
    (5 * group.lanes + 4) * len(group.nbytes) for unit in units for group in unit.groups
  )


def main(argv: list[str]) -> None:
  del argv
  num_tables = _TABLES.value
  symbols, contexts = _symbols(_COUNT.value, num_tables)
  entropy = sum(map(tables.entropy_bits, _counts(symbols, contexts, num_tables)))
  one = tables.entropy_bits(np.bincount(symbols))
  rows = [('constriction', one, peer(symbols, _RUNS.value))]
  rows += [
    (
      f'{lanes} lanes',
      entropy,
      rotbits(symbols, contexts, num_tables, int(lanes), _RUNS.value),
    )
    for lanes in _LANES.value
  ]
  lines = []

  def show(line: str) -> None:
    print(line, flush=True)
    lines.append(line)

  show(
    f'{symbols.size:,} symbols of {entropy / symbols.size:.4f} bits in {num_tables} '
    f'tables, {jax.devices()[0].device_kind}, in million symbols per second:'
  )
  show(f'{"":14}{"encode":>8}{"ratio":>7}{"decode":>8}{"ratio":>7}{"overhead":>10}')
  base = rows[0][2]
  for name, ideal, (encode, decode, bits) in rows:
    show(
      f'{name:14}{symbols.size / encode / 1e6:8.0f}{base[0] / encode:7.2f}'
      f'{symbols.size / decode / 1e6:8.0f}{base[1] / decode:7.2f}'
      f'{100 * (bits / ideal - 1):9.3f}%'
    )
  show(
    'Whole units, in GB of numbers per second; stream bytes per byte of numbers; lanes:'
  )
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
    size, encode, decode, share, lanes = unit(_COUNT.value, dtype, _RUNS.value)
    show(
      f'{np.dtype(dtype).name:14}{size / encode / 1e9:8.3f}{"":7}'
      f'{size / decode / 1e9:8.3f}{"":7}{share:10.4f}{100 * lanes:9.3f}%'
    )
  if _FILE.value is not None:
    records = rotbits_jax.file.Reader(_FILE.value).records.values()
    specs = (record.stream_spec for record in records)
    share = lane_bytes(specs) / os.path.getsize(_FILE.value)
    show(f'Lanes of {os.path.basename(_FILE.value)}: {100 * share:.3f}% of the file')
  if _RESULTS.value is not None:
    text = '\n'.join(lines)
    about = f'`python -m benchmarks.coder`, {sections.machine()}.'
    sections.write(_RESULTS.value, 'The coder', sections.with_table(about, text))


if __name__ == '__main__':
  app.run(main)
