"""Specs: describe a unit, so that its stream can be read. They are stored as JSON.

A stranger may have written the JSON. `StreamSpec.from_json` accepts what `to_json`
returns, and raises a ValueError for anything else. It allocates no memory in proportion
to a number that it reads. The memory for the arrays of a valid spec is bounded: for an
array that is stored unchanged by the length of the stream, for a coded array by the
list of its blocks, and for frequency tables by the coded numbers.
"""

import dataclasses
import math
from typing import Any

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import order
from rotbits_jax.coding.weights import planes
from rotbits_jax.coding.weights.layouts import Grid

_MAX_AXES = 32
_MAX_SIZE = 1 << 48  # of an axis, a count or a number of bytes
_MAX_TABLES = 1 << 12  # in a unit of few numbers
_NUMBERS_PER_TABLE = 1 << 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec:
  """One array of a unit.

  Attributes:
    shape: shape of the array.
    dtype: name of the dtype, one of `layouts.DTYPES`.
    layout: index of its layout in the unit; None if the array is stored unchanged.
    checksum: CRC-32 of the bytes of the array that `decode` returns, in C order.
  """

  shape: tuple[int, ...]
  dtype: str
  layout: int | None
  checksum: int

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * layouts.DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutSpec:
  """One layout of a unit. Arrays of one dtype can share it.

  Attributes:
    layout: the layout.
    nbytes: number of bytes of its model in the stream, see `contexts.to_bytes`.
  """

  layout: layouts.Layout
  nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSpec:
  """A group: the numbers of some arrays of one layout, array after array, in blocks.

  Attributes:
    layout: index of the layout.
    arrays: indices of the arrays.
    lanes: number of lanes of each block.
    numbers: how many numbers each block has. The last block has fewer.
    nbytes: number of bytes of each block in the stream, without the rests.
  """

  layout: int
  arrays: tuple[int, ...]
  lanes: int
  numbers: int
  nbytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderSpec:
  """Describes lines that are stored in an order which other bits of the unit chose.

  Attributes:
    axes: (index, axis) of each array whose lines are exchanged. All are exchanged in
      the same order.
    distinct: D, the number of lines that are distinct, see `order`.
  """

  axes: tuple[tuple[int, int], ...]
  distinct: int

  @property
  def noise(self) -> int:
    """Number of bytes that chose the order."""
    return order.noise_size(self.distinct)

  @property
  def nbytes(self) -> int:
    """Number of bytes that the stream has in their place."""
    return order.stored_size(self.distinct)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSpec:
  """A unit of arrays that decodes on its own.

  Attributes:
    arrays: the arrays.
    layouts: the layouts of the coded arrays.
    groups: the groups of the coded arrays, see `grouping`.
    order: the lines that were exchanged; None if there are none.
  """

  arrays: tuple[ArraySpec, ...]
  layouts: tuple[LayoutSpec, ...]
  groups: tuple[GroupSpec, ...]
  order: OrderSpec | None = None

  def grid(self, array: ArraySpec) -> Grid | None:
    """Returns the grid on which the numbers of an array lie; None if there is none."""
    found = None if array.layout is None else self.layouts[array.layout].layout
    return found if isinstance(found, Grid) else None

  @property
  def exchanged(self) -> frozenset[int]:
    """Indices of the arrays whose lines are exchanged."""
    return (
      frozenset(index for index, _ in self.order.axes) if self.order else frozenset()
    )

  @property
  def max_tables(self) -> int:
    """How many frequency tables all layouts may have, see `max_tables`."""
    return max_tables(sum(x.size for x in self.arrays if x.layout is not None))

  def block_counts(self, group: GroupSpec) -> list[int]:
    """Returns how many numbers each block of a group has."""
    total = sum(self.arrays[i].size for i in group.arrays)
    return [
      min(group.numbers, total - start) for start in range(0, total, group.numbers)
    ]

  def rest_sizes(self, group: GroupSpec) -> list[int]:
    """Returns how many bytes the rests of each block of a group take."""
    rest = self.layouts[group.layout].layout.rest
    return [
      sum(planes.sizes(count, group.lanes, rest)) for count in self.block_counts(group)
    ]

  def noise_sizes(self) -> tuple[int, int]:
    """Returns how many bytes the rests and the unchanged arrays take.

    The first size is that of arrays whose lines are not exchanged, the second that of
    the others.
    """
    exchanged = self.exchanged
    sizes = [0, 0]
    for group in self.groups:
      sizes[group.arrays[0] in exchanged] += sum(self.rest_sizes(group))
    for i, array in enumerate(self.arrays):
      if array.layout is None:
        sizes[i in exchanged] += array.nbytes
    return sizes[0], sizes[1]

  @property
  def nbytes(self) -> int:
    """Length of the stream in bytes."""
    models = sum(layout.nbytes for layout in self.layouts)
    coded = sum(sum(group.nbytes) for group in self.groups)
    saved = self.order.noise - self.order.nbytes if self.order else 0
    return models + coded + sum(self.noise_sizes()) - saved

  def to_json(self) -> dict[str, Any]:
    """Returns the spec as a JSON value, in which records are short lists."""
    return {
      'arrays': [[x.dtype, list(x.shape), x.layout, x.checksum] for x in self.arrays],
      'layouts': [
        [x.layout.kind, x.layout.rest, x.layout.step, x.nbytes] for x in self.layouts
      ],
      'groups': [[x.lanes, x.numbers, list(x.nbytes)] for x in self.groups],
      'order': self.order and [list(map(list, self.order.axes)), self.order.distinct],
    }

  @classmethod
  def from_json(cls, value: Any) -> 'StreamSpec':
    """Makes a spec from a JSON value: the inverse of `to_json`.

    Raises:
      ValueError: if the value is not a spec.
    """
    fields = 'arrays', 'layouts', 'groups', 'order'
    if not isinstance(value, dict) or set(value) != set(fields):
      raise ValueError(f'the spec of a unit has fields {fields}, got {value!r:.100}')
    arrays = tuple(map(_array, _list(value['arrays'])))
    made = _layouts(_list(value['layouts']), arrays)
    exchanged = _order(value['order'], arrays)
    of_groups = grouping(arrays, {i for i, _ in exchanged.axes} if exchanged else set())
    groups = _list(value['groups'], len(of_groups))
    unit = cls(
      arrays=arrays,
      layouts=made,
      groups=tuple(
        _group(x, *group, arrays) for x, group in zip(groups, of_groups, strict=True)
      ),
      order=exchanged,
    )
    if len(made) * blocks.padded_count(1) > unit.max_tables:
      raise ValueError(f'{len(made)} layouts are too many for the numbers of a unit')
    if exchanged and exchanged.noise > unit.noise_sizes()[0]:
      raise ValueError('there are too few bytes to choose an order by')
    return unit


