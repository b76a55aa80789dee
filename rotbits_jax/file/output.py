"""Writes an encoded source: to a file, or to a folder of shards.

Both appear at once, when they are complete. A shard is a job of its own: any process
encodes any of them into the hidden folder of the output, and one publishes the set. The
bytes do not depend on who does. The hidden folder is named by a digest of the source
and the settings, so a run that was killed finds the shards that it had written.
"""

from collections.abc import Iterable
import glob
import os
import pathlib
import shutil
import time
from typing import Any
import uuid

import jax

from rotbits_jax import checkpoints
from rotbits_jax.file import encode as encode_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import verification
from rotbits_jax.system import outputs
from rotbits_jax.system import progress as progress_lib

Path = str | os.PathLike[str]

_PAUSE = 0.2  # seconds between two looks for the shards of other processes


def write_file(
  encoder: encode_lib.Encoder,
  path: Path,
  *,
  inputs: Iterable[Any] = (),
  overwrite: bool = True,
  check: bool = False,
  progress: bool = False,
  accepted: range | None = None,
) -> int:
  """Writes one file; returns its bytes.

  Args:
    encoder: encodes the source.
    path: path of the file.
    inputs: the source and the base, see `check_inputs`.
    overwrite: whether an existing file may be replaced.
    check: whether to decode everything before the file appears, and to compare it with
      the source if the preset keeps all bits.
    progress: whether to show the progress on stderr.
    accepted: the sizes to accept: a file of another size is removed. None for all.
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
    path: Path,
    shard_size: int,
    *,
    inputs: Iterable[Any] = (),
    overwrite: bool = True,
  ):
    """Plans the shards; see `write_file`.

    The plan depends only on the sizes before coding. A record that is larger than
    `shard_size` has a shard to itself.
    """
    check_path(path, shard_size, inputs=inputs, overwrite=overwrite)
    if not encoder.can_be_divided:
      raise ValueError(
        f'the preset {encoder.preset.name!r} writes one message, which cannot be in '
        'shards'
      )
    self._encoder, self._target = encoder, outputs.directory_target(path)
    sizes = {name: counts.bytes for name, counts in encoder.counts.items()}
    groups = outputs.divided(sizes, shard_size)
    self._names = outputs.numbered('model', '.rotbits', len(groups))
    self.shards = dict(zip(self._names, groups, strict=True))
    digest = encoder.fingerprint()[:16]
    self._staging = self._target.parent / f'.{self._target.name}.{digest}.partial'
    self._next: tuple[int, Any] = (0, None)  # a shard, and the state before it

  def __len__(self) -> int:
    """Returns the number of shards."""
    return len(self.shards)

  def encode(self, index: int, bar: progress_lib.Progress | None = None) -> None:
    """Encodes a shard, from 0, unless a run has done so before."""
    name = self._names[index]
    records = self.shards[name]
    bar = bar or progress_lib.Progress('encode', 0, 'B', show=False)
    if self._encoder.preset.resumable and (self._staging / name).exists():
      bar.update(self._encoder.nbytes(records))
      return
    self._staging.mkdir(parents=True, exist_ok=True)
    state = self._next[1] if self._next[0] == index else None
    path = self._staging / f'.{name}.{uuid.uuid4().hex}'  # no other process has it
    with outputs.named(self._staging):
      try:
        with path.open('w+b') as file:
          self._next = index + 1, self._encoder.write(file, records, bar, state)
        outputs.move(path, self._staging / name)
      finally:
        path.unlink(missing_ok=True)

  def publish(self, *, check: bool = False) -> None:
    """Makes the folder appear with its index, and removes what earlier runs left.

    With `check` everything is decoded before, see `write_file`.
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

  def write(
    self, *, check: bool = False, progress: bool = False, accepted: range | None = None
  ) -> int:
    """Encodes the shards and publishes them; see `write_file`.

    Process i of `jax.distributed` encodes every n-th shard of n processes, which see
    one file system. The first one publishes the set when all shards are there, and the
    others wait for that. Where sizes are tried, only the first one calls this method.
    """
    process = jax.process_index()
    processes = jax.process_count() if accepted is None else 1
    indices = range(process, len(self), processes)
    records = [x for i in indices for x in self.shards[self._names[i]]]
    size = self._encoder.nbytes(records)
    with progress_lib.Progress('encode', size, 'B', show=progress) as bar:
      for index in indices:
        self.encode(index, bar)
    if process:
      while self._staging.exists():
        time.sleep(_PAUSE)
      return 0
    paths = [self._staging / name for name in self.shards]
    while not all(path.exists() for path in paths if processes > 1):
      time.sleep(_PAUSE)
    size = sum(path.stat().st_size for path in paths)
    if accepted is None or size in accepted:
      self.publish(check=check)
    else:
      self.discard()
    return size


