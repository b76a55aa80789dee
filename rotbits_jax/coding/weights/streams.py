"""Encoding and decoding of a record: a list of arrays that decodes on its own.

`coding.weights` describes the stream of a record.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import NamedTuple

import numpy as np

from rotbits_jax.coding.weights import blocks
from rotbits_jax.coding.weights import contexts as contexts_lib
from rotbits_jax.coding.weights import forms
from rotbits_jax.coding.weights import layouts
from rotbits_jax.coding.weights import plans
from rotbits_jax.coding.weights import pool
from rotbits_jax.coding.weights import specs
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import host

_FEW = 1 << 16  # bytes of arrays that are often stored as they are


class Encoded(NamedTuple):
  """An encoded record.

  Attributes:
    spec: the description of the stream.
    data: uint8 `[spec.nbytes]`, the stream.
  """

  spec: specs.StreamSpec
  data: np.ndarray


def encode(arrays: Sequence[np.ndarray]) -> Encoded:
  """Encodes arrays as one record.

  Args:
    arrays: arrays of dtypes in `specs.DTYPES`, with any strides.

  Returns:
    The encoded record.

  Raises:
    ValueError: if a dtype cannot be stored.
  """
  if sum(x.nbytes for x in arrays) > _FEW:
    blocks.compile_push()
  planned = _planned(arrays)
  groups = _allowed(planned, _grouped(planned))
  index = {(i, j): g for g, own in enumerate(groups) for i, j in own.members}
  jobs = [job for own in groups for job in own.encode_jobs()]
  results = iter(pool.run(jobs))
  checksums = pool.run(
    (functools.partial(checksums_lib.of_array, x.array) for x in planned),
    [x.array.nbytes for x in planned],
  )
  heads: list[np.ndarray] = []
  bodies: list[np.ndarray] = []
  of_groups = []
  for group in groups:
    coded = [next(results) for _ in range(group.num_blocks)]
    heads.append(np.frombuffer(contexts_lib.to_bytes(group.contexts), np.uint8))
    bodies += [x for words, planes in coded for x in (words, *planes)]
    of_groups.append(
      specs.GroupSpec(
        type_name=group.layout.type_name,
        raw_bits=group.layout.raw_bits,
        min_exponent=group.layout.min_exponent,
        contexts=heads[-1].size,
        lanes=group.lanes,
        elements=group.elements,
        blocks=tuple(words.size for words, _ in coded),
      )
    )
  entries = []
  for i, (plan, crc32) in enumerate(zip(planned, checksums, strict=True)):
    form = plan.form
    entries.append(
      specs.ArraySpec(
        dtype=plan.array.dtype.name,
        shape=plan.array.shape,
        crc32=crc32,
        groups=tuple(index.get((i, j)) for j in range(len(plan.parts))),
        uniform=form if isinstance(form, forms.Uniform) else None,
        codebook=form if isinstance(form, forms.Codebook) else None,
      )
    )
    bodies += [_bytes(part.array) for part in plan.parts if not part.coded]
  spec = specs.StreamSpec(arrays=tuple(entries), groups=tuple(of_groups))
  return Encoded(spec, np.concatenate([np.zeros(0, np.uint8), *heads, *bodies]))


def estimate(arrays: Sequence[np.ndarray]) -> float:
  """Estimates how many bytes arrays take in a record, without coding them."""
  return sum(plan.nbytes for plan in _planned(arrays))


def decode(
  spec: specs.StreamSpec,
  data: np.ndarray | memoryview,
  *,
  out: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
  """Decodes a record: the inverse of `encode`.

  Args:
    spec: the spec of the record.
    data: uint8 `[spec.nbytes]`, the stream; it may be a memory map.
    out: arrays to decode into, in C order, with the shapes and dtypes of the spec. By
      default the function makes new arrays. An array with a `StreamSpec.grid` may be of
      its `integer_dtype`, or of int16: it gets the integers in place of the multiples.

  Returns:
    The arrays, bit for bit. They do not share memory with `data`.

  Raises:
    ValueError: if the stream does not fit the spec, or if the checksum of an array
      differs from the spec's.
  """
  # A view as a plain array, because a memory map is slow to slice.
  stream, sizes = np.asarray(data).view(np.ndarray), spec.sizes()
  if stream.dtype != np.uint8 or stream.shape != (sum(sizes),):
    raise ValueError(
      f'the stream must be uint8 [{sum(sizes)}], got {stream.dtype} '
      f'{list(stream.shape)}'
    )
  arrays = _outputs(spec, out)
  ends = np.cumsum(sizes).tolist()
  pieces = iter(stream[end - n : end] for end, n in zip(ends, sizes, strict=True))
  parts = [_parts(*pair) for pair in zip(spec.arrays, arrays, strict=True)]
  *coded, whole = spec.members()
  described = [(*x, next(pieces)) for x in zip(spec.groups, coded, strict=True)]
  jobs: list[Callable[[], None]] = []
  for i in range(0, len(described), _GROUPS):
    pool.run(jobs)
    groups = [
      _Group.read(group, own, [parts[x.array][x.part] for x in own], data)
      for group, own, data in described[i : i + _GROUPS]
    ]
    jobs = [job for group in groups for job in group.decode_jobs(pieces)]
  for member in whole:
    jobs.append(
      functools.partial(_read_bytes, parts[member.array][member.part], next(pieces))
    )
  pool.run(jobs)
  pool.run(
    (
      functools.partial(_finish, i, array, own, out)
      for i, (array, own, out) in enumerate(
        zip(spec.arrays, parts, arrays, strict=True)
      )
    ),
    [x.nbytes for x in arrays],
  )
  return arrays


# ---- groups --------------------------------------------------------------------------


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
  contexts: contexts_lib.Contexts
  members: list[tuple[int, int]]
  arrays: list[np.ndarray]
  lanes: int
  elements: int

  @classmethod
  def make(
    cls,
    layout: layouts.Layout,
    contexts: contexts_lib.Contexts,
    members: list[tuple[int, int]],
    arrays: list[np.ndarray],
    nbytes: float,
  ) -> '_Group':
    """Divides elements that take about so many bytes into blocks of similar sizes."""
    total = sum(array.size for array in arrays)
    elements = blocks.divided(total)
    lanes = blocks.lanes_for(elements, nbytes * elements / total)
    return cls(layout, contexts, members, arrays, lanes, elements)

  @classmethod
  def read(
    cls,
    spec: specs.GroupSpec,
    own: list[specs.Member],
    arrays: list[np.ndarray],
    data: np.ndarray,
  ) -> '_Group':
    """Reads the contexts of a group."""
    layout = spec.layout(own[0].dtype)
    shapes = [member.shape for member in own]
    contexts = contexts_lib.from_bytes(data.tobytes(), layout, shapes)
    members = [(member.array, member.part) for member in own]
    return cls(layout, contexts, members, arrays, spec.lanes, spec.elements)

  @property
  def total(self) -> int:
    return sum(array.size for array in self.arrays)

  @property
  def num_blocks(self) -> int:
    return -(-self.total // self.elements)

  def encode_jobs(self) -> list[Callable[[], tuple[np.ndarray, list[np.ndarray]]]]:
    """Returns a job for each block; it returns the coded bytes and the planes."""
    made = blocks.tables_of(self.contexts.frequencies)

    def job(start: int) -> tuple[np.ndarray, list[np.ndarray]]:
      return blocks.encode(
        functools.partial(self._read, start),
        functools.partial(self._write_contexts, start),
        min(self.elements, self.total - start),
        self.lanes,
        self.layout,
        made,
      )

    return [functools.partial(job, i * self.elements) for i in range(self.num_blocks)]

  def decode_jobs(self, pieces: Iterator[np.ndarray]) -> list[Callable[[], None]]:
    """Returns a job for each block, which decodes it into the arrays.

    Args:
      pieces: the coded bytes and the planes of each block in turn.
    """
    made = blocks.tables_of(self.contexts.frequencies)

    def job(start: int, coded: np.ndarray, planes: np.ndarray) -> None:
      count = min(self.elements, self.total - start)
      contexts = functools.partial(self._write_contexts, start)
      write = functools.partial(self._write, start)
      blocks.decode(
        coded, planes, contexts, count, self.lanes, self.layout, made, write
      )

    return [
      functools.partial(job, i * self.elements, next(pieces), next(pieces))
      for i in range(self.num_blocks)
    ]

  def _write_contexts(self, start: int, out: np.ndarray) -> None:
    """Writes the index of the table of each element from `start` on."""
    for i, place, size, first in self._spans(start, out.size):
      shape = self.arrays[i].shape
      self.contexts.write(out[place : place + size], i, first, shape)

  def _read(self, start: int, out: np.ndarray) -> None:
    """Copies the bit patterns of the elements from `start` on."""
    for i, place, size, first in self._spans(start, out.size):
      own = forms.bit_patterns(self.arrays[i])
      out[place : place + size] = own[first : first + size]

  def _write(self, start: int, bits: np.ndarray) -> None:
    """Copies bit patterns to the elements from `start` on."""
    for i, place, size, first in self._spans(start, bits.size):
      own = forms.bit_patterns(self.arrays[i])
      own[first : first + size] = bits[place : place + size]

  def _spans(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Finds the parts that hold `count` elements from `start` on.

    Yields:
      For each part: its index, its first place among these elements, how many of them
      it holds, and the place of the first of them in the part.
    """
    begin = 0
    for i, array in enumerate(self.arrays):
      low, high = max(start, begin), min(start + count, begin + array.size)
      if low < high:
        yield i, low - start, high - low, low - begin
      begin += array.size