def max_tables(numbers: int) -> int:
  """Returns how many frequency tables all layouts of a unit may have.

  A table takes up to 56 KiB while the unit is decoded, but hardly any bytes in the
  stream. Therefore the numbers bound the tables.

  Args:
    numbers: how many numbers of the unit are coded.

  Returns:
    The bound. The tables of each layout are counted with their padding, see
    `blocks.padded_count`.
  """
  return _MAX_TABLES + numbers // _NUMBERS_PER_TABLE


def grouping(
  arrays: tuple[ArraySpec, ...], exchanged: set[int] | frozenset[int]
) -> list[tuple[int, tuple[int, ...]]]:
  """Returns the layout and the arrays of each group.

  Each layout has up to two groups: first the arrays whose lines are not exchanged, then
  the others. There is no group without arrays.
  """
  groups: dict[tuple[int, bool], list[int]] = {}
  for i, array in enumerate(arrays):
    if array.layout is not None:
      groups.setdefault((array.layout, i in exchanged), []).append(i)
  return [(layout, tuple(groups[layout, last])) for layout, last in sorted(groups)]


# ---- reading -------------------------------------------------------------------------


def _list(value: Any, size: int | None = None) -> list[Any]:
  if not isinstance(value, list) or (size is not None and len(value) != size):
    raise ValueError(f'expected a list of {size or "any"} values, got {value!r:.100}')
  return value


