"""The manifest: describes the content of a file; `docs/format.md` has all fields.

`Manifest.check` is called once, when a file is opened; `RecordEntry.check` before a
record is decoded. Both raise a ValueError that names the record or the parameter.
"""

from collections.abc import Sequence
import functools
import json
import math
from typing import Annotated, Any, Self

import msgspec
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import paper
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import quantisers  # noqa: F401  registers its leaf
from rotbits_jax import structured
from rotbits_jax.coding import specs
from rotbits_jax.file import coders
from rotbits_jax.file import container
from rotbits_jax.relative import entries
from rotbits_jax.relative import products
from rotbits_jax.structured import difference
from rotbits_jax.structured import subspaces
from rotbits_jax.system import schema

UNTRUSTED = ArithmeticError, AttributeError, LookupError, TypeError
"""The errors, besides ValueError, of a leaf whose settings and arrays do not fit."""

FILES, HEADERS, COPIES = 'files/', 'headers/', 'copies/'
"""The prefixes of the streams of other files, of the headers of weights files, and of
files that are copied a piece at a time."""

MOST_FILES = 1 << 28
"""The greatest number of bytes of all other files before they are compressed."""

MOST_METADATA = 1 << 16
"""The greatest number of bytes of all keys and values of the metadata, in UTF-8."""

Metadata = Annotated[dict[str, str], msgspec.Meta(max_length=1024)]
"""Texts of the user by their names."""

Shape = tuple[int, ...]
_Setting = schema.Scalar | tuple[schema.Scalar, ...]


class Stream(schema.Row):
  """Length and CRC-32 of a stream."""

  nbytes: schema.Size
  crc32: schema.Crc32


class Deflated(Stream):
  """A stream of the format of zlib, with the number of bytes that it inflates to."""

  size: Annotated[int, schema.between(0, MOST_FILES)]


class Copied(Stream):
  """A stream of the format of zlib of any size, which memory never holds whole."""

  size: schema.Size


class Counts(schema.Row):
  """Numbers of elements and bytes."""

  elements: schema.Size
  bytes: schema.Size


class Leaf(schema.Object, kw_only=True):
  """A stored parameter."""

  path: str  # a `schema.Path`, which `Manifest.check` checks in all leaves at once
  shape: specs.Shape
  dtype: entries.Dtype
  type_name: str = ''
  stack_key: tuple[str, ...] = ()
  settings: dict[str, _Setting] = msgspec.field(default_factory=dict)
  arrays: tuple[str, ...] = ('',)
  needs: tuple[schema.Path, ...] = ()
  base: entries.BaseArray | None = None
  product: products.Product | None = None
  crc32: schema.Crc32 | None = None

  @property
  def leaf_class(self) -> type[structured.Structured] | None:
    """The class of the structured leaf; None for an array, or if it is unknown."""
    return structured.TYPES.get(self.type_name)

  def make(
    self, arrays: Sequence[np.ndarray], needed: Sequence[Shape]
  ) -> structured.Structured:
    """Makes the structured leaf from stored arrays, given the shapes of needed ones."""
    cls = structured.TYPES[self.type_name]
    try:
      leaf = cls.from_stored(self.settings, dict(zip(self.arrays, arrays, strict=True)))
      key = *structured.stack_key(leaf), leaf.needs
    except UNTRUSTED as error:
      raise ValueError(str(error)) from error
    fields = self.type_name, self.shape, self.dtype, self.stack_key, self.needs
    if key != fields:
      raise ValueError('the leaf differs from the manifest')
    if needed:
      leaf.check_needed(*needed)
    return leaf

  def is_expanded(self, integers: bool = False) -> bool:
    """Returns whether the reader puts the array in the place of the structured leaf."""
    multiples = structured.UniformlyQuantized.type_name
    is_multiples = self.type_name == multiples and 'row_exponents' not in self.arrays
    return self.crc32 is not None or (is_multiples and not integers)

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

  def check(self, arrays: Sequence[specs.ArraySpec]) -> None:
    """Checks the fields, and that arrays with these specs can store the leaf."""
    specs.check_shape(self.shape)
    sources = [x for x in (self.base, self.product, self.needs) if x]
    cls, nbytes = self.leaf_class, sum(x.nbytes for x in arrays)
    if not self.type_name:
      fields = self.stack_key, self.settings, self.crc32, sources
      array = [(x.shape, x.dtype) for x in arrays]
      stored = [(self.shape, entries.stored_dtype(self.dtype))]
      if (*fields, self.arrays) != ((), {}, None, [], ('',)) or array != stored:
        raise ValueError('the array and the coder differ in the shape or the dtype')
      return
    if cls is None:
      raise ValueError(f'unknown leaf type {self.type_name!r:.100}: import its module')
    is_known = issubclass(cls, difference.Difference)
    is_of_layer = models.names.layer_index(self.path) is not None
    if (
      len(set(self.arrays)) < len(self.arrays)
      or cls.is_in_files != (self.crc32 is not None)
      or (len(sources) != 1 if is_known else self.base or self.product)
      or (is_of_layer and self.needs and not is_known)  # a stack has no needs
    ):
      raise ValueError(f'the fields do not fit the leaf type {self.type_name!r}')
    # The config of the model bounds the sizes of a basis and of their products.
    if self.is_expanded() and cls is not subspaces.Basis:
      of_base = sum(math.prod(x.shape) for x in self.base_arrays)
      is_shortcut = self.product is not None and self.product.kind == 'shortcut'
      if not is_shortcut and entries.is_too_short(self.size, of_base, nbytes):
        raise ValueError(f'too few bytes stand for {self.size} elements')


