"""The functions of a session: encode, open, decode, load, verify.

Functions that read a file take its path, its bytes, an open binary file, or a reader
that `open` returned, with its base, as `source`. `decode` and `load` hold the whole
model in memory; `encode_to_file` and `verify` hold a few layers. `encode` describes
shared arguments; `progress` is shown on stderr. While a function runs, the process has
the settings of `system.host.own_settings`.

Raises:
  ContainerError: if a file is not of this format or is damaged, or if its base is
    missing or another one.
  CheckpointError: if a checkpoint cannot be read.
  ValueError: if arguments do not suit each other or the source.
  OSError: if a path cannot be read or written.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, overload

import jax
import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import estimate
from rotbits_jax.file import output
from rotbits_jax.file import placement
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import report
from rotbits_jax.file import sources
from rotbits_jax.file import verification
from rotbits_jax.system import host
from rotbits_jax.system import outputs

Path: TypeAlias = str | os.PathLike[str]

Tree: TypeAlias = dict[str, Any]
"""Arrays and structured leaves in nested dicts."""


class Dataclass(Protocol):
  """A dataclass, also one of Flax or Equinox, as a container of arrays."""

  __dataclass_fields__: ClassVar[dict[str, Any]]


class Node(Protocol):
  """A container with the methods of `jax.tree_util.register_pytree_node_class`."""

  def tree_flatten(self) -> Any: ...


PyTree: TypeAlias = (
  Iterable[Any]
  | Dataclass
  | Node
  | structured.Structured
  | np.ndarray
  | np.generic
  | jax.Array
  | complex  # for type checkers only: `optax.OptState` may be one
)
"""Arrays in any containers that JAX knows, or one array."""

Encodable: TypeAlias = (
  models.Model
  | checkpoints.Checkpoint
  | checkpoints.CheckpointReader
  | checkpoints.PlainFiles
  | Path
  | PyTree
)
"""A model, a checkpoint that is loaded or opened, its path, or a PyTree of arrays."""

Base: TypeAlias = Encodable | file.Encoded | Sequence[Encodable | file.Encoded]
"""An `Encodable`; an encoded file; or a list of an encoded file, the base that it
needs, the base of that, and so on."""

PresetName: TypeAlias = Literal['exact', 'free', 'near', 'paper']
"""The names of the presets of this package; `presets.PRESETS` may get others."""


@host.own_settings()
def encode(
  source: Encodable,
  *,
  preset: presets.Preset | PresetName | str | None = None,
  base: Base | None = None,
  exclude: Sequence[str] = (),
  all_files: bool = False,
  metadata: Mapping[str, str] | None = None,
  progress: bool = False,
  **options: Any,
) -> bytes:
  """Encodes a model, or any PyTree of arrays, as the bytes of a file.

  >>> data = rotbits_jax.encode({'weights': np.ones((64, 64), np.float16)})
  >>> rotbits_jax.decode(data)['weights'].shape
  (64, 64)

  Args:
    source: a `Model`; a checkpoint (opened, loaded, or its path), whose other files are
      kept whole; or any PyTree of arrays, which come back in the machine's byte order.
      A model with `stored_as` is rounded at the end. 'exact' stores a dense checkpoint
      of safetensors files as plain tensors, so these files come back byte for byte.
    preset: the name of a factory in `presets`, which gets the options, or a preset that
      it made. The default is 'free' for a sliced model and 'exact' for everything else.
    base: a model or PyTree that differs little, such as the base of a fine-tune. Only
      the differences from its arrays are stored, and decoding needs it, too. The preset
      is then 'exact', the default; or 'free', for a sliced model whose base is its
      dense model: then the subspaces that slicing kept are stored.
    exclude: for the path of a folder, globs of files that are left out, such as
      '*.onnx' or 'logs/'; the file records which ones were.
    all_files: for the path of a folder, whether to keep weights in formats that are
      not read, and files of any size, byte for byte.
    metadata: texts to keep in the file by their names, at most 64 KiB, as in
      safetensors files; `open(...).metadata` and `inspect` give them back.
    progress: whether to show progress on stderr.
    **options: the options of the preset, such as `step` of 'near'.

  Returns:
    The bytes of the file.

  Raises:
    CheckpointError: if the checkpoint cannot be read, or the preset needs a model of a
      known family.
    ValueError: if the source is no PyTree of arrays (the error names the path), or the
      options, the base or the metadata do not suit it.
    OSError: if a path cannot be read.
  """
  encoder = _encoder(
    source,
    base,
    preset,
    exclude=exclude,
    all_files=all_files,
    metadata=metadata,
    **options,
  )
  return encoder.in_memory(progress=progress)


@host.own_settings()
def encode_to_file(
  source: Encodable,
  path: Path,
  *,
  preset: presets.Preset | PresetName | str | None = None,
  base: Base | None = None,
  shard_size: int | None = None,
  target_size: int | None = None,
  exclude: Sequence[str] = (),
  all_files: bool = False,
  metadata: Mapping[str, str] | None = None,
  overwrite: bool = False,
  check: bool = False,
  progress: bool = False,
  **options: Any,
) -> None:
  """Encodes a checkpoint to a file, or to shards, a few layers at a time.

  The file, or the folder of shards, appears when it is complete. A run that was killed
  finds the whole shards of an earlier one with the same source and settings. Process i
  of n of `jax.distributed` writes every n-th shard; the first searches a `target_size`.

  Args:
    source: see `encode`, also for `preset`, `base`, `metadata`, `progress` and options.
    path: path of the file, or of the folder of shards with their index.
    preset: see `encode`.
    base: see `encode`.
    shard_size: greatest size of the records of a shard before they are coded, in bytes;
      a larger record has a shard to itself. None for one file.
    target_size: a bound on the bytes of the output, for which the option `step` of
      'near' is searched. The output has at least 99% of them, if steps between exist.
    exclude: see `encode`.
    all_files: see `encode`.
    metadata: see `encode`. Of shards, the last one has it.
    overwrite: whether an existing output may be replaced. No file of an input is.
    check: whether to decode the output and compare it with the source before it gets
      its name: a checkpoint as in `verify`, others if the preset keeps bits. A folder
      with files that would not be stored is refused before the work.
    progress: whether to show progress on stderr.
    **options: the options of the preset.

  Raises:
    CheckpointError: see `encode`.
    ContainerError: if `check` finds a difference.
    ValueError: see `encode`; or if the output exists, or is a file of an input.
    OSError: if a path cannot be read or written.
  """

  def write(accepted: range | None = None, **settings: float) -> int:
    encoder = _encoder(
      source,
      base,
      preset,
      exclude=exclude,
      all_files=all_files,
      metadata=metadata,
      **options,
      **settings,
    )
    if check and encoder.missed:
      raise ValueError(verification.not_stored(source, encoder.missed))
    plan = output.Plan(encoder, path, shard_size, overwrite=overwrite)
    return plan.write(check=check, progress=progress, accepted=accepted)

  if target_size is None:
    write()
    return
  if preset != 'near' or 'step' in options:
    raise ValueError("target_size finds the step of preset='near'")
  if jax.process_index() == 0:
    write_at = lambda step, accepted: write(accepted, step=step)
    with outputs.reserved(path):
      estimate.write_within(target_size, write_at)


@host.own_settings()
def plan_shards(
  source: Encodable,
  path: Path,
  *,
  shard_size: int,
  base: Base | None = None,
  overwrite: bool = False,
  **arguments: Any,
) -> output.Plan:
  """Plans a folder of shards, see `file.output.Plan`; the same plan in each process.

  See `examples/encode_on_ray.py`.

  Args:
    source: see `encode`.
    path: path of the folder of shards.
    shard_size: see `encode_to_file`.
    base: see `encode`.
    overwrite: whether existing shards may be replaced.
    **arguments: `preset`, `exclude`, `all_files`, `metadata` and the options of the
      preset, see `encode`.

  Returns:
    The plan, whose shards any process encodes.

  Raises:
    ValueError: see `encode_to_file`; the other errors are those, too.
  """
  encoder = _encoder(source, base, **arguments)
  return output.Plan(encoder, path, shard_size, overwrite=overwrite)


def open(source: file.Encoded, *, base: Base | None = None) -> file.Reader:
  """Opens a file, whose tensors are read one at a time, as `safetensors.safe_open`.

  >>> data = rotbits_jax.encode({'w': np.ones(2)}, metadata={'step': '1000'})
  >>> with rotbits_jax.open(data) as reader:
  ...   reader.keys(), reader.tensor('w'), reader.metadata
  (['w'], array([1., 1.]), {'step': '1000'})

  Args:
    source: the path of a file or of a folder of shards, bytes, or an open binary file.
    base: the base of the file, if it needs one. Reading without it is an error.

  Returns:
    A reader, also a context manager: `keys()` are the names of the tensors, `tensor`
    reads one, `record` one record, such as a layer, and `metadata` has the texts that
    the encoder got. Only the manifest is read at first. The other functions of this
    package that read files take a reader, too.

  Raises:
    ContainerError: if the file is damaged, or its base is another one.
    OSError: if it cannot be read.
  """
  with host.own_settings():
    return reader_lib.opened(source, base)


@host.own_settings()
def decode(
  source: file.Encoded,
  *,
  like: Any = None,
  base: Base | None = None,
  progress: bool = False,
) -> Any:
  """Returns the model or the PyTree in a file, as NumPy arrays; see also `load`.

  >>> data = rotbits_jax.encode({'layers': [np.zeros(3), np.ones(2)]})
  >>> rotbits_jax.decode(data)
  {'layers': {'0': array([0., 0., 0.]), '1': array([1., 1.])}}
  >>> rotbits_jax.decode(data, like={'layers': [np.zeros(3), np.zeros(2)]})
  {'layers': [array([0., 0., 0.]), array([1., 1.])]}

  The structured leaves of a `Model` stay structured. Without `like`, a PyTree comes as
  nested dicts, whose keys are those of dicts, indices and names of fields; plain
  tensors come as a dict by name.

  Args:
    source: the file.
    like: a PyTree whose structure the PyTree in the file gets: lists, tuples, Optax
      states. Its arrays, or `jax.ShapeDtypeStruct`s, have the shapes and dtypes of the
      file; where one is a JAX array, or names a sharding, the decoded one is a JAX
      array, too, with its sharding if that is committed. A leaf of integers, see
      `load`, becomes its array.
    base: see `open`.
    progress: whether to show progress on stderr.

  Returns:
    A `Model`, or a PyTree with the structure of `like`, or nested dicts.

  Raises:
    ContainerError: if the file is damaged, or its base is missing or another one.
    ValueError: if the file does not hold what `like` has; it names the path.
    OSError: if the file cannot be read.
  """
  content = reader_lib.opened(source, base).content(show_progress=progress)
  return content if like is None else placement.restored(like, content)


@overload
def load(
  source: file.Encoded,
  *,
  like: None = None,
  base: Base | None = None,
  layers: range | None = None,
  sharding: file.Place | None = None,
  dtype: DTypeLike | None = None,
  integers: bool = False,
  progress: bool = False,
) -> models.Model | Tree: ...


@overload
def load(
  source: file.Encoded,
  *,
  like: Any,
  base: Base | None = None,
  dtype: DTypeLike | None = None,
  progress: bool = False,
) -> Any: ...


@host.own_settings()
def load(
  source: file.Encoded,
  *,
  like: Any = None,
  base: Base | None = None,
  layers: range | None = None,
  sharding: file.Place | None = None,
  dtype: DTypeLike | None = None,
  integers: bool = False,
  progress: bool = False,
) -> Any:
  """Returns the model or the PyTree in a file, as JAX arrays; see also `decode`.

  Arrays of 64-bit elements stay NumPy arrays, because JAX would narrow them; with
  `sharding` they keep these bits on the devices.

  >>> rotbits_jax.load(rotbits_jax.encode({'w': np.ones(2)}))['w'].tolist()
  [1.0, 1.0]

  Args:
    source: the file.
    like: a PyTree, as in `decode`, or a `Model`: the result has its structure and the
      shardings of its JAX arrays and `jax.ShapeDtypeStruct`s; others are placed as
      JAX does by default. It excludes `layers`, `sharding` and `integers`.
    base: see `open`.
    layers: the layers to load; all by default. Other layers are not read.
    sharding: a `jax.sharding.Sharding` for all arrays, or a function that takes the
      path and the shape of a parameter, such as 'layers.0:12/mlp/up/kernel' of stacked
      layers, and returns one. An axis that an axis of a mesh does not divide is whole.
    dtype: dtype for all floating-point elements, rounded to nearest; None for the dtype
      of each array in the file, which is float32 if `near` has rounded it.
    integers: whether a matrix that `near` has rounded stays a
      `structured.UniformlyQuantized`, in half of the memory of float32.
    progress: whether to show progress on stderr.

  Returns:
    A `Model`, or a PyTree with the structure of `like`, or nested dicts.

  Raises:
    ContainerError: if the file is damaged, or its base is missing or another one.
    ValueError: if arguments exclude each other, or the file does not hold what `like`
      has; it names the path.
    OSError: if the file cannot be read.
  """
  wanted = None if dtype is None else structured.floating(dtype)
  if like is not None and (layers is not None or sharding is not None or integers):
    raise ValueError('`like` excludes layers, sharding and integers')
  reader = reader_lib.opened(source, base)
  as_model = like is None or isinstance(like, models.Model)
  content: Any = reader.content(
    layers=layers, integers=integers, as_model=as_model, show_progress=progress
  )
  if like is not None:
    if wanted is not None:
      content = structured.astype(content, wanted)
    return placement.on_device(placement.restored(like, content))
  if isinstance(content, models.Model) and sharding is not None:
    content = content.replace(params=placement.placed(content.params, sharding))
  elif sharding is not None:
    content = placement.placed(content, sharding)
  if wanted is not None:
    with jax.enable_x64(True):  # see `placement.put`
      content = structured.astype(content, wanted)
  return placement.on_device(content)


@host.own_settings()
def decode_checkpoint(
  source: file.Encoded, *, base: Base | None = None, progress: bool = False
) -> checkpoints.Checkpoint:
  """Decodes the model of a file as a checkpoint, with its other files; see `decode`.

  Args:
    source: the file.
    base: see `open`.
    progress: whether to show progress on stderr.

  Returns:
    The model, as NumPy arrays, and the files beside its weights.

  Raises:
    ContainerError: if the file holds no model of a known family, is damaged, or its
      base is missing or another one.
  """
  reader = reader_lib.opened(source, base)
  model = reader.content(as_model=True, show_progress=progress)
  if not isinstance(model, models.Model):
    raise file.ContainerError('the file holds no model of a known family')
  return checkpoints.Checkpoint(model, reader.files(), reader.manifest.stem)


@host.own_settings()
def read_record(source: file.Encoded, name: str, *, base: Base | None = None) -> Tree:
  """Reads one record, such as a layer, without the others, as NumPy arrays.

  >>> data = rotbits_jax.encode({'w': np.ones(2), 'b': np.zeros(2)})
  >>> rotbits_jax.read_record(data, 'w')
  {'w': array([1., 1.])}

  Args:
    source: the file.
    name: see `file.Reader.read`.
    base: see `open`.

  Returns:
    The parameters in nested dicts, of which the first key is the name.

  Raises:
    ContainerError: if there is no such record, or the file is damaged.
  """
  return reader_lib.opened(source, base).read(name)


@host.own_settings()
def read_tensor(source: file.Encoded, path: str, *, base: Base | None = None) -> Any:
  """Reads one parameter as a NumPy array, and others only if it needs them.

  Args:
    source: the file.
    path: name of the tensor, such as 'layers.3/mlp/up/kernel'; `open(...).keys()` has
      all of them.
    base: see `open`.

  Returns:
    The array, or the structured leaf of a `Model`.

  Raises:
    ContainerError: if there is no such parameter, or the file is damaged.
  """
  return reader_lib.opened(source, base).tensor(path)


def inspect(source: file.Encoded) -> report.Report:
  """Reports the content of a file and the savings of each step, without decoding.

  >>> report = rotbits_jax.inspect(rotbits_jax.encode({'w': np.ones((64, 64))}))
  >>> report.preset, report.input_bytes
  ('exact', 32768)
  """
  return report.from_reader(reader_lib.opened(source))


@host.own_settings()
def verify(
  source: file.Encoded,
  *,
  against: Base | None = None,
  tokens: np.ndarray | None = None,
  base: Base | None = None,
  progress: bool = False,
) -> verification.Verification:
  """Decodes everything in a file, and compares it with what it should hold.

  If the preset keeps all bits, they are compared, one record at a time. Plain tensors
  and arrays of a PyTree that `near` has rounded are compared element by element: each
  must be within the error that the stored step of its array allows. Of models that were
  rewritten, memory holds both. The divergence of the predictions for random tokens, and
  the errors of each tensor's canonical form, must be at most a few times the noise
  floor, which random rotations and rounding make: to the dtype, or to the steps of
  `near`. Presets of others that keep an approximation are measured only, and refused if
  the divergence is one of other models.

  >>> tree = {'w': np.ones((64, 64), np.float32)}
  >>> rotbits_jax.verify(rotbits_jax.encode(tree), against=tree).ways['bits'].tensors
  1

  Args:
    against: the path of a checkpoint, or an opened one; the path, the bytes or a
      `file.Reader` (with its base) of another encoded file; a `Model`; a `Checkpoint`;
      or a PyTree of arrays, for a file of a PyTree or of plain tensors by name. Without
      it, nothing is compared, and checksums tell whether the file is undamaged.
    tokens: the tokens `[N]` of the text that a bound of `near` was measured on. The
      figures in the file are measured again.

  Returns:
    What was decoded and how it was compared. If `against` is the path of a folder,
    `missed` has the files in it that the file does not store.

  Raises:
    ContainerError: if the file is damaged, or differs; the message has the first
      tensor and both values.
    ValueError: if the file and `against` hold different things, such as a model and a
      PyTree.
  """
  reader = reader_lib.opened(source, base)
  return verification.verify(reader, against, tokens=tokens, progress=progress)


def _encoder(
  source: Encodable,
  base: Base | None,
  preset: presets.Preset | PresetName | str | None = None,
  *,
  exclude: Sequence[str] = (),
  all_files: bool = False,
  metadata: Mapping[str, str] | None = None,
  **options: Any,
) -> encode_lib.Encoder:
  """Returns the encoder of a source, or of the checkpoint at a path."""
  if isinstance(exclude, str):
    raise ValueError(f'exclude must be a list of globs, got {exclude!r}')
  selection = checkpoints.Selection(exclude=tuple(exclude), all_files=all_files)
  opened: Any = sources.of(source, selection)
  default = presets.default(opened.config) if base is None else 'exact'
  made = presets.make(preset or default, **options)
  as_plain = opened
  is_reader = isinstance(opened, checkpoints.CheckpointReader)
  if made.keeps == 'bits' and is_reader and opened.headers and not opened.config.sliced:
    # Files come back byte for byte.
    as_plain = checkpoints.open_plain(opened.given, opened.selection)
  is_plain = as_plain.config is None
  opened_base = None if base is None else reader_lib.open_base(base, plain=is_plain)
  if opened_base is None or opened_base.config is None:
    opened = as_plain
  content = source if isinstance(source, checkpoints.Checkpoint) else opened
  files = getattr(content, 'files', {})
  stem = getattr(content, 'stem', None)
  if isinstance(opened, models.Model):
    files = checkpoints.with_own_head(dict(files), opened.config)
  return encode_lib.Encoder(
    opened, made, base=opened_base, files=files, stem=stem, metadata=metadata
  )
