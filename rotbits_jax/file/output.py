"""Writes an encoded source: to a file, or to a folder of shards.

Both appear at once, when they are complete. A shard is a job of its own: any process
encodes any of them into the hidden folder of the output, and one publishes the set. The
bytes do not depend on who does. The hidden folder is named by a digest of the source
and the settings, so a run that was killed finds the shards that it had written.
"""

from collections.abc import Iterable
import contextlib
import glob
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

_PAUSE = 0.2  # seconds between two looks for the shards of other processes


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
    self._encoder, self._target = encoder, files_lib.local_path(path).resolve()
    self._next: tuple[int, Any] = (0, None)  # a shard, and the state before it
    self._has_index = shard_size is not None
    if not self._has_index:
      self.shards = {self._target.name: tuple(encoder.counts)}
      self._staging = outputs.staging(self._target)
      return
    if not encoder.can_be_divided:
      name = encoder.preset.name
      raise ValueError(f'{name!r} writes one message, which cannot be in shards')
    sizes = {name: counts.bytes for name, counts in encoder.counts.items()}
    self.shards = safetensors.shard_names(sizes, shard_size, 'model', '.rotbits')
    digest = encoder.fingerprint()[:16]
    self._staging = self._target.parent / f'.{self._target.name}.{digest}.partial'

  def __len__(self) -> int:
    """Returns the number of files."""
    return len(self.shards)

  def encode(self, index: int, bar: progress_lib.Progress | None = None) -> None:
    """Encodes a shard, from 0, unless a run has done so before."""
    name, records = [*self.shards.items()][index]
    bar = bar or progress_lib.Progress('encode', 0, 'B', show=False)
    if self._encoder.preset.resumable and (self._staging / name).exists():
      bar.update(self._encoder.nbytes(records))
      return
    self._staging.mkdir(parents=True, exist_ok=True)
    state = self._next[1] if self._next[0] == index else None
    path = self._staging / f'.{uuid.uuid4().hex}'  # no other process has it
    try:
      with path.open('w+b') as file:
        self._next = index + 1, self._encoder.write(file, records, bar, state)
      outputs.move(path, self._staging / name)
    finally:
      path.unlink(missing_ok=True)

  def publish(self, *, check: bool = False) -> None:
    """Makes the output appear, and removes partial outputs of earlier runs."""
    encoder, staged = self._encoder, self._staging
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
        path = getattr(encoder.source, 'path', None)
        if path is None and encoder.preset.keeps == 'bits':
          verification.read_all(reader, encoder.source)
        else:
          verification.verify(reader, path)
      except BaseException:
        shutil.rmtree(self._staging, ignore_errors=True)
        raise
    outputs.move(staged, self._target)
    digests = f'.{glob.escape(self._target.name)}.{"[0-9a-f]" * 16}.partial'
    for folder in self._target.parent.glob(digests):
      shutil.rmtree(folder, ignore_errors=True)

  def write(
    self, *, check: bool = False, progress: bool = False, accepted: range | None = None
  ) -> int:
    """Encodes all files and publishes them, if the size is `accepted`; returns it.

    All processes of `jax.distributed` see one file system, where they wait for others.
    """
    process, processes = 0, 1
    if self._has_index and accepted is None:
      process, processes = jax.process_index(), jax.process_count()
    size = sum(map(self._encoder.nbytes, [*self.shards.values()][process::processes]))
    with (
      # Half a file is of no use.
      contextlib.nullcontext() if self._has_index else outputs.fresh(self._staging),
      progress_lib.Progress('encode', size, 'B', show=progress) as bar,
    ):
      for index in range(process, len(self), processes):
        self.encode(index, bar)
      while process and self._staging.exists():
        time.sleep(_PAUSE)
      if process:
        return 0
      paths = [self._staging / name for name in self.shards]
      while processes > 1 and not all(path.exists() for path in paths):
        time.sleep(_PAUSE)
      size = sum(path.stat().st_size for path in paths)
      if accepted is None or size in accepted:
        bar.stage('checking' if check else 'writing')
        self.publish(check=check)
      else:
        shutil.rmtree(self._staging, ignore_errors=True)
    return size


def check_path(
  path: outputs.Path, shard_size: int | None, *, inputs: Iterable[Any], overwrite: bool
) -> None:
  """Checks, before the work, that an output can be written, see `Plan`."""
  if shard_size is None:
    target = files_lib.local_path(path)
    outputs.check(target.resolve(), overwrite=overwrite)
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
    real, is_encoded = path.resolve(), shards_lib.is_encoded(path)
    folder = path if real.is_dir() else path.parent
    files = {real}
    if real.is_dir() or real.name == shards_lib.INDEX or not is_encoded:
      files |= {x.resolve() for x in folder.iterdir()}
    for target in filter(os.path.exists, targets):
      is_result = not is_encoded and shards_lib.is_encoded(target)
      if target.resolve() in files and not is_result:
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
