"""Finds the codes and the scales of arrays that were quantised and dequantised.

An element v = round(q s) bounds the scale s of its block to [v-, v+] / q, where v- and
v+ are the borders of the rounding to v. The code q is certain once the bounds of s
leave room for no other. So the search begins with the greatest element over the
greatest code, narrows the bounds by the elements whose codes are certain, and repeats.
All blocks of an array go through it together. In the end the array is computed from
codes and scales, and elements with other bits are exceptions.

Groups may have a minimum m, too: v = round(q s + m), q from 0 to 15, as in Q4_1 of
GGUF, or to 7, 31 or 63. Their least and greatest element tell q. Two elements whose
codes differ by k bound k s by the differences of their borders; given s, each element
bounds m.

Shape letters: U blocks have n elements each, or n distinct magnitudes.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools
import math
from typing import Any

import ml_dtypes
import numpy as np

from rotbits_jax import pool
from rotbits_jax import structured
from rotbits_jax.coding import coder
from rotbits_jax.coding import tables
from rotbits_jax.quantisers import grids
from rotbits_jax.quantisers import leaf as leaf_lib
from rotbits_jax.structured import ulps
from rotbits_jax.system import host

_LEAST = 1 << 12  # elements of an array
_LINES, _RUN = 16, 128  # rows or columns, and elements of each, that show repetitions
# The share that repeats another one of 128 and of 16: of dense bfloat16 about 0.1 and
# 0.01. Long runs show few large codes, short ones those of small groups.
_REPEATED = {
  'bfloat16': ((_RUN, 0.16), (16, 0.04)),
  'float16': ((_RUN, 0.06), (16, 0.03)),
  'float32': ((_RUN, 0.06), (16, 0.03)),
}
_SAMPLE = 1 << 12  # elements of a block that tell its grid, or blocks that tell shifts
_MOST_DISTINCT = 144  # magnitudes of a block; no grid has so many
_LENGTHS = 128, 64, 32, 16  # of groups
_BLOCKS = 4  # rows and columns of blocks of a sample
_FEW = 16  # of its magnitudes, with which most other grids do not agree
_FIT = 0.75  # share of the blocks of a sample that have scales
_ROUNDS = 6
_CERTAIN = 0.95  # of a step of a grid, which leaves no room for another code
_NEARLY = 1.01  # because errors of two quotients multiply, and float32 rounds them
_MOST_EXCEPTIONS = 1 / 64
_MORE = 257 / 256  # of the bytes of the array, because codes take less time to decode
_ENOUGH = 0.9  # of these, with exceptions
_FEW_EXCEPTIONS = 1 / 1024  # with more, the elements may have another form
_MOST_TRIED = 8  # forms
_EXCEPTION_BITS = 24
_SMALL_BLOCK = 32  # elements of blocks whose scales may be quantised, too
_CODES = 16, 8, 32, 64  # of groups with minima
_SCALES = 1 << 9  # that tell their factor
_GROUPS = 1 << 4  # in each row and in so many rows, that tell their length
_LEAF_BYTES = 200
_ESTIMATED = 1 << 15  # elements

Block = tuple[int, int]

# Elements may be any numbers; what follows from odd ones is compared with every bit.
_quiet = np.errstate(all='ignore')


@_quiet
def find(array: Any) -> leaf_lib.BlockQuantized | None:
  """Returns codes and scales of a leaf of a PyTree; None if they save no bytes.

  Leaves that are no array of bfloat16, float16 or float32 have none.
  """
  if structured.is_structured(array) or array.dtype.name not in _REPEATED:
    return None
  array = np.asarray(array)
  if not repeats(array):
    return None
  array = host.contiguous(array)
  magnitudes = _magnitudes(array)
  estimated = _estimate(array)
  leaf, least = None, _MORE * estimated
  for block, grid in _candidates(array, magnitudes):
    if leaf is not None and leaf.gaps is None and leaf.grid == grid:
      continue  # smaller blocks only have more scales
    found = _leaf(array, magnitudes, block, grid)
    if found and (size := nbytes(found)) < least:
      leaf, least = found, size
    exceptions = 0 if found is None or found.gaps is None else found.gaps.size
    most = _ENOUGH * estimated  # of bytes; with more, there may be a better form
    if leaf is not None and leaf.gaps is None:
      most = _MORE * estimated if leaf.numbers.dtype == np.int8 else estimated
    if least < most and exceptions < _FEW_EXCEPTIONS * array.size:
      return leaf
  if leaf is None and (found := _with_minima(array)) and nbytes(found) < least:
    return found
  return leaf


def repeats(array: np.ndarray) -> bool:
  """Returns whether many elements of some rows or columns are repeated.

  Of dtypes in which no codes are looked for, none are.
  """
  if array.dtype.name not in _REPEATED or array.size < _LEAST or array.ndim < 2:
    return False
  matrix = array.reshape(-1, array.shape[-1])
  for lines in (matrix, matrix.T):
    middle = lines.shape[1] // 2 // _RUN * _RUN  # the first tokens are often unused
    some = lines[:: max(len(lines) // _LINES, 1)][:_LINES, middle:][:, :_RUN]
    for run, share in _REPEATED[array.dtype.name]:
      run = min(run, some.shape[1])
      runs = some[:, : some.shape[1] // run * run].reshape(-1, run)
      ascending = np.sort(_magnitudes(runs), axis=1)
      is_used = ascending[:, 1:] > 0
      is_repeated = (ascending[:, 1:] == ascending[:, :-1]) & is_used
      used: Any = np.count_nonzero(is_used)  # with zeros, each has fewer to repeat
      if np.count_nonzero(is_repeated) > share * used * max(used / is_used.size, 1 / 4):
        return True
  return False


def nbytes(leaf: leaf_lib.BlockQuantized) -> float:
  """Estimates the bytes of a leaf in a file; of small arrays, by entropies of bytes."""
  arrays = leaf.stored()[1]
  estimated: Any = _estimate(arrays.pop('numbers')) + _LEAF_BYTES
  for array in arrays.values():
    columns = array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T
    estimated += sum(tables.entropy_bits(np.bincount(x)) for x in columns) / 8
  return estimated


def _estimate(array: np.ndarray) -> float:
  """Estimates the bytes of an array from some of its rows."""
  rows = array.reshape(-1, array.shape[-1])
  sample = np.ascontiguousarray(rows[:: -(-array.size // _ESTIMATED)])
  return coder.estimate([sample]) * len(rows) / len(sample)


def _magnitudes(array: np.ndarray) -> np.ndarray:
  """Returns the bits of a matrix without signs, and 0 for what is not finite."""
  matrix = array.reshape(-1, array.shape[-1]).view(f'u{array.itemsize}')
  bits = matrix & matrix.dtype.type(np.iinfo(f'i{array.itemsize}').max)
  infinite = np.array(np.inf, array.dtype).view(bits.dtype)
  bits *= bits < infinite
  return bits


def _blocks(shape: tuple[int, ...]) -> list[Block]:
  """Returns the forms of blocks, large ones first, because these have fewer scales."""
  rows, (height, width) = math.prod(shape[:-1]), shape[-2:]
  forms = [(rows, width), (height, width), (128, 128), (1, width), (height, 1)]
  for length in _LENGTHS:
    forms += [(1, length)] if length < width else []
    # Of several matrices, a cut group would end in the next one.
    forms += [(length, 1)] if height % length == 0 or length < height == rows else []
  return [x for x in forms if math.prod(x) >= min(_LENGTHS)]  # less fit any grid


def _candidates(
  array: np.ndarray, magnitudes: np.ndarray
) -> Iterator[tuple[Block, grids.Name]]:
  """Yields forms of blocks with grids that fit samples of them, likely ones first.

  These are the grid of the fewest magnitudes, in its largest blocks, because large
  blocks of float4 whose scales are powers of two are float8; and the largest blocks,
  because few small ones may fit a grid by chance.
  """
  grid_of = functools.cache(functools.partial(_grid, magnitudes, array.dtype))
  left = dict.fromkeys(_blocks(array.shape), tuple(grids.GRIDS))
  for i in range(_MOST_TRIED):
    names, found = tuple(grids.GRIDS), []
    for block, others in left.items():
      name = grid_of(block, tuple(x for x in others if x in names))
      if name is not None:
        names = names[: names.index(name)]
        found.append((block, name))
    if not found:
      return
    block, name = found[-1 if i % 2 == 0 else 0]
    yield block, name
    left[block] = left[block][left[block].index(name) + 1 :]


def _grid(
  magnitudes: np.ndarray, dtype: np.dtype, block: Block, names: Sequence[grids.Name]
) -> grids.Name | None:
  """Returns the first of the grids that fits a sample of blocks, or None."""
  if not names:
    return None
  counts = [max(n // m, 1) for n, m in zip(magnitudes.shape, block, strict=True)]
  places = [np.unique(np.linspace(0, n - 1, _BLOCKS).astype(int)) for n in counts]
  parts = []
  for i, j in itertools.product(*places):
    part = magnitudes[i * block[0] :, j * block[1] :][: block[0], : block[1]]
    some = part.reshape(-1)[:: -(-part.size // _SAMPLE)]
    parts.append(np.append(some, part.max()))
  bits = _distinct(np.stack(parts))
  bits = bits[:, bits.any(axis=0)]
  if not bits.size:
    return None
  distinct = np.median(np.count_nonzero(bits, axis=0))
  few = _borders(bits[:: -(-len(bits) // _FEW)], dtype)
  for name in names:
    grid = grids.GRIDS[name]
    can_fit = distinct < len(grid.magnitudes) and _may_fit(*few, grid) >= _FIT
    if can_fit and _bounds(bits.T, dtype, grid)[1] >= _FIT:
      return name
  return None


def _may_fit(low: np.ndarray, high: np.ndarray, grid: grids.Grid) -> float:
  """Returns the share of blocks that a grid may fit, given borders `[n, U]` of a few.

  The first row has the greatest elements. Each may have any of the likely codes.
  """
  middle, relative = (low + high) / 2, (high - low) / (high + low)
  tops = grid.magnitudes[[*grid.tops], None, None]
  quotients = middle / middle[0] * tops
  errors = np.abs(quotients - grid.nearest(quotients)[0])
  is_wrong = errors > _NEARLY * quotients * (relative + relative[0])
  return float(np.mean(~is_wrong.any(axis=1).all(axis=0)))


def _distinct(rows: np.ndarray) -> np.ndarray:
  """Returns the distinct magnitudes of each row, and zeros: `[n, U]`.

  Of more than `_MOST_DISTINCT` the greatest are taken.
  """
  rows = np.sort(rows, axis=1)
  rows[:, :-1] *= rows[:, 1:] != rows[:, :-1]
  rows.sort(axis=1)
  count = int(np.count_nonzero(rows, axis=1).max())
  greatest = rows[:, ::-1][:, : min(max(count, 1), _MOST_DISTINCT)]
  return np.ascontiguousarray(greatest.T)


# ---- scales --------------------------------------------------------------------------


def _borders(bits: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
  """Returns the least and the greatest number that is rounded to each magnitude."""
  wide = np.dtype(np.float32 if dtype.itemsize == 2 else np.float64)
  numbers = lambda x: x.view(dtype).astype(wide)
  middle = numbers(bits)
  low = (numbers(bits - (bits > 0)) + middle) / 2
  high = (middle + numbers(bits + 1)) / 2
  # A number between two neighbours is rounded to the even one.
  is_odd = (bits & 1).astype(f'i{wide.itemsize}')
  low, high = low.view(is_odd.dtype) + is_odd, high.view(is_odd.dtype) - is_odd
  high = high.view(wide)
  high *= bits > 0  # processors divide subnormal numbers slowly
  return low.view(wide), high


def _narrowed(
  low: np.ndarray, high: np.ndarray, grid: grids.Grid, top: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the bounds of scales `[U]`, given those of elements `[n, U]`.

  The greatest element of each block has the code `top`.
  """
  middle = (low + high) / 2
  relative = (high - low) / (2 * middle)
  least, most = (x.max(axis=0) / grid.magnitudes[top] for x in (low, high))
  count: Any = -1
  for _ in range(_ROUNDS):
    scale = (least + most) / 2
    quotients = middle / scale
    numbers, gaps = grid.nearest(quotients)
    spread = quotients * (relative + (most - least) / (2 * scale))
    errors = np.abs(quotients - numbers)
    is_certain = (numbers > 0) & (errors <= _NEARLY * spread)
    is_certain &= errors + spread < _CERTAIN * gaps
    if count == (count := np.count_nonzero(is_certain)):
      break
    least = np.maximum(least, np.where(is_certain, low / numbers, 0).max(axis=0))
    most = np.minimum(most, np.where(is_certain, high / numbers, np.inf).min(axis=0))
    is_empty = least > most
    least, most = (np.where(is_empty, scale, x) for x in (least, most))
  return least, most


