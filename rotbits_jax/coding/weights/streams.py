"""Encoding and decoding of a unit: a list of arrays that decodes on its own.

`coding.weights` describes the stream of a unit, and defines lines, layouts, groups,
rests and noise.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import types
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import contexts
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import numbers
from rotbits_jax.coding.weights import order
from rotbits_jax.coding.weights import plans
from rotbits_jax.coding.weights import pool
from rotbits_jax.coding.weights import specs
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host


class Encoded(NamedTuple):
  """An encoded unit.

  Attributes:
    spec: the numbers that are needed to read the stream.
    data: uint8 `[spec.nbytes]`, the stream.
    arrays: the arrays that `decode` will return. They equal the given arrays except for
      the order of exchanged lines.
    order_bits: bits that this order saved.
  """

  spec: specs.StreamSpec
  data: np.ndarray
  arrays: list[np.ndarray]
  order_bits: float


def encode(
  arrays: Sequence[np.ndarray], *, exchangeable: Mapping[int, int] | None = None
) -> Encoded:
  """Encodes arrays as one unit.

  Args:
    arrays: arrays of dtypes in `layouts.DTYPES`, with any strides.
    exchangeable: maps the indices of arrays to the axis along which the lines of that
      array may be reordered. All these arrays are reordered alike. F lines save
      log2 F! bits. The lines keep their order if the axes differ in length, or if the
      other arrays hold too few bits to choose an order.

  Returns:
    The encoded unit.

  Raises:
    ValueError: if a dtype cannot be stored, or if an index or an axis does not exist.
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
    """Encodes the groups with exchanged lines (`last`) or without; returns noise."""
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
  spec = specs.StreamSpec(
    arrays=tuple(
      dataclasses.replace(entry, checksum=checksums_lib.of_array(array))
      for entry, array in zip(entries, stored, strict=True)
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
        **_geometry(sum(stored[i].size for i in members))._asdict(),
      )
      for layout, members in groups
    ),
    order=exchanged,
  )
  return Encoded(spec, data, stored, order_bits)


def estimate(arrays: Sequence[np.ndarray]) -> float:
  """Estimates how many bytes arrays take in a unit, without coding them."""
  return sum(plan.array.nbytes - plan.saved for plan in plans.plan(arrays))


