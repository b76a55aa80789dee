"""The container is valid safetensors, is reproducible, and detects damage."""

import io
import json
import struct
import tracemalloc
from unittest import mock
import zlib

import numpy as np
import pytest
import safetensors.numpy

from fuzz import containers
import rotbits_jax
from rotbits_jax.file import container

STREAMS = {
  'layers.0': np.arange(13, dtype=np.uint8),
  'files/\u00fc': np.arange(200, dtype=np.uint8),
  'empty': np.zeros(0, np.uint8),
}
MANIFEST = b'{"units": []}'


def packed(manifest=MANIFEST):
  file = io.BytesIO()
  writer = container.StreamWriter(file, list(STREAMS))
  for name, stream in STREAMS.items():
    nbytes, _ = writer.append(name, stream)
    assert nbytes == stream.size
  writer.finish(manifest)
  return file.getvalue()


def test_round_trip():
  reader = container.StreamReader(packed())
  assert list(reader.sizes) == [*STREAMS, container.MANIFEST]
  for name, stream in STREAMS.items():
    np.testing.assert_array_equal(reader.checked(name, zlib.crc32(stream)), stream)
    assert reader.sizes[name] == stream.size
  with pytest.raises(container.ContainerError, match='the stream is damaged'):
    reader.checked('empty', 1)


def test_parts_of_a_stream_make_its_checksum_in_any_order():
  reader = container.StreamReader(packed())
  for ends in ((0, 9, 0, 0, 9, 13), (9, 13, 0, 9, 0, 0), (0, 0, 0, 13)):
    stream = container.Stream(reader, 'layers.0')
    for start, stop in zip(ends[::2], ends[1::2], strict=True):
      stream.read(start, part := np.empty(stop - start, np.uint8))
      np.testing.assert_array_equal(part, STREAMS['layers.0'][start:stop])
    stream.check(zlib.crc32(STREAMS['layers.0']))
  with pytest.raises(container.ContainerError, match='the stream is damaged'):
    stream.check(0)


def test_any_safetensors_library_opens_it():
  tensors = safetensors.numpy.load(packed())
  assert set(tensors) == {*STREAMS, container.MANIFEST}
  for name, stream in STREAMS.items():
    np.testing.assert_array_equal(tensors[name], stream)


def test_every_truncation_is_noticed():
  data = packed()
  for cut in range(len(data)):
    with pytest.raises(container.ContainerError):
      container.StreamReader(data[:cut])
  with pytest.raises(container.ContainerError, match='too long'):
    container.StreamReader(data + b'x')


def test_every_changed_byte_of_the_header_is_noticed_or_changes_nothing():
  data = packed()
  (length,) = struct.unpack('<Q', data[:8])
  original = container.StreamReader(data)
  for position in range(8 + length):
    damaged = bytearray(data)
    damaged[position] ^= 1 << position % 8
    try:
      reader = container.StreamReader(bytes(damaged))
    except container.ContainerError:
      continue
    same = reader.sizes == original.sizes
    checked = reader.manifest_crc32 == original.manifest_crc32
    # The reader of the streams compares their names with the manifest.
    renamed = reader.sizes.keys() != original.sizes.keys()
    assert renamed or (same and checked) or not checked, position


def test_the_manifest_is_inflated_to_a_size_that_is_bounded():
  text = b' ' * (1 << 21)
  data = packed(text)
  assert container.StreamReader(data).manifest() == text
  assert len(data) > len(text)  # it is not deflated so far
  with mock.patch.object(container, '_MOST_RATIO', 1 << 20):
    bomb = packed(text)
  assert len(bomb) < 1 << 13
  with pytest.raises(container.ContainerError, match='manifest: it must inflate'):
    container.StreamReader(bomb).manifest()


@pytest.mark.parametrize('value', ['[],', '{},', '"ab",'])
def test_the_manifest_of_a_megabyte_takes_little_memory(value):
  text = b'{"preset":[' + value.encode() * (15 * 10**6 // len(value)) + b'0]}'
  filling = np.random.default_rng(0).bytes(978_000)
  with mock.patch.object(container, '_MOST_RATIO', 1 << 20):
    data = containers.pack({'x': filling}, text)
  tracemalloc.start()
  with pytest.raises(container.ContainerError, match='manifest'):
    rotbits_jax.inspect(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 250 * len(data)


def test_headers_that_lie_are_refused():
  changes = (
    lambda h: h.pop('__metadata__'),
    lambda h: h['__metadata__'].update(version='3'),
    lambda h: h['__metadata__'].update(manifest_crc32='x'),
    lambda h: h['__metadata__'].update(more='x'),
    lambda h: h['layers.0'].update(dtype='F32'),
    lambda h: h['layers.0'].update(shape=[-1]),
    lambda h: h['layers.0'].update(shape=[True]),
    lambda h: h['layers.0'].update(data_offsets=[1, 14]),
    lambda h: h['layers.0'].update(more=1),
    lambda h: h.update({'layers.0': [[[[]]]]}),
    lambda h: h.pop('manifest'),
  )
  data = packed()
  (length,) = struct.unpack('<Q', data[:8])
  for change in changes:
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    lying = struct.pack('<Q', len(text)) + text + data[8 + length :]
    with pytest.raises(container.ContainerError):
      container.StreamReader(lying)
