"""Shards: a model in a folder of several files, with their index.

The index is a JSON file in the format of Hugging Face. It names the shard of each
record, and holds the checksum of each shard's manifest, so shards of different
runs are not taken for one model.
"""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib

from rotbits_jax import checkpoints
from rotbits_jax.file import container
from rotbits_jax.system import files
from rotbits_jax.system import schema

INDEX = 'model.rotbits.index.json'
"""The name of the index in a folder of shards."""

_MOST_INDEX = 1 << 25  # bytes


class Metadata(schema.Object):
  """The bytes of all shards, and the CRC-32 of the manifest of each, by its name."""

  total_size: schema.Size
  manifest_crc32: dict[str, schema.Crc32]


class ShardIndex(schema.Object):
  """The content of an index; `weight_map` has the name of each record's shard."""

  metadata: Metadata
  weight_map: dict[str, str]

  def __post_init__(self) -> None:
    names = self.metadata.manifest_crc32
    if not names or not all(checkpoints.is_relative_path(x, levels=1) for x in names):
      raise ValueError('no names of shards')


def write_index(folder: pathlib.Path, shards: Mapping[str, tuple[str, ...]]) -> None:
  """Writes the index of a folder, given the records of each shard by its name."""
  files = {name: container.StreamReader(folder / name) for name in shards}
  homes = {x: files[name] for name, records in shards.items() for x in records}
  index = index_of(list(files.values()), homes)
  (folder / INDEX).write_text(f'{json.dumps(schema.dump(index), indent=2)}\n')


def index_of(
  files: Sequence[container.StreamReader], homes: Mapping[str, container.StreamReader]
) -> ShardIndex:
  """Returns the index of shards, given the one of each record."""
  name_of = lambda file: os.path.basename(file.name)
  metadata = Metadata(
    total_size=sum(file.size for file in files),
    manifest_crc32={name_of(file): file.manifest_crc32 for file in files},
  )
  weight_map = {name: name_of(file) for name, file in homes.items()}
  return ShardIndex(metadata=metadata, weight_map=weight_map)


def find(
  source: container.Readable,
) -> tuple[list[container.Readable], ShardIndex | None]:
  """Returns a file, or the shards of a folder or an index with the index."""
  if not isinstance(source, (str, os.PathLike)):
    return [source], None
  path = files.local_path(source)
  folder = path.parent if path.name == INDEX else path
  if not (folder / INDEX).is_file():
    return [path], None
  with container.naming(str(folder / INDEX)):
    content = files.File.of(folder / INDEX).content(_MOST_INDEX)
    index = schema.decode(ShardIndex, content)
    paths = [folder / name for name in index.metadata.manifest_crc32]
    if missing := [path for path in paths if not path.is_file()]:
      raise container.ContainerError(f'the shard {missing[0].name} is missing')
  return [*paths], index


def is_encoded(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path names an encoded file, a folder of shards, or an index."""
  place = files.local_path(path)
  if not place.is_file():
    return (place / INDEX).is_file()
  try:
    container.StreamReader(place)
  except container.ContainerError:  # it may be damaged
    return place.name == INDEX or place.suffix == '.rotbits'
  return True
