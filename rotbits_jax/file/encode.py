"""Encoding to memory, or to files that appear when they are complete."""

from collections.abc import Iterable
import contextlib
import io
import os
import pathlib
from typing import Any

import jax

from rotbits_jax.file import inputs as inputs_lib
from rotbits_jax.file import job as job_lib
from rotbits_jax.file import journal as journal_lib
from rotbits_jax.file import reader as reader_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.file import verification
from rotbits_jax.system import outputs
from rotbits_jax.system import progress as progress_lib


def in_memory(job: job_lib.Job, *, progress: bool) -> bytes:
  """Does the work in memory; returns the bytes of the file."""
  memory, shard = io.BytesIO(), shards_lib.Shard('', tuple(job.counts))
  total = sum(x.bytes for x in job.counts.values())
  with progress_lib.Progress('encode', total, 'B', show=progress) as bar:
    job.write([shard], lambda _: memory, bar)
  return memory.getvalue()


class Output:
  """The files that a run writes, see `api.encode_to_file`."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    inputs: Iterable[Any],
    shard_size: int | None,
    overwrite: bool,
  ):
    """Checks the path, before the work.

    Args:
      path: path of the output.
      inputs: the checkpoint and its base, see `inputs.check`.
      shard_size: see `api.encode_to_file`.
      overwrite: whether existing files may be replaced.

    Raises:
      ValueError: if the size is not positive, if the files cannot have such names, or
        if they would replace a file of an input.
      OSError: if the output cannot be written or must not be replaced.
    """
    if shard_size is not None and shard_size < 1:
      raise ValueError(f'shard_size must be positive, got {shard_size}')
    self._process, self._processes = jax.process_index(), jax.process_count()
    self._shard_size = shard_size
    self._is_sharded = shard_size is not None or self._processes > 1
    resolved = outputs.resolved(path)
    self._path = pathlib.Path(path).absolute() if self._is_sharded else resolved
    if self._path.name.endswith(shards_lib.INDEX):
      raise ValueError(f'{path}: {shards_lib.INDEX} is the end of names of indices')
    if self._is_sharded:
      shards_lib.check_name(self._path)
    self._index = self._path.with_name(shards_lib.index_name(self._path))
    self._older = [self._path, self._index]
    for target in self._older:
      outputs.check(target, overwrite=overwrite)
    for target in shards_lib.existing(self._path):
      outputs.check(target, overwrite=overwrite)
      self._older.append(target)
    # A link in a checkpoint's folder may lead to a file elsewhere.
    inputs_lib.check([pathlib.Path(path), *self._older], inputs)

  def write(
    self,
    job: job_lib.Job,
    *,
    check: bool,
    progress: bool,
    accepted: range | None = None,
  ) -> int:
    """Does the work, and moves the files into place.

    Args:
      job: the work.
      check: whether to decode everything that was written before a file is replaced,
        and to compare it with the source if the preset keeps all bits.
      progress: whether to show the progress on stderr.
      accepted: the sizes to accept: files of another size are removed, and nothing
        changes. None for all.

    Returns:
      The bytes of all files that this process wrote.

    Raises:
      ValueError: if the job cannot be divided among files or processes, or if the
        source cannot be stored.
      ContainerError: if the check fails.
      OSError: if a file cannot be written.
    """
    if self._is_sharded and not job.divides:
      raise ValueError(
        f'the preset {job.preset.name!r} writes one message, which cannot be in shards'
      )
    if check and self._processes > 1:
      raise ValueError('check needs one process; verify the file when all are done')
    if job.is_fitted and self._processes > 1:
      raise ValueError('a sliced model beside its dense model needs one process')
    sizes = {name: counts.bytes for name, counts in job.counts.items()}
    shards = shards_lib.plan(self._path, sizes, self._shard_size, self._processes)
    owners = {x: i * self._processes // len(shards) for i, x in enumerate(shards)}
    own = [shard for shard, owner in owners.items() if owner == self._process]
    names = [name for shard in own for name in shard.records]
    total = sum(sizes[name] for name in names)
    fingerprint = job.fingerprint(shards)
    with (
      outputs.named(self._path),
      journal_lib.Journal(self._path, self._process, fingerprint) as journal,
      progress_lib.Progress('encode', total, 'B', show=progress) as bar,
    ):
      if self._process == 0:
        shards_lib.remove_unnamed(self._path)  # a killed run may have left them
      if journal.done:
        bar.write(
          f'found {len(journal.done)} of {len(names)} records of an earlier run'
        )
      with contextlib.ExitStack() as stack:
        open_shard = lambda shard: stack.enter_context(journal.open(shard))
        job.write(own, open_shard, bar, journal)
      self._barrier()
      paths = {x: journal.path(x.name, process=i) for x, i in owners.items()}
      size = sum(paths[shard].stat().st_size for shard in own)
      if accepted is not None and size not in accepted:
        return size
      if check:
        bar.stage('checking')
        self._check(job, journal, paths)
      self._publish(own, journal, paths)
    return size

  def _check(
    self,
    job: job_lib.Job,
    journal: journal_lib.Journal,
    paths: dict[shards_lib.Shard, pathlib.Path],
  ) -> None:
    first = journal.path(self._path.name)
    if self._is_sharded:
      first = journal.path(self._index.name)
      shards_lib.write_index(first, paths)
    expected = job.source if job.preset.keeps == 'bits' else None
    with reader_lib.Reader(first, base=job.base) as reader:
      verification.read_all(reader, expected)

  def _publish(
    self,
    own: list[shards_lib.Shard],
    journal: journal_lib.Journal,
    paths: dict[shards_lib.Shard, pathlib.Path],
  ) -> None:
    """Moves complete files into place, and removes those of an older result.

    Readers get an older result until the index is moved, because the shards of that
    result have other names or the same bytes.
    """
    if not self._is_sharded:
      for shard in own:
        outputs.move(paths[shard], self._path)
      outputs.remove(self._index)
    else:
      published = {
        shard: shards_lib.published(self._path, shard, place)
        for shard, place in paths.items()
      }
      index = journal.path(self._index.name)
      if self._process == 0:
        named = {published[shard]: place for shard, place in paths.items()}
        shards_lib.write_index(index, named)
      self._barrier()
      for shard in own:
        target = self._path.with_name(published[shard].name)
        outputs.move(paths[shard], target)
      self._barrier()
      if self._process == 0:
        outputs.move(index, self._index)
        outputs.remove(self._path)  # an older file, which readers would prefer
    if self._process == 0:
      shards_lib.remove_unnamed(self._path)

  def _barrier(self) -> None:
    if self._processes > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices('rotbits_jax')
