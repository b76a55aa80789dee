"""Encoding of models to files, and decoding of files to models.

A unit is a part of a model that decodes on its own: the embedding, a layer, the head.
Encoding reads a few layers at a time from a source, rewrites them with the transform of
a preset, and appends their units to a file. Decoding reads the units of a file and
makes a model or a checkpoint from them.

Functions that read a file take its path, its bytes, or an open binary file. `encode`
and `decode` hold the whole model. `encode_to_file` and `decode_to_directory` hold a few
layers at a time.
"""

from collections.abc import Mapping, Sequence
import contextlib
import copy
import hashlib
import io
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from rotbits_jax import checkpoints
from rotbits_jax import file
from rotbits_jax import models
from rotbits_jax import outputs
from rotbits_jax import presets
from rotbits_jax import progress as progress_lib
from rotbits_jax import structured
from rotbits_jax import symmetries
from rotbits_jax.coding.weights import layouts as weights
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import plain
from rotbits_jax.file import report
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.symmetries import transform as transform_lib
from rotbits_jax.verification import read_all

Tree = dict[str, Any]
Job = Any  # a _Job or a plain.Job


def encode(
  model: Any,
  *,
  preset: str | presets.Preset | None = None,
  files: Mapping[str, bytes] | None = None,
  stem: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  progress: bool = False,
  **options: Any,
) -> bytes:
  """Stores a model, or any PyTree of arrays, in few bytes.

  Args:
    model: a `Model` (one that is not rounded yet, whose `stored_as` is set, is rounded
      at the end); a checkpoint, opened or loaded; or any PyTree of arrays, only with
      the preset 'exact', because its symmetries are not known.
    preset: 'free' removes what the function does not depend on; 'exact' keeps every bit
      of the input; 'paper' rotates the weights and gets the rotations' bits back as
      published. Or a preset made by a factory in `presets`. By default 'free' for a
      sliced model and 'exact' for everything else.
    files: the checkpoint's other files, kept as they are; by default those of a
      checkpoint that is opened or loaded.
    stem: the name that SliceGPT gives to the weights and the slicing JSON; by default
      that of the checkpoint.
    mesh: devices along one axis, 'layers', that share the layers. The bytes are the
      same for any number of devices.
    progress: whether to show the progress on stderr.
    options: options of the preset, if it is given by its name.

  Returns:
    The bytes of a file, see `file`.

  Raises:
    ValueError: if the preset or an option is unknown, or if the model cannot be stored.
  """
  memory = io.BytesIO()
  _, job = _job(model, preset, options, files, stem, mesh)
  with progress_lib.Progress('encode', job.total, 'unit', show=progress) as bar:
    shard = writer_lib.Shard('', tuple(job.sizes))
    job.write([shard], lambda _: memory, None, bar)
  return memory.getvalue()


