"""Writes an encoded source: to a file, or to a folder of shards.

Both appear at once, when they are complete. A shard is a job of its own: any process
encodes any of them into the hidden folder of the output, and one publishes the set. The
bytes do not depend on who does. The hidden folder is named by a digest of the source
and the settings, so a run that was killed finds the shards that it had written. A run
with another digest is refused as long as one writes, see `outputs`.
"""

from collections.abc import Iterable, Iterator
import contextlib
import functools
import os
import pathlib
import shutil
import time
from typing import Any
import uuid

import jax

from rotbits_jax.checkpoints import safetensors
from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import verification
from rotbits_jax.system import files as files_lib
from rotbits_jax.system import outputs
from rotbits_jax.system import progress as progress_lib
from rotbits_jax.system import signals

_PAUSE = 0.2  # seconds between two looks for the shards of other processes
_PATIENCE = 60.0  # seconds that they have to leave the hidden folder


class Plan:
  """A file, or a folder of shards, each of which is encoded alone.

    plan = rotbits_jax.plan_shards(source, folder, shard_size=2 * 10**9)
    for index in range(len(plan)):
      plan.encode(index)  # here, or in another process that has made the same plan
    plan.publish()

  `shards` has the records of each file, by its name.
  """

  def __init__(
    self,
    encoder: encode_lib.Encoder,
    path: outputs.Path,
    shard_size: int | None,
    *,
    overwrite: bool = False,
  ):
    """Plans the files from the sizes before coding."""
    check_path(path, shard_size, inputs=encoder.inputs, overwrite=overwrite)
    self._encoder, self._target = encoder, files_lib.real_path(path)
    self._next: tuple[int, Any] = (0, None)  # a shard, and the state before it
    self._has_index = shard_size is not None
    self._overwrite, self._shard_size = overwrite, shard_size
    if not self._has_index:
      self.shards = {self._target.name: tuple(encoder.counts)}
      return
    if not encoder.can_be_divided:
      name = encoder.preset.name
      raise ValueError(f'{name!r} writes one message, which cannot be in shards')
    sizes = {name: counts.bytes for name, counts in encoder.counts.items()}
    self.shards = safetensors.shard_names(sizes, shard_size, 'model', '.rotbits')

  def __len__(self) -> int:
    """Returns the number of files."""
    return len(self.shards)

  def encode(self, index: int, bar: progress_lib.Progress | None = None) -> None:
    """Encodes a shard, from 0, unless a run has done so before.

    Raises:
      OSError: if a process writes the target that has another plan.
    """
    bar = bar or progress_lib.Progress('encode', 0, 'B', show=False)
    with outputs.job(self._target, self._digest, alone=False) as folder:
      self._encode(index, folder, bar)

  def publish(self, *, check: bool = False) -> None:
    """Makes the output appear, and removes partial outputs that no process writes.

    Raises:
      OSError: if another process writes the target.
    """
    with self._alone() as folder:
      self._publish(folder, check=check)

  def write(
    self, *, check: bool = False, progress: bool = False, accepted: range | None = None
  ) -> int:
    """Encodes all files and publishes them, if the size is `accepted`; returns it.

    All processes of `jax.distributed` see one file system, where they wait for others.

    Raises:
      OSError: if another process writes the target.
    """
    process, processes = 0, 1
    if self._has_index and accepted is None:
      process, processes = jax.process_index(), jax.process_count()
    indexes = range(process, len(self), processes)
    records = [*self.shards.values()][process::processes]
    size = sum(map(self._encoder.nbytes, records))
    with progress_lib.Progress('encode', size, 'B', show=progress) as bar:
      if processes > 1:
        for index in indexes:
          self.encode(index, bar)
        if not self._is_whole(process):
          return 0
      with self._alone(outputs.PATIENCE if processes == 1 else _PATIENCE) as folder:
        if processes == 1:
          for index in indexes:
            self._encode(index, folder, bar)
        size = sum((folder / name).stat().st_size for name in self.shards)
        if accepted is None or size in accepted:
          bar.stage('checking' if check else 'writing')
          self._publish(folder, check=check)
        else:
          shutil.rmtree(folder, ignore_errors=True)
    return size

  @functools.cached_property
  def _digest(self) -> str:
    """The digest of the source and the settings."""
    return self._encoder.fingerprint()[:16]

  @contextlib.contextmanager
  def _alone(self, patience: float = outputs.PATIENCE) -> Iterator[pathlib.Path]:
    """Keeps all other processes from the target; yields the folder to prepare it in."""
    prepared = outputs.writer(self._target)  # half a file is of no use
    if self._has_index:
      prepared = outputs.job(self._target, self._digest, alone=True, patience=patience)
    with prepared as folder:
      # Another process may have finished since the first check.
      check_path(self._target, self._shard_size, inputs=(), overwrite=self._overwrite)
      yield folder

  def _is_whole(self, process: int) -> bool:
    """Waits for the shards of all processes; returns whether this one publishes them.

    The others wait until it has done so.
    """
    staging = outputs.staging(self._target, self._digest)
    while process and staging.exists():
      time.sleep(_PAUSE)
    paths = [outputs.job_folder(self._target, self._digest) / x for x in self.shards]
    while not process and not all(path.exists() for path in paths):
      time.sleep(_PAUSE)
    return not process

  def _encode(
    self, index: int, folder: pathlib.Path, bar: progress_lib.Progress
  ) -> None:
    """Encodes a file into a hidden folder, unless it is there."""
    name, records = [*self.shards.items()][index]
    if self._encoder.preset.resumable and (folder / name).exists():
      bar.update(self._encoder.nbytes(records))
      return
    state = self._next[1] if self._next[0] == index else None
    path = folder / f'.{uuid.uuid4().hex}'  # no other process has it
    try:
      with path.open('w+b') as file:
        self._next = index + 1, self._encoder.write(file, records, bar, state)
      outputs.move(path, folder / name)
    finally:
      with signals.unbroken():
        path.unlink(missing_ok=True)

  def _publish(self, folder: pathlib.Path, *, check: bool) -> None:
    """Moves the files of a hidden folder to the target; no other process uses it."""
    encoder, staged = self._encoder, folder
    if self._has_index:
      shards_lib.write_index(staged, self.shards)
      for file in staged.iterdir():
        if file.name not in (*self.shards, shards_lib.INDEX):
          file.unlink()  # half a shard of a run that was killed
    else:
      staged /= self._target.name
    if check:
      try:
        reader = reader_lib.Reader(staged, base=encoder.base)
        path = getattr(encoder.source, 'given', None)
        if path is None and encoder.preset.keeps == 'bits':
          verification.read_all(reader, encoder.source)
        else:
          verification.check(reader, path)
      except Exception:  # the shards are not right; a signal lets them stay
        shutil.rmtree(folder, ignore_errors=True)
        raise
    outputs.move(staged, self._target)
    outputs.remove_stale(self._target.parent, self._target.name)


