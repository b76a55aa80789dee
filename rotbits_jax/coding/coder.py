"""Encoding and decoding of a record: a list of arrays that decodes on its own.

**The stream.** The parts of one layout form a *group*; if they need too many frequency
tables, they form several. An array of known classes is a group of its own. The stream
has, in this order:

1.  For each group, its contexts, see `contexts.from_bytes` and `known.from_bytes`.
2.  For each group, its blocks. The elements of a group are those of its parts, one part
    after the other in C order. All its blocks but the last have equally many elements.
    A block is a message, see `rans.split_words`, and then the planes of the raw bits,
    see `blocks`.
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

_FEW = 1 << 16  # bytes of arrays that are often stored as they are
_GROUP_BYTES = 128  # of a group in the spec and in the stream, about
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
  if sum(x.nbytes for x in arrays) > _FEW:
    blocks.compile_push()
  planned = _planned(arrays, known)
  groups = _worthwhile(planned, _grouped(planned))
  groups += [
    _known_group(i, planned[i].array, x.check(planned[i].array.size))[0]
    for i, x in known.items()
  ]
  index = {place: g for g, group in enumerate(groups) for place in group.members}
  jobs = [job for group in groups for job in group.encode_jobs()]
  results = iter(pool.run(jobs))
  checksums = pool.each(checksums_lib.of_array, [x.array for x in planned])
  heads: list[np.ndarray] = []
  bodies: list[np.ndarray] = []
  of_groups = []
  for group in groups:
    coded = [next(results) for _ in range(group.num_blocks)]
    heads.append(np.frombuffer(group.head(), np.uint8))
    bodies += coded
    of_groups.append(
      specs.GroupSpec(
        type_name=group.layout.type_name,
        raw_bits=group.layout.raw_bits,
        min_exponent=group.layout.min_exponent,
        contexts=heads[-1].size,
        lanes=group.lanes,
        elements=group.elements,
        blocks=tuple(x.size for x in coded),
      )
    )
  entries = []
  for i, (plan, crc32) in enumerate(zip(planned, checksums, strict=True)):
    part_groups = tuple(index.get((i, j)) for j in range(len(plan.parts)))
    entries.append(
      specs.ArraySpec(
        dtype=plan.array.dtype.name,
        shape=plan.array.shape,
        crc32=crc32,
        groups=part_groups,
        zeros=plan.zeros,
      )
    )
    pairs = zip(plan.parts, part_groups, strict=True)
    bodies += [_bytes(part.array) for part, group in pairs if group is None]
  spec = specs.StreamSpec(arrays=tuple(entries), groups=tuple(of_groups))
  return Encoded(spec, np.concatenate([np.zeros(0, np.uint8), *heads, *bodies]))


def estimate(
  arrays: Sequence[np.ndarray], known: Mapping[int, known_lib.Known] = _NONE
) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  planned = _planned(arrays, known)
  others = sum(plan.nbytes for i, plan in enumerate(planned) if i not in known)
  return others + sum(_known_group(i, planned[i].array, x)[1] for i, x in known.items())


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
  heads = [next(pieces) for _ in spec.groups]
  bodies = [[next(pieces) for _ in group.blocks] for group in spec.groups]
  numbers = {coded[g][0].array: g for g, x in enumerate(spec.groups) if x.is_known}
  if numbers.keys() != known.keys():
    raise ValueError(f'the arrays {[*numbers]} have known classes, got {[*known]}')

  def group(g: int, contexts: '_Contexts') -> _Group:
    members = [(x.array, x.part) for x in coded[g]]
    group_spec, layout = spec.groups[g], spec.groups[g].layout(coded[g][0].dtype)
    arrays = [parts[i][j] for i, j in members]
    sizes = group_spec.lanes, group_spec.elements
    return _Group(layout, contexts, members, arrays, *sizes)

  def finish(indices: Sequence[int]) -> None:
    of_arrays = zip(*((spec.arrays[i], parts[i]) for i in indices), strict=True)
    pool.each(_finish, indices, *of_arrays)

  plain = [g for g, x in enumerate(spec.groups) if not x.is_known]
  jobs: list[Callable[[], None]] = [
    functools.partial(_read_bytes, parts[x.array][x.part], next(pieces)) for x in whole
  ]
  for i in range(0, len(plain), _GROUPS):
    pool.run(jobs)
    jobs = []
    for g in plain[i : i + _GROUPS]:
      layout, shapes = spec.groups[g].layout(coded[g][0].dtype), coded[g]
      contexts = contexts_lib.from_bytes(
        heads[g].tobytes(), layout, [x.shape for x in shapes]
      )
      jobs += group(g, contexts).decode_jobs(bodies[g])
  pool.run(jobs)
  finish([i for i in range(len(arrays)) if i not in numbers])
  for i, g in numbers.items():
    classes = known[i]().check(arrays[i].size)
    if max(classes.shifts) != spec.groups[g].raw_bits:
      raise ValueError(f'array {i} cannot have shifts up to {max(classes.shifts)}')
    bands = known_lib.from_bytes(heads[g].tobytes(), classes)
    pool.run(group(g, bands).decode_jobs(bodies[g]))
  finish([*numbers])
  return arrays


# ---- groups --------------------------------------------------------------------------

_Contexts = contexts_lib.Contexts | known_lib.Bands


class _Group(NamedTuple):
  """A group: the elements of some parts of one layout, one part after the other.

  Attributes:
    layout: the layout.
    contexts: the contexts of the parts.
    members: the index of the array and of the part in it, of each part.
    arrays: the parts, contiguous.
    lanes: lanes of each block.
    elements: elements of each block but the last.
  """

  layout: layouts.Layout
  contexts: _Contexts
  members: list[tuple[int, int]]
  arrays: list[np.ndarray]
  lanes: int
  elements: int

  @classmethod
  def make(
    cls,
    layout: layouts.Layout,
    contexts: _Contexts,
    members: list[tuple[int, int]],
    arrays: list[np.ndarray],
    nbytes: float,
  ) -> '_Group':
    """Divides elements that take about so many bytes into blocks of similar sizes."""
    total = sum(array.size for array in arrays)
    elements = blocks.divided(total)
    lanes = blocks.lanes_for(elements, nbytes * elements / total)
    return cls(layout, contexts, members, arrays, lanes, elements)

  @property
  def total(self) -> int:
    return sum(array.size for array in self.arrays)

  @property
  def num_blocks(self) -> int:
    return -(-self.total // self.elements)

  def head(self) -> bytes:
    """Returns the bytes of the contexts."""
    if isinstance(self.contexts, known_lib.Bands):
      return known_lib.to_bytes(self.contexts)
    return contexts_lib.to_bytes(self.contexts)

  def encode_jobs(self) -> list[Callable[[], np.ndarray]]:
    """Returns a job for each block; it returns the bytes of the block."""
    tables = self.contexts.tables(self.layout)

    def job(start: int) -> np.ndarray:
      return blocks.encode(
        functools.partial(self._read, start),
        functools.partial(self._write_contexts, start),
        min(self.elements, self.total - start),
        self.lanes,
        self.layout,
        tables,
      )

    return [functools.partial(job, i * self.elements) for i in range(self.num_blocks)]

  def decode_jobs(self, data: Sequence[np.ndarray]) -> list[Callable[[], None]]:
    """Returns a job for each block, which decodes its bytes into the arrays."""
    tables = self.contexts.tables(self.layout)

    def job(start: int, block: np.ndarray) -> None:
      blocks.decode(
        block,
        functools.partial(self._write_contexts, start),
        min(self.elements, self.total - start),
        self.lanes,
        self.layout,
        tables,
        functools.partial(self._write, start),
      )

    return [
      functools.partial(job, i * self.elements, block) for i, block in enumerate(data)
    ]

  def _write_contexts(self, start: int, out: np.ndarray) -> None:
    """Writes the index of the table of each element from `start` on."""
    # A span: an array, its first place in the block, its elements there, the first one.
    for i, place, size, first in self._spans(start, out.size):
      shape = self.arrays[i].shape
      self.contexts.write(out[place : place + size], i, first, shape)

  def _read(self, start: int, out: np.ndarray) -> None:
    """Copies the bit patterns of the elements from `start` on."""
    for i, place, size, first in self._spans(start, out.size):
      array_bits = sparse.bit_patterns(self.arrays[i])
      out[place : place + size] = array_bits[first : first + size]

  def _write(self, start: int, bits: np.ndarray) -> None:
    """Copies bit patterns to the elements from `start` on."""
    for i, place, size, first in self._spans(start, bits.size):
      array_bits = sparse.bit_patterns(self.arrays[i])
      array_bits[first : first + size] = bits[place : place + size]

  def _spans(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Finds the parts that hold `count` elements from `start` on."""
    begin = 0
    for i, array in enumerate(self.arrays):
      low, high = max(start, begin), min(start + count, begin + array.size)
      if low < high:
        yield i, low - start, high - low, low - begin
      begin += array.size


