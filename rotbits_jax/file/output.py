"""Writes an encoded source: to a file, or to a folder of shards.

Both appear at once, when they are complete. A shard is a job of its own: any process
encodes any of them into the hidden folder of the output, and one publishes the set. The
bytes do not depend on who does. The hidden folder is named by a digest of the source
and the settings, so a run that was killed finds the shards that it had written.
"""

from collections.abc import Iterable, Iterator
import contextlib
import glob
import itertools
import os
import pathlib
import shutil
from typing import Any
import uuid

import jax
from jax._src import distributed

from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import inputs as inputs_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import verification
from rotbits_jax.system import outputs
from rotbits_jax.system import progress as progress_lib

_LONGEST_WAIT = 7 * 24 * 3600 * 1000  # milliseconds
_barriers = itertools.count()  # each is used once


def write_file(
  encoder: encode_lib.Encoder,
  path: str | os.PathLike[str],
  *,
  inputs: Iterable[Any] = (),
  overwrite: bool = True,
  check: bool = False,
  progress: bool = False,
  accepted: range | None = None,
) -> int:
  """Writes one file.

  Args:
    encoder: encodes the source.
    path: path of the file.
    inputs: the source and the base, see `inputs.check`.
    overwrite: whether an existing file may be replaced.
    check: whether to decode everything before the file appears, and to compare it with
      the source if the preset keeps all bits.
    progress: whether to show the progress on stderr.
    accepted: the sizes to accept: a file of another size is removed. None for all.

  Returns:
    The bytes of the file.

  Raises:
    ValueError: if the file would replace one of an input.
    ContainerError: if the check fails.
    OSError: if the file cannot be written or must not be replaced.
  """
  check_path(path, None, inputs=inputs, overwrite=overwrite)
  target, records = outputs.resolved(path), tuple(encoder.counts)
  size = encoder.nbytes(records)
  with (
    outputs.named(target),
    outputs.fresh(outputs.staging(target)) as folder,
    progress_lib.Progress('encode', size, 'B', show=progress) as bar,
  ):
    staged = folder / target.name
    with staged.open('w+b') as file:
      encoder.write(file, records, bar)
    size = staged.stat().st_size
    if accepted is None or size in accepted:
      if check:
        bar.stage('checking')
        _check(encoder, staged)
      outputs.move(staged, target)
  return size


def check_path(
  path: str | os.PathLike[str],
  shard_size: int | None,
  *,
  inputs: Iterable[Any],
  overwrite: bool,
) -> None:
  """Checks, before the work, that an output can be written.

  Raises:
    ValueError: if the shard size is not positive, or if a file of an input would be
      replaced.
    OSError: if the output cannot be written or must not be replaced.
  """
  if shard_size is None:
    target = outputs.resolved(path)
    outputs.check(target, overwrite=overwrite)
    inputs_lib.check([pathlib.Path(path), target], inputs)
    return
  if shard_size < 1:
    raise ValueError(f'shard_size must be positive, got {shard_size}')
  folder = outputs.directory_target(path)
  replaced = outputs.check_replaced(folder, shards_lib.is_of_set, overwrite=overwrite)
  inputs_lib.check(replaced, inputs)


