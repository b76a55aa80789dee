"""Symbols a second and overhead of the rANS coder, beside constriction's.

    python -m benchmarks.coder --count=10000000

Both coders see the same symbols, exponent and top mantissa bits of Gaussian float16
numbers, in the same run; compare the ratios, since machines differ. constriction codes
on one thread with 32-bit words and its own default precision; it takes a categorical
model made from the same counts. Medians of several runs; compilation is not timed.
"""

from collections.abc import Callable
import statistics
import time
from typing import Any

from absl import app
from absl import flags
import constriction
import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import categorical
from rotbits_jax.coding import floats
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables

_COUNT = flags.DEFINE_integer('count', 10_000_000, 'Symbols to code.', lower_bound=1)
_RUNS = flags.DEFINE_integer('runs', 5, 'Timed runs of each.', lower_bound=1)
_LANES = flags.DEFINE_list(
  'lanes', ['256', '512', '1024', '2048', '4096', '8192', '16384'], 'Lane counts.'
)


def _symbols(count: int) -> np.ndarray:
  values = np.random.default_rng(0).standard_normal(count, np.float32) * 0.05
  return np.asarray(floats.split(jnp.asarray(values, jnp.float16))[0])


def _median_seconds(run: Callable[[], Any], runs: int) -> float:
  jax.block_until_ready(run())  # compiles, warms
  seconds = []
  for _ in range(runs):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def rotbits(symbols: np.ndarray, lanes: int, runs: int) -> tuple[float, float, float]:
  """Encode seconds, decode seconds, coded bits."""
  counts = np.bincount(symbols, minlength=256)
  table = tables.quantize(counts)[None]
  intervals = jnp.asarray(tables.pack_intervals(table))
  slots = jnp.asarray(tables.slots(table))
  steps = -(-symbols.size // lanes)
  # Places left over have context 1: they hold no symbol.
  deal = lambda x, fill: jnp.asarray(
    np.pad(x, (0, steps * lanes - x.size), constant_values=fill).reshape(steps, lanes)
  )
  grid, contexts = deal(symbols, 0), deal(np.zeros(symbols.size, np.uint8), 1)
  capacity = int(tables.cost_bits(counts, table[0]) / 16 / lanes * 1.1) + 64
  empty = rans.empty(lanes, capacity)
  push, pop = jax.jit(categorical.push), jax.jit(categorical.pop)
  message = rans.check(push(empty, grid, contexts, intervals))
  _, decoded = pop(message, contexts, intervals, slots)
  if not np.array_equal(np.asarray(decoded), np.asarray(grid)):
    raise RuntimeError('decoded symbols differ')
  return (
    _median_seconds(lambda: push(empty, grid, contexts, intervals), runs),
    _median_seconds(lambda: pop(message, contexts, intervals, slots), runs),
    16.0 * rans.to_words(message).size,
  )


def peer(symbols: np.ndarray, runs: int) -> tuple[float, float, float]:
  """The same by constriction's ANS coder."""
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


def main(argv: list[str]) -> None:
  del argv
  symbols = _symbols(_COUNT.value)
  entropy = tables.entropy_bits(np.bincount(symbols))
  rows = [('constriction', peer(symbols, _RUNS.value))]
  rows += [
    (f'{lanes} lanes', rotbits(symbols, int(lanes), _RUNS.value))
    for lanes in _LANES.value
  ]
  print(
    f'{symbols.size:,} symbols of {entropy / symbols.size:.4f} bits, '
    f'{jax.devices()[0].device_kind}, million symbols a second:'
  )
  print(f'{"":14}{"encode":>8}{"ratio":>7}{"decode":>8}{"ratio":>7}{"overhead":>10}')
  base = rows[0][1]
  for name, (encode, decode, bits) in rows:
    print(
      f'{name:14}{symbols.size / encode / 1e6:8.0f}{base[0] / encode:7.2f}'
      f'{symbols.size / decode / 1e6:8.0f}{base[1] / decode:7.2f}'
      f'{100 * (bits / entropy - 1):9.3f}%'
    )


if __name__ == '__main__':
  app.run(main)
