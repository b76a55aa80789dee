"""Measures what files of each type of weights take; makes the tables of README.md.

Rows in bfloat16 and float16 are float32 weights, rounded. The pruned ones lack the half
of each matrix that is smallest. MB are of the tensors, and of whole files.
"""

from collections.abc import Iterator
import pathlib
import re
import tempfile

import numpy as np

from benchmarks import common
from benchmarks import speed
import rotbits_jax

TITLE = 'Bytes by type of weights'
HEADER = ('weights', 'model', 'MB', 'file MB', 'share')


def pruned(tensors: common.Tensors) -> common.Tensors:
  """Sets the smaller half of each matrix to zero."""
  half = lambda x: np.where(np.abs(x) < np.median(np.abs(x)), x.dtype.type(0), x)
  return {name: half(x) if x.ndim > 1 else x for name, x in tensors.items()}


def rows(settings: common.Settings) -> Iterator[tuple[str, str, int, int]]:
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
      yield f'{dtype}, given its base', 'a fine-tune of it, rounded', size, beside
  with tempfile.TemporaryDirectory() as work:
    file = pathlib.Path(work, 'x.rotbits')
    name = 'opt-small, sliced by 20%'
    subjects = [
      (f'sliced, float16, `{preset}`', name, common.SLICED, preset)
      for preset in ('exact', 'free', 'near')
    ]
    if not settings.quick:
      folder = common.smollm2(settings)
      once = 'bfloat16, once quantised', 'SmolLM2-135M, once Q4_1'
      subjects.insert(0, (*once, folder, 'exact'))
    for weights, model, path, preset in subjects:
      rotbits_jax.encode_to_file(path, file, preset=preset, overwrite=True)
      size = rotbits_jax.inspect(file).input_bytes
      yield weights, model, size, file.stat().st_size


def tables_of_readme() -> dict[str, str]:
  """Makes the tables of README.md from those of RESULTS.md, by their markers.

  The first has one model in bfloat16 by other compressors and by `exact`; the second
  has the rows of this benchmark with a base, of quantised and of sliced models.
  """
  (speeds, *_), (sizes, *_) = map(common.tables, (speed.TITLE, TITLE))
  header = ('tool', 'MB', 'share', 'encode s', 'decode s')
  model, lines = next(iter(speeds[0])), []
  for row in speeds:
    if row[model] != 'safetensors':
      times = (f'{float(row[x]):.2f}' for x in header[3:])
      lines.append((row[model], row['MB'], f'{float(row["share"]):.1%}', *times))
  kept = [name for name in HEADER if name != 'model']
  alone = [x for x in sizes if re.search('^sliced| base$| quantised$', x['weights'])]
  others = [[row[name] for name in kept] for row in alone]
  return {
    'peers': common.table(header, lines),
    'sizes': common.table(kept, others),
  }


def write_readme() -> None:
  """Writes the tables of README.md between their markers."""
  path = common.ROOT / 'README.md'
  text = path.read_text('utf-8')
  for name, table in tables_of_readme().items():
    start, end = f'<!-- {name}: start -->\n', f'<!-- {name}: end -->'
    before, _, rest = text.partition(start)
    text = f'{before}{start}{table}\n{end}{rest.partition(end)[2]}'
  path.write_text(text, 'utf-8')


def run(settings: common.Settings) -> Iterator[common.Section]:
  lines = [
    (kind, model, *map(common.megabytes, sizes), f'**{sizes[1] / sizes[0]:.1%}**')
    for kind, model, *sizes in rows(settings)
  ]
  about = 'Files of `exact`, unless a row names a preset. Pruned weights are zero.'
  body = f'{about}\n\n{common.table(HEADER, lines, texts=2)}'
  yield common.Section(TITLE, body)
