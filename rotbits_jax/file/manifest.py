"""The manifest: describes the content of a file, and is validated when it is read.

A file is a list of *units*, which decode on their own. Each layer is a unit. The
parameters outside the layers form a unit for each first key of their paths ('embed',
'head', ...). A unit is one stream of the container. It consists of *leaves*, which are
arrays or structured leaves (see `structured`). A leaf is stored as one or more arrays.

The preset `paper` stores one message for the whole model in place of units, see
`Message`. A checkpoint of an unknown family is stored as units of plain tensors, and a
`WeightsFile` says how its weights files are made of them.
"""

import dataclasses
import json
import math
from typing import Any, Self

import ml_dtypes
import numpy as np

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import container
from rotbits_jax.file import fields

ContainerError = container.ContainerError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """A stored parameter.

  Attributes:
    path: path of the parameter within the unit.
    kind: kind of the structured leaf; empty for an array.
    shape: shape of the array that the leaf stands for.
    dtype: dtype of that array.
    names: see `structured.Structured.stack_key`.
    settings: settings of the structured leaf.
    arrays: names of the arrays as which the leaf is stored; one empty name for an
      array.
    expanded: CRC-32 of the array that the leaf stands for, if the reader replaces the
      leaf by that array (`structured.Dependent.eager` or `structured.Packed`); else
      None.
  """

  path: str
  kind: str
  shape: tuple[int, ...]
  dtype: str
  names: tuple[str, ...]
  settings: dict[str, Any]
  arrays: tuple[str, ...]
  expanded: int | None = None

  @property
  def is_packed(self) -> bool:
    """Whether the leaf stands for a plain array that the reader puts in its place."""
    return issubclass(structured.KINDS.get(self.kind, object), structured.Packed)

  @property
  def is_factored(self) -> bool:
    """Whether the leaf is a pair of factors, which have names in a checkpoint."""
    return issubclass(structured.KINDS.get(self.kind, object), structured.FactorPair)

  @property
  def is_array(self) -> bool:
    """Whether the parameter is an array for those who read the file."""
    return not self.kind or self.is_packed

  @property
  def nbytes(self) -> int:
    """The bytes of the array that the leaf stands for."""
    stored = weights.DTYPES[stored_dtype(self.dtype)]
    return math.prod(self.shape) * stored.itemsize

  def stack_key(self) -> tuple[Any, ...]:
    """Returns the entry for this leaf in `models.stack_key`."""
    kind = '' if self.is_array else self.kind
    return self.path, kind, self.shape, self.dtype, self.names

  def to_json(self) -> dict[str, Any]:
    plain = {'path': self.path, 'shape': list(self.shape), 'dtype': self.dtype}
    if not self.kind:
      return plain
    return plain | {
      'kind': self.kind,
      'names': list(self.names),
      'settings': self.settings,
      'arrays': list(self.arrays),
      'expanded': self.expanded,
    }

  @classmethod
  def from_json(cls, value: Any, where: str) -> Self:
    """Makes a leaf from a JSON value: the inverse of `to_json`.

    Args:
      value: the JSON value.
      where: name of the unit, for error messages.

    Raises:
      ContainerError: if the value is not a leaf.
    """
    given = fields.Fields(value, where)
    path = given.text('path')
    given = fields.Fields(value, where, path)
    given.take('path')
    if not _is_path(path):
      raise given.error('path', f'must be up to {_MOST_KEYS} keys joined by slashes')
    kind = given.text('kind') if given.optional('kind') else ''
    leaf = cls(
      path=path,
      kind=kind,
      shape=given.shape('shape'),
      dtype=given.text('dtype'),
      names=given.texts('names') if kind else (),
      settings=given.object('settings') if kind else {},
      arrays=given.texts('arrays') if kind else ('',),
      expanded=given.integer('expanded', 0xFFFFFFFF)
      if given.optional('expanded')
      else None,
    )
    given.finish()
    if stored_dtype(leaf.dtype) not in weights.DTYPES:
      raise given.error('dtype', f'cannot be {leaf.dtype!r}')
    if len(set(leaf.arrays)) != len(leaf.arrays):
      raise given.error('arrays', 'must be names that differ')
    return leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A part of a model that decodes on its own.

  Attributes:
    name: name of the unit and of its stream.
    nbytes: length of the stream.
    crc32: CRC-32 of the stream.
    leaves: the parameters.
    coder: spec of the coded arrays, which are in the order of the leaves.
    input_numbers: number of numbers of the unit before it was rewritten.
    input_bytes: number of bytes of these numbers.
    savings: what each transform saved.
    order_bits: bits that the order of the neurons saved.
    empty: paths of the dicts in the unit that are empty.
  """

  name: str
  nbytes: int
  crc32: int
  leaves: tuple[Leaf, ...]
  coder: weights.StreamSpec
  input_numbers: int
  input_bytes: int
  savings: tuple[passes.Saving, ...]
  order_bits: float
  empty: tuple[str, ...] = ()

  @property
  def decoded_bytes(self) -> int:
    """The bytes of the decoded unit, as it is stored or materialized."""
    stored = sum(array.nbytes for array in self.coder.arrays)
    return max(stored, sum(leaf.nbytes for leaf in self.leaves))

  def memory_bytes(self, integers: bool) -> int:
    """Returns these bytes; matrices on grids may be decoded to integers."""
    grids = self.grids() if integers else {}
    saved = [
      (grid.dtype.itemsize - grid.integer_dtype.itemsize) * math.prod(leaf.shape)
      for leaf in self.leaves
      if (grid := grids.get(leaf.path)) is not None
    ]
    return self.decoded_bytes - sum(saved)

  def first_keys(self) -> set[str]:
    """Returns the first key of the path of each leaf and each empty dict."""
    paths = [*(leaf.path for leaf in self.leaves), *self.empty]
    return {path.split('/')[0] for path in paths}

  def leaf_specs(self) -> list[tuple[Leaf, list[Any]]]:
    """Returns each leaf with the specs of its arrays."""
    specs = iter(self.coder.arrays)
    return [(leaf, [next(specs) for _ in leaf.arrays]) for leaf in self.leaves]

  def grids(self) -> dict[str, weights.Grid]:
    """Returns the grids of the plain matrices that are stored on one, by path."""
    return {
      leaf.path: grid
      for leaf, specs in self.leaf_specs()
      if not leaf.kind
      and len(leaf.shape) > 1
      and (grid := self.coder.grid(specs[0])) is not None
    }

  def tree(self, flat: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts of these leaves by path, with the empty dicts."""
    empty: dict[str, Any] = {path: {} for path in self.empty}
    return structured.unflatten([*flat.items(), *empty.items()])

  def stack_key(self) -> tuple[Any, ...]:
    """Returns the value of `models.stack_key` for the unit, if it is a layer."""
    return tuple(sorted(leaf.stack_key() for leaf in self.leaves))

  def to_json(self) -> dict[str, Any]:
    return {
      'name': self.name,
      'nbytes': self.nbytes,
      'crc32': self.crc32,
      'leaves': [leaf.to_json() for leaf in self.leaves],
      'coder': self.coder.to_json(),
      'input': [self.input_numbers, self.input_bytes],
      'savings': [_saving_to_json(saving) for saving in self.savings],
      'order_bits': self.order_bits,
      **({'empty': list(self.empty)} if self.empty else {}),
    }

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """Makes a unit from a JSON value: the inverse of `to_json`.

    Raises:
      ContainerError: if the value is not a unit.
    """
    given = fields.Fields(value, 'a unit')
    name = given.text('name')
    given = fields.Fields(value, name)
    given.take('name')
    leaves = tuple(Leaf.from_json(leaf, name) for leaf in given.items('leaves'))
    try:
      coder = weights.StreamSpec.from_json(given.take('coder'))
    except ValueError as error:
      raise ContainerError(f'{name}: {error}') from error
    unit = cls(
      name=name,
      nbytes=given.integer('nbytes'),
      crc32=given.integer('crc32', 0xFFFFFFFF),
      leaves=leaves,
      coder=coder,
      savings=tuple(_saving_from_json(x, name) for x in given.items('savings')),
      order_bits=given.number('order_bits'),
      empty=given.texts('empty') if given.optional('empty') else (),
      **_input_sizes(given),
    )
    given.finish()
    if not all(map(_is_path, unit.empty)):
      raise given.error('empty', f'must be paths of up to {_MOST_KEYS} keys')
    if unit.nbytes != coder.nbytes:
      raise ContainerError(
        f'{name}: the coder needs a stream of {coder.nbytes} bytes, got {unit.nbytes}'
      )
    if sum(len(leaf.arrays) for leaf in unit.leaves) != len(coder.arrays):
      raise ContainerError(f'{name}: the leaves and the coder list different arrays')
    unit.tree({leaf.path: None for leaf in unit.leaves})
    for leaf, specs in unit.leaf_specs():
      array = (specs[0].shape, specs[0].dtype) if specs else None
      if not leaf.kind and array != (leaf.shape, stored_dtype(leaf.dtype)):
        raise ContainerError(
          f'{name}/{leaf.path}: the leaf and the coder differ in the shape or the dtype'
        )
      # The reader allocates the array before it has decoded the leaf.
      most = 8 * sum(spec.nbytes for spec in specs)
      if leaf.is_packed and not (
        leaf.dtype in structured.PACKED_DTYPES and math.prod(leaf.shape) <= most
      ):
        raise ContainerError(
          f'{name}/{leaf.path}: {most} bits cannot stand for {leaf.shape} numbers of '
          f'{leaf.dtype}'
        )
    return unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """A stream of plain bytes: a sidecar file of the checkpoint, or a part of a message.

  Attributes:
    name: name of the stream.
    nbytes: length of the stream.
    crc32: CRC-32 of the stream.
  """

  name: str
  nbytes: int
  crc32: int

  def to_json(self) -> list[Any]:
    return [self.name, self.nbytes, self.crc32]

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """Makes a stream from a JSON value: the inverse of `to_json`.

    Raises:
      ContainerError: if the value is not a stream.
    """
    if not isinstance(value, list) or len(value) != 3:
      raise ContainerError('the manifest is damaged: a stream must have three fields')
    given = fields.Fields(
      dict(zip(('name', 'nbytes', 'crc32'), value, strict=True)), ''
    )
    return cls(
      name=given.text('name'),
      nbytes=given.integer('nbytes'),
      crc32=given.integer('crc32', 0xFFFFFFFF),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """A whole model as one message of bits-back coding.

  Attributes:
    layout: the values that the decoder needs, see `rotbits_jax.paper`.
    streams: the parts of the message.
    input_numbers: number of numbers of the model.
    input_bytes: number of bytes of these numbers.
    savings: what the rotations saved.
  """

  layout: dict[str, Any]
  streams: tuple[Stream, ...]
  input_numbers: int
  input_bytes: int
  savings: tuple[passes.Saving, ...]

  def to_json(self) -> dict[str, Any]:
    return {
      'layout': self.layout,
      'streams': [stream.to_json() for stream in self.streams],
      'input': [self.input_numbers, self.input_bytes],
      'savings': [_saving_to_json(saving) for saving in self.savings],
    }

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """Makes a message from a JSON value: the inverse of `to_json`.

    Raises:
      ContainerError: if the value is not a message.
    """
    given = fields.Fields(value, 'message')
    message = cls(
      layout=given.object('layout'),
      streams=tuple(map(Stream.from_json, given.items('streams'))),
      savings=tuple(_saving_from_json(x, 'message') for x in given.items('savings')),
      **_input_sizes(given),
    )
    given.finish()
    if sorted(stream.name for stream in message.streams) != sorted(MESSAGE):
      raise given.error('streams', f'must be {", ".join(MESSAGE)}')
    return message


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsFile:
  """A weights file that is stored as tensors and the bytes between them.

  Attributes:
    layout: its name, its size, and where each tensor begins. The names of tensors are
      the paths of leaves.
    rest: the bytes between the tensors, joined, compressed by zlib.
  """

  layout: checkpoints.WeightsFile
  rest: Stream

  def to_json(self) -> dict[str, Any]:
    return {
      'name': self.layout.name,
      'nbytes': self.layout.nbytes,
      'places': [list(place) for place in self.layout.places],
      'rest': self.rest.to_json(),
    }

  @classmethod
  def from_json(cls, value: Any) -> Self:
    """Returns the inverse of `to_json`.

    Raises:
      ContainerError: if the value is not a weights file.
    """
    given = fields.Fields(value, 'a weights file')
    name = given.file_name('name')
    places = []
    for place in given.items('places'):
      if not isinstance(place, list) or len(place) != 2:
        raise given.error('places', 'must be a list of pairs')
      one = fields.Fields(dict(zip(('path', 'offset'), place, strict=True)), name)
      places.append((one.text('path'), one.integer('offset')))
    layout = checkpoints.WeightsFile(name, given.integer('nbytes'), tuple(places))
    found = cls(layout=layout, rest=Stream.from_json(given.take('rest')))
    given.finish()
    if found.rest.name != f'{REST}{name}':
      raise given.error('rest', f'must be the stream {REST}{name}')
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """The description of a file, or of one shard of a model.

  Attributes:
    preset: name of the preset.
    options: options of the preset.
    config: config of the model; None for plain arrays.
    stem: name of the weights and of the slicing JSON in a checkpoint of SliceGPT.
    units: the units in the file.
    message: the model as one message; None if the model is stored in units.
    files: the streams of the checkpoint's sidecar files, each compressed by zlib.
    sizes: length of each sidecar file before compression.
    weights: the weights files whose tensors are the units; empty for a model and for a
      PyTree.
  """

  preset: str
  options: dict[str, Any]
  config: models.ModelConfig | None
  stem: str | None
  units: tuple[Record, ...]
  message: Message | None
  files: tuple[Stream, ...]
  sizes: tuple[int, ...]
  weights: tuple[WeightsFile, ...] = ()

  def streams(self) -> dict[str, tuple[int, int]]:
    """Returns length and CRC-32 of every stream but that of the manifest, by name."""
    found = {unit.name: (unit.nbytes, unit.crc32) for unit in self.units}
    return found | {x.name: (x.nbytes, x.crc32) for x in self._plain_streams()}

  def _plain_streams(self) -> list[Stream]:
    """Returns the streams that are not those of units."""
    message = self.message.streams if self.message else ()
    return [*self.files, *message, *(file.rest for file in self.weights)]

  def to_bytes(self) -> bytes:
    """Serialises the manifest."""
    value = {
      'preset': self.preset,
      'options': self.options,
      'config': None if self.config is None else dataclasses.asdict(self.config),
      'stem': self.stem,
      'units': [unit.to_json() for unit in self.units],
      'message': self.message.to_json() if self.message else None,
      'files': [
        [*file.to_json(), size]
        for file, size in zip(self.files, self.sizes, strict=True)
      ],
    }
    if self.weights:
      value['weights'] = [file.to_json() for file in self.weights]
    return json.dumps(value, separators=(',', ':'), allow_nan=False).encode()

  @classmethod
  def from_bytes(cls, data: bytes) -> Self:
    """Makes a manifest from bytes: the inverse of `to_bytes`.

    Raises:
      ContainerError: if the bytes are not a manifest.
    """
    given = fields.Fields(container.parse_json(data, 'manifest'), 'manifest')
    config = None
    if given.optional('config'):
      try:
        config = models.ModelConfig.from_json(given.object('config'))
      except ValueError as error:
        raise ContainerError(f'config: {error}') from error
    files = given.items('files')
    if not all(isinstance(file, list) and len(file) == 4 for file in files):
      raise given.error('files', 'must be lists of four fields')
    manifest = cls(
      preset=given.text('preset'),
      options=given.object('options'),
      config=config,
      stem=given.file_name('stem') if given.optional('stem') else None,
      units=tuple(map(Record.from_json, given.items('units'))),
      message=Message.from_json(given.object('message'))
      if given.optional('message')
      else None,
      files=tuple(Stream.from_json(file[:3]) for file in files),
      sizes=tuple(
        fields.Fields({'size': f[3]}, 'files').integer('size', MOST_FILES)
        for f in files
      ),
      weights=tuple(map(WeightsFile.from_json, given.items('weights')))
      if given.optional('weights')
      else (),
    )
    given.finish()
    manifest._check()
    return manifest

  def _check(self) -> None:
    """Checks that the units belong to one model with this config.

    Raises:
      ContainerError: if they do not. The error names the unit or the parameter.
    """
    if len(self.streams()) != len(self.units) + len(self._plain_streams()):
      raise ContainerError('two streams have the same name')
    if self.weights and self.config is not None:
      raise ContainerError('a model has no weights files of its own')
    for stream in self.files:
      name = stream.name.removeprefix(FILES)
      if name == stream.name or not fields.is_file_name(name):
        raise ContainerError(f'{stream.name}: not the name of a file')
    if sum(self.sizes) > MOST_FILES:
      raise ContainerError(f'the other files have more than {MOST_FILES} bytes')
    if self.config is None:
      if self.message is not None:
        raise ContainerError('a message of bits-back coding needs a config')
      return
    for unit in self.units:
      if unit.empty:
        raise ContainerError(f'{unit.name}: a model has no empty dicts')
      is_layer = models.names.layer_index(unit.name) is not None
      if not is_layer and unit.first_keys() != {unit.name}:
        raise ContainerError(f'{unit.name}: it has a leaf of another unit')
      for leaf in unit.leaves:
        setting, field = _HEADS.get(leaf.kind, ('', ''))
        if field and leaf.settings.get(setting) != getattr(self.config, field):
          raise ContainerError(
            f'{unit.name}/{leaf.path}: the config and the setting {setting!r} disagree'
          )
        if leaf.is_factored and leaf.names not in _FACTORS:
          raise ContainerError(
            f'{unit.name}/{leaf.path}: its factors have no known names'
          )
      if unit.name == BUFFERS and any(
        not leaf.is_array or leaf.path.count('/') != 1 for leaf in unit.leaves
      ):
        raise ContainerError(f'{BUFFERS}: buffers are arrays by their names')
      expected = _expected(unit.name, self.config)
      found = {leaf.path: leaf.shape for leaf in unit.leaves}
      if expected is not None and found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        path, shape = wrong[0]
        raise ContainerError(
          f'{unit.name}/{path}: the unit does not fit the config, got {shape=}'
        )


FILES = 'files/'
"""The beginning of the names of the streams of other files."""

REST = 'rest/'
"""The beginning of the names of streams that hold the rest of a weights file."""

MESSAGE = ('message', 'corrections', 'tables')
"""The streams of a message of bits-back coding."""

DTYPE = 'dtype'
"""The option of `near` with the dtype of the checkpoint, whose file is float32."""

OTHER_DTYPES = 'other dtypes'
"""The option with the dtypes of the parameters that have another dtype, by path."""

MOST_FILES = 1 << 28
"""The greatest number of bytes of all other files before they are compressed."""

# The setting of a leaf of heads, and the field of the config that it must equal. The
# arrays of the leaf do not tell how many heads there are.
_HEADS = {
  'head_columns': ('heads', 'num_kv_heads'),
  'head_planes': ('head_dim', 'head_dim'),
  'head_rows': ('groups', 'num_kv_heads'),
}

_FACTORS = {(name,) for name in checkpoints.FACTORS}

_MOST_KEYS = 64  # keys of a path, because trees are walked recursively

BUFFERS = 'buffers'
"""The name of the unit of tensors that the forward pass does not use."""


def _is_path(path: str) -> bool:
  parts = path.split('/')
  return all(parts) and len(parts) <= _MOST_KEYS


def _expected(
  name: str, config: models.ModelConfig
) -> dict[str, tuple[int, ...]] | None:
  """Returns the shapes of a unit's parameters; None if any shapes are valid.

  Raises:
    ContainerError: if a model with this config has no such unit.
  """
  if name == BUFFERS:
    return None
  index = models.names.layer_index(name)
  if index is not None and index < config.num_layers:
    return structured.flatten(models.layer_shapes(config, index))
  outer = models.outer_shapes(config)
  if name not in outer:
    raise ContainerError(f'{name}: a model with this config has no such unit')
  return structured.flatten({name: outer[name]})


def _input_sizes(given: fields.Fields) -> dict[str, int]:
  sizes = given.items('input')
  names = ('input_numbers', 'input_bytes')
  if len(sizes) != 2:
    raise given.error('input', 'must be two integers')
  pair = fields.Fields(dict(zip(names, sizes, strict=True)), 'input')
  return {name: pair.integer(name) for name in names}


def _saving_to_json(saving: passes.Saving) -> list[Any]:
  return [saving.name, saving.numbers, saving.bytes, saving.notes]


def _saving_from_json(value: Any, where: str) -> passes.Saving:
  names = ('name', 'numbers', 'bytes', 'notes')
  if not isinstance(value, list) or len(value) != len(names):
    raise ContainerError(f'{where}: a saving must have four fields')
  given = fields.Fields(dict(zip(names, value, strict=True)), where)
  notes = given.items('notes')
  for note in notes:
    _check_note(note, where)
  return passes.Saving(
    given.text('name'), given.signed('numbers'), given.signed('bytes'), notes
  )


def _check_note(note: Any, where: str) -> None:
  """Checks the fields with which reports compute. Others may be any JSON values.

  Raises:
    ContainerError: if a field has a wrong value.
  """
  given = fields.Fields(note, where, 'notes')
  if 'tensor' in note:
    given.text('tensor')
  if 'shape' in note:
    given.shape('shape')
    given.signed('numbers')
  if type(note.get('error')) not in (int, float, type(None)):
    raise given.error('error', 'must be a number or null')


_STORED_AS = {'int2': 'int8', 'int4': 'int8'} | {
  name: 'uint8'
  for name in dir(ml_dtypes)
  if name.startswith(('uint2', 'uint4', 'float4_', 'float6_', 'float8_'))
}


def stored_dtype(dtype: str) -> str:
  """Returns the dtype of the array that stores a plain array.

  The coder models no floats of 8 bits or fewer and no integers of 4. It gets their bit
  patterns as NumPy keeps them, one a byte.
  """
  return _STORED_AS.get(dtype, dtype)


def leaf_of(path: str, leaf: Any, expanded: int | None = None) -> tuple[Leaf, Any]:
  """Makes the entry of a parameter.

  Args:
    path: path of the parameter within its unit.
    leaf: the parameter.
    expanded: see `Leaf.expanded`.

  Returns:
    The entry; and the arrays as which the parameter is stored, by name.
  """
  settings, arrays = {}, {'': leaf}
  if structured.is_structured(leaf):
    settings, arrays = leaf.stored()
  kind, shape, dtype, names = structured.stack_key(leaf)
  if not kind:
    arrays[''] = np.asarray(leaf).view(stored_dtype(dtype))
  entry = Leaf(
    path=path,
    kind=kind,
    shape=shape,
    dtype=dtype,
    names=names,
    settings=settings,
    arrays=tuple(arrays),
    expanded=expanded,
  )
  return entry, {name: np.asarray(array) for name, array in arrays.items()}
