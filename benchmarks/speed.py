"""Times encoding and decoding by this project and by other compressors.

Every task is a process that does its work several times, and the least time is taken,
with caches warm and programs compiled (`benchmarks.peers`). Files are in the page
cache. Decoding is from the file to arrays in memory. A peer must return the tensors of
the safetensors file, bit for bit.
"""

from collections.abc import Iterator, Sequence
import pathlib
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from benchmarks import common
from benchmarks import synthetic
import rotbits_jax

TITLE = 'Speed and memory, and other compressors'
OTHERS = ('safetensors', 'zstd', 'zipnn', 'lmzip', 'openzl')
OURS = ('exact', 'free')
RECORDS, LEAVES = 145, 9  # of a file that is opened


class Subject(NamedTuple):
  """A model to compress.

  Attributes:
    name: in the table.
    tensors: its weights as one safetensors file.
    checkpoint: its folder, for `OURS`; None if the family is not known.
    others: the other compressors.
  """

  name: str
  tensors: pathlib.Path
  checkpoint: pathlib.Path | None = None
  others: Sequence[str] = OTHERS


def subjects(settings: common.Settings, work: pathlib.Path) -> Iterator[Subject]:
  """Yields the models, and makes their files."""
  weights = common.read_tensors(common.packaged_weights(common.BASE), 'bfloat16')
  path = work / 'minilm' / 'model.safetensors'
  yield Subject('all-MiniLM-L6-v2, bfloat16', _saved(weights, path))
  if not settings.quick:
    folder = common.smollm2(settings)
    (path,) = folder.glob('*.safetensors')
    yield Subject('SmolLM2-135M, bfloat16, once Q4_1', path)
  width, layers = (512, 5) if settings.quick else (1024, 12)
  tied = {'tie_word_embeddings': True, 'vocab_size': 32 * width}
  untied: dict[str, int] = {}
  several = ((layers // 2, tied, OTHERS[:1]), (layers, untied, OTHERS))
  for count, fields, others in several:
    folder = work / f'{width}x{count}'
    synthetic.write(folder, synthetic.llama(width, count, **fields))
    kind = 'random sliced Llama, tied' if fields else 'random sliced Llama'
    name = f'{kind}, {width} x {count} layers'
    yield Subject(name, *_plain(folder, work), others)


def _plain(
  folder: pathlib.Path, work: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns a sliced checkpoint as one safetensors file, and its folder."""
  model = rotbits_jax.load_checkpoint(folder).model
  tensors = rotbits_jax.checkpoints.to_tensors(model)
  arrays = {name: np.asarray(x) for name, x in tensors.items()}
  path = work / f'{folder.name}-plain' / 'model.safetensors'
  return _saved(arrays, path), folder


def _saved(tensors: common.Tensors, path: pathlib.Path) -> pathlib.Path:
  """Saves tensors to a safetensors file in a new folder."""
  path.parent.mkdir(parents=True)
  contiguous = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(contiguous, path)
  return path


def measure(subject: Subject, settings: common.Settings, work: pathlib.Path) -> str:
  """Returns the table of a model, whose name is the first of the header."""
  size, expected, rows = subject.tensors.stat().st_size, None, []
  packed = work / 'packed'
  others = subject.others if settings.peers_python else ()
  ours = OURS if subject.checkpoint else OURS[:1]
  for name in (*others, *ours):
    python = settings.peers_python if name in others else sys.executable
    source = (name in ours and subject.checkpoint) or subject.tensors
    encode = common.run_peer(str(python), name, 'compress', source, packed)
    decode = common.run_peer(str(python), name, 'decode', packed)
    if name == 'safetensors':
      expected = decode[2]
    elif name in others and decode[2] != expected:
      raise ValueError(f'{name} returned other tensors')
    costs = []
    for seconds, peak, *_ in (encode, decode):
      costs += [f'{seconds:.3f}', f'{size / seconds / 1e6:,.0f}', f'{peak / 1e9:.2f}']
    coded = packed.stat().st_size
    label = f'`{name}`' if name in ours else name
    costs.append(f'{decode[3]:.2f}')
    rows.append((label, common.megabytes(coded), f'{coded / size:.4f}', *costs))
    packed.unlink()
  header = [subject.name, 'MB', 'share']
  for task in ('encode', 'decode'):
    header += [f'{task} s', 'MB/s', 'GB']
  return common.table([*header, 'first s'], rows)


def opening(work: pathlib.Path) -> str:
  """Says how long it takes to open a file of many records."""
  rng, file = np.random.default_rng(0), work / 'records.rotbits'
  draw = lambda: rng.standard_normal((64, 64), np.float32)
  record = lambda: {f'{i}': draw() for i in range(LEAVES)}
  file.write_bytes(rotbits_jax.encode({f'{i}': record() for i in range(RECORDS)}))
  seconds = common.median_seconds(lambda: rotbits_jax.file.Reader(file), 20)
  what = f'a file of {RECORDS} records with {LEAVES} leaves each'
  return f'Opening {what} takes {1e3 * seconds:.1f} ms.'


def run(settings: common.Settings) -> Iterator[common.Section]:
  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    models = [*subjects(settings, work)]
    tables = [measure(x, settings, work) for x in models]
    opened, plain = opening(work), work / 'plain'
    rotbits_jax.encode_to_file(models[-2].tensors, plain)
    size = common.megabytes(plain.stat().st_size)
  of_tied = (
    'The embedding of the tied model follows from its head, up to rounding. `exact` '
    f'stores the differences; without this prediction, it would take {size} MB.'
  )
  about = (
    'Each task is a process; its least time after the first counts. Encoding is from '
    'file to file, decoding from a file to arrays; the first decoding of a process '
    'imports and compiles, too. GB are the peak resident memory. '
    'Random weights have no structure but their distribution and symmetries.'
  )
  picture = (
    '![Time to weights over the speed of a link](docs/pictures/time-to-weights.svg)'
  )
  yield common.Section(TITLE, '\n\n'.join([about, *tables, of_tied, opened, picture]))