class ShardPlan:
  """A folder of shards, each of which is encoded alone.

    plan = rotbits_jax.plan_shards(source, folder, shard_size=2 * 10**9)
    for index in range(len(plan)):
      plan.encode(index)  # here, or in another process that has made the same plan
    plan.publish()

  Attributes:
    shards: the records of each shard, by the name of its file.
  """

  def __init__(
    self,
    encoder: encode_lib.Encoder,
    path: str | os.PathLike[str],
    shard_size: int,
    *,
    inputs: Iterable[Any] = (),
    overwrite: bool = True,
  ):
    """Plans the shards.

    Args:
      encoder: encodes the source.
      path: path of the folder.
      shard_size: see `shards.plan`.
      inputs: the source and the base, see `inputs.check`.
      overwrite: whether an existing folder of shards may be replaced.

    Raises:
      ValueError: if the preset writes no shards, or if a file of an input would be
        replaced.
      OSError: if the folder cannot be written or must not be replaced.
    """
    check_path(path, shard_size, inputs=inputs, overwrite=overwrite)
    if not encoder.can_be_divided:
      raise ValueError(
        f'the preset {encoder.preset.name!r} writes one message, which cannot be in '
        'shards'
      )
    self._encoder, self._target = encoder, outputs.directory_target(path)
    sizes = {name: counts.bytes for name, counts in encoder.counts.items()}
    self.shards = shards_lib.plan(sizes, shard_size)
    self._names = list(self.shards)
    digest = encoder.fingerprint()[:16]
    self._staging = self._target.parent / f'.{self._target.name}.{digest}.partial'
    self._next: tuple[int, Any] = (0, None)  # a shard, and the state before it

  def __len__(self) -> int:
    """Returns the number of shards."""
    return len(self.shards)

  def encode(self, index: int, bar: progress_lib.Progress | None = None) -> None:
    """Encodes a shard into the hidden folder, unless a run has done so before.

    Args:
      index: the shard, from 0.
      bar: shows the progress.
    """
    name = self._names[index]
    records = self.shards[name]
    bar = bar or progress_lib.Progress('encode', 0, 'B', show=False)
    if self._encoder.preset.resumable and (self._staging / name).exists():
      bar.update(self._encoder.nbytes(records))
      return
    self._staging.mkdir(parents=True, exist_ok=True)
    state = self._next[1] if self._next[0] == index else None
    with outputs.named(self._staging), _temporary(self._staging, name) as path:
      with path.open('w+b') as file:
        self._next = index + 1, self._encoder.write(file, records, bar, state)
      outputs.move(path, self._staging / name)

  def publish(self, *, check: bool = False) -> None:
    """Makes the folder appear with its index, and removes what earlier runs left.

    Args:
      check: whether to decode everything before, see `write_file`.

    Raises:
      ContainerError: if the check fails.
      OSError: if a shard is missing, or the folder cannot be written.
    """
    with outputs.named(self._target):
      shards_lib.write_index(self._staging, self.shards)
      for file in self._staging.iterdir():
        if file.name not in (*self.shards, shards_lib.INDEX):
          file.unlink()  # half a shard of a run that was killed
      if check:
        try:
          _check(self._encoder, self._staging)
        except BaseException:
          self.discard()
          raise
      outputs.move(self._staging, self._target)
      pattern = f'.{glob.escape(self._target.name)}.*.partial'
      for folder in self._target.parent.glob(pattern):
        shutil.rmtree(folder, ignore_errors=True)

  def discard(self) -> None:
    """Removes the shards that are encoded and not published."""
    shutil.rmtree(self._staging, ignore_errors=True)

  def encoded_bytes(self) -> int:
    """Returns the bytes of all shards, which are encoded and not published."""
    return sum((self._staging / name).stat().st_size for name in self.shards)

  def write(
    self, *, check: bool = False, progress: bool = False, accepted: range | None = None
  ) -> int:
    """Encodes the shards and publishes them.

    Process i of `jax.distributed` encodes every n-th shard of n processes, which see
    one file system. All return when the folder is there.

    Args:
      check: see `publish`.
      progress: whether to show the progress on stderr.
      accepted: the sizes to accept, see `write_file`.

    Returns:
      The bytes of all shards.
    """
    process, processes = jax.process_index(), jax.process_count()
    indices = range(process, len(self), processes)
    records = [x for i in indices for x in self.shards[self._names[i]]]
    size = self._encoder.nbytes(records)
    with progress_lib.Progress('encode', size, 'B', show=progress) as bar:
      for index in indices:
        self.encode(index, bar)
    _wait_for_all()
    size = self.encoded_bytes()
    _wait_for_all()
    if process == 0:
      if accepted is None or size in accepted:
        self.publish(check=check)
      else:
        self.discard()
    _wait_for_all()
    return size


def _wait_for_all() -> None:
  """Waits until all processes of `jax.distributed` are here.

  They meet at the coordinator, because a collective of their devices may have to wait
  for threads of the encoder.
  """
  if jax.process_count() > 1:
    client: Any = distributed.global_state.client
    client.wait_at_barrier(f'rotbits_jax {next(_barriers)}', _LONGEST_WAIT)


@contextlib.contextmanager
def _temporary(folder: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """Yields a path that no other process has, and removes the file at it."""
  path = folder / f'.{name}.{uuid.uuid4().hex}'
  try:
    yield path
  finally:
    path.unlink(missing_ok=True)


def _check(encoder: encode_lib.Encoder, path: pathlib.Path) -> None:
  """Decodes a file or a folder of shards, see `write_file`."""
  source = encoder.source if encoder.preset.keeps == 'bits' else None
  with reader_lib.Reader(path, base=encoder.base) as reader:
    verification.read_all(reader, source)
