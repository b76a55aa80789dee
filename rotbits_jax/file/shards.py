"""Shards: a model in several files, with an index beside them.

The index is a JSON file in the format of Hugging Face. It names the shard of each unit,
and holds the checksum of each shard's manifest, so that shards of different runs are
not taken for one model.
"""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any, NamedTuple

from rotbits_jax.file import container
from rotbits_jax.file import fields

ContainerError = container.ContainerError


class Shard(NamedTuple):
  """A file of the output: its name, and the names of the units in it."""

  name: str
  units: tuple[str, ...]


def plan(
  path: pathlib.Path, sizes: Mapping[str, int], shard_size: int | None, least: int
) -> list[Shard]:
  """Divides units among files.

  The plan depends only on the sizes before coding, so it is known from the start. No
  file exceeds `shard_size`, unless a single unit does.

  Args:
    path: path of the output.
    sizes: bytes of each unit before coding, in order.
    shard_size: greatest size of a shard in bytes; None for no limit.
    least: the least number of shards, if there are enough units.

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
  """Returns the name of the index that is written beside the shards of an output."""
  return f'{path.name}.index.json'


def write_index(path: pathlib.Path, shards: Mapping[Shard, pathlib.Path]) -> None:
  """Writes the index of shards, with the checksum of each shard's manifest.

  The checksums show whether all shards were written by one run.

  Args:
    path: path of the index.
    shards: the current path of each shard's file.
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


def find(
  source: container.Readable,
) -> tuple[list[container.Readable], dict[str, Any]]:
  """Finds the files of a source, and the checksums of their manifests in the index.

  Args:
    source: a file; or the path of an index, or of the output without the numbers.

  Returns:
    The files; and the checksums by name of a shard, as the index has them.

  Raises:
    ContainerError: if the index is damaged or a shard is missing.
  """
  if not isinstance(source, (str, os.PathLike)):
    return [source], {}
  path = pathlib.Path(source)
  index = path.with_name(index_name(path))
  if path.name.endswith('.index.json'):
    index = path
  elif path.exists() or not index.exists():
    return [path], {}
  parsed = container.parse_json(index.read_bytes(), 'index')
  found = parsed.get('weight_map') if isinstance(parsed, dict) else None
  if not isinstance(found, dict) or not found:
    raise ContainerError(f'{index}: weight_map must map units to files')
  for name in found.values():
    if not isinstance(name, str) or not fields.is_file_name(name):
      raise ContainerError(f'{index}: {name!r:.100} is not the name of a shard')
    if not (index.parent / name).is_file():
      raise ContainerError(f'{index}: the shard {name} is missing')
  names = dict.fromkeys(found.values())
  metadata = parsed.get('metadata')
  checksums = metadata.get('manifest_crc32') if isinstance(metadata, dict) else None
  if not isinstance(checksums, dict):
    checksums = {}
  return [index.parent / name for name in names], checksums
