"""Integer frequency tables: the probabilities with which the coder codes symbols.

A table gives every symbol of an alphabet an integer frequency. The frequencies add up
to 2^precision, and a symbol has the probability frequency / 2^precision. The intervals
of all symbols divide [0, 2^precision) in the order of the symbols, and are as long as
their frequencies. A slot is an integer in [0, 2^precision).

The encoder makes tables from counts and stores them, so the decoder never recomputes
one. All code runs on the host and uses NumPy integers only. What cannot make tables
raises a ValueError.

Tables with a larger sum follow the counts more closely, but rANS loses more bits the
nearer the sum comes to its smallest state, 2^16. On real weights both lose 0.01% of the
entropy with a precision of 14.

Shape letters: K tables, A symbols in the alphabet.
"""

import zlib

import numpy as np
from zlib_ng import zlib_ng

PRECISION = 14
TOTAL = 1 << PRECISION

MOST_PAIR = 1 << 11
"""The greatest frequency of a pair."""


def quantize(counts: np.ndarray, precision: int = PRECISION) -> np.ndarray:
  """Returns frequencies in proportion to counts: int64 `[..., A]`.

  A frequency is at least 1 where the count is positive, and 0 elsewhere. In each row at
  least one count and at most half of 2^precision counts are positive, and the counts
  add up to less than 2^48.
  """
  counts, total = np.asarray(counts, np.int64), 1 << precision
  present = (counts > 0).sum(axis=-1, keepdims=True)
  if not np.all((present > 0) & (present <= total // 2)):
    raise ValueError(f'expected 1 to {total // 2} symbols that occur, got {present}')
  # Smaller counts are raised to this one. It gets a slot even if all are raised.
  least = counts.sum(axis=-1, keepdims=True) // (total - present) + 1
  ends = np.cumsum(np.where(counts > 0, np.maximum(counts, least), 0), axis=-1)
  whole = ends[..., -1:]
  return np.diff((ends * total + whole // 2) // whole, prepend=0, axis=-1)


def entropy_bits(counts: np.ndarray) -> np.ndarray:
  """Returns the order-0 entropy of counted symbols `[..., A]`, in bits: `[...]`."""
  shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  return -(counts * np.log2(np.where(counts > 0, shares, 1))).sum(axis=-1)


def of_pairs(counts: np.ndarray, precision: int) -> np.ndarray:
  """Returns the frequencies of pairs of independent symbols that have one table.

  The weight of a pair is the product of the two counts. Its frequency is in proportion
  to the weight, rounded; the last pair stands for all pairs whose frequency would be 0.
  Frequencies of 8 and more share what rounding the others leaves over. Of counts, int64
  `[K, A]`, whose rows add up to 2^14, it makes int64 `[K, A^2]` of at most 2^11 each.
  """
  drop = 2 * PRECISION - precision
  weights = (counts[:, :, None] * counts[:, None]).reshape(len(counts), -1)
  scaled = lambda x: (x + (1 << drop - 1)) >> drop
  frequencies = scaled(weights)
  frequencies[:, -1] = 0
  rare = np.where(frequencies == 0, weights, 0).sum(axis=1)
  frequencies[:, -1] = np.maximum(scaled(rare), 1)
  large = frequencies >= 8
  large[:, -1] = False
  left = (1 << precision) - np.where(large, 0, frequencies).sum(axis=1, keepdims=True)
  ends = np.cumsum(np.where(large, weights, 0), axis=1)
  whole = np.maximum(ends[:, -1:], 1)
  shared = np.diff((ends * left + whole // 2) // whole, prepend=0, axis=1)
  frequencies = np.where(large, shared, frequencies)
  if np.any(frequencies.sum(axis=1) != 1 << precision) or np.any(
    (frequencies < 0) | (frequencies > MOST_PAIR)
  ):
    raise ValueError(f'the frequency of a pair must be from 0 to {MOST_PAIR}')
  return frequencies


def to_bytes(frequencies: np.ndarray) -> bytes:
  """Serialises tables `[K, A]`: the low bytes, and then the high bytes."""
  return frequencies.astype('<u2').view(np.uint8).reshape(-1, 2).T.tobytes()


def from_bytes(
  data: np.ndarray, alphabet: int, precision: int = PRECISION
) -> np.ndarray:
  """Makes tables from bytes, uint8, int64 `[K, A]`: the inverse of `to_bytes`."""
  if data.size % (2 * alphabet):
    raise ValueError(f'{data.size} bytes are not tables')
  low, high = data.reshape(2, -1, alphabet).astype(np.int64)
  frequencies = low | high << 8
  if np.any(frequencies.sum(axis=1) != 1 << precision):
    raise ValueError(f'frequencies must add up to {1 << precision}')
  return frequencies


def deflate(data: bytes) -> bytes:
  """Returns a raw Deflate stream, which `inflate` reads."""
  return zlib_ng.compress(data, 9, -15)


def inflate(data: bytes, most: int) -> np.ndarray:
  """Inflates a stream of at most so many bytes: uint8."""
  unpacker = zlib.decompressobj(-15)
  try:
    content = unpacker.decompress(data, most + 1)
  except zlib.error as error:
    raise ValueError(f'not the tables of arrays: {error}') from error
  if not unpacker.eof or unpacker.unused_data or len(content) > most:
    raise ValueError('the tables of arrays are cut short or too long')
  return np.frombuffer(content, np.uint8)
