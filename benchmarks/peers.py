"""Runs the decoder of this project or of another package in a process.

  python benchmarks/peers.py NAME compress FILE OUTPUT
  python benchmarks/peers.py NAME decompress FILE OUTPUT
  python benchmarks/peers.py NAME serve FILE
  python benchmarks/peers.py NAME time compress FILE OUTPUT
  python benchmarks/peers.py NAME time decode FILE

`compress` compresses a safetensors file with NAME, and `decompress` makes it again, for
benchmarks/dense.py. `serve` decodes FILE to arrays once for each line on stdin. It
prints the seconds, and the CRC-32 of the bytes of all arrays from the first time, for
benchmarks/decode.py. `time` does its work twice and prints the seconds of the second
time, for benchmarks/growth.py. The module imports nothing of this project at its top,
because it must run in a Python that has only the packages of the peers.

`zstd` is the program; it decompresses into a file in memory, which is then mapped.
`zstandard` is its Python library. Both compress at level 3. ZipNN and lmzip run with
one thread for each CPU. OpenZL separates exponents, and takes the best of its entropy
coders for each stream; it has one thread.
"""

from collections.abc import Callable
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any
import zlib

import numpy as np

Arrays = list[Any]


def split(data: Any) -> Arrays:
  """Returns the tensors of a safetensors file as views of its bytes: uint8 arrays."""
  view = np.frombuffer(data, np.uint8)
  start = 8 + int(view[:8].view('<u8')[0])
  header = json.loads(view[8:start].tobytes())
  header.pop('__metadata__', None)
  offsets = [entry['data_offsets'] for entry in header.values()]
  return [view[start + begin : start + end] for begin, end in offsets]


def is_bfloat16(data: bytes) -> bool:
  """Returns whether most tensors of a safetensors file are bfloat16."""
  (length,) = struct.unpack('<Q', data[:8])
  header = json.loads(data[8 : 8 + length])
  header.pop('__metadata__', None)
  dtypes = [entry['dtype'] for entry in header.values()]
  return 2 * dtypes.count('BF16') > len(dtypes)


def _memory_file() -> str:
  """Returns the path of a file in memory, if the system supports that."""
  shared = pathlib.Path('/dev/shm')
  folder = shared if shared.is_dir() else pathlib.Path(tempfile.gettempdir())
  return str(folder / f'rotbits-benchmark-{os.getpid()}')


def _mapped(path: str) -> Arrays:
  """Maps the tensors of a file, and removes the file."""
  arrays = split(np.memmap(path, np.uint8, 'r'))
  os.unlink(path)
  return arrays


class Raw:
  """The safetensors file without compression."""

  def decode(self, path: str) -> Arrays:
    return split(pathlib.Path(path).read_bytes())


class Zstd:
  """The program `zstd`."""

  def compress(self, source: str, output: str) -> None:
    subprocess.run(['zstd', '-3', '-q', '-f', source, '-o', output], check=True)

  def decompress(self, path: str, output: str) -> None:
    subprocess.run(['zstd', '-d', '-q', '-f', path, '-o', output], check=True)

  def decode(self, path: str) -> Arrays:
    output = _memory_file()
    self.decompress(path, output)
    return _mapped(output)


class Zstandard:
  """The library of zstd."""

  def __init__(self) -> None:
    import zstandard

    self._module = zstandard

  def compress(self, source: str, output: str) -> None:
    data = pathlib.Path(source).read_bytes()
    packed = self._module.ZstdCompressor(level=3).compress(data)
    pathlib.Path(output).write_bytes(packed)

  def decode(self, path: str) -> Arrays:
    data = pathlib.Path(path).read_bytes()
    return split(self._module.ZstdDecompressor().decompress(data))


class Zipnn:
  """ZipNN, set to the dtype of most tensors of the file."""

  def compress(self, source: str, output: str) -> None:
    data = pathlib.Path(source).read_bytes()
    coder = self._coder('bfloat16' if is_bfloat16(data) else 'float16')
    pathlib.Path(output).write_bytes(coder.compress(data))

  def decompress(self, path: str, output: str) -> None:
    pathlib.Path(output).write_bytes(self._data(path))

  def decode(self, path: str) -> Arrays:
    return split(self._data(path))

  def _data(self, path: str) -> Any:
    # The compressed file says which dtype it has.
    return self._coder('float16').decompress(pathlib.Path(path).read_bytes())

  def _coder(self, dtype: str) -> Any:
    import zipnn

    return zipnn.ZipNN(bytearray_dtype=dtype, threads=os.cpu_count())


