"""Encodes and decodes a record: a list of arrays that decodes on its own.

The parts of one layout form a *group*. The stream of a record has the contexts of all
groups, then their blocks, and then the parts that are stored as they are. The decoder
decides by integers only. Blocks are coded side by side in threads, and the bytes do not
depend on the number of threads.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from rotbits_jax import pool
from rotbits_jax.coding import blocks
from rotbits_jax.coding import contexts as contexts_lib
from rotbits_jax.coding import plans
from rotbits_jax.coding import specs
from rotbits_jax.structured import masks
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host

Known = Callable[[], np.ndarray]
"""Returns numbers near those of an array: unsigned integers `[n]`, the bit patterns."""

_Read = Callable[[int, np.ndarray], Any]
"""Fills an array with the bytes of a stream from a place on."""

_NONE: Mapping[int, Any] = {}


class Encoded(NamedTuple):
  """An encoded record."""

  spec: specs.StreamSpec  # the description of the stream
  pieces: list[np.ndarray]  # uint8, the stream

  @property
  def data(self) -> np.ndarray:
    """The stream: uint8 `[spec.nbytes]`."""
    return np.concatenate(self.pieces)


def encode(
  arrays: Sequence[np.ndarray], known: Mapping[int, plans.Known] = _NONE
) -> Encoded:
  """Encodes arrays as one record.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, with any strides.
    known: for arrays near such that both sides know, by their indices, these.

  Raises:
    ValueError: if a dtype cannot be stored.
  """
  with pool.PLANS:
    plan = plans.make(arrays, known)
    of_groups = [group.layout.tables(*group.contexts) for group in plan.groups]
  jobs: list[Any] = []
  for group, tables in zip(plan.groups, of_groups, strict=True):
    parts = [(x.numbers, x.known, x.scales) for x in group.parts]
    numbers, near, scales = zip(*parts, strict=True)
    divided = blocks.divide(numbers, near, scales, group.layout)
    encode = functools.partial(blocks.encode, layout=group.layout, coder_tables=tables)
    jobs.append([functools.partial(encode, spans) for spans in divided])

  def checksum(place: int) -> int:
    crc32 = known[place].crc32 if place in known else None
    return crc32() if crc32 else checksums_lib.of_array(plan.arrays[place])

  summed = (functools.partial(checksum, i) for i in range(len(arrays)))
  coded: Any = iter(pool.run(itertools.chain(*jobs, summed)))
  pieces = [np.empty(0, np.uint8)]  # of a record without arrays
  plain = [x.numbers for x in itertools.chain(*plan.parts) if x.group is None]
  pieces += [x.reshape(-1).view(np.uint8) for x in plain]
  groups = []
  for group, several in zip(plan.groups, jobs, strict=True):
    body, layout = [next(coded) for _ in several], group.layout
    sizes = len(group.head), tuple(x.size for x in body)
    groups.append(specs.GroupSpec(layout.type_name, layout.raw_bits, *sizes))
    pieces += [np.frombuffer(group.head, np.uint8), *body]
  entries = tuple(
    specs.ArraySpec(
      dtype=array.dtype.name,
      shape=array.shape,
      crc32=crc32,
      groups=tuple(part.group for part in parts),
      nonzeros=parts[1].numbers.size if len(parts) > 1 else None,
    )
    for array, crc32, parts in zip(plan.arrays, coded, plan.parts, strict=True)
  )
  return Encoded(specs.StreamSpec(arrays=entries, groups=tuple(groups)), pieces)


def estimate(
  arrays: Sequence[np.ndarray], known: Mapping[int, plans.Known] = _NONE
) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  parts = itertools.chain(*plans.make(arrays, known).parts)
  return sum(x.numbers.nbytes if x.group is None else x.nbytes for x in parts)


def decode(
  spec: specs.StreamSpec,
  data: Any,
  *,
  out: Sequence[np.ndarray] | None = None,
  known: Mapping[int, Known] = _NONE,
) -> list[np.ndarray]:
  """Decodes a record: the inverse of `encode`.

  Args:
    spec: the spec of the record.
    data: uint8 `[spec.nbytes]`, the stream: an array, or an object with its shape,
      its dtype and `read(start, out)`. Each thread reads one coded block at a time.
    out: arrays to decode into, in C order, with the shapes and dtypes of the spec. By
      default the function makes new arrays.
    known: for the arrays near such that both sides know, by their indices, functions
      that return these. They are called when the groups before them are decoded.

  Returns:
    The arrays, bit for bit. They do not share memory with `data`.

  Raises:
    ValueError: if the stream does not fit the spec, or if the checksum of an array
      differs from the spec's.
  """
  if data.dtype != np.uint8 or data.shape != (spec.nbytes,):
    raise ValueError(f'expected a stream, uint8 [{spec.nbytes}], got {data.shape}')
  arrays = list(out or [host.empty(x.shape, x.numpy_dtype) for x in spec.arrays])
  parts = [_parts(*pair) for pair in zip(spec.arrays, arrays, strict=True)]
  fill = lambda start, piece: np.copyto(piece, data[start : start + piece.size])
  read: _Read = getattr(data, 'read', fill)
  starts = itertools.accumulate(spec.sizes, initial=0)
  *members, plain = spec.members(parts)
  outputs = [part.reshape(-1).view(np.uint8) for _, part in plain]
  pool.run(functools.partial(read, next(starts), output) for output in outputs)
  first = sum(group.type_name != 'known' for group in spec.groups)
  late = {i for i, _ in itertools.chain(*members[first:])}
  if not late <= known.keys():
    raise ValueError(f'the arrays {late} are relative to known ones, got {[*known]}')

  def finish(i: int) -> None:
    checksum = checksums.get(i) if len(parts[i]) == 1 else None
    if len(parts[i]) > 1:
      masks.join(parts[i], arrays[i])
    if checksum is None:
      checksum = checksums_lib.of_array(arrays[i])
    if checksum != spec.arrays[i].crc32:
      raise ValueError(f'array {i} of the record is damaged: its checksum differs')

  jobs = []
  for group, of_group in zip(spec.groups, members, strict=True):
    places = [*itertools.islice(starts, 1 + len(group.blocks))]
    indices, numbers = zip(*of_group, strict=True)
    near = [known[i] for i in indices if i in late]
    jobs.append(functools.partial(_decode_group, group, places, numbers, near, read))
  of_parts = pool.run(jobs[:first]) + [job() for job in jobs[first:]]
  coded = (i for i, _ in itertools.chain(*members))
  checksums = dict(zip(coded, itertools.chain(*of_parts), strict=True))
  pool.each(finish, range(len(arrays)))
  return arrays


def _decode_group(
  group: specs.GroupSpec,
  places: Sequence[int],  # where the contexts and the blocks begin in the stream
  parts: Sequence[np.ndarray],
  known: Sequence[Known],  # of all parts, or of none
  read: _Read,
) -> list[int]:
  """Decodes the parts of a group; returns their checksums."""
  head = np.empty(group.contexts, np.uint8)
  read(places[0], head)
  layout, shapes = group.layout(parts[0].dtype), [x.shape for x in parts]
  contexts, scales = contexts_lib.from_bytes(head.tobytes(), layout, shapes)
  several = [near() for near in known]
  for numbers, near in zip(parts, several, strict=bool(known)):
    form = numbers.size, numbers.itemsize
    if (near.size, near.itemsize) != form:
      raise ValueError(f'known numbers must be {form}, got {near.size}')
  tables = layout.tables(*contexts)
  divided = blocks.divide(parts, several or [None] * len(parts), scales, layout)
  of_block = lambda start, nbytes, spans: blocks.decode(
    functools.partial(read, start), nbytes, spans, layout, tables
  )
  checksums: list[list[tuple[int, int]]] = [[] for _ in parts]
  pieces = pool.each(of_block, places[1:], group.blocks, divided)
  for part, checksum in itertools.chain(*pieces):
    checksums[part].append(checksum)
  return [*map(checksums_lib.joined, checksums)]


def _parts(spec: specs.ArraySpec, array: np.ndarray) -> list[np.ndarray]:
  """Returns arrays to decode the parts of an array into."""
  if len(spec.parts) > 1:
    return [host.empty(shape, dtype) for dtype, shape in spec.parts]
  return [array.reshape(-1).view(dtype).reshape(shape) for dtype, shape in spec.parts]
