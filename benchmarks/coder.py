"""Measures the coder alone: streams of weights, rANS messages, and rotations.

A stream of weights is what a file has for a record: an array whose rows and columns
differ in scale, encoded to bytes and decoded into the same memory on all CPUs. A
message is that of `codecs.categorical`, which searches its tables by bisection. It is
compared with constriction's ANS coder, which has one thread and 32-bit words. Both code
the same symbols, the rounded logarithms of Gaussian numbers, with one frequency table.

Bits-back over O(n) pops a rotation and computes its matrix, and then recovers it from a
matrix with errors of 1e-4 and pushes it back.
"""

from collections.abc import Iterator
from typing import Any

import constriction
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks import common
from rotbits_jax.coding import codecs
from rotbits_jax.coding import coder
from rotbits_jax.coding import rans
from rotbits_jax.coding import tables
from rotbits_jax.coding.bits_back import haar

TITLE = 'The coder'
RUNS = 5
LANES = 64, 1024
ALPHABET = 64


def symbols_of(count: int) -> np.ndarray:
  """Draws symbols: the logarithms of Gaussian numbers, in steps of an eighth."""
  numbers = np.abs(np.random.default_rng(0).standard_normal(count, np.float32))
  steps = np.rint(8 * np.log2(np.maximum(numbers, 1e-3))) + 48
  return np.clip(steps, 0, ALPHABET - 1).astype(np.uint32)


def of_message(symbols: np.ndarray, lanes: int) -> tuple[float, float, float]:
  """Returns the seconds to push and to pop, and the bits of the message."""
  counts = np.bincount(symbols, minlength=ALPHABET)[None]
  contexts = jnp.zeros(symbols.size, jnp.uint8)
  codec = codecs.categorical(contexts, tables.quantize(counts))
  empty = rans.empty(lanes)
  push, pop = jax.jit(codec.push), jax.jit(codec.pop)
  pushed = jnp.asarray(symbols)
  message = rans.check(push(empty, pushed))
  if not np.array_equal(pop(message)[1], symbols):
    raise ValueError('the popped symbols differ')
  return (
    common.median_seconds(lambda: push(empty, pushed), RUNS),
    common.median_seconds(lambda: pop(message), RUNS),
    16.0 * rans.to_words(message).size,
  )


def of_constriction(symbols: np.ndarray) -> tuple[float, float, float]:
  """Returns the seconds to encode and to decode, and the bits."""
  counts = np.bincount(symbols, minlength=ALPHABET)
  present = np.flatnonzero(counts)
  index = np.searchsorted(present, symbols).astype(np.int32)
  probabilities = (counts[present] / symbols.size).astype(np.float32)
  model = constriction.stream.model.Categorical(probabilities, perfect=False)

  def encode() -> np.ndarray:
    message = constriction.stream.stack.AnsCoder()
    message.encode_reverse(index, model)
    return message.get_compressed()

  words = encode()
  decode = lambda: constriction.stream.stack.AnsCoder(words).decode(model, index.size)
  encoding, decoding = (common.median_seconds(x, RUNS) for x in (encode, decode))
  return encoding, decoding, 32.0 * words.size


def messages(count: int) -> str:
  """Returns the table of messages."""
  symbols = symbols_of(count)
  entropy = tables.entropy_bits(np.bincount(symbols, minlength=ALPHABET))
  ways = {'constriction': of_constriction(symbols)}
  for lanes in LANES:
    ways[f'{lanes} lanes'] = of_message(symbols, lanes)
  rows = []
  for name, (*seconds, bits) in ways.items():
    rates = (f'{count / x / 1e6:,.0f}' for x in seconds)
    rows.append((name, *rates, f'{bits / entropy - 1:.3%}'))
  header = ('message', 'push, million/s', 'pop, million/s', 'over the entropy')
  return common.table(header, rows)