def check_path(
  path: outputs.Path, shard_size: int | None, *, inputs: Iterable[Any], overwrite: bool
) -> None:
  """Checks, before the work, that an output can be written, see `Plan`."""
  if shard_size is None:
    target = files_lib.local_path(path)
    outputs.check(files_lib.real_path(target), overwrite=overwrite)
    check_inputs([target], inputs)
    return
  if shard_size < 1:
    raise ValueError(f'shard_size must be positive, got {shard_size}')
  folder = outputs.directory_target(path)
  # Others may belong to an index that was renamed, or is elsewhere.
  paths, _ = shards_lib.find(folder)
  names = {shards_lib.INDEX, *(pathlib.Path(str(x)).name for x in paths)}
  replaced = outputs.check_replaced(folder, names.__contains__, overwrite=overwrite)
  check_inputs(replaced, inputs)


def check_inputs(targets: Iterable[pathlib.Path], inputs: Iterable[Any]) -> None:
  """Checks, before the work, that no file of an input is replaced.

  The files of a checkpoint are those in its folder, except encoded ones. Inputs are
  paths, opened files with their bases, or lists of these; others are ignored.
  """
  for path in _input_paths([*inputs]):
    real, is_encoded = files_lib.real_path(path), shards_lib.is_encoded(path)
    folder = path if real.is_dir() else path.parent
    files = {real}
    if real.is_dir() or real.name == shards_lib.INDEX or not is_encoded:
      files |= {files_lib.real_path(x) for x in folder.iterdir()}
    for target in filter(os.path.exists, targets):
      is_result = not is_encoded and shards_lib.is_encoded(target)
      if files_lib.real_path(target) in files and not is_result:
        raise ValueError(f'{target}: it is a file of an input, {path}')


def _input_paths(value: Any) -> list[pathlib.Path]:
  """Returns the paths of an input and of its bases; those in memory have none."""
  if isinstance(value, reader_lib.Reader):
    value = value.inputs
  if type(value) in (list, tuple):  # but no Checkpoint, whose stem is no path
    return [path for part in value for path in _input_paths(part)]
  path = getattr(value, 'path', value)  # of an opened checkpoint
  path = files_lib.local_path(path) if isinstance(path, str | os.PathLike) else None
  return [path] if path and os.path.exists(path) else []