def _bounds(
  rows: np.ndarray, dtype: np.dtype, grid: grids.Grid
) -> tuple[np.ndarray, float]:
  """Returns the bounds of scales, `[2, U]`, and the share of blocks that they fit.

  `rows` have the magnitudes of a block each. Zeros have the bounds 0 and infinity.
  """
  bounds = np.zeros((2, len(rows)), np.float32 if dtype.itemsize == 2 else np.float64)
  bounds[1] = np.inf
  left, step = np.flatnonzero(rows.any(axis=1)), max(leaf_lib.CHUNK // rows.shape[1], 1)

  @_quiet
  def missed(top: int, start: int) -> np.ndarray:
    places = left[start : start + step]
    bits = _distinct(rows[places])
    low, high = _borders(bits, dtype)
    pair = np.stack(_narrowed(low, high, grid, top))
    scale = pair.mean(axis=0).astype(np.float32)
    numbers, _ = grid.nearest((low + high) / (2 * scale))
    fits = ((numbers * scale).astype(dtype).view(bits.dtype) == bits).all(axis=0)
    is_taken = fits | (top == grid.tops[0])
    bounds[:, places[is_taken]] = pair[:, is_taken]
    return places[~fits]

  for top in grid.tops:
    starts = range(0, left.size, step)
    parts = pool.each(functools.partial(missed, top), starts)
    left = np.concatenate([left[:0], *parts])
  return bounds, 1 - left.size / len(rows)


def _leaf(
  array: np.ndarray, magnitudes: np.ndarray, block: Block, name: grids.Name
) -> leaf_lib.BlockQuantized | None:
  """Returns the leaf of an array, given its blocks and its grid."""
  grid = grids.GRIDS[name]
  paddings = [(0, -n % m) for n, m in zip(magnitudes.shape, block, strict=True)]
  padded = np.pad(magnitudes, paddings)
  blocks = padded.reshape(-1, block[0], padded.shape[1] // block[1], block[1])
  rows_of_blocks = blocks.swapaxes(1, 2).reshape(-1, math.prod(block))
  bounds, _ = _bounds(rows_of_blocks, array.dtype, grid)
  is_negative = np.signbit(array).reshape(magnitudes.shape)
  is_float8 = name.startswith('float8')
  has_signs = not is_float8 and bool((is_negative & (magnitudes == 0)).any())
  dtype = getattr(ml_dtypes, name) if is_float8 else np.int8
  numbers = host.empty(magnitudes.shape, dtype)
  draft = _draft(array, numbers, name, block, bounds)
  draft = draft.replace(ones_complement=has_signs)

  @_quiet
  def divide(rows: slice) -> None:
    scales = leaf_lib.of_elements(draft.float_scales, rows, block, numbers.shape)
    quotients = magnitudes[rows].view(array.dtype).astype(np.float32) / scales
    found = np.copysign(grid.nearest(quotients)[0], 0.5 - is_negative[rows])
    if is_float8:
      numbers[rows] = grids.float8(name, found)
      return
    found /= grid.unit or 1
    if has_signs:
      found -= is_negative[rows]
    numbers[rows] = found.clip(-128, 127)

  step = max(leaf_lib.CHUNK // numbers.shape[1], 1)
  starts = range(0, len(numbers), step)
  pool.each(divide, [slice(start, start + step) for start in starts])
  return _with_exceptions(draft, array)


def _with_exceptions(
  draft: leaf_lib.BlockQuantized, array: np.ndarray
) -> leaf_lib.BlockQuantized | None:
  """Adds the elements that a leaf does not give back; None if these are many."""
  if draft.float_scales.min() < leaf_lib.LEAST:
    return None
  places = np.flatnonzero(ulps.bits_of(draft.materialize()) != ulps.bits_of(array))
  if places.size > _MOST_EXCEPTIONS * array.size or array.size >> 32:
    return None
  if places.size:
    gaps = (np.diff(places, prepend=-1) - 1).astype(np.uint32)
    draft = draft.replace(gaps=gaps, exceptions=array.reshape(-1)[places])
  return draft


def _draft(
  array: np.ndarray, numbers: np.ndarray, grid: Any, block: Block, bounds: np.ndarray
) -> leaf_lib.BlockQuantized:
  """Returns a leaf with scales of few bits, all of which have one effect in bounds."""
  least, most = bounds
  is_used, size = most < np.inf, math.prod(block)
  floats, shift, bits = _fewest_bits(least, most, _EXCEPTION_BITS * size)
  factor = None
  if size <= _SMALL_BLOCK and is_used.any():
    found, quantised, missed = _factor(least[is_used], most[is_used])
    if 3 * least.size + _EXCEPTION_BITS * size * missed < bits:
      floats[is_used], factor, shift = quantised, found, 20
  floats[~is_used] = floats[is_used][0] if is_used.any() else 1
  columns = -(-array.shape[-1] // block[1])
  scales, form = leaf_lib.encoded(floats.reshape(-1, columns), shift)
  return leaf_lib.BlockQuantized(
    numbers=numbers.reshape(array.shape),
    scales=scales,
    grid=grid,
    name=array.dtype.name,  # type: ignore[arg-type]
    block=block,
    scale_form=form,
    factor=factor,
  )


def _between(
  low: np.ndarray, high: np.ndarray, shift: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns float32 whose low bits are 0, and whether they are within bounds `[U]`."""
  sides = [x.astype(np.float32).view(np.uint32).astype(np.int64) for x in (low, high)]
  bits = ((sides[0] + sides[1] >> 1) + (1 << shift >> 1)) >> shift << shift
  numbers = bits.astype(np.uint32).view(np.float32)
  return numbers, (numbers >= low) & (numbers <= high)


def _fewest_bits(
  low: np.ndarray, high: np.ndarray, cost: int
) -> tuple[np.ndarray, int, float]:
  """Returns float32 in bounds `[U]`, how many low bits are 0, and about the bits.

  A number that is not within its bounds costs so many bits.
  """
  some = slice(None, None, -(-low.size // _SAMPLE))
  bits = lambda is_within, shift: cost * np.mean(~is_within) + 23 - shift
  shift = min(range(24), key=lambda x: bits(_between(low[some], high[some], x)[1], x))
  numbers, is_within = _between(low, high, shift)
  return numbers, shift, bits(is_within, shift) * low.size


def _factor(low: np.ndarray, high: np.ndarray) -> tuple[Any, np.ndarray, int]:
  """Finds scales that are float8 numbers times a factor, which is a scale of these.

  Returns the factor, the numbers, and how many scales have none.
  """
  grid = grids.GRIDS['float8_e4m3fn']
  places = np.arange(0, low.size, max(low.size // _SCALES, 1))
  places = np.append(places, np.argmax(low))
  for top in grid.tops:
    pair = _narrowed(low[places, None], high[places, None], grid, top)
    factor = ((pair[0] + pair[1]) / 2).astype(np.float32)
    for some in (places, slice(None)):
      numbers, _ = grid.nearest((low[some] + high[some]) / 2 / factor)
      is_within = (numbers * factor >= low[some]) & (numbers * factor <= high[some])
      if is_within.mean() < 0.95:
        break
    else:
      numbers = np.maximum(numbers, grid.magnitudes[1])
      return np.array(factor[0]), numbers, int(np.count_nonzero(~is_within))
  return None, low, low.size


# ---- minima --------------------------------------------------------------------------


def _with_minima(array: np.ndarray) -> leaf_lib.BlockQuantized | None:
  """Returns the leaf of an array whose groups have minima, or None."""
  forms = [(1, x) for x in _LENGTHS if array.shape[-1] % x == 0]
  forms += [(x, 1) for x in _LENGTHS if array.shape[-2] % x == 0]
  for count, (rows, columns) in itertools.product(_CODES, forms):
    shape = -1, rows, array.shape[-1] // columns, columns
    blocks = array.reshape(shape).transpose(1, 3, 0, 2)
    few = [slice(None, None, max(n // _GROUPS, 1)) for n in blocks.shape[2:]]
    (least, most), *_ = _code_bounds(blocks[:, :, *few], count)
    if np.mean(least <= most) < _FIT:
      continue
    step = max(leaf_lib.CHUNK // blocks[:, :, 0].size, 1)
    some = [blocks[:, :, x : x + step] for x in range(0, blocks.shape[2], step)]
    parts = pool.each(functools.partial(_code_bounds, count=count), some)
    whole = (np.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
    bounds, codes, lows, highs = whole
    numbers = codes.reshape(blocks.shape).transpose(2, 0, 3, 1).reshape(array.shape)
    grid = 'int4' if count <= 16 else 'int8'
    draft = _draft(array, numbers, grid, (rows, columns), bounds)
    return _with_exceptions(_add_minima(draft, bounds, lows, highs), array)
  return None


def _add_minima(
  draft: leaf_lib.BlockQuantized,
  bounds: np.ndarray,
  lows: np.ndarray,
  highs: np.ndarray,
) -> leaf_lib.BlockQuantized:
  """Adds minima of few bits; a neighbour of a scale may take the place of the scale."""

  def limits(scales: np.ndarray, some: Any) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.full(scales.size, -np.inf), np.full(scales.size, np.inf)
    for level, (least, most) in enumerate(zip(lows, highs, strict=True)):
      products = (np.float32(level) * scales).astype(float)
      np.maximum(low, least[some] - products, out=low)
      np.minimum(high, most[some] - products, out=high)
    return low, high

  low, high = limits(draft.float_scales.reshape(-1), slice(None))
  # Most minima of few bits that are missed fit a neighbour of the scale.
  for cost in (_EXCEPTION_BITS // 2, _EXCEPTION_BITS * len(lows) // 2):
    minima, shift, _ = _fewest_bits(low, high, cost)
    left = np.flatnonzero((minima < low) | (minima > high))
    codes = draft.scales.reshape(-1).astype(int)
    for step in (1, -1, 2, -2):
      scales = draft.replace(scales=codes[left] + step).float_scales
      found, fits = _between(*limits(scales, left), shift)
      fits &= (scales >= bounds[0, left]) & (scales <= bounds[1, left])
      minima[left[fits]] = found[fits]
      codes[left[fits]] += step
      left = left[~fits]
    if left.size <= _FEW_EXCEPTIONS * low.size:
      break
  scales = leaf_lib.decoded(codes, draft.scale_form).reshape(draft.scales.shape)
  scales, scale_form = leaf_lib.encoded(scales, draft.scale_form[1])
  minima, minimum_form = leaf_lib.encoded(minima.reshape(scales.shape), shift)
  draft = draft.replace(scales=scales, scale_form=scale_form)
  return draft.replace(minima=minima, minimum_form=minimum_form)


@_quiet
def _code_bounds(blocks: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
  """Returns bounds of the scales of blocks, codes, and borders of codes.

  Blocks are `[rows, columns, ...]`; U are taken as `[n, U]`. The borders, `[count, U]`,
  of codes that a block does not have are infinite.
  """
  groups = np.ascontiguousarray(blocks.reshape(math.prod(blocks.shape[:2]), -1))
  numbers, size = groups.astype(np.float32), groups.shape[1]
  numbers[~np.isfinite(numbers)] = 0
  numbers *= np.float32(0.5)  # so that differences are finite
  numbers -= numbers.min(axis=0)
  steps = (count - 1) / numbers.max(axis=0)
  numbers *= np.where(np.isfinite(steps), steps, 0)  # 0 of equal or subnormal numbers
  np.rint(numbers, out=numbers)
  codes = numbers.astype(np.int8)
  # One element of each code; the NaN of these bits stands for none.
  missing = np.iinfo(f'u{groups.itemsize}').max
  found = np.full((count, size), missing, f'u{groups.itemsize}')
  places = codes.astype(np.intp) * size + np.arange(size)
  found.reshape(-1)[places] = groups.view(found.dtype)
  low, high = _borders(_magnitudes(found.view(groups.dtype)), groups.dtype)
  is_negative, is_missing = found >> 8 * found.itemsize - 1 > 0, found == missing
  lows, highs = np.where(is_negative, -high, low), np.where(is_negative, -low, high)
  np.copyto(lows, -np.inf, where=is_missing)
  np.copyto(highs, np.inf, where=is_missing)
  least, most = np.zeros(size), np.full(size, np.inf)
  for k in range(1, count):
    least = np.maximum(least, (lows[k:] - highs[:-k]).max(axis=0) / k)
    most = np.minimum(most, (highs[k:] - lows[:-k]).min(axis=0) / k)
  return np.stack([least, most]), codes, lows, highs
