"""What a file has besides records: other files, and headers of weights files."""

from collections.abc import Sequence

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
  entries = [manifest.files for manifest in manifests]
  return _inflated(streams, manifest_lib.FILES, entries)


def headers(streams: Streams, manifests: Manifests) -> dict[str, bytes]:
  """Reads the headers of weights files by the names of these, see `files`."""
  entries = [manifest.headers for manifest in manifests]
  return _inflated(streams, manifest_lib.HEADERS, entries)


def _inflated(
  streams: Streams, prefix: str, entries: Sequence[dict[str, manifest_lib.Deflated]]
) -> dict[str, bytes]:
  """Inflates the streams of each file whose names begin with a prefix."""
  contents, left = dict[str, bytes](), manifest_lib.MOST_FILES
  for file, entries_of_file in zip(streams, entries, strict=True):
    for name, entry in entries_of_file.items():
      left -= entry.size
      with file.errors():
        if left < 0:
          raise ContainerError(
            f'the other files have more than {manifest_lib.MOST_FILES} bytes'
          )
        contents[name] = _inflate(file, f'{prefix}{name}', entry)
  return contents


def _inflate(
  file: container.StreamReader, name: str, entry: manifest_lib.Deflated
) -> bytes:
  """Inflates a stream, and checks the size of its content."""
  content = file.inflated(name, entry.crc32, entry.size)
  if len(content) != entry.size:
    raise ContainerError(f'{name}: it must inflate to {entry.size} bytes')
  return content
