"""A unit of arrays as one stream of blocks, and back."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import host
from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import numbers
from rotbits_jax.coding.weights import order
from rotbits_jax.coding.weights import plans
from rotbits_jax.coding.weights import pool
from rotbits_jax.coding.weights import specs


class Encoded(NamedTuple):
  """What `encode` returns.

  Attributes:
    spec: of the unit.
    data: uint8 `[spec.nbytes]`, the stream.
    arrays: as `decode` gives them back: exchangeable lines are in another order.
    order_bits: what that order saved.
  """

  spec: specs.UnitSpec
  data: np.ndarray
  arrays: list[np.ndarray]
  order_bits: float


def encode(
  arrays: Sequence[np.ndarray], *, exchangeable: Mapping[int, int] | None = None
) -> Encoded:
  """Codes arrays as one unit.

  Args:
    arrays: of dtypes in `layouts.DTYPES`, in any order in memory.
    exchangeable: indices of arrays, and the axis of each along which its lines may be
      put in another order, in the same for all these arrays. F lines save log2 F! bits.
      They are left as they are where the axes are not of one length, or where the other
      arrays hold too few bits.

  Returns:
    The spec, the stream, the arrays as they are stored and what their order saved.

  Raises:
    ValueError: if a dtype cannot be stored, or there is no such array or axis.
  """
  arrays = [np.asarray(array) for array in arrays]
  axes = _axes([array.shape for array in arrays], exchangeable or {})
  planned = _worthwhile(plans.plan(arrays))
  used, models = _models(planned)
  stored = [plan.array for plan in planned]
  entries = tuple(
    specs.ArraySpec(
      shape=plan.array.shape,
      dtype=plan.array.dtype.name,
      layout=used.index(plan.coded.layout) if plan.coded else None,
      checksum=0,
    )
    for plan in planned
  )
  lines, exchanged = _sorted_lines(planned, axes)
  tables = [blocks.tables_of(model.frequencies, decoding=False) for model in models]
  moved = set(dict(exchanged.axes)) if exchanged else set()
  groups = specs.grouping(entries, moved)
  coded: dict[tuple[int, ...], list[tuple[np.ndarray, np.ndarray]]] = {}

  def encode_groups(last: bool) -> list[np.ndarray]:
    """Encodes the groups of exchanged arrays or the others, and returns their noise."""
    jobs: dict[tuple[int, ...], list[Callable[[], tuple[np.ndarray, np.ndarray]]]] = {}
    for layout, members in groups:
      if (members[0] in moved) == last:
        model = _model_of(models[layout], entries, layout, members)
        group = _Group(
          used[layout], model, tables[layout], [stored[i] for i in members]
        )
        jobs[members] = group.encode_jobs()
    results = iter(pool.run(job for of_group in jobs.values() for job in of_group))
    for members, of_group in jobs.items():
      coded[members] = [next(results) for _ in of_group]
    noise = [rests for members in jobs for _, rests in coded[members]]
    for i, entry in enumerate(entries):
      if entry.layout is None and (i in moved) == last:
        noise.append(_bytes(stored[i]))
    return noise

  noise, prefix, order_bits = encode_groups(last=False), np.zeros(0, np.uint8), 0.0
  if exchanged:
    joined = np.concatenate(noise)
    popped, prefix = order.pop(joined[: exchanged.noise], exchanged.distinct)
    noise = [joined[exchanged.noise :]]
    order_bits = 8.0 * (exchanged.noise - exchanged.nbytes)
    lines[: exchanged.distinct] = lines[popped]
    for i, axis in exchanged.axes:
      stored[i] = np.ascontiguousarray(stored[i].take(lines, axis))
      if (layout := entries[i].layout) is not None:
        within = _members(entries, layout).index(i)
        models[layout] = models[layout].take(within, lines, axis, entries[i].shape)
    noise += encode_groups(last=True)
  heads = [np.frombuffer(contexts.to_bytes(model), np.uint8) for model in models]
  bodies = [part for _, members in groups for part, _ in coded[members]]
  data = np.concatenate([np.zeros(0, np.uint8), *heads, *bodies, prefix, *noise])
  checksums = pool.run(functools.partial(_checksum, array) for array in stored)
  spec = specs.UnitSpec(
    arrays=tuple(
      dataclasses.replace(entry, checksum=checksum)
      for entry, checksum in zip(entries, checksums, strict=True)
    ),
    layouts=tuple(
      specs.LayoutSpec(layout=layout, nbytes=head.size)
      for layout, head in zip(used, heads, strict=True)
    ),
    groups=tuple(
      specs.GroupSpec(
        layout=layout,
        arrays=members,
        nbytes=tuple(part.size for part, _ in coded[members]),
        **_geometry(sum(stored[i].size for i in members), used[layout])._asdict(),
      )
      for layout, members in groups
    ),
    order=exchanged,
  )
  return Encoded(spec, data, stored, order_bits)


def decode(
  spec: specs.UnitSpec,
  data: np.ndarray | memoryview,
  *,
  out: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
  """The inverse of `encode`.

  Args:
    spec: of the unit.
    data: uint8 `[spec.nbytes]`, the stream; it may be a memory map.
    out: arrays to decode into, in C order, of the shapes and dtypes of the spec. New
      ones by default.

  Returns:
    The arrays as they are stored, bit for bit. They do not share memory with the data.

  Raises:
    ValueError: if the stream does not fit the spec, or an array has another checksum.
  """
  stream = np.asarray(data).view(np.ndarray)
  if stream.dtype != np.uint8 or stream.shape != (spec.nbytes,):
    raise ValueError(
      f'the stream is uint8 [{spec.nbytes}] by its spec, got {stream.dtype} '
      f'{list(stream.shape)}'
    )
  position = 0

  def read(size: int) -> np.ndarray:
    nonlocal position
    position += size
    return stream[position - size : position]

  models = [
    contexts.from_bytes(
      read(layout.nbytes).tobytes(),
      layout.layout,
      [spec.arrays[i].shape for i in _members(spec.arrays, number)],
    )
    for number, layout in enumerate(spec.layouts)
  ]
  bodies = [[read(size) for size in group.nbytes] for group in spec.groups]
  prefix = read(spec.order.nbytes if spec.order else 0)
  noise = read(stream.size - position)

  arrays = _outputs(spec, out)
  tables = [blocks.tables_of(model.frequencies, decoding=True) for model in models]
  # What reads the noise: its size there, and a function of it.
  readers: list[tuple[int, Callable[[np.ndarray], None]]] = []
  moved = spec.exchanged
  for last in (False, True):
    for group, parts in zip(spec.groups, bodies, strict=True):
      if (group.arrays[0] in moved) == last:
        layout = group.layout
        readers += _Group(
          spec.layouts[layout].layout,
          _model_of(models[layout], spec.arrays, layout, group.arrays),
          tables[layout],
          [arrays[i] for i in group.arrays],
        ).decode_jobs(group, parts)
    for i, array in enumerate(spec.arrays):
      if array.layout is None and (i in moved) == last:
        readers.append((array.nbytes, functools.partial(_read_bytes, arrays[i])))
  # The first bytes of the noise may be those that chose an order, which is known when
  # the exchanged arrays are: what needs them waits.
  missing = spec.order.noise if spec.order else 0
  early, late, start = [], [], 0
  for size, job in readers:
    if start >= missing:
      part = noise[start - missing : start - missing + size]
      early.append(functools.partial(job, part))
    else:
      late.append((start, size, job))
    start += size
  pool.run(early)
  if spec.order:
    stop = max(start + size for start, size, _ in late)
    head = _recovered(spec.order, arrays, prefix)
    head = np.concatenate([head, noise[: max(stop - missing, 0)]])
    pool.run(
      functools.partial(job, head[start : start + size]) for start, size, job in late
    )
  checksums = pool.run(functools.partial(_checksum, array) for array in arrays)
  for i, (array, checksum) in enumerate(zip(spec.arrays, checksums, strict=True)):
    if array.checksum != checksum:
      raise ValueError(f'array {i} of the unit is damaged: its checksum differs')
  return arrays


# ---- groups --------------------------------------------------------------------------


class _Geometry(NamedTuple):
  """How a group is cut into blocks."""

  lanes: int
  numbers: int


def _geometry(total: int, layout: layouts.Layout) -> _Geometry:
  """Blocks of about the same size."""
  count = -(-total // blocks.CAPACITY)
  size = -(-total // count)
  return _Geometry(blocks.lanes_for(size, layout), size)


class _Group(NamedTuple):
  """The numbers of arrays of one layout, one array after the other."""

  layout: layouts.Layout
  model: contexts.Model  # of just these arrays
  tables: blocks.Tables
  arrays: list[np.ndarray]  # contiguous

  def encode_jobs(self) -> list[Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """Functions that return the blocks, and their rests."""
    total = sum(array.size for array in self.arrays)
    lanes, size = _geometry(total, self.layout)

    def encode_one(start: int) -> tuple[np.ndarray, np.ndarray]:
      def fill(bits: np.ndarray, places: np.ndarray) -> None:
        self._copy(start, bits, write=False)
        self._contexts(start, places)

      count = min(size, total - start)
      return blocks.encode(fill, count, lanes, self.layout, self.tables)

    return [functools.partial(encode_one, x) for x in range(0, total, size)]

  def decode_jobs(
    self, spec: specs.GroupSpec, parts: list[np.ndarray]
  ) -> list[tuple[int, Callable[[np.ndarray], None]]]:
    """The size of the rests of each block, and a function of them that decodes it."""
    total = sum(array.size for array in self.arrays)

    def decode_one(start: int, part: np.ndarray, rests: np.ndarray) -> None:
      blocks.decode(
        part,
        rests,
        functools.partial(self._contexts, start),
        functools.partial(self._copy, start, write=True),
        min(spec.numbers, total - start),
        spec.lanes,
        self.layout,
        self.tables,
      )

    return [
      (
        blocks.rest_size(min(spec.numbers, total - x), spec.lanes, self.layout),
        functools.partial(decode_one, x, part),
      )
      for x, part in zip(range(0, total, spec.numbers), parts, strict=True)
    ]

  def _contexts(self, start: int, out: np.ndarray) -> None:
    """Writes the tables of the numbers from `start` on."""
    for i, place, size, first in self._parts(start, out.size):
      self.model.write(out[place : place + size], i, first, self.arrays[i].shape)

  def _copy(self, start: int, bits: np.ndarray, *, write: bool) -> None:
    """Copies bit patterns from or to the arrays' numbers from `start` on."""
    for i, place, size, first in self._parts(start, bits.size):
      there = numbers.bits(self.arrays[i])[first : first + size]
      here = bits[place : place + size]
      if write:
        there[:] = here
      else:
        here[:] = there

  def _parts(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
    """Where numbers are: array, place among the numbers, size, place in the array."""
    parts, begin = [], 0
    for i, array in enumerate(self.arrays):
      low, high = max(start, begin), min(start + count, begin + array.size)
      if low < high:
        parts.append((i, low - start, high - low, low - begin))
      begin += array.size
    return parts


def _members(entries: Sequence[specs.ArraySpec], layout: int) -> list[int]:
  """Indices of the arrays of a layout."""
  return [i for i, entry in enumerate(entries) if entry.layout == layout]


def _model_of(
  model: contexts.Model,
  entries: Sequence[specs.ArraySpec],
  layout: int,
  members: tuple[int, ...],
) -> contexts.Model:
  """The part of a layout's model that is some of its arrays'."""
  within = [_members(entries, layout).index(i) for i in members]
  return model._replace(
    lines=tuple(model.lines[i] for i in within),
    first=tuple(model.first[i] for i in within),
  )


# ---- plans ---------------------------------------------------------------------------


# A layout takes about as many bytes in the spec and the stream.
_LAYOUT_BYTES = 128


def _worthwhile(planned: list[plans.Plan]) -> list[plans.Plan]:
  """Stores arrays as they are where a layout saves less than it takes."""
  saved: dict[layouts.Layout, float] = {}
  for plan in planned:
    if plan.coded:
      layout = plan.coded.layout
      saved[layout] = saved.get(layout, 0.0) + plan.saved
  return [
    plans.Plan(plan.array)
    if plan.coded and saved[plan.coded.layout] < _LAYOUT_BYTES
    else plan
    for plan in planned
  ]


def _models(
  planned: list[plans.Plan],
) -> tuple[list[layouts.Layout], list[contexts.Model]]:
  """The layouts in use, and their models.

  Where these need too many tables, arrays are stored as they are: `planned` changes.
  """
  used: list[layouts.Layout] = []
  for plan in planned:
    if plan.coded and plan.coded.layout not in used:
      used.append(plan.coded.layout)
  models = []
  for layout in used:
    coded = {
      i: plan.coded
      for i, plan in enumerate(planned)
      if plan.coded and plan.coded.layout == layout
    }
    while (
      contexts.count_tables([x.lines for x in coded.values()]) > contexts.MAX_TABLES
    ):
      least = min(coded, key=lambda i: planned[i].saved)
      planned[least] = plans.Plan(planned[least].array)
      del coded[least]
    lines = [x.lines for x in coded.values()]
    models.append(contexts.fit(layout, lines, [x.counts for x in coded.values()]))
  return used, models


# ---- the order of lines --------------------------------------------------------------


def _axes(
  shapes: list[tuple[int, ...]], exchangeable: Mapping[int, int]
) -> tuple[tuple[int, int], ...]:
  """The arrays whose lines may be exchanged, with their axes; none if they disagree."""
  for index, axis in exchangeable.items():
    if not (0 <= index < len(shapes) and 0 <= axis < len(shapes[index])):
      raise ValueError(f'no axis {axis} of array {index} to exchange lines along')
  counts = {shapes[index][axis] for index, axis in exchangeable.items()}
  if any(0 in shapes[index] for index in exchangeable) or len(counts) != 1:
    return ()
  if not 2 <= counts.pop() <= specs.MAX_LINES:
    return ()
  return tuple(sorted(exchangeable.items()))


def _sorted_lines(
  planned: list[plans.Plan], axes: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, specs.OrderSpec | None]:
  """The order of sorted lines, and its spec if there are bits to choose another by."""
  none = np.zeros(0, np.int64)
  if not axes:
    return none, None
  lines, distinct = _sort([plan.array for plan in planned], axes)
  spec = specs.OrderSpec(axes=axes, distinct=distinct)
  available = sum(
    plan.array.size * plan.coded.layout.rest // 8 if plan.coded else plan.array.nbytes
    for i, plan in enumerate(planned)
    if i not in dict(axes)
  )
  # The spec takes some bytes.
  pays = distinct > 1 and spec.noise - spec.nbytes > 16 and spec.noise <= available
  return (lines, spec) if pays else (none, None)


def _sort(
  arrays: Sequence[np.ndarray], axes: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, int]:
  """Sorts exchangeable lines: all arrays' parts of a line, one after the other."""
  views = [np.moveaxis(arrays[index], axis, 0) for index, axis in axes]

  def lines(rows: np.ndarray | slice, views: list[np.ndarray]) -> np.ndarray:
    parts = [np.ascontiguousarray(view[rows]) for view in views]
    return np.concatenate([x.reshape(len(x), -1).view(np.uint8) for x in parts], axis=1)

  first = views[0]
  if first.ndim == 2:
    first = first[:, : max(8 // first.dtype.itemsize, 1)]
  prefixes = lines(slice(None), [first])[:, :8]
  return order.sort(prefixes, lambda rows: lines(rows, views))


def _recovered(
  spec: specs.OrderSpec, arrays: Sequence[np.ndarray], prefix: np.ndarray
) -> np.ndarray:
  """The bytes that chose the order of lines, given the lines."""
  found, distinct = _sort(arrays, spec.axes)
  places = found[:distinct]
  if distinct != spec.distinct or places.max() >= distinct:
    raise ValueError('the exchanged lines are damaged')
  ranks = np.empty_like(places)
  ranks[places] = np.arange(distinct)
  return order.push(prefix, ranks)


# ---- arrays --------------------------------------------------------------------------


def _outputs(
  spec: specs.UnitSpec, out: Sequence[np.ndarray] | None
) -> list[np.ndarray]:
  """New arrays, or those given if they fit."""
  wanted = [(array.shape, layouts.DTYPES[array.dtype]) for array in spec.arrays]
  if out is None:
    return [host.empty(shape, dtype) for shape, dtype in wanted]
  if len(out) != len(wanted):
    raise ValueError(f'{len(out)} arrays to decode {len(wanted)} into')
  for i, (array, (shape, dtype)) in enumerate(zip(out, wanted, strict=True)):
    if array.shape != shape or array.dtype != dtype:
      raise ValueError(
        f'array {i} of the unit is {dtype} {shape}, got {array.dtype=} {array.shape=}'
      )
    if not (array.flags.c_contiguous and array.flags.writeable):
      raise ValueError(f'array {i} to decode into is not contiguous, or read-only')
  return list(out)


def _bytes(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)


def _read_bytes(array: np.ndarray, part: np.ndarray) -> None:
  _bytes(array)[:] = part


def _checksum(array: np.ndarray) -> int:
  return zlib_ng.crc32(_bytes(array))
