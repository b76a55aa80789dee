"""Writes a model, a unit at a time, to one file or to shards.

    for units, state in symmetries.rewrite(context, preset.transform):
      for unit in units:
        writer.add(unit)          # coded, appended, and noted in a journal

A hidden folder beside the output, `.<name>.partial`, holds all that is written until
it is complete. Then it is moved into place, see `outputs`. A run that was killed leaves
the folder, and the next one with the same input and settings goes on behind the last
unit in it.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import pathlib
import shutil
from typing import BinaryIO, NamedTuple, Self
import zipfile
import zlib

import jax
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import models
from rotbits_jax import outputs
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import container
from rotbits_jax.file import fields
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.symmetries import transform


class Summary(NamedTuple):
  """What every file or shard says of the whole.

  Attributes:
    preset: how the model is coded.
    config: of the model; None for a PyTree of arrays.
    stem: the checkpoint's name, for writing it in its own format.
  """

  preset: presets.Preset
  config: models.ModelConfig | None
  stem: str | None


class Sizes(NamedTuple):
  """What a unit had before it was rewritten."""

  numbers: int
  bytes: int


class FileWriter:
  """One container: a whole model, or a shard of one."""

  def __init__(
    self,
    file: BinaryIO,
    summary: Summary,
    units: Sequence[str],
    files: Mapping[str, bytes],
  ):
    """Reserves room for the header.

    Args:
      file: empty, or what an earlier run left; open for reading and writing.
      summary: of the model.
      units: names of the units that will come, in order.
      files: other files to keep, whole.

    Raises:
      ValueError: if a file's name leads elsewhere, or the files are too large.
    """
    for name in files:
      if not fields.is_file_name(name):
        raise ValueError(f'{name!r:.200} is not the name of a file')
    if sum(map(len, files.values())) > manifest_lib.MOST_FILES:
      raise ValueError(
        f'the files beside the weights have more than {manifest_lib.MOST_FILES} bytes'
      )
    others = [f'{manifest_lib.FILES}{name}' for name in files]
    names = units if summary.preset.message is None else (*units, *manifest_lib.MESSAGE)
    self._streams = container.StreamWriter(file, [*names, *others])
    self._file, self._summary, self._files = file, summary, files
    self._units: list[manifest_lib.Unit] = []
    self._message: manifest_lib.Message | None = None

  def add(
    self,
    unit: transform.Unit,
    sizes: Sizes,
    beside: models.Params,
  ) -> manifest_lib.Unit:
    """Codes a unit and appends it.

    Args:
      unit: the unit.
      sizes: see `Sizes`.
      beside: the other parameters that a leaf of the unit may need.

    Returns:
      Its entry in the manifest.
    """
    entry, data = encode_unit(unit, sizes, beside, self._summary)
    nbytes, crc = self._streams.append(unit.name, [data])
    entry = dataclasses.replace(entry, nbytes=nbytes, crc32=crc)
    self._units.append(entry)
    return entry

  def keep(self, entry: manifest_lib.Unit) -> bool:
    """Takes over a unit that an earlier run has written, if it is undamaged."""
    begin = self._streams.start + sum(unit.nbytes for unit in self._units)
    self._file.seek(begin)
    if zlib_ng.crc32(self._file.read(entry.nbytes)) != entry.crc32:
      self._file.seek(begin)
      self._file.truncate()
      return False
    self._streams.keep(entry.name, entry.nbytes)
    self._units.append(entry)
    return True

  def extend(self, name: str, part: np.ndarray) -> None:
    """Appends a piece of a part of a message of bits-back coding."""
    self._streams.extend(name, part)

  def close(self, name: str) -> manifest_lib.Stream:
    """Ends a part of a message."""
    nbytes, crc = self._streams.close(name)
    return manifest_lib.Stream(name=name, nbytes=nbytes, crc32=crc)

  def set_message(self, message: manifest_lib.Message) -> None:
    """Says that the model is on one message, whose streams are appended."""
    self._message = message

  def finish(self) -> manifest_lib.Manifest:
    """Appends the other files and the manifest, and writes the header."""
    files, sizes = [], []
    for name, data in self._files.items():
      packed = np.frombuffer(zlib.compress(data, 9), np.uint8)
      self.extend(f'{manifest_lib.FILES}{name}', packed)
      files.append(self.close(f'{manifest_lib.FILES}{name}'))
      sizes.append(len(data))
    summary = self._summary
    manifest = manifest_lib.Manifest(
      preset=summary.preset.name,
      options=summary.preset.options,
      config=summary.config,
      stem=summary.stem,
      units=tuple(self._units),
      message=self._message,
      files=tuple(files),
      sizes=tuple(sizes),
    )
    self._file.truncate()
    self._streams.finish(manifest.to_bytes())
    self._file.flush()
    return manifest


def encode_unit(
  unit: transform.Unit, sizes: Sizes, beside: models.Params, summary: Summary
) -> tuple[manifest_lib.Unit, np.ndarray]:
  """A unit's entry in the manifest, without the stream's checksum, and the stream."""
  neurons: dict[str, int] = {}
  config, is_layer = summary.config, manifest_lib.layer_index(unit.name) is not None
  if summary.preset.order_neurons and config is not None and is_layer:
    valid = models.layout.symmetries(config).neurons
    neurons = models.layout.neuron_axes(config) if valid else {}
  flat = structured.flatten(unit.params)
  if any(structured.is_structured(flat.get(path)) for path in neurons):
    neurons = {}  # its neurons have their places
  leaves: list[manifest_lib.Leaf] = []
  arrays: list[np.ndarray] = []
  exchangeable: dict[int, int] = {}
  for path, leaf in flat.items():
    if path in neurons:
      exchangeable[len(arrays)] = neurons[path]
    expanded = None
    if isinstance(leaf, structured.Dependent) and leaf.eager:
      others = structured.flatten(beside)
      needed = (structured.materialize(others[name]) for name in leaf.needs)
      expanded = zlib_ng.crc32(
        np.ascontiguousarray(leaf.expand(*needed)).view(np.uint8)
      )
    entry, parts = manifest_lib.leaf_of(path, leaf, expanded)
    leaves.append(entry)
    arrays += parts.values()
  encoded = weights.encode(arrays, exchangeable=exchangeable)
  entry_of_unit = manifest_lib.Unit(
    name=unit.name,
    nbytes=encoded.spec.nbytes,
    crc32=0,
    leaves=tuple(leaves),
    coder=encoded.spec,
    input_numbers=sizes.numbers,
    input_bytes=sizes.bytes,
    savings=tuple(unit.savings),
    order_bits=round(float(encoded.order_bits), 1),
  )
  return entry_of_unit, encoded.data


# ---- a file, or shards, that are complete or not there -------------------------------


class Shard(NamedTuple):
  """A part of the output: the name of its file, and the units in it."""

  name: str
  units: tuple[str, ...]


def plan_shards(
  path: pathlib.Path, sizes: Mapping[str, int], shard_size: int | None, least: int
) -> list[Shard]:
  """Divides units among files.

  The plan depends on the sizes before coding only, so that it is known from the start,
  and no file exceeds the size, unless one unit does.

  Args:
    path: of the output.
    sizes: bytes of each unit before coding, in order.
    shard_size: bytes of a shard, at most; None for no limit.
    least: how many shards there must be, if there are units enough.

  Returns:
    The shards, in order.
  """
  total = sum(sizes.values())
  if least > 1:
    even = -(-total // least)
    shard_size = even if shard_size is None else min(shard_size, even)
  groups: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if shard_size is not None and groups[-1] and filled + size > shard_size:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += size
  if len(groups) == 1 and shard_size is None:
    return [Shard(path.name, tuple(groups[0]))]
  count = len(groups)
  return [
    Shard(f'{path.stem}-{i:05}-of-{count:05}{path.suffix}', tuple(group))
    for i, group in enumerate(groups, 1)
  ]


def index_name(path: pathlib.Path) -> str:
  """The index that lies beside the shards of an output."""
  return f'{path.name}.index.json'


def write_index(path: pathlib.Path, shards: Mapping[Shard, pathlib.Path]) -> None:
  """Writes the index of shards, with the checksum of each shard's manifest.

  The checksums tell whether all shards are of one run.

  Args:
    path: of the index.
    shards: where the file of each shard is now.
  """
  metadata = {
    'total_size': sum(file.stat().st_size for file in shards.values()),
    'manifest_crc32': {
      shard.name: container.StreamReader(file).manifest_crc32
      for shard, file in shards.items()
    },
  }
  names = {unit: shard.name for shard in shards for unit in shard.units}
  text = json.dumps({'metadata': metadata, 'weight_map': names}, indent=2)
  path.write_text(text + '\n')


class Workspace:
  """The hidden folder in which a run writes, and in which the next one finds it.

  The class is a context manager. It removes the folder in the end, unless the run is
  interrupted and the next one can resume it.

  Attributes:
    done: entries of the units that an earlier run has written, by shard.
    state: leaves of the transform's state behind these, or None.
  """

  def __init__(self, output: pathlib.Path, process: int, fingerprint: str | None):
    """Names the folder.

    Args:
      output: the path of the file to write.
      process: number of this process; each writes in a part of the folder.
      fingerprint: of the input and the settings; what was written with another one is
        removed. None for input that cannot be told apart: nothing is taken over.
    """
    self._root = outputs.staging(output)
    self._process, self._folder = process, self._root / f'process-{process}'
    self._journal = self._folder / 'journal.jsonl'
    self._fingerprint = fingerprint
    self.done: list[tuple[str, manifest_lib.Unit]] = []
    self.state: list[np.ndarray] | None = None

  def __enter__(self) -> Self:
    """Makes the folder, or takes over what is in it.

    Raises:
      OSError: if the folder cannot be written, or another process writes in it.
    """
    if self._root.is_symlink():  # it may lead anywhere
      raise FileExistsError(f'{self._root}: is a symbolic link; remove it')
    with contextlib.ExitStack() as stack:
      stack.callback(self._remove_root)
      stack.enter_context(outputs.locked(self._folder))
      if self._fingerprint is None or not self._read(self._fingerprint):
        self.done, self.state = [], None
        outputs.clear(self._folder)
        first = json.dumps({'fingerprint': self._fingerprint})
        self._journal.write_text(f'{first}\n')
      self._stack = stack.pop_all()
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
    """Removes the folder, or leaves it to the next run."""
    interrupted = kind is not None and not issubclass(kind, Exception)
    with self._stack:
      if not (interrupted and self.done and self._fingerprint):
        # What more processes than now have left goes with the folder of the first.
        first = kind is None and not self._process
        shutil.rmtree(self._root if first else self._folder, ignore_errors=True)

  def _remove_root(self) -> None:
    with contextlib.suppress(OSError):  # another process writes beside this one
      self._root.rmdir()

  def open(self, shard: Shard) -> BinaryIO:
    """A shard's file, for reading and writing from its start."""
    path = self._folder / shard.name
    path.touch()
    return path.open('r+b')

  def path(self, name: str, *, process: int | None = None) -> pathlib.Path:
    """Where a file of this process, or of another one, lies until all is done."""
    folder = self._folder if process is None else self._root / f'process-{process}'
    return folder / name

  def note(
    self,
    entries: Mapping[Shard, Sequence[manifest_lib.Unit]],
    state: transform.State,
  ) -> None:
    """Notes that units are written, and the state behind them."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
    before = len(self.done)
    self.done += [(shard.name, x) for shard, own in entries.items() for x in own]
    with (self._folder / f'state-{len(self.done)}.npz').open('wb') as file:
      np.savez(file, *leaves)
    lines = [json.dumps([name, x.to_json()]) for name, x in self.done[before:]]
    with self._journal.open('a') as journal:
      journal.write(''.join(f'{line}\n' for line in lines))
    (self._folder / f'state-{before}.npz').unlink(missing_ok=True)

  def forget(self, count: int) -> None:
    """Takes back all but the first units, because a later one is damaged."""
    self.done, self.state = self.done[:count], None
    self._keep_lines(count)

  def _keep_lines(self, count: int) -> None:
    """Cuts the journal behind the first units."""
    head = self._journal.read_text().splitlines()[: count + 1]
    self._journal.write_text(''.join(f'{line}\n' for line in head))

  def _read(self, fingerprint: str) -> bool:
    """Reads the journal of an earlier run; False if there is none of this input."""
    try:
      lines = self._journal.read_text().splitlines()
      if json.loads(lines[0]) != {'fingerprint': fingerprint}:
        return False
    except (OSError, ValueError, IndexError):
      return False
    for line in lines[1:]:
      try:
        name, entry = json.loads(line)
        self.done.append((name, manifest_lib.Unit.from_json(entry)))
      except (ValueError, TypeError):  # the line that was being written
        break
    self._keep_lines(len(self.done))  # the next line must not follow half a line
    state = self._folder / f'state-{len(self.done)}.npz'
    # After a crash of the machine it may be cut short; its numbers have checksums.
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
    with contextlib.suppress(*damaged), np.load(state) as arrays:
      self.state = [arrays[f'arr_{i}'] for i in range(len(arrays.files))]
    return True
