"""Shards: a model in several files, with an index beside them.

The index is a JSON file in the format of Hugging Face. It names the shard of each
record, and holds the checksum of each shard's manifest, so that shards of different
runs are not taken for one model.

The name of a shard has this checksum, too. So the shards of a new result lie beside
those of an older one, and the result is replaced when its index is, at once. The shards
that no index names are removed afterwards.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import re
from typing import NamedTuple, Self

from rotbits_jax.file import container
from rotbits_jax.system import files
from rotbits_jax.system import outputs
from rotbits_jax.system import schema

ContainerError = container.ContainerError

INDEX = '.index.json'
"""The end of the name of an index."""

_MOST_INDEX = 1 << 25  # bytes

# A file with such a suffix belongs to a checkpoint, even if it is damaged and cannot be
# read as one.
_CHECKPOINT_SUFFIXES = ('.bin', '.json', '.pt', '.safetensors')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
  """Facts about the shards.

  Attributes:
    total_size: bytes of all shards.
    manifest_crc32: CRC-32 of the manifest of each shard, by the name of the shard.
  """

  total_size: schema.Size
  manifest_crc32: dict[str, schema.Crc32]

  def __post_init__(self) -> None:
    if not self.manifest_crc32:
      raise ValueError('it names no shards')
    for name in self.manifest_crc32:
      if not schema.is_file_name(name):
        raise ValueError(f'{name!r:.100} is not the name of a shard')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardIndex:
  """The content of an index.

  Attributes:
    metadata: facts about the shards.
    weight_map: the name of the shard of each record, by the name of the record.
  """

  metadata: Metadata
  weight_map: dict[str, str]

  def __post_init__(self) -> None:
    for name in self.weight_map.values():
      if name not in self.metadata.manifest_crc32:
        raise ValueError(f'{name!r:.100} is not the name of a shard')

  @classmethod
  def read(cls, path: pathlib.Path) -> Self:
    """Reads an index.

    Raises:
      ContainerError: if the file is not an index.
      OSError: if it cannot be read.
    """
    opened = files.File.of(path)
    if opened.size > _MOST_INDEX:
      raise ContainerError(f'{path}: an index has at most {_MOST_INDEX} bytes')
    value = container.parse_json(opened.content(), 'index')
    try:
      return schema.load(cls, value, str(path))
    except ValueError as error:
      raise ContainerError(str(error)) from error


class Shard(NamedTuple):
  """A file of the output: its name, and the names of the records in it.

  `plan` gives it a name before the file is there, and `published` the final one.
  """

  name: str
  records: tuple[str, ...]


def plan(
  path: pathlib.Path, sizes: Mapping[str, int], shard_size: int | None, least: int
) -> list[Shard]:
  """Divides records among files.

  The plan depends only on the sizes before coding, so it is known from the start. The
  records of no file exceed `shard_size` then, unless a single one does.

  Args:
    path: path of the output.
    sizes: bytes of each record before coding, in order.
    shard_size: greatest size of the records of a shard; None for no limit.
    least: the least number of shards, if there are enough records.

  Returns:
    The shards, in order.
  """
  if least > 1:
    even = -(-sum(sizes.values()) // least)
    shard_size = even if shard_size is None else min(shard_size, even)
  groups = outputs.divided(sizes, shard_size)
  if len(groups) == 1 and shard_size is None:
    return [Shard(path.name, groups[0])]
  names = outputs.numbered(path.stem, path.suffix, len(groups))
  return [Shard(*pair) for pair in zip(names, groups, strict=True)]


def index_name(path: pathlib.Path) -> str:
  """Returns the name of the index that is written beside the shards of an output."""
  return f'{path.name}{INDEX}'


def published(path: pathlib.Path, shard: Shard, file: pathlib.Path) -> Shard:
  """Returns a complete shard with its final name, which has its checksum.

  Args:
    path: path of the output.
    shard: the shard, as `plan` named it.
    file: the current path of the shard's file.
  """
  checksum = container.StreamReader(file).manifest_crc32
  return shard._replace(name=_with_checksum(path, shard.name, checksum))


def check_name(path: pathlib.Path) -> None:
  """Checks, before the work, that an index may have the names of an output's shards.

  Raises:
    ValueError: if it may not.
  """
  (name,) = outputs.numbered(path.stem, path.suffix, 1)
  if not schema.is_file_name(_with_checksum(path, name, 0)):
    raise ValueError(
      f'{path}: the name of shards must be printable, without a backslash, and have at '
      'most 231 bytes'
    )


def _with_checksum(path: pathlib.Path, name: str, checksum: int) -> str:
  return f'{name.removesuffix(path.suffix)}-{checksum:08x}{path.suffix}'


def existing(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the shards of an output that lie beside it, even if no index names them.

  A file is a shard if it has the name of one and is a container, and if the checksum in
  the name is its own.

  Args:
    path: path of the output.
  """
  stem, suffix = re.escape(path.stem), re.escape(path.suffix)
  name = re.compile(f'{stem}-[0-9]{{5,}}-of-[0-9]{{5,}}-([0-9a-f]{{8}}){suffix}')
  found = []
  for file in sorted(path.parent.iterdir()):
    match = name.fullmatch(file.name)
    if match is None or file.is_symlink():
      continue
    with contextlib.suppress(ContainerError, OSError):
      checksum = container.StreamReader(file).manifest_crc32
      if match[1] == f'{checksum:08x}':
        found.append(file)
  return found


