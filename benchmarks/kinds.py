"""Measures what files of each kind of weights take: the table of README.md.

Rows in bfloat16 and float16 are float32 weights, rounded. The pruned ones lack the half
of each matrix that is smallest. Bytes are those of the tensors, and of whole files.
"""

from collections.abc import Iterator
import pathlib
import tempfile

import numpy as np

from benchmarks import common
import rotbits_jax

TITLE = 'Bytes by kind of weights'
HEADER = ('weights', 'model', 'bytes', 'file', 'share')


def pruned(tensors: common.Tensors) -> common.Tensors:
  """Sets the smaller half of each matrix to zero."""
  half = lambda x: np.where(np.abs(x) < np.median(np.abs(x)), x.dtype.type(0), x)
  return {name: half(x) if x.ndim > 1 else x for name, x in tensors.items()}


def rows() -> Iterator[tuple[str, str, int, int]]:
  """Yields the kind, the model, and bytes before and after."""
  base, tuned = map(common.packaged_weights, (common.BASE, common.TUNED))
  name = 'all-MiniLM-L6-v2'
  for dtype in ('bfloat16', 'float16', 'float32'):
    old = common.read_tensors(base, dtype)
    size = sum(x.nbytes for x in old.values())
    model = name if dtype == 'float32' else f'{name}, rounded'
    yield dtype, model, size, len(rotbits_jax.encode(old))
    if dtype == 'bfloat16':
      yield f'{dtype}, half pruned', model, size, len(rotbits_jax.encode(pruned(old)))
      new = common.read_tensors(tuned, dtype)
      beside = len(rotbits_jax.encode(new, base=old))
      yield f'{dtype}, beside its base', 'a fine-tune of it, rounded', size, beside
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'x.rotbits')
    for preset in ('exact', 'free', 'near'):
      rotbits_jax.encode_to_file(common.SLICED, file, preset=preset, overwrite=True)
      size = rotbits_jax.inspect(file).input_bytes
      kind = f'sliced, float16, `{preset}`'
      yield kind, 'opt-small, sliced by 20%', size, file.stat().st_size


def run(settings: common.Settings) -> Iterator[common.Section]:
  del settings
  lines = [
    (kind, model, f'{before:,}', f'{after:,}', f'**{after / before:.1%}**')
    for kind, model, before, after in rows()
  ]
  about = 'The preset is `exact`, unless another one is named.'
  body = f'{about}\n\n{common.table(HEADER, lines, texts=2)}'
  yield common.Section(TITLE, body)
