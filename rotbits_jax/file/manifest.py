"""The manifest: describes the content of a file, and is checked when it is read.

A file is a list of *records*, which decode on their own. Each layer is a record; the
parameters outside the layers form one for each first key of their paths ('embed',
'head', ...). A record is one stream of the container. It consists of *leaves*, which
are arrays or structured leaves (see `structured`). A leaf is stored as one or more
arrays. All paths are those of the whole model, like 'layers.3/mlp/up/kernel'.

The preset `paper` stores one message for the whole model in place of records. A
checkpoint of an unknown family is stored as records of plain tensors, and the headers
of its weights files say how these are made of them.

What an entry must not say raises a ValueError that names the record or the parameter.
"""

from collections.abc import Mapping, Sequence
import functools
import json
import math
from typing import Annotated, Any, Self

import msgspec
import numpy as np

from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import specs
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.relative import entries
from rotbits_jax.relative import products
from rotbits_jax.structured import subspaces
from rotbits_jax.system import schema

UNTRUSTED = ArithmeticError, AttributeError, LookupError, TypeError
"""The errors, besides ValueError, of a leaf whose settings and arrays do not fit."""

FILES = 'files/'
"""The beginning of the names of the streams of other files."""

HEADERS = 'headers/'
"""The beginning of the names of streams that hold the header of a weights file."""

MOST_FILES = 1 << 28
"""The greatest number of bytes of all other files before they are compressed."""

Shape = tuple[int, ...]
_Setting = schema.Scalar | tuple[schema.Scalar, ...]
_Settings = dict[str, _Setting]
_BASES = subspaces.Basis, subspaces.Subspace


class Stream(schema.Row):
  """Length and CRC-32 of a stream."""

  nbytes: schema.Size
  crc32: schema.Crc32


class Deflated(Stream):
  """A stream of the format of zlib, with the number of bytes that it inflates to."""

  size: Annotated[int, schema.between(0, MOST_FILES)]


class SavingEntry(schema.Row):
  """See `passes.Saving`."""

  name: str
  elements: schema.Integer
  bytes: schema.Integer
  notes: tuple[_Settings, ...]


class Counts(schema.Row):
  """Numbers of elements and bytes."""

  elements: schema.Size
  bytes: schema.Size


