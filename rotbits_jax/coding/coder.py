"""Encoding and decoding of a record: a list of arrays that decodes on its own.

**The stream.** The parts of one layout form a *group*. An array of known classes is a
group of its own. The stream has, in this order:

1.  For each group, its contexts, see `contexts.from_bytes` and `known.from_bytes`.
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
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding import blocks
from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import known as known_lib
from rotbits_jax.coding import layouts
from rotbits_jax.coding import plans
from rotbits_jax.coding import pool
from rotbits_jax.coding import sparse
from rotbits_jax.coding import specs
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host

_GROUPS = 16  # that are decoded at once, because their tables may be large

_NONE: Mapping[int, known_lib.Known] = types.MappingProxyType({})


class Encoded(NamedTuple):
  """An encoded record.

  Attributes:
    spec: the description of the stream.
    data: uint8 `[spec.nbytes]`, the stream.
  """

  spec: specs.StreamSpec
  data: np.ndarray


def encode(
  arrays: Sequence[np.ndarray], known: Mapping[int, known_lib.Known] = _NONE
) -> Encoded:
  """Encodes arrays as one record.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, with any strides.
    known: what the decoder will know of the integers of some arrays, by their indices.
      These are signed, of at most 32 bits, and have elements.

  Returns:
    The encoded record.

  Raises:
    ValueError: if a dtype cannot be stored.
  """
  whole, zeros, parts, groups = _planned(arrays, known)
  runs = [_Units.of_group(group) for group in groups]
  results = iter(pool.run(job for units in runs for job in units.encode_jobs()))
  checksums = pool.each(checksums_lib.of_array, whole)
  heads: list[np.ndarray] = []
  bodies: list[np.ndarray] = []
  of_groups = []
  for group, units in zip(groups, runs, strict=True):
    coded = [next(results) for _ in range(units.num_blocks)]
    is_known = isinstance(group.contexts, known_lib.Bands)
    head = (
      known_lib.to_bytes(group.contexts)
      if isinstance(group.contexts, known_lib.Bands)
      else contexts_lib.to_bytes(group.contexts, group.layout)
    )
    heads.append(np.frombuffer(head, np.uint8))
    bodies += coded
    of_groups.append(
      specs.GroupSpec(
        type_name='known' if is_known else group.layout.type_name,
        raw_bits=group.layout.raw_bits,
        raised=getattr(group.layout, 'raised', False),
        top=getattr(group.layout, 'top', 0),
        contexts=len(head),
        blocks=tuple(x.size for x in coded),
      )
    )
  index = {x[:2]: g for g, group in enumerate(groups) for x in group.parts}
  bodies += [_bytes(x.numbers) for x in parts if x[:2] not in index]
  of_arrays: list[list[int | None]] = [[] for _ in whole]
  for part in parts:
    of_arrays[part.array].append(index.get(part[:2]))
  entries = tuple(
    specs.ArraySpec(
      dtype=array.dtype.name,
      shape=array.shape,
      crc32=crc32,
      groups=tuple(of_array),
      zeros=form,
    )
    for array, crc32, of_array, form in zip(
      whole, checksums, of_arrays, zeros, strict=True
    )
  )
  spec = specs.StreamSpec(arrays=entries, groups=tuple(of_groups))
  return Encoded(spec, np.concatenate([np.zeros(0, np.uint8), *heads, *bodies]))


def estimate(
  arrays: Sequence[np.ndarray], known: Mapping[int, known_lib.Known] = _NONE
) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  _, _, parts, groups = _planned(arrays, known)
  coded = {x[:2] for group in groups for x in group.parts}
  return sum(sum(group.nbytes) for group in groups) + sum(
    x.numbers.nbytes for x in parts if x[:2] not in coded
  )


def _planned(
  arrays: Sequence[np.ndarray], known: Mapping[int, known_lib.Known]
) -> tuple[
  list[np.ndarray], list[sparse.Sparse | None], list[plans.Part], list[plans.Group]
]:
  """Returns the arrays in C order, where their zeros are, their parts, and groups."""
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  whole = pool.each(host.contiguous, map(np.asarray, arrays))
  zeros, parts = plans.divided(whole)
  groups = plans.groups([x for x in parts if x.array not in known])
  by_array = {x.array: x for x in parts}
  return (
    whole,
    zeros,
    parts,
    groups
    + [
      plans.known_group(by_array[i], x.check(whole[i].size)) for i, x in known.items()
    ],
  )


def decode(
  spec: specs.StreamSpec,
  data: np.ndarray | memoryview,
  *,
  out: Sequence[np.ndarray] | None = None,
  known: Mapping[int, Callable[[], known_lib.Known]] = types.MappingProxyType({}),
) -> list[np.ndarray]:
  """Decodes a record: the inverse of `encode`.

  Args:
    spec: the spec of the record.
    data: uint8 `[spec.nbytes]`, the stream; it may be a memory map.
    out: arrays to decode into, in C order, with the shapes and dtypes of the spec. By
      default the function makes new arrays.
    known: for the arrays of known classes, by their indices, functions that return
      what is known. They are called when all other arrays are decoded.

  Returns:
    The arrays, bit for bit. They do not share memory with `data`.

  Raises:
    ValueError: if the stream does not fit the spec, or if the checksum of an array
      differs from the spec's.
  """
  # A view as a plain array, because a memory map is slow to slice.
  stream, sizes = np.asarray(data).view(np.ndarray), spec.sizes
  if stream.dtype != np.uint8 or stream.shape != (sum(sizes),):
    raise ValueError(
      f'the stream must be uint8 [{sum(sizes)}], got {stream.dtype} '
      f'{list(stream.shape)}'
    )
  arrays = _outputs(spec, out)
  ends = np.cumsum(sizes).tolist()
  pieces = iter(stream[end - n : end] for end, n in zip(ends, sizes, strict=True))
  parts = [_parts(*pair) for pair in zip(spec.arrays, arrays, strict=True)]
  *coded, whole = spec.members
  heads = [next(pieces).tobytes() for _ in spec.groups]
  bodies = [[next(pieces) for _ in group.blocks] for group in spec.groups]
  numbers = {coded[g][0].array: g for g, x in enumerate(spec.groups) if x.is_known}
  if numbers.keys() != known.keys():
    raise ValueError(f'the arrays {[*numbers]} have known classes, got {[*known]}')

  def jobs_of(g: int, classes: known_lib.Known | None = None) -> list[_Job]:
    layout = spec.groups[g].layout(coded[g][0].dtype)
    contexts = (
      known_lib.from_bytes(heads[g], classes)
      if classes
      else contexts_lib.from_bytes(heads[g], layout, [x.shape for x in coded[g]])
    )
    units = _Units(layout, contexts, [parts[x.array][x.part] for x in coded[g]])
    return units.decode_jobs(bodies[g])

  def finish(indices: Sequence[int]) -> None:
    of_arrays = zip(*((spec.arrays[i], parts[i]) for i in indices), strict=True)
    pool.each(_finish, indices, *of_arrays)

  plain = [g for g, x in enumerate(spec.groups) if not x.is_known]
  jobs: list[_Job] = [
    functools.partial(_read_bytes, parts[x.array][x.part], next(pieces)) for x in whole
  ]
  for i in range(0, len(plain), _GROUPS):
    pool.run(jobs)
    jobs = [job for g in plain[i : i + _GROUPS] for job in jobs_of(g)]
  pool.run(jobs)
  finish([i for i in range(len(arrays)) if i not in numbers])
  for i, g in numbers.items():
    classes = known[i]().check(arrays[i].size)
    if max(classes.shifts) != spec.groups[g].raw_bits:
      raise ValueError(f'array {i} cannot have shifts up to {max(classes.shifts)}')
    pool.run(jobs_of(g, classes))
  finish([*numbers])
  return arrays


# ---- groups --------------------------------------------------------------------------

_Job = Callable[[], None]


class _Units(NamedTuple):
  """The units of a group, one part after the other.

  Attributes:
    layout: the layout.
    contexts: the contexts of the parts.
    arrays: the parts, contiguous.
  """

  layout: layouts.Layout
  contexts: contexts_lib.Contexts | known_lib.Bands
  arrays: list[np.ndarray]

  @classmethod
  def of_group(cls, group: plans.Group) -> '_Units':
    return cls(group.layout, group.contexts, [x.numbers for x in group.parts])

  @property
  def total(self) -> int:
    return sum(-(-array.size // self.layout.size) for array in self.arrays)

  @property
  def num_blocks(self) -> int:
    return -(-self.total // blocks.capacity_of(self.total))

  def _starts(self) -> list[tuple[int, int]]:
    """Returns the first unit of each block, and how many it has."""
    size = blocks.capacity_of(self.total)
    return [(x, min(size, self.total - x)) for x in range(0, self.total, size)]

  def encode_jobs(self) -> list[Callable[[], np.ndarray]]:
    """Returns a job for each block; it returns the bytes of the block."""
    tables = self.contexts.tables(self.layout)  # type: ignore[arg-type]

    def job(start: int, count: int) -> np.ndarray:
      read = functools.partial(self._read, start)
      classes = functools.partial(self._write_classes, start)
      return blocks.encode(read, classes, count, self.layout, tables)

    return [functools.partial(job, *x) for x in self._starts()]

  def decode_jobs(self, data: Sequence[np.ndarray]) -> list[_Job]:
    """Returns a job for each block, which decodes its bytes into the arrays."""
    tables = self.contexts.tables(self.layout)  # type: ignore[arg-type]

    def job(start: int, count: int, block: np.ndarray) -> None:
      classes = functools.partial(self._write_classes, start)
      write = functools.partial(self._write, start)
      blocks.decode(block, classes, count, self.layout, tables, write)

    pairs = zip(self._starts(), data, strict=True)
    return [functools.partial(job, *x, block) for x, block in pairs]

  def _write_classes(self, start: int, out: np.ndarray) -> None:
    """Writes the classes of the units from `start` on."""
    for i, place, count, first in self._spans(start, out.size):
      shape = self.arrays[i].shape
      part = out[place : place + count]
      self.contexts.write(part, i, first, shape, self.layout.size)

  def _read(self, start: int, out: np.ndarray) -> None:
    """Copies the bit patterns of the units from `start` on."""
    size = self.layout.size
    for i, place, count, first in self._spans(start, out.size // size):
      bits = sparse.bit_patterns(self.arrays[i])[first * size : (first + count) * size]
      out[place * size : place * size + bits.size] = bits
      out[place * size + bits.size : (place + count) * size] = bits[-1]

  def _write(
    self, start: int, bits: np.ndarray, places: np.ndarray, others: np.ndarray
  ) -> None:
    """Copies bit patterns to the units from `start` on, some of which are others."""
    size = self.layout.size
    for i, place, count, first in self._spans(start, bits.size // size):
      array = sparse.bit_patterns(self.arrays[i])[first * size : (first + count) * size]
      begin, end = place * size, place * size + array.size
      array[...] = bits[begin:end]
      low, high = np.searchsorted(places, [begin, end])
      array[places[low:high] - begin] = others[low:high]

  def _spans(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Finds the parts that hold `count` units from `start` on.

    Yields the index of a part, the place of its first unit among those units, how many
    of them it has, and the first of them, counted within the part.
    """
    begin = 0
    for i, array in enumerate(self.arrays):
      units = -(-array.size // self.layout.size)
      low, high = max(start, begin), min(start + count, begin + units)
      if low < high:
        yield i, low - start, high - low, low - begin
      begin += units


# ---- arrays --------------------------------------------------------------------------


def _outputs(
  spec: specs.StreamSpec, out: Sequence[np.ndarray] | None
) -> list[np.ndarray]:
  """Returns the given arrays if they fit the spec; makes new ones if `out` is None."""
  wanted = [(array.shape, array.numpy_dtype) for array in spec.arrays]
  if out is None:
    return [host.empty(shape, dtype) for shape, dtype in wanted]
  if len(out) != len(wanted):
    raise ValueError(f'the record has {len(wanted)} arrays, got {len(out)} in `out`')
  for i, (array, (shape, dtype)) in enumerate(zip(out, wanted, strict=True)):
    if array.shape != shape or array.dtype != dtype:
      raise ValueError(
        f'array {i} of the record is {dtype} {shape}, got {array.dtype=} {array.shape=}'
      )
    if not (array.flags.c_contiguous and array.flags.writeable):
      raise ValueError(f'array {i} of `out` must be contiguous and writeable')
  return list(out)


def _parts(spec: specs.ArraySpec, array: np.ndarray) -> list[np.ndarray]:
  """Returns arrays to decode the parts of an array into, and the array last."""
  if len(spec.parts) == 1:
    return [array]
  return [*(host.empty(shape, dtype) for dtype, shape in spec.parts), array]


def _finish(index: int, spec: specs.ArraySpec, parts: list[np.ndarray]) -> None:
  """Makes an array of its parts, and checks it."""
  *decoded, array = parts
  if spec.zeros:
    spec.zeros.join(decoded, array)
  elif decoded:
    sparse.join_halves(decoded, array)
  if checksums_lib.of_array(array) != spec.crc32:
    raise ValueError(f'array {index} of the record is damaged: its checksum differs')


def _bytes(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)


def _read_bytes(array: np.ndarray, part: np.ndarray) -> None:
  _bytes(array)[:] = part
