"""Plans: chooses how each array of a record is stored.

An array is coded as it is or as several parts, see `sparse`. Each part is coded with
one frequency table, or with a table for each class of its rows and columns, or it is
stored as it is. The plan is the choice with the fewest bytes.

Shape letters: B classes, A symbols.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import buffers
from rotbits_jax.coding import contexts
from rotbits_jax.coding import formats
from rotbits_jax.coding import layouts
from rotbits_jax.coding import pool
from rotbits_jax.coding import scales as scales_lib
from rotbits_jax.coding import sparse
from rotbits_jax.coding import tables
from rotbits_jax.system import native

_PART_BYTES = 16  # of a part in the spec and in the stream, about
_LAYOUT_BYTES = 64  # of a layout and its blocks, about
_SMALL = 1 << 14  # elements of arrays that are looked at together


class Coded(NamedTuple):
  """How a part is coded.

  Attributes:
    layout: layout of the elements.
    scales: the scales of rows and columns; None if one table codes the part.
    counts: int64 `[B, A]`, how often each symbol occurs in each class.
  """

  layout: layouts.Layout
  scales: contexts.Scales | None
  counts: np.ndarray


class Part(NamedTuple):
  """How a part is stored.

  Attributes:
    array: the part, contiguous.
    coded: how it is coded; None if it is stored as it is.
    saved: about how many bytes coding saves.
  """

  array: np.ndarray
  coded: Coded | None = None
  saved: float = 0.0


class Plan(NamedTuple):
  """How an array is stored.

  Attributes:
    array: the array, contiguous.
    zeros: where its zeros are, if it is stored without them.
    parts: the parts: one, which is the array; two halves; or those of `zeros`.
  """

  array: np.ndarray
  zeros: sparse.Sparse | None
  parts: tuple[Part, ...]

  @property
  def nbytes(self) -> float:
    """About how many bytes the array takes."""
    return sum(part.array.nbytes - part.saved for part in self.parts)


class _Draft(NamedTuple):
  """A part and its layout; None if it is stored as it is."""

  array: np.ndarray
  layout: layouts.Layout | None


def plan(arrays: Sequence[np.ndarray]) -> list[Plan]:
  """Chooses the plan with the fewest bytes for each array.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, contiguous.

  Returns:
    The plans.
  """
  candidates = pool.each(_candidates, arrays)
  parts = [x for choices in candidates for _, parts in choices for x in parts]
  of_parts = _with_layouts(parts)
  planned = iter(_planned([x for x in of_parts if x.layout]))
  drafts, plans = iter(of_parts), []
  for array, choices in zip(arrays, candidates, strict=True):
    candidates_planned = []
    for zeros, parts in choices:
      own_drafts = [next(drafts) for _ in parts]
      candidates_planned.append(
        Plan(
          array,
          zeros,
          tuple(next(planned) if x.layout else Part(x.array) for x in own_drafts),
        )
      )
    cost = lambda plan: plan.nbytes + _PART_BYTES * len(plan.parts)
    plans.append(min(candidates_planned, key=cost))
  return plans


def _candidates(
  array: np.ndarray,
) -> list[tuple[sparse.Sparse | None, list[np.ndarray]]]:
  """Returns the ways to divide an array into parts that may suit it."""
  if array.dtype.itemsize == 8:
    return [(None, [array]), (None, sparse.halves(array))]
  divided = sparse.without_zeros(array) if array.size else None
  return [(None, [array])] + ([divided] if divided else [])


# ---- layouts -------------------------------------------------------------------------

# Elements by which the raw bits of integers are chosen; bytes have few values.
_SAMPLE, _SAMPLE_OF_BYTES = 1 << 18, 1 << 14
_NOISE = 0.98  # bits of a bit, from which coding is not worth its time


def _with_layouts(parts: Sequence[np.ndarray]) -> list[_Draft]:
  """Chooses the layouts of parts. Small arrays of integers share theirs."""
  groups: dict[tuple[np.dtype, int, int], list[int]] = {}
  jobs: dict[int, Callable[[], layouts.Layout | None]] = {}
  for i, part in enumerate(parts):
    if part.size and part.dtype in layouts.FORMATS:
      jobs[i] = functools.partial(
        formats.of_floats, sparse.bit_patterns(part), part.dtype
      )
    elif part.size and part.dtype.kind in 'iu' and part.itemsize <= 4:
      alone = -1 if part.size <= _SMALL else i
      key = part.dtype, formats.least_raw_bits(part), alone
      groups.setdefault(key, []).append(i)
  for members in groups.values():
    jobs[members[0]] = functools.partial(_of_integers, [parts[i] for i in members])
  chosen = dict(zip(jobs, pool.run(jobs.values()), strict=True))
  for members in groups.values():
    chosen |= dict.fromkeys(members, chosen[members[0]])
  return _alike([_Draft(x, chosen.get(i)) for i, x in enumerate(parts)])


def _of_integers(arrays: Sequence[np.ndarray]) -> layouts.Int | None:
  """Returns the layout that makes integers shortest; None for bytes that are noise."""
  dtype, least = arrays[0].dtype, formats.least_raw_bits(arrays[0])
  most = _SAMPLE if dtype.itemsize > 1 else _SAMPLE_OF_BYTES
  stride = -(-sum(x.size for x in arrays) // most)
  numbers = np.concatenate([x.reshape(-1)[::stride] for x in arrays]).astype(np.int64)
  if dtype.kind == 'i':
    numbers = np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)
  symbols, counts = np.unique(numbers >> least, return_counts=True)
  if dtype == np.uint8:
    # A sample of n bytes has about 2^8 / (2 n ln 2) bits per element too few.
    missing = 185 * symbols.size / 256
    if tables.entropy_bits(counts) + missing > 8 * _NOISE * numbers.size:
      return None
  costs = list[float]()
  while True:
    # A symbol owns a slot or more, and a stored frequency takes about a byte.
    owned = np.maximum(counts, numbers.size / tables.TOTAL)
    bits = tables.cost_bits(counts, owned * (tables.TOTAL / owned.sum()))
    costs.append(stride * (bits + len(costs) * numbers.size) + 8 * symbols.size)
    if symbols.size == 1:
      return layouts.Int(dtype, least + int(np.argmin(costs)))
    symbols >>= 1
    firsts = np.flatnonzero(np.diff(symbols, prepend=-1))
    symbols, counts = symbols[firsts], np.add.reduceat(counts, firsts)


def _alike(drafts: list[_Draft]) -> list[_Draft]:
  """Gives small parts the layout of other parts if their own layout costs more."""
  sizes: dict[layouts.Layout | None, int] = {}
  for array, layout in drafts:
    sizes[layout] = sizes.get(layout, 0) + array.size
  floats = [layout for layout in sizes if isinstance(layout, layouts.Float)]
  chosen: dict[layouts.Layout | None, layouts.Layout | None] = {}
  for layout in floats:
    # A layout with a lower minimum exponent and more raw bits fits the elements, too,
    # but takes more bits for each of them.
    wider = {
      other: other.raw_bits - layout.raw_bits + layout.min_exponent - other.min_exponent
      for other in floats
      if other.dtype == layout.dtype
      and other != layout
      and other.raw_bits >= layout.raw_bits
      and other.min_exponent <= layout.min_exponent
    }
    if wider:
      best = min(wider, key=wider.__getitem__)
      chosen[layout] = (
        best if wider[best] * sizes[layout] < 8 * _LAYOUT_BYTES else layout
      )
  return [_Draft(array, chosen.get(layout, layout)) for array, layout in drafts]


# ---- tables --------------------------------------------------------------------------


def _planned(drafts: list[_Draft]) -> list[Part]:
  """Chooses the tables of parts with a layout."""
  lined = [
    i
    for i, (array, layout) in enumerate(drafts)
    if layout and layout.has_scale and scales_lib.has_lines(array.shape)
  ]
  chosen = scales_lib.of_arrays([drafts[i].array for i in lined])
  scales = dict(zip(lined, chosen, strict=True))
  fitted = [_fitted(*draft, scales.get(i)) for i, draft in enumerate(drafts)]
  arrays = [draft.array for draft in drafts]
  pairs = zip(arrays, fitted, strict=True)
  counts = pool.run_lists([_counting(array, *ways) for array, ways in pairs])
  return pool.each(_choose, arrays, fitted, counts)


def _fitted(
  array: np.ndarray, layout: layouts.Layout | None, scales: contexts.Scales | None
) -> tuple[layouts.Layout, contexts.Scales | None, int]:
  """Adds raw bits to a layout until the tables of all classes have room."""
  assert layout
  alphabet = layout.alphabet
  if isinstance(layout, layouts.Int):
    alphabet = (formats.most_folded(array) >> layout.raw_bits) + 1
  while scales and (scales.num_classes + 1) * alphabet > blocks.MAX_ENTRIES:
    layout = dataclasses.replace(layout, raw_bits=layout.raw_bits + 1)
    alphabet = -(-alphabet // 2)
  return layout, scales, alphabet


def _counting(
  array: np.ndarray,
  layout: layouts.Layout,
  scales: contexts.Scales | None,
  alphabet: int,
) -> list[Callable[[], np.ndarray]]:
  """Returns jobs that count the symbols of a part, whose results add up."""
  bits, (_, columns) = sparse.bit_patterns(array), contexts.matrix_shape(array.shape)

  def job(start: int) -> np.ndarray:
    block = bits[start : start + blocks.CAPACITY]

    def classes(out: np.ndarray) -> None:
      if scales is None:
        out.fill(0)
      else:
        scales.write(out, start, columns, 0)

    count = scales.num_classes if scales else 1
    copy = lambda out: np.copyto(out, block)
    return histogram(copy, classes, block.size, (count, alphabet), layout)

  return [functools.partial(job, x) for x in range(0, bits.size, blocks.CAPACITY)]


def _choose(
  array: np.ndarray,
  fitted: tuple[layouts.Layout, contexts.Scales | None, int],
  block_counts: list[np.ndarray],
) -> Part:
  """Returns the part with the fewest bytes: with scales, with one table, or neither."""
  (layout, scales, _), counts = fitted, np.sum(block_counts, axis=0)
  counts = counts[:, : np.flatnonzero(counts.any(axis=0))[-1] + 1]
  total = counts.sum(axis=0, keepdims=True)
  choices = [(contexts.choose(layout, None, total).costs, Coded(layout, None, total))]
  if layout.has_scale:
    base, zero = int(scales_lib.of_counts(layout, total)[0]), np.zeros(1, np.uint8)
    one = Coded(layout, contexts.Scales(base, zero, zero), total)
    for coded in [one] + ([Coded(layout, scales, counts)] if scales else []):
      assert coded.scales
      (used,) = np.nonzero(coded.counts.any(axis=1))
      classes = coded.scales.base + used
      costs = contexts.choose(layout, classes, coded.counts[used]).costs
      of_lines = sum(tables.entropy_bits(np.bincount(x)) for x in coded.scales[1:])
      choices.append((np.append(costs, of_lines / 8), coded))
  cost, coded = min(((costs.sum(), x) for costs, x in choices), key=lambda x: x[0])
  saved = array.nbytes - array.size * layout.raw_bits / 8 - float(cost)
  return Part(array, coded, saved) if saved > 0 else Part(array)


# ---- counts --------------------------------------------------------------------------

_UNROLLED = 8  # elements that one step counts
_ZEROS = 1 << 12  # counts that one step clears


@functools.partial(jax.jit, static_argnames='layout', donate_argnums=0)
def _count(
  counts: jax.Array,  # int32 [2^20]
  bits: jax.Array,  # unsigned integers [2^20]
  classes: jax.Array,  # uint8 [2^20]
  shifts: jax.Array | None,  # uint8 [256]
  *numbers: jax.Array,
  layout: layouts.Layout,
) -> jax.Array:
  def loop(
    counts: jax.Array,
    bits: jax.Array,
    classes: jax.Array,
    shifts: jax.Array | None,
    alphabet: jax.Array,
    used: jax.Array,
    count: jax.Array,
    min_exponent: jax.Array,
    raw_bits: jax.Array,
  ) -> jax.Array:
    zeros = jnp.zeros(_ZEROS, counts.dtype)
    clear = lambda i, x: jax.lax.dynamic_update_slice(x, zeros, (i * _ZEROS,))
    counts = jax.lax.fori_loop(0, -(-used // _ZEROS), clear, counts)
    part = lambda x, i: jax.lax.dynamic_slice(x, (i * _UNROLLED,), (_UNROLLED,))

    def step(i: jax.Array, counts: jax.Array) -> jax.Array:
      block_classes, shift = part(classes, i), raw_bits
      if shifts is not None:
        shift = shifts.at[block_classes].get(mode='promise_in_bounds')
      symbols = layout.symbols(part(bits, i), min_exponent, shift)
      # Unsigned, because it takes time to see whether signed indices are below 0.
      for j in symbols + block_classes.astype(jnp.uint32) * alphabet:
        number = jax.lax.dynamic_index_in_dim(counts, j, keepdims=False)
        counts = jax.lax.dynamic_update_index_in_dim(counts, number + 1, j, 0)
      return counts

    return jax.lax.fori_loop(0, count // _UNROLLED, step, counts)

  counted: jax.Array = native.loop(loop)(counts, bits, classes, shifts, *numbers)
  return counted


def histogram(
  bits: blocks.Fill,
  classes: blocks.Fill,
  count: int,
  shape: tuple[int, int],
  layout: layouts.Layout,
  shifts: np.ndarray | None = None,
) -> np.ndarray:
  """Counts how often each symbol occurs in each class, on this thread.

  Args:
    bits: writes the bit patterns of the elements.
    classes: writes the class of each element.
    count: the number of elements, at most 2^20.
    shape: B, and a bound A for the symbols. `(B + 1) * A` is at most
      `blocks.MAX_ENTRIES`.
    layout: layout of the elements.
    shifts: uint8 `[256]`, the shift of each class, of differences.

  Returns:
    int64 `[*shape]`.
  """
  whole, used = -(-count // _UNROLLED) * _UNROLLED, shape[0] * shape[1]
  patterns = buffers.scratch('bits', buffers.ROOM, layout.unsigned)
  places = buffers.scratch('contexts', buffers.ROOM, np.uint8)
  bits(patterns[:count])
  classes(places[:count])
  # The others count in a class of their own.
  patterns[count:whole], places[count:whole] = 0, shape[0]
  counts = _count(
    buffers.taken('counts', blocks.MAX_ENTRIES, np.int32),
    patterns,
    places,
    shifts,
    np.uint32(shape[1]),
    np.int32(used + shape[1]),
    np.int32(whole),
    layout.unsigned.type(layout.min_exponent),
    np.uint32(layout.raw_bits),
    # The raw bits are an operand, so that layouts share programs.
    layout=dataclasses.replace(layout.program, raw_bits=0),
  )
  result = np.asarray(counts)[:used].reshape(shape).astype(np.int64)
  buffers.keep('counts', counts)
  return result
