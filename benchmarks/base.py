"""Measures a model given its base, and a sliced model given its dense one.

The fine-tune and its base are those of `common`; a step is one of Adam. Other methods
for a fine-tune are XOR with the base, then byte planes, then zstd (BitX of ZipLLM). For
a step they are XOR with zstd -1; gaps between changed weights, and their values; and
the places and values, int32 and the dtype (sparse safetensors, as TRL sends weights).
"""

from collections.abc import Callable, Iterator, Sequence
import math
import pathlib
import tempfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import zstandard

from benchmarks import common
import rotbits_jax

TITLE = 'Relative to a base'
RATES = 3e-7, 1e-6, 3e-6  # learning rates
STEPS = 1, 8, 32  # after which weights are sent
LARGE = 10**6  # elements of a large tensor
TIMED_SHAPE, TIMED_RATE = (
  (4096, 2560),
  1e-6,
)  # of two tensors that are timed, and of the step
RUNS = 3
SLICED = {
  'llama-tiny-sliced-head-0.25': 'llama-tiny-dense',
  'phi2-tiny-sliced-0.25': 'phi2-tiny-dense',
  'phi3-tiny-sliced-0.25': 'phi3-tiny-dense',
}
"""Models of tests/testdata that Microsoft's code sliced, and their dense models."""


class Row(NamedTuple):
  """What a method takes for a model: bytes, and seconds there and back."""

  method: str
  bytes: int
  encode: float
  decode: float


def training(
  masters: common.Tensors, rates: Sequence[float]
) -> Iterator[list[common.Tensors]]:
  """Yields bfloat16 weights after each of `STEPS` of Adam, for gradients of noise.

  They are those of each learning rate, which share the gradients.
  """
  rng, first, second = np.random.default_rng(0), 0.9, 0.999
  weights = [{name: x.copy() for name, x in masters.items()} for _ in rates]
  means, squares = ({name: 0 * x for name, x in masters.items()} for _ in range(2))
  for step in range(1, max(STEPS) + 1):
    for name, x in masters.items():
      gradient = rng.standard_normal(x.shape, np.float32)
      means[name] += (1 - first) * (gradient - means[name])
      squares[name] += (1 - second) * (gradient**2 - squares[name])
      root = np.sqrt(squares[name] / (1 - second**step))
      update = means[name] / (1 - first**step) / (root + 1e-8)
      for rate, tensors in zip(rates, weights, strict=True):
        tensors[name] -= rate * update
    if step in STEPS:
      dtype = ml_dtypes.bfloat16
      yield [{name: x.astype(dtype) for name, x in y.items()} for y in weights]


def entropy(new: common.Tensors, old: common.Tensors) -> int:
  """Returns the bytes of the differences in ULPs, given the exponents of the base."""
  bits = 0.0
  for name, array in new.items():
    words, known = (_bits(x).astype(np.int64) for x in (array, old[name]))
    exponents, changed = known >> 7, words != known
    exponents &= 255
    pairs = exponents[changed] << 32 | words[changed] - known[changed] + (1 << 16)
    of_changed = np.unique(pairs, return_counts=True)[1]
    of_others = np.bincount(exponents[~changed])
    for sign, counts in (1, np.bincount(exponents)), (-1, of_others), (-1, of_changed):
      bits += sign * (counts * np.log2(np.maximum(counts, 1))).sum()
  return round(bits / 8)


# The methods of others: from the bits of a tensor and of that of the base to what is
# stored, and back.


def bitx(new: np.ndarray, old: np.ndarray) -> list[bytes]:
  planes = (new ^ old).view(np.uint8).reshape(-1, new.itemsize).T
  return [zstandard.compress(plane.tobytes(), 3) for plane in planes]


def of_bitx(coded: list[bytes], old: np.ndarray) -> np.ndarray:
  planes = [np.frombuffer(zstandard.decompress(x), np.uint8) for x in coded]
  return np.stack(planes, axis=1).view(old.dtype)[:, 0] ^ old


def sparse(new: np.ndarray, old: np.ndarray) -> list[bytes]:
  places = np.flatnonzero(new != old)
  return [places.astype(np.int32).tobytes(), new[places].tobytes()]


def of_sparse(coded: list[bytes], old: np.ndarray) -> np.ndarray:
  new = old.copy()
  new[np.frombuffer(coded[0], np.int32)] = np.frombuffer(coded[1], old.dtype)
  return new