_GROUPS = 16  # that are decoded at once, because their tables may be large

# Estimated bytes of a group in the spec and in the stream.
_GROUP_BYTES = 128


def _planned(arrays: Sequence[np.ndarray]) -> list[plans.Plan]:
  """Returns plans in which every layout saves more than it takes."""
  for array in arrays:
    if np.asarray(array).dtype.name not in specs.DTYPES:
      raise ValueError(f'arrays of this dtype cannot be stored, got {array.dtype=}')
  contiguous = (functools.partial(host.contiguous, np.asarray(x)) for x in arrays)
  planned = plans.plan(pool.run(contiguous, [x.nbytes for x in arrays]))
  saved: dict[layouts.Layout, float] = {}
  for plan in planned:
    for part in plan.parts:
      if part.coded:
        saved[part.coded.layout] = saved.get(part.coded.layout, 0.0) + part.saved
  return [
    plan._replace(
      parts=tuple(
        plans.Part(part.array)
        if part.coded and saved[part.coded.layout] < _GROUP_BYTES
        else part
        for part in plan.parts
      )
    )
    for plan in planned
  ]


def _grouped(planned: list[plans.Plan]) -> list[_Group]:
  """Puts parts of one layout into a group, or into several if one has no room."""
  open_: dict[layouts.Layout, list[tuple[tuple[int, int], plans.Coded]]] = {}
  closed: list[list[tuple[tuple[int, int], plans.Coded]]] = []
  for i, plan in enumerate(planned):
    for j, part in enumerate(plan.parts):
      if part.coded:
        own = open_.setdefault(part.coded.layout, [])
        more = [*own, ((i, j), part.coded)]
        if own and not _fits([coded for _, coded in more]):
          closed.append(own)
          more = more[-1:]
        open_[part.coded.layout] = more
  groups = []
  for own in (*closed, *open_.values()):
    members, coded = zip(*own, strict=True)
    layout = coded[0].layout
    contexts = contexts_lib.fit(
      layout, [x.buckets for x in coded], [x.counts for x in coded]
    )
    parts = [planned[i].parts[j] for i, j in members]
    nbytes = sum(part.array.nbytes - part.saved for part in parts)
    arrays = [part.array for part in parts]
    groups.append(_Group.make(layout, contexts, list(members), arrays, nbytes))
  return groups


