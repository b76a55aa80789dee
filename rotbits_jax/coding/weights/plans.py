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
  found = pool.run(functools.partial(_candidates, array) for array in arrays)
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


def _candidates(array: np.ndarray) -> list[tuple[forms.Form | None, list[_Draft]]]:
  """Returns the forms that may suit an array, each with its parts."""
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
    found = [(None, [_Draft(array, _of_integers(array))])]
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
      layout = _of_integers(part)
    drafts.append(_Draft(part, layout))
  return form, drafts


# Elements by which the raw bits of integers are chosen; bytes have few values.
_SAMPLE, _SAMPLE_OF_BYTES = 1 << 18, 1 << 14


def _of_integers(array: np.ndarray) -> layouts.Int:
  """Returns the layout of integers whose raw bits make them shortest."""
  least, flat = layouts.least_raw_bits(array), array.reshape(-1)
  stride = -(-flat.size // (_SAMPLE if array.itemsize > 1 else _SAMPLE_OF_BYTES))
  numbers = flat[::stride].astype(np.int64)
  if array.dtype.kind == 'i':
    numbers = np.where(numbers < 0, -2 * numbers - 1, 2 * numbers)
  counts, costs = np.bincount(numbers >> least), list[float]()
  while True:
    raw, used = len(costs) * numbers.size, counts[counts > 0]
    coded = float(tables.cost_bits(used, tables.quantize(used))) + raw
    # A stored frequency takes about a byte.
    costs.append(coded * stride + 8 * used.size)
    # More raw bits save nothing but frequencies.
    if counts.size == 1 or (tables.entropy_bits(used) + raw) * stride > min(costs):
      return layouts.Int(array.dtype, least + int(np.argmin(costs)))
    counts = np.append(counts, [0] * (counts.size % 2)).reshape(-1, 2).sum(axis=1)


_NOISE = 0.98  # bits of a bit, from which coding is not worth its time


def _is_noise(array: np.ndarray) -> bool:
  """Returns whether bytes, by the look of a sample, are coded or random already."""
  sample = array.reshape(-1)[:: -(-array.size // _SAMPLE_OF_BYTES)]
  counts = np.bincount(sample, minlength=256)
  # A sample of n bytes has about 2^8 / (2 n ln 2) bits an element less than its source.
  missing = 185 * np.count_nonzero(counts) / 256
  return bool(tables.entropy_bits(counts) + missing > 8 * _NOISE * sample.size)


def _copy_of(part: np.ndarray) -> blocks.Fill:
  return lambda out: np.copyto(out, part)


def _zeros(out: np.ndarray) -> None:
  out[:] = 0


# About how many bytes a layout and its blocks take.
_LAYOUT_BYTES = 64


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


def _planned(drafts: list[_Draft]) -> list[Part]:
  """Chooses the tables of parts with a layout."""
  scaled = [i for i, x in enumerate(drafts) if x.layout and x.layout.has_scale]
  found = _sorted([drafts[i].array for i in scaled])
  of_parts = dict(zip(scaled, found, strict=True))
  buckets = [of_parts.get(i) for i in range(len(drafts))]
  jobs, fitted = [], []
  for draft, own in zip(drafts, buckets, strict=True):
    assert draft.layout
    layout, shape = _fitted(draft.array, draft.layout, own)
    fitted.append(layout)
    jobs.append(_counting(draft.array, layout, own, shape))
  counts = [functools.reduce(np.add, own) for own in _run_all(jobs)]
  arrays = [draft.array for draft in drafts]
  return pool.run(
    functools.partial(_choose, *args)
    for args in zip(arrays, fitted, buckets, counts, strict=True)
  )


def _run_all(jobs: Sequence[Sequence[Callable[[], _Result]]]) -> list[list[_Result]]:
  """Runs lists of jobs side by side; returns the results of each list."""
  results = iter(pool.run(job for own in jobs for job in own))
  return [[next(results) for _ in own] for own in jobs]


_VECTOR = 1 << 10  # columns of a matrix that stands for a vector


def _sorted(arrays: Sequence[np.ndarray]) -> list[scales.Buckets]:
  """Sorts the rows and columns of each array into scale buckets."""
  matrices = [x.reshape(scales.matrix_shape(x.shape)) for x in arrays]
  # The sums of a row are made at once.
  vectors = [min(x.shape) == 1 or x.shape[1] > blocks.CAPACITY for x in matrices]
  for i, matrix in enumerate(matrices):
    if vectors[i]:
      # The scale of a vector is that of its rows, wherever it is cut.
      width = min(matrix.size, _VECTOR)
      whole = matrix.size // width * width
      matrices[i] = matrix.reshape(-1)[:whole].reshape(-1, width)
  exponents = [scales.exponent_of(x) for x in matrices]
  weights = [np.full(x.shape[1], 1 / x.shape[1], np.float32) for x in matrices]
  found = []
  for _ in range(2):
    jobs = [
      [functools.partial(statistics.sums, rows, own, exponent) for rows in _cut(matrix)]
      for matrix, own, exponent in zip(matrices, weights, exponents, strict=True)
    ]
    found.append([scales.joined(sums) for sums in _run_all(jobs)])
    weights = [scales.inverse_weights(x.weighted) for x in found[0]]
  return pool.run(
    functools.partial(scales.unsorted, first, exponent)
    if is_vector
    else functools.partial(scales.sort, first, second, exponent)
    for first, second, exponent, is_vector in zip(
      *found, exponents, vectors, strict=True
    )
  )


def _cut(matrix: np.ndarray) -> list[np.ndarray]:
  """Cuts a matrix into parts of whole rows."""
  step = max(blocks.CAPACITY // matrix.shape[1], 1)
  return [matrix[start : start + step] for start in range(0, len(matrix), step)]


def _fitted(
  array: np.ndarray, layout: layouts.Layout, buckets: scales.Buckets | None
) -> tuple[layouts.Layout, tuple[int, int]]:
  """Adds raw bits to a layout until the tables of all buckets have room.

  Returns:
    The layout; and the number of buckets, and a bound for the symbols.
  """
  count = 1 if buckets is None else max(buckets.top, 1) + 1
  alphabet = layout.alphabet
  if isinstance(layout, layouts.Int):
    alphabet = (layouts.most_folded(array) >> layout.raw_bits) + 1
  while (count + 1) * alphabet > contexts.MAX_ENTRIES:
    layout = dataclasses.replace(layout, raw_bits=layout.raw_bits + 1)
    alphabet = -(-alphabet // 2)
  return layout, (count, alphabet)


def _counting(
  array: np.ndarray,
  layout: layouts.Layout,
  buckets: scales.Buckets | None,
  shape: tuple[int, int],
) -> list[Callable[[], np.ndarray]]:
  """Returns a job for each block of a part that counts its symbols in each bucket."""
  bits, (_, columns) = forms.bit_patterns(array), scales.matrix_shape(array.shape)

  def job(start: int) -> np.ndarray:
    part, fill = bits[start : start + blocks.CAPACITY], _zeros
    if buckets is not None:
      fill = lambda out: buckets.write(out, start, columns, 1, 0)
    return statistics.histogram(_copy_of(part), fill, part.size, shape, layout)

  return [functools.partial(job, x) for x in range(0, array.size, blocks.CAPACITY)]


def _choose(
  array: np.ndarray,
  layout: layouts.Layout,
  buckets: scales.Buckets | None,
  counts: np.ndarray,
) -> Part:
  """Returns the part with the fewest bytes, given the counts."""
  total = counts.sum(axis=0, keepdims=True)
  alphabet = np.flatnonzero(total)[-1] + 1
  counts, total = counts[:, :alphabet], total[:, :alphabet]
  cost = contexts.choose(layout, None, total).cost
  coded = Coded(layout, None, total)
  if buckets:
    (own,) = np.nonzero(counts.any(axis=1))
    other = contexts.choose(layout, buckets.classes(own), counts[own]).cost
    for lines in (buckets.rows, buckets.columns):
      other += tables.entropy_bits(np.bincount(lines)) / 8
    if other < cost:
      cost, coded = other, Coded(layout, buckets, counts)
  saved = array.nbytes - array.size * layout.raw_bits / 8 - cost
  return Part(array, coded, saved) if saved > 0 else Part(array)
