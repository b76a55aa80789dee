"""Shards: a model in several files, with an index beside them.

The index is a JSON file in the format of Hugging Face. It names the shard of each unit,
and holds the checksum of each shard's manifest, so that shards of different runs are
not taken for one model.

The name of a shard has this checksum, too. So the shards of a new result lie beside
those of an older one, and the result is replaced when its index is, at once. The shards
that no index names are removed afterwards.
"""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import re
from typing import NamedTuple

from rotbits_jax.file import container
from rotbits_jax.file import fields

ContainerError = container.ContainerError


class Index(NamedTuple):
  """The content of an index.

  Attributes:
    total_size: bytes of all shards.
    checksums: CRC-32 of the manifest of each shard, by the name of the shard.
    units: the name of the shard of each unit, by the name of the unit.
  """

  total_size: int
  checksums: dict[str, int]
  units: dict[str, str]

  @classmethod
  def from_bytes(cls, data: bytes, where: str) -> 'Index':
    """Makes an index from the bytes of its file.

    Args:
      data: the bytes, which may be a stranger's.
      where: path of the index, for error messages.

    Raises:
      ContainerError: if the bytes are not an index.
    """
    given = fields.Fields(container.parse_json(data, 'index'), where)
    metadata = fields.Fields(given.object('metadata'), where)
    size = metadata.integer('total_size')
    checksums, units = metadata.object('manifest_crc32'), given.object('weight_map')
    metadata.finish()
    given.finish()
    if not checksums:
      raise metadata.error('manifest_crc32', 'names no shards')
    for name, checksum in checksums.items():
      if not fields.is_file_name(name):
        raise ContainerError(f'{where}: {name!r} is not the name of a shard')
      if type(checksum) is not int:
        raise metadata.error('manifest_crc32', 'must map shards to integers')
    for name in units.values():
      if not isinstance(name, str) or name not in checksums:
        raise ContainerError(f'{where}: {name!r} is not the name of a shard')
    return cls(size, checksums, units)


class Shard(NamedTuple):
  """A file of the output: its name, and the names of the units in it.

  `plan` gives it a name before the file is there, and `published` the final one.
  """

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


def published(path: pathlib.Path, shard: Shard, file: pathlib.Path) -> Shard:
  """Returns a complete shard with its final name, which has its checksum.

  Args:
    path: path of the output.
    shard: the shard, as `plan` named it.
    file: the current path of the shard's file.
  """
  checksum = container.StreamReader(file).manifest_crc32
  stem = shard.name.removesuffix(path.suffix)
  return shard._replace(name=f'{stem}-{checksum:08x}{path.suffix}')


def existing(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the shards of an output that lie beside it, whether an index names them.

  A file is a shard if it has the name of one and is a container. A checksum in the name
  must be its own; earlier versions of this package wrote names without one.

  Args:
    path: path of the output.
  """
  stem, suffix = re.escape(path.stem), re.escape(path.suffix)
  name = re.compile(f'{stem}-[0-9]{{5,}}-of-[0-9]{{5,}}(?:-([0-9a-f]{{8}}))?{suffix}')
  found = []
  for file in sorted(path.parent.iterdir()):
    match = name.fullmatch(file.name)
    if match is None or file.is_symlink():
      continue
    with contextlib.suppress(ContainerError, OSError):
      checksum = container.StreamReader(file).manifest_crc32
      if match[1] in (None, f'{checksum:08x}'):
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
      named = Index.from_bytes(index.read_bytes(), str(index)).checksums
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
) -> tuple[list[container.Readable], Index | None]:
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
  if path.name.endswith('.index.json'):
    index = path
  elif path.exists() or not index.exists():
    return [path], None
  found = Index.from_bytes(index.read_bytes(), str(index))
  for name in found.checksums:
    if not (index.parent / name).is_file():
      raise ContainerError(f'{index}: the shard {name} is missing')
  return [index.parent / name for name in found.checksums], found