def streams(count: int) -> str:
  """Returns the table of streams of weights."""
  rows, width = [], 1024
  for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
    rng = np.random.default_rng(0)
    octaves = rng.normal(0, 0.4, (count // width, 1)) + rng.normal(0, 0.3, width)
    numbers = rng.standard_normal((count // width, width), np.float32)
    array = (numbers * np.exp2(octaves - 5)).astype(dtype)
    encoded, out = coder.encode([array]), [np.empty_like(array)]
    spec, data = encoded.spec, encoded.data
    decode = lambda: coder.decode(spec, data, out=out)  # noqa: B023
    encode = lambda: coder.encode([array]).pieces  # noqa: B023
    seconds = [common.median_seconds(work, RUNS) for work in (encode, decode)]
    if out[0].tobytes() != array.tobytes():
      raise ValueError('the decoded weights differ')
    rates = (f'{array.nbytes / x / 1e6:,.0f}' for x in seconds)
    share = data.size / array.nbytes
    rows.append((np.dtype(dtype).name, *rates, f'{share:.4f}'))
  header = ('weights', 'encode MB/s', 'decode MB/s', 'bytes per byte')
  return common.table(header, rows)


def rotation(n: int) -> tuple[float, float, float, float]:
  """Measures bits-back over O(n).

  Returns:
    Seconds to pop a rotation, seconds to recover it and push it back, and the bits that
    it takes and that come back, for each of n (n - 1) / 2 parameters.
  """
  lanes = 64
  depth = 2 * n * n // lanes + 64
  words = jax.random.bits(jax.random.key(0), (depth, lanes), jnp.uint16)
  message = rans.stacked(words)

  @jax.jit
  def sample(message: rans.Message) -> tuple[rans.Message, jax.Array, jax.Array]:
    message, cells = haar.codec(n, n).pop(message)
    return message, cells, haar.rotation(cells, n, n)

  @jax.jit
  def restore(
    message: rans.Message, recovered: jax.Array, correction: Any
  ) -> rans.Message:
    return haar.codec(n, n).push(message, haar.recover(recovered, correction))

  popped, cells, q = sample(message)
  noise = jax.random.normal(jax.random.key(1), (n, n), jnp.float32)
  recovered = jax.jit(lambda q: jnp.linalg.qr(q + 1e-4 / n**0.5 * noise)[0])(q)
  recovered = recovered * jnp.sign(jnp.sum(recovered * q, axis=0))
  correction = jax.jit(haar.correct)(recovered, recovered, cells)
  again = restore(popped, recovered, correction)
  if not np.array_equal(rans.unstacked(rans.check(again)), np.asarray(words)):
    raise ValueError('the message did not come back')
  frequencies = jnp.asarray(haar.fit(correction))
  corrections = haar.correction_codec(n, n, frequencies)
  sent = corrections.push(rans.empty(lanes), correction)
  taken = rans.content_bits(message) - rans.content_bits(popped)
  parameters = n * (n - 1) / 2
  return (
    common.median_seconds(lambda: sample(message), RUNS),
    common.median_seconds(lambda: restore(popped, recovered, correction), RUNS),
    taken / parameters,
    (taken - rans.content_bits(sent)) / parameters,
  )


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  count = 1 << 22
  rotations = []
  for n in (128, 512):
    pop, push, taken, back = rotation(n)
    seconds = f'{1e3 * pop:.1f}', f'{1e3 * push:.1f}'
    rotations.append((n, *seconds, f'{taken:.2f}', f'{back:.2f}'))
  parts = [
    f'Records of {count:,} normally distributed weights, coded as in a file:',
    streams(count),
    f'Messages of {count:,} symbols with one table, by lanes, and by constriction:',
    messages(count),
    'Rotations in n dimensions by bits-back, with the bits per parameter that are '
    'popped and those that come back:',
    common.table(('n', 'pop ms', 'push ms', 'taken', 'back'), rotations, texts=0),
  ]
  yield common.Section(TITLE, '\n\n'.join(parts))
