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
from typing import Any

import jax
import ml_dtypes
import numpy as np
import zstandard

from benchmarks import common
import rotbits_jax

TITLE = 'Relative to a base'
RATES = 3e-7, 1e-6, 3e-6  # learning rates
STEPS = 1, 8, 32  # after which weights are sent
LARGE = 10**6  # elements of a large tensor
TIMED_SHAPE, TIMED_RATE = (4096, 2560), 1e-6  # of two tensors that are timed
RUNS = 9
SLICED = {
  'llama-tiny-sliced-head-0.25': 'llama-tiny-dense',
  'phi2-tiny-sliced-0.25': 'phi2-tiny-dense',
  'phi3-tiny-sliced-0.25': 'phi3-tiny-dense',
}
"""Models of tests/testdata that Microsoft's code sliced, and their dense models."""

Method = tuple[Callable[..., Any], Callable[..., common.Tensors]]
"""From tensors and those of the base to what is stored, and back."""


def training(
  masters: common.Tensors, rates: Sequence[float]
) -> Iterator[list[common.Tensors]]:
  """Yields bfloat16 weights after each of `STEPS` of Adam, for gradients of noise.

  They are those of each learning rate, which share the gradients.
  """
  rng, first, second = np.random.default_rng(1), 0.9, 0.999
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


def each(
  forward: Callable[..., list[bytes]], back: Callable[..., np.ndarray]
) -> Method:
  """Makes a method for several tensors of one for the bits of a tensor."""
  return (
    lambda new, old: {k: forward(_bits(x), _bits(old[k])) for k, x in new.items()},
    lambda coded, old: {k: back(x, _bits(old[k])) for k, x in coded.items()},
  )


def _bits(array: np.ndarray) -> np.ndarray:
  """Returns the bits of an array, flat."""
  return array.reshape(-1).view(f'u{array.itemsize}')


METHODS: dict[str, Method] = {
  '`exact`': (
    lambda new, old: rotbits_jax.encode(new, base=old),
    lambda coded, old: rotbits_jax.decode(coded, base=old),
  ),
  'XOR, byte planes, zstd -3': each(bitx, of_bitx),
  '`delta`': (rotbits_jax.delta, rotbits_jax.apply),
  'gaps and values, zstd -1': each(gaps, of_gaps),  # much as PULSE
  'XOR, zstd -1': each(xor, of_xor),  # as slime sends weights
  'indices and values': each(sparse, of_sparse),
}
OF_FINE_TUNES, OF_STEPS = [*METHODS][:2], [*METHODS][2:]


def measure(
  method: str, new: common.Tensors, old: common.Tensors, *, timed: bool = True
) -> tuple[int, list[str]]:
  """Returns the bytes of a method, and its MB/s in memory, there and back, if timed."""
  forward, back = METHODS[method]
  coded = forward(new, old)
  for name, found in back(coded, old).items():
    if not np.array_equal(_bits(found), _bits(new[name])):
      raise ValueError(f'{method} gave other weights')
  size = sum(x.nbytes for x in new.values())
  works = (lambda: forward(new, old), lambda: back(coded, old)) if timed else ()
  rates = [f'{size / common.median_seconds(x, RUNS) / 1e6:,.0f}' for x in works]
  return sum(map(len, jax.tree.leaves(coded))), rates


def fine_tunes() -> str:
  """Returns the table of fine-tunes."""
  base, tuned = map(common.packaged_weights, (common.BASE, common.TUNED))
  subjects = [(f'fine-tune, {x}', x, tuned) for x in ('bfloat16', 'float16', 'float32')]
  lines = []
  for name, dtype, path in (*subjects, ('an equal model, bfloat16', 'bfloat16', base)):
    new, old = (common.read_tensors(x, dtype) for x in (path, base))
    size = sum(x.nbytes for x in new.values())
    for method in OF_FINE_TUNES:
      coded, rates = measure(method, new, old)
      cells = common.megabytes(coded), f'{coded / size:.4f}'
      lines.append((name, method, *cells, *rates))
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
      sizes = [measure(x, new, old, timed=False)[0] for x in OF_STEPS]
      changed = sum(np.count_nonzero(_bits(x) != _bits(old[k])) for k, x in new.items())
      large = {name: x for name, x in new.items() if x.size >= LARGE}
      shares = [x / bound for x in sizes]
      near = {name: old[name] for name in large}
      shares.insert(1, len(rotbits_jax.delta(large, near)) / entropy(large, near))
      cells = f'{2 * changed / size:.2%}', common.megabytes(bound)
      lines.append((f'{rate:g}', count, *cells, *(f'{x:.2f}' for x in shares)))
  header = ['learning rate', 'steps', 'changed', 'entropy, MB']
  header += [OF_STEPS[0], 'large', *OF_STEPS[1:]]
  return common.table(header, lines)


def rates() -> str:
  """Returns the table of rates for a step of two large tensors."""
  rng = np.random.default_rng(0)
  draw = lambda: 0.02 * rng.standard_normal(TIMED_SHAPE, np.float32)
  masters = {name: draw() for name in ('a', 'b')}
  old = {name: x.astype(ml_dtypes.bfloat16) for name, x in masters.items()}
  (new,) = next(training(masters, [TIMED_RATE]))
  lines = []
  for method in OF_STEPS:
    coded, speeds = measure(method, new, old)
    lines.append((method, common.megabytes(coded), *speeds))
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