class Lmzip:
  """lmzip, which decodes from file to file."""

  def __init__(self) -> None:
    import lmz

    self._module = lmz

  def compress(self, source: str, output: str) -> None:
    self._module.compress(source, output)

  def decompress(self, path: str, output: str) -> None:
    self._module.decompress(path, output, workers=os.cpu_count(), overwrite=True)

  def decode(self, path: str) -> Arrays:
    output = _memory_file()
    self.decompress(path, output)
    return _mapped(output)


class Openzl:
  """OpenZL's graph for floats. The header of the safetensors file stays as it is."""

  def __init__(self) -> None:
    from openzl import ext

    self._module = ext

  def compress(self, source: str, output: str) -> None:
    ext, data = self._module, pathlib.Path(source).read_bytes()
    compressor = ext.Compressor()
    compressor.set_parameter(ext.CParam.FormatVersion, ext.MAX_FORMAT_VERSION)
    kinds = ext.graphs.Store, ext.graphs.Huffman, ext.graphs.Fse
    best = ext.graphs.BruteForce([kind()(compressor) for kind in kinds])(compressor)
    names = ext.nodes.Float16Deconstruct, ext.nodes.BFloat16Deconstruct
    node = names[is_bfloat16(data)]()
    compressor.select_starting_graph(node(compressor, best, best))
    context = ext.CCtx()
    context.ref_compressor(compressor)
    start = 8 + int.from_bytes(data[:8], 'little')
    numbers = np.frombuffer(data, np.uint16, offset=start)
    frame = context.compress([ext.Input(ext.Type.Numeric, numbers)])
    pathlib.Path(output).write_bytes(data[:start] + frame)

  def decode(self, path: str) -> Arrays:
    data = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    (found,) = self._module.DCtx().decompress(data[start:])
    numbers = found.content.as_nparray().view(np.uint8)
    header = np.frombuffer(data[:start], np.uint8)
    return split(np.concatenate([header, numbers]))


class Rotbits:
  """This project: `rotbits_jax.load`, which returns JAX arrays."""

  def decode(self, path: str) -> Arrays:
    import jax

    import rotbits_jax

    model = rotbits_jax.load(path)
    assert isinstance(model, rotbits_jax.Model)
    return jax.block_until_ready(jax.tree.leaves(model.params))


PEERS: dict[str, Callable[[], Any]] = {
  'safetensors': Raw,
  'zstd': Zstd,
  'zstandard': Zstandard,
  'zipnn': Zipnn,
  'lmzip': Lmzip,
  'openzl': Openzl,
  'rotbits': Rotbits,
}


def serve(peer: Any, path: str) -> None:
  """Decodes once for each line on stdin, and prints the seconds and the checksum."""
  checksum: int | None = None
  for _ in sys.stdin:
    start = time.perf_counter()
    arrays = peer.decode(path)
    seconds = time.perf_counter() - start
    if checksum is None:
      checksum = 0
      for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), checksum)
    del arrays  # frees the memory now, so that the next run's time does not include it
    print(json.dumps([seconds, checksum]), flush=True)


def print_cost(work: Callable[[], Any]) -> None:
  """Prints the seconds of a second time, and the process's peak of memory in bytes.

  For the second time caches are warm. The system's own count of the peak has that of
  the process that started this one in it, so the peak is that of Linux's `/proc`.
  """
  for _ in range(2):
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
  status = pathlib.Path('/proc/self/status').read_text()
  print(json.dumps([seconds, 1024 * int(status.split('VmHWM:')[1].split()[0])]))


def main() -> None:
  name, command, source, *output = sys.argv[1:]
  peer = PEERS[name]()
  if command == 'time':
    print_cost(lambda: getattr(peer, source)(*output))
  elif command == 'compress':
    peer.compress(source, *output)
  elif command == 'decompress':
    peer.decompress(source, *output)
  else:
    serve(peer, source)


if __name__ == '__main__':
  main()
