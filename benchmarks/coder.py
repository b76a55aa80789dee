"""Measures the speed and the overhead of the rANS coder, of bits-back and of records.

    python -m benchmarks.coder --count=10000000 --tables=32 [--results=RESULTS.md]

The first table compares our rANS coder with that of constriction. Both code the same
symbols in the same run: the exponents and top mantissa bits of Gaussian float16
numbers. Compare the ratios, because machines differ in speed. With `--tables=K`, rows
of numbers have K scales, an eighth of an octave apart, and our coder has a frequency
table for each scale. Constriction has one table for all numbers, and its overhead is
relative to the entropy with that table. It codes on one thread, with 32-bit words and
its default precision, and uses a categorical model made from the same counts. *Blocks*
are those of files, `coding.weights.blocks`, on one thread; the other rows are messages
of `codecs.categorical`, which searches its tables by bisection.

The second table measures bits-back over O(n): to pop a rotation and compute its matrix,
and to recover it from a matrix with errors of 1e-4 and push it back.

The third table measures `coding.weights`, the coder of files, on a record: an array of
as many numbers, whose rows and columns differ in scale. The record is encoded to a
stream of bytes and decoded into the same memory, on all CPUs. The overhead of its lanes
is the bytes that hold their last states and their lengths, in percent of the stream.

Times are medians of several runs. Compilation is not timed.
"""

from collections.abc import Callable, Iterable
import functools
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
from rotbits_jax.coding import codecs
from rotbits_jax.coding import haar
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding import weights
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import layouts

_COUNT = flags.DEFINE_integer('count', 10_000_000, 'Number of symbols.', lower_bound=1)
_TABLES = flags.DEFINE_integer('tables', 1, 'Number of frequency tables.', 1, 255)
_RUNS = flags.DEFINE_integer('runs', 5, 'Number of timed runs.', lower_bound=1)
_LANES = flags.DEFINE_list('lanes', ['64', '1024'], 'Lanes of messages to measure.')
_ROTATIONS = flags.DEFINE_list('rotations', ['128', '512'], 'Dimensions of rotations.')
_FILE = flags.DEFINE_string('file', None, 'A file whose lanes to count.')
_RESULTS = flags.DEFINE_string('results', None, 'A file to write the section to.')

_ROW = 432
_ALPHABET = 256


