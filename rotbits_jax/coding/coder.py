"""Encoding and decoding of a record: a list of arrays that decodes on its own.

**The stream.** The parts of one layout form a *group*. An array of known classes is a
group of its own. The stream has, in this order:

1.  For each group, its contexts, see `contexts.from_bytes`.
2.  For each group, its blocks, see `blocks`: the units of one part after the other.
3.  The parts that are stored as they are, in C order.

`specs.StreamSpec` has the numbers that are needed to read it. The decoder decides by
integers only. Blocks are coded side by side in threads, and the bytes do not depend on
the number of threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import itertools
import types
from typing import Any, NamedTuple

import jax
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

Known = Callable[[], np.ndarray]
"""Returns the classes of an array's elements, uint8 `[n]`."""

_NONE: Mapping[int, Any] = types.MappingProxyType({})


class Encoded(NamedTuple):
  """An encoded record."""

  spec: specs.StreamSpec  # the description of the stream
  pieces: list[np.ndarray]  # uint8, the stream

  @property
  def data(self) -> np.ndarray:
    """The stream: uint8 `[spec.nbytes]`."""
    return np.concatenate(self.pieces)


def encode(
  arrays: Sequence[np.ndarray], known: Mapping[int, plans.Group] = _NONE
) -> Encoded:
  """Encodes arrays as one record.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, with any strides.
    known: plans of arrays whose classes both sides know, by the indices of the arrays,
      see `plans.of_known`.

  Raises:
    ValueError: if a dtype cannot be stored.
  """
  plan = plans.make(arrays, known)
  jobs = []
  for group in plan.groups:
    tables = group.layout.tables(*group.contexts[1:])
    several = _blocks(group.layout, tables, group.scales, group.parts)
    jobs.append([functools.partial(blocks.encode, *block) for block in several])
  coded = iter(pool.run(itertools.chain(*jobs)))
  checksums = pool.each(checksums_lib.of_array, plan.arrays)
  heads = [contexts_lib.to_bytes(group.contexts) for group in plan.groups]
  bodies = [[next(coded) for _ in several] for several in jobs]
  groups = tuple(
    specs.GroupSpec(
      type_name=group.layout.type_name if group.contexts.scales else 'known',
      raw_bits=group.layout.raw_bits,
      contexts=len(head),
      blocks=tuple(x.size for x in body),
    )
    for group, head, body in zip(plan.groups, heads, bodies, strict=True)
  )
  group_of = {place: i for i, group in enumerate(plan.groups) for place in group.places}
  indices = map(group_of.get, itertools.count())
  entries = tuple(
    specs.ArraySpec(
      dtype=array.dtype.name,
      shape=array.shape,
      crc32=crc32,
      groups=tuple(itertools.islice(indices, sparse.PARTS if zeros else 1)),
      zeros=zeros,
    )
    for array, crc32, zeros in zip(plan.arrays, checksums, plan.zeros, strict=True)
  )
  pieces = [np.frombuffer(b''.join(heads), np.uint8), *itertools.chain(*bodies)]
  pieces += [x.reshape(-1).view(np.uint8) for x in plan.plain]
  return Encoded(specs.StreamSpec(arrays=entries, groups=groups), pieces)


def estimate(arrays: Sequence[np.ndarray]) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  plan = plans.make(arrays, _NONE)
  coded = sum(sum(group.nbytes) for group in plan.groups)
  return coded + sum(x.nbytes for x in plan.plain)


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
    data: uint8 `[spec.nbytes]`, the stream: an array, or what has its dtype and shape,
      and `read(start, out)`. Of what is coded, each thread reads one block at a time.
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
  if data.dtype != np.uint8 or data.shape != (spec.nbytes,):
    raise ValueError(
      f'the stream must be uint8 [{spec.nbytes}], got {data.dtype} {list(data.shape)}'
    )
  arrays = _outputs(spec, out)
  parts_of = [_parts(*pair) for pair in zip(spec.arrays, arrays, strict=True)]
  parts = [*itertools.chain(*parts_of)]
  fill = lambda start, piece: np.copyto(piece, data[start : start + piece.size])
  read = getattr(data, 'read', fill)
  starts = itertools.accumulate(spec.sizes, initial=0)
  heads = [np.empty(group.contexts, np.uint8) for group in spec.groups]
  for head in heads:
    read(next(starts), head)
  bodies = [[(next(starts), x) for x in group.blocks] for group in spec.groups]
  *members, plain = (
    [(x.array, parts[x.place]) for x in several] for several in spec.members
  )
  outputs = [x.reshape(-1).view(np.uint8) for _, x in plain]
  pool.run(functools.partial(read, next(starts), output) for output in outputs)
  checksums: dict[int, int] = {}  # of arrays that are coded whole
  is_known = [group.is_known for group in spec.groups]
  late = [members[i][0][0] for i, x in enumerate(is_known) if x]
  if {*late} != known.keys():
    raise ValueError(f'the arrays {late} have known classes, got {[*known]}')

  def decode_group(i: int) -> None:
    outputs = [x for _, x in members[i]]
    layout = spec.groups[i].layout(outputs[0].dtype)
    shapes = [x.shape for x in outputs if not is_known[i]]
    contexts = contexts_lib.from_bytes(heads[i].tobytes(), layout, shapes)
    scales = contexts.scales
    if is_known[i]:
      classes = known[members[i][0][0]]()
      if classes.size != outputs[0].size:
        raise ValueError(f'{outputs[0].size} elements have other classes')
      outputs = [outputs[0].reshape(-1, 1)]
      scales = (contexts_lib.known_scales(classes),)
    tables = layout.tables(*contexts[1:])
    # Each block would copy them to the device.
    tables = tables._replace(slots=jax.device_put(tables.slots, host.device()))
    several = _blocks(layout, tables, scales, outputs)
    checked = pool.run(
      functools.partial(blocks.decode, functools.partial(read, start), nbytes, *block)
      for (start, nbytes), block in zip(bodies[i], several, strict=True)
    )
    spans = itertools.chain(*checked)  # sizes and checksums
    for index, output in members[i]:
      of_part, left = [], output.nbytes
      while left:
        of_part.append(next(spans))
        left -= of_part[-1][1]
      if not spec.arrays[index].zeros:
        checksums[index] = checksums_lib.joined(of_part)

  def finish(i: int) -> None:
    zeros = spec.arrays[i].zeros
    if zeros:
      zeros.join(parts_of[i], arrays[i])
    if i not in checksums:
      checksums[i] = checksums_lib.of_array(arrays[i])
    if checksums[i] != spec.arrays[i].crc32:
      raise ValueError(f'array {i} of the record is damaged: its checksum differs')

  for is_late in (False, True):
    for i in range(len(members)):
      if is_known[i] == is_late:
        decode_group(i)
    ready = [i for i in range(len(arrays)) if (i in late) == is_late]
    pool.each(finish, ready)
  return arrays


# ---- groups --------------------------------------------------------------------------


def _blocks(
  layout: layouts.Layout,
  tables: layouts.Tables,
  scales_of: Sequence[contexts_lib.Scales],
  arrays: Sequence[np.ndarray],
) -> Iterator[tuple[list[blocks.Span], layouts.Layout, layouts.Tables]]:
  """Yields the arguments of `blocks.encode` for each block of contiguous parts."""
  parts: list[blocks.Part] = []
  for array, scales in zip(arrays, scales_of, strict=True):
    write = functools.partial(scales.write, shape=array.shape, size=layout.size)
    parts.append((sparse.bit_patterns(array), write))
  for spans in blocks.divide(parts, layout.size):
    yield spans, layout, tables


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