def _known_group(
  index: int, array: np.ndarray, known: known_lib.Known
) -> tuple[_Group, float]:
  """Returns the group of an array of known classes, and about its bytes."""
  layout = layouts.Difference(array.dtype, max(known.shifts))
  bits = sparse.bit_patterns(array)
  of_classes = np.zeros(blocks.MAX_TABLES + 1, np.uint8)
  of_classes[: len(known.shifts)] = known.shifts

  def job(start: int) -> np.ndarray:
    part = slice(start, start + blocks.CAPACITY)
    copy = lambda array, out: np.copyto(out, array)
    return plans.histogram(
      functools.partial(copy, bits[part]),
      functools.partial(copy, known.classes[part]),
      bits[part].size,
      (len(known.shifts), known_lib.ALPHABET),
      layout,
      of_classes,
    )

  counts = np.sum(pool.each(job, range(0, bits.size, blocks.CAPACITY)), axis=0)
  bands, nbytes = known_lib.fit(known, counts)
  return _Group.make(layout, bands, [(index, 0)], [array], nbytes), nbytes


def _planned(
  arrays: Sequence[np.ndarray], known: Mapping[int, known_lib.Known]
) -> list[plans.Plan]:
  """Returns plans. Arrays of known classes have no layout yet."""
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  whole = pool.each(host.contiguous, map(np.asarray, arrays))
  planned = iter(plans.plan([x for i, x in enumerate(whole) if i not in known]))
  return [
    plans.Plan(x, None, (plans.Part(x),)) if i in known else next(planned)
    for i, x in enumerate(whole)
  ]