class RecordEntry(schema.Object, kw_only=True):
  """A part of a model that decodes on its own."""

  name: str
  nbytes: schema.Size
  crc32: schema.Crc32
  leaves: tuple[Leaf, ...]
  coder: str = 'weights'
  spec: msgspec.Raw  # parsed when the record is read
  input: Counts
  savings: tuple[passes.Saving, ...] = ()
  empty: tuple[schema.Path, ...] = ()

  @property
  def paths(self) -> list[str]:
    """The paths of leaves and of empty dicts."""
    return [*(leaf.path for leaf in self.leaves), *self.empty]

  @property
  def needs_others(self) -> bool:
    """Whether leaves are computed from other parameters."""
    return any(leaf.needs for leaf in self.leaves)

  @functools.cached_property
  def stream_spec(self) -> specs.StreamSpec:
    """The description of the stream."""
    if self.coder not in coders.CODERS:
      raise ValueError(f'the coder {self.coder!r:.100} is not known')
    return schema.decode(coders.CODERS[self.coder].spec, bytes(self.spec))

  @functools.cached_property
  def leaf_specs(self) -> list[tuple[Leaf, list[specs.ArraySpec]]]:
    """Each leaf with the specs of its arrays."""
    arrays = iter(self.stream_spec.arrays)
    return [(leaf, [next(arrays) for _ in leaf.arrays]) for leaf in self.leaves]

  def check(self) -> None:
    """Checks that the stream can hold the leaves, before it is decoded."""
    with container.naming(self.name):
      spec = self.stream_spec
      total = self.nbytes, sum(len(leaf.arrays) for leaf in self.leaves)
      if total != (spec.nbytes, len(spec.arrays)):
        raise ValueError('the stream and the leaves differ in bytes or arrays')
      for leaf, arrays in self.leaf_specs:
        with container.naming(leaf.path):
          leaf.check(arrays)

  @property
  def memory_bytes(self) -> int:
    """The bytes of the decoded record, as it is stored or materialized."""
    stored = sum(array.nbytes for array in self.stream_spec.arrays)
    # A subspace becomes a basis by the inverse of a matrix, in six such matrices.
    inverses = sum(
      6 * 8 * (leaf.shape[0] - leaf.shape[1]) ** 2
      for leaf in self.leaves
      if leaf.leaf_class is subspaces.Basis and 'mask' in leaf.arrays
    )
    return max(stored, sum(leaf.nbytes for leaf in self.leaves)) + inverses

  def stack_key(self, integers: bool) -> tuple[Any, ...]:
    """Returns a key that layers share if they can be stacked, see `is_expanded`."""
    keys = []
    for leaf in self.leaves:
      type_name = '' if leaf.is_expanded(integers) else leaf.type_name
      array = leaf.shape, leaf.dtype, leaf.stack_key
      keys.append((leaf.path.removeprefix(self.name), type_name, *array))
    return tuple(sorted(keys))


class MessageEntry(schema.Object, kw_only=True):
  """A whole model as one message, see `paper`."""

  layout: paper.MessageLayout
  streams: dict[str, Stream]
  input: Counts
  savings: tuple[passes.Saving, ...]

  def __post_init__(self) -> None:
    if sorted(self.streams) != sorted(paper.STREAMS):
      raise ValueError(f'the streams must be {", ".join(paper.STREAMS)}')


def check_metadata(metadata: Any) -> dict[str, str]:
  """Returns metadata if a file can hold it; else raises a ValueError."""
  texts = schema.load(Metadata, metadata, 'metadata')
  try:
    size = sum(len(text.encode()) for pair in texts.items() for text in pair)
  except UnicodeEncodeError as error:
    raise ValueError(f'metadata: a text is not Unicode: {error}') from error
  if size > MOST_METADATA:
    raise ValueError(f'metadata: {size} bytes are more than {MOST_METADATA}')
  return texts