class Leaf(schema.Object, kw_only=True):
  """A stored parameter; `docs/format.md` has the fields."""

  path: schema.Path
  shape: entries.Shape
  dtype: entries.Dtype
  type_name: str = ''
  stack_key: tuple[str, ...] = ()
  settings: _Settings = msgspec.field(default_factory=dict)
  arrays: tuple[str, ...] = ('',)
  needs: tuple[schema.Path, ...] = ()
  base: entries.BaseArray | None = None
  product: products.Product | None = None
  crc32: schema.Crc32 | None = None

  def __post_init__(self) -> None:
    entries.check_shape(self.shape)
    is_array, cls = not self.type_name, self.leaf_class
    known = [x for x in (self.base, self.product, self.needs) if x]
    fields = self.stack_key, self.settings, self.arrays, self.crc32
    if is_array and (known or fields != ((), {}, ('',), None)):
      raise ValueError(f'{self.path}: an array has fields of a structured leaf')
    if is_array:
      return
    if len(set(self.arrays)) != len(self.arrays):
      raise ValueError(f'{self.path}: the names of the arrays must differ')
    if cls is not None:
      is_known = cls.origin is structured.Origin.KNOWN
      if cls.origin.is_in_files != (self.crc32 is not None):
        raise ValueError(f'{self.path}: leaves of its type have a checksum, or none')
      if len(known) != 1 if is_known else self.base or self.product:
        raise ValueError(f'{self.path}: leaves of its type need a base, or need none')
    is_of_layer = models.names.layer_index(self.path) is not None
    if self.needs and self.crc32 is None and is_of_layer:
      raise ValueError(f'{self.path}: a leaf of a stack cannot need other parameters')

  @property
  def leaf_class(self) -> type[structured.Structured] | None:
    """The class of the structured leaf; None for an array, or if it is unknown."""
    return structured.TYPES.get(self.type_name)

  def make(self, arrays: Sequence[np.ndarray]) -> structured.Structured:
    """Makes the structured leaf from the arrays as which it is stored."""
    cls = structured.TYPES[self.type_name]
    try:
      named = dict(zip(self.arrays, arrays, strict=True))
      leaf = cls.from_stored(self.settings, named)
      key = *structured.stack_key(leaf), leaf.needs
    except UNTRUSTED as error:
      raise ValueError(str(error)) from error
    fields = self.type_name, self.shape, self.dtype, self.stack_key, self.needs
    if key != fields:
      raise ValueError('the leaf differs from the manifest')
    if cls.origin is structured.Origin.KNOWN and not self.needs:
      leaf.check_needed(self.shape if self.base is None else self.base.shape)
    return leaf

  def rank(self, shapes: Sequence[Shape]) -> Any:
    """Returns `Structured.stored_rank`, given the shapes of the stored arrays."""
    if (cls := self.leaf_class) is None:
      return None
    try:
      named = dict(zip(self.arrays, shapes, strict=True))
      return cls.stored_rank(named)
    except UNTRUSTED as error:
      raise ValueError(f'{self.path}: expected a leaf with two factors') from error

  def is_expanded(self, integers: bool = False) -> bool:
    """Returns whether the reader puts the array in the place of the structured leaf.

    With `integers`, multiples of one step stay integers.
    """
    multiples = structured.UniformlyQuantized.type_name
    is_multiples = self.type_name == multiples and 'row_exponents' not in self.arrays
    return self.crc32 is not None or (is_multiples and not integers)

  @property
  def base_size(self) -> int:
    """The number of elements that the base and bases of subspaces give."""
    if self.product is not None and self.product.kind == 'shortcut':
      return self.size  # the bases have more
    return sum(math.prod(x.shape) for x in self.base_arrays)

  @property
  def base_arrays(self) -> tuple[entries.BaseArray, ...]:
    """The arrays of a base that are needed."""
    if self.product is not None:
      return self.product.arrays
    return () if self.base is None else (self.base,)

  @property
  def size(self) -> int:
    """The number of elements of the array that the leaf stands for."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The bytes of that array."""
    return self.size * np.dtype(entries.stored_dtype(self.dtype)).itemsize


