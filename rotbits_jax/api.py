"""The functions of a session: encode, decode, load, verify.

Functions that read a file take its path, its bytes, or an open binary file as `source`.
`decode` and `load` hold the whole model in memory; `encode_to_file` and `verify` hold a
few layers. `encode` describes shared arguments; `progress` is shown on stderr.

Raises:
  ContainerError: if a file is not of this format or is damaged, or if its base is
    missing or another one.
  CheckpointError: if a checkpoint cannot be read.
  ValueError: if arguments do not suit each other or the source.
  OSError: if a path cannot be read or written.
"""

import os
from typing import Any, Literal, TypeAlias

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

Path: TypeAlias = str | os.PathLike[str]

Tree: TypeAlias = dict[str, Any]
"""Arrays and structured leaves in nested dicts."""

Encodable: TypeAlias = Any
"""A model, a checkpoint that is loaded or opened, its path, or a PyTree of arrays."""

Base: TypeAlias = Encodable | bytes | file.Reader | list[Any]
"""An `Encodable`; an encoded file; or a list of an encoded file, the base that it
needs, the base of that, and so on."""

PresetName: TypeAlias = Literal['exact', 'free', 'near', 'paper']


@host.own_settings()
def encode(
  source: Encodable,
  *,
  preset: PresetName | presets.Preset | None = None,
  base: Base | None = None,
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
  """
  return _encoder(source, base, preset, **options).in_memory(progress=progress)


@host.own_settings()
def encode_to_file(
  source: Encodable,
  path: Path,
  *,
  preset: PresetName | presets.Preset | None = None,
  base: Base | None = None,
  shard_size: int | None = None,
  target_size: int | None = None,
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
    path: path of the file, or of the folder of shards with their index.
    shard_size: greatest size of the records of a shard before they are coded, in bytes;
      a larger record has a shard to itself. None for one file.
    target_size: a bound on the bytes of the output, for which the option `step` of
      'near' is searched. The output has at least 99% of them, if steps between exist.
    overwrite: whether an existing output may be replaced. No file of an input is.
    check: whether to decode the output and compare it with the source before it gets
      its name: a checkpoint as in `verify`, others if the preset keeps bits.
  """

  def write(accepted: range | None = None, **settings: float) -> int:
    encoder = _encoder(source, base, preset, **options, **settings)
    plan = output.Plan(encoder, path, shard_size, overwrite=overwrite)
    return plan.write(check=check, progress=progress, accepted=accepted)

  if target_size is None:
    write()
    return
  if preset != 'near' or 'step' in options:
    raise ValueError("target_size finds the step of preset='near'")
  if jax.process_index() == 0:
    write_at = lambda step, accepted: write(accepted, step=step)
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

  The arguments are those of `encode_to_file`; see `examples/encode_on_ray.py`.
  """
  encoder = _encoder(source, base, **arguments)
  return output.Plan(encoder, path, shard_size, overwrite=overwrite)


@host.own_settings()
def decode(
  source: file.Readable,
  *,
  like: Any = None,
  base: Base | None = None,
  progress: bool = False,
) -> Any:
  """Returns the model or the PyTree in a file, as NumPy arrays.

  >>> data = rotbits_jax.encode({'layers': [np.zeros(3), np.ones(2)]})
  >>> rotbits_jax.decode(data)
  {'layers': {'0': array([0., 0., 0.]), '1': array([1., 1.])}}
  >>> rotbits_jax.decode(data, like={'layers': [np.zeros(3), np.zeros(2)]})
  {'layers': [array([0., 0., 0.]), array([1., 1.])]}

  The structured leaves of a `Model` stay structured. Without `like`, a PyTree comes as
  nested dicts, whose keys are those of dicts, indices and names of fields; plain
  tensors come as a dict by name.

  Args:
    like: a PyTree whose structure the PyTree in the file gets: lists, tuples, Optax
      states. Its arrays, or `jax.ShapeDtypeStruct`s, have the shapes and dtypes of the
      file; where one is a JAX array, the decoded one is, too, with its sharding if that
      is committed. A leaf of integers, see `load`, becomes its array.
  """
  content = file.Reader(source, base=base).content(show_progress=progress)
  if like is None:
    return content
  if isinstance(content, models.Model):
    raise ValueError('the file holds a model, which has a structure: leave out `like`')
  tree = sources.unflatten_like(like, content)
  is_leaf = structured.is_structured
  return jax.tree.map(placement.placed_like, like, tree, is_leaf=is_leaf)


@host.own_settings()
def load(
  source: file.Readable,
  *,
  base: Base | None = None,
  layers: range | None = None,
  sharding: file.Place | None = None,
  dtype: DTypeLike | None = None,
  integers: bool = False,
  progress: bool = False,
) -> models.Model | Tree:
  """Loads the content of a file as JAX arrays, see `decode`.

  Arrays of 64-bit elements stay NumPy arrays, because JAX would narrow them; with
  `sharding` they keep these bits on the devices.

  >>> rotbits_jax.load(rotbits_jax.encode({'w': np.ones(2)}))['w'].tolist()
  [1.0, 1.0]

  Args:
    layers: the layers to load; all by default. Other layers are not read.
    sharding: a `jax.sharding.Sharding` for all arrays, or a function that takes the
      path and the shape of a parameter, such as 'layers.0:12/mlp/up/kernel' of stacked
      layers, and returns one. An axis that an axis of a mesh does not divide is whole.
    dtype: dtype for all floating-point elements, rounded to nearest; None for the dtype
      of each array in the file, which is float32 if `near` has rounded it.
    integers: whether a matrix that `near` has rounded stays a
      `structured.UniformlyQuantized`, in half of the memory of float32.
  """
  wanted = None if dtype is None else structured.floating(dtype)
  content = file.Reader(source, base=base).content(
    layers=layers, integers=integers, as_model=True, show_progress=progress
  )
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
  source: file.Readable, *, base: Base | None = None, progress: bool = False
) -> checkpoints.Checkpoint:
  """Decodes the model of a file as a checkpoint, with its other files; see `decode`."""
  reader = file.Reader(source, base=base)
  model = reader.content(as_model=True, show_progress=progress)
  if not isinstance(model, models.Model):
    raise file.ContainerError('the file holds no model of a known family')
  return checkpoints.Checkpoint(model, reader.files(), reader.manifest.stem)


@host.own_settings()
def read_record(source: file.Readable, name: str, *, base: Base | None = None) -> Tree:
  """Reads one record, such as a layer, without the others; see `file.Reader.read`.

  >>> data = rotbits_jax.encode({'w': np.ones(2), 'b': np.zeros(2)})
  >>> rotbits_jax.read_record(data, 'w')
  {'w': array([1., 1.])}
  """
  return file.Reader(source, base=base).read(name)


@host.own_settings()
def read_tensor(source: file.Readable, path: str, *, base: Base | None = None) -> Any:
  """Reads one parameter, such as 'layers.3/mlp/up/kernel', and those it needs."""
  return file.Reader(source, base=base).tensor(path)


def inspect(source: file.Readable) -> report.Report:
  """Reports the content of a file and the savings of each step, without decoding.

  >>> report = rotbits_jax.inspect(rotbits_jax.encode({'w': np.ones((64, 64))}))
  >>> report.preset, report.input_bytes
  ('exact', 32768)
  """
  return report.from_reader(file.Reader(source))


@host.own_settings()
def verify(
  source: file.Readable,
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
    `missed` has the weights files in it that the file does not store.

  Raises:
    ContainerError: if the file is damaged, or differs; the message has the first
      tensor and both values.
    ValueError: if the file and `against` hold different things, such as a model and a
      PyTree.
  """
  reader = file.Reader(source, base=base)
  return verification.verify(reader, against, tokens=tokens, progress=progress)


def _encoder(
  source: Encodable,
  base: Base | None,
  preset: PresetName | presets.Preset | None = None,
  **options: Any,
) -> encode_lib.Encoder:
  """Returns the encoder of a source, or of the checkpoint at a path."""
  opened: Any = sources.of(source)
  default = presets.default(opened.config) if base is None else 'exact'
  made = presets.make(preset or default, **options)
  as_plain = opened
  is_reader = isinstance(opened, checkpoints.CheckpointReader)
  if made.keeps == 'bits' and is_reader and opened.headers and not opened.config.sliced:
    as_plain = checkpoints.open_plain(opened.path)  # files come back byte for byte
  is_plain = as_plain.config is None
  opened_base = None if base is None else reader_lib.open_base(base, plain=is_plain)
  if opened_base is None or opened_base.config is None:
    opened = as_plain
  content = source if isinstance(source, checkpoints.Checkpoint) else opened
  files, stem = getattr(content, 'files', {}), getattr(content, 'stem', None)
  if isinstance(opened, models.Model):
    files = checkpoints.with_own_head(dict(files), opened.config)
  return encode_lib.Encoder(opened, made, base=opened_base, files=files, stem=stem)