def _int(value: Any, least: int = 0, most: int = _MAX_SIZE) -> int:
  if type(value) is not int or not least <= value <= most:
    raise ValueError(f'expected an integer from {least} to {most}, got {value!r:.100}')
  return value


def _ints(value: Any) -> tuple[int, ...]:
  return tuple(map(_int, _list(value)))


def _array(value: Any) -> ArraySpec:
  dtype, shape, layout, checksum = _list(value, 4)
  if not isinstance(dtype, str) or dtype not in layouts.DTYPES:
    raise ValueError(f'an array of unknown dtype {dtype!r:.100}')
  sizes = _ints(shape)
  if len(sizes) > _MAX_AXES or math.prod(s for s in sizes if s) > _MAX_SIZE:
    raise ValueError(f'an array of shape {sizes!r:.100} is too large')
  spec = ArraySpec(
    shape=sizes,
    dtype=dtype,
    layout=None if layout is None else _int(layout),
    checksum=_int(checksum, most=0xFFFFFFFF),
  )
  if spec.layout is not None and not spec.size:
    raise ValueError('an array without numbers has a layout')
  return spec


def _layouts(
  values: list[Any], arrays: tuple[ArraySpec, ...]
) -> tuple[LayoutSpec, ...]:
  dtypes: list[set[str]] = [set() for _ in values]
  for array in arrays:
    if array.layout is not None:
      if array.layout >= len(values):
        raise ValueError(f'an array of layout {array.layout} of {len(values)}')
      dtypes[array.layout].add(array.dtype)
  made = []
  for value, names in zip(values, dtypes, strict=True):
    kind, rest, step, size = _list(value, 4)
    if len(names) != 1:
      raise ValueError(f'arrays of one layout are of dtypes {sorted(names)}')
    if not isinstance(kind, str):
      raise ValueError(f'a layout of unknown kind, {kind!r:.100}')
    layout = layouts.layout(kind, layouts.DTYPES[names.pop()], _int(rest), _int(step))
    made.append(LayoutSpec(layout=layout, nbytes=_int(size)))
  return tuple(made)


def _order(value: Any, arrays: tuple[ArraySpec, ...]) -> OrderSpec | None:
  if value is None:
    return None
  pairs, distinct = _list(value, 2)
  axes, counts = [], set()
  for pair in _list(pairs):
    index, axis = _ints(_list(pair, 2))
    if index >= len(arrays) or axis >= len(arrays[index].shape):
      raise ValueError(f'no axis {axis} of array {index} to exchange lines along')
    if not arrays[index].size:
      raise ValueError(f'array {index} has no numbers to exchange')
    axes.append((index, axis))
    counts.add(arrays[index].shape[axis])
  if len(counts) != 1 or sorted({i for i, _ in axes}) != [i for i, _ in axes]:
    raise ValueError(f'lines of these axes cannot be exchanged: {axes!r:.100}')
  most = min(max(counts), order.MAX_LINES)
  return OrderSpec(axes=tuple(axes), distinct=_int(distinct, 2, most))


def _group(
  value: Any, layout: int, members: tuple[int, ...], arrays: tuple[ArraySpec, ...]
) -> GroupSpec:
  lanes, numbers, sizes = _list(value, 3)
  group = GroupSpec(
    layout=layout,
    arrays=members,
    lanes=_int(lanes, 1, blocks.LANES),
    numbers=_int(numbers, 1, blocks.CAPACITY),
    nbytes=_ints(sizes),
  )
  if -(-group.numbers // group.lanes) > blocks.STEPS:
    raise ValueError(
      f'{group.numbers} numbers in {group.lanes} lanes are too many steps'
    )
  total = sum(arrays[i].size for i in members)
  if group.numbers > total or len(group.nbytes) != -(-total // group.numbers):
    raise ValueError(f'{len(group.nbytes)} blocks for {total} numbers')
  if min(group.nbytes) < 4 * group.lanes + 4:
    raise ValueError('a block is too short for its lanes')
  return group