class RecordEntry(schema.Object, kw_only=True):
  """A part of a model that decodes on its own; `docs/format.md` has the fields."""

  name: str
  nbytes: schema.Size
  crc32: schema.Crc32
  leaves: tuple[Leaf, ...]
  coder: str = 'weights'
  spec: Any
  input: Counts
  savings: tuple[SavingEntry, ...] = ()
  empty: tuple[schema.Path, ...] = ()

  def __post_init__(self) -> None:
    try:
      self.tree({leaf.path: None for leaf in self.leaves})
      if len({self.inner(leaf.path) for leaf in self.leaves}) < len(self.leaves):
        raise ValueError('two leaves have the same path within the record')
      if self.is_known:
        self._check_stream()
    except ValueError as error:
      raise ValueError(f'{self.name}: {error}') from error

  def _check_stream(self) -> None:
    """Checks that the stream can hold the leaves."""
    spec = self.stream_spec
    if self.nbytes != spec.nbytes:
      raise ValueError(
        f'the coder needs a stream of {spec.nbytes} bytes, got {self.nbytes}'
      )
    if sum(len(leaf.arrays) for leaf in self.leaves) != len(spec.arrays):
      raise ValueError('the leaves and the coder list different arrays')
    for leaf, arrays in self.leaf_specs:
      leaf.rank([x.shape for x in arrays])
      if not leaf.type_name:
        stored = leaf.shape, entries.stored_dtype(leaf.dtype)
        if (arrays[0].shape, arrays[0].dtype) != stored:
          raise ValueError(
            f'{leaf.path}: the leaf and the coder differ in the shape or the dtype'
          )
      # The config of the model bounds the size of a basis.
      elif leaf.is_expanded() and leaf.leaf_class is not subspaces.Subspace:
        nbytes = sum(x.nbytes for x in arrays)
        if entries.is_too_short(leaf.size, leaf.base_size, nbytes):
          raise ValueError(f'{leaf.path}: too few bytes stand for {leaf.size} elements')

  @property
  def is_known(self) -> bool:
    """Whether the coder is registered."""
    return self.coder in coders.CODERS

  @functools.cached_property
  def stream_spec(self) -> specs.StreamSpec:
    """The description of the stream."""
    return schema.load(coders.find(self.coder).spec, self.spec)

  @functools.cached_property
  def leaf_specs(self) -> list[tuple[Leaf, list[specs.ArraySpec]]]:
    """Each leaf with the specs of its arrays."""
    arrays = iter(self.stream_spec.arrays)
    return [(leaf, [next(arrays) for _ in leaf.arrays]) for leaf in self.leaves]

  @property
  def memory_bytes(self) -> int:
    """The bytes of the decoded record, as it is stored or materialized."""
    stored = sum(array.nbytes for array in self.stream_spec.arrays)
    # A subspace becomes a basis by the inverse of a matrix, in six such matrices.
    inverses = sum(
      6 * 8 * (leaf.shape[0] - leaf.shape[1]) ** 2
      for leaf in self.leaves
      if leaf.leaf_class is subspaces.Subspace
    )
    return max(stored, sum(leaf.nbytes for leaf in self.leaves)) + inverses

  def rank(self, inner_path: str) -> Any:
    """Returns the rank of a leaf by its path within the record, see `Leaf.rank`."""
    for leaf, arrays in self.leaf_specs:
      if self.inner(leaf.path) == inner_path:
        return leaf.rank([x.shape for x in arrays])
    return None

  def tree(self, flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts of these leaves by path, with the empty dicts."""
    empty: dict[str, Any] = {path: {} for path in self.empty}
    return structured.unflatten([*flat.items(), *empty.items()])

  def inner(self, path: str) -> str:
    """Returns the path of a leaf within the record."""
    return path.removeprefix(f'{self.name}/')

  def stack_key(self, integers: bool) -> tuple[Any, ...]:
    """Returns a key that layers share if they can be stacked, see `is_expanded`."""
    keys = [
      (
        self.inner(x.path),
        '' if x.is_expanded(integers) else x.type_name,
        *(x.shape, x.dtype, x.stack_key),
      )
      for x in self.leaves
    ]
    return tuple(sorted(keys))


class MessageEntry(schema.Object, kw_only=True):
  """A whole model as one message, see `paper`; `docs/format.md` has the fields."""

  layout: paper.MessageLayout
  streams: dict[str, Stream]
  input: Counts
  savings: tuple[SavingEntry, ...]

  def __post_init__(self) -> None:
    if sorted(self.streams) != sorted(paper.STREAMS):
      raise ValueError(f'the streams must be {", ".join(paper.STREAMS)}')


class Manifest(schema.Object, kw_only=True):
  """The description of a file, or of one shard of a model; see `docs/format.md`."""

  preset: str
  options: dict[str, _Setting | dict[str, schema.Scalar]]
  keeps: presets.Keeps
  config: models.ModelConfig | None = None
  stem: str | None = None
  records: tuple[RecordEntry, ...]
  message: MessageEntry | None = None
  files: dict[str, Deflated] = msgspec.field(default_factory=dict)
  headers: dict[str, Deflated] = msgspec.field(default_factory=dict)
  dtypes: dict[str, entries.Dtype] = msgspec.field(default_factory=dict)

  def __post_init__(self) -> None:
    streams = [*(x.name for x in self.records), *self.other_streams()]
    if len(set(streams)) != len(streams):
      raise ValueError('two streams have the same name')
    sizes = lambda streams: {name: x.size for name, x in streams.items()}
    check_files(self.stem, sizes(self.files), sizes(self.headers))
    if twice := self.files.keys() & self.headers.keys():
      raise ValueError(f'{min(twice)}: two files have this name')
    if self.headers and self.config is not None:
      raise ValueError('a model has no weights files of its own')
    if self.config is None and self.message is not None:
      raise ValueError('a message needs a config')
    for record in self.records:
      if self.message is not None and record.name != models.names.BUFFERS:
        raise ValueError('a message is the whole model: there are no other records')
      if self.config is not None:
        self._check_record(record, self.config)
      elif any(x.product or x.leaf_class in _BASES for x in record.leaves):
        raise ValueError(f'{record.name}: a product or a basis needs a config')

  def _check_record(self, record: RecordEntry, config: models.ModelConfig) -> None:
    """Checks that a record belongs to a model with the config."""
    if record.empty:
      raise ValueError(f'{record.name}: a model has no empty dicts')
    segment = models.names.subspace_index(record.name)
    if segment is not None:
      widths = dict(enumerate(config.segment_widths))
      shape = config.hidden_size, widths.get(segment)
      expected = models.names.basis(segment), shape, 'int32'
      for leaf in record.leaves:
        fields = leaf.path, leaf.shape, leaf.dtype
        if fields != expected or leaf.leaf_class not in _BASES:
          raise ValueError(f'{record.name}: it is not the basis of a segment')
      return
    shapes = {leaf.path: leaf.shape for leaf in record.leaves}
    check_shapes(record.name, shapes, config)
    for leaf in record.leaves:
      if leaf.leaf_class in _BASES:
        raise ValueError(f'{leaf.path}: a basis needs a segment of a model')
      if record.name == models.names.BUFFERS and leaf.type_name:
        raise ValueError(f'{record.name}: buffers are arrays')
      settings = {} if leaf.leaf_class is None else leaf.leaf_class.config_fields
      for setting, field in settings.items():
        if leaf.settings.get(setting) != getattr(config, field):
          raise ValueError(
            f'{leaf.path}: the config and the setting {setting!r} disagree'
          )

  def other_streams(self) -> dict[str, Stream]:
    """Returns the streams that are not those of records, by name."""
    return {
      **{f'{FILES}{name}': file for name, file in self.files.items()},
      **(self.message.streams if self.message else {}),
      **{f'{HEADERS}{name}': header for name, header in self.headers.items()},
    }

  def sizes(self) -> dict[str, int]:
    """Returns the length of every stream but that of the manifest, by name."""
    others = {name: x.nbytes for name, x in self.other_streams().items()}
    return {x.name: x.nbytes for x in self.records} | others

  def to_bytes(self) -> bytes:
    """Serialises the manifest."""
    value = schema.dump(self)
    return json.dumps(value, separators=(',', ':'), allow_nan=False).encode()

  @classmethod
  def from_bytes(cls, data: bytes) -> Self:
    """Makes a manifest from bytes: the inverse of `to_bytes`."""
    with container.naming(container.MANIFEST):
      return schema.load(cls, schema.parse(data))


def check_files(
  stem: str | None, files: Mapping[str, int], headers: Mapping[str, int]
) -> None:
  """Checks a `stem`, and the names and sizes of other files and of headers."""
  if stem is not None and not schema.is_file_name(stem):
    raise ValueError(f'{stem!r:.100} is not the name of a file')
  for sizes in (files, headers):
    if wrong := [name for name in sizes if not schema.is_relative_path(name)]:
      raise ValueError(f'{wrong[0]!r:.100} is not the name of a file in a folder')
    if sum(sizes.values()) > MOST_FILES:
      raise ValueError(f'the other files have more than {MOST_FILES} bytes')


def check_shapes(
  record: str, shapes: Mapping[str, Shape], config: models.ModelConfig
) -> None:
  """Checks the shapes, by path, of the parameters of a record of a model."""
  if record == models.names.BUFFERS:
    if wrong := [x for x in shapes if x.split('/')[:-1] != [record]]:
      raise ValueError(f'{wrong[0]}: not the path of a buffer')
    return
  tree = models.record_shapes(config, record)
  if not tree:
    raise ValueError(f'{record}: a model with this config has no such record')
  expected = structured.flatten({record: tree})
  if shapes != expected:
    path, shape = min(set(shapes.items()) ^ set(expected.items()))
    raise ValueError(f'{path}: the config implies another shape, got {shape=}')


def check_array(path: str, shape: Shape, dtype: np.dtype) -> None:
  """Checks that an array of this path, shape and dtype can be stored."""
  try:
    path.encode()  # text of files is UTF-8
    schema.load(Leaf, {'path': path, 'shape': shape, 'dtype': dtype.name})
  except ValueError as error:
    array = f'an array of {dtype.name} {list(shape)!r:.100}'
    raise ValueError(f'{path}: {array} cannot be stored: {error}') from error