def _grouped(planned: list[plans.Plan]) -> list[_Group]:
  """Puts parts of one layout into a group, or into several if one has no room."""
  open_: dict[layouts.Layout, list[tuple[tuple[int, int], plans.Coded]]] = {}
  closed: list[list[tuple[tuple[int, int], plans.Coded]]] = []
  for i, plan in enumerate(planned):
    for j, part in enumerate(plan.parts):
      if part.coded:
        together = open_.setdefault(part.coded.layout, [])
        more = [*together, ((i, j), part.coded)]
        if together and not _fits([coded for _, coded in more]):
          closed.append(together)
          more = more[-1:]
        open_[part.coded.layout] = more
  groups = []
  for together in (*closed, *open_.values()):
    members, coded = zip(*together, strict=True)
    layout = coded[0].layout
    contexts = contexts_lib.fit(
      layout, [x.scales for x in coded], [x.counts for x in coded]
    )
    parts = [planned[i].parts[j] for i, j in members]
    nbytes = sum(part.array.nbytes - part.saved for part in parts)
    arrays = [part.array for part in parts]
    groups.append(_Group.make(layout, contexts, list(members), arrays, nbytes))
  return groups


def _worthwhile(planned: list[plans.Plan], groups: list[_Group]) -> list[_Group]:
  """Returns the groups that save more than they take, as many as a record may have."""
  saving = lambda group: sum(planned[i].parts[j].saved for i, j in group.members)
  ordered = sorted(groups, key=saving)
  while ordered and (
    saving(ordered[0]) < _GROUP_BYTES
    or len(ordered) > specs.most_groups(sum(group.total for group in ordered))
  ):
    del ordered[0]
  return [group for group in groups if any(group is x for x in ordered)]


def _fits(coded: Sequence[plans.Coded]) -> bool:
  alphabet = max(x.counts.shape[1] for x in coded)
  return contexts_lib.fits([x.scales for x in coded], alphabet)


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