def decode(
  spec: specs.StreamSpec,
  data: np.ndarray | memoryview,
  *,
  out: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
  """Decodes a unit: the inverse of `encode`.

  Args:
    spec: the spec of the unit.
    data: uint8 `[spec.nbytes]`, the stream; it may be a memory map.
    out: arrays to decode into, in C order, with the shapes and dtypes of the spec. By
      default the function makes new arrays. An array of a grid may be of int16, or of
      its `integer_dtype`: it gets the integers in place of the numbers.

  Returns:
    The arrays, equal to `Encoded.arrays` bit for bit. They do not share memory with
    `data`.

  Raises:
    ValueError: if the stream does not fit the spec, or if the checksum of an array
      differs from the spec's.
  """
  # A view as a plain array, because a memory map is slow to slice.
  stream = np.asarray(data).view(np.ndarray)
  if stream.dtype != np.uint8 or stream.shape != (spec.nbytes,):
    raise ValueError(
      f'the stream must be uint8 [{spec.nbytes}], got {stream.dtype} '
      f'{list(stream.shape)}'
    )
  position = 0

  def read(size: int) -> np.ndarray:
    nonlocal position
    position += size
    return stream[position - size : position]

  models: list[contexts.Model] = []
  tables_left = spec.max_tables
  for number, entry in enumerate(spec.layouts):
    shapes = [spec.arrays[i].shape for i in _members(spec.arrays, number)]
    of_layout = read(entry.nbytes).tobytes()
    models.append(contexts.from_bytes(of_layout, entry.layout, shapes))
    tables_left -= blocks.padded_count(len(models[-1].frequencies))
    if tables_left < 0:
      raise ValueError(f'the layouts have more than {spec.max_tables} frequency tables')
  bodies = [[read(size) for size in group.nbytes] for group in spec.groups]
  prefix = read(spec.order.nbytes if spec.order else 0)
  noise = read(stream.size - position)

  arrays = _outputs(spec, out)
  grids = {
    i: grid
    for i, entry in enumerate(spec.arrays)
    if (grid := spec.grid(entry)) is not None and arrays[i].dtype.kind == 'i'
  }
  tables = [blocks.tables_of(model.frequencies, decoding=True) for model in models]
  # The parts of the noise in order: the size of each, and a function that reads it.
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
  # The first bytes of the noise are missing if they chose an order. They become known
  # when the arrays with exchanged lines are decoded. Readers of these bytes run late.
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
    head = _recovered(spec.order, arrays, grids, prefix)
    head = np.concatenate([head, noise[: max(stop - missing, 0)]])
    pool.run(
      functools.partial(job, head[start : start + size]) for start, size, job in late
    )
  for i, found in enumerate(arrays):
    # Not in the pool, because a checksum takes less time than starting a job does.
    if _checksum(found, grids.get(i)) != spec.arrays[i].checksum:
      raise ValueError(f'array {i} of the unit is damaged: its checksum differs')
  return arrays


# ---- groups --------------------------------------------------------------------------


class _Geometry(NamedTuple):
  """The lanes of each block of a group, and the numbers of each block but the last."""

  lanes: int
  numbers: int


def _geometry(total: int) -> _Geometry:
  """Divides `total` numbers into as few blocks as possible, of similar sizes."""
  count = -(-total // blocks.CAPACITY)
  size = -(-total // count)
  return _Geometry(blocks.lanes_for(size), size)


class _Group(NamedTuple):
  """A group: the numbers of some arrays of one layout, one array after the other."""

  layout: layouts.Layout
  model: contexts.Model  # model of these arrays only
  tables: blocks.Tables
  arrays: list[np.ndarray]  # contiguous

  def encode_jobs(self) -> list[Callable[[], tuple[np.ndarray, np.ndarray]]]:
    """Returns a job for each block; it returns the coded bytes and the rests."""
    total = sum(array.size for array in self.arrays)
    lanes, size = _geometry(total)

    def encode_one(start: int) -> tuple[np.ndarray, np.ndarray]:
      def fill(bits: np.ndarray, places: np.ndarray) -> None:
        self._read(start, bits)
        self._contexts(start, places)

      count = min(size, total - start)
      return blocks.encode(fill, count, lanes, self.layout, self.tables)

    return [functools.partial(encode_one, x) for x in range(0, total, size)]

  def decode_jobs(
    self, spec: specs.GroupSpec, parts: list[np.ndarray]
  ) -> list[tuple[int, Callable[[np.ndarray], None]]]:
    """Returns, for each block, the size of its rests and a job that decodes it.

    Args:
      spec: the spec of the group.
      parts: the coded bytes of each block.

    Returns:
      Pairs of the size in bytes and a function that takes the rests.
    """
    total, layout = sum(array.size for array in self.arrays), self.layout
    if isinstance(layout, layouts.Grid) and any(
      array.dtype.kind == 'i' for array in self.arrays
    ):
      layout = layout.integers

    def decode_one(start: int, part: np.ndarray, rests: np.ndarray) -> None:
      blocks.decode(
        part,
        rests,
        functools.partial(self._contexts, start),
        functools.partial(self._write, start, layout.dtype),
        min(spec.numbers, total - start),
        spec.lanes,
        layout,
        self.tables,
      )

    return [
      (
        blocks.rest_size(min(spec.numbers, total - x), spec.lanes, layout),
        functools.partial(decode_one, x, part),
      )
      for x, part in zip(range(0, total, spec.numbers), parts, strict=True)
    ]

  def _contexts(self, start: int, out: np.ndarray) -> None:
    """Writes the index of the table of each number from `start` on."""
    for i, place, size, first in self._parts(start, out.size):
      self.model.write(out[place : place + size], i, first, self.arrays[i].shape)

  def _read(self, start: int, bits: np.ndarray) -> None:
    """Copies the bit patterns of the numbers from `start` on into an array `[n]`."""
    for i, place, size, first in self._parts(start, bits.size):
      own = numbers.bits(self.arrays[i])[first : first + size]
      bits[place : place + size] = own

  def _write(self, start: int, dtype: np.dtype, bits: np.ndarray) -> None:
    """Copies bit patterns into the arrays.

    Args:
      start: the first number, counted within the group.
      dtype: dtype of the numbers with these patterns: int16 for the integers of a grid.
      bits: unsigned integers `[n]`.
    """
    for i, place, size, first in self._parts(start, bits.size):
      own = self.arrays[i].reshape(-1)[first : first + size]
      found = bits[place : place + size].view(dtype)
      if dtype != self.layout.dtype and own.dtype.kind != 'i':
        assert isinstance(self.layout, layouts.Grid)
        found = self.layout.numbers(found)
      own[:] = found

  def _parts(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
    """Finds the arrays that hold `count` numbers from `start` on.

    Returns:
      For each array: its index, its first place among these numbers, how many of them
      it holds, and the place of the first of them in the array.
    """
    parts, begin = [], 0
    for i, array in enumerate(self.arrays):
      low, high = max(start, begin), min(start + count, begin + array.size)
      if low < high:
        parts.append((i, low - start, high - low, low - begin))
      begin += array.size
    return parts


def _members(entries: Sequence[specs.ArraySpec], layout: int) -> list[int]:
  """Returns the indices of the arrays of a layout."""
  return [i for i, entry in enumerate(entries) if entry.layout == layout]


def _model_of(
  model: contexts.Model,
  entries: Sequence[specs.ArraySpec],
  layout: int,
  members: tuple[int, ...],
) -> contexts.Model:
  """Returns the part of a layout's model that concerns some of its arrays."""
  within = [_members(entries, layout).index(i) for i in members]
  return model._replace(
    lines=tuple(model.lines[i] for i in within),
    first=tuple(model.first[i] for i in within),
  )


# ---- plans ---------------------------------------------------------------------------


# Estimated bytes of a layout in the spec and in the stream.
_LAYOUT_BYTES = 128


def _worthwhile(planned: list[plans.Plan]) -> list[plans.Plan]:
  """Returns plans in which every layout saves more than it takes.

  The arrays of other layouts are stored as they are.
  """
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
  """Returns the layouts in use and their models.

  If a layout needs more than `contexts.MAX_TABLES` tables, the arrays that save least
  are stored as they are. If all layouts together need more than `specs.max_tables`, the
  layouts that save least are not used. The function changes `planned` in place.
  """
  coded: dict[layouts.Layout, dict[int, plans.Coded]] = {}
  for i, plan in enumerate(planned):
    if plan.coded:
      coded.setdefault(plan.coded.layout, {})[i] = plan.coded
  counts: dict[layouts.Layout, int] = {}
  for layout, own in coded.items():
    while (count := _count_tables(own)) > contexts.MAX_TABLES:
      least = min(own, key=lambda i: planned[i].saved)
      planned[least] = plans.Plan(planned[least].array)
      del own[least]
    counts[layout] = blocks.padded_count(count)
  size = {layout: sum(planned[i].array.size for i in x) for layout, x in coded.items()}
  saved = {layout: sum(planned[i].saved for i in x) for layout, x in coded.items()}
  for layout in sorted(coded, key=saved.__getitem__):
    if sum(counts.values()) <= specs.max_tables(sum(size.values())):
      break
    for i in coded.pop(layout):
      planned[i] = plans.Plan(planned[i].array)
    del counts[layout], size[layout]
  models = []
  for layout, own in coded.items():
    lines = [x.lines for x in own.values()]
    models.append(contexts.fit(layout, lines, [x.counts for x in own.values()]))
  return list(coded), models


def _count_tables(coded: Mapping[int, plans.Coded]) -> int:
  return contexts.count_tables([x.lines for x in coded.values()])


# ---- the order of lines --------------------------------------------------------------


def _axes(
  shapes: list[tuple[int, ...]], exchangeable: Mapping[int, int]
) -> tuple[tuple[int, int], ...]:
  """Returns the index and the axis of each array whose lines may be exchanged.

  Returns an empty tuple if the axes differ in length, if they have too few or too many
  lines, or if an array is empty.

  Raises:
    ValueError: if there is no such array or axis.
  """
  for index, axis in exchangeable.items():
    if not (0 <= index < len(shapes) and 0 <= axis < len(shapes[index])):
      raise ValueError(f'no axis {axis} of array {index} to exchange lines along')
  counts = {shapes[index][axis] for index, axis in exchangeable.items()}
  if any(0 in shapes[index] for index in exchangeable) or len(counts) != 1:
    return ()
  if not 2 <= counts.pop() <= order.MAX_LINES:
    return ()
  return tuple(sorted(exchangeable.items()))


def _sorted_lines(
  planned: list[plans.Plan], axes: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, specs.OrderSpec | None]:
  """Sorts exchangeable lines, if an order saves bits and there is noise to choose it.

  Returns:
    The indices of the sorted lines and the spec of their order; or else an empty array
    and None.
  """
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
  arrays: Sequence[np.ndarray],
  axes: tuple[tuple[int, int], ...],
  grids: Mapping[int, layouts.Grid] = types.MappingProxyType({}),
) -> tuple[np.ndarray, int]:
  """Sorts exchangeable lines; see `order.sort`.

  The bytes of a line are its parts in all arrays, one after the other.

  Args:
    arrays: the arrays.
    axes: the index and the axis of each array with exchangeable lines.
    grids: the grids of the arrays that hold integers in place of numbers, by index.
  """
  views = [(np.moveaxis(arrays[i], axis, 0), grids.get(i)) for i, axis in axes]

  def lines(
    rows: np.ndarray | slice, views: list[tuple[np.ndarray, layouts.Grid | None]]
  ) -> np.ndarray:
    parts = [grid.numbers(x[rows]) if grid else x[rows] for x, grid in views]
    parts = [np.ascontiguousarray(part) for part in parts]
    return np.concatenate([x.reshape(len(x), -1).view(np.uint8) for x in parts], axis=1)

  first, grid = views[0]
  if first.ndim == 2:
    dtype = grid.dtype if grid else first.dtype
    first = first[:, : max(8 // dtype.itemsize, 1)]
  prefixes = lines(slice(None), [(first, grid)])[:, :8]
  return order.sort(prefixes, lambda rows: lines(rows, views))


def _recovered(
  spec: specs.OrderSpec,
  arrays: Sequence[np.ndarray],
  grids: Mapping[int, layouts.Grid],
  prefix: np.ndarray,
) -> np.ndarray:
  """Returns the noise that chose the order of lines.

  Args:
    spec: the spec of the order.
    arrays: the decoded arrays.
    grids: see `_sort`.
    prefix: uint8, the bytes that are stored in place of the noise.

  Raises:
    ValueError: if the lines or the bytes are damaged.
  """
  found, distinct = _sort(arrays, spec.axes, grids)
  places = found[:distinct]
  if distinct != spec.distinct or places.max() >= distinct:
    raise ValueError('the exchanged lines are damaged')
  ranks = np.empty_like(places)
  ranks[places] = np.arange(distinct)
  return order.push(prefix, ranks)


# ---- arrays --------------------------------------------------------------------------


def _outputs(
  spec: specs.StreamSpec, out: Sequence[np.ndarray] | None
) -> list[np.ndarray]:
  """Returns the given arrays if they fit the spec; makes new ones if `out` is None.

  Raises:
    ValueError: if the arrays do not fit.
  """
  wanted = [(array.shape, layouts.DTYPES[array.dtype]) for array in spec.arrays]
  if out is None:
    return [host.empty(shape, dtype) for shape, dtype in wanted]
  if len(out) != len(wanted):
    raise ValueError(f'the unit has {len(wanted)} arrays, got {len(out)} in `out`')
  for i, (array, (shape, dtype)) in enumerate(zip(out, wanted, strict=True)):
    grid = spec.grid(spec.arrays[i])
    known = (dtype, np.int16, grid.integer_dtype) if grid else (dtype,)
    if array.shape != shape or array.dtype not in known:
      raise ValueError(
        f'array {i} of the unit is {dtype} {shape}, got {array.dtype=} {array.shape=}'
      )
    if not (array.flags.c_contiguous and array.flags.writeable):
      raise ValueError(f'array {i} of `out` must be contiguous and writeable')
  return list(out)


_CHUNK = 1 << 18  # numbers


def _checksum(array: np.ndarray, grid: layouts.Grid | None) -> int:
  """Returns the checksum of an array, or of the numbers of integers on a grid."""
  if grid is None:
    return checksums_lib.of_array(array)
  flat = array.reshape(-1)
  return checksums_lib.of_parts(
    grid.numbers(flat[start : start + _CHUNK]) for start in range(0, flat.size, _CHUNK)
  )


def _bytes(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)


def _read_bytes(array: np.ndarray, part: np.ndarray) -> None:
  _bytes(array)[:] = part
