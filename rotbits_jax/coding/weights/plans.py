"""Plans: chooses how each array of a record is stored.

An array is coded as it is or as the parts of a form (see `forms`). Each part is coded
with one frequency table, or with a table for each class of its rows and columns, or it
is stored as it is. The plan is the choice with the fewest bytes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple, TypeVar

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import forms
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import line_sums
from rotbits_jax.coding.weights import pool
from rotbits_jax.coding.weights import scales
from rotbits_jax.coding.weights import statistics

_Result = TypeVar('_Result')


class Coded(NamedTuple):
  """How a part is coded.

  Attributes:
    layout: layout of the elements.
    buckets: the scale buckets; None if one table codes the part.
    counts: int64 `[B, A]`, how often each symbol occurs in each bucket.
  """

  layout: layouts.Layout
  buckets: scales.Buckets | None
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
    form: the form; None if the only part is the array.
    parts: the parts.
  """

  array: np.ndarray
  form: forms.Form | None
  parts: tuple[Part, ...]

  @property
  def nbytes(self) -> float:
    """About how many bytes the array takes."""
    return sum(part.array.nbytes - part.saved for part in self.parts)


def plan(arrays: Sequence[np.ndarray]) -> list[Plan]:
  """Chooses the plan with the fewest bytes for each array.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, contiguous.

  Returns:
    The plans.
  """
  of_small = _of_small(arrays)
  found = pool.run(
    (functools.partial(_candidates, x, of_small.get(i)) for i, x in enumerate(arrays)),
    [array.nbytes for array in arrays],
  )
  drafts = [x for own in found for _, parts in own for x in parts if x.layout]
  planned = iter(_planned(_alike(drafts)))
  plans = []
  for array, own in zip(arrays, found, strict=True):
    made = [
      Plan(
        array, form, tuple(next(planned) if x.layout else Part(x.array) for x in parts)
      )
      for form, parts in own
    ]
    # Each part takes some bytes beside the others.
    plans.append(min(made, key=lambda x: x.nbytes + _PART_BYTES * len(x.parts)))
  return plans


_PART_BYTES = 16


# ---- layouts and forms ---------------------------------------------------------------


class _Draft(NamedTuple):
  """A part and its layout; None if it is stored as it is."""

  array: np.ndarray
  layout: layouts.Layout | None


def _candidates(
  array: np.ndarray, of_small: layouts.Int | None
) -> list[tuple[forms.Form | None, list[_Draft]]]:
  """Returns the forms that may suit an array, each with its parts.

  Args:
    array: the array.
    of_small: its layout, if it is a small array of integers.
  """
  if not array.size:
    return [(None, [_Draft(array, None)])]
  found: list[tuple[forms.Form | None, list[_Draft]]] = [(None, [_Draft(array, None)])]
  is_uniform, bits = False, forms.bit_patterns(array)
  if array.dtype in layouts.FORMATS:
    layout, survey = layouts.of_floats(bits, array.dtype)
    is_plain = layout == layouts.Float(array.dtype, layout.most_raw_bits)
    if survey and not is_plain and (made := forms.uniform(array, survey)):
      found.append(_drafted(*made))
      is_uniform = True
    else:
      found = [(None, [_Draft(array, layout)])]
  elif array.dtype.itemsize == 8:
    found.append(_drafted(*forms.halves(array)))
  elif array.dtype == np.uint8 and _is_noise(array):
    return found
  elif array.dtype.kind in 'iu':
    own = of_small or _of_integers([array])[0]
    found = [(None, [_Draft(array, own)])]
  if is_uniform and np.count_nonzero(bits) > array.size // 2:
    return found
  return [*found, *(_drafted(*made) for made in forms.codebooks(array))]


def _drafted(
  form: forms.Form, parts: Sequence[np.ndarray]
) -> tuple[forms.Form, list[_Draft]]:
  drafts = []
  for part in parts:
    layout: layouts.Layout | None = None
    if part.size and part.dtype in layouts.FORMATS:
      layout, _ = layouts.of_floats(forms.bit_patterns(part), part.dtype)
    elif part.size and part.dtype.kind in 'iu' and part.dtype.itemsize <= 4:
      (layout,) = _of_integers([part])
    drafts.append(_Draft(part, layout))
  return form, drafts