def _check(encoder: encode_lib.Encoder, path: pathlib.Path) -> None:
  """Decodes a file or a folder of shards, see `write_file`."""
  source = encoder.source if encoder.preset.keeps == 'bits' else None
  with reader_lib.Reader(path, base=encoder.base) as reader:
    verification.read_all(reader, source)


# ---- what must not be replaced -------------------------------------------------------


def check_path(
  path: Path, shard_size: int | None, *, inputs: Iterable[Any], overwrite: bool
) -> None:
  """Checks, before the work, that an output can be written, see `write_file`."""
  if shard_size is None:
    target = outputs.resolved(path)
    outputs.check(target, overwrite=overwrite)
    check_inputs([pathlib.Path(path), target], inputs)
    return
  if shard_size < 1:
    raise ValueError(f'shard_size must be positive, got {shard_size}')
  folder = outputs.directory_target(path)
  replaced = outputs.check_replaced(folder, shards_lib.is_of_set, overwrite=overwrite)
  check_inputs(replaced, inputs)


def check_inputs(targets: Iterable[pathlib.Path], inputs: Iterable[Any]) -> None:
  """Checks, before the work, that no file of an input is replaced.

  Args:
    targets: the files that are written, if they exist.
    inputs: paths of checkpoints and encoded files; opened checkpoints and files, with
      the bases of these; or lists of inputs. Those in memory are ignored.
  """
  paths = _input_paths([*inputs])
  for target in filter(os.path.exists, targets):
    named = pathlib.Path(os.path.realpath(target.parent), target.name)
    for path in paths:
      if any(_belongs(place, path) for place in {named, outputs.resolved(target)}):
        raise ValueError(f'{target}: it is a file of an input, {path}')


def _input_paths(value: Any) -> list[Path]:
  """Returns the paths of an input and of its bases; those in memory have none."""
  if isinstance(value, reader_lib.Reader):
    value = value.inputs
  if type(value) in (list, tuple):  # but no Checkpoint, whose stem is no path
    return [path for part in value for path in _input_paths(part)]
  if isinstance(value, checkpoints.PlainFiles):
    return [value.path.parent, value.path]
  if isinstance(value, checkpoints.CheckpointReader):
    value = value.path
  return [value] if isinstance(value, str | os.PathLike) else []


def _belongs(file: pathlib.Path, path: Path) -> bool:
  """Returns whether a file that exists belongs to the input at a path.

  Results of earlier runs (encoded files, pages, and decoded checkpoints in sub-folders)
  do not belong to the checkpoint in whose folder they are.
  """
  real = outputs.resolved(path)
  if file == real or not real.exists():
    return file == real
  if shards_lib.is_encoded(path):
    return file.parent == (real.parent if real.name == shards_lib.INDEX else real)
  if shards_lib.is_result(file) or file.suffix == '.html':
    return False
  parent = path if real.is_dir() else os.path.dirname(path)
  folder = pathlib.Path(os.path.realpath(parent))
  links = [x for x in folder.iterdir() if x.is_symlink()]  # as in a cache of the Hub
  if file.parent == folder or file in map(outputs.resolved, links):
    return True
  is_within = real.is_dir() and file.is_relative_to(folder)
  return is_within and not (file.parent / 'config.json').exists()
