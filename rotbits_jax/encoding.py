"""Encoding: stores a model, a checkpoint or a PyTree in a file.

A unit is a part of a model that decodes on its own: the embedding, a layer, the head.
Encoding reads a few layers at a time from a source, rewrites them with the transform of
a preset, and appends their units to a file. `encode` holds the whole file in memory;
`encode_to_file` holds a few layers.
"""

from collections.abc import Mapping
import contextlib
import copy
import io
import os
import pathlib
from typing import Any

import jax

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import presets
from rotbits_jax.file import model as model_lib
from rotbits_jax.file import plain
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import writer as writer_lib
from rotbits_jax.system import outputs
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.verification import read_all

Tree = dict[str, Any]
Job = model_lib.Job | plain.Job


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
    model: a `Model`; a checkpoint, opened or loaded; or any PyTree of arrays. A PyTree
      needs the preset 'exact', because its symmetries are not known. A model with
      `stored_as` is not rounded yet; it is rounded at the end.
    preset: a name, or a preset that a factory in `presets` made. 'exact' keeps every
      bit of the input; 'free' removes numbers on which the function does not depend;
      'near' also rounds to coarser steps; 'paper' rotates the weights and gets the bits
      of the rotations back as published. The default is 'free' for a sliced model and
      'exact' for everything else.
    files: the other files of the checkpoint, which are kept whole; by default those of
      a checkpoint that is opened or loaded.
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
    shard = shards_lib.Shard('', tuple(job.sizes))
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

  The file appears when it is complete, see `outputs`; shards do so with their index,
  and then those of an older result are removed. If a run was killed or
  interrupted, the next run with the same input and settings resumes it, except with
  'paper' and with transforms beside those of the preset. If several
  processes of `jax.distributed` call the function, each process writes shards of the
  layers that it owns.

  Args:
    source: the path of a checkpoint, or what `encode` takes. A checkpoint at a path
      that is not of a known family is stored as plain tensors, with 'exact'.
    path: path of the file. Shards have their number and a checksum before the suffix,
      and their index in Hugging Face's format is written beside them.
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
  if isinstance(source, (checkpoints.CheckpointReader, checkpoints.TensorFiles)):
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
  shards = shards_lib.plan(output, bytes_of, shard_size, processes)
  index = output.with_name(shards_lib.index_name(output))
  for target in (output, index):
    outputs.check(target, overwrite=overwrite)
  for target in shards_lib.existing(output):
    outputs.check(target, overwrite=overwrite)
  owners = {x: i * processes // len(shards) for i, x in enumerate(shards)}
  own = [shard for shard, owner in owners.items() if owner == process]
  total = sum(len(shard.units) for shard in own)
  with (
    outputs.named(output),
    writer_lib.Workspace(output, process, job.fingerprint(shards)) as work,
    progress_lib.Progress('encode', total, 'unit', show=progress) as bar,
  ):
    if process == 0:
      shards_lib.remove_unnamed(output)  # a killed run may have left them
    if work.done:
      bar.say(f'resumes after {len(work.done)} of {total} units')
    with contextlib.ExitStack() as stack:
      job.write(own, lambda x: stack.enter_context(work.open(x)), work, bar)
    _barrier(processes)
    paths = {x: work.path(x.name, process=i) for x, i in owners.items()}
    if check:
      bar.stage('checking')
      if sharded:
        shards_lib.write_index(work.path(index.name), paths)
      first = index.name if sharded else output.name
      whole = made.keeps == 'bits'
      read_all(work.path(first), source if whole else None)
    final = lambda x: shards_lib.published(output, x, paths[x]) if sharded else x
    if sharded and process == 0:
      named = {final(shard): place for shard, place in paths.items()}
      shards_lib.write_index(work.path(index.name), named)
    _barrier(processes)
    # Readers get an older result until the index is moved, because the shards of that
    # result have other names or the same bytes.
    for shard in own:
      outputs.move(paths[shard], output.with_name(final(shard).name))
    _barrier(processes)
    if process == 0:
      if sharded:
        outputs.move(work.path(index.name), index)
        outputs.remove(output)  # an older file, which readers would prefer
      else:
        outputs.remove(index)
      shards_lib.remove_unnamed(output)


def _without(
  source: checkpoints.CheckpointReader | checkpoints.TensorFiles, output: pathlib.Path
) -> checkpoints.CheckpointReader | checkpoints.TensorFiles:
  """Returns a checkpoint that does not have its older output for one of its files."""
  if source.path.absolute().parent != output.parent:
    return source
  older = {output.name, *(x.name for x in shards_lib.existing(output))}
  found = copy.copy(source)
  found.files = {name: x for name, x in source.files.items() if name not in older}
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
  is_model = isinstance(source, (models.Model, checkpoints.CheckpointReader))
  config = source.config if is_model else None
  made = presets.make(preset or presets.default(config), **options)
  if is_model:
    return made, model_lib.Job(source, made, files, stem, mesh)
  if isinstance(source, checkpoints.TensorFiles):
    return made, plain.tensor_job(source, made, files)
  return made, plain.tree_job(source, made, files or {})


def _barrier(processes: int) -> None:
  if processes > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices('rotbits_jax')