def xor(new: np.ndarray, old: np.ndarray) -> list[bytes]:
  return [zstandard.compress((new ^ old).tobytes(), 1)]


def of_xor(coded: list[bytes], old: np.ndarray) -> np.ndarray:
  return old ^ np.frombuffer(zstandard.decompress(coded[0]), old.dtype)


def gaps(new: np.ndarray, old: np.ndarray) -> list[bytes]:
  places = np.flatnonzero(new != old)
  planes = np.diff(places, prepend=-1).astype(np.uint32).view(np.uint8)
  parts = planes.reshape(-1, 4).T.tobytes(), new[places].tobytes()
  return [zstandard.compress(x, 1) for x in parts]


def of_gaps(coded: list[bytes], old: np.ndarray) -> np.ndarray:
  planes, values = map(zstandard.decompress, coded)
  steps = np.frombuffer(planes, np.uint8).reshape(4, -1).T.copy().view(np.uint32)
  new = old.copy()
  new[np.cumsum(steps[:, 0], dtype=np.int64) - 1] = np.frombuffer(values, old.dtype)
  return new


METHODS: dict[str, tuple[Callable[..., list[bytes]], Callable[..., np.ndarray]]] = {
  'XOR, byte planes, zstd -3': (bitx, of_bitx),
  'gaps and values, zstd -1': (gaps, of_gaps),  # much as PULSE
  'XOR, zstd -1': (xor, of_xor),  # as slime sends weights
  'indices and values': (sparse, of_sparse),
}
OF_FINE_TUNES, *OF_STEPS = METHODS

OURS: dict[str, tuple[Callable[..., bytes], Callable[..., Any]]] = {
  '`exact`': (
    lambda new, old: rotbits_jax.encode(new, base=old),
    lambda data, old: rotbits_jax.decode(data, base=old),
  ),
  '`delta`': (rotbits_jax.delta, rotbits_jax.apply),
}


def measured(
  method: str, new: common.Tensors, old: common.Tensors, timed: bool = True
) -> Row:
  """Measures a method in memory; seconds if it is timed."""
  if method in OURS:
    forward, back = OURS[method]
    coded = [forward(new, old)]
    encode = lambda: forward(new, old)
    decode = lambda: back(coded[0], old)
  else:
    forward, back = METHODS[method]
    bits = [(_bits(x), _bits(old[name])) for name, x in new.items()]
    parts = [forward(*pair) for pair in bits]
    coded = [x for part in parts for x in part]
    encode = lambda: [forward(*pair) for pair in bits]
    decode = lambda: [
      back(part, known) for part, (_, known) in zip(parts, bits, strict=True)
    ]
    for found, (expected, _) in zip(decode(), bits, strict=True):
      if not np.array_equal(found, expected):
        raise ValueError(f'{method} gave other weights')
  works = encode, decode
  seconds = [common.median_seconds(x, RUNS) if timed else np.nan for x in works]
  return Row(method, sum(map(len, coded)), *seconds)


