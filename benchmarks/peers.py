"""Times this project or another compressor in a new process.

  python benchmarks/peers.py NAME compress FILE OUTPUT
  python benchmarks/peers.py NAME decode FILE

FILE is a safetensors file, or what `compress` made of one. After a first time, which
compiles and gets memory from the system, the work is done for three seconds, at least
once. The program prints the least seconds, the peak of memory in bytes, for `decode` a
checksum of all arrays, the seconds of the first time, which imports the package, and
the least CPU seconds of all threads. It imports nothing of this project at its top,
because it must run in a Python that has only the packages of the peers.

`zstd` is the library at level 3. ZipNN and lmzip run with one thread for each CPU.
OpenZL separates exponents, and takes the best of its entropy coders for each stream; it
has one thread. `exact` and `free` are this project; `free` takes a checkpoint.
"""

from collections.abc import Callable
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


def zstd(data: bytes) -> bytes:
  import zstandard

  return zstandard.ZstdCompressor(level=3).compress(data)


def of_zstd(data: bytes) -> bytes:
  import zstandard

  return zstandard.ZstdDecompressor().decompress(data)


def zipnn(data: bytes) -> bytes:
  return _zipnn('bfloat16' if is_bfloat16(data) else 'float16').compress(data)


def of_zipnn(data: bytes) -> bytes:
  return _zipnn('float16').decompress(data)  # the data say which dtype they have


def _zipnn(dtype: str) -> Any:
  import zipnn

  return zipnn.ZipNN(bytearray_dtype=dtype, threads=os.cpu_count())


def openzl(data: bytes) -> bytes:
  """The graph for floats. The header of the safetensors file stays as it is."""
  from openzl import ext

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
  return data[:start] + context.compress([ext.Input(ext.Type.Numeric, numbers)])


def of_openzl(data: bytes) -> np.ndarray:
  from openzl import ext

  start = 8 + int.from_bytes(data[:8], 'little')
  (output,) = ext.DCtx().decompress(data[start:])
  numbers = output.content.as_nparray().view(np.uint8)
  return np.concatenate([np.frombuffer(data[:start], np.uint8), numbers])


IN_MEMORY: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], Any]]] = {
  'safetensors': (bytes, bytes),
  'zstd': (zstd, of_zstd),
  'zipnn': (zipnn, of_zipnn),
  'openzl': (openzl, of_openzl),
}


def compress(name: str, source: str, output: str) -> None:
  """Compresses a file to a file."""
  if name == 'lmzip':
    import lmz

    lmz.compress(source, output)
  elif name in IN_MEMORY:
    data = IN_MEMORY[name][0](pathlib.Path(source).read_bytes())
    pathlib.Path(output).write_bytes(data)
  else:
    import rotbits_jax

    rotbits_jax.encode_to_file(source, output, preset=name, overwrite=True)


def decode(name: str, path: str) -> Arrays:
  """Returns the arrays of a file."""
  if name == 'lmzip':  # from file to file; the file is in memory
    import lmz

    shared = pathlib.Path('/dev/shm')
    folder = shared if shared.is_dir() else pathlib.Path(tempfile.gettempdir())
    output = str(folder / f'rotbits-benchmark-{os.getpid()}')
    lmz.decompress(path, output, workers=os.cpu_count(), overwrite=True)
    arrays = split(np.memmap(output, np.uint8, 'r'))
    os.unlink(output)
    return arrays
  if name in IN_MEMORY:
    return split(IN_MEMORY[name][1](pathlib.Path(path).read_bytes()))
  import jax

  import rotbits_jax

  return jax.block_until_ready(jax.tree.leaves(rotbits_jax.load(path)))


def main() -> None:
  name, task, *paths = sys.argv[1:]
  work: Callable[..., Any] = compress if task == 'compress' else decode
  seconds: list[float] = []
  spent: list[float] = []  # by the CPUs
  while len(seconds) < 2 or sum(seconds[1:]) < 3:
    arrays = None  # frees the memory of the time before
    start, before = time.perf_counter(), time.process_time()
    arrays = work(name, *paths)
    seconds.append(time.perf_counter() - start)
    spent.append(time.process_time() - before)
  # The system's own count has the peak of the process that started this one in it.
  status = pathlib.Path('/proc/self/status').read_text()
  peak = 1024 * int(status.split('VmHWM:')[1].split()[0])
  checksum = 0
  for array in arrays or []:
    checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, checksum)
  print(json.dumps([min(seconds[1:]), peak, checksum, seconds[0], min(spent[1:])]))


if __name__ == '__main__':
  main()
