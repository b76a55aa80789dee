"""The hidden folder in which a run writes, so that the next run can resume it.

`.<name>.partial` beside the output holds its files until they are complete. A journal
in it lists the records that are written. If a run is killed, the folder stays, and the
next run with the same settings continues after the last record in it that still holds:
the stream must have its checksum, and so must everything that was read from the source
to make it.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import pathlib
import shutil
import types
from typing import Any, BinaryIO, Self
import zipfile
import zlib

import jax
import numpy as np

from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.system import outputs
from rotbits_jax.system import schema
from rotbits_jax.system import strict_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class JournalEntry:
  """A record that is written.

  Attributes:
    shard: name of its shard.
    record: its entry in the manifest.
    sources: CRC-32 of the records of the source that were read for this record, but for
      none of those before it.
  """

  shard: str
  record: manifest_lib.RecordEntry
  sources: dict[str, schema.Crc32]


class Journal:
  """The hidden folder of a run. The class is a context manager.

  It removes the folder at the end, unless the run is interrupted and the next run can
  resume it.

  Attributes:
    done: the records that are written.
    state: leaves of the state of the transform after them; None if unknown.
  """

  def __init__(self, output: pathlib.Path, process: int, fingerprint: str | None):
    """Names the folder.

    Args:
      output: path of the output.
      process: index of this process. Each process writes in a part of the folder.
      fingerprint: a hash of the input and the settings. Records that were written with
        another fingerprint are removed. None if the input has no fingerprint; then no
        records are taken over.
    """
    self._root = outputs.staging(output)
    self._process, self._folder = process, self._root / f'process-{process}'
    self._path = self._folder / 'journal.jsonl'
    self._fingerprint = fingerprint
    self.done: list[JournalEntry] = []
    self.state: list[np.ndarray] | None = None
    self._last: Any = object()  # the state in the file, if this run wrote it

  def __enter__(self) -> Self:
    """Makes the folder, or takes over the records in it.

    Raises:
      OSError: if the folder cannot be written, or if another process writes in it.
    """
    if self._root.is_symlink():  # it may lead anywhere
      raise FileExistsError(f'{self._root}: is a symbolic link; remove it')
    with contextlib.ExitStack() as stack:
      stack.callback(self._remove_root)
      stack.enter_context(outputs.locked(self._folder))
      if self._fingerprint is None or not self._read(self._fingerprint):
        try:
          self._begin()
        except OSError:  # the disk is full
          shutil.rmtree(self._folder, ignore_errors=True)
          raise
      self._stack = stack.pop_all()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    """Removes the folder, or keeps it for the next run and notes that in the error."""
    is_kept = bool(self.done and self._fingerprint)
    with self._stack:
      if is_kept and error is not None and not isinstance(error, Exception):
        error.add_note(
          f'{len(self.done)} records are kept in {self._root}: the same command '
          'continues after them; remove the folder if you do not want that'
        )
        return
      # An earlier run may have had more processes. The first process removes all parts
      # of the folder.
      first = error is None and not self._process
      shutil.rmtree(self._root if first else self._folder, ignore_errors=True)

  def _remove_root(self) -> None:
    with contextlib.suppress(OSError):  # another process writes beside this one
      self._root.rmdir()

  def open(self, shard: shards_lib.Shard) -> BinaryIO:
    """Opens a shard's file for reading and writing, at its start."""
    path = self._folder / shard.name
    path.touch()
    return path.open('r+b')

  def path(self, name: str, *, process: int | None = None) -> pathlib.Path:
    """Returns the path of a file in the folder of this process, or of another one."""
    folder = self._folder if process is None else self._root / f'process-{process}'
    return folder / name

  def note(
    self,
    records: Sequence[tuple[str, manifest_lib.RecordEntry]],
    sources: Mapping[str, int],
    state: Any,
  ) -> None:
    """Records that records are written, and the state after them.

    Args:
      records: the name of the shard and the entry of each.
      sources: see `Source.checksums`. Those that earlier records have in the journal
        are left out.
      state: the state of the transform after these records, a PyTree of arrays.
    """
    before, known = len(self.done), {x for entry in self.done for x in entry.sources}
    new = {name: x for name, x in sources.items() if name not in known}
    for shard, record in records:
      self.done.append(JournalEntry(shard=shard, record=record, sources=new))
      new = {}
    if state is self._last:
      self._state_path(before).rename(self._state_path(len(self.done)))
    else:
      with self._state_path(len(self.done)).open('wb') as file:
        np.savez(file, *jax.device_get(jax.tree.leaves(state)))
      self._last = state
    with self._path.open('a') as journal:
      for entry in self.done[before:]:
        journal.write(f'{json.dumps(schema.dump(entry))}\n')
    self._state_path(before).unlink(missing_ok=True)

  def forget(self, count: int) -> None:
    """Forgets all but the first `count` records, because a later one does not hold."""
    self.done, self.state = self.done[:count], None
    self._keep_lines(count)

  def _begin(self) -> None:
    self.done, self.state = [], None
    outputs.clear(self._folder)
    self._path.write_text(f'{json.dumps({"fingerprint": self._fingerprint})}\n')

  def _keep_lines(self, count: int) -> None:
    """Cuts off the journal after the first `count` records."""
    head = self._path.read_text().splitlines()[: count + 1]
    self._path.write_text(''.join(f'{line}\n' for line in head))

  def _state_path(self, count: int) -> pathlib.Path:
    return self._folder / f'state-{count}.npz'

  def _read(self, fingerprint: str) -> bool:
    """Reads the journal of an earlier run.

    Returns False if there is no journal with this fingerprint.
    """
    try:
      lines = self._path.read_text().splitlines()
      if json.loads(lines[0]) != {'fingerprint': fingerprint}:
        return False
    except (OSError, ValueError, IndexError):
      return False
    for line in lines[1:]:
      try:
        self.done.append(schema.load(JournalEntry, strict_json.loads(line), 'journal'))
      except ValueError:  # the run was killed while it wrote this line
        break
    self._keep_lines(len(self.done))  # the next line must not follow half a line
    # The file may be cut short after a crash of the machine. NumPy then raises one of
    # these errors, because its elements have checksums.
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
    # NumPy does not close a damaged file that it opened itself.
    with (
      contextlib.suppress(*damaged),
      self._state_path(len(self.done)).open('rb') as file,
      np.load(file) as arrays,
    ):
      self.state = [arrays[f'arr_{i}'] for i in range(len(arrays.files))]
    return True
