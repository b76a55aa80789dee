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

_Result = TypeVar('_Result')


class Coded(NamedTuple):
  """How a part is coded.

  Attributes:
    layout: layout of the elements.
    buckets: the scale buckets; None if one table codes the part.
    counts: int64 `[buckets, A]`, how often each symbol occurs in each bucket.
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
    arrays: arrays of dtypes that `specs.DTYPES` has.

  Returns:
    The plans.
  """
  found = pool.run(functools.partial(_candidates, array) for array in arrays)
  drafts = [draft for candidates in found for _, own in candidates for draft in own]
  planned = iter(_planned(_alike(drafts)))
  plans = []
  for array, candidates in zip(arrays, found, strict=True):
    made = [
      Plan(array, form, tuple(next(planned) for _ in own)) for form, own in candidates
    ]
    # Each part takes some bytes beside the others.
    plans.append(min(made, key=lambda x: x.nbytes + _PART_BYTES * len(x.parts)))
  return plans


_PART_BYTES = 16


class _Draft(NamedTuple):
  """A part, and a layout for it; None if it can only be stored as it is."""

  array: np.ndarray
  layout: layouts.Layout | None


def _candidates(array: np.ndarray) -> list[tuple[forms.Form | None, list[_Draft]]]:
  """Returns the forms that may suit an array, each with its parts."""
  if not array.size:
    return [(None, [_Draft(array, None)])]
  found: list[tuple[forms.Form | None, list[np.ndarray]]] = [(None, [array])]
  layout: layouts.Layout | None = None
  is_uniform, bits = False, forms.bit_patterns(array)
  if array.dtype in layouts.FORMATS:
    layout, survey = layouts.of_floats(bits, array.dtype)
    is_plain = layout == layouts.Float(array.dtype, layout.most_raw_bits)
    if survey and not is_plain and (made := forms.uniform(array, survey)):
      found, is_uniform = [made], True
  elif array.dtype.itemsize == 8:
    found = [forms.halves(array)]
  elif array.dtype.kind in 'iu':
    layout = _of_integers(array)
  if not is_uniform or np.count_nonzero(bits) < array.size // 2:
    found += forms.codebooks(array)
  return [
    (form, [_Draft(array, layout)] if form is None else [*map(_drafted, parts)])
    for form, parts in found
  ]


def _drafted(part: np.ndarray) -> _Draft:
  """Returns the draft of a part of a form."""
  if part.size and part.dtype in layouts.FORMATS:
    return _Draft(part, layouts.of_floats(forms.bit_patterns(part), part.dtype)[0])
  if part.size and part.dtype.kind in 'iu' and part.dtype.itemsize <= 4:
    return _Draft(part, _of_integers(part))
  return _Draft(part, None)


# Elements by which the raw bits of integers are chosen.
_SAMPLE = 1 << 18


