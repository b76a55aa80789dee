"""Shards: a model in a folder of several files, with their index.

The index is a JSON file in the format of Hugging Face. It names the shard of each
record, and holds the checksum of each shard's manifest, so that shards of different
runs are not taken for one model.
"""

from collections.abc import Mapping
import fnmatch
import json
import os
import pathlib
from typing import Self

from rotbits_jax.file import container
from rotbits_jax.system import files
from rotbits_jax.system import outputs
from rotbits_jax.system import schema

ContainerError = container.ContainerError

INDEX = 'model.rotbits.index.json'
"""The name of the index in a folder of shards."""

_MOST_INDEX = 1 << 25  # bytes

# A file with such a suffix belongs to a checkpoint, even if it is damaged and cannot be
# read as one.
_CHECKPOINT_SUFFIXES = ('.bin', '.json', '.pt', '.safetensors')


class Metadata(schema.Object):
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


class ShardIndex(schema.Object):
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


def plan(sizes: Mapping[str, int], shard_size: int) -> dict[str, tuple[str, ...]]:
  """Divides records among shards.

  The plan depends only on the sizes before coding, so it is known from the start.

  Args:
    sizes: bytes of each record before coding, in order.
    shard_size: greatest size of the records of a shard; a larger record has a shard to
      itself.

  Returns:
    The records of each shard, by the name of its file, in order.
  """
  groups = outputs.divided(sizes, shard_size)
  names = outputs.numbered('model', '.rotbits', len(groups))
  return dict(zip(names, groups, strict=True))


def write_index(folder: pathlib.Path, shards: Mapping[str, tuple[str, ...]]) -> None:
  """Writes the index of a folder with all shards of a `plan`.

  Raises:
    ContainerError: if a shard is damaged.
    OSError: if one is missing, or the index cannot be written.
  """
  found = {name: container.StreamReader(folder / name) for name in shards}
  index = ShardIndex(
    metadata=Metadata(
      total_size=sum(shard.size for shard in found.values()),
      manifest_crc32={name: shard.manifest_crc32 for name, shard in found.items()},
    ),
    weight_map={record: name for name, own in shards.items() for record in own},
  )
  (folder / INDEX).write_text(f'{json.dumps(schema.dump(index), indent=2)}\n')


def is_encoded(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names an encoded file, a folder of shards, or an index."""
  place = pathlib.Path(path)
  if not place.is_file():
    return (place / INDEX).is_file()
  if place.name == INDEX:
    return True
  try:
    container.StreamReader(place)
  except ContainerError:  # the file is damaged or has another format
    return place.suffix not in _CHECKPOINT_SUFFIXES
  return True


def is_of_set(name: str) -> bool:
  """Returns whether a file in a folder of shards has a name that `plan` gives."""
  return name == INDEX or fnmatch.fnmatch(name, 'model-*-of-*.rotbits')


def is_result(path: pathlib.Path) -> bool:
  """Returns whether a file that exists is an encoded file or an index of shards.

  One that is damaged counts by its suffixes.
  """
  try:
    if path.name == INDEX:
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
    source: a file; or the folder of shards, or their index.

  Returns:
    The files; and their index, if they are shards. The files of an index are in its
    order.

  Raises:
    ContainerError: if the index is damaged or a shard is missing.
  """
  if not isinstance(source, (str, os.PathLike)):
    return [source], None
  path = pathlib.Path(source)
  folder = path.parent if path.name == INDEX else path
  if not (folder / INDEX).is_file():
    return [path], None
  index = ShardIndex.read(folder / INDEX)
  names = list(index.metadata.manifest_crc32)
  for name in names:
    if not (folder / name).is_file():
      raise ContainerError(f'{folder / INDEX}: the shard {name} is missing')
  return [folder / name for name in names], index
