"""What a file keeps of a checkpoint beside its tensors.

These are its other files, whole; and for a checkpoint of an unknown family the layouts
of its weights files, and the bytes between their tensors.
"""

import collections
from collections.abc import Mapping, Sequence
import zlib

from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file.container import ContainerError


def check_places(
  manifests: Sequence[manifest_lib.Manifest], sizes: Mapping[str, int]
) -> None:
  """Checks that the weights files hold each tensor once, and nothing else.

  Args:
    manifests: the manifest of each shard.
    sizes: the bytes of every array in units, by path.

  Raises:
    ContainerError: naming a tensor or a file.
  """
  entries = [entry for own in manifests for entry in own.weights]
  names = [entry.layout.name for entry in entries]
  names += [
    file.name.removeprefix(manifest_lib.FILES)
    for own in manifests
    for file in own.files
  ]
  places = [path for entry in entries for path, _ in entry.layout.places]
  for text in (names, places):
    if twice := [x for x, count in collections.Counter(text).items() if count > 1]:
      raise ContainerError(f'{twice[0]}: the weights files have it twice')
  for path in places:
    if path not in sizes:
      raise ContainerError(f'{path}: a tensor of the weights files is missing')
  placed = set(places)
  for own in manifests:
    for unit in own.units:
      for leaf in unit.leaves:
        if leaf.path not in placed:
          raise ContainerError(
            f'{leaf.path}: no weights file has a place for the tensor'
          )


def rests(
  files: Sequence[container.StreamReader],
  manifests: Sequence[manifest_lib.Manifest],
  sizes: Mapping[str, int],
) -> dict[str, bytes]:
  """Returns what is between the tensors of each weights file, joined.

  Args:
    files: the shards.
    manifests: the manifest of each shard.
    sizes: the bytes of every array in units, by path.

  Raises:
    ContainerError: if a part is damaged, or the tensors do not fit their file.
  """
  found: dict[str, bytes] = {}
  left = manifest_lib.MOST_FILES
  for file, own in zip(files, manifests, strict=True):
    for entry in own.weights:
      with file.errors():
        name = entry.rest.name
        try:
          parts = entry.layout.gaps(sizes)
        except ValueError as error:
          raise ContainerError(str(error)) from error
        data = file.read(name, entry.rest.crc32)
        size = sum(end - begin for begin, end in parts)
        left -= size
        if left < 0:
          raise ContainerError(
            f'{name}: too many bytes of the weights files are not in tensors'
          )
        found[entry.layout.name] = _inflate(name, data, size)
  return found


def others(
  files: Sequence[container.StreamReader], manifests: Sequence[manifest_lib.Manifest]
) -> dict[str, bytes]:
  """Returns the bytes of the other files of the checkpoint, by name.

  Args:
    files: the shards.
    manifests: the manifest of each shard.

  Raises:
    ContainerError: if a file is damaged.
  """
  found = {}
  for file, own in zip(files, manifests, strict=True):
    for entry, size in zip(own.files, own.sizes, strict=True):
      name = entry.name.removeprefix(manifest_lib.FILES)
      with file.errors():
        data = file.read(entry.name, entry.crc32)
        found[name] = _inflate(entry.name, data, size)
  return found


def _inflate(name: str, data: bytes, size: int) -> bytes:
  """Inflates a zlib stream, and checks that its content has `size` bytes."""
  unpacker = zlib.decompressobj()
  try:
    content = unpacker.decompress(data, size + 1)
  except zlib.error as error:
    raise ContainerError(f'{name}: {error}') from error
  if len(content) != size or not unpacker.eof or unpacker.unused_data:
    raise ContainerError(f'{name}: the file must have {size} bytes by the manifest')
  return content