def _allowed(planned: list[plans.Plan], groups: list[_Group]) -> list[_Group]:
  """Returns as many groups as a record may have; the parts of others get no coding."""
  saving = lambda own: sum(planned[i].parts[j].saved for i, j in own.members)
  size = lambda own: sum(array.size for array in own.arrays)
  while len(groups) > specs.most_groups(sum(map(size, groups))):
    least = min(range(len(groups)), key=lambda g: saving(groups[g]))
    for i, j in groups.pop(least).members:
      parts = list(planned[i].parts)
      parts[j] = plans.Part(parts[j].array)
      planned[i] = planned[i]._replace(parts=tuple(parts))
  return groups


def _fits(coded: Sequence[plans.Coded]) -> bool:
  alphabet = max(x.counts.shape[1] for x in coded)
  return contexts_lib.fits([x.buckets for x in coded], alphabet)


# ---- arrays --------------------------------------------------------------------------


def _outputs(
  spec: specs.StreamSpec, out: Sequence[np.ndarray] | None
) -> list[np.ndarray]:
  """Returns the given arrays if they fit the spec; makes new ones if `out` is None.

  Raises:
    ValueError: if the arrays do not fit.
  """
  wanted = [(array.shape, array.numpy_dtype) for array in spec.arrays]
  if out is None:
    return [host.empty(shape, dtype) for shape, dtype in wanted]
  if len(out) != len(wanted):
    raise ValueError(f'the record has {len(wanted)} arrays, got {len(out)} in `out`')
  for i, (array, (shape, dtype)) in enumerate(zip(out, wanted, strict=True)):
    grid = spec.grid(spec.arrays[i])
    known = (dtype, grid.integer_dtype, np.dtype(np.int16)) if grid else (dtype,)
    if array.shape != shape or array.dtype not in known:
      raise ValueError(
        f'array {i} of the record is {dtype} {shape}, got {array.dtype=} {array.shape=}'
      )
    if not (array.flags.c_contiguous and array.flags.writeable):
      raise ValueError(f'array {i} of `out` must be contiguous and writeable')
  return list(out)