class Manifest(schema.Object, kw_only=True):
  """The description of a model in a file, or of one shard of it."""

  preset: str
  options: dict[str, _Setting | dict[str, schema.Scalar]]
  keeps: presets.Keeps
  config: models.ModelConfig | None = None
  stem: str | None = None
  records: tuple[RecordEntry, ...]
  message: MessageEntry | None = None
  files: dict[str, Deflated] = msgspec.field(default_factory=dict)
  headers: dict[str, Deflated] = msgspec.field(default_factory=dict)
  copies: dict[str, Copied] = msgspec.field(default_factory=dict)
  exclude: tuple[str, ...] = ()  # globs, see `checkpoints.Selection`
  excluded: tuple[str, ...] = ()  # the files that were left out by these
  missed: tuple[str, ...] = ()  # files of the folder that could not be stored
  dtypes: dict[str, entries.Dtype] = msgspec.field(default_factory=dict)
  metadata: Metadata = msgspec.field(default_factory=dict)

  @classmethod
  def of_files(cls, files: Sequence[container.StreamReader]) -> Self:
    """Reads and checks the manifest of a model, given its file or all its shards."""
    manifests = []
    for file in files:
      with container.naming(file.name), container.naming(container.MANIFEST):
        manifests.append(schema.decode(cls, file.manifest()))
    manifest = msgspec.structs.replace(
      manifests[-1],  # which has the files and the headers
      records=tuple(record for x in manifests for record in x.records),
    )
    with container.naming(files[0].name):
      is_tree = manifest.config is None and not manifest.headers
      for record in manifest.records if is_tree else ():
        if {path.partition('/')[0] for path in record.paths} != {record.name}:
          raise ValueError(f'{record.name}: a leaf of the record is not under its name')
      manifest.check()
      of_files = [x for file in files for x in file.sizes.items()]
      in_headers = sorted(x for x in of_files if x[0] != container.MANIFEST)
      if in_headers != (in_manifest := sorted(manifest.streams())):
        name, _ = min({*in_headers} ^ {*in_manifest}, default=in_headers[0])
        raise ValueError(f'{name}: the header and the manifest differ in this stream')
    return manifest

  def check(self) -> None:
    """Checks that records, other files and the config belong together."""
    check_metadata(self.metadata)
    names = [name for name, _ in self.streams()]
    paths = [path for record in self.records for path in record.paths]
    parents, levels = (every := set(paths)), 1
    if len(set(names)) < len(names) or len(every) < len(paths):
      raise ValueError('two streams or two leaves have the same name')
    if '//' in '/'.join(['', *paths, '']):
      raise ValueError('the path of a leaf has an empty key')
    while parents := {x.rpartition('/')[0] for x in parents} - {''}:
      levels += 1
      if (both := parents & every) or levels > 64:
        text = 'another leaf has a path that begins so, or a path has more than 64 keys'
        raise ValueError(f'{min(both or parents):.100}: {text}')
    if self.stem is not None and not checkpoints.is_relative_path(self.stem, levels=1):
      raise ValueError(f'{self.stem!r:.100} is not the name of a file')
    for others in (self.files, self.headers, self.copies):
      if wrong := [name for name in others if not checkpoints.is_relative_path(name)]:
        raise ValueError(f'{wrong[0]!r:.100} is not the name of a file in a folder')
      total = sum(stream.size for stream in others.values())
      if others is not self.copies and total > MOST_FILES:
        raise ValueError(f'the other files have more than {MOST_FILES} bytes')
    if self.headers and self.config is not None:
      raise ValueError('a model has no weights files of its own')
    if self.message is not None:
      records = [x for x in self.records if x.name != models.names.BUFFERS]
      if self.config is None or records:
        raise ValueError('a message is a whole model with its config, without records')
      self.message.layout.record_bytes(self.config)  # which checks the parameters
    for record in self.records:
      with container.naming(record.name):
        self._check_record(record)

  def _check_record(self, record: RecordEntry) -> None:
    """Checks that a record belongs to a model with the config, or to a tree."""
    name, config, leaves = record.name, self.config, record.leaves
    if config is None:
      if any(x.product or x.type_name == subspaces.Basis.type_name for x in leaves):
        raise ValueError('a product or a basis needs a config')
      return
    if record.empty:
      raise ValueError('a model has no empty dicts')
    models.check_shapes(config, name, {leaf.path: leaf.shape for leaf in leaves})
    is_basis = models.names.subspace_index(name) is not None
    for leaf in leaves:
      if (leaf.leaf_class is subspaces.Basis) != is_basis:
        raise ValueError(f'{leaf.path}: it is not the basis of a segment')
      if name == models.names.BUFFERS and leaf.type_name:
        raise ValueError('buffers are arrays')

  def streams(self) -> list[tuple[str, int]]:
    """Returns the name and the length of every stream but that of the manifest."""
    streams: list[Any] = [(record.name, record) for record in self.records]
    prefixed: Any = {FILES: self.files, HEADERS: self.headers, COPIES: self.copies}
    for prefix, others in prefixed.items():
      streams += [(f'{prefix}{name}', stream) for name, stream in others.items()]
    streams += self.message.streams.items() if self.message else ()
    return [(name, stream.nbytes) for name, stream in streams]

  def to_bytes(self) -> bytes:
    """Serialises the manifest; a ValueError says that readers would refuse it."""
    value = schema.dump(self)
    data = json.dumps(value, separators=(',', ':'), allow_nan=False).encode()
    manifest = schema.decode(Manifest, data)
    manifest.check()
    for record in manifest.records:
      record.check()
    return data
