"""Integer frequency tables: what the entropy coder knows about a symbol.

A table gives every symbol of an alphabet an integer frequency; they add up to 2^14.
Tables are made from counts by the encoder and stored; the decoder never recomputes
one. Host code, NumPy integers only.

Finer tables are closer to the counts, but rANS loses more the nearer 2^precision comes
to its smallest state: on real weights 2^12 costs 0.1% (tables) + 0.00% (rANS) of the
entropy, 2^14 costs 0.01% + 0.01%, 2^16 costs 0.00% + 0.09%.

Shape letters: K tables, A symbols of the alphabet.
"""

import zlib

import numpy as np

PRECISION = 14
TOTAL = 1 << PRECISION


def quantize(counts: np.ndarray) -> np.ndarray:
  """Frequencies in proportion to counts.

  Args:
    counts: integers `[..., A]`, not all 0; at most 2^14 of them positive. They add up
      to less than 2^48.

  Returns:
    int64 `[..., A]` with sums 2^14, at least 1 where the count is positive and 0
    elsewhere.

  Raises:
    ValueError: if no count or more than 2^14 counts are positive.
  """
  counts = np.asarray(counts, np.int64)
  present = (counts > 0).sum(axis=-1, keepdims=True)
  if not np.all((present > 0) & (present <= TOTAL)):
    raise ValueError(
      f'got {np.min(present)} to {np.max(present)} symbols for {TOTAL} slots'
    )
  # A count raised to this one gets a slot, even if all are raised.
  least = counts.sum(axis=-1, keepdims=True) // np.maximum(TOTAL - present, 1) + 1
  ends = np.cumsum(np.where(counts > 0, np.maximum(counts, least), 0), axis=-1)
  whole = ends[..., -1:]
  return np.diff((ends * TOTAL + whole // 2) // whole, prepend=0, axis=-1)


def entropy_bits(counts: np.ndarray) -> float:
  """The order-0 entropy of all symbols counted, in bits."""
  counts = counts[counts > 0].astype(np.float64)
  return float(-(counts * np.log2(counts / counts.sum())).sum())


def cost_bits(counts: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
  """What coding the symbols counted with these frequencies takes: bits `[...]`."""
  bits = PRECISION - np.log2(np.maximum(frequencies, 1))
  return (counts * bits).sum(axis=-1)


def pack_intervals(frequencies: np.ndarray) -> np.ndarray:
  """Each symbol's interval as one uint32: `(frequency - 1) << 16 | start`, `[K, A]`.

  Symbols of frequency 0 get a meaningless entry.
  """
  starts = np.cumsum(frequencies, axis=-1) - frequencies
  return ((frequencies - 1) << 16 | starts).astype(np.uint32)


def slots(frequencies: np.ndarray) -> np.ndarray:
  """The symbol that owns each of the 2^14 slots: `[K, 2^14]`, uint8 if A <= 256."""
  tables, symbols = np.nonzero(frequencies)
  kind = np.uint8 if frequencies.shape[1] <= 256 else np.uint16
  owners = np.repeat(symbols.astype(kind), frequencies[tables, symbols])
  return owners.reshape(frequencies.shape[0], TOTAL)


def to_bytes(frequencies: np.ndarray) -> bytes:
  """Tables `[K, A]` in a compact form: see `from_bytes`."""
  parts = [np.zeros(0, np.int64)]
  for table in frequencies:
    (present,) = np.nonzero(table)
    first, last = int(present[0]), int(present[-1])
    parts += [np.array([first, last]), table[first : last + 1]]
  values = np.concatenate(parts).astype('<u2')
  return zlib.compress(values.view(np.uint8).reshape(-1, 2).T.tobytes(), 9)


def from_bytes(data: bytes, count: int, alphabet: int) -> np.ndarray:
  """The inverse of `to_bytes`.

  Args:
    data: a zlib stream of, for each table, the first and the last symbol of positive
      frequency and the frequencies from one to the other, as uint16: first the low
      bytes of all, then the high bytes.
    count: K.
    alphabet: A.

  Returns:
    int64 `[K, A]`.

  Raises:
    ValueError: if the bytes are not that many valid tables.
  """
  unpacker, most = zlib.decompressobj(), 2 * count * (alphabet + 2)
  try:
    unpacked = unpacker.decompress(data, most + 1)
    if not unpacker.eof or unpacker.unused_data or len(unpacked) > most:
      raise ValueError('it is cut short, or too long')
    halves = np.frombuffer(unpacked, np.uint8).reshape(2, -1)
  except (zlib.error, ValueError) as error:
    raise ValueError(f'not a frequency table: {error}') from error
  values = halves[0].astype(np.int64) | halves[1].astype(np.int64) << 8
  tables = np.zeros((count, alphabet), np.int64)
  position = 0
  for table in tables:
    first, last = values[position : position + 2].tolist() or (0, -1)
    span = values[position + 2 : position + 3 + last - first]
    if not first <= last < alphabet or span.size != last - first + 1:
      raise ValueError('a frequency table is cut short')
    table[first : last + 1] = span
    if table.sum() != TOTAL:
      raise ValueError(f'frequencies add up to {table.sum()}, not {TOTAL}')
    position += 2 + span.size
  if position != values.size:
    raise ValueError('bytes are left behind the last frequency table')
  return tables
