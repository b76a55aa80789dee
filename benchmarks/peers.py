"""Decoders of a model's file, ours and those of other packages, each in a process.

  python benchmarks/peers.py NAME compress FILE OUTPUT
  python benchmarks/peers.py NAME serve FILE

`compress` writes what NAME makes of a safetensors file. `serve` answers each line on
stdin by decoding FILE to arrays once: it prints seconds, and the CRC-32 of all the
arrays' bytes after the first time. A module of its own imports nothing of this project,
so that a Python which has the peers' packages only can run it; benchmarks/decode.py
does.

`zstd` is the program, which decompresses into a file in memory that is then mapped,
and `zstandard` its library in Python; both compress at level 3. ZipNN and lmzip run
with one thread a processor.
"""

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any
import zlib

import numpy as np

Arrays = list[Any]


def split(data: Any) -> Arrays:
  """The tensors of a safetensors file, as views of its bytes: uint8 arrays."""
  view = np.frombuffer(data, np.uint8)
  start = 8 + int(view[:8].view('<u8')[0])
  header = json.loads(view[8:start].tobytes())
  header.pop('__metadata__', None)
  offsets = [entry['data_offsets'] for entry in header.values()]
  return [view[start + begin : start + end] for begin, end in offsets]


def _memory_file() -> str:
  """A path in memory, if the system has such."""
  shared = pathlib.Path('/dev/shm')
  folder = shared if shared.is_dir() else pathlib.Path(tempfile.gettempdir())
  return str(folder / f'rotbits-benchmark-{os.getpid()}')


def _mapped(path: str) -> Arrays:
  """The tensors of a file that is removed at once."""
  arrays = split(np.memmap(path, np.uint8, 'r'))
  os.unlink(path)
  return arrays


class Raw:
  """The safetensors file itself."""

  def compress(self, source: str, output: str) -> None:
    pathlib.Path(output).write_bytes(pathlib.Path(source).read_bytes())

  def decode(self, path: str) -> Arrays:
    return split(pathlib.Path(path).read_bytes())


class Zstd:
  """The program."""

  def compress(self, source: str, output: str) -> None:
    subprocess.run(['zstd', '-3', '-q', '-f', source, '-o', output], check=True)

  def decode(self, path: str) -> Arrays:
    output = _memory_file()
    subprocess.run(['zstd', '-d', '-q', '-f', path, '-o', output], check=True)
    return _mapped(output)


class Zstandard:
  """The library."""

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
  """ZipNN, told that the numbers are float16."""

  def __init__(self) -> None:
    import zipnn

    threads = os.cpu_count()
    self._coder = zipnn.ZipNN(bytearray_dtype='float16', threads=threads)

  def compress(self, source: str, output: str) -> None:
    data = pathlib.Path(source).read_bytes()
    pathlib.Path(output).write_bytes(self._coder.compress(data))

  def decode(self, path: str) -> Arrays:
    return split(self._coder.decompress(pathlib.Path(path).read_bytes()))


class Lmzip:
  """lmzip, which decodes from file to file."""

  def __init__(self) -> None:
    import lmz

    self._module = lmz

  def compress(self, source: str, output: str) -> None:
    self._module.compress(source, output)

  def decode(self, path: str) -> Arrays:
    output = _memory_file()
    self._module.decompress(path, output, workers=os.cpu_count(), overwrite=True)
    return _mapped(output)


class Rotbits:
  """This project: JAX arrays, by `rotbits_jax.load`."""

  def decode(self, path: str) -> Arrays:
    import jax

    import rotbits_jax

    return jax.block_until_ready(jax.tree.leaves(rotbits_jax.load(path).params))


PEERS: dict[str, Callable[[], Any]] = {
  'safetensors': Raw,
  'zstd': Zstd,
  'zstandard': Zstandard,
  'zipnn': Zipnn,
  'lmzip': Lmzip,
  'rotbits': Rotbits,
}


def serve(peer: Any, path: str) -> None:
  """Decodes once for each line on stdin."""
  checksum: int | None = None
  for _ in sys.stdin:
    start = time.perf_counter()
    arrays = peer.decode(path)
    seconds = time.perf_counter() - start
    if checksum is None:
      checksum = 0
      for array in arrays:
        checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), checksum)
    del arrays  # a decoder that is timed has no other's memory to give back
    print(json.dumps([seconds, checksum]), flush=True)


def main() -> None:
  name, command, source, *output = sys.argv[1:]
  peer = PEERS[name]()
  if command == 'compress':
    peer.compress(source, *output)
  else:
    serve(peer, source)


if __name__ == '__main__':
  main()