def _parts(spec: specs.ArraySpec, array: np.ndarray) -> list[np.ndarray]:
  """Returns arrays to decode the parts of an array into."""
  is_part = array.dtype != spec.numpy_dtype and array.dtype == spec.parts[0][0]
  if spec.form is None or is_part:
    return [array]
  return [host.empty(shape, dtype) for dtype, shape in spec.parts]


def _finish(
  index: int, spec: specs.ArraySpec, parts: list[np.ndarray], array: np.ndarray
) -> None:
  """Makes an array of its parts, and checks it."""
  if parts[0] is not array and array.dtype == spec.numpy_dtype:
    assert spec.form
    spec.form.join(parts, array)
  elif parts[0] is not array:
    array[...] = parts[0]  # integers, in a wider dtype
  if array.dtype == spec.numpy_dtype:
    found = checksums_lib.of_array(array)
  else:
    assert spec.uniform
    found = 0
    for part in forms.chunks(array):
      numbers = spec.uniform.numbers(part, spec.numpy_dtype)
      found = checksums_lib.of_array(numbers, found)
  if found != spec.crc32:
    raise ValueError(f'array {index} of the record is damaged: its checksum differs')


def _bytes(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(np.uint8)


def _read_bytes(array: np.ndarray, part: np.ndarray) -> None:
  _bytes(array)[:] = part
