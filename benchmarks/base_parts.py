"""Times files beside a base, and what bounds their speed, for benchmarks/base.py.

A large pair of models, in which each tensor has so many numbers that what a tensor
takes beside them counts for little; and the passes over the numbers of one block, each
alone and on one thread.
"""

from collections.abc import Callable
import pathlib
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import rotbits_jax
from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import pool
from rotbits_jax.relative import scales as differences
from rotbits_jax.structured import division

LAYERS = 12
SHAPES = {
  'q': (2048, 2048),
  'k': (512, 2048),
  'v': (512, 2048),
  'o': (2048, 2048),
  'gate': (5632, 2048),
  'up': (5632, 2048),
  'down': (2048, 5632),
}
"""The matrices of a layer of the large pair."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_RUNS, _BLOCK_RUNS = 2, 31
_SHIFT = 2e-4  # the standard deviation of the fine-tune's differences
_FIRST, _LAST = -24, 48  # the level of class 0, and the last class

Tensors = dict[str, np.ndarray]


def large_pair(step: Callable[[Tensors], Tensors]) -> str:
  """Measures a large pair; returns a table in Markdown.

  Args:
    step: makes a step of a training from a model.
  """
  rng = np.random.default_rng(0)
  normal = lambda shape: rng.standard_normal(shape, np.float32)
  old = {
    f'model.layers.{i}.{name}.weight': (
      0.02 * normal(shape) * np.exp(0.3 * normal((shape[0], 1)))
    ).astype(_BFLOAT16)
    for i in range(LAYERS)
    for name, shape in SHAPES.items()
  }
  tuned = {
    name: (x.astype(np.float32) + _SHIFT * normal(x.shape)).astype(_BFLOAT16)
    for name, x in old.items()
  }
  whole = sum(x.nbytes for x in old.values())
  lines = [
    f'| {whole / 1e9:.2f} GB, bfloat16 | bytes | of the model | encode MB/s | '
    'decode MB/s | load MB/s |',
    '|---|---|---|---|---|---|',
  ]
  cases = {'a fine-tune': lambda: tuned, 'a step: 1% of the numbers': lambda: step(old)}
  for case, make in cases.items():
    size, *times = whole_files(make(), old, _RUNS)
    rates = ' | '.join(f'{whole / x / 1e6:,.0f}' for x in times)
    lines.append(f'| {case} | {size:,} | {size / whole:.4f} | {rates} |')
  return '\n'.join(lines)


class Times(NamedTuple):
  """The bytes of a file, and the least seconds to encode, decode and load it."""

  nbytes: int
  encode: float
  decode: float
  load: float


def whole_files(new: Tensors, old: Tensors, runs: int) -> Times:
  """Encodes a checkpoint beside another, decodes it and checks its bits."""
  from safetensors import numpy as safetensors_numpy

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for part, tensors in (('new', new), ('old', old)):
      (folder / part).mkdir()
      safetensors_numpy.save_file(tensors, folder / part / 'model.safetensors')
    file, base, again = folder / 'x.rotbits', folder / 'old', folder / 'again'
    options: Any = {'base': base, 'overwrite': True}
    encode = lambda: rotbits_jax.encode_to_file(folder / 'new', file, **options)
    decode = lambda: rotbits_jax.decode_to_directory(file, again, **options)
    load = lambda: rotbits_jax.load(file, base=base)
    times = [min(seconds(x, runs)) for x in (encode, decode, load)]
    if not same_bits(safetensors_numpy.load_file(again / 'model.safetensors'), new):
      raise ValueError('other bits came back')
    return Times(file.stat().st_size, *times)


def same_bits(a: Tensors, b: Tensors) -> bool:
  bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  return a.keys() == b.keys() and all(
    np.array_equal(bits(a[name]), bits(b[name])) for name in a
  )


def passes() -> str:
  """Measures passes over the numbers of a block; returns a table in Markdown."""
  rng = np.random.default_rng(0)
  old = rng.standard_normal((1 << 10, 1 << 10), np.float32)
  new = old + np.float32(0.01) * rng.standard_normal(old.shape, np.float32)
  bits, known = (x.astype(_BFLOAT16).view(np.int16) for x in (new, old))
  flat, base, count = bits.reshape(-1), known.reshape(-1), bits.size
  kind = division.Kind.of(_BFLOAT16, 7)
  of_rows, of_columns = differences.scales(bits, known, _BFLOAT16, pool.in_turn)
  sums = division.Sums(of_rows, of_columns - np.int16(2 * _FIRST))
  fill = lambda out: sums.write(0, out)
  divide = lambda: division.divide(flat, base, fill, kind, _FIRST, _LAST)
  made = divide()
  classes, symbols = made.classes.copy(), np.zeros(blocks.CAPACITY, np.uint16)
  symbols[:count], raw = made.symbols, made.raw.copy()
  levels = np.arange(_FIRST, _FIRST + _LAST)
  shifts = np.append(division.shifts_of(levels, 16), 8).astype(np.uint8)
  counts = made.counts[: _LAST + 1]
  used, frequencies = counts.any(axis=1), np.zeros(counts.shape, np.int64)
  frequencies[used] = tables.quantize(counts[used])
  of_blocks = blocks.tables_of(frequencies)
  contexts = lambda out: np.copyto(out, classes)
  push = lambda: blocks.push(symbols, contexts, count, blocks.LANES, of_blocks)
  coded = push()
  pop = lambda: blocks.pop(coded, contexts, count, blocks.LANES, of_blocks)
  (at,) = np.nonzero(shifts[classes])
  popped = pop().copy(), at, raw[at].astype(np.uint32)
  join = lambda: division.join(
    base, fill, kind, np.arange(_LAST + 1, dtype=np.uint8), shifts, lambda _: popped
  )
  found, odd = join()
  if not np.array_equal(np.delete(found, odd), np.delete(flat, odd)):
    raise ValueError('other bits came back')
  scales = lambda: differences.scales(bits, known, _BFLOAT16, pool.in_turn)
  groups = {
    'encoding: the scales of rows and columns': scales,
    'encoding: classes, symbols and raw bits': divide,
    'encoding: pushing the symbols': push,
    'decoding: popping the symbols': pop,
    'decoding: the numbers of symbols and raw bits': join,
  }
  lines = ['| | ms | MB/s |', '|---|---|---|']
  totals = dict.fromkeys(('encoding', 'decoding'), 0.0)
  rate = lambda x: f'{1e3 * x:.1f} | {bits.nbytes / x / 1e6:,.0f}'
  for name, function in groups.items():
    median = statistics.median(seconds(function, _BLOCK_RUNS))
    totals[name.partition(':')[0]] += median
    lines.append(f'| {name} | {rate(median)} |')
  lines += [f'| {name}: all of these | {rate(x)} |' for name, x in totals.items()]
  return '\n'.join(lines)


def seconds(function: Callable[[], Any], runs: int) -> list[float]:
  """Returns the seconds of some runs."""
  found = []
  for _ in range(runs):
    start = time.perf_counter()
    function()
    found.append(time.perf_counter() - start)
  return found