def encode_to_file(
  source: Any,
  path: str | os.PathLike[str],
  *,
  preset: str | presets.Preset | None = None,
  files: Mapping[str, bytes] | None = None,
  stem: str | None = None,
  shard_size: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  overwrite: bool = True,
  check: bool = False,
  progress: bool = False,
  **options: Any,
) -> None:
  """Encodes a checkpoint to a file, or to shards, a few layers at a time.

  The file appears when it is complete, see `outputs`. If a run was killed or
  interrupted, the next run with the same input and settings resumes it. If several
  processes of `jax.distributed` call the function, each process writes shards of the
  layers that it owns.

  Args:
    source: the path of a checkpoint, or what `encode` takes. A checkpoint at a path
      that is not of a known family is stored as plain tensors, with 'exact'.
    path: path of the file. Shards have their number before the suffix, and their index
      in Hugging Face's format is written beside them.
    preset: see `encode`.
    files: see `encode`.
    stem: see `encode`.
    shard_size: greatest size of a shard in bytes; None for one file, or for as many
      shards as there are processes.
    mesh: see `encode`.
    overwrite: whether an existing file may be replaced.
    check: whether to decode everything that was written before a file is replaced, and
      to compare it with the source if the preset is 'exact', see `verify`. It needs a
      single process.
    progress: whether to show the progress on stderr.
    options: options of the preset, if it is given by its name.

  Raises:
    ValueError: see `encode`.
    CheckpointError: if the checkpoint cannot be read.
    ContainerError: if the check fails.
    OSError: if the file cannot be written or must not be replaced.
  """
  if isinstance(source, (str, os.PathLike)):
    source = checkpoints.open_any(source)
  if shard_size is not None and shard_size < 1:
    raise ValueError(f'shard_size must be positive, got {shard_size}')
  if isinstance(source, (checkpoints.Source, checkpoints.TensorFiles)):
    source = _without(source, outputs.resolved(path))
  made, job = _job(source, preset, options, files, stem, mesh)
  process, processes = jax.process_index(), jax.process_count()
  if made.message is not None and (shard_size is not None or processes > 1):
    raise ValueError("the preset 'paper' writes one message, which cannot be in shards")
  if check and processes > 1:
    raise ValueError('check needs one process; verify the file when all are done')
  bytes_of = {name: sizes.bytes for name, sizes in job.sizes.items()}
  sharded = shard_size is not None or processes > 1
  output = pathlib.Path(path).absolute() if sharded else outputs.resolved(path)
  shards = writer_lib.plan_shards(output, bytes_of, shard_size, processes)
  index = output.with_name(writer_lib.index_name(output))
  for target in (output, index, *(output.with_name(x.name) for x in shards)):
    outputs.check(target, overwrite=overwrite)
  owners = {x: i * processes // len(shards) for i, x in enumerate(shards)}
  own = [shard for shard, owner in owners.items() if owner == process]
  total = sum(len(shard.units) for shard in own)
  with (
    outputs.named(output),
    writer_lib.Workspace(output, process, job.fingerprint(shards)) as work,
    progress_lib.Progress('encode', total, 'unit', show=progress) as bar,
  ):
    if work.done:
      bar.say(f'resumes after {len(work.done)} of {total} units')
    with contextlib.ExitStack() as stack:
      job.write(own, lambda x: stack.enter_context(work.open(x)), work, bar)
    _barrier(processes)
    if sharded and process == 0:
      paths = {x: work.path(x.name, process=i) for x, i in owners.items()}
      writer_lib.write_index(work.path(index.name), paths)
    if check:
      bar.stage('checking')
      first = index.name if sharded else output.name
      whole = made.name == 'exact' and len(made.names) == 1
      read_all(work.path(first), source if whole else None)
    _barrier(processes)
    for shard in own:
      outputs.move(work.path(shard.name), output.with_name(shard.name))
    _barrier(processes)
    if process == 0 and sharded:
      outputs.move(work.path(index.name), index)
      output.unlink(missing_ok=True)  # an older file, which readers would prefer
    elif process == 0:
      index.unlink(missing_ok=True)


def decode(source: file.Readable, *, like: Any = None, progress: bool = False) -> Any:
  """Returns the model, or the PyTree, in a file, as NumPy arrays.

  Args:
    source: a path, bytes, or a binary file.
    like: a PyTree whose structure the PyTree in the file gets: lists, tuples, Optax
      states. Its arrays give shapes and dtypes, which must be those in the file.
    progress: whether to tell on stderr how far it is.

  Returns:
    The model with NumPy arrays; structured leaves stay structured. At most one layer
    more than the model is held meanwhile. Of a PyTree, without `like`, nested dicts
    whose keys are those of dicts, indices and names of fields. Of a checkpoint that is
    stored as plain tensors, these by name.

  Raises:
    ContainerError: if the file is not of this format or is damaged.
    ValueError: if `like` has other leaves than the PyTree in the file.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    found = reader.model(show_progress=progress)
  if like is None:
    return found
  if isinstance(found, models.Model):
    raise ValueError('the file holds a model, which has a structure: leave out `like`')
  return plain.unflatten_like(like, found)


def load(
  source: file.Readable,
  *,
  layers: range | None = None,
  sharding: file.Place | None = None,
  dtype: DTypeLike | None = None,
  progress: bool = False,
) -> Any:
  """Loads the model in a file as JAX arrays; structured leaves stay structured.

  Args:
    source: a path, bytes, or an open binary file.
    layers: the layers to load; all by default. Other layers are not read.
    sharding: a `jax.sharding.Sharding` for all arrays, or a function that takes the
      path and the shape of a parameter and returns one. The layers of a group are
      stacked along the first axis. Layers that no device of this process gets are not
      read.
    dtype: dtype for all floating-point numbers, rounded to nearest; None for the dtype
      of each array in the file. Arrays of the preset `near` are float32 there.
    progress: whether to show the progress on stderr.

  Raises:
    ContainerError: as for `decode`.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    model = reader.model(layers=layers, place=sharding, show_progress=progress)
  if dtype is not None:
    model = structured.astype(model, dtype)
  return jax.tree.map(_on_device, model)


def decode_checkpoint(
  source: file.Readable, *, progress: bool = False
) -> checkpoints.Checkpoint:
  """Decodes the model in a file with its sidecar files and its stem.

  Raises:
    ContainerError: as for `decode`, or if the file does not hold a model.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    model = reader.model(show_progress=progress)
    if not isinstance(model, models.Model):
      raise file.ContainerError(
        'the file holds plain arrays, not a model of a known family'
      )
    return checkpoints.Checkpoint(model, reader.files(), reader.stem)


def decode_to_directory(
  source: file.Readable,
  directory: str | os.PathLike[str],
  *,
  format: checkpoints.Format = 'safetensors',
  shard_size: int | None = None,
  dtype: DTypeLike | None = None,
  overwrite: bool = True,
  progress: bool = False,
) -> None:
  """Decodes a file to a checkpoint on disk, one layer at a time.

  Args:
    source: a path, bytes, or an open binary file.
    directory: the directory for the checkpoint.
    format: see `checkpoints.save_checkpoint`. Plain tensors come back in the files that
      they were encoded from.
    shard_size: greatest size of the tensors in a weights file, in bytes; None for one
      file.
    dtype: dtype for all floating-point numbers, rounded to nearest. By default the
      numbers keep the dtype of the encoded checkpoint.
    overwrite: whether existing files may be replaced.
    progress: whether to show the progress on stderr.

  Raises:
    ContainerError: as for `decode_checkpoint`.
    ValueError: if the format does not suit the model.
    OSError: if a path cannot be read or written, or a file must not be replaced.
  """
  with file.Reader(source) as reader:
    config = reader.config
    if reader.weights_files:
      if dtype is not None:
        raise ValueError('plain tensors keep their dtypes: leave out dtype')
      _decode_tensors(reader, directory, format, overwrite, progress)
      return
    if config is None:
      raise file.ContainerError(
        'the file holds a PyTree, not a checkpoint; `decode` in Python reads it'
      )
    if 'config.json' not in reader.files():
      raise file.ContainerError(
        'the file holds a model without its config.json, so that it cannot become a '
        'checkpoint; pass the whole checkpoint to `encode`, or its files and stem'
      )
    dtypes = _dtypes_on_disk(reader, dtype)
    with checkpoints.CheckpointWriter(
      directory,
      config,
      dtypes=dtypes,
      files=reader.files(),
      stem=reader.stem,
      format=format,
      shard_size=shard_size,
      factors=reader.factors(),
      buffers=reader.buffers(),
      overwrite=overwrite,
    ) as writer:
      kept = (structured.FactorPair,)
      for index, params in reader.parts(show_progress=progress):
        params = models.materialize(params, but=kept)
        prefix = '' if index is None else f'layers.{index}/'
        params = structured.unflatten(
          (path, structured.astype(leaf, dtypes[prefix + path]))
          for path, leaf in structured.flatten(params).items()
        )
        if index is None:
          writer.outer(params)
        else:
          writer.layer(index, params)


def read_unit(source: file.Readable, name: str) -> Tree:
  """Reads one unit, such as a layer, without the others; see `file.Reader.unit`.

  Raises:
    ContainerError: as for `decode`, or if there is no such unit.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    return reader.unit(name)


def read_tensor(source: file.Readable, path: str) -> Any:
  """Reads one parameter, such as 'layers.3/attention/query/kernel'.

  Only the unit of the parameter is read, and units that it needs.

  Raises:
    ContainerError: as for `decode`, or if there is no such parameter.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    return reader.tensor(path)


def inspect(source: file.Readable) -> file.Report:
  """Reports the content of a file and the savings of each step, without decoding.

  Raises:
    ContainerError: if the source is not of this format or its manifest is damaged.
    OSError: if the path cannot be read.
  """
  with file.Reader(source) as reader:
    return report.from_reader(reader)


def _decode_tensors(
  reader: file.Reader,
  directory: str | os.PathLike[str],
  format: checkpoints.Format,
  overwrite: bool,
  progress: bool,
) -> None:
  """Writes the weights files of a checkpoint that is stored as plain tensors."""
  if format != 'safetensors':
    raise ValueError('plain tensors come back in the files that they were encoded from')
  with checkpoints.TensorFilesWriter(
    directory,
    tuple(reader.weights_files.values()),
    sizes=reader.tensor_sizes(),
    rests=reader.rests(),
    files=reader.files(),
    overwrite=overwrite,
  ) as writer:
    for name, tensor in reader.tensors(show_progress=progress):
      writer.add(name, tensor)


def _dtypes_on_disk(
  reader: file.Reader, dtype: DTypeLike | None
) -> dict[str, np.dtype]:
  """Returns the dtype in which each parameter is written to a checkpoint, by path."""
  dtypes = reader.dtypes()
  wide = np.dtype(np.float32)
  if dtype is not None:
    wanted = np.dtype(jnp.dtype(dtype))
    chosen = lambda x: wanted if jnp.issubdtype(x, jnp.floating) else x
  elif (name := reader.options.get(writer_lib.DTYPE)) is not None:
    # The file has these arrays in float32, see `symmetries.Rounding`.
    if name not in weights.DTYPES:
      raise file.ContainerError(f'the file names an unknown dtype, {name!r:.40}')
    wanted = weights.DTYPES[name]
    chosen = lambda x: wanted if x == wide else x
  else:
    return dtypes
  return {path: chosen(own) for path, own in dtypes.items()}


# ---- encoding ----------------------------------------------------------------------


def _without(
  source: checkpoints.Source | checkpoints.TensorFiles, output: pathlib.Path
) -> checkpoints.Source | checkpoints.TensorFiles:
  """Returns a checkpoint that does not have its older output for one of its files."""
  if source.path.absolute().parent != output.parent:
    return source
  found = copy.copy(source)
  found.files = {name: x for name, x in source.files.items() if name != output.name}
  return found


def _job(
  source: Any,
  preset: str | presets.Preset | None,
  options: Tree,
  files: Mapping[str, bytes] | None,
  stem: str | None,
  mesh: jax.sharding.Mesh | None,
) -> tuple[presets.Preset, Job]:
  """Returns the preset and the work to do for what `encode` takes."""
  if isinstance(source, checkpoints.Checkpoint):
    files = source.files if files is None else files
    stem = source.stem if stem is None else stem
    source = source.model
  is_model = isinstance(source, (models.Model, checkpoints.Source))
  config = source.config if is_model else None
  made = presets.make(preset or presets.default(config), **options)
  if is_model:
    return made, _Job(source, made, files, stem, mesh)
  if isinstance(source, checkpoints.TensorFiles):
    return made, plain.tensor_job(source, made, files)
  return made, plain.tree_job(source, made, files or {})


class _Job:
  """The work of encoding a model to one or several files."""

  def __init__(
    self,
    source: Any,
    preset: presets.Preset,
    files: Mapping[str, bytes] | None,
    stem: str | None,
    mesh: jax.sharding.Mesh | None,
  ):
    self.source, self.preset = source, preset
    self.files = dict(getattr(source, 'files', {}) if files is None else files)
    writer_lib.check_files(self.files)
    stem = getattr(source, 'stem', None) if stem is None else stem
    self.buffers = dict(source.buffers)
    stored_as = getattr(source, 'stored_as', None)
    if stored_as is not None and (preset.rounding is None or preset.message):
      # Other presets round numbers at the end, so they use them before that.
      source, stored_as = source.rounded(), None
    self.context = symmetries.make_context(source, stored_as=stored_as, mesh=mesh)
    if preset.rounding is not None and preset.rounding.uniform:
      options = preset.options | {writer_lib.DTYPE: self.context.form.name}
      preset = preset._replace(options=options)
    self.summary = writer_lib.Summary(preset, source.config, stem)
    self.sizes = _input_sizes(self.context, self.buffers)
    if preset.message is not None:
      from rotbits_jax import paper  # its linear algebra is slow to import

      paper.refuse(source, preset.message)

  @property
  def total(self) -> int:
    return len(self.sizes)

  def fingerprint(self, shards: Sequence[writer_lib.Shard]) -> str | None:
    """Returns a hash of everything that determines the bytes of the output.

    Returns None if a run cannot be resumed.
    """
    if not isinstance(self.source, checkpoints.Source) or self.preset.message:
      return None
    parts = [
      self.source.fingerprint(),
      self.preset.name,
      self.preset.options,
      self.preset.names,
      shards,
      jax.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

  def write(
    self,
    shards: Sequence[writer_lib.Shard],
    open_shard: Any,
    work: writer_lib.Workspace | None,
    bar: progress_lib.Progress,
  ) -> None:
    """Writes shards that follow each other.

    Args:
      shards: the shards in order.
      open_shard: takes a shard; returns its file.
      work: holds the units of an earlier run, and records those of this one; None if
        the run cannot be resumed.
      bar: shows the progress.
    """
    if not shards:
      return
    writers: dict[str, writer_lib.FileWriter] = {}
    home: dict[str, writer_lib.Shard] = {}
    last = list(self.sizes)[-1]
    for shard in shards:
      files = self.files if last in shard.units else {}
      units = shard.units
      if self.preset.message is not None:
        units = tuple(name for name in units if name == manifest_lib.BUFFERS)
      writer = writer_lib.FileWriter(open_shard(shard), self.summary, units, files)
      writers[shard.name] = writer
      home |= dict.fromkeys(shard.units, shard)
    if self.preset.message is not None:
      self._write_message(writers[shards[0].name], bar)
    else:
      self._write_units(writers, home, work, bar)
    if manifest_lib.BUFFERS in home:
      writer = writers[home[manifest_lib.BUFFERS].name]
      unit = symmetries.Unit(
        manifest_lib.BUFFERS, {manifest_lib.BUFFERS: self.buffers}, []
      )
      writer.add(unit, self.sizes[manifest_lib.BUFFERS], {})
      bar.update()
    for writer in writers.values():
      writer.finish()

  def _write_units(
    self,
    writers: dict[str, writer_lib.FileWriter],
    home: dict[str, writer_lib.Shard],
    work: writer_lib.Workspace | None,
    bar: progress_lib.Progress,
  ) -> None:
    names = [name for name in home if name != manifest_lib.BUFFERS]
    kept, state = 0, None
    if work is not None and work.done:
      kept = self._keep(writers, names, work)
      bar.update(kept)
      if kept and work.state is not None:
        leaves, structure = jax.tree.flatten(self.preset.transform.init(self.context))
        if len(leaves) == len(work.state):
          state = jax.tree.unflatten(structure, work.state)
    own = [manifest_lib.layer_index(name) for name in names]
    layers = [index for index in own if index is not None]
    outer = [name for name, index in zip(names, own, strict=True) if index is None]
    start = layers[0] + min(kept, len(layers)) if layers else self.config.num_layers
    stop = layers[-1] + 1 if layers else self.config.num_layers
    if kept == len(names):
      return
    rewritten = transform_lib.rewrite(
      self.context,
      self.preset.transform,
      rounding=self.preset.rounding,
      layers=range(start, stop),
      state=state,
      outer=bool(outer),
    )
    bar.stage('rewriting')
    for units, state in rewritten:
      beside = {key: x for unit in units for key, x in unit.params.items()}
      bar.stage('coding')
      noted: dict[writer_lib.Shard, list[manifest_lib.Unit]] = {}
      while units:
        unit = units.pop(0)
        if unit.name not in home:  # another process writes it
          continue
        shard = home[unit.name]
        entry = writers[shard.name].add(unit, self.sizes[unit.name], beside)
        noted.setdefault(shard, []).append(entry)
        bar.update()
      if work is not None:
        work.note(noted, state)
      bar.stage('rewriting')

  @property
  def config(self) -> models.ModelConfig:
    return self.context.config

  def _keep(
    self,
    writers: dict[str, writer_lib.FileWriter],
    names: Sequence[str],
    work: writer_lib.Workspace,
  ) -> int:
    """Keeps the first units of an earlier run that are undamaged; returns how many."""
    for count, (shard, entry) in enumerate(work.done):
      fits = count < len(names) and entry.name == names[count] and shard in writers
      if not fits or not writers[shard].keep(entry):
        work.forget(count)
        return count
    return len(work.done)

  def _write_message(
    self, writer: writer_lib.FileWriter, bar: progress_lib.Progress
  ) -> None:
    from rotbits_jax import paper  # its linear algebra is slow to import

    name, corrections, tables = manifest_lib.MESSAGE
    encoded = paper.encode(
      self.context.source,
      self.preset.message,
      lambda words: writer.extend(name, words),
      progress=bar.shown,
    )
    streams = [writer.close(name)]
    for other, data in ((corrections, encoded.corrections), (tables, encoded.tables)):
      writer.extend(other, data)
      streams.append(writer.close(other))
    saving = symmetries.Saving(
      self.preset.names[0], 0, int(encoded.net_bits // 8), list(encoded.notes)
    )
    own = [x for name, x in self.sizes.items() if name != manifest_lib.BUFFERS]
    writer.set_message(
      manifest_lib.Message(
        layout=encoded.layout,
        streams=tuple(streams),
        input_numbers=sum(sizes.numbers for sizes in own),
        input_bytes=sum(sizes.bytes for sizes in own),
        savings=(saving,),
      )
    )
    bar.update(len(own))


def _input_sizes(
  context: symmetries.Context, buffers: Mapping[str, Any]
) -> dict[str, writer_lib.Sizes]:
  """Returns the size of each unit before it is rewritten, in the order of the units."""
  trees: dict[str, tuple[str, Tree]] = {}
  for i in range(context.config.num_layers):
    trees[f'layers.{i}'] = f'layers.{i}/', context.source.specs(i)
  for key, tree in context.source.specs(None).items():
    trees[key] = '', {key: tree}
  sizes = {}
  for name, (prefix, tree) in trees.items():
    numbers = nbytes = 0
    for path, leaf in structured.flatten(tree).items():
      count = structured.count_numbers(leaf)
      numbers += count
      nbytes += count * context.dtypes[prefix + path].itemsize
    sizes[name] = writer_lib.Sizes(numbers, nbytes)
  if buffers:
    arrays = [np.asarray(x) for x in buffers.values()]
    count, nbytes = sum(x.size for x in arrays), sum(x.nbytes for x in arrays)
    sizes[manifest_lib.BUFFERS] = writer_lib.Sizes(count, nbytes)
  return sizes


def _barrier(processes: int) -> None:
  if processes > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices('rotbits_jax')


def _on_device(x: Any) -> Any:
  """A JAX array; the NumPy array itself if JAX would narrow its dtype.

  On a processor the two share memory where its address allows it. Nobody else holds it.
  """
  if not isinstance(x, np.ndarray) or jnp.result_type(x) != x.dtype:
    return x
  return jax.device_put(x)
