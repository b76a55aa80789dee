"""Encodes and decodes a record: a list of arrays that decodes on its own.

The parts of one layout form a *group*. The stream of a record has the contexts of all
groups, then their blocks, and then the parts that are stored as they are. The decoder
decides by integers only. Blocks are coded side by side in threads, and the bytes do not
depend on the number of threads.
"""

import collections
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
  known: Mapping[int, Callable[[], np.ndarray]] = _NONE,
  uses: Mapping[int, Callable[[slice], None]] = _NONE,
) -> list[np.ndarray]:
  """Decodes a record: the inverse of `encode`.

  Args:
    spec: the spec of the record.
    data: uint8 `[spec.nbytes]`, the stream: an array, or an object with its shape,
      its dtype and `read(start, out)`. Each thread reads one coded block at a time.
    out: arrays to decode into, in C order, with the shapes and dtypes of the spec. By
      default the function makes new arrays.
    known: for the arrays near such that both sides know, by their indices, functions
      that return these as integers `[n]`, when the groups before them are decoded.
    uses: for some arrays, functions that get all ranges of their elements or none, when
      these and other arrays are decoded, if possible in the thread that decoded them.

  Returns:
    The arrays, bit for bit. They do not share memory with `data`.

  Raises:
    ValueError: if the stream does not fit the spec, or if the checksum of an array
      differs from the spec's.
  """
  if data.dtype != np.uint8 or data.shape != (spec.nbytes,):
    raise ValueError(f'expected a stream, uint8 [{spec.nbytes}], got {data.shape}')
  arrays = list(out or [host.empty(x.shape, x.numpy_dtype) for x in spec.arrays])
  parts = [
    [array.reshape(-1).view(dtype).reshape(shape) for dtype, shape in of_array.parts]
    if len(of_array.parts) == 1
    else [host.empty(shape, dtype) for dtype, shape in of_array.parts]
    for of_array, array in zip(spec.arrays, arrays, strict=True)
  ]
  fill = lambda start, piece: np.copyto(piece, data[start : start + piece.size])
  read: Any = getattr(data, 'read', fill)
  starts = itertools.accumulate(spec.sizes, initial=0)
  *members, plain = spec.members(parts)
  outputs = [part.reshape(-1).view(np.uint8) for _, part in plain]
  pool.run(functools.partial(read, next(starts), output) for output in outputs)
  places = [[*itertools.islice(starts, 1 + len(x.blocks))] for x in spec.groups]
  first = sum(group.type_name != 'known' for group in spec.groups)
  if late := {i for i, _ in itertools.chain(*members[first:])} - known.keys():
    raise ValueError(f'the arrays {late} are relative to known ones, got {[*known]}')

  pieces = collections.defaultdict[int, list[Any]](list)  # checksums and sizes

  def finish(i: int) -> None:
    if len(parts[i]) > 1:
      masks.join(parts[i], arrays[i])
      pieces[i].clear()
    crc32 = checksums_lib.joined(pieces[i]) or checksums_lib.of_array(arrays[i])
    if crc32 != spec.arrays[i].crc32:
      raise ValueError(f'array {i} of the record is damaged: its checksum differs')

  is_whole = all(len(x) == 1 for x in parts)  # others are joined at the end
  is_used = [is_whole and uses.keys() >= {i for i, _ in x} for x in members]
  # Blocks of other groups, which begin before; and uses that must wait for them.
  waiting = [i for k in range(first) if not is_used[k] for i in spec.groups[k].blocks]
  unused: list[Callable[[], None]] = []

  def open_group(k: int) -> list[Callable[[], list[Any]]]:
    """Returns functions that decode blocks; they return arrays and checksums."""
    group, (start, *of_blocks) = spec.groups[k], places[k]
    indices, numbers = zip(*members[k], strict=True)
    read(start, head := np.empty(group.contexts, np.uint8))
    layout, shapes = group.layout(numbers[0].dtype), [x.shape for x in numbers]
    contexts, scales = contexts_lib.from_bytes(head.tobytes(), layout, shapes)
    near = [known[i]() if k >= first else None for i in indices]
    for part, bits in zip(numbers, near, strict=True):
      if bits is not None and (bits.size, bits.itemsize) != (part.size, part.itemsize):
        raise ValueError(f'known numbers must be {part.size}, got {bits.size}')
    tables = layout.tables(*contexts, scales)

    def decode_block(start: int, size: int, spans: Any) -> list[Any]:
      sums = blocks.decode(functools.partial(read, start), size, spans, layout, tables)
      if not is_used[k]:
        del waiting[:1]
      for span in spans if is_used[k] else ():
        use = functools.partial(uses[indices[span.part]], span.some)
        unused.append(use) if waiting else use()
      return [(indices[part], crc32) for part, crc32 in sums]

    divided = blocks.divide(numbers, near, scales, layout)
    jobs = zip(of_blocks, group.blocks, divided, strict=True)
    return [functools.partial(decode_block, *x) for x in jobs]

  order = sorted(range(first), key=is_used.__getitem__)
  for several in [order, *([k] for k in range(first, len(members)))]:
    alone = lambda k: [lambda: open_group(k)[0]()]  # by the thread that decodes it
    opened = (alone(k) if len(places[k]) == 2 else open_group(k) for k in several)
    jobs = itertools.chain.from_iterable(opened)
    for i, piece in itertools.chain.from_iterable(pool.run(jobs)):
      pieces[i].append(piece)
  pool.run(unused)
  pool.each(finish, range(len(arrays)))
  return arrays
