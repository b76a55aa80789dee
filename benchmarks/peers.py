"""Times this project or another compressor in a process of its own.

  python benchmarks/peers.py NAME compress FILE OUTPUT
  python benchmarks/peers.py NAME decode FILE

FILE is a safetensors file, or what `compress` made of one. The work is done twice. The
program prints the seconds of the second time, the peak of memory in bytes, and for
`decode` a checksum of all arrays. It imports nothing of this project at its top,
because it must run in a Python that has only the packages of the peers.

`zstd` is the library at level 3. ZipNN and lmzip run with one thread for each CPU.
OpenZL separates exponents, and takes the best of its entropy coders for each stream; it
has one thread. `exact` and `free` are this project; `free` takes a checkpoint.
"""

from collections.abc import Callable
import functools
import json
import os
import pathlib
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
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  header.pop('__metadata__', None)
  dtypes = [entry['dtype'] for entry in header.values()]
  return 2 * dtypes.count('BF16') > len(dtypes)


class Raw:
  """The safetensors file without compression."""

  def compress(self, source: str, output: str) -> None:
    pathlib.Path(output).write_bytes(pathlib.Path(source).read_bytes())

  def decode(self, path: str) -> Arrays:
    return split(pathlib.Path(path).read_bytes())


class Zstd:
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

  def decode(self, path: str) -> Arrays:
    # The compressed file says which dtype it has.
    return split(self._coder('float16').decompress(pathlib.Path(path).read_bytes()))

  def _coder(self, dtype: str) -> Any:
    import zipnn

    return zipnn.ZipNN(bytearray_dtype=dtype, threads=os.cpu_count())


class Lmzip:
  """lmzip, which decodes from file to file; the file is in memory."""

  def __init__(self) -> None:
    import lmz

    self._module = lmz

  def compress(self, source: str, output: str) -> None:
    self._module.compress(source, output)

  def decode(self, path: str) -> Arrays:
    shared = pathlib.Path('/dev/shm')
    folder = shared if shared.is_dir() else pathlib.Path(tempfile.gettempdir())
    output = str(folder / f'rotbits-benchmark-{os.getpid()}')
    self._module.decompress(path, output, workers=os.cpu_count(), overwrite=True)
    arrays = split(np.memmap(output, np.uint8, 'r'))
    os.unlink(output)
    return arrays


class Openzl:
  """OpenZL's graph for floats. The header of the safetensors file stays as it is."""

  def __init__(self) -> None:
    from openzl import ext

    self._module = ext

  def compress(self, source: str, output: str) -> None:
    ext, data = self._module, pathlib.Path(source).read_bytes()
    compressor = ext.Compressor()
    compressor.set_parameter(ext.CParam.FormatVersion, ext.MAX_FORMAT_VERSION)
    coders = ext.graphs.Store, ext.graphs.Huffman, ext.graphs.Fse
    best = ext.graphs.BruteForce([x()(compressor) for x in coders])(compressor)
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
    (output,) = self._module.DCtx().decompress(data[start:])
    numbers = output.content.as_nparray().view(np.uint8)
    return split(np.concatenate([np.frombuffer(data[:start], np.uint8), numbers]))


class Rotbits:
  """This project: `encode_to_file`, and `load`, which returns JAX arrays."""

  def __init__(self, preset: Any) -> None:
    self._preset = preset

  def compress(self, source: str, output: str) -> None:
    import rotbits_jax

    rotbits_jax.encode_to_file(source, output, preset=self._preset, overwrite=True)

  def decode(self, path: str) -> Arrays:
    import jax

    import rotbits_jax

    return jax.block_until_ready(jax.tree.leaves(rotbits_jax.load(path)))


PEERS: dict[str, Callable[[], Any]] = {
  'safetensors': Raw,
  'zstd': Zstd,
  'zipnn': Zipnn,
  'lmzip': Lmzip,
  'openzl': Openzl,
  'exact': functools.partial(Rotbits, 'exact'),
  'free': functools.partial(Rotbits, 'free'),
}


def main() -> None:
  name, task, *paths = sys.argv[1:]
  work = getattr(PEERS[name](), task)
  for _ in range(2):  # the second time caches are warm, and programs compiled
    arrays = None  # frees the memory of the first time
    start = time.perf_counter()
    arrays = work(*paths)
    seconds = time.perf_counter() - start
  # The system's own count has the peak of the process that started this one in it.
  status = pathlib.Path('/proc/self/status').read_text()
  peak = 1024 * int(status.split('VmHWM:')[1].split()[0])
  checksum = 0
  for array in arrays or []:
    checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, checksum)
  print(json.dumps([seconds, peak, checksum]))


if __name__ == '__main__':
  main()
