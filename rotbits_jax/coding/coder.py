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
  plan = plans.make(arrays, known)
  jobs = [
    [functools.partial(blocks.encode, *x) for x in _blocks(*group[:2], group.numbers)]
    for group in plan.groups
  ]
  coded = iter(pool.run(itertools.chain(*jobs)))
  checksums = pool.each(checksums_lib.of_array, plan.arrays)
  heads = [contexts_lib.to_bytes(group.contexts) for group in plan.groups]
  bodies = [[next(coded) for _ in several] for several in jobs]
  groups = tuple(
    specs.GroupSpec(
      type_name='known' if group.contexts.is_known else group.layout.type_name,
      raw_bits=group.layout.raw_bits,
      contexts=len(head),
      blocks=tuple(x.size for x in body),
    )
    for group, head, body in zip(plan.groups, heads, bodies, strict=True)
  )
  # The group of each part, and None for a part that is stored as it is.
  indices: dict[tuple[int, int], int | None] = {x[:2]: None for x in plan.plain}
  for i, group in enumerate(plan.groups):
    indices |= {x[:2]: i for x in group.parts}
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
  stream = [np.frombuffer(b''.join(heads), np.uint8), *itertools.chain(*bodies)]
  stream += [x.numbers.reshape(-1).view(np.uint8) for x in plan.plain]
  return Encoded(
    specs.StreamSpec(arrays=entries, groups=groups), np.concatenate(stream)
  )


def estimate(
  arrays: Sequence[np.ndarray], known: Mapping[int, np.ndarray] = _NONE
) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  plan = plans.make(arrays, known)
  coded = sum(sum(group.nbytes) for group in plan.groups)
  return coded + sum(x.numbers.nbytes for x in plan.plain)


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
  heads = [next(pieces).tobytes() for _ in spec.groups]
  bodies = [[next(pieces) for _ in group.blocks] for group in spec.groups]
  *members, plain = (
    [(x.array, parts[x.array][x.part]) for x in several] for several in spec.members
  )
  pool.each(np.copyto, (x.reshape(-1).view(np.uint8) for _, x in plain), pieces)
  is_known = [group.is_known for group in spec.groups]
  late = [members[i][0][0] for i, x in enumerate(is_known) if x]
  if {*late} != known.keys():
    raise ValueError(f'the arrays {late} have known classes, got {[*known]}')

  def decode_group(i: int) -> None:
    outputs, scales = [x for _, x in members[i]], None
    layout = spec.groups[i].layout(outputs[0].dtype)
    if is_known[i]:
      scales = contexts_lib.known_scales(known[members[i][0][0]]())
      outputs = [x.reshape(-1, 1) for x in outputs]
    shapes = [x.shape for x in outputs]
    contexts = contexts_lib.from_bytes(heads[i], layout, shapes, scales)
    several = zip(bodies[i], _blocks(layout, contexts, outputs), strict=True)
    pool.run(functools.partial(blocks.decode, data, *block) for data, block in several)

  for is_late in (False, True):
    for i in range(len(members)):
      if is_known[i] == is_late:
        decode_group(i)
    ready = [i for i in range(len(arrays)) if (i in late) == is_late]
    pool.each(lambda i: _finish(i, spec.arrays[i], arrays[i], parts[i]), ready)
  return arrays


# ---- groups --------------------------------------------------------------------------


def _blocks(
  layout: layouts.Layout,
  contexts: contexts_lib.Contexts,
  arrays: Sequence[np.ndarray],
) -> Iterator[tuple[list[blocks.Span], layouts.Layout, layouts.Tables]]:
  """Yields the arguments of `blocks.encode` for each block of contiguous parts."""
  tables, parts = layout.tables(*contexts[1:4]), list[blocks.Part]()
  for array, scales in zip(arrays, contexts.scales, strict=True):
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


def _finish(
  index: int, spec: specs.ArraySpec, array: np.ndarray, parts: list[np.ndarray]
) -> None:
  """Makes an array of its parts, and checks it."""
  if spec.zeros:
    spec.zeros.join(parts, array)
  if checksums_lib.of_array(array) != spec.crc32:
    raise ValueError(f'array {index} of the record is damaged: its checksum differs')