def _symbols(count: int, num_tables: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws symbols, uint16; returns them and the index of each symbol's table, uint8."""
  rng = np.random.default_rng(0)
  contexts = np.repeat(rng.integers(0, num_tables, -(-count // _ROW)), _ROW)[:count]
  scales = np.exp2(-4 - contexts / 8).astype(np.float32)
  values = (rng.standard_normal(count, np.float32) * scales).astype(np.float16)
  symbols, _ = layouts.Float(values.dtype, 8).split(jnp.asarray(values.view('u2')), 1)
  return np.asarray(symbols), contexts.astype(np.uint8)


def _counts(symbols: np.ndarray, contexts: np.ndarray, num_tables: int) -> np.ndarray:
  index = contexts.astype(np.int64) * _ALPHABET + symbols
  counts = np.bincount(index, minlength=_ALPHABET * num_tables)
  return counts.reshape(num_tables, _ALPHABET)


def _median_seconds(run: Callable[[], Any], runs: int) -> float:
  jax.block_until_ready(run())  # compiles and fills caches
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


Measured = tuple[float, float, float]
"""Seconds to encode, seconds to decode, and coded bits."""


def of_blocks(
  symbols: np.ndarray, contexts: np.ndarray, frequencies: np.ndarray, runs: int
) -> Measured:
  """Measures the blocks of files on one thread."""
  layout = layouts.Int(np.dtype(np.uint16), 0)
  made = blocks.tables_of(frequencies)
  fill = lambda x: lambda out: np.copyto(out, x)
  parts = [
    (
      symbols[start : start + blocks.CAPACITY],
      contexts[start : start + blocks.CAPACITY],
    )
    for start in range(0, symbols.size, blocks.CAPACITY)
  ]
  lanes = blocks.lanes_for(parts[0][0].size, parts[0][0].nbytes)

  def encode() -> list[np.ndarray]:
    return [
      blocks.encode(fill(x), fill(y), x.size, lanes, layout, made)[0] for x, y in parts
    ]

  coded, nothing = encode(), np.zeros(0, np.uint8)

  found = [np.empty(x.size, layout.unsigned) for x, _ in parts]

  def decode() -> None:
    for words, (_, y), out in zip(coded, parts, found, strict=True):
      write = functools.partial(np.copyto, out)
      blocks.decode(words, nothing, fill(y), y.size, lanes, layout, made, write)

  decode()
  if not np.array_equal(np.concatenate(found), symbols):
    raise RuntimeError('decoded symbols differ')
  bits = 8.0 * sum(words.size for words in coded)
  return _median_seconds(encode, runs), _median_seconds(decode, runs), bits


def of_messages(
  symbols: np.ndarray,
  contexts: np.ndarray,
  frequencies: np.ndarray,
  lanes: int,
  runs: int,
) -> Measured:
  """Measures a message of so many lanes."""
  codec = codecs.categorical(jnp.asarray(contexts), frequencies)
  bits = tables.cost_bits(_counts(symbols, contexts, len(frequencies)), frequencies)
  empty = rans.empty(lanes, int(bits.sum() / 16 / lanes * 1.1) + 64)
  push, pop = jax.jit(codec.push), jax.jit(codec.pop)
  given = jnp.asarray(symbols, jnp.uint32)
  message = rans.check(push(empty, given))
  if not np.array_equal(pop(message)[1], given):
    raise RuntimeError('decoded symbols differ')
  return (
    _median_seconds(lambda: push(empty, given), runs),
    _median_seconds(lambda: pop(message), runs),
    16.0 * rans.to_words(message).size,
  )


def peer(symbols: np.ndarray, runs: int) -> Measured:
  """Measures constriction's ANS coder."""
  counts = np.bincount(symbols, minlength=_ALPHABET)
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


def rotation(n: int, runs: int) -> tuple[float, float, float, float]:
  """Measures bits-back over O(n).

  Returns:
    Seconds to pop a rotation, seconds to recover it and push it back, and the bits that
    it takes and that come back, for each of n (n - 1) / 2 parameters.
  """
  codec, lanes = haar.codec(n, n), 64
  depth = 2 * n * n // lanes + 64
  words = jax.random.bits(jax.random.key(0), (depth, lanes), jnp.uint16)
  message = rans.stacked(words, 2 * depth)

  @jax.jit
  def sample(message: rans.Message) -> tuple[rans.Message, jax.Array, jax.Array]:
    message, cells = codec.pop(message)
    return message, cells, haar.rotation(cells, n, n)

  @jax.jit
  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> rans.Message:
    return codec.push(message, haar.recover(recovered, correction))

  popped, cells, q = sample(message)
  noise = jax.random.normal(jax.random.key(1), (n, n), jnp.float32)
  recovered = jax.jit(lambda q: jnp.linalg.qr(q + 1e-4 / n**0.5 * noise)[0])(q)
  recovered = recovered * jnp.sign(jnp.sum(recovered * q, axis=0))
  correction = jax.jit(haar.correct)(recovered, cells)
  again = restore(popped, recovered, correction)
  if not np.array_equal(rans.unstacked(rans.check(again)), np.asarray(words)):
    raise RuntimeError('the message did not come back')
  frequencies = haar.fit(correction)
  sent = haar.correction_codec(n, n, jnp.asarray(frequencies)).push(
    rans.empty(lanes, depth), correction
  )
  taken = rans.content_bits(message) - rans.content_bits(popped)
  parameters = n * (n - 1) / 2
  return (
    _median_seconds(lambda: sample(message), runs),
    _median_seconds(lambda: restore(popped, recovered, correction), runs),
    taken / parameters,
    (taken - rans.content_bits(sent)) / parameters,
  )


_WIDTH = 1024


def record(count: int, dtype: Any, runs: int) -> tuple[int, float, float, float, float]:
  """Measures a record.

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


def lane_bytes(records: Iterable[weights.StreamSpec]) -> int:
  """Returns the bytes of the states and lengths of all lanes of all blocks."""
  # A state of 4 bytes and a length of 1.
  return sum(
    (5 * group.lanes + 6) * len(group.blocks) for own in records for group in own.groups
  )


def main(argv: list[str]) -> None:
  del argv
  num_tables, runs = _TABLES.value, _RUNS.value
  symbols, contexts = _symbols(_COUNT.value, num_tables)
  counts = _counts(symbols, contexts, num_tables)
  entropy = sum(map(tables.entropy_bits, counts))
  frequencies = tables.quantize(counts)
  one = tables.entropy_bits(np.bincount(symbols))
  rows = [
    ('constriction', one, peer(symbols, runs)),
    ('blocks', entropy, of_blocks(symbols, contexts, frequencies, runs)),
  ]
  for lanes in _LANES.value:
    found = of_messages(symbols, contexts, frequencies, int(lanes), runs)
    rows.append((f'{lanes} lanes', entropy, found))
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
    'Rotations in n dimensions, in ms; bits a parameter that they take and give back:'
  )
  show(f'{"n":>14}{"pop":>8}{"":7}{"push":>8}{"":7}{"taken":>10}{"back":>10}')
  for n in _ROTATIONS.value:
    popping, pushing, taken, back = rotation(int(n), runs)
    show(
      f'{n:>14}{1e3 * popping:8.1f}{"":7}{1e3 * pushing:8.1f}{"":7}'
      f'{taken:10.2f}{back:10.2f}'
    )
  show('Records, in GB of numbers per second; stream bytes per byte of numbers; lanes:')
  for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
    size, encode, decode, ratio, overhead = record(_COUNT.value, dtype, runs)
    show(
      f'{np.dtype(dtype).name:14}{size / encode / 1e9:8.3f}{"":7}'
      f'{size / decode / 1e9:8.3f}{"":7}{ratio:10.4f}{100 * overhead:9.3f}%'
    )
  if _FILE.value is not None:
    records = rotbits_jax.file.Reader(_FILE.value).records.values()
    coded = [record.stream_spec for record in records]
    specs = [spec for spec in coded if isinstance(spec, weights.StreamSpec)]
    share = lane_bytes(specs) / os.path.getsize(_FILE.value)
    show(f'Lanes of {os.path.basename(_FILE.value)}: {100 * share:.3f}% of the file')
  if _RESULTS.value is not None:
    text = '\n'.join(lines)
    about = f'`python -m benchmarks.coder`, {sections.machine()}.'
    sections.write(_RESULTS.value, 'The coder', sections.with_table(about, text))


if __name__ == '__main__':
  app.run(main)
