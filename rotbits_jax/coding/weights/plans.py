"""Plans: chooses how each array of a unit is stored.

Floats and short integers are coded. The coder uses one frequency table for the array,
or a table for each class of lines. An array that coding would not make shorter is
stored unchanged.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import tables
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import floats
from rotbits_jax.coding.weights import integers
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import numbers
from rotbits_jax.coding.weights import pool
from rotbits_jax.coding.weights import scales


class Coded(NamedTuple):
  """How an array is coded.

  Attributes:
    layout: layout of the numbers.
    lines: the lines with their scales; None if one table codes the array.
    counts: int64 `[labels, A]`, how often each symbol occurs in lines with each label.
  """

  layout: layouts.Layout
  lines: scales.Lines | None
  counts: np.ndarray


class Plan(NamedTuple):
  """How an array is stored.

  Attributes:
    array: the array, contiguous.
    coded: how it is coded; None if it is stored unchanged.
    saved: about how many bytes coding saves.
  """

  array: np.ndarray
  coded: Coded | None = None
  saved: float = 0.0


def plan(arrays: Sequence[np.ndarray]) -> list[Plan]:
  """Chooses the plan with the fewest bytes for each array.

  An array may be stored unchanged, coded with one table, or coded with a table for each
  class of lines.

  Args:
    arrays: arrays of dtypes in `layouts.DTYPES`.

  Returns:
    The plans.

  Raises:
    ValueError: if an array has another dtype.
  """
  for array in arrays:
    if array.dtype.name not in layouts.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  drafts = pool.run(functools.partial(_draft, array) for array in arrays)
  drafts = _joined(drafts)
  counted = [
    (i, start)
    for i, draft in enumerate(drafts)
    if draft.coded
    for start in range(0, draft.array.size, blocks.CAPACITY)
  ]
  parts = pool.run(functools.partial(_count, drafts[i], start) for i, start in counted)
  totals: dict[int, np.ndarray] = {}
  for (i, _), part in zip(counted, parts, strict=True):
    totals[i] = totals[i] + part if i in totals else part
  chosen = {
    i: functools.partial(_choose, drafts[i], total) for i, total in totals.items()
  }
  plans = dict(zip(chosen, pool.run(chosen.values()), strict=True))
  return [plans.get(i, draft) for i, draft in enumerate(drafts)]


def _draft(array: np.ndarray) -> Plan:
  """Returns a plan to code an array, without the counts, if its dtype has a layout."""
  plain = Plan(numbers.contiguous(array))
  if not array.size:
    return plain
  bits = numbers.bits(plain.array)
  if array.dtype in floats.LAYOUTS:
    layout: layouts.Layout = layouts.of_floats(bits, array.dtype)
  elif array.dtype in integers.DTYPES:
    layout = layouts.Int(array.dtype, _low_bits(plain.array))
  else:
    return plain
  matrix = plain.array.reshape(scales.matrix_shape(array.shape))
  lines = scales.sort(matrix) if layout.has_scale else None
  return plain._replace(coded=Coded(layout, lines, np.zeros((0, 0), np.int64)))


# About how many bytes a layout and its blocks take.
_LAYOUT_BYTES = 64


def _joined(drafts: list[Plan]) -> list[Plan]:
  """Gives a small array the layout of another array if its own layout costs more."""
  sizes: dict[layouts.Layout, int] = {}
  for draft in drafts:
    if draft.coded:
      layout = draft.coded.layout
      sizes[layout] = sizes.get(layout, 0) + draft.array.size
  joined = []
  for draft in drafts:
    if draft.coded and isinstance(draft.coded.layout, layouts.Float):
      layout = draft.coded.layout
      # A layout with a lower floor and a longer rest fits the numbers, too, but takes
      # more bits for each of them.
      wider = {
        other: sizes[layout] * (other.rest - layout.rest + layout.step - other.step)
        for other in sizes
        if type(other) is layouts.Float
        and other.dtype == layout.dtype
        and other != layout
        and other.rest >= layout.rest
        and other.step <= layout.step
      }
      if wider and min(wider.values()) < 8 * _LAYOUT_BYTES:
        best = min(wider, key=lambda other: wider[other])
        draft = draft._replace(coded=draft.coded._replace(layout=best))
    joined.append(draft)
  return joined


def _count(draft: Plan, start: int) -> np.ndarray:
  """Counts the symbols with each label in the block that starts at `start`."""
  assert draft.coded
  lines, bits = draft.coded.lines, numbers.bits(draft.array)
  part = bits[start : start + blocks.CAPACITY]
  shape = scales.matrix_shape(draft.array.shape)

  def fill(out: np.ndarray, labels: np.ndarray) -> None:
    out[:] = part
    if lines is None:
      labels[:] = 0
    else:
      lines.write(labels, start, shape, 1, 0)

  labels = 1 if lines is None else max(lines.top, 1) + 1
  return blocks.count(fill, part.size, draft.coded.layout, labels)


def _choose(draft: Plan, counts: np.ndarray) -> Plan:
  """Returns the plan with the fewest bytes, given the counts."""
  assert draft.coded
  array, (layout, lines, _) = draft.array, draft.coded
  total = counts.sum(axis=0, keepdims=True)
  cost = contexts.choose(layout, None, total).cost
  coded = Coded(layout, None, total)
  if lines:
    (used,) = np.nonzero(counts.any(axis=1))
    other = contexts.choose(layout, lines.classes(used), counts[used]).cost
    for labels in (lines.rows, lines.columns):
      other += tables.entropy_bits(np.bincount(labels)) / 8
    if other < cost:
      cost, coded = other, Coded(layout, lines, counts)
  saved = array.nbytes - array.size * layout.rest / 8 - cost
  return Plan(array, coded, saved) if saved > 0 else Plan(array)


def _low_bits(values: np.ndarray) -> int:
  """Returns the number of low bits that make the integers shortest as rests."""
  signed, most = values.dtype.kind == 'i', integers.MODELLED_BITS
  least = integers.least_low(int(values.max()), int(values.min()), signed, most)
  layout, bits = layouts.Int(values.dtype, least), numbers.bits(values)
  counts = np.zeros((1, layout.alphabet), np.int64)
  for start in range(0, bits.size, blocks.CAPACITY):
    part = bits[start : start + blocks.CAPACITY]

    def fill(out: np.ndarray, labels: np.ndarray, part: np.ndarray = part) -> None:
      out[:] = part
      labels[:] = 0

    counts += blocks.count(fill, part.size, layout, 1)
  costs = []
  for low in range(least, min(8 * values.dtype.itemsize, integers.MODELLED_BITS)):
    cost = contexts.choose(layouts.Int(values.dtype, low), None, counts).cost
    costs.append(cost + values.size * low / 8)
    counts = counts[:, ::2] + counts[:, 1::2]
  return least + int(np.argmin(costs))
