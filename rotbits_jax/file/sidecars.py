"""The content of a file besides its records: the checkpoint's other files, and gaps."""

from collections.abc import Mapping, Sequence

from rotbits_jax.file import container
from rotbits_jax.file import manifest as manifest_lib
from rotbits_jax.file.container import ContainerError

Streams = Sequence[container.StreamReader]
Manifests = Sequence[manifest_lib.Manifest]


def files(streams: Streams, manifests: Manifests) -> dict[str, bytes]:
  """Reads the other files of a checkpoint; returns their bytes by name.

  Args:
    streams: the file, or its shards.
    manifests: the manifest of each.
  """
  found, left = {}, manifest_lib.MOST_FILES
  for file, own in zip(streams, manifests, strict=True):
    for name, entry in own.files.items():
      left -= entry.size
      with file.errors():
        if left < 0:
          raise ContainerError(
            f'the other files have more than {manifest_lib.MOST_FILES} bytes'
          )
        found[name] = _inflate(file, f'{manifest_lib.FILES}{name}', entry)
  return found


def gaps(
  streams: Streams, manifests: Manifests, sizes: Mapping[str, int]
) -> dict[str, bytes]:
  """Reads the bytes between the tensors of each weights file, joined.

  Args:
    streams: see `files`.
    manifests: see `files`.
    sizes: the bytes of each tensor.
  """
  found, left = {}, manifest_lib.MOST_FILES
  for file, own in zip(streams, manifests, strict=True):
    for entry in own.weights:
      with file.errors():
        name = entry.layout.name
        try:
          parts = entry.layout.gaps(sizes)
        except ValueError as error:
          raise ContainerError(str(error)) from error
        size = sum(end - begin for begin, end in parts)
        left -= entry.gaps.size
        if size != entry.gaps.size or left < 0:
          raise ContainerError(f'{name}: it has {size} bytes between its tensors')
        found[name] = _inflate(file, f'{manifest_lib.GAPS}{name}', entry.gaps)
  return found


def _inflate(
  file: container.StreamReader, name: str, entry: manifest_lib.Deflated
) -> bytes:
  """Inflates a stream, and checks the size of its content."""
  content = file.inflated(name, entry.crc32, entry.size)
  if len(content) != entry.size:
    raise ContainerError(f'{name}: it must inflate to {entry.size} bytes')
  return content