_LAYOUT_BYTES = 64  # of a layout and its blocks, about
_SMALL = 1 << 14  # elements of arrays that are looked at together

# Elements by which the raw bits of integers are chosen; bytes have few values.
_SAMPLE, _SAMPLE_OF_BYTES = 1 << 18, 1 << 14


def _is_small(array: np.ndarray) -> bool:
  return 0 < array.size <= _SMALL


def _of_small(arrays: Sequence[np.ndarray]) -> dict[int, layouts.Int]:
  """Returns the layouts of small arrays of integers, by their indices."""
  alike: dict[tuple[np.dtype, int], list[int]] = {}
  for i, array in enumerate(arrays):
    if _is_small(array) and array.dtype.kind in 'iu' and array.dtype.itemsize <= 4:
      own = array.dtype, layouts.least_raw_bits(array)
      alike.setdefault(own, []).append(i)
  found: dict[int, layouts.Int] = {}
  for places in alike.values():
    found |= zip(places, _of_integers([arrays[i] for i in places]), strict=True)
  return found


def _of_integers(arrays: Sequence[np.ndarray]) -> list[layouts.Int]:
  """Returns the layouts whose raw bits make arrays of integers shortest.

  Arrays share a layout, unless one of their own saves more than it takes.

  Args:
    arrays: arrays of one dtype, whose layouts have equally many raw bits at least.
  """
  dtype, least = arrays[0].dtype, layouts.least_raw_bits(arrays[0])
  most = _SAMPLE if dtype.itemsize > 1 else _SAMPLE_OF_BYTES
  stride = -(-sum(x.size for x in arrays) // most)
  flat = [x.reshape(-1)[::stride] for x in arrays]
  numbers = np.concatenate(flat).astype(np.int64)
  if dtype.kind == 'i':
    numbers = np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)
  # A key is the array, above its symbol. More raw bits join the keys of two symbols.
  sizes, width = np.array([x.size for x in flat]), 8 * dtype.itemsize - least
  owners = np.repeat(np.arange(len(flat)) << width, sizes)
  keys, counts = np.unique(owners | numbers >> least, return_counts=True)
  costs = list[np.ndarray]()
  while True:
    rows = keys >> width - len(costs)
    # A symbol owns a slot or more, and a stored frequency takes about a byte.
    raised = np.maximum(counts, sizes[rows] / tables.TOTAL)
    saved = np.bincount(rows, counts * np.log2(raised))
    coded = sizes * (np.log2(np.bincount(rows, raised)) + len(costs)) - saved
    costs.append(coded * stride + 8 * np.bincount(rows))
    if keys.size == len(flat):
      break
    keys >>= 1
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    keys, counts = keys[firsts], np.add.reduceat(counts, firsts)
  table = np.stack(costs)
  raw, left = table.argmin(axis=0), np.arange(len(flat))
  while left.size:
    shared = np.argmin(table[:, left].sum(axis=1))
    saved = table[shared, left] - table[raw[left], left]
    stays = saved <= 8 * _LAYOUT_BYTES
    raw[left[stays]] = shared
    left = left[~stays] if stays.any() else left[:0]
  return [layouts.Int(dtype, least + x) for x in raw.tolist()]


_NOISE = 0.98  # bits of a bit, from which coding is not worth its time


