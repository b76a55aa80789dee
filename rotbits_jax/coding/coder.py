"""Encoding and decoding of a record: a list of arrays that decodes on its own.

**The stream.** The parts of one layout form a *group*. An array of known classes is a
group of its own. The stream has, in this order:

1.  For each group, its contexts, see `contexts.from_bytes`.
2.  For each group, its blocks, see `blocks`. The units of a group are those of its
    parts, one part after the other in C order. If units have two numbers, the last one
    of a part of an odd size has its last number twice.
3.  The parts that are stored as they are, in C order.

`specs.StreamSpec` has the numbers that are needed to read it. The decoder decides by
integers only. Blocks are coded side by side in threads, and the bytes do not depend on
the number of threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import types
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import plans
from rotbits_jax.coding import pool
from rotbits_jax.coding import sparse
from rotbits_jax.coding import specs
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host

_Job = Callable[[], None]

_NONE: Mapping[int, Any] = types.MappingProxyType({})


class Encoded(NamedTuple):
  """An encoded record."""

  spec: specs.StreamSpec  # the description of the stream
  data: np.ndarray  # uint8 `[spec.nbytes]`, the stream


def encode(
  arrays: Sequence[np.ndarray], known: Mapping[int, np.ndarray] = _NONE
) -> Encoded:
  """Encodes arrays as one record.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, with any strides.
    known: the classes of the elements of some arrays, uint8 in C order, by the indices
      of the arrays. The decoder must know them. Elements of one class should be of
      similar size, and those of the fourth class above twice as large. The arrays are
      of integers of at most 32 bits, and have elements.

  Raises:
    ValueError: if a dtype cannot be stored.
  """
  plan = _plan(arrays, known)
  units = [
    _Units(x.layout, x.contexts, [y.numbers for y in x.parts]) for x in plan.groups
  ]
  coded = iter(pool.run(job for x in units for job in x.encode_jobs()))
  checksums = pool.each(checksums_lib.of_array, plan.arrays)
  heads, bodies, groups = [], [], []
  indices: dict[tuple[int, int], int | None] = {x[:2]: None for x in plan.plain}
  for i, (group, group_units) in enumerate(zip(plan.groups, units, strict=True)):
    indices |= {x[:2]: i for x in group.parts}
    heads.append(contexts_lib.to_bytes(group.contexts))
    group_blocks = [next(coded) for _ in group_units.starts()]
    bodies += group_blocks
    layout, is_known = group.layout, group.contexts.is_known
    groups.append(
      specs.GroupSpec(
        type_name='known' if is_known else layout.type_name,
        raw_bits=layout.raw_bits,
        raised=layout.raised,
        top=layout.top,
        contexts=len(heads[-1]),
        blocks=tuple(x.size for x in group_blocks),
      )
    )
  entries = tuple(
    specs.ArraySpec(
      dtype=array.dtype.name,
      shape=array.shape,
      crc32=crc32,
      groups=tuple(indices[x] for x in sorted(indices) if x[0] == i),
      zeros=zeros,
    )
    for i, (array, crc32, zeros) in enumerate(
      zip(plan.arrays, checksums, plan.zeros, strict=True)
    )
  )
  spec = specs.StreamSpec(arrays=entries, groups=tuple(groups))
  stream = [np.frombuffer(b''.join(heads), np.uint8), *bodies]
  stream += [x.numbers.reshape(-1).view(np.uint8) for x in plan.plain]
  return Encoded(spec, np.concatenate(stream))


def estimate(
  arrays: Sequence[np.ndarray], known: Mapping[int, np.ndarray] = _NONE
) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  plan = _plan(arrays, known)
  coded = sum(sum(group.nbytes) for group in plan.groups)
  return coded + sum(x.numbers.nbytes for x in plan.plain)


def _plan(arrays: Sequence[np.ndarray], known: Mapping[int, np.ndarray]) -> plans.Plan:
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  return plans.make([*map(np.asarray, arrays)], known)


def decode(
  spec: specs.StreamSpec,
  data: np.ndarray | memoryview,
  *,
  out: Sequence[np.ndarray] | None = None,
  known: Mapping[int, Callable[[], np.ndarray]] = _NONE,
) -> list[np.ndarray]:
  """Decodes a record: the inverse of `encode`.

  Args:
    spec: the spec of the record.
    data: uint8 `[spec.nbytes]`, the stream; it may be a memory map.
    out: arrays to decode into, in C order, with the shapes and dtypes of the spec. By
      default the function makes new arrays.
    known: for the arrays of known classes, by their indices, functions that return
      these classes. They are called when all other arrays are decoded.

  Returns:
    The arrays, bit for bit. They do not share memory with `data`.

  Raises:
    ValueError: if the stream does not fit the spec, or if the checksum of an array
      differs from the spec's.
  """
  # A view as a plain array, because a memory map is slow to slice.
  stream, sizes = np.asarray(data).view(np.ndarray), spec.sizes
  if stream.dtype != np.uint8 or stream.shape != (spec.nbytes,):
    raise ValueError(
      f'the stream must be uint8 [{spec.nbytes}], got {stream.dtype} '
      f'{list(stream.shape)}'
    )
  arrays = _outputs(spec, out)
  parts = [_parts(*pair) for pair in zip(spec.arrays, arrays, strict=True)]
  ends = np.cumsum(sizes).tolist()
  pieces = iter(stream[end - n : end] for end, n in zip(ends, sizes, strict=True))
  *members, plain = spec.members
  heads = [next(pieces).tobytes() for _ in spec.groups]
  bodies = [[next(pieces) for _ in group.blocks] for group in spec.groups]
  groups_known = {
    members[i][0].array: i for i, group in enumerate(spec.groups) if group.is_known
  }
  if groups_known.keys() != known.keys():
    raise ValueError(f'the arrays {[*groups_known]} have known classes, got {[*known]}')

  def jobs_of(i: int, classes: np.ndarray | None = None) -> Iterator[_Job]:
    layout = spec.groups[i].layout(members[i][0].dtype)
    shapes = [x.shape for x in members[i]] if classes is None else []
    contexts = contexts_lib.from_bytes(heads[i], layout, shapes)
    outputs = [parts[x.array][x.part] for x in members[i]]
    if classes is not None:
      contexts = contexts._replace(scales=(contexts_lib.known_scales(classes),))
      outputs = [x.reshape(-1, 1) for x in outputs]
    return _Units(layout, contexts, outputs).decode_jobs(bodies[i])

  def finish(indices: Sequence[int]) -> None:
    pool.each(lambda i: _finish(i, spec.arrays[i], arrays[i], parts[i]), indices)

  outputs = [parts[x.array][x.part].reshape(-1).view(np.uint8) for x in plain]
  pool.each(np.copyto, outputs, pieces)
  for i, group in enumerate(spec.groups):
    if not group.is_known:
      pool.run(jobs_of(i))
  finish([i for i in range(len(arrays)) if i not in groups_known])
  for i, place in groups_known.items():
    pool.run(jobs_of(place, known[i]()))
  finish([*groups_known])
  return arrays


# ---- groups --------------------------------------------------------------------------


class _Units(NamedTuple):
  """The units of a group, one part after the other."""

  layout: layouts.Layout
  contexts: contexts_lib.Contexts
  arrays: list[np.ndarray]  # the parts, contiguous

  def starts(self) -> list[tuple[int, int]]:
    """Returns the first unit of each block, and how many it has."""
    total = sum(-(-array.size // self.layout.size) for array in self.arrays)
    size = blocks.capacity_of(total)
    return [(x, min(size, total - x)) for x in range(0, total, size)]

  def encode_jobs(self) -> Iterator[Callable[[], np.ndarray]]:
    """Yields a job for each block; it returns the bytes of the block."""
    tables = self.contexts.tables(self.layout)
    for start, count in self.starts():
      read = functools.partial(self._read, start)
      classes = functools.partial(self._write_classes, start)
      yield functools.partial(blocks.encode, read, classes, count, self.layout, tables)

  def decode_jobs(self, data: Sequence[np.ndarray]) -> Iterator[_Job]:
    """Yields a job for each block, which decodes its bytes into the arrays."""
    tables = self.contexts.tables(self.layout)
    for (start, count), block in zip(self.starts(), data, strict=True):
      classes = functools.partial(self._write_classes, start)
      job = functools.partial(blocks.decode, block, classes, count, self.layout, tables)
      yield functools.partial(job, functools.partial(self._write, start))

  def _write_classes(self, start: int, out: np.ndarray) -> None:
    """Writes the classes of the units from `start` on."""
    for i, first, part, _ in self._spans(start, out, 1):
      shape, size = self.arrays[i].shape, self.layout.size
      self.contexts.scales[i].write(part, first, shape, size)

  def _read(self, start: int, out: np.ndarray) -> None:
    """Copies the bit patterns of the units from `start` on."""
    for *_, part, bits in self._spans(start, out, self.layout.size):
      part[: bits.size] = bits
      part[bits.size :] = bits[-1]

  def _write(self, start: int, bits: np.ndarray, patches: list[blocks.Patch]) -> None:
    """Copies bit patterns to the units from `start` on, and then the patches."""
    begin = 0
    for *_, part, out in self._spans(start, bits, self.layout.size):
      out[...] = part[: out.size]
      for places, others in patches:
        low, high = np.searchsorted(places, [begin, begin + out.size])
        out[places[low:high] - begin] = others[low:high]
      begin += part.size

  def _spans(
    self, start: int, block: np.ndarray, size: int
  ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yields of each part: its index, first unit, share of the block, and bits."""
    begin, end = 0, start + block.size // size
    for i, array in enumerate(self.arrays):
      units = -(-array.size // self.layout.size)
      low, high = max(start, begin), min(end, begin + units)
      if low < high:
        share = block[(low - start) * size : (high - start) * size]
        numbers = slice(*((x - begin) * self.layout.size for x in (low, high)))
        yield i, low - begin, share, sparse.bit_patterns(array)[numbers]
      begin += units


# ---- arrays --------------------------------------------------------------------------


def _outputs(
  spec: specs.StreamSpec, out: Sequence[np.ndarray] | None
) -> list[np.ndarray]:
  """Returns the given arrays if they fit the spec; makes new ones if `out` is None."""
  if out is None:
    return [host.empty(x.shape, x.numpy_dtype) for x in spec.arrays]
  expected = [(x.dtype, x.shape, True, True) for x in spec.arrays]
  flags = lambda x: (x.flags.c_contiguous, x.flags.writeable)
  if expected != [(x.dtype.name, x.shape, *flags(x)) for x in out]:
    raise ValueError('the arrays to decode into are not those of the record')
  return list(out)


def _parts(spec: specs.ArraySpec, array: np.ndarray) -> list[np.ndarray]:
  """Returns arrays to decode the parts of an array into."""
  if spec.zeros:
    return [host.empty(shape, dtype) for dtype, shape in spec.parts]
  ((dtype, shape),) = spec.parts
  return [array.reshape(-1).view(dtype).reshape(shape)]


def _finish(
  index: int, spec: specs.ArraySpec, array: np.ndarray, parts: list[np.ndarray]
) -> None:
  """Makes an array of its parts, and checks it."""
  if spec.zeros:
    spec.zeros.join(parts, array)
  if checksums_lib.of_array(array) != spec.crc32:
    raise ValueError(f'array {index} of the record is damaged: its checksum differs')
