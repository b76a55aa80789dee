"""The writer of files: writes a model to one file or to shards, one unit at a time.

    for units, state in passes.rewrite(context, preset.transform):
      for unit in units:
        writer.add(unit)          # codes the unit and appends it

A unit is a part of a model that decodes on its own; a shard is a file with some of the
units. A hidden folder beside the output, `.<name>.partial`, holds the files until they
are complete. Then they are moved into place, see `outputs`. A journal in the folder
lists the units that are written. If a run is killed, the folder stays, and the next run
with the same input and settings continues after the last unit in it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any, BinaryIO, NamedTuple, Self
import zipfile
import zlib

import jax
import numpy as np
from zlib_ng import zlib_ng

from rotbits_jax import checkpoints
from rotbits_jax import models
from rotbits_jax import passes
from rotbits_jax import presets
from rotbits_jax import structured
from rotbits_jax.coding import weights
from rotbits_jax.file import container
from rotbits_jax.file import fields
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file import packing
from rotbits_jax.file import shards as shards_lib
from rotbits_jax.system import checksums as checksums_lib
from rotbits_jax.system import outputs
from rotbits_jax.system import strict_json

ContainerError = container.ContainerError


class Summary(NamedTuple):
  """Facts about the whole model, which every file or shard contains.

  Attributes:
    preset: the preset with which the model is coded.
    config: config of the model; None for a PyTree of arrays.
    stem: name of the weights and of the slicing JSON in a checkpoint of SliceGPT.
  """

  preset: presets.Preset
  config: models.ModelConfig | None
  stem: str | None


class Sizes(NamedTuple):
  """Numbers and bytes of a unit before it was rewritten."""

  numbers: int
  bytes: int


def check_files(files: Mapping[str, bytes], *others: str) -> None:
  """Checks the files that a container keeps whole, before the work.

  Args:
    files: the files by name.
    others: further names that must be those of files.

  Raises:
    ValueError: if a name is not that of a file in a folder, or the files are too large.
  """
  for name in (*files, *others):
    if not fields.is_file_name(name):
      raise ValueError(f'{name!r} is not the name of a file')
  if sum(map(len, files.values())) > manifest_lib.MOST_FILES:
    raise ValueError(
      f'the files beside the weights have more than {manifest_lib.MOST_FILES} bytes'
    )


def check_leaf(
  path: str, leaf: structured.Structured, layer: int | None = None
) -> None:
  """Checks, before the work, that a structured leaf would come back as it is.

  Args:
    path: path of the parameter.
    leaf: the leaf.
    layer: the layer of the leaf to check; None if the leaf is not stacked.

  Raises:
    ValueError: if it would not come back. It names the parameter.
  """
  if isinstance(leaf, structured.Packed):
    raise ValueError(f'{path}: a packed leaf; store its array(), which is packed again')
  if isinstance(leaf, structured.Dependent) and leaf.eager:
    raise ValueError(
      f'{path}: a leaf of kind {leaf.kind!r} comes back as its array; store that'
    )
  try:
    own = leaf if layer is None else leaf.layer(layer)
    settings, arrays = own.stored()
    found = structured.KINDS[leaf.kind].from_stored(settings, arrays)
  # A leaf that is stacked, or should be, raises any of these.
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise ValueError(f'{path}: it cannot be stored: {error}') from error
  if not structured.same_bits(found, own):
    raise ValueError(f'{path}: it has more than leaves of kind {leaf.kind!r} store')


def stream_names(
  units: Iterable[str], files: Iterable[str], weights: Iterable[str] = ()
) -> list[str]:
  """Returns the names of the streams of units, other files and weights files."""
  others = [f'{manifest_lib.FILES}{name}' for name in files]
  return [*units, *others, *(f'{manifest_lib.REST}{name}' for name in weights)]


class FileWriter:
  """Writes one container: a whole model, or a shard of one."""

  def __init__(
    self,
    file: BinaryIO,
    summary: Summary,
    units: Sequence[str],
    files: Mapping[str, bytes],
    weights: Sequence[str] = (),
  ):
    """Reserves room for the header.

    Args:
      file: empty, or what an earlier run left; open for reading and writing.
      summary: of the model.
      units: names of the units that will come, in order.
      files: other files to keep, whole.
      weights: names of the weights files that will come, see `add_weights`.

    Raises:
      ValueError: if two streams would have one name.
    """
    message = () if summary.preset.message is None else manifest_lib.MESSAGE
    names = stream_names((*units, *message), files, weights)
    self._streams = container.StreamWriter(file, names)
    self._file, self._summary, self._files = file, summary, files
    self._units: list[manifest_lib.Record] = []
    self._message: manifest_lib.Message | None = None
    self._weights: list[manifest_lib.WeightsFile] = []

  def add(
    self,
    unit: passes.Record,
    sizes: Sizes,
    beside: models.Params,
  ) -> manifest_lib.Record:
    """Codes a unit and appends it.

    Args:
      unit: the unit.
      sizes: see `Sizes`.
      beside: the parameters that dependent leaves of the unit need.

    Returns:
      The entry of the unit in the manifest.

    Raises:
      ValueError: if a reader would refuse the unit. It names the parameter.
    """
    entry, data = encode_record(unit, sizes, beside, self._summary)
    nbytes, crc = self._streams.append(unit.name, [data])
    entry = dataclasses.replace(entry, nbytes=nbytes, crc32=crc)
    self._units.append(entry)
    return entry

  def keep(self, entry: manifest_lib.Record) -> bool:
    """Takes over a unit that an earlier run wrote, and returns True.

    If the unit is damaged, cuts it off and returns False.
    """
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
    """Appends a piece to a stream that is not a unit."""
    self._streams.extend(name, part)

  def close(self, name: str) -> manifest_lib.Stream:
    """Ends a stream that is not a unit; returns its entry in the manifest."""
    nbytes, crc = self._streams.close(name)
    return manifest_lib.Stream(name=name, nbytes=nbytes, crc32=crc)

  def set_message(self, message: manifest_lib.Message) -> None:
    """Says that the model is on one message, whose streams are appended."""
    self._message = message

  def add_weights(
    self, layout: checkpoints.WeightsFile, rest: Iterable[memoryview]
  ) -> None:
    """Appends what is between the tensors of a weights file, in order."""
    name = f'{manifest_lib.REST}{layout.name}'
    packer = zlib.compressobj(9)
    for part in rest:
      self.extend(name, np.frombuffer(packer.compress(part), np.uint8))
    self.extend(name, np.frombuffer(packer.flush(), np.uint8))
    entry = manifest_lib.WeightsFile(layout=layout, rest=self.close(name))
    self._weights.append(entry)

  def finish(self) -> None:
    """Appends the other files and the manifest, and writes the header.

    Raises:
      ValueError: if a reader would refuse the manifest.
    """
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
      weights=tuple(self._weights),
    )
    data = manifest.to_bytes()
    try:
      manifest_lib.Manifest.from_bytes(data)
    except ContainerError as error:
      raise ValueError(f'the model cannot be stored: {error}') from error
    self._file.truncate()
    self._streams.finish(data)
    self._file.flush()


def encode_record(
  unit: passes.Record, sizes: Sizes, beside: models.Params, summary: Summary
) -> tuple[manifest_lib.Record, np.ndarray]:
  """Codes a unit.

  Args:
    unit: the unit.
    sizes: see `Sizes`.
    beside: the parameters that dependent leaves of the unit need.
    summary: facts about the model.

  Returns:
    The entry of the unit in the manifest, without the checksum of the stream; and the
    stream.

  Raises:
    ValueError: if a reader would refuse a parameter. It names the parameter.
  """
  neurons: dict[str, int] = {}
  config, is_layer = summary.config, models.names.layer_index(unit.name) is not None
  if summary.preset.order_neurons and config is not None and is_layer:
    valid = models.layout.symmetries(config).neurons
    neurons = models.layout.neuron_axes(config) if valid else {}
  # Weights may be transposed views of a checkpoint's maps. They are copied once, here.
  flat = {
    path: weights.contiguous(np.asarray(leaf)) if structured.is_plain(leaf) else leaf
    for path, leaf in structured.flatten(unit.params).items()
  }
  digests = {
    path: checksums_lib.of_array(leaf.array())
    for path, leaf in flat.items()
    if isinstance(leaf, structured.Packed)
  }
  rounding = summary.preset.rounding
  if rounding is None or not rounding.uniform:
    # `rewrite` has packed arrays in place of a uniform rounding.
    plain = {path: x for path, x in flat.items() if structured.is_plain(x)}
    for path, found in packing.pack(plain).items():
      flat[path], digests[path] = found, checksums_lib.of_array(plain[path])
  if any(structured.is_structured(flat.get(path)) for path in neurons):
    neurons = {}  # neurons of a structured leaf cannot be reordered
  leaves: list[manifest_lib.Leaf] = []
  arrays: list[np.ndarray] = []
  exchangeable: dict[int, int] = {}
  for path, leaf in flat.items():
    if path in neurons:
      exchangeable[len(arrays)] = neurons[path]
    expanded = digests.get(path)
    if isinstance(leaf, structured.Dependent) and leaf.eager:
      others = structured.flatten(beside)
      needed = (structured.materialize(others[name]) for name in leaf.needs)
      expanded = checksums_lib.of_array(leaf.expand(*needed))
    entry, parts = manifest_lib.leaf_of(path, leaf, expanded)
    _check_readable(
      entry, functools.partial(manifest_lib.Leaf.from_json, where=unit.name)
    )
    leaves.append(entry)
    arrays += parts.values()
  encoded = weights.encode(arrays, exchangeable=exchangeable)
  entry_of_unit = manifest_lib.Record(
    name=unit.name,
    nbytes=encoded.spec.nbytes,
    crc32=0,
    leaves=tuple(leaves),
    coder=encoded.spec,
    input_numbers=sizes.numbers,
    input_bytes=sizes.bytes,
    savings=tuple(unit.savings),
    order_bits=round(float(encoded.order_bits), 1),
    empty=tuple(structured.empty_dicts(unit.params)),
  )
  _check_readable(entry_of_unit, manifest_lib.Record.from_json)
  return entry_of_unit, encoded.data


def _check_readable(
  entry: manifest_lib.Leaf | manifest_lib.Record, parse: Callable[[Any], Any]
) -> None:
  """Refuses an entry that a reader would refuse, because its numbers would be lost.

  Args:
    entry: the entry.
    parse: the function with which a reader makes the entry from JSON.
  """
  try:
    parse(strict_json.loads(json.dumps(entry.to_json(), allow_nan=False)))
  except ContainerError as error:
    raise ValueError(f'it cannot be stored: {error}') from error
  except ValueError as error:
    name = entry.path if isinstance(entry, manifest_lib.Leaf) else entry.name
    raise ValueError(f'{name}: it cannot be stored: {error}') from error


# ---- complete files ------------------------------------------------------------------


class Workspace:
  """The hidden folder in which a run writes, so that the next run can resume it.

  The class is a context manager. It removes the folder at the end, unless the run is
  interrupted and the next run can resume it.

  Attributes:
    done: for each unit that is written, the name of its shard and its entry.
    state: leaves of the transform's state after these units; None if unknown.
  """

  def __init__(self, output: pathlib.Path, process: int, fingerprint: str | None):
    """Names the folder.

    Args:
      output: path of the output.
      process: index of this process. Each process writes in a part of the folder.
      fingerprint: a hash of the input and the settings. Records that were written with
        another fingerprint are removed. None if the input has no fingerprint; then no
        units are taken over.
    """
    self._root = outputs.staging(output)
    self._process, self._folder = process, self._root / f'process-{process}'
    self._journal = self._folder / 'journal.jsonl'
    self._fingerprint = fingerprint
    self.done: list[tuple[str, manifest_lib.Record]] = []
    self.state: list[np.ndarray] | None = None

  def __enter__(self) -> Self:
    """Makes the folder, or takes over the units in it.

    Raises:
      OSError: if the folder cannot be written, or if another process writes in it.
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
    """Removes the folder, or keeps it for the next run."""
    interrupted = kind is not None and not issubclass(kind, Exception)
    with self._stack:
      if not (interrupted and self.done and self._fingerprint):
        # An earlier run may have had more processes. The first process removes all
        # parts of the folder.
        first = kind is None and not self._process
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
    entries: Mapping[shards_lib.Shard, Sequence[manifest_lib.Record]],
    state: passes.State,
  ) -> None:
    """Records in the journal that units are written, and the state after them.

    Args:
      entries: the entries of the units, by shard.
      state: the state of the transform after these units.
    """
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
    """Forgets all but the first `count` units, because a later one is damaged."""
    self.done, self.state = self.done[:count], None
    self._keep_lines(count)

  def _keep_lines(self, count: int) -> None:
    """Cuts off the journal after the first `count` units."""
    head = self._journal.read_text().splitlines()[: count + 1]
    self._journal.write_text(''.join(f'{line}\n' for line in head))

  def _read(self, fingerprint: str) -> bool:
    """Reads the journal of an earlier run.

    Returns False if there is no journal with this fingerprint.
    """
    try:
      lines = self._journal.read_text().splitlines()
      if json.loads(lines[0]) != {'fingerprint': fingerprint}:
        return False
    except (OSError, ValueError, IndexError):
      return False
    for line in lines[1:]:
      try:
        name, entry = json.loads(line)
        self.done.append((name, manifest_lib.Record.from_json(entry)))
      except (ValueError, TypeError):  # the run was killed while it wrote this line
        break
    self._keep_lines(len(self.done))  # the next line must not follow half a line
    state = self._folder / f'state-{len(self.done)}.npz'
    # The file may be cut short after a crash of the machine. NumPy then raises one of
    # these errors, because its numbers have checksums.
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
    # NumPy does not close a damaged file that it opened itself.
    with (
      contextlib.suppress(*damaged),
      state.open('rb') as file,
      np.load(file) as arrays,
    ):
      self.state = [arrays[f'arr_{i}'] for i in range(len(arrays.files))]
    return True