def _is_noise(array: np.ndarray) -> bool:
  """Returns whether bytes, by the look of a sample, are coded or random already."""
  sample = array.reshape(-1)[:: -(-array.size // _SAMPLE_OF_BYTES)]
  counts = np.bincount(sample, minlength=256)
  # A sample of n bytes has about 2^8 / (2 n ln 2) bits an element less than its source.
  missing = 185 * np.count_nonzero(counts) / 256
  return bool(tables.entropy_bits(counts) + missing > 8 * _NOISE * sample.size)


def _alike(drafts: list[_Draft]) -> list[_Draft]:
  """Gives a small part the layout of another part if its own layout costs more."""
  sizes: dict[layouts.Layout | None, int] = {}
  for array, layout in drafts:
    sizes[layout] = sizes.get(layout, 0) + array.size
  floats = [layout for layout in sizes if isinstance(layout, layouts.Float)]
  chosen: dict[layouts.Layout | None, layouts.Layout | None] = {}
  for own in floats:
    # A layout with a lower minimum exponent and more raw bits fits the elements, too,
    # but takes more bits for each of them.
    wider = {
      other: other.raw_bits - own.raw_bits + own.min_exponent - other.min_exponent
      for other in floats
      if other.dtype == own.dtype
      and other != own
      and other.raw_bits >= own.raw_bits
      and other.min_exponent <= own.min_exponent
    }
    if wider:
      best = min(wider, key=wider.__getitem__)
      chosen[own] = best if wider[best] * sizes[own] < 8 * _LAYOUT_BYTES else own
  return [_Draft(array, chosen.get(layout, layout)) for array, layout in drafts]


# ---- tables --------------------------------------------------------------------------


class _Batch(NamedTuple):
  """Parts of one layout whose symbols are counted at once.

  Attributes:
    places: their indices.
    arrays: the parts: one, or several of at most 2^20 elements together.
    layout: the layout.
    buckets: scale buckets of the lines of the only part; None if each part gets one
      table.
    shape: the number of buckets, or of parts, and a bound for the symbols.
  """

  places: list[int]
  arrays: list[np.ndarray]
  layout: layouts.Layout
  buckets: scales.Buckets | None
  shape: tuple[int, int]


def _planned(drafts: list[_Draft]) -> list[Part]:
  """Chooses the tables of parts with a layout."""
  batches = _batches(drafts)
  sizes = [sum(x.nbytes for x in batch.arrays) for batch in batches]
  found = _run_all([_counting(batch) for batch in batches], sizes)
  counts = [functools.reduce(np.add, own) for own in found]
  pairs = zip(batches, counts, strict=True)
  chosen = pool.run((functools.partial(_choose, *pair) for pair in pairs), sizes)
  parts: dict[int, Part] = {}
  for batch, own in zip(batches, chosen, strict=True):
    parts |= zip(batch.places, own, strict=True)
  return [parts[i] for i in range(len(drafts))]


def _batches(drafts: list[_Draft]) -> list[_Batch]:
  """Sorts the lines of parts, and puts small parts without lines together."""
  lined, others = list[int](), dict[tuple[layouts.Layout, int], list[int]]()
  for i, (array, layout) in enumerate(drafts):
    assert layout
    if layout.has_scale and scales.has_lines(array.shape):
      lined.append(i)
    else:
      alone = -1 if _is_small(array) else i
      others.setdefault((layout, alone), []).append(i)
  found = []
  buckets = _sorted([drafts[i].array for i in lined])
  for i, own in zip(lined, buckets, strict=True):
    array, layout = drafts[i]
    assert layout
    found.append(_Batch([i], [array], *_fitted(array, layout, own)))
  for (layout, _), places in others.items():
    arrays = [drafts[i].array for i in places]
    alphabet = max(_alphabet(x, layout) for x in arrays)
    most = min(contexts.MAX_TABLES, contexts.MAX_ENTRIES // alphabet - 1)
    most = max(min(most, blocks.CAPACITY // _SMALL), 1)
    for start in range(0, len(places), most):
      part = slice(start, start + most)
      shape = len(places[part]), alphabet
      found.append(_Batch(places[part], arrays[part], layout, None, shape))
  return found


def _run_all(
  jobs: Sequence[Sequence[Callable[[], _Result]]], sizes: Sequence[int]
) -> list[list[_Result]]:
  """Runs lists of jobs, each for so many bytes; returns the results of each list."""
  each = [size // len(own) for own, size in zip(jobs, sizes, strict=True) for _ in own]
  results = iter(pool.run((job for own in jobs for job in own), each))
  return [[next(results) for _ in own] for own in jobs]


_ROWS = 1 << 7  # of a matrix that tell the weights of its columns


def _sorted(arrays: Sequence[np.ndarray]) -> list[scales.Buckets]:
  """Sorts the rows and columns of each array into scale buckets."""
  matrices = [x.reshape(scales.matrix_shape(x.shape)) for x in arrays]
  sizes, exponents = [x.nbytes for x in matrices], map(scales.exponent_of, matrices)
  pairs = list(zip(matrices, exponents, strict=True))
  weights = pool.run((functools.partial(_weights, *pair) for pair in pairs), sizes)
  jobs = [
    [
      functools.partial(statistics.sums, matrix[rows], own, exponent)
      for rows in line_sums.row_parts(matrix.shape)
    ]
    for (matrix, exponent), own in zip(pairs, weights, strict=True)
  ]
  found = map(line_sums.joined, _run_all(jobs, sizes))
  own = [(x, exponent) for x, (_, exponent) in zip(found, pairs, strict=True)]
  return pool.run((functools.partial(scales.sort, *x) for x in own), sizes)


def _weights(matrix: np.ndarray, exponent: int) -> np.ndarray:
  """Returns the weights of columns by some rows, see `scales.sort`."""
  rows, columns = matrix.shape
  some = matrix[:: -(-rows // min(_ROWS, blocks.CAPACITY // columns))]
  equal = np.full(columns, 1 / columns, np.float32)
  return scales.inverse_weights(statistics.sums(some, equal, exponent).weighted)


def _alphabet(array: np.ndarray, layout: layouts.Layout) -> int:
  """Returns a bound for the symbols of a part."""
  if isinstance(layout, layouts.Int):
    return (layouts.most_folded(array) >> layout.raw_bits) + 1
  return layout.alphabet


def _fitted(
  array: np.ndarray, layout: layouts.Layout, buckets: scales.Buckets
) -> tuple[layouts.Layout, scales.Buckets, tuple[int, int]]:
  """Adds raw bits to a layout until the tables of all buckets have room.

  Returns:
    The layout, the buckets, and the shape of the counts.
  """
  count, alphabet = max(buckets.top, 1) + 1, _alphabet(array, layout)
  while (count + 1) * alphabet > contexts.MAX_ENTRIES:
    layout = dataclasses.replace(layout, raw_bits=layout.raw_bits + 1)
    alphabet = -(-alphabet // 2)
  return layout, buckets, (count, alphabet)


def _counting(batch: _Batch) -> list[Callable[[], np.ndarray]]:
  """Returns jobs that count the symbols of a batch, whose results add up."""
  bits = [forms.bit_patterns(x) for x in batch.arrays]
  own, sizes = batch.buckets, [x.size for x in bits]
  _, columns = scales.matrix_shape(batch.arrays[0].shape)

  def job(start: int) -> np.ndarray:
    part = slice(start, start + blocks.CAPACITY)
    count = min(sum(sizes) - start, blocks.CAPACITY)
    if own is not None:
      fill = lambda out: own.write(out, start, columns, 1, 0)
    elif len(bits) == 1:
      fill = lambda out: out.fill(0)
    else:
      fill = lambda out: np.copyto(
        out, np.repeat(np.arange(len(bits)), sizes), 'unsafe'
      )
    copy = lambda out: np.concatenate([x[part] for x in bits], out=out)
    return statistics.histogram(copy, fill, count, batch.shape, batch.layout)

  return [functools.partial(job, x) for x in range(0, sum(sizes), blocks.CAPACITY)]


def _choose(batch: _Batch, counts: np.ndarray) -> list[Part]:
  """Returns the parts with the fewest bytes, given the counts."""
  own, layout = batch.buckets, batch.layout
  alphabet = np.flatnonzero(counts.any(axis=0))[-1] + 1
  counts = counts[:, :alphabet]
  total = counts if own is None else counts.sum(axis=0, keepdims=True)
  coded = [Coded(layout, None, row[None]) for row in total]
  costs = contexts.choose(layout, None, total).costs
  if own is not None:
    (used,) = np.nonzero(counts.any(axis=1))
    choice = contexts.choose(layout, own.classes(used), counts[used])
    of_lines = sum(tables.entropy_bits(np.bincount(x)) for x in (own.rows, own.columns))
    other = float(choice.costs.sum()) + of_lines / 8
    if other < costs[0]:
      costs, coded = np.array([other]), [Coded(layout, own, counts)]
  elif layout.has_scale:
    classes = scales.of_counts(layout, counts)
    others = contexts.choose(layout, classes, counts).costs
    one = np.ones(1, np.uint8)  # neither rows nor columns are sorted
    for i in np.flatnonzero(others < costs).tolist():
      row = np.stack([np.zeros_like(counts[i]), counts[i]])
      coded[i] = Coded(layout, scales.Buckets(int(classes[i]), 1, one, one), row)
    costs = np.minimum(costs, others)
  parts = []
  for array, way, cost in zip(batch.arrays, coded, costs, strict=True):
    saved = array.nbytes - array.size * layout.raw_bits / 8 - float(cost)
    parts.append(Part(array, way, saved) if saved > 0 else Part(array))
  return parts