def remove_unnamed(path: pathlib.Path) -> None:
  """Removes the shards of an output that its index does not name.

  An older result left them, or a run that was killed. If the index is damaged, all
  shards stay.

  Args:
    path: path of the output.
  """
  index = path.with_name(index_name(path))
  named: Mapping[str, int] = {}
  if index.exists():
    try:
      named = ShardIndex.read(index).metadata.manifest_crc32
    except ContainerError:
      return
  for file in existing(path):
    if file.name not in named:
      file.unlink()


def write_index(path: pathlib.Path, shards: Mapping[Shard, pathlib.Path]) -> None:
  """Writes the index of shards, with the checksum of each shard's manifest.

  The checksums show whether all shards were written by one run.

  Args:
    path: path of the index.
    shards: the current path of each shard's file.
  """
  metadata = Metadata(
    total_size=sum(file.stat().st_size for file in shards.values()),
    manifest_crc32={
      shard.name: container.StreamReader(file).manifest_crc32
      for shard, file in shards.items()
    },
  )
  names = {record: shard.name for shard in shards for record in shard.records}
  index = ShardIndex(metadata=metadata, weight_map=names)
  path.write_text(f'{json.dumps(schema.dump(index), indent=2)}\n')


def is_encoded(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names an encoded file, its shards, or their index."""
  name = os.fspath(path)
  if not os.path.isfile(name):
    return os.path.isfile(f'{name}{INDEX}')
  others = f'.safetensors{INDEX}', f'.bin{INDEX}'  # of checkpoints
  if name.endswith(INDEX) and not name.endswith(others):
    return True
  try:
    container.StreamReader(name)
  except ContainerError:  # the file is damaged or has another format
    return pathlib.Path(name).suffix not in _CHECKPOINT_SUFFIXES
  return True


def is_result(path: pathlib.Path) -> bool:
  """Returns whether a file that exists is an encoded file or an index of shards.

  One that is damaged counts by its suffixes.
  """
  try:
    if path.name.endswith(INDEX):
      ShardIndex.read(path)
    else:
      container.StreamReader(path)
  except ContainerError:
    return '.rotbits' in path.suffixes
  return True


def find(
  source: container.Readable,
) -> tuple[list[container.Readable], ShardIndex | None]:
  """Finds the files of a source.

  Args:
    source: a file; or the path of an index, or of the output without the numbers.

  Returns:
    The files; and their index, if they are shards. The files of an index are in its
    order.

  Raises:
    ContainerError: if the index is damaged or a shard is missing.
  """
  if not isinstance(source, (str, os.PathLike)):
    return [source], None
  path = pathlib.Path(source)
  index = path.with_name(index_name(path))
  if path.name.endswith(INDEX):
    index = path
  elif path.exists() or not index.exists():
    return [path], None
  found = ShardIndex.read(index)
  names = list(found.metadata.manifest_crc32)
  for name in names:
    if not (index.parent / name).is_file():
      raise ContainerError(f'{index}: the shard {name} is missing')
  return [index.parent / name for name in names], found