def _bits(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array, flat."""
  return array.reshape(-1).view(f'u{array.itemsize}')


def fine_tunes() -> str:
  """Returns the table of fine-tunes."""
  base, tuned = map(common.packaged_weights, (common.BASE, common.TUNED))
  subjects = [(f'fine-tune, {x}', x, tuned) for x in ('bfloat16', 'float16', 'float32')]
  lines = []
  for name, dtype, path in (*subjects, ('an equal model, bfloat16', 'bfloat16', base)):
    new, old = (common.read_tensors(x, dtype) for x in (path, base))
    size = sum(x.nbytes for x in new.values())
    for row in (measured(x, new, old) for x in ('`exact`', OF_FINE_TUNES)):
      rates = (f'{size / x / 1e6:,.0f}' for x in (row.encode, row.decode))
      share = f'{row.bytes / size:.4f}'
      lines.append((name, row.method, common.megabytes(row.bytes), share, *rates))
  header = ('model', 'method', 'MB', 'share', 'encode MB/s', 'decode MB/s')
  return common.table(header, lines, texts=2)


def steps() -> str:
  """Returns the tables of steps of a training: bytes, and rates."""
  masters = common.read_tensors(common.packaged_weights(common.BASE), 'float32')
  old = {name: x.astype(ml_dtypes.bfloat16) for name, x in masters.items()}
  size, lines = sum(x.nbytes for x in old.values()), []
  of_rates = zip(*training(masters, RATES), strict=True)
  for rate, of_steps in zip(RATES, of_rates, strict=True):
    for count, new in zip(STEPS, of_steps, strict=True):
      bound = entropy(new, old)
      rows = [measured(x, new, old, timed=False) for x in ('`delta`', *OF_STEPS)]
      changed = sum(np.count_nonzero(_bits(x) != _bits(old[k])) for k, x in new.items())
      large = {name: x for name, x in new.items() if x.size >= LARGE}
      shares = [row.bytes / bound for row in rows]
      shares.insert(1, len(rotbits_jax.delta(large, old)) / entropy(large, old))
      cells = f'{2 * changed / size:.2%}', common.megabytes(bound)
      lines.append((f'{rate:g}', count, *cells, *(f'{x:.2f}' for x in shares)))
  header = ['learning rate', 'steps', 'changed', 'entropy, MB', '`delta`', 'large']
  return common.table([*header, *OF_STEPS], lines)


def rates() -> str:
  """Returns the table of rates for a step of two large tensors."""
  rng = np.random.default_rng(0)
  draw = lambda: 0.02 * rng.standard_normal(TIMED_SHAPE, np.float32)
  masters = {name: draw() for name in ('a', 'b')}
  old = {name: x.astype(ml_dtypes.bfloat16) for name, x in masters.items()}
  (new,), size = (
    next(training(masters, [TIMED_RATE])),
    sum(x.nbytes for x in old.values()),
  )
  lines = []
  for row in (measured(x, new, old) for x in ('`delta`', *OF_STEPS)):
    speeds = (f'{size / x / 1e6:,.0f}' for x in (row.encode, row.decode))
    lines.append((row.method, common.megabytes(row.bytes), *speeds))
  return common.table(('method', 'MB', 'encode MB/s', 'decode MB/s'), lines)


def sliced_models() -> str:
  """Returns the table of sliced models, given their dense models."""
  lines = []
  for name, dense_name in SLICED.items():
    path, dense = common.TESTDATA / name, common.TESTDATA / dense_name
    for preset in ('exact', 'free'):
      with tempfile.TemporaryDirectory() as folder:
        file, again = pathlib.Path(folder, 'x.rotbits'), pathlib.Path(folder, 'again')
        rotbits, base = ('-m', 'rotbits_jax'), f'--base={dense}'
        choice = f'--preset={preset}'
        encode = common.run(*rotbits, 'encode', path, file, choice, base)
        decode = common.run(*rotbits, 'decode', file, again, base)
        report = rotbits_jax.inspect(file)
        checked = rotbits_jax.verify(file, against=path, base=dense)
      divergences = checked.kl, checked.kl_rerounded
      lines.append(
        (
          *(name.split('-')[0], f'`{preset}`', common.megabytes(report.file_bytes)),
          f'{report.file_bytes / report.input_bytes:.4f}',
          *(None if x is None else f'{x:.2g}' for x in divergences),
          *(f'{x:.2f}' for cost in (encode, decode) for x in cost),
        )
      )
  header = ('model', 'preset', 'MB', 'share', 'KL', 'floor')
  costs = ('encode s', 'GB', 'decode s', 'GB')
  return common.table([*header, *costs], lines, texts=2)


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  about = (
    f'The fine-tune {common.TUNED}, relative to its base {common.BASE}. Rates are MB '
    f'of its tensors per second in memory, the median of {RUNS} runs.'
  )
  of_sliced = (
    'Tiny models of tests/testdata, sliced by 25%, relative to their dense models. '
    'Times and peak resident memory (GB) are of whole commands. KL, in nats per token '
    'on random tokens, and its noise floor are those that `rotbits verify` prints.'
  )
  of_steps = (
    f'{common.BASE} in bfloat16, relative to itself before some steps of Adam, which '
    'have float32 masters and random gradients. The entropy is that of the differences '
    'in ULPs, given the exponents of the base; a method takes the stated multiple of '
    f'it. "Large" is `delta` of the tensors of at least {LARGE:,} elements alone.'
  )
  of_rates = (
    f'Rates in memory for one step at {TIMED_RATE:g} of two tensors of '
    f'{math.prod(TIMED_SHAPE):,} elements:'
  )
  parts = [about, fine_tunes(), of_steps, steps(), of_rates, rates()]
  parts += [of_sliced, sliced_models()]
  yield common.Section(TITLE, '\n\n'.join(parts))