def _of_integers(array: np.ndarray) -> layouts.Int:
  """Returns the layout of integers with the number of raw bits that makes them shortest.
  """
  least = layouts.least_raw_bits(array)
  layout, bits = layouts.Int(array.dtype, least), forms.bit_patterns(array)
  stride = -(-bits.size // _SAMPLE)
  sample = np.ascontiguousarray(bits[::stride])
  counts = blocks.histogram(
    lambda out: np.copyto(out, sample), _zeros, sample.size, (1, layout.alphabet), layout
  )
  costs = []
  most = min(8 * array.dtype.itemsize, least + layout.alphabet.bit_length() - 1)
  for raw_bits in range(least, most):
    cost = contexts.choose(layout, None, counts).cost
    costs.append(cost + sample.size * raw_bits / 8)
    counts = counts[:, ::2] + counts[:, 1::2]
  return layouts.Int(array.dtype, least + int(np.argmin(costs)))


def _zeros(out: np.ndarray) -> None:
  out[:] = 0


# About how many bytes a layout and its blocks take.
_LAYOUT_BYTES = 64


def _alike(drafts: list[_Draft]) -> list[_Draft]:
  """Gives a small part the layout of another part if its own layout costs more."""
  sizes: dict[layouts.Layout, int] = {}
  for draft in drafts:
    if draft.layout:
      sizes[draft.layout] = sizes.get(draft.layout, 0) + draft.array.size
  chosen: dict[layouts.Layout, layouts.Layout] = {}
  for own, size in sizes.items():
    # A layout with a lower minimum exponent and more raw bits fits the elements, too,
    # but takes more bits for each of them.
    wider = {
      other: size * (other.raw_bits - own.raw_bits + own.min_exponent - other.min_exponent)
      for other in sizes
      if isinstance(own, layouts.Float)
      and other.dtype == own.dtype
      and other != own
      and other.raw_bits >= own.raw_bits
      and other.min_exponent <= own.min_exponent
    }
    least = min(wider.values(), default=8 * _LAYOUT_BYTES)
    chosen[own] = min(wider, key=wider.__getitem__) if least < 8 * _LAYOUT_BYTES else own
  return [
    draft._replace(layout=chosen[draft.layout]) if draft.layout else draft
    for draft in drafts
  ]


def _planned(drafts: list[_Draft]) -> list[Part]:
  """Chooses how each part is stored."""
  scaled = [i for i, x in enumerate(drafts) if x.layout and x.layout.has_scale]
  found = _sorted([drafts[i].array for i in scaled])
  buckets = dict(zip(scaled, found, strict=True))
  jobs: dict[int, list[Callable[[], np.ndarray]]] = {}
  for i, draft in enumerate(drafts):
    if draft.layout:
      drafts[i] = draft = _fitted(draft, buckets.get(i))
      jobs[i] = _counting(draft, buckets.get(i))
  counts = {i: sum(found) for i, found in _run_all(jobs).items()}
  parts = pool.run(
    functools.partial(_choose, drafts[i], buckets.get(i), found)
    for i, found in counts.items()
  )
  chosen = dict(zip(counts, parts, strict=True))
  return [chosen.get(i, Part(draft.array)) for i, draft in enumerate(drafts)]


def _run_all(jobs: dict[int, list[Callable[[], _Result]]]) -> dict[int, list[_Result]]:
  """Runs lists of jobs side by side; returns the results of each list."""
  results = iter(pool.run(job for own in jobs.values() for job in own))
  return {i: [next(results) for _ in own] for i, own in jobs.items()}


_VECTOR = 1 << 10  # columns of a matrix that stands for a vector


def _sorted(arrays: Sequence[np.ndarray]) -> list[scales.Buckets]:
  """Sorts the rows and columns of each array into scale buckets."""
  matrices = [x.reshape(scales.matrix_shape(x.shape)) for x in arrays]
  vectors = [min(x.shape) == 1 for x in matrices]
  for i, matrix in enumerate(matrices):
    if vectors[i]:
      # The scale of a vector is that of its rows, wherever it is cut.
      width = min(matrix.size, _VECTOR)
      matrices[i] = matrix.reshape(-1)[: matrix.size // width * width].reshape(-1, width)
  exponents = [scales.exponent_of(x) for x in matrices]

  def sums(weights: dict[int, np.ndarray]) -> dict[int, scales.Sums]:
    jobs = {
      i: [
        functools.partial(scales.sums, rows, own, exponents[i])
        for rows in _cut(matrices[i])
      ]
      for i, own in weights.items()
    }
    return {i: scales.joined(found) for i, found in _run_all(jobs).items()}

  equal = lambda n: np.full(n, 1 / n, np.float32)
  first = sums({i: equal(x.shape[1]) for i, x in enumerate(matrices)})
  second = sums(
    {i: scales.inverse_weights(x.weighted) for i, x in first.items() if not vectors[i]}
  )
  return pool.run(
    functools.partial(scales.unsorted, first[i], exponent)
    if vectors[i]
    else functools.partial(scales.sort, first[i], second[i], exponent)
    for i, exponent in enumerate(exponents)
  )


def _cut(matrix: np.ndarray) -> list[np.ndarray]:
  """Cuts a matrix into parts of whole rows."""
  step = max(blocks.CAPACITY // matrix.shape[1], 1)
  return [matrix[start : start + step] for start in range(0, len(matrix), step)]


def _shape(draft: _Draft, buckets: scales.Buckets | None) -> tuple[int, int]:
  """Returns the number of buckets of a part, and a bound for its symbols."""
  assert draft.layout
  alphabet = draft.layout.alphabet
  if isinstance(draft.layout, layouts.Int):
    alphabet = (layouts.most_folded(draft.array) >> draft.layout.raw_bits) + 1
  return 1 if buckets is None else max(buckets.top, 1) + 1, alphabet


def _fitted(draft: _Draft, buckets: scales.Buckets | None) -> _Draft:
  """Returns a draft with so many raw bits that the tables of its buckets fit."""
  count, alphabet = _shape(draft, buckets)
  while (count + 1) * alphabet > contexts.MAX_ENTRIES:
    assert draft.layout
    more = dataclasses.replace(draft.layout, raw_bits=draft.layout.raw_bits + 1)
    draft, alphabet = draft._replace(layout=more), -(-alphabet // 2)
  return draft


def _counting(
  draft: _Draft, buckets: scales.Buckets | None
) -> list[Callable[[], np.ndarray]]:
  """Returns a job for each block of a part that counts its symbols in each bucket."""
  assert draft.layout
  layout, shape = draft.layout, _shape(draft, buckets)

  def job(start: int) -> np.ndarray:
    part = forms.bit_patterns(draft.array)[start : start + blocks.CAPACITY]
    _, columns = scales.matrix_shape(draft.array.shape)
    fill = _zeros
    if buckets is not None:
      fill = lambda out: buckets.write(out, start, columns, 1, 0)
    return blocks.histogram(
      lambda out: np.copyto(out, part), fill, part.size, shape, layout
    )

  starts = range(0, draft.array.size, blocks.CAPACITY)
  return [functools.partial(job, start) for start in starts]


def _choose(
  draft: _Draft, buckets: scales.Buckets | None, counts: np.ndarray
) -> Part:
  """Returns the part with the fewest bytes, given the counts."""
  assert draft.layout
  array, layout = draft
  used = np.flatnonzero(counts.any(axis=0))[-1] + 1
  counts = counts[:, :used]
  total = counts.sum(axis=0, keepdims=True)
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
