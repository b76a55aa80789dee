"""Containers taken apart and put together again, with the checksums made right."""

from collections.abc import Mapping
import io
import json
from typing import Any
import zlib

import numpy as np

from rotbits_jax.file import container

Json = dict[str, Any]


def sections(data: bytes) -> list[tuple[str, int, int]]:
  """Returns name, start and stop of the header and of each stream of a container."""
  sizes = container.StreamReader(data).sizes
  start = len(data) - sum(sizes.values())
  places = [('', 0, start)]
  for name, size in sizes.items():
    places.append((name, start, start + size))
    start += size
  return places


def unpack(data: bytes) -> tuple[dict[str, bytes], Json]:
  """Returns the streams of a container without the manifest, and the manifest."""
  streams = {name: data[start:stop] for name, start, stop in sections(data)[1:]}
  del streams[container.MANIFEST]
  return streams, json.loads(container.StreamReader(data).manifest())


def pack(streams: Mapping[str, bytes], manifest: bytes) -> bytes:
  """Makes a container of streams, with the checksum of the manifest."""
  file = io.BytesIO()
  writer = container.StreamWriter(file, list(streams))
  for name, data in streams.items():
    writer.append(name, np.frombuffer(data, np.uint8))
  writer.finish(manifest)
  return file.getvalue()


def sealed(streams: Mapping[str, bytes], manifest: Json) -> Json:
  """Returns the manifest with correct checksums of the streams."""
  crc = {name: zlib.crc32(data) for name, data in streams.items()}
  records = manifest.get('records')
  for record in records if isinstance(records, list) else []:
    name = record.get('name') if isinstance(record, dict) else None
    if isinstance(name, str) and name in crc:
      record['crc32'] = crc[name]
  message = manifest.get('message')
  parts = message.get('streams') if isinstance(message, dict) else None
  for prefix, entries in (('', parts), ('files/', manifest.get('files'))):
    for name, entry in entries.items() if isinstance(entries, dict) else ():
      if isinstance(entry, list) and len(entry) > 1 and f'{prefix}{name}' in crc:
        entry[1] = crc[f'{prefix}{name}']
  return manifest


def to_json(value: Any) -> bytes:
  """Returns JSON text; numbers may be infinite or NaN."""
  return json.dumps(value, separators=(',', ':')).encode()
