"""Leaves for arrays of few distinct numbers, in a file. Shape letters: see `packed`.

Numbers that were dequantised have few levels: a block of them holds
`base + step * index` for small integers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from flax import struct
import ml_dtypes
import numpy as np

from rotbits_jax.structured import packed
from rotbits_jax.structured import ulps
from rotbits_jax.structured.base import register
from rotbits_jax.structured.fields import Arrays
from rotbits_jax.structured.fields import Settings
from rotbits_jax.structured.stored import Stored


class Grid(NamedTuple):
  """A guess how the numbers of an array were quantised.

  Attributes:
    transposed: see `Packed`.
    block: the length of a block along a line. It divides N.
    has_base: whether the least number of a block is its base; otherwise the base is 0.
    counts: the possible numbers of steps from the base of a block to the number that is
      farthest from it; the most probable first.
    precision: significant bits of a step, at most 24.
  """

  transposed: bool
  block: int
  has_base: bool
  counts: tuple[int, ...]
  precision: int


@register
@struct.dataclass
class Levels(packed.Packed):
  """An array whose blocks hold few levels: `base + step * index`.

  A product, and a sum if there is a base, are computed in float32 and rounded to the
  dtype. NumPy computes both on the host, so that they have the same bits everywhere. If
  some numbers come out differently, residuals correct all of them. A residual is the
  ordinal of the number minus the ordinal of the computed number. An ordinal is an
  integer that counts the numbers of the dtype upwards, -0 before +0.

  Attributes:
    name: name of the dtype.
    index: `[L, N]`: uint8 if there is a base, else int8.
    step: float32 `[L, N / block]`.
    base: float32 `[L, N / block]`; None if all bases are 0.
    residuals: int8 `[L, N]`, or None. -128 marks an exception.
    exceptions: `[n]`, the numbers with the residual -128, line by line; or None.
  """

  type_name: ClassVar[str] = 'levels'

  name: str = struct.field(pytree_node=False)
  index: Any
  step: Any
  base: Any = None
  residuals: Any = None
  exceptions: Any = None

  @classmethod
  def from_array(cls, array: np.ndarray, grid: Grid) -> 'Levels':
    """Makes the leaf of an array of a dtype in `packed.PACKED_DTYPES`."""
    lines = packed.lines_of(array, grid.transposed)
    count, length = lines.shape
    per_line = length // grid.block
    index = np.empty(lines.shape, np.uint8 if grid.has_base else np.int8)
    step = np.empty((count, per_line), np.float32)
    base = np.empty_like(step) if grid.has_base else None
    residuals, exceptions = np.zeros(lines.shape, np.int8), []
    for rows in _chunks(lines.shape):
      part = np.ascontiguousarray(lines[rows])
      fitted = fit(part.reshape(-1, grid.block), grid)
      index[rows] = fitted.indices.reshape(part.shape)
      step[rows] = fitted.step.reshape(-1, per_line)
      if fitted.base is not None and base is not None:
        base[rows] = fitted.base.reshape(-1, per_line)
      computed = fitted.numbers.reshape(part.shape)
      if not np.array_equal(packed.bits(computed), packed.bits(part)):
        off = ulps.index(part) - ulps.index(computed)  # wraps
        off = np.where(abs(off) < -_EXCEPTION, off, _EXCEPTION)
        residuals[rows] = off
        exceptions.append(part[residuals[rows] == _EXCEPTION])
    none = np.zeros(0, array.dtype)
    return cls(
      sizes=array.shape,
      transposed=grid.transposed,
      name=array.dtype.name,
      index=index,
      step=step,
      base=base,
      residuals=residuals if exceptions else None,
      exceptions=np.concatenate([none, *exceptions]) if exceptions else None,
    )

  @property
  def dtype(self) -> Any:
    return packed.PACKED_DTYPES[self.name]

  def array(self) -> np.ndarray:
    array, lines = self._empty()
    used = 0
    for rows in _chunks(lines.shape):
      step = self.step[rows]
      index = self.index[rows].reshape(step.size, -1)
      base = None if self.base is None else self.base[rows].reshape(-1, 1)
      part = _numbers(index, step.reshape(-1, 1), base, self.dtype)
      part = part.reshape(step.shape[0], lines.shape[1])
      if self.residuals is not None:
        off = self.residuals[rows]
        part = ulps.number(ulps.index(part) + off, self.dtype)
        odd = off == _EXCEPTION
        count = int(np.count_nonzero(odd))
        own = self.exceptions[used : used + count]
        if own.size != count:
          raise ValueError(f'{self.exceptions.size} exceptions are too few')
        part[odd] = own
        used += count
      lines[rows] = part
    if self.exceptions is not None and self.exceptions.size != used:
      raise ValueError(f'{used} exceptions are expected, got {self.exceptions.size}')
    return array

  def stored(self) -> tuple[Settings, Arrays]:
    arrays = {name: getattr(self, name) for name in ('index', 'step', *_OPTIONAL)}
    settings = self._settings() | {'dtype': self.name}
    return settings, {name: x for name, x in arrays.items() if x is not None}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Levels':
    given = Stored(settings, arrays)
    form = packed.take_form(given)
    dtype, lines = packed.float_dtype(given.text('dtype')), form.lines
    step = given.array('step', 2, np.float32)
    base = residuals = exceptions = None
    if 'base' in given:
      base = given.array_of('base', step.shape, np.float32)
    index = given.array_of('index', lines, np.int8 if base is None else np.uint8)
    if 'residuals' in given:
      residuals = given.array_of('residuals', lines, np.int8)
      exceptions = given.array('exceptions', 1, dtype)
    given.finish()
    if step.shape[0] != lines[0] or lines[1] % max(step.shape[1], 1):
      raise ValueError(f'steps of shape {step.shape} do not fit {lines=}')
    return cls(
      sizes=form.sizes,
      transposed=form.transposed,
      name=dtype.name,
      index=index,
      step=step,
      base=base,
      residuals=residuals,
      exceptions=exceptions,
    )


_OPTIONAL = 'base', 'residuals', 'exceptions'
_EXCEPTION = -128


class Fit(NamedTuple):
  """Blocks of numbers on grids.

  Attributes:
    indices: `[n, block]`.
    step: float32 `[n, 1]`.
    base: float32 `[n, 1]`; None without bases.
    numbers: the numbers that these give, `[n, block]`.
    missed: how many of them differ from the given numbers in each block, `[n]`.
  """

  indices: np.ndarray
  step: np.ndarray
  base: np.ndarray | None
  numbers: np.ndarray
  missed: np.ndarray


def fit(blocks: np.ndarray, grid: Grid) -> Fit:
  """Finds base, step and indices of blocks.

  Args:
    blocks: numbers of a dtype in `packed.PACKED_DTYPES`, `[n, block]`, contiguous.
    grid: the grid. For each block the function takes the count that gives the numbers
      best.

  Returns:
    The fit.
  """
  found = fit_counts(blocks, np.full(len(blocks), grid.counts[0]), grid)
  for count in grid.counts[1:]:
    (todo,) = np.nonzero(found.missed)
    if not todo.size:
      break
    other = fit_counts(blocks[todo], np.full(todo.size, count), grid)
    better = other.missed < found.missed[todo]
    _replace(found, todo[better], other, better)
  return found


def fit_counts(blocks: np.ndarray, counts: np.ndarray, grid: Grid) -> Fit:
  """Finds base, step and indices of blocks with a known number of steps.

  Base and step must be such that each number is rounded correctly. The step is the
  middle of the values that all numbers of a block allow. The base is the least number
  of the block. If its dtype rounds the true base too coarsely, the function looks for a
  better one around the base of a line through the numbers.

  Args:
    blocks: numbers of a dtype in `packed.PACKED_DTYPES`, `[n, block]`, contiguous.
    counts: the number of steps of each block, see `Grid`, `[n]`.
    grid: the grid; its counts are not used.

  Returns:
    The fit.
  """
  with np.errstate(all='ignore'):
    wide = blocks.astype(np.float32)
    wide[~np.isfinite(wide)] = 0
    half = _half_spacing(wide, blocks.dtype)
    wide = wide.astype(np.float64)
    least = wide.min(axis=1, keepdims=True) if grid.has_base else np.zeros((1, 1))
    rough = np.abs(wide - least).max(axis=1, keepdims=True) / counts[:, None]
    exact = (wide - least) / rough
    index = np.rint(exact)
    is_grid = np.abs(exact - index).mean(axis=1) < _MOST_OFF
    index[~np.isfinite(index)] = 0  # all numbers of the block are equal
    index = np.clip(index, *((0, 255) if grid.has_base else (-128, 127)))
    if not grid.has_base:
      # With a negative step the index 0 stands for -0.
      zero = packed.bits(blocks) << 1 == 0
      negative = (zero & np.signbit(blocks)).any(axis=1, keepdims=True)
      # The index -128 has no opposite, but it is clipped here only if it is wrong.
      index = np.where(negative, np.clip(-index, -128, 127), index)
      return _with_base(blocks, wide, half, index, None, grid)
    found = _with_base(blocks, wide, half, index, _rounded(least, grid.precision), grid)
    (todo,) = np.nonzero((found.missed > 0) & is_grid)
    if todo.size:
      base = _rounded(_line_base(wide[todo], half[todo], index[todo]), grid.precision)
    for offset in _OFFSETS:
      if not todo.size:
        break
      near = base.view(np.int32) + np.int32(offset << 24 - grid.precision)
      part = blocks[todo], wide[todo], half[todo], index[todo]
      other = _with_base(*part, near.view(np.float32), grid)
      better = other.missed < found.missed[todo]
      _replace(found, todo[better], other, better)
      left = found.missed[todo] > 0
      todo, base = todo[left], base[left]
  return found


# The mean distance of the quotients from integers, if the number of steps is right.
# Otherwise it is 0.25.
_MOST_OFF = 0.1

# Bases that are tried, in units of the last significant bit from that of the line.
_OFFSETS = 0, 1, -1, 2, -2, 3, -3, 4, -4


def _with_base(
  blocks: np.ndarray,
  wide: np.ndarray,
  half: np.ndarray,
  index: np.ndarray,
  base: np.ndarray | None,
  grid: Grid,
) -> Fit:
  """Fits the step of blocks whose indices and base are known.

  Args:
    blocks: the numbers, `[n, block]`.
    wide: the numbers in float64.
    half: see `_half_spacing`.
    index: the indices in float64.
    base: float32 `[n, 1]`; None for 0.
    grid: the grid.
  """
  above = wide if base is None else wide - base
  bounds = (above - half) / index, (above + half) / index
  least = np.max(
    np.minimum(*bounds), axis=1, keepdims=True, where=index != 0, initial=-np.inf
  )
  most = np.min(
    np.maximum(*bounds), axis=1, keepdims=True, where=index != 0, initial=np.inf
  )
  middle = np.where(most < np.inf, (least + most) / 2, 0)
  step = _rounded(middle, grid.precision)
  kept = index.astype(np.int8 if base is None else np.uint8)
  numbers = _numbers(kept, step, base, blocks.dtype)
  missed = np.count_nonzero(packed.bits(numbers) != packed.bits(blocks), axis=1)
  return Fit(kept, step, base, numbers, missed)


def _line_base(wide: np.ndarray, half: np.ndarray, index: np.ndarray) -> np.ndarray:
  """Returns the base of the line through numbers, by weighted least squares."""
  total = lambda x: x.sum(axis=1, keepdims=True)
  weights = half**-2
  weights /= total(weights)
  centre, mean = total(weights * index), total(weights * wide)
  off = index - centre
  step = total(weights * off * (wide - mean)) / total(weights * off**2)
  return mean - np.where(np.isfinite(step), step, 0) * centre


def _replace(fit: Fit, places: np.ndarray, other: Fit, chosen: np.ndarray) -> None:
  """Puts the chosen blocks of another fit into their places, in place."""
  for old, new in zip(fit, other, strict=True):
    if old is not None and new is not None:
      old[places] = new[chosen]


@register
@struct.dataclass
class Table(packed.Packed):
  """An array of few distinct numbers: an index into a table for each.

  Attributes:
    table: the numbers of a table in ascending order of their bit patterns, `[L, n]`
      with a table for each line or `[1, n]` with one for all. The greatest may be
      repeated.
    index: uint8 `[L, N]`.
  """

  type_name: ClassVar[str] = 'table'
  MOST: ClassVar[int] = 256

  table: Any
  index: Any

  @classmethod
  def from_array(
    cls, array: np.ndarray, *, transposed: bool, of_lines: bool
  ) -> 'Table | None':
    """Makes the leaf of an array of a dtype in `packed.PACKED_DTYPES`.

    Args:
      array: the array.
      transposed: see `Packed`.
      of_lines: whether each line has a table of its own.

    Returns:
      The leaf; None if a table would have more than `MOST` numbers.
    """
    lines = packed.lines_of(packed.bits(array), transposed)
    tables = []
    for rows in [lines] if not of_lines else lines[:, None]:
      known = np.zeros(0, lines.dtype)
      for part in _chunks(rows.shape):
        known = np.unique(np.concatenate([known, rows[part].reshape(-1)]))
        if known.size > cls.MOST:
          return None
      tables.append(known)
    width = max(x.size for x in tables)
    padded = np.stack([np.pad(x, (0, width - x.size), 'edge') for x in tables])
    index = np.empty(lines.shape, np.uint8)
    if of_lines:
      for own, line, out in zip(tables, lines, index, strict=True):
        out[...] = np.searchsorted(own, line)
    else:
      for rows in _chunks(lines.shape):
        index[rows] = np.searchsorted(tables[0], lines[rows])
    return cls(array.shape, transposed, padded.view(array.dtype), index)

  @property
  def dtype(self) -> Any:
    return self.table.dtype

  def array(self) -> np.ndarray:
    array, lines = self._empty()
    if self.index.max(initial=0) >= self.table.shape[1]:
      raise ValueError(f'an index is beyond a table of {self.table.shape[1]} numbers')
    for rows in _chunks(lines.shape):
      if len(self.table) == 1:
        lines[rows] = self.table[0][self.index[rows]]
      else:
        lines[rows] = np.take_along_axis(self.table[rows], self.index[rows], axis=1)
    return array

  def stored(self) -> tuple[Settings, Arrays]:
    return self._settings(), {'table': self.table, 'index': self.index}

  @classmethod
  def from_stored(cls, settings: Settings, arrays: Arrays) -> 'Table':
    given = Stored(settings, arrays)
    form, table = packed.take_form(given), given.array('table', 2)
    packed.float_dtype(table.dtype.name)
    index = given.array_of('index', form.lines, np.uint8)
    given.finish()
    if table.shape[0] not in (1, form.lines[0]) or not table.shape[1]:
      raise ValueError(f'tables of shape {table.shape} do not fit {form.lines=}')
    return cls(form.sizes, form.transposed, table, index)


def _chunks(shape: Sequence[int]) -> Iterator[slice]:
  """Yields slices of lines with about `packed.CHUNK` numbers each."""
  step = max(packed.CHUNK // max(shape[1], 1), 1) if len(shape) > 1 else packed.CHUNK
  for start in range(0, shape[0], step):
    yield slice(start, start + step)


def _numbers(
  index: np.ndarray, step: np.ndarray, base: np.ndarray | None, dtype: np.dtype
) -> np.ndarray:
  """Returns `base + step * index` in a dtype; see `Levels`."""
  with np.errstate(all='ignore'):
    values = index.astype(np.float32)
    values *= step
    if base is not None:
      values += base
    return values.astype(dtype)


def _half_spacing(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Returns half the distance between a number's neighbours in a dtype: float64."""
  info = ml_dtypes.finfo(dtype)
  power = (values.view(np.uint32) & 0x7F800000).view(np.float32).astype(np.float64)
  return np.maximum(power, float(info.smallest_normal)) * 2.0 ** -(info.nmant + 1)


def _rounded(values: np.ndarray, precision: int) -> np.ndarray:
  """Returns numbers as float32, rounded to a number of significant bits."""
  drop = 24 - precision
  patterns = values.astype(np.float32).view(np.uint32)
  if not drop:
    return patterns.view(np.float32)
  rounded = np.right_shift(patterns + np.uint32(1 << drop - 1), drop) << drop
  return rounded.view(np.float32)
